"""formats/tokenizer.py against sentencepiece, tokenizers, tiktoken, transformers: same files."""
import base64
import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch

import data
from conftest import ROOT, SHARED, TINY, train_tokenizer
from formats.tokenizer import Tokenizer

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")

pytestmark = pytest.mark.long       # only ./check leaves these out

LLAMA2 = SHARED / "llama2_tokenizer"
TEXTS = ["Hello world", "  two  spaces ", "a\nb\n\n\tc", "naïve — 数学 🙂",
         "{braces} <s> </s> <unk>", "1,234.50", "", "<|begin_of_text|>a<|eot_id|>",
         "x<|im_end|><|end_of_text|>", "IT'S it's", "1234 12341234"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]                    # ids 0 to 3 of `bpe`
# How Llama 3 cuts a text before it merges bytes: Meta's models/llama3/tokenizer.py.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
          r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# GPT-2's alphabet: printable bytes stand for themselves, the others follow from 256 on.
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHER = sorted(set(range(256)) - set(PLAIN))
BYTES = {chr(b): b for b in PLAIN} | {chr(256 + i): b for i, b in enumerate(OTHER)}


def bpe():
    """A tokenizer of Llama 3's kind, with few merges, as the tokenizers package trains it."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    texts = (ROOT / "data.py").read_text().splitlines() + ["12 34"] * 50
    tok.train_from_iterator(texts, trainer)
    return tok


def ranks(tok):
    """Lines of "base64 rank", as Llama 3's tokenizer.model has them, for the same merges."""
    vocab = sorted((i, token) for token, i in tok.get_vocab().items() if token not in SPECIAL)
    return b"".join(base64.b64encode(bytes(BYTES[c] for c in token)) + b" %d\n" % rank
                    for rank, (_, token) in enumerate(vocab))


