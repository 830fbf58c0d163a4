"""Text to ids and back, for the three kinds of tokenizer that LLaMA's relatives come with.

    tokenizer.model, a sentencepiece model    Llama 1 and 2, Mistral, TinyLlama, Yi
    tokenizer.json, Hugging Face's            SmolLM2, Qwen2, Llama 3 as converted
    tokenizer.model, lines of "base64 rank"   Llama 3 as Meta ships it (tiktoken's format)

If a directory holds several, the first of these counts. The library of each kind cuts the text.
Two things are decided here, in the same way for all: which ids begin and end a text, and that no
text ever becomes one of them. "</s>" in a question is four characters. Only `bos=True`, `eos=True`
and a chat template make tokens.
"""
import base64
import json
import re
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import sentencepiece

MARK = "\ufdd1"       # no character: stands in the name of a control token that has to stay text


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    bos: the id that begins every prompt; None if the model was trained without one.
    eos: the id that ends a response. stops: frozenset of the ids that end generation, eos and more.
    start: the id before plain text: bos, even one that is declared but not prepended, else eos.
    pad: any valid id, because padding is never seen and never learnt. vocab_size: above every id.
    control: a regular expression that finds the names of tokens which no text becomes.
    controls: the ids of these. template: the chat template, a str, or None. names: {"bos_token":
    "<s>", ...}, which a template uses. in_chat: whether questions are asked in it, see chat.use.

    FileNotFoundError if there is no tokenizer, ValueError naming a file that cannot be used.
    """

    def __init__(self, ckpt_dir):
        folder = Path(ckpt_dir)
        path, kind = file_and_kind(folder)
        with usable(path):
            lib = self.lib = kind(path)
        with usable(folder / "tokenizer_config.json"):
            config = optional_json(folder / "tokenizer_config.json")
            added = added_tokens(folder, config)
            ids = {**{name: token["id"] for name, token in added.items()}, **lib.ids}
            special = {ids[name] for name, token in added.items() if token["special"]}
            if min(ids.values()) < 0:
                raise ValueError("an id below 0")
            declared, eos = token_id(config, "bos_token", ids), token_id(config, "eos_token", ids)
            declared, adds = lib.bos if declared is None else declared, config.get("add_bos_token")
            if adds not in (None, False, True) or (adds and declared is None):
                raise ValueError("add_bos_token should be false, or true with a bos_token")
        adds = lib.adds_bos if adds is None else adds
        self.bos = lib.before if lib.before is not None else declared if adds else None
        listed, size = [], max(lib.size, 1 + max(ids.values()))
        for name in ("config.json", "generation_config.json"):
            with usable(folder / name):
                listed += eos_ids(optional_json(folder / name), size)
        self.eos = next((i for i in (eos, *listed, lib.eos) if i is not None), None)
        if self.eos is None:
            raise ValueError(f"{path}: which token ends a text? Say so in tokenizer_config.json, "
                             'beside it: {"eos_token": "</s>"}')
        self.stops = frozenset([self.eos, *listed, *lib.stops])
        self.start = next(i for i in (self.bos, declared, self.eos) if i is not None)
        self.pad = self.eos if lib.pad is None else lib.pad
        with usable(path):
            lib.hide(hidden := self.stops | {self.start} | special, added, config.get("legacy"))
            names = {*lib.control, *(name for name, i in ids.items() if i in hidden)} - {""}
            self.control = re.compile(any_of(names))
            self.named = {name: ids[name] for name in names if name in ids}
            self.controls = frozenset(self.named.values())
            self.vocab_size = 1 + max(lib.size - 1, self.start, *self.stops, *lib.words)
            self.decode(self.encode("A 1 é\n"))          # if it does not work, it fails here
        with usable(folder / "tokenizer_config.json"):
            self.names = special_names(config, self.named, declared, self.eos)
        self.folder, self.in_chat, self.template = folder, False, chat_template(folder, config)
        self.day = None                              # that a template writes; None for today

    def encode(self, text, bos=False, eos=False):
        """Text to ids. A literal "<s>" in it is plain characters, never the BOS token."""
        bos = bos and self.bos is not None
        return [self.bos] * bos + self.lib.encode(text) + [self.eos] * eos

    def encode_chat(self, text):
        """What a chat template made -> (ids, ends). Names of control tokens become these tokens,
        except those with MARK in them. ends: where each token ends in the text, which counts
        without MARK; None if unknown."""
        return self.lib.encode_chat(text, self.named)

    def decode(self, ids):
        """Ids to text. BOS, EOS and padding have no text and are left out. So are ids beyond the
        vocabulary: an embedding table may be padded, and a model may sample from there."""
        ids = [int(i) for i in ids if 0 <= i < self.lib.size or int(i) in self.lib.words]
        return self.lib.decode([i for i in ids if i not in (self.start, self.eos)])


# The three kinds. ids: {token: id}. before: the BOS that the file itself puts before every text.
# adds_bos: True if there is a BOS although neither the file nor tokenizer_config.json says so.
# control: names of tokens that no text becomes. words: {id: text} of words added in other files.

class SentencePiece:
    """tokenizer.model, as sentencepiece reads it."""
    adds_bos, before, stops, words = True, None, (), {}

    def __init__(self, path):
        self.proto = path.read_bytes() or b"empty"            # No bytes at all raise no error.
        sp = self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.proto)
        self.size = len(sp)
        self.ids = {sp.id_to_piece(i): i for i in range(self.size)}
        # Llama 2 has no pad token: its id is -1, which no embedding table can look up.
        self.bos, self.eos, self.pad = [i if i >= 0 else None
                                        for i in (sp.bos_id(), sp.eos_id(), sp.pad_id())]
        self.control = [token for token, i in self.ids.items() if sp.is_control(i)]

    def hide(self, control, added, legacy):
        """A text may spell pieces of type 4, as some chat tokens are: make them type 3, control.

        The other added tokens are words. A text is cut around them, before its pieces are found.
        """
        names = [re.escape(self.sp.id_to_piece(i).encode()) for i in control if i < self.size]
        # A piece in the file: newline, length of the name, name, score, type.
        piece = rb"(\n[\x00-\x7f](?:" + b"|".join(names) + rb")\x15.{4}\x18)\x04"
        proto = re.sub(piece, b"\\1\x03", self.proto, flags=re.DOTALL)
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.added = {name: token for name, token in added.items() if token["id"] not in control}
        self.words = {token["id"]: name for name, token in self.added.items()}
        self.cut = cut_at(self.added)
        # Behind a word no space is put before the text: normalizer_spec.add_dummy_prefix = false,
        # which protobuf merges with what the file says. "legacy" is how transformers began.
        self.inner = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        self.legacy, self.all_added = legacy, added

    def encode(self, text):
        return self.encode_parts(text, self.added, self.cut) if self.words else self.sp.encode(text)

    def encode_chat(self, text, named):
        tokens = {**{name: {"id": i} for name, i in named.items()}, **self.all_added}
        return self.encode_parts(text, tokens, cut_at(tokens)), None

    def encode_parts(self, text, tokens, cut):
        """Ids of a text with words, or control tokens, in it: {name: {"id", ...}}."""
        parts, ids = cut.split(text), []                          # text, word, text ... word, text
        words = [{}, *map(tokens.get, parts[1::2]), {}]
        for part, before, after in zip(parts[::2], words, words[1:], strict=False):
            part = part.replace(MARK, "")
            part = part.lstrip() if before.get("rstrip") else part
            part = part.rstrip() if after.get("lstrip") else part
            first = not before or self.legacy and not part.startswith(" ")
            ids += (self.sp if first else self.inner).encode(part)
            ids += [after["id"]] if after else []
        return ids

    def decode(self, ids):
        text, sp = "", self.sp
        for is_word, group in groupby(ids, self.words.__contains__):
            run = list(group)
            text += "".join(map(self.words.get, run)) if is_word else sp.decode(run)
            sp = self.inner if self.words else sp
        return text


class HuggingFace:
    """tokenizer.json, as the tokenizers package reads it."""
    adds_bos, eos, pad, stops, words = False, None, None, (), {}

    def __init__(self, path):
        import tokenizers
        raw = path.read_bytes()
        tok = self.tok = tokenizers.Tokenizer.from_buffer(raw)
        tok.encode_special_tokens = True               # "encode" means here: as any other text
        # A file may carry settings of the run that wrote it. Dropout would make merges random.
        tok.no_truncation()
        tok.no_padding()
        if getattr(tok.model, "dropout", None):
            tok.model.dropout = None
        # The package numbers added tokens as it likes, whatever the file says.
        listed = json.loads(raw).get("added_tokens") or ()
        self.control = [token["content"] for token in listed if token["special"]]
        for token in listed:
            if tok.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"{token['content']!r} cannot have the id {token['id']}")
        self.ids = tok.get_vocab()
        self.size = 1 + max(self.ids.values())
        encoding = tok.encode("A")
        before = encoding.ids[:encoding.special_tokens_mask.index(0)]
        if len(before) > 1 or max(before, default=0) >= self.size:
            raise ValueError(f"it begins texts with the ids {before}, not with one BOS")
        self.bos = self.before = before[0] if before else None

    def hide(self, control, added, legacy):
        """Mark as special: other added tokens (tool_call, runs of spaces) are words of a text."""
        added = self.tok.get_added_tokens_decoder()
        self.tok.add_special_tokens([added[i].content for i in control if i in added])

    def encode(self, text):
        return self.tok.encode(text, add_special_tokens=False).ids

    def encode_chat(self, text, named):
        ids, ends, at = [], [], 0
        if MARK in text:
            for n, part in enumerate(re.split(f"({any_of(named)})", text)):
                part = part.replace(MARK, "")
                found = self.tok.encode(part, add_special_tokens=False)
                ids += [named[part]] if n % 2 else found.ids
                ends += [at + len(part)] if n % 2 else [at + end for _, end in found.offsets]
                at += len(part)
            return ids, ends
        self.tok.encode_special_tokens = False
        encoding = self.tok.encode(text, add_special_tokens=False)
        self.tok.encode_special_tokens = True
        return encoding.ids, [end for _, end in encoding.offsets]

    def decode(self, ids):
        return self.tok.decode(ids)


class Tiktoken:
    """Llama 3's tokenizer.model: the ranks of byte strings, and 256 control tokens after them."""
    adds_bos, before, pad, words = True, None, None, {}
    control = [f"<|{name}|>" for name in ("begin_of_text", "end_of_text", "eot_id", "eom_id",
                                          "start_header_id", "end_header_id", "python_tag")]
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
               r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

    def __init__(self, path):
        import tiktoken
        ranks = {}
        for n, line in enumerate(path.read_bytes().splitlines()):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = n
            if int(rank) != n or len(ranks) <= n:
                raise ValueError(f"line {n + 1}: not rank {n}, or a token seen before")
        if not ranks.keys() >= {bytes([byte]) for byte in range(256)}:
            raise ValueError("some of the 256 bytes are missing")
        self.tok = tiktoken.Encoding("", pat_str=self.pattern, mergeable_ranks=ranks,
                                     special_tokens={})
        n = len(ranks)
        self.size = n + 256
        self.ids = {f"<|{name}|>": n + i for name, i in (
            ("begin_of_text", 0), ("end_of_text", 1), ("start_header_id", 6), ("end_header_id", 7),
            ("eom_id", 8), ("eot_id", 9), ("python_tag", 10))}
        # The base model ends with end_of_text, the instructed one with eot_id. The file does not
        # say which one it is. Responses end with the first (Meta's eos_id), generation with either.
        self.bos, self.eos, self.stops = n, n + 1, (n + 1, n + 9)
        # The file does not say how long it is, and all ids above depend on that.
        size = optional_json(path.with_name("params.json")).get("vocab_size", -1)
        if size not in (-1, self.size):
            raise ValueError(f"{n} lines and 256 control tokens, but params.json says {size}")

    def hide(self, control, added, legacy):
        """Nothing is left to do: control tokens have no names here, so no text can spell them."""
        return None

    def encode_chat(self, text, named):
        return encode_between(text, named, self.encode), None

    def encode(self, text):
        # As Meta does, because a million spaces in a row make the regular expression overflow.
        parts = re.split(r"(\s{25000})", text)
        return [i for part in parts for i in self.tok.encode_ordinary(part)]

    def decode(self, ids):
        return self.tok.decode([i for i in ids if i < self.bos])


