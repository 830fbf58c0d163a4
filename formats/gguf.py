"""GGUF, llama.cpp's format: one file that holds a model's numbers, its weights and its tokenizer.

convert.py turns it into a folder in Hugging Face's layout. Three things are special:

1. Files of the architectures "llama" and "smollm3" keep the rows of q and k in Meta's order (see
   model.reorder). Those of "qwen2", "qwen3" and "gemma" keep them as they are here.
2. A byte-level vocabulary ("gpt2") is not complete without the rule by which text is cut into
   words before the merges apply. The file only names this rule. A sentencepiece vocabulary
   ("llama") is its pieces, scores and types, and little else.
3. Quantised weights have lost precision for good: they become plain numbers, no more exact than
   the quantisation left them.

A file that asks for anything else is refused by name: a wrong model that still speaks English is
worse than none. The gguf package reads the file (pip install gguf), NumPy comes with it. This file
imports no model.

    numbers, found, info = gguf.open_gguf(path)          # the fields of model.Config, tensors, keys
    tensors = gguf.checked(found, shapes, path)          # {parameter name: function that reads it}
    files, ids = gguf.tokenizer_files(info, numbers["vocab_size"], path)      # {file name: bytes}
"""
import json
from functools import partial
from math import pi, prod
from mmap import ACCESS_READ, mmap

import sentencepiece
import torch

from formats.meta import LLAMA3_ROPE, check_finite, check_heads, check_names, check_number

FAMILIES = "llama", "qwen2", "qwen3", "smollm3", "gemma"
INTERLEAVED = "llama", "smollm3"                   # their q and k are in Meta's order

# Our names of the numbers: the keys, after "llama." or another family.
NUMBERS = {"dim": "embedding_length", "n_layers": "block_count", "n_heads": "attention.head_count",
           "n_kv_heads": "attention.head_count_kv", "ffn_dim": "feed_forward_length",
           "norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
           "max_seq_len": "context_length", "head_dim": "attention.key_length"}
OPTIONAL = ("rope_theta", "max_seq_len", "head_dim")

# GGUF's names of the modules.
GGUF = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm"}

# Kinds of tokens; the numbers are sentencepiece's.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Kinds of values in the header: the bytes of a number by its kind; and the two others. A list is
# longer than any vocabulary from MANY entries on.
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, LIST, MANY = 8, 9, 2**20

# The lists of a vocabulary, and the type of their entries.
LISTS = {"tokens": str, "token_type": int, "merges": str, "scores": float}


def cut_at(expression):
    """tokenizer.json's entry for a regular expression whose matches are words."""
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated",
            "invert": False}


# How byte-level vocabularies cut text into words, by the name that a GGUF gives the rule. "default"
# is left out. Files say it if their maker did not know the rule (some of the first of Llama 3 do),
# and llama.cpp itself only guesses.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LATER = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
RULES = {"gpt-2": [cut_at(GPT2)],
         "smollm": [{"type": "Digits", "individual_digits": True}, cut_at(GPT2)],
         "llama-bpe": [cut_at(LATER % r"\p{N}{1,3}")], "qwen2": [cut_at(LATER % r"\p{N}")]}
ALSO_CALLED = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


# ----------------------------------------------------------------------------- numbers and weights