def folder(path, tok=None, **files):
    """A directory of files, by name without suffix: dicts become .json, bytes .model."""
    path.mkdir(exist_ok=True)
    if tok is not None:
        tok.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        if isinstance(content, bytes):
            (path / f"{name}.model").write_bytes(content)
        else:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One directory of each kind."""
    path, tok = tmp_path_factory.mktemp("tokenizers"), bpe()
    tok.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return {"sentencepiece": train_tokenizer(path / "sentencepiece"),
            "huggingface": folder(path / "huggingface", tok, tokenizer_config=NAMES),
            "tiktoken": folder(path / "tiktoken", tokenizer=ranks(tok))}


@pytest.fixture(params=["sentencepiece", "huggingface", "tiktoken"])
def tok(request, folders):
    return Tokenizer(folders[request.param])


def refusal(path):
    """The one line with which the directory is refused."""
    with pytest.raises(ValueError) as e:
        Tokenizer(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    return str(e.value)


def refused(path, message):
    """The directory is refused in one line that says `message`, a regular expression."""
    assert re.search(message, refusal(path))


# All kinds alike ----------------------------------------------------------------------------------

@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tok, text):
    ids = tok.encode(text, bos=True, eos=True)
    assert ids[0] == tok.bos and ids[-1] == tok.eos
    assert ids[1:-1] == tok.encode(text)
    assert all(0 <= i < tok.vocab_size for i in ids)
    assert not ({tok.bos} | tok.stops) & set(ids[1:-1])  # a literal "<s>" is plain text
    assert tok.decode(ids) == tok.decode(ids[1:-1]) == text


def test_decode_survives_any_id(tok):
    ids = tok.encode("fine")
    assert tok.decode([tok.pad, -1, *ids, -100, tok.vocab_size, 10**12, *tok.stops]) == "fine"
    assert tok.decode(torch.tensor(ids)) == "fine"
    assert tok.decode([]) == ""
    for i in range(tok.vocab_size):
        assert isinstance(tok.decode([i]), str)


def test_special_ids(folders):
    found = {name: Tokenizer(path) for name, path in folders.items()}
    for name, expected in {"sentencepiece": (len(found["sentencepiece"].lib.sp), 1, 2, {2}, 1, 2),
                           "huggingface": (400, 1, 2, {2}, 1, 2),
                           "tiktoken": (396 + 256, 396, 397, {397, 405}, 396, 397)}.items():
        t = found[name]
        assert (t.vocab_size, t.bos, t.eos, t.stops, t.start, t.pad) == expected
        assert type(t.stops) is frozenset
        assert data.prompt_ids("", t) == [t.start]
        assert data.prompt_ids("q", t).count(t.bos) == 1


# sentencepiece ------------------------------------------------------------------------------------

def test_pad(folders, tmp_path):
    assert Tokenizer(folders["sentencepiece"]).pad == 2
    assert Tokenizer(train_tokenizer(tmp_path, pad_id=3)).pad == 3


@pytest.mark.parametrize("adds, bos", [(None, 1), (True, 1), (False, None)])
def test_sentencepiece_bos(tmp_path, adds, bos):
    """Yi's tokenizer_config.json has add_bos_token: false; without any, Llama 2's habit holds."""
    folder(train_tokenizer(tmp_path), tokenizer_config={**NAMES, "add_bos_token": adds})
    tok = Tokenizer(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tok.bos, tok.start) == (bos, 1)
    assert tok.encode("Hello", bos=True) == [1] * (bos or 0) + sp.encode("Hello")
    assert data.prompt_ids("", tok) == [1]


def test_sentencepiece_without_bos_or_eos(tmp_path):
    tok = Tokenizer(train_tokenizer(tmp_path, bos_id=-1))
    assert (tok.bos, tok.start, tok.encode("", bos=True, eos=True)) == (None, tok.eos, [tok.eos])
    train_tokenizer(tmp_path, eos_id=-1)
    refused(tmp_path, r"tokenizer\.model: which token ends a text\? .*eos_token")
    assert Tokenizer(folder(tmp_path, generation_config={"eos_token_id": [7, 5]})).eos == 7


def test_pieces_that_text_could_spell(tmp_path):
    """Chat tokens that a model has as user-defined pieces (Yi): text, once they end a response."""
    train_tokenizer(tmp_path, user_defined_symbols="<|im_end|>,<|im_start|>,<b>")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    end, start, bold = (sp.piece_to_id(piece) for piece in ("<|im_end|>", "<|im_start|>", "<b>"))
    text = "a<|im_end|>b<|im_start|>c<b>d"
    assert {end, start, bold} <= set(sp.encode(text))
    folder(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "added_tokens_decoder": {
        start: {"content": "<|im_start|>", "special": True}}})
    tok = Tokenizer(tmp_path)
    assert (tok.eos, tok.vocab_size) == (end, len(sp))
    assert {end, start, bold} & set(tok.encode(text)) == {bold}
    assert tok.decode([start, *tok.encode(text), end]) == text
    assert tok.encode("Hello world") == sp.encode("Hello world")


def test_added_tokens_beside_sentencepiece(tmp_path):
    """Fine-tuning with ChatML adds ids that tokenizer.model does not know."""
    size = len(Tokenizer(train_tokenizer(tmp_path)).lib.sp)
    added = {str(size): {"content": "<|im_end|>"}, str(size + 1): {"content": "<|im_start|>"}}
    folder(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "added_tokens_decoder": added},
           generation_config={"eos_token_id": [size, 2]})
    tok = Tokenizer(tmp_path)
    assert (tok.bos, tok.eos, tok.stops, tok.vocab_size) == (1, size, {2, size}, size + 2)
    assert tok.decode(tok.encode("a<|im_end|>", bos=True, eos=True)) == "a<|im_end|>"


WORD = {"content": "<tool>", "special": False}
CONTROLS = {str(i): {"content": name, "special": True}
            for i, name in enumerate(["<unk>", "<s>", "</s>"])}


@pytest.mark.parametrize("legacy", [None, True])
@pytest.mark.parametrize("where", ["config", "added_tokens", "tokenizer.json", "lstrip", "rstrip",
                                   "single_word"])
def test_words_added_to_sentencepiece(transformers, tmp_path, where, legacy):
    """As transformers cuts a text of the same folder; control tokens are characters here."""
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "additional_special_tokens": ["<chat>"],
              **({} if legacy is None else {"legacy": legacy})}
    decoder = {**CONTROLS, "2048": {**WORD, **({where: True} if "_" in where or "strip" in where
                                               else {})},
               "2049": {**WORD, "content": "<tool>x"}, "2050": {**WORD, "content": "<chat>"}}
    if where == "added_tokens":
        folder(tmp_path, added_tokens={"<tool>": 2048, "<tool>x": 2049, "<chat>": 2050},
               special_tokens_map={"additional_special_tokens": [{"content": "<chat>"}]})
    folder(tmp_path, tokenizer_config={**config, **(
        {} if where == "added_tokens" else {"added_tokens_decoder": decoder})})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if where == "tokenizer.json":       # transformers 5 lists them there, and nowhere else
        theirs.save_pretrained(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        shutil.copy(TINY / "tokenizer.model", tmp_path)
        assert "added_tokens_decoder" not in json.loads(
            (tmp_path / "tokenizer_config.json").read_text())
    tok = Tokenizer(tmp_path)
    assert tok.vocab_size == 2050
    for text in ["use <tool> now", "<tool>now", "<tool> now", "a<tool>b", "a <tool><tool>  b", "",
                 "a\n\n<tool>  \n b<tool>x <tool>xy", "<tool>", "no word"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert tok.encode(text) == ids and tok.decode(ids) == theirs.decode(ids), text
    assert tok.decode([2050, 2048, *tok.encode("x")[1:], 2050]) == "<tool>x"
    text = "a <chat> b </s>"
    assert tok.decode(tok.encode(text)) == text and max(tok.encode(text)) < 2048
    assert tok.control.findall(text) == ["<chat>", "</s>"]


@pytest.mark.parametrize("added, message", [
    ({"<tool>": "x"}, "added_tokens.json: .*invalid literal"), ([1], "added_tokens.json: "),
    ({"<tool>": -5}, "an id below 0"), ({"": 420}, "an added token has no text")])
def test_damaged_added_tokens(tmp_path, added, message):
    refused(folder(train_tokenizer(tmp_path), added_tokens=added), message)


def test_sentencepiece_comes_first(folders, tmp_path):
    shutil.copy(folders["huggingface"] / "tokenizer.json", tmp_path)
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    assert Tokenizer(tmp_path).encode("Hi") == Tokenizer(folders["sentencepiece"]).encode("Hi")


@pytest.mark.skipif(not LLAMA2.exists(), reason=f"{LLAMA2} is not here")
@pytest.mark.parametrize("text", TEXTS)
def test_llama2(text):
    tok = Tokenizer(LLAMA2)
    assert (tok.vocab_size, tok.bos, tok.eos, tok.stops, tok.pad) == (32000, 1, 2, {2}, 2)
    test_round_trip(tok, text)
    assert tok.encode("Hello world") == [15043, 3186]
    assert tok.encode("<s>") == [529, 29879, 29958]  # "▁<", "s", ">"


# tokenizer.json -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    os.environ["HF_HUB_OFFLINE"] = "1"
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("adds", [None, True, False])
@pytest.mark.parametrize("template", [None, "$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_bos_as_transformers_adds_it(transformers, tmp_path, kind, template, adds, bos):
    """... but where add_bos_token alone asks for it: transformers 4 added it then, 5 does not."""
    tok = bpe()
    if template:
        tok.post_processor = tokenizers.processors.TemplateProcessing(
            template, None, [("<s>", 1), ("</s>", 2)])
    config = {"eos_token": "</s>", "bos_token": bos, "tokenizer_class": kind}
    folder(tmp_path, tok, tokenizer_config={**config, **({} if adds is None else
                                                         {"add_bos_token": adds})})
    by_itself = template in (None, "$A")
    if by_itself and adds and not bos:
        return refused(tmp_path, r"tokenizer_config\.json: .*add_bos_token")
    ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs("Hello")["input_ids"]
    if expected[-1] == 2:
        expected.pop()
    assert ours.encode("Hello", bos=True) == [1] * bool(by_itself and adds) + expected
    assert ours.encode("Hello") == theirs("Hello", add_special_tokens=False)["input_ids"]
    if bos or by_itself:                 # else the template has a BOS that nothing declares
        assert ours.start == (2 if theirs.bos_token_id is None else theirs.bos_token_id)


def test_tokens_that_are_not_special_are_words(tmp_path):
    """Qwen2.5's <tool_call> is text, as in transformers; an end of text is not, marked or not."""
    tok = bpe()
    names = ["<call>", "<end>", "<turn>", "<start>"]                  # ids 400 to 403
    tok.add_tokens([tokenizers.AddedToken(name, normalized=False) for name in names])
    folder(tmp_path, tok, tokenizer_config={"eos_token": "<end>", "bos_token": "<start>"},
           generation_config={"eos_token_id": [401, 402]})
    ours = Tokenizer(tmp_path)
    assert (ours.vocab_size, ours.eos, ours.stops, ours.start) == (404, 401, {401, 402}, 403)
    text = "a<call>b<end>c<turn>d<start>e<s><|im_end|>"
    assert [i for i in ours.encode(text) if i < 4 or i >= 400] == [400]
    assert ours.decode([403, *ours.encode(text), 402, 1, 401]) == text