# Texts with control tokens in them ----------------------------------------------------------------

def any_of(names):
    """A regular expression that finds names, the longest first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


@lru_cache
def cut_at_names(names):
    """A regular expression that splits a text at (name, whether it must stand alone)."""
    return re.compile("(%s)" % "|".join(
        rf"(?<!\w){re.escape(name)}(?!\w)" if alone else re.escape(name)
        for name, alone in sorted(names, key=lambda n: -len(n[0]))))


def cut_at(tokens):
    """A regular expression that splits a text at the tokens {name: {"single_word", ...}}."""
    return cut_at_names(tuple((name, token.get("single_word")) for name, token in tokens.items()))


def encode_between(text, named, encode):
    """The ids of a text, whose parts between the control tokens {name: id} are encoded alone."""
    parts = re.split(f"({any_of(named)})", text)
    return [i for n, part in enumerate(parts) if part
            for i in ([named[part]] if n % 2 else encode(part.replace(MARK, "")))]


# What the files say -------------------------------------------------------------------------------

def file_and_kind(folder):
    """The tokenizer's file and its kind, one of the three above."""
    model, fast, kind = folder / "tokenizer.model", folder / "tokenizer.json", None
    if not model.is_file():                                      # Mistral's have a version: .v3
        model = max(folder.glob("tokenizer.model.v[0-9]"), default=model)
    if model.is_file():
        with open(model, "rb") as file:
            kind = Tiktoken if re.match(rb"\S+ \d+\r?\n", file.read(1000)) else SentencePiece
    if kind is SentencePiece or (kind and not fast.is_file()):
        return model, kind
    if not fast.is_file():
        what = ("tekken.json, Mistral's, is not read: tokenizer.json, of Hugging Face's download, "
                "is the same" if (folder / "tekken.json").is_file() else
                "copy there the one the model came with")
        raise FileNotFoundError(f"{model}: no such file, and no {fast.name} either; {what}")
    return fast, HuggingFace