def open_gguf(path):
    """(numbers, tensors, info) of a file; no weight is read yet.

    numbers: {field of model.Config: value}. tensors: {GGUF's name: (shape, function that reads it,
    in float32)}. info: all of the file's keys. ValueError for a file that cannot be used.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise ValueError(f"{path} needs the gguf package: pip install gguf") from None
    with open(path, "rb") as file:                       # or the reader would say "cannot mmap"
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
    try:
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            check_header(data, GGML_QUANT_SIZES)
        reader = GGUFReader(path)
        tensors = {t.name: t for t in reader.tensors}
        info = {key: value(field) for key, field in reader.fields.items()}
    except Exception as e:                               # many kinds, for a damaged file
        reason = str(e).partition("\n")[0][:120]
        raise ValueError(f"{path}: not readable, perhaps truncated: download it again "
                         f"({reason})") from None

    def read(t):
        try:
            W = torch.tensor(dequantize(t.data, t.tensor_type))
        except RuntimeError as e:
            raise ValueError(f"{path}: {t.name}: {e}") from None
        return check_finite(W, f"{path}: {t.name}")

    # GGUF counts the axes from the last one.
    found = {n: (tuple(t.shape[::-1].tolist()), partial(read, t)) for n, t in tensors.items()}
    return read_numbers(info, found, path), found, info


def check_header(data, blocks):
    """ValueError unless all that a header tells of is in the file: GGUFReader believes every number
    and would run, or fill the memory, without end.

    data: the file's bytes. blocks: {type of a tensor: (numbers in a block, bytes of a block)}.
    """
    at, order, alignment, ends = 4, "little", 32, {}

    def skip(size):                                        # the bytes that are passed over
        nonlocal at
        if size > len(data) - at:
            raise ValueError("it ends too early")
        at += size
        return slice(at - size, at)

    def number(size=8):
        return int.from_bytes(data[skip(size)], order)

    def name():
        size = number()
        return data[skip(size if size < MANY else len(data))]      # too long: it ends too early

    def skip_value(kind):
        if kind in BYTES:
            skip(BYTES[kind])
        elif kind == STRING:
            skip(number())
        elif kind == LIST:
            of, count = number(4), number()
            if of not in (*BYTES, STRING) or count > MANY:
                raise ValueError(f"a list of {count} entries of kind {of}")
            for _ in range(count):
                skip_value(of)
        else:
            raise ValueError(f"a value of kind {kind}")

    if not data[4:6].strip(b"\0"):                         # the version, 2 or 3
        order = "big"
    version, tensors, keys = number(4), number(), number()
    if version not in (2, 3) or max(tensors, keys) > MANY:
        raise ValueError(f"version {version}, {tensors} tensors, {keys} keys")
    for _ in range(keys):
        key, kind, where = name(), number(4), at
        skip_value(kind)
        if key == b"general.alignment":
            alignment = int.from_bytes(data[where:at], order)
    if alignment.bit_count() != 1:
        raise ValueError(f"general.alignment is {alignment}")
    for _ in range(tensors):
        tensor, axes = str(name(), "utf-8"), number(4)
        if axes > 4:
            raise ValueError(f"{tensor} has {axes} axes")
        count, kind, offset = prod(number() for _ in range(axes)), number(4), number()
        if kind not in blocks or offset % alignment:
            raise ValueError(f"{tensor} is of type {kind}, at {offset}")
        ends[tensor] = offset + count // blocks[kind][0] * blocks[kind][1]
    start = -(-at // alignment) * alignment
    for tensor, end in ends.items():
        if start + end > len(data):
            raise ValueError(f"{tensor} ends at byte {start + end} of {len(data)}")


def checked(found, shapes, path):
    """{parameter name: function that reads it} of the tensors of `open_gguf`.

    shapes: {parameter name: shape} of the network; ValueError for other tensors or shapes.
    """
    check_names(found, map(gguf_name, shapes), path)
    for name, shape in shapes.items():
        if found[gguf_name(name)][0] != shape:
            raise ValueError(f"{path}: {gguf_name(name)}: expected shape {tuple(shape)}, found "
                             f"{found[gguf_name(name)][0]}")
    return {name: found[gguf_name(name)][1] for name in shapes}


def value(field):
    """The value of one key. GGUF's floats have 32 bits: 1e-05 would become 9.99999974737875e-06."""
    found = field.contents()
    return float(str(field.parts[-1][0])) if isinstance(found, float) else found