def test_what_training_left_in_the_file(folders, tmp_path):
    """Truncation, padding and BPE dropout are settings of a run, not of the tokenizer."""
    whole = json.loads((folders["huggingface"] / "tokenizer.json").read_text())
    tok = tokenizers.Tokenizer.from_str(json.dumps(whole))
    tok.enable_truncation(4)
    tok.enable_padding(length=64)
    tok.model.dropout = 0.9
    ours = Tokenizer(folder(tmp_path, tok, tokenizer_config=NAMES))
    text = "Write a response that appropriately completes the request. " * 3
    assert ours.encode(text) == Tokenizer(folders["huggingface"]).encode(text)
    assert ours.encode("a") == [tok.token_to_id("a")]


def test_ids_that_the_package_would_change(folders, tmp_path):
    whole = json.loads((folders["huggingface"] / "tokenizer.json").read_text())
    whole["added_tokens"].append({**whole["added_tokens"][0], "content": "<new>", "id": 500})
    line = refusal(folder(tmp_path, tokenizer=whole, tokenizer_config=NAMES))
    assert re.search(r"tokenizer\.json: .*'<new>' cannot have the id 500", line)


@pytest.mark.parametrize("metaspace", [True, False])
def test_json_of_llama2s_kind_is_like_sentencepiece(transformers, tmp_path, metaspace):
    """A response is tokenised apart from its prompt, and both add the space in front."""
    train_tokenizer(tmp_path / "sp")
    folder(tmp_path / "sp", tokenizer_config={
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": True})
    transformers.AutoTokenizer.from_pretrained(tmp_path / "sp").save_pretrained(tmp_path / "json")
    file = tmp_path / "json" / "tokenizer.json"
    content = json.loads(file.read_text())
    if not metaspace:                    # how files were written before 2024
        content["pre_tokenizer"], content["normalizer"] = None, {
            "type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
        file.write_text(json.dumps(content))
    sp, ours = Tokenizer(tmp_path / "sp"), Tokenizer(tmp_path / "json")
    assert (ours.bos, ours.eos, ours.vocab_size) == (sp.bos, sp.eos, sp.vocab_size)
    for text in ["17 apples", "#### 17", "", "a\nb", "naïve 数学", data.PROMPT, "<s>"]:
        assert ours.encode(text, bos=True, eos=True) == sp.encode(text, bos=True, eos=True)
        assert ours.decode(ours.encode(text)) == text


def test_smollm2(smollm2_path, transformers):
    """The real one: it declares a BOS and does not prepend it."""
    if not (smollm2_path / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer.json in {smollm2_path}")
    ours, theirs = Tokenizer(smollm2_path), transformers.AutoTokenizer.from_pretrained(smollm2_path)
    assert (ours.vocab_size, ours.bos, ours.eos) == (len(theirs), None, theirs.eos_token_id)
    assert (ours.start, ours.stops) == (theirs.bos_token_id, {theirs.eos_token_id})
    for text in [*TEXTS, data.PROMPT, (ROOT / "README.md").read_text()]:
        assert ours.encode(text, bos=True) == theirs(text, split_special_tokens=True)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    assert data.prompt_ids("", ours) == [ours.start]
    assert not set(ours.encode("<|im_start|>user<|im_end|>")) & set(range(17))


# tiktoken -----------------------------------------------------------------------------------------

def test_tiktoken_is_its_twin(folders):
    """The same merges through tokenizers: ids are 4 higher there, after its special tokens."""
    ours, twin = Tokenizer(folders["tiktoken"]), Tokenizer(folders["huggingface"])
    rng = random.Random(0)
    noise = [rng.choices("ab 17\n\té数🙂'sDE_,.!<|>", k=rng.randrange(40)) for _ in range(300)]
    for text in [*TEXTS, *map("".join, noise), data.PROMPT, (ROOT / "data.py").read_text()]:
        assert [i + 4 for i in ours.encode(text)] == twin.encode(text)
        assert ours.decode(ours.encode(text)) == text


def test_tiktoken_long_runs(folders):
    tok = Tokenizer(folders["tiktoken"])
    text = "a" + " " * 1_000_000 + "b"
    assert tok.decode(tok.encode(text)) == text


def test_tiktoken_with_other_files(folders, tmp_path):
    """params.json tells a file that was cut between two lines; HF's files tell the EOS."""
    lines = (folders["tiktoken"] / "tokenizer.model").read_bytes()
    folder(tmp_path, tokenizer=lines, params={"vocab_size": 652})
    assert Tokenizer(tmp_path).vocab_size == 652
    folder(tmp_path, tokenizer=b"".join(lines.splitlines(True)[:-1]))
    refused(tmp_path, r"tokenizer\.model: .*395 lines .*params\.json says 652")
    folder(tmp_path, tokenizer=lines, tokenizer_config={"eos_token": "<|eot_id|>"},
           generation_config={"eos_token_id": [397, 404, 405]})
    tok = Tokenizer(tmp_path)
    assert (tok.bos, tok.eos, tok.stops) == (396, 405, {397, 404, 405})
    shutil.copy(folders["huggingface"] / "tokenizer.json", tmp_path)
    folder(tmp_path, tokenizer_config=NAMES)       # tokenizer.json names its own special tokens
    (tmp_path / "generation_config.json").unlink()
    assert Tokenizer(tmp_path).vocab_size == 400


def test_names_of_control_tokens(folders):
    """What a note about texts that spell them looks for."""
    text = "a</s> b <|im_end|><|eot_id|>"
    found = {name: Tokenizer(path).control.findall(text) for name, path in folders.items()}
    assert found == {"sentencepiece": ["</s>"], "huggingface": ["</s>", "<|im_end|>"],
                     "tiktoken": ["<|eot_id|>"]}


# Other files, errors ------------------------------------------------------------------------------

@pytest.mark.parametrize("files, eos, stops", [
    ({"tokenizer_config": {"eos_token": "</s>"}}, 2, {2}),
    ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 3}}, 2, {2, 3}),
    ({"config": {"eos_token_id": [3, 2]}}, 3, {2, 3}),
    ({"generation_config": {"eos_token_id": 3}}, 3, {3}),
    ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [2, 5]}}, 2, {2, 5}),
    ({"config": {"eos_token_id": 2}, "generation_config": {"eos_token_id": [3]}}, 2, {2, 3}),
    ({"tokenizer_config": {"eos_token": "", "bos_token": None}, "config": {"eos_token_id": 0}},
     0, {0}),
    ({"config": {"eos_token_id": 300}}, 300, {300}),
])
def test_eos_and_stops(tmp_path, files, eos, stops):
    tok = Tokenizer(folder(tmp_path, bpe(), **files))
    assert (tok.eos, tok.stops, tok.start, tok.bos) == (eos, stops, eos, None)
    assert tok.decode([eos]) == ""


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer_config", {"eos_token": "<end>"}, "eos_token: there is no token '<end>'"),
    ("tokenizer_config", {"bos_token": ["<s>"]}, "unhashable|no token"),
    ("tokenizer_config", {"add_bos_token": "yes", "bos_token": "<s>"}, "add_bos_token should be"),
    ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "y"}}}, "invalid literal"),
    ("tokenizer_config", {"added_tokens_decoder": {"-1": {"content": "<y>"}}}, "an id below 0"),
    ("tokenizer_config", [], "list"),
    ("config", {"eos_token_id": 400}, r"eos_token_id should be ids from 0 to 399, not \[400\]"),
    ("generation_config", {"eos_token_id": [2, -1]}, r"should be ids .*not \[2, -1\]"),
    ("generation_config", {"eos_token_id": [2, 10**40]}, "should be ids .*10000"),
    ("generation_config", {"eos_token_id": True}, "should be ids .*True"),
    ("generation_config", {"eos_token_id": "2"}, "should be ids .*'2'"),
])
def test_errors_of_other_files(folders, tmp_path, name, content, message):
    shutil.copytree(folders["huggingface"], tmp_path, dirs_exist_ok=True)
    line = refusal(folder(tmp_path, **{name: content}))
    assert re.search(rf"/{name}\.json: .*({message})", line)