@contextmanager
def usable(path):
    """If the content of a file makes a library fail: one ValueError that names the file."""
    try:
        yield
    except ImportError as e:
        raise ValueError(f"{path} needs the {e.name} package: pip install {e.name}") from None
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:      # a panic in a library written in Rust is not even an Exception
        reason = str(e).strip().partition("\n")[0][:200]
        if path.exists() and path.read_bytes().startswith(b"version https://git-lfs"):
            reason = "it is Git LFS's pointer to the file: git lfs pull"
        raise ValueError(f"{path}: of no use, perhaps damaged; copy it again ({reason})") from None


def optional_json(path):
    """The object in a JSON file; {} if there is no such file."""
    return {**json.loads(path.read_bytes())} if path.exists() else {}


def added_tokens(folder, config):
    """{token: {"id", "special", ...}} of those that files beside a tokenizer add to it.

    tokenizer_config.json has all about them, or tokenizer.json, with transformers 5. Older files
    are special_tokens_map.json and added_tokens.json, {token: id}.
    """
    special, added = set(names(config)), {}
    with usable(folder / "tokenizer.json"):
        for token in optional_json(folder / "tokenizer.json").get("added_tokens") or ():
            added[token["content"]] = token
    with usable(folder / "special_tokens_map.json"):
        special.update(names(optional_json(folder / "special_tokens_map.json")))
    with usable(folder / "added_tokens.json"):
        for name, i in optional_json(folder / "added_tokens.json").items():
            added[name] = {"id": int(i)}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = {**token, "id": int(i)}
    if not all(isinstance(name, str) and name for name in added):
        raise ValueError("an added token has no text")
    return {name: {**token, "special": bool(token.get("special")) or name in special}
            for name, token in added.items()}


