"""Chat templates against transformers' apply_chat_template, with a rule of prefixes of its own."""
import json
import os
import random
import warnings
from pathlib import Path

import pytest
import torch

import data
from formats import chat
from support import chats

transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")

TEMPLATES = Path(os.environ.get("PISSA_TEMPLATES", "nowhere"))

# Small templates of three kinds: control tokens around each turn, BOS and EOS only, no system role.
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
WORDS = ("{{ bos_token }}{% for m in messages %}\n    {% if m['role'] == 'assistant' %}\n"
         "{{ ' ' + m['content'] | trim + eos_token }}\n    {% else %}\n"
         "{{ '[' + m['role'] | upper + '] ' + m['content'] | trim + ' [/]' }}\n    {% endif %}\n"
         "{% endfor %}\n")
ROLES = ("{%- set ns = namespace(n=0) -%}{{- bos_token -}}{%- for m in messages -%}\n"
         "{%- if m.role == 'system' -%}{{- raise_exception('no system here') -}}{%- endif -%}\n"
         "{%- set ns.n = ns.n + 1 -%}{{- '<|' ~ ns.n ~ '|>' ~ (m.content | tojson) -}}"
         "{%- if m.role == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}\n{%- endfor -%}"
         "{%- if add_generation_prompt -%}{{- '<|' ~ (ns.n + 1) ~ '|>' -}}{%- endif -%}")
# What a family needs of a tokenizer: its control tokens, BOS, EOS; whether it knows a system role.
LLAMA3 = (["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>", True)
QWEN = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], None, "<|im_end|>", True
GEMMA = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", False
LLAMA2 = ["<s>", "</s>"], "<s>", "</s>", True
SMALL = {"chatml": (CHATML, *QWEN), "words": (WORDS, *LLAMA2),
         "roles": (ROLES, ["<s>", "<|im_end|>"], "<s>", "<|im_end|>", False)}
FAMILIES = {"llama3_1": LLAMA3, "llama3_2": LLAMA3, "qwen2_5": QWEN, "qwen3": QWEN, "gemma": GEMMA,
            "gemma-it": (*GEMMA[:3], True), "mistral-instruct": LLAMA2, "llama-2-chat": LLAMA2,
            "phi3": (["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<s>"],
                     "<s>", "<|endoftext|>", True),
            "zephyr": (["<s>", "</s>"], "<s>", "</s>", True), "vicuna": LLAMA2,
            "granite-3.0-instruct": (["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
                                     "<|end_of_text|>", "<|end_of_text|>", True)}


def template_named(name):
    """(template, control tokens, BOS, EOS, whether it knows a system role)."""
    if name in SMALL:
        return SMALL[name]
    path = TEMPLATES / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"PISSA_TEMPLATES names no folder with {path.name}")
    return path.read_text("utf-8"), *FAMILIES[name]


@pytest.fixture(scope="session")
def bytewise():
    """A byte-level BPE, trained on the text of data.py."""
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator([Path(data.__file__).read_text()] * 2, tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return tok.to_str()


@pytest.fixture
def pair(bytewise, tmp_path):
    """A function: (our tokenizer, transformers') of a template with its control tokens."""
    def make(template, control, bos, eos, *_):
        import tokenizers
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(bytewise), bos_token=bos, eos_token=eos,
            pad_token=eos, additional_special_tokens=control)
        fast.chat_template = template
        fast.save_pretrained(tmp_path)
        return data.Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    return make


def turn(role, content):
    return {"role": role, "content": content}


PIECES = ["Hello", " how", "\n", "\n\n", "  ", "\t", "é", "日本語", "🙂", "\u2028", "\u00a0", "<|im_end",
          "|im_end|>", "<|im_end |>", "< s>", "</s", "[INST", "[/]", "<|eot_id", "<start_of_turn",
          "<think>", "{{ x }}", "{% if %}", "USER:", "assistant", "12", "'s", "\\n", "\"", "<|", "|>"]


def conversations(n, system, seed=0):
    """n random conversations, of up to four questions; some end in a question."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(PIECES, k=rng.randint(0, 7))) + rng.choice(["x", "ok.", "7 "])

    for _ in range(n):
        found = [turn("system", text())] * (system and rng.random() < 0.5)
        for _ in range(rng.randint(1, 4)):
            found += [turn("user", text()), turn("assistant", text())]
        yield found if rng.random() < 0.8 else [*found, turn("user", text())]


def ends_of(ids, theirs):
    """Where each token ends in the text, in bytes: a byte-level token has a character for each."""
    at, found, special = 0, [], set(theirs.all_special_ids)
    for i, token in zip(ids, theirs.convert_ids_to_tokens(ids), strict=True):
        at += len(token.encode()) if i in special else len(token)
        found.append(at)
    return found


def reference(theirs, messages, stops):
    """(ids, learnt) by transformers and by bytes: a token is learnt if it ends within a turn that
    the template adds to what stands before it, up to the first stop token there."""
    def text(part, ask=False):
        return theirs.apply_chat_template(part, tokenize=False, add_generation_prompt=ask)

    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    whole, eos = text(messages), theirs.eos_token
    turns = [(text(messages[:i], True), text(messages[:i + 1])) for i in answers]
    turns = [(a, b if whole.startswith(b) else b.removesuffix(eos)) for a, b in turns]
    if not all(whole.startswith(a) and whole.startswith(b) for a, b in turns):
        messages = messages[:answers[-1] + 1]                  # earlier turns are written anew
        whole = text(messages)
        turns = [(text(messages[:-1], True), whole)]
        assert whole.startswith(turns[0][0])
    ids = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    ends, learnt = ends_of(ids, theirs), [False] * len(ids)
    assert ends[-1] == len(whole.encode())
    for before, after in turns:
        inside = [t for t, end in enumerate(ends)
                  if len(before.encode()) < end <= len(after.encode())]
        last = next((t for t in inside if ids[t] in stops), max(
            (t for t in inside if ids[t] in theirs.all_special_ids), default=inside[-1]))
        for t in inside:
            learnt[t] = t <= last
    return ids, learnt


def check(tok, theirs, system, n, seed=0):
    """Equal ids and masks for n conversations, and in each something is learnt, its end included."""
    for messages in conversations(n, system, seed):
        ids, learnt = data.encode_chat(messages, tok)
        assert (ids, learnt) == reference(theirs, messages, tok.stops), messages
        last = max(t for t, is_learnt in enumerate(learnt) if is_learnt)
        assert ids[last] in theirs.all_special_ids


@pytest.mark.filterwarnings("ignore:the chat template writes earlier")
@pytest.mark.parametrize("name", [*SMALL, *FAMILIES])
def test_ids_and_masks(pair, name):
    made = template_named(name)
    check(*pair(*made), made[-1], 25)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the chat template writes earlier")
@pytest.mark.parametrize("name", [*SMALL, *FAMILIES])
def test_ids_and_masks_of_many(pair, name):
    made = template_named(name)
    check(*pair(*made), made[-1], 200, seed=1)


@pytest.mark.parametrize("n", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_smollm2(smollm2_path, n):
    """Its own tokenizer and template; characters of which it has all bytes."""
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_path)
    check(data.Tokenizer(smollm2_path), theirs, True, n, seed=2)