def test_errors(folders, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"empty/tokenizer\.model: no such file") as e:
        Tokenizer(tmp_path / "empty")
    assert "\n" not in str(e.value)
    for content, message in [(b"IQ== 0\nIg== 1\nIw== 2\n", "bytes are missing"), (b"", "damaged"),
                             (b"{}", "damaged"), (b"\x00\xff" * 100, "damaged"),
                             (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")]:
        refused(folder(tmp_path, tokenizer=content), rf"tokenizer\.model: .*{message}")
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, r"tokenizer\.json: .*git lfs pull")
    for package, name in [("tiktoken", "tiktoken"), ("tokenizers", "huggingface")]:
        monkeypatch.setitem(sys.modules, package, None)
        refused(folders[name], f"needs the {package} package: pip install {package}$")


@pytest.mark.parametrize("change, message", [
    (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1: not rank 0"),
    (lambda lines: [*lines[:-1], lines[0].split()[0] + b" 395"], "line 396: .* seen before"),
    (lambda lines: [b"!" + lines[0], *lines[1:]], "base64"),
    (lambda lines: lines[1:], "line 1: not rank 0"),
    (lambda lines: [*lines, b"", b"\n"], "unpack"),
])
def test_damaged_ranks(folders, tmp_path, change, message):
    lines = (folders["tiktoken"] / "tokenizer.model").read_bytes().split(b"\n")[:-1]
    line = refusal(folder(tmp_path, tokenizer=b"\n".join(change(lines))))
    assert re.search(rf"tokenizer\.model: .*{message}", line)


@pytest.mark.parametrize("template, bos", [("<s> </s> $A", 1), ("<s> $A", 999)])
def test_odd_templates(tmp_path, template, bos):
    tok = bpe()
    tok.post_processor = tokenizers.processors.TemplateProcessing(
        template, None, [("<s>", bos), ("</s>", 2)])
    line = refusal(folder(tmp_path, tok, tokenizer_config=NAMES))
    assert re.search(r"tokenizer\.json: .*it begins texts with", line)


def test_vocabulary_with_gaps(tmp_path):
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(
        {"A": 0, "</s>": 9, "<unk>": 2}, [], unk_token="<unk>"))
    assert Tokenizer(folder(tmp_path, tok, tokenizer_config={"eos_token": "</s>"})).vocab_size == 10
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({"A": 0, "</s>": 1}, [], unk_token="<unk>"))
    refused(folder(tmp_path, tok), r"tokenizer\.json: .*<unk>")       # when something is unknown