def names(config):
    """The tokens that a file names for a purpose: eos_token, additional_special_tokens ..."""
    for key, value in config.items():
        if re.search("_tokens?$", key):
            values = value.values() if isinstance(value, dict) and "content" not in value else (
                value if isinstance(value, list) else [value])
            tokens = (v["content"] if isinstance(v, dict) and "content" in v else v for v in values)
            yield from (token for token in tokens if isinstance(token, str))


def token_id(config, key, ids):
    """The id of the token that `config` names, as "<s>" or {"content": "<s>"}; None for none."""
    token = config.get(key)
    token = token["content"] if isinstance(token, dict) else token
    if token in (None, ""):
        return None
    if token not in ids:
        raise ValueError(f"{key}: there is no token {token!r:.60}")
    return ids[token]


def eos_ids(config, size):
    """The list of ids under eos_token_id: one id, a list of them, or nothing."""
    ids = config.get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and 0 <= i < size for i in ids):
        raise ValueError(f"eos_token_id should be ids from 0 to {size - 1}, not {ids!r:.60}")
    return ids


def special_names(config, named, bos, eos):
    """{"bos_token": "<s>", ...} of tokenizer_config.json. If it does not name BOS or EOS: of the
    ids."""
    found = {key: token["content"] if isinstance(token, dict) else token
             for key, token in config.items() if re.fullmatch("[a-z]+_token", key)
             and not key.startswith("add_") and token}
    by_id = {i: name for name, i in named.items()}
    for key, i in ("bos_token", bos), ("eos_token", eos):
        if key not in found and i in by_id:
            found[key] = by_id[i]
    return {key: name for key, name in found.items() if isinstance(name, str)}


def chat_template(folder, config=None):
    """The chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; None
    if there is none."""
    path = folder / "chat_template.jinja"
    with usable(path):
        if path.is_file():
            return path.read_text("utf-8")
    for name in "tokenizer_config.json", "chat_template.json":
        with usable(folder / name):
            found = (optional_json(folder / name) if config is None or name[0] == "c" else config
                     ).get("chat_template")
            if isinstance(found, list):                                      # several, with names
                found = {one["name"]: one["template"] for one in found}["default"]
            if not isinstance(found, (str, type(None))):
                raise ValueError("chat_template should be a text, or a list of named ones")
            if found:
                return found
    return None