def gguf_name(name):
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight"""
    module, _, kind = name.removeprefix("model.").rpartition(".")
    path = module.split(".")
    prefix, rest = (["blk", path[1]], path[2:]) if path[0] == "layers" else ([], path)
    return ".".join([*prefix, GGUF[".".join(rest)], kind])


def read_numbers(info, tensors, path):
    """{field of model.Config: value} of a GGUF's keys; ValueError naming what is not computed."""
    family = info.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(f"{path}: the architecture is {str(family)[:80]}; what works here is "
                         f"{', '.join(FAMILIES)}")
    if info.get("split.count", 1) not in (0, 1):
        raise ValueError(f"{path}: one of {info['split.count']} parts; make them one file first: "
                         "llama-gguf-split --merge")
    p = {k.removeprefix(f"{family}."): v for k, v in info.items() if k.startswith(f"{family}.")}
    p.setdefault("attention.head_count_kv", p.get("attention.head_count"))
    numbers = {"rope_scaling": rope_scaling(p, path)}
    for ours, theirs in NUMBERS.items():
        if theirs in p or ours not in OPTIONAL:
            check_number(p.get(theirs), f"{family}.{theirs}", path,
                         whole=ours not in ("norm_eps", "rope_theta"))
            numbers[ours] = p[theirs]
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: token_embd.weight is missing")
    has_bias = family == "llama" and "blk.0.attn_output.bias" in tensors
    numbers |= {"vocab_size": tensors["token_embd.weight"][0][0],
                "tied": "output.weight" not in tensors, "qk_norm": family == "qwen3",
                "qkv_bias": family == "qwen2" or has_bias, "o_bias": has_bias,
                "no_rope": 4 if family == "smollm3" and numbers["n_layers"] >= 4 else 0,
                "gelu": family == "gemma",
                "embed_scale": numbers["dim"] ** 0.5 if family == "gemma" else 0.0}
    check_heads(numbers, path, any_width="head_dim" in numbers)
    # All other keys may only say what holds anyway, or that something is off.
    head_dim = numbers.get("head_dim") or numbers["dim"] // numbers["n_heads"]
    if "rope_freqs.weight" in tensors:
        theta, found = numbers.get("rope_theta", 10000.0), tensors.pop("rope_freqs.weight")[1]()
        known = [{**LLAMA3_ROPE, "factor": factor} for factor in (8.0, 32.0)]
        made = [s for s in known if found.shape == (head_dim // 2,)
                and torch.allclose(rope_factors(head_dim, theta, s), found, rtol=1e-4)]
        if not made or numbers["rope_scaling"]:
            raise ValueError(f"{path}: rope_freqs.weight, the scaled RoPE of Llama 3.1, has other "
                             "numbers than Meta's 3.1 and 3.2")
        numbers["rope_scaling"] = made[0]
    same = {"vocab_size": numbers["vocab_size"], "rope.dimension_count": head_dim,
            "attention.value_length": head_dim, "rope.scaling.attn_factor": 1,
            "rope.scale_linear": 1}
    for key, found in p.items():
        if key not in NUMBERS.values() and found and found != same.get(key):
            raise ValueError(f"{path}: {family}.{key} is {str(found)[:80]}, which this network "
                             "does not compute; it would be a wrong model")
    return numbers


def rope_scaling(p, path):
    """model.Config's rope_scaling. What it understands is taken out of the keys p: "none", and
    "linear" with a factor. Everything else is left there, and refused."""
    kind, factor = p.get("rope.scaling.type"), p.get("rope.scaling.factor")
    if kind != "none" and not (kind == "linear" and factor):
        return None
    for key in ("type", "factor", "finetuned", "original_context_length"):    # the last is YaRN's
        p.pop(f"rope.scaling.{key}", None)
    if kind == "none":
        return None
    check_number(factor, "rope.scaling.factor", path)
    return {"rope_type": "linear", "factor": factor}


def rope_factors(head_dim, theta, scaling):
    """Llama 3.1's stretched RoPE as llama.cpp has it: what the frequency of every pair is divided
    by, (K/2,) float32. scaling: as in model.Config."""
    freqs = theta ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    turns = scaling["original_max_position_embeddings"] * freqs / (2 * pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (keep + (1 - keep) / scaling["factor"])


# --------------------------------------------------------------------------------------- tokenizer

def tokenizer_files(info, rows, path):
    """({file name: bytes}, ids for config.json) of the vocabulary in a GGUF's keys.

    rows: how many the embedding has, perhaps more than tokens. ValueError for an unknown kind.
    """
    kind, tokens = (info.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
    types = info.get("tokenizer.ggml.token_type") or []
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer.ggml.model is {str(kind)[:80]}; what works here is "
                         "gpt2 (byte-level BPE) and llama (sentencepiece)")
    for key, of in LISTS.items():
        found = info.get(f"tokenizer.ggml.{key}")
        if found is not None and not (type(found) is list and all(type(x) is of for x in found)):
            raise ValueError(f"{path}: tokenizer.ggml.{key} is not a list of {of.__name__}")
    if not tokens or len(tokens) != len(types):
        raise ValueError(f"{path}: tokenizer.ggml.tokens and token_type do not belong together")
    if len(tokens) > rows:
        raise ValueError(f"{path}: {len(tokens)} tokens, but the model embeds {rows}")
    # What llama.cpp assumes if a file does not say it.
    default = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}
    ids = {name: info.get(f"tokenizer.ggml.{name}_token_id", default.get(name))
           for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    adds_bos = kind == "llama" or rule_of(info) == "llama-bpe"
    adds = {"bos": bool(info.get("tokenizer.ggml.add_bos_token", adds_bos)),
            "eos": bool(info.get("tokenizer.ggml.add_eos_token", False))}
    for name, i in ids.items():
        if i is None and adds.get(name) or i is not None and not (
                type(i) is int and 0 <= i < len(tokens)):
            raise ValueError(f"{path}: {name}_token_id is {i}, of {len(tokens)} tokens")
    named = {name: None if i is None else tokens[i] for name, i in ids.items()}
    config = {"tokenizer_class": "PreTrainedTokenizerFast",
              "add_bos_token": adds["bos"], "add_eos_token": adds["eos"],
              "bos_token": named["bos"], "eos_token": named["eos"], "unk_token": named["unknown"],
              "pad_token": named["padding"], "clean_up_tokenization_spaces": False,
              "model_max_length": info.get(f"{info['general.architecture']}.context_length"),
              "chat_template": info.get("tokenizer.chat_template")}
    around, files = [[named[name]] if adds[name] else [] for name in ("bos", "eos")], {}
    if kind == "gpt2":
        fast = byte_level(info, tokens, types, *around, path)
    else:
        config |= {"legacy": False}
        files["tokenizer.model"] = sentencepiece_model(info, tokens, types, ids, path)
        fast = sentence_pieces(info, tokens, types, ids, *around)
    ends = list(dict.fromkeys(ids[k] for k in ("eos", "eot", "eom") if ids[k] is not None))
    ends = {"bos_token_id": ids["bos"], "eos_token_id": ends if len(ends) > 1 else ids["eos"],
            "pad_token_id": ids["padding"]}
    config = {k: v for k, v in config.items() if v is not None}
    return {**files, "tokenizer.json": json_bytes(fast), "tokenizer_config.json":
            json_bytes(config), "generation_config.json": json_bytes(ends)}, ends


def rule_of(info):
    """The name of the rule by which a byte-level vocabulary cuts text into words."""
    rule = str(info.get("tokenizer.ggml.pre"))
    return ALSO_CALLED.get(rule, rule)


def json_bytes(content):
    """A JSON file."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def byte_level(info, tokens, types, bos, eos, path):
    """tokenizer.json of a byte-level BPE. bos, eos: lists of the tokens put around every text."""
    rule, merges = rule_of(info), info.get("tokenizer.ggml.merges")
    if rule not in RULES:
        raise ValueError(f"{path}: tokenizer.ggml.pre, how text is cut into words, is "
                         f"{rule[:80]}; what is known here is {', '.join(RULES)}")
    if not merges:
        raise ValueError(f"{path}: tokenizer.ggml.merges is missing")
    # If an embedding table is padded to a round size, its unused rows have tokens, too.
    vocab = used(tokens, types)
    if len(vocab) + types.count(UNUSED) != len(tokens):
        raise ValueError(f"{path}: two tokens have the same text")
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"{path}: the merge {merge[:80]!r} does not make a token of two")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": False}
    return tokenizer_json(
        vocab, types, bos, eos, normalizer={"type": "NFC"} if rule == "qwen2" else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*RULES[rule], level]}, decoder=level,
        model={"ignore_merges": rule == "llama-bpe", "merges": merges})


def sentence_pieces(info, tokens, types, ids, bos, eos):
    """tokenizer.json that gives the ids of `sentencepiece_model`. transformers reads this one.

    A text is not cut into words. All its spaces become pieces, those at its start, too.
    """
    spelled = [token.replace(*(" ", "\u2581") if kind == NORMAL else ("\u2581", " "))
               for token, kind in zip(tokens, types, strict=True)]
    vocab = used(spelled, types)
    scores = info["tokenizer.ggml.scores"]
    plain = [t for t, i in vocab.items() if types[i] == NORMAL]
    plain.sort(key=lambda token: -scores[vocab[token]])
    tidy = [{"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    space, first = {"pattern": {"String": " "}, "content": "\u2581"}, space_first(info)
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]
    return tokenizer_json(
        vocab, types, bos, eos, pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": [
            *(tidy if collapses_spaces(info) else []),
            *([{"type": "Prepend", "prepend": "\u2581"}] if first else []),
            {"type": "Replace", **space}]},
        decoder={"type": "Sequence", "decoders": [
            *back, *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if first else [])]},
        model={"unk_token": None if ids["unknown"] is None else tokens[ids["unknown"]],
               "fuse_unk": True, "byte_fallback": BYTE in types,
               "merges": list(map(" ".join, pairs(plain)))})


def used(tokens, types):
    """{token: id} without the rows that no text uses."""
    return {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}


def pairs(tokens):
    """The merges that lead to tokens, which stand in the order of their merging: every pair of
    tokens that makes one. Sentencepiece and tiktoken look at nothing but what a pair makes."""
    rank = {token: n for n, token in enumerate(tokens)}
    for token in tokens:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(a, b) for a, b in halves if a in rank and b in rank]
        yield from sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))


def tokenizer_json(vocab, types, bos, eos, *, model, **stages):
    """The dict of a tokenizer.json. model: how its BPE differs from the plainest one."""
    def template(*texts):
        return [{kind: {"id": name, "type_id": n}} for n, text in enumerate(texts) for kind, name in
                [*(("SpecialToken", t) for t in bos), ("Sequence", text),
                 *(("SpecialToken", t) for t in eos)]]

    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": types[i] != USER_DEFINED}
                         for t, i in vocab.items() if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)],
        **stages,
        "post_processor": {
            "type": "TemplateProcessing", "single": template("A"), "pair": template("A", "B"),
            "special_tokens": {t: {"id": t, "ids": [vocab[t]], "tokens": [t]}
                               for t in (*bos, *eos)}},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab, **model}}


def space_first(info):
    """True if a sentencepiece vocabulary puts a space before every text."""
    return bool(info.get("tokenizer.ggml.add_space_prefix", True))


def collapses_spaces(info):
    """True if a sentencepiece vocabulary reads several spaces as one, and those around as none."""
    return bool(info.get("tokenizer.ggml.remove_extra_whitespaces", False))


def sentencepiece_model(info, tokens, types, ids, path):
    """tokenizer.model, as sentencepiece would have written it. ids: of bos, eos ..., or None."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception:            # missing, or older than sentencepiece needs
        raise ValueError(f"{path}: a sentencepiece vocabulary needs a recent protobuf package: "
                         "pip install -U protobuf") from None
    scores = info.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise ValueError(f"{path}: tokenizer.ggml.scores is missing, or not one for each token")
    if "tokenizer.ggml.precompiled_charsmap" in info:
        raise ValueError(f"{path}: tokenizer.ggml.precompiled_charsmap is not known here")
    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, types, strict=True):     # no spaces in a piece
        proto.pieces.add(piece=token.replace(" ", "\u2581"), score=score, type=kind)
    spec, space = proto.trainer_spec, proto.normalizer_spec
    spec.model_type, spec.byte_fallback, spec.vocab_size = spec.BPE, BYTE in types, len(tokens)
    for name, key in ("unk", "unknown"), ("bos", "bos"), ("eos", "eos"), ("pad", "padding"):
        setattr(spec, f"{name}_id", -1 if ids[key] is None else ids[key])
        if ids[key] is not None:
            setattr(spec, f"{name}_piece", tokens[ids[key]])
    space.name, space.add_dummy_prefix = "identity", space_first(info)
    space.remove_extra_whitespaces = collapses_spaces(info)
    content = proto.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as e:
        reason = str(e).partition("\n")[0][:120]
        raise ValueError(f"{path}: sentencepiece does not take this vocabulary ({reason})"
                         ) from None
    return content