def test_panic_and_interruption(monkeypatch, folders):
    class Panic(BaseException):
        """As pyo3 raises it: no Exception."""

    for raised, expected in [(KeyboardInterrupt, KeyboardInterrupt), (SystemExit, SystemExit),
                             (Panic("two\nlines"), ValueError)]:
        def encoding(*_, error=raised, **__):
            raise error
        monkeypatch.setattr(tiktoken, "Encoding", encoding)
        with pytest.raises(expected) as e:
            Tokenizer(folders["tiktoken"])
    assert "tokenizer.model" in str(e.value) and "\n" not in str(e.value)


# Damage -------------------------------------------------------------------------------------------

ODD = [None, [], {}, -1, 10**30, 1e308, "x", "", True, [[[]]], {"content": None}, "\ud800", 2**32]


def damaged(raw, rng, structure):
    """The bytes of a file with something wrong in them; in a JSON file's structure, if asked."""
    if structure:
        root = at = {"": json.loads(raw)}
        key = ""
        while isinstance(at[key], (dict, list)) and at[key] and (key == "" or rng.random() < 0.8):
            at = at[key]
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        at[key] = rng.choice(ODD)
        return json.dumps(root[""]).encode()
    i, j = sorted(rng.choices(range(len(raw) + 1), k=2))
    return rng.choice([
        lambda: raw[:i], lambda: raw[:i] + raw[i + 1:], lambda: raw[:i] + raw[j:],
        lambda: raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1:], lambda: b"[" * 100_000,
        lambda: raw[:i] + bytes(rng.choices(range(256), k=9)) + raw[i:]])()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface", "tiktoken"])
def test_damaged_files(folders, tmp_path, kind, seed):
    """Either a tokenizer that works or one line that names the file; no panic, no traceback."""
    rng = random.Random(seed)
    extra = {"generation_config": {"eos_token_id": [2, 3]}, "config": {"eos_token_id": 2},
             "tokenizer_config": {**NAMES, "add_bos_token": True, "added_tokens_decoder": {
                 "1": {"content": "<s>", "special": True}}}}
    if kind == "tiktoken":
        extra["tokenizer_config"] = {"eos_token": "<|eot_id|>", "add_bos_token": False}
    for _ in range(12):
        shutil.copytree(folders[kind], tmp_path, dirs_exist_ok=True)
        file = rng.choice(sorted(folder(tmp_path, **extra).iterdir()))
        structure = file.suffix == ".json" and rng.random() < 0.7
        file.write_bytes(damaged(file.read_bytes(), rng, structure))
        try:
            tok = Tokenizer(tmp_path)
        except ValueError as e:
            assert type(e) is ValueError and str(file) in str(e) and "\n" not in str(e)
            continue
        for text in TEXTS:
            ids = tok.encode(text, bos=True, eos=True)
            assert all(0 <= i < tok.vocab_size for i in ids) and isinstance(tok.decode(ids), str)


def test_tiny_is_unchanged():
    """The embedded model's tokenizer, word for word."""
    tok = Tokenizer(TINY)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert (tok.vocab_size, tok.bos, tok.eos, tok.stops) == (2048, 1, 2, {2})
    for text in [*TEXTS, Path(__file__).read_text()]:
        assert tok.encode(text) == sp.encode(text) and tok.decode(sp.encode(text)) == sp.decode(
            sp.encode(text))
