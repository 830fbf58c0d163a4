"""eval.py: answers in their order, exact scores, perplexity by its definition, files, mistakes."""
import gzip
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from functools import partial

import pytest
import torch

import adapter
import data
import eval as evaluation
import model
import pissa
from conftest import ROOT, TINY, hugging_face, joined
from conftest import command as run_command
from conftest import failure as run_failure
from formats import meta_write
from support import ask

EXAMPLES = data.read(TINY / "test.jsonl")[:20]


@pytest.fixture(scope="module")
def net():
    return model.load("tiny", "cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter that changes what the model says."""
    net = pissa.inject(model.load("tiny", "cpu"), 4, niter=1, progress=False)
    for _, m in pissa.layers(net):
        m.A.data *= 0.7
    folder = tmp_path_factory.mktemp("run") / "adapter"
    adapter.save(net, folder)
    return folder


command = partial(run_command, evaluation.main)
failure = partial(run_failure, "eval.py")


def answer_with(monkeypatch, answers):
    """A model that gives these answers to these prompts (a dict); the calls it gets."""
    calls = []

    def complete(net, tok, prompts, **options):
        calls.append((prompts, options))
        return [answers[prompt] for prompt in prompts]

    monkeypatch.setattr(evaluation, "complete", complete)
    return calls


def say(monkeypatch, *rows):
    """A model that says these ids, a list per row of the batch; the ids it was asked for."""
    said, steps = [], zip(*rows)

    def sample(logits, *rest):
        said.append(next(steps))
        return torch.tensor(said[-1])[:, None]

    monkeypatch.setattr(model, "sample", sample)
    return said


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- complete

def test_complete_is_the_greedy_answer(net, tok):
    """One prompt, token by token, without cache, batch or padding."""
    prompt, _ = EXAMPLES[0]
    ids = data.prompt_ids(prompt, tok)
    for _ in range(10):
        ids.append(net(torch.tensor([ids]))[0, -1].argmax().item())
    expected = tok.decode(ids[-10:]).strip()
    assert evaluation.complete(net, tok, [prompt], max_new_tokens=10) == [expected] != [""]


@pytest.mark.long
def test_complete_keeps_the_order_in_any_batch(tok):
    """Prompts of many lengths, sorted inside, come back as they were given.

    Large random weights, for a model that answers every prompt differently."""
    net = model.init_weights(model.load("tiny", "cpu").requires_grad_(False), std=0.2)
    prompts = [p for p, _ in EXAMPLES[:9]] + ["Hi", "A much longer one. " * 12, ""]
    one_by_one = [evaluation.complete(net, tok, [p], max_new_tokens=6)[0] for p in prompts]
    assert len(set(one_by_one)) == len(prompts), "answers too much alike to tell the order"
    for batch in (1, 3, 64):
        got = evaluation.complete(net, tok, prompts, max_new_tokens=6, batch=batch)
        assert got == one_by_one, batch


def test_complete_of_nothing(net, tok):
    assert evaluation.complete(net, tok, []) == []


def test_complete_stops_at_eos(net, tok, monkeypatch):
    """What a model says after EOS is no part of the answer; nor is EOS."""
    said = iter([tok.encode("It is 7.")[0], tok.eos, *tok.encode("More?")])
    monkeypatch.setattr(model, "sample", lambda *_: torch.tensor([[next(said)]]))
    expected = tok.decode(tok.encode("It is 7.")[:1])
    assert evaluation.complete(net, tok, ["?"], max_new_tokens=4) == [expected.strip()]


def test_complete_samples_by_seed(net, tok):
    prompts = [p for p, _ in EXAMPLES[:3]]
    a, b, c = (evaluation.complete(net, tok, prompts, max_new_tokens=12, temperature=1.0, seed=s)
               for s in (0, 0, 1))
    assert a == b != c


@pytest.mark.parametrize("text, stop, expected", [
    ("It is 7. Question: and", ["Question:"], "It is 7."),
    ("It is 7. Question: and", ["USER", "Question"], "It is 7."),
    ("It is 7.\n\nIt is", ["\n\n"], "It is 7."),
    ("It is 7. It is 7. It", [" It"], "It is 7."),           # not the first one: no space there
    ("It is 7.", [" "], "It"),
    ("It is 7 café “yes” and", ["“"], "It is 7 café"),       # three tokens, a byte each
    ("It is abcde", ["cd", "bc"], "It is a"),                # whichever begins first
    ("Stop it at once", ["Stop"], "")])
def test_complete_stops_at_a_text(net, tok, monkeypatch, text, stop, expected):
    """The response ends before it, and nothing is generated after the token that completes it."""
    ids = tok.encode(text)
    first = next(n for n in range(1, len(ids)) if any(s in tok.decode(ids[:n]) for s in stop))
    said = say(monkeypatch, ids)
    assert evaluation.complete(net, tok, ["?"], max_new_tokens=len(ids), stop=stop) == [expected]
    assert len(said) == first < len(ids)


def test_a_stop_text_ends_one_row_only(net, tok, monkeypatch):
    a, b = tok.encode("It is 7. Question: and so on, a, b, c"), tok.encode("Nine and ten, " * 9)
    say(monkeypatch, a, b[:len(a)])
    said = evaluation.complete(net, tok, ["?", "???"], max_new_tokens=len(a), stop=["Question"])
    assert said == ["It is 7.", tok.decode(b[:len(a)]).strip()]


def test_complete_begins_the_response(net, tok):
    """In one piece with the prompt, as the paper's scripts tokenise it."""
    prompt, _ = EXAMPLES[0]
    ids = tok.encode(data.PROMPT.format(instruction=prompt) + " Let's think.", bos=True)
    expected = tok.decode(model.generate(net, [ids], 10)[0]).strip()
    said = evaluation.complete(net, tok, [prompt], max_new_tokens=10, begin=" Let's think.")
    assert said == [expected] != evaluation.complete(net, tok, [prompt], max_new_tokens=10)


# --- accuracy

@pytest.mark.parametrize("reference, answer, correct", [
    ("#### 8", "Nina has 25 - 17 = 8.\n#### 8", True),
    ("#### 8", "#### 9", False),
    ("#### 8", "8", False),                                # no marker: no answer
    ("#### 8", "", False),
    ("#### 8", "The answer is: 8.0 apples", True),
    ("#### 8", "#### 8\n#### 9", True),                    # the first one is the answer
    ("#### 8", "#### 80", False),
    ("#### 8", "#### -8", False),
    ("#### 1/2", "#### 0.5", True),
    ("The answer is: 3/4", "The answer is 6/8", True),
    ("#### 1/3", "#### 0.333", False),
    ("#### 1,234,567", "#### $1234567", True),
    ("#### 1,234,567", "#### 1,234", False)])
def test_accuracy_scores_exactly(monkeypatch, reference, answer, correct):
    calls = answer_with(monkeypatch, {"How many?": answer})
    score, (row,) = evaluation.accuracy(None, None, [("How many?", reference)], max_new_tokens=9)
    assert (score, row["correct"]) == (float(correct), correct)
    assert (row["prompt"], row["response"]) == ("How many?", answer)
    assert calls[0][0] == ["How many?"] and calls[0][1]["max_new_tokens"] == 9
    assert calls[0][1]["begin"] == ""
    assert "temperature" not in calls[0][1], "accuracy is measured greedily"


@pytest.mark.parametrize("reference, answer, correct", [
    ("#### 8", "It is. The answer is: 8", True),
    ("#### 8", "#### 8", False),                           # the marker is MetaMath's
    ("The answer is: 8", "The answer is: 7 The answer is: 8", True),           # the last one
    ("#### 8", "The answer is: 8.4", True),                # rounded
    ("#### 1,234", "The answer is: 1,234", True),
    ("#### 1,234,567", "The answer is: 1,234,567", False),  # read as 1234
    ("#### 8", "8", False)])
def test_accuracy_by_the_paper(monkeypatch, reference, answer, correct):
    calls = answer_with(monkeypatch, {"How many?": answer})
    score, (row,) = evaluation.accuracy(None, None, [("How many?", reference)], protocol="paper")
    assert (score, row["correct"]) == (float(correct), correct)
    assert calls[0][1]["begin"] == " Let's think step by step."


def test_accuracy_is_the_share(monkeypatch):
    examples = [(f"question {i}", f"#### {i}") for i in range(8)]
    answers = ["#### 0", "#### 1", "none", "#### 3", "#### 5", "#### 4", "", "#### 7"]
    answer_with(monkeypatch, {f"question {i}": answer for i, answer in enumerate(answers)})
    score, rows = evaluation.accuracy(None, None, examples)
    assert score == 4 / 8
    assert [r["correct"] for r in rows] == [True, True, False, True, False, False, False, True]
    assert [r["answer"] for r in rows] == ["0", "1", None, "3", "5", "4", None, "7"]
    assert [r["reference"] for r in rows] == [str(i) for i in range(8)]


def test_accuracy_names_the_record_without_an_answer(monkeypatch):
    """Before any time is spent on answers."""
    calls = answer_with(monkeypatch, {})
    with pytest.raises(ValueError, match="no problems"):
        evaluation.accuracy(None, None, [])
    with pytest.raises(ValueError, match="record 2: .*names no number.*'So it is blue.'"):
        evaluation.accuracy(None, None, [("a", "#### 1"), ("b", "So it is blue."), ("c", "####")])
    assert not calls


def test_accuracy_runs_along(monkeypatch):
    """The progress bar shows the share so far; short prompts come first, those done not at all."""
    answers = {"a" * n: f"#### {n if n != 4 else 0}" for n in range(1, 9)}
    calls = answer_with(monkeypatch, answers)
    examples = [("a" * n, f"#### {n}") for n in (5, 6, 7, 8, 1, 2, 3, 4)]
    done = {6: {"correct": False, "of": "another time"}}
    monkeypatch.setattr(evaluation, "tqdm", partial(evaluation.tqdm, mininterval=0))
    with redirect_stderr(io.StringIO()) as err:
        score, rows = evaluation.accuracy(None, None, examples, batch=4, done=done)
    assert [prompts for prompts, _ in calls] == [["a", "aa", "aaaa", "aaaaa"],
                                                 ["aaaaaa", "aaaaaaa", "aaaaaaaa"]]
    assert re.findall(r"(\S+)% right", err.getvalue()) == ["60.0", "75.0"]
    assert score == 0.75 and rows[6] is done[6]
    assert [row.get("prompt") for row in rows[:6]] == [prompt for prompt, _ in examples[:6]]


# --- perplexity

TEXT = " ".join(answer for _, answer in EXAMPLES[:4])


@pytest.mark.parametrize("length, stride, first", [
    (7, 7, 1), (64, 64, 1), (999, 999, 1), (50, 20, 1), (5, 2, 1), (50, 20, 2)])
def test_perplexity_is_its_definition(net, tok, monkeypatch, length, stride, first):
    """Every token once, in the first window that holds it, after BOS and what precedes it there."""
    assert tok.start == tok.bos == 1 and tok.eos == 2
    monkeypatch.setattr(tok, "start", first)         # 2: as for a model without BOS
    ids, total, before = tok.encode(TEXT), 0.0, None
    for i, token in enumerate(ids):
        start = max(0, math.ceil((i + 1 - length) / stride)) * stride
        if start != before:
            window = [first] + ids[start:start + length]
            log_p = torch.log_softmax(net(torch.tensor([window]))[0].double(), -1)
            before = start
        total -= log_p[i - start, token].item()
    got, count, windows = evaluation.perplexity(net, tok, TEXT, length, stride)
    assert count == len(ids) > 64 and windows == 1 + start // stride
    assert got == pytest.approx(math.exp(total / len(ids)), rel=1e-5)


@pytest.mark.parametrize("length, stride", [(40, 40), (40, 15), (64, 5), (40, 39), (999, 999)])
def test_perplexity_is_that_of_transformers(net, tok, length, stride):
    """The loop of Hugging Face's guide to the perplexity of fixed-length models, BOS before all."""
    twin, ids = hugging_face(net), tok.encode(TEXT)[:150]
    losses, before = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        window = torch.tensor([[tok.bos] + ids[begin:end]])
        target = window.clone()
        target[:, :-(end - before)] = -100
        with torch.no_grad():
            losses.append(twin(window, labels=target).loss.double() * (end - before))
        before = end
        if end == len(ids):
            break
    text = tok.decode(ids)
    assert tok.encode(text) == ids
    got, count, windows = evaluation.perplexity(net, tok, text, length, stride)
    assert (count, windows) == (len(ids), len(losses))
    assert got == pytest.approx((sum(losses) / len(ids)).exp().item(), rel=1e-4)


@pytest.mark.long
def test_more_context_is_less_perplexity(net, tok):
    """Why a small stride is worth its time."""
    text = " ".join(answer for _, answer in EXAMPLES[:8])
    disjoint, half, most = (evaluation.perplexity(net, tok, text, 32, s)[0] for s in (None, 16, 4))
    assert disjoint > half > most


def test_perplexity_tells_english_from_noise(net, tok):
    story = "Nora had 14 shells. She found 8 more."
    noise = "".join(sorted(story))
    assert evaluation.perplexity(net, tok, story)[0] * 3 < evaluation.perplexity(net, tok, noise)[0]
    with pytest.raises(ValueError, match="empty"):
        evaluation.perplexity(net, tok, "")
    with pytest.raises(ValueError, match="--stride 8 is more than --length 7"):
        evaluation.perplexity(net, tok, story, 7, 8)


# --- the file of predictions

def test_write_lines(tmp_path):
    rows = [{"a": "é \n \"", "b": None}, {"a": "−3", "b": True}]
    path = tmp_path / "new" / "folder" / "p.jsonl"
    evaluation.write_lines(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    assert os.listdir(path.parent) == ["p.jsonl"]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    evaluation.write_lines(path, [{"a": 1}])
    with pytest.raises(TypeError):
        evaluation.write_lines(path, [{"a": 2}, {"a": object()}])
    assert path.read_text() == '{"a": 1}\n'

    def full_disk(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError):
        evaluation.write_lines(path, [{"a": 2}])
    assert path.read_text() == '{"a": 1}\n'


# --- the command

def test_prompt(net, tok):
    prompt = EXAMPLES[0][0]
    expected, = evaluation.complete(net, tok, [prompt], max_new_tokens=12)
    assert command("--prompt", prompt, "--max-new-tokens", 12) == expected + "\n"


def test_prompt_shows_the_base_beside_the_adapted(net, tok, saved):
    prompt = EXAMPLES[0][0]
    base, = evaluation.complete(net, tok, [prompt], max_new_tokens=12)
    other = adapter.load(model.load("tiny", "cpu"), saved)
    adapted, = evaluation.complete(other, tok, [prompt], max_new_tokens=12)
    assert base != adapted
    printed = command("--adapter", saved, "--prompt", prompt, "--max-new-tokens", 12)
    assert printed == f"--- base\n{base}\n--- with {saved}\n{adapted}\n"


def typed(monkeypatch, *lines):
    """What is typed, a line after another; the last one may be an exception."""
    lines = iter(lines)

    def read(prompt):
        print(prompt, end="")
        if isinstance(line := next(lines), BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


@pytest.mark.parametrize("end", ["", "  ", EOFError(), KeyboardInterrupt()])
def test_interactive(net, tok, saved, monkeypatch, end):
    """The answers of --prompt, one session; it ends quietly. The template is shown first."""
    prompts = [EXAMPLES[0][0], "What is 2 + 3?"]
    flags = "--adapter", saved, "--max-new-tokens", 8
    typed(monkeypatch, *prompts, end)
    printed = command(*flags, "--interactive")
    first, *answers = printed.split("\n> ")
    assert joined(data.PROMPT) in joined(first) and "Ctrl-D" in first
    assert max(map(len, first.splitlines())) < 80
    assert [a.strip("\n") for a in answers] == [
        *(command(*flags, "--prompt", p).strip("\n") for p in prompts), ""]
    assert "--- base\n" in answers[0] and f"--- with {saved}\n" in answers[0]


def test_interactive_goes_on_after_a_prompt_that_is_too_long(monkeypatch):
    """And it obeys SIGTERM, which run() makes a KeyboardInterrupt with a number."""
    typed(monkeypatch, "long " * 999, "Hi", "")
    printed = command("--interactive", "--max-new-tokens", 2)
    assert "has 1,0" in joined(printed) and "leave it out" in joined(printed)
    assert printed.count("\n> ") == 3
    typed(monkeypatch, KeyboardInterrupt(15))
    with pytest.raises(KeyboardInterrupt):
        command("--interactive")


@pytest.mark.long
def test_interactive_reads_a_pipe():
    """As a program: no terminal, bytes that are not UTF-8, an end without an empty line."""
    run = subprocess.run([sys.executable, "eval.py", "--interactive", "--max-new-tokens", "2"],
                         cwd=ROOT, capture_output=True, input=b"What is 2 + \xff3?")
    assert run.returncode == 0 and run.stdout.count(b"\n> ") == 2
    assert run.stderr == (b"eval.py: loading torch ...\neval.py: reading tiny ...\n"
                          b"(cut after 2 tokens; --max-new-tokens allows more)\n")


@pytest.mark.parametrize("text, stop, expected", [
    ("so\nit is ", [], "so\nit is"), ("caf\ufffd", [], "caf"), ("a b\n##", ["####"], "a b"),
    ("a #### b", ["####", " b"], "a"), ("a #### 2#", ["###"], "a"), ("ab", ["bcd", "abc"], "")])
def test_what_is_shown_before_a_text_is_complete(text, stop, expected):
    assert ask.settled(text, stop) == expected


@pytest.mark.parametrize("stop", [(), ("line",), ("never said",)])
def test_an_answer_appears_token_by_token(net, tok, capsys, stop):
    """Each piece is printed once, and all of them are the whole answer."""
    shown = []

    def complete(watch):
        def seen(text):
            watch(text)
            shown.append(capsys.readouterr().out)

        return evaluation.complete(net, tok, ["What is a line?"], max_new_tokens=20, stop=stop,
                                   watch=seen)[0]

    ask.streamed(complete, stop)
    expected, = evaluation.complete(net, tok, ["What is a line?"], max_new_tokens=20, stop=stop)
    assert "".join(shown) + capsys.readouterr().out == expected + "\n"
    assert sum(map(bool, shown)) > (5 if "line" not in stop else 0)


def test_control_characters_are_shown_and_do_nothing(monkeypatch):
    """What a model says is printed, and no terminal obeys it."""
    answer_with(monkeypatch, {"Hi </s>": "caf\u00e9\x1b[2J\r\u202e\tso\nit is"})
    assert command("--prompt", "Hi </s>") == (
        "note: the prompt: texts that spell control tokens, such as '</s>': 1; they are\n  plain "
        "characters here, never the tokens\ncaf\u00e9\\x1b[2J\\r\\u202e\tso\nit is\n")


@pytest.mark.long
def test_ascii_terminal(tmp_path):
    """Printing never fails because of an encoding; nothing that follows is lost."""
    (tmp_path / "d.jsonl").write_text('{"question": "?", "answer": "#### 2", "caf\u00e9": "x"}\n')
    run = subprocess.run(
        [sys.executable, "eval.py", "--accuracy", tmp_path / "d.jsonl", "--out", tmp_path / "p",
         "--max-new-tokens", "2"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0 and "columns that are not used: caf\\xe9;" in joined(run.stdout)
    assert "\naccuracy 0.0% (0.0% to 79.3% with 95 % confidence) by protocol" in run.stdout


def test_a_cut_answer_is_told(net, tok, monkeypatch, capsys, tmp_path):
    """An answer that ends by itself, or by a stop text, is not called cut."""
    eos = next(iter(tok.stops))
    for said, cut in ([5, 6, 7], {0}), ([5, 6, eos], set()), ([5, eos, 5], set()):
        say(monkeypatch, said)
        found = set()
        evaluation.complete(net, tok, ["?"], max_new_tokens=3, cut=found)
        assert found == cut
    say(monkeypatch, [5, 6, 7])
    evaluation.complete(net, tok, ["?"], max_new_tokens=3, stop=[tok.decode([6])], cut=found)
    assert not found
    say(monkeypatch, [5, 6, 7])
    assert "cut" not in command("--prompt", "Hi", "--max-new-tokens", 3)
    assert "(cut after 3 tokens; --max-new-tokens allows more)\n" in capsys.readouterr().err
    say(monkeypatch, [5, 6], [5, eos], [5, 7])
    printed = command("--accuracy", TINY / "test.jsonl", "--limit", 3, "--max-new-tokens", 2,
                      "--out", tmp_path / "p.jsonl")
    assert "note: --max-new-tokens cut 2 answers; more tokens" in printed
    assert [row.get("cut", False) for row in read_lines(tmp_path / "p.jsonl")].count(True) == 2


def test_no_bar_beside_a_text_that_appears(net, monkeypatch):
    """Of an answer that takes long, either the text is seen or the bar, never both in one line."""
    bars = []
    monkeypatch.setattr(model, "tqdm", lambda steps, name, delay, **_: (
        bars.append((name, delay)), steps)[1])
    command("--prompt", "Tom had 12 pens.", "--max-new-tokens", 2)
    assert [delay for name, delay in bars if name == "generate"] == [math.inf]
    del bars[:]
    model.generate(net, [[1, 2]], 2)
    assert bars == [("generate", 2)]


@pytest.mark.long
def test_prompt_samples(net, tok):
    """--top-k 1 is greedy at any temperature; --stop ends the answer."""
    prompt = EXAMPLES[0][0]
    flags = ["--prompt", prompt, "--max-new-tokens", 12]
    greedy, hot = command(*flags), [*flags, "--temperature", 3]
    assert command(*hot, "--top-k", 1) == greedy != command(*hot)
    assert command(*hot) == command(*hot, "--top-k", 0) != command(*hot, "--seed", 1)
    word = greedy.split()[2]
    assert command(*flags, "--stop", "never said", "--stop", word) == (
        greedy[:greedy.index(word)].strip() + "\n")


@pytest.mark.parametrize("flag, protocol, expected", [
    ("--accuracy", "strict", "protocol strict: data.PROMPT, greedy, at most 33 new tokens; the "
     r"first number right after '####', 'The answer is' or '\boxed{' must equal the reference"),
    ("--gsm8k", "paper", "protocol paper: data.PROMPT + \" Let's think step by step.\", greedy, at "
     "most 33 new tokens; the rounded number after the last 'The answer is: ' must equal the "
     "reference")])
def test_accuracy_command(tmp_path, monkeypatch, flag, protocol, expected):
    """The protocol, the score with its error, and a row of the file for every problem."""
    answers = {p: "The answer is: " + data.final_answer(a) for p, a in EXAMPLES}
    answers[EXAMPLES[3][0]] = answers[EXAMPLES[7][0]] = "I do not know."
    answers[EXAMPLES[5][0]] += "0"
    answer_with(monkeypatch, answers)
    printed = command(flag, TINY / "test.jsonl", "--limit", 20, "--max-new-tokens", 33,
                      "--protocol", protocol, "--out", tmp_path / "p.jsonl")
    assert joined(printed).startswith(expected + " accuracy ")
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) < 80
    score, low, high = re.search(r"accuracy (\S+)% \((\S+)% to (\S+)%", printed).groups()
    assert float(score) == 85.0 and f"by protocol {protocol}: 17 of 20 problems" in joined(printed)
    assert (float(low), float(high)) == (64.0, 94.8)                 # by Wilson, of 17 in 20
    rows = read_lines(tmp_path / "p.jsonl")
    assert [r["prompt"] for r in rows] == [p for p, _ in EXAMPLES]
    assert [i for i, r in enumerate(rows) if not r["correct"]] == [3, 5, 7]
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_answers_that_a_protocol_cannot_read(tmp_path, monkeypatch):
    """All 0 % by it: a note says why; none if one can be read."""
    for protocol, noted in ("strict", False), ("paper", True):
        answer_with(monkeypatch, {p: "#### 1" for p, _ in EXAMPLES})
        printed = command("--accuracy", TINY / "test.jsonl", "--limit", 20, "--protocol", protocol,
                          "--out", tmp_path / f"{protocol}.jsonl")
        assert (f"no answer holds what protocol {protocol} reads" in joined(printed)) == noted


@pytest.mark.parametrize("argv, tokens, stop", [
    ([], 256, []), (["--protocol", "paper"], 1024, []),
    (["--protocol", "paper", "--max-new-tokens", 5, "--stop", "\n\n", "--stop", "USER"], 5,
     ["\n\n", "USER"])])
def test_accuracy_options(tmp_path, monkeypatch, argv, tokens, stop):
    """They reach the model, and what was asked for is what the line says."""
    calls = answer_with(monkeypatch, {EXAMPLES[0][0]: "It is blue."})
    printed = command("--accuracy", TINY / "test.jsonl", "--limit", 1, *argv, "--out",
                      tmp_path / "p.jsonl")
    assert (calls[0][1]["max_new_tokens"], calls[0][1]["stop"]) == (tokens, stop)
    assert f"at most {tokens} new tokens{f', stop at {stop}' if stop else ''};" in joined(printed)


@pytest.mark.long
def test_accuracy_of_the_real_model(net, tok, saved):
    """Predictions go beside the adapter, and are those of the adapted model."""
    other = adapter.load(model.load("tiny", "cpu"), saved)
    for protocol in ("strict", "paper"):
        command("--adapter", saved, "--accuracy", TINY / "test.jsonl", "--limit", 5,
                "--max-new-tokens", 8, "--batch", 2, "--protocol", protocol)
        expected = evaluation.accuracy(other, tok, EXAMPLES[:5], max_new_tokens=8,
                                       protocol=protocol)[1]
        name = f"predictions-{saved.name}-test-{protocol}-first5.jsonl"
        assert read_lines(saved.parent / name) == expected


def test_ppl_command(net, tok, tmp_path, saved):
    text = "Nora had 14 shells. She found 8 more — at café “Sol”.\n" * 5
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    other = adapter.load(model.load("tiny", "cpu"), saved)
    adapted = ["--adapter", saved, "--stride", 30]
    for which, stride, more in ((net, 50, []), (other, 30, adapted)):
        printed = command("--ppl", tmp_path / "text.txt", "--length", 50, *more)
        value, count, windows = evaluation.perplexity(which, tok, text, 50, stride)
        assert printed == (f"perplexity {value:.4f} per token ({count} tokens, {windows} windows "
                           f"of 50, stride {stride})\n")


# --- an interrupted accuracy

def accuracy_flags(out, *more):
    return ["--accuracy", TINY / "test.jsonl", "--limit", 10, "--max-new-tokens", 6, "--batch", 3,
            "--out", out, *more]


class Killed(BaseException):
    """As good as kill -9: nothing here catches it."""


def die(monkeypatch, batch, generate, asked=None):
    """From now on the model answers by `generate`, and dies at this batch, counted from 1 (0: it
    lives); the prompts that it has answered."""
    asked = []

    def answer(net, prompts, *args, **options):
        asked.append([tuple(p) for p in prompts])
        if len(asked) == batch:
            asked.pop()
            raise Killed
        return generate(net, prompts, *args, **options)

    monkeypatch.setattr(model, "generate", answer)
    return asked


def test_interrupted_accuracy_goes_on(tmp_path, monkeypatch):
    """Interrupted twice, once within a line: the file is that of a run that was not, and every
    problem was answered once."""
    real, out, part = model.generate, tmp_path / "p.jsonl", tmp_path / "p.jsonl.part"
    command(*accuracy_flags(tmp_path / "whole.jsonl"))
    answered = []
    for batch, done in ((2, None), (3, 3), (0, 9)):
        asked = die(monkeypatch, batch, real)
        if batch:
            with pytest.raises(Killed):
                command(*accuracy_flags(out))
            assert not out.exists()
        else:
            printed = command(*accuracy_flags(out))
            assert f"going on: {done} of 10 are done\n" in printed
        answered += [prompt for prompts in asked for prompt in prompts]
        if part.exists():
            assert len(read_lines(part)) == 1 + len(answered)
            with open(part, "ab") as file:                        # half a row, half a character
                file.write('[9, {"prompt": "caf\u00e9'.encode()[:-1])
    assert len(answered) == len(set(answered)) == 10
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "whole.jsonl"]


def test_predictions_are_on_disk_as_they_come(tmp_path, monkeypatch):
    """What a power cut leaves: the rows of every finished batch, not those in some buffer."""
    counts = []

    def generate(net, prompts, *args, **options):
        counts.append(len(read_lines(tmp_path / "p.jsonl.part")) - 1)
        return [[5]] * len(prompts)

    monkeypatch.setattr(model, "generate", generate)
    command(*accuracy_flags(tmp_path / "p.jsonl"))
    assert counts == [0, 3, 6, 9]


@pytest.fixture
def base(tmp_path):
    """A copy of the tiny checkpoint, which can be changed."""
    shutil.copytree(TINY, tmp_path / "base")
    return tmp_path / "base"


def other_adapter(base, saved):
    """One number of B changes, by its last bit; on purpose, so it is a plain LoRA now."""
    path, = saved.glob("adapter_model.*")
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)
    (saved / "pissa.json").unlink()


def other_base(base, saved):
    net = model.load(base, "cpu")
    net.model.norm.weight.data *= 1.1
    meta_write.save(net, base)


@pytest.mark.parametrize("change, more, anew", [
    (None, [], False),
    (None, ["--batch", 2], False),
    (None, ["--max-new-tokens", 7], True),
    (None, ["--stop", "x"], True),
    (None, ["--protocol", "paper"], True),
    (None, ["--limit", 9], True),
    (None, ["--fields", "answer,question,answer"], True),
    (other_adapter, [], True),
    (other_base, [], True)])
def test_going_on_or_starting_anew(tmp_path, monkeypatch, base, saved, change, more, anew):
    """Only what could change a prediction starts anew, and it says so in a line."""
    shutil.copytree(saved, tmp_path / "adapter")
    flags = accuracy_flags(tmp_path / "p.jsonl", "--ckpt", base, "--adapter", tmp_path / "adapter")
    die(monkeypatch, 3, lambda net, prompts, *args, **options: [[5]] * len(prompts))
    with pytest.raises(Killed):
        command(*flags)
    if change:
        change(base, tmp_path / "adapter")
    asked = die(monkeypatch, 0, lambda net, prompts, *args, **options: [[6]] * len(prompts))
    printed = command(*flags, *more)
    assert len(re.findall(r"^\S", printed, re.M)) == 4       # one: that no answer can be read
    assert ("\nstarting anew:" if anew else "\ngoing on: 6 of 10 are done\n") in printed
    rows = read_lines(tmp_path / "p.jsonl")
    assert sum(map(len, asked)) == (len(rows) if anew else 4)
    assert len({row["response"] for row in rows}) == (1 if anew else 2)


# --- mistakes

@pytest.mark.long
def test_a_mistake_is_one_line_on_stderr():
    """As a process: the rest of the mistakes are tried in this one."""
    run = subprocess.run([sys.executable, "eval.py", "--ckpt", "llama9-7b", "--prompt", "Hi"],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    line, = run.stderr.splitlines()                              # before torch is loaded
    assert line.startswith("eval.py: no checkpoint llama9-7b") and "consolidated.00.pth" in line


@pytest.mark.long
@pytest.mark.parametrize("argv, words", [
    (["eval.py", "--prompt", "Hi", "--adapter", "{tmp}"],
     "{tmp}/adapter_config.json is missing: {tmp} is not an adapter"),
    (["eval.py", "--accuracy", "{tmp}/none.jsonl"], "{tmp}/none.jsonl: no such file or directory"),
    (["train.py", "--test-data", "{tmp}/none.jsonl", "--out", "{tmp}/x"],
     "{tmp}/none.jsonl: no such file or directory"),
    (["convert.py", "merge", "{tmp}", "{tmp}/x", "--ckpt", "llama9-7b"], "no checkpoint llama9-7b"),
    (["convert.py", "compress", "{tmp}/a", "{tmp}/x"], "{tmp}/a is not an adapter"),
    (["convert.py", "gguf", "{tmp}/a.gguf", "{tmp}/x"], "{tmp}/a.gguf: no such file or directory")])
def test_what_is_not_there_is_told_before_torch_is_loaded(tmp_path, argv, words):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was loaded')")
    argv, words = [a.format(tmp=tmp_path) for a in argv], words.format(tmp=tmp_path)
    run = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert run.returncode == 1 and run.stderr.startswith(f"{argv[0]}: ") and words in run.stderr


@pytest.mark.parametrize("argv, message", [
    (["--prompt", "Hi", "--adapter", "{tmp}"], "adapter_config.json is missing"),
    (["--prompt", "Hi", "--device", "abacus"], "abacus"),
    (["--accuracy", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
    (["--accuracy", "{tmp}/broken.jsonl"], "broken.jsonl:2: not JSON"),
    (["--accuracy", "{tmp}/open.jsonl", "--out", "{tmp}/p.jsonl"],
     "record 2: the reference answer names no number"),
    (["--accuracy", "{tmp}/open.jsonl", "--fields", "question,reply"], "no field 'reply'"),
    (["--ppl", "{tmp}/nowhere.txt"], "nowhere.txt"),
    (["--ppl", "{tmp}/latin.txt"], "latin.txt: not UTF-8: .*iconv"),
    (["--ppl", "{tmp}/text.gz"], "text.gz: compressed by gzip: gzip -dc"),
    (["--ppl", "{tmp}/empty.txt"], "empty.txt: the text is empty"),
    (["--accuracy", "{tmp}/long.jsonl"], "'x x .*' has [0-9,]+ tokens, .*256 positions"),
    (["--accuracy", "{tmp}/deep.jsonl"], "deep.jsonl:1: JSON nested too deeply"),
    (["--accuracy", "{tmp}/\x1b[31m\n.jsonl"], r"\\x1b\[31m\\n\.jsonl: no such file"),
    (["--ppl", "{tmp}/broken.jsonl", "--length", "20", "--stride", "21"],
     "--stride 21 is more than --length 20"),
    (["--accuracy", "{tmp}/zero.jsonl"], "zero.jsonl: record 1: .* names no number")])
def test_mistakes(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    good = '{"question": "1 + 1?", "answer": "#### 2"}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "zero.jsonl").write_text(good.replace("2", "1/0"))
    (tmp_path / "broken.jsonl").write_text(good + '{"question": "2 +\n')
    (tmp_path / "open.jsonl").write_text(good + '{"question": "Who?", "answer": "Me."}\n')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"Hello"))
    (tmp_path / "long.jsonl").write_text(good.replace("1 + 1?", "x " * 300))
    (tmp_path / "deep.jsonl").write_text('{"question": ' + "[" * 99999 + "]" * 99999 + "}")
    text = failure(*(a.format(tmp=tmp_path) for a in argv))
    assert text.startswith("eval.py: ") and "\n" not in text, text
    assert re.search(message, text)
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("argv, name", [
    ([], "nothing to do: give --prompt, --interactive, --accuracy, --task or --ppl"),
    (["--prompt", "Hi", "--interactive"], "--interactive stands alone: no --prompt"),
    (["--prompt", "Hi", "--max-new-tokens", 0], "--max-new-tokens"),
    (["--prompt", "Hi", "--top-p", 0], "--top-p"),
    (["--prompt", "Hi", "--top-k", -1], "--top-k"),
    *((["--prompt", "Hi", name, 10**30], name) for name in (
        "--limit", "--max-new-tokens", "--batch", "--length", "--stride", "--top-k", "--seed",
        "--temperature")),
    (["--prompt", "Hi", "--stop", "x", "--stop", ""], "--stop is empty"),
    (["--prompt", "Hi", "--stop", "\udcff"], "--stop is not valid UTF-8"),
    (["--prompt", "\udcff"], "--prompt is not valid UTF-8"),
    (["--accuracy", TINY / "test.jsonl", "--protocol", "loose"], "--protocol"),
    (["--ppl", TINY / "params.json", "--stride", 0], "--stride"),
    (["--accuracy", TINY / "test.jsonl", "--limit", 0], "--limit"),
    (["--accuracy", TINY / "test.jsonl", "--limit", -1], "--limit"),
    (["--accuracy", TINY / "test.jsonl", "--batch", -1], "--batch"),
    (["--ppl", TINY / "params.json", "--length", -1], "--length")])
def test_numbers_out_of_range(argv, name):
    """Refused before anything is read; a line of usage and a line that names the flag."""
    text = failure("--ckpt", "nowhere", *argv)
    assert name in text.splitlines()[-1] and len(text.splitlines()) <= 2, text


def test_ctrl_c(monkeypatch):
    def ctrl_c(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "generate", ctrl_c)
    try:
        assert failure("--prompt", "Hi") == "eval.py: interrupted"
    except KeyboardInterrupt:                  # it would end pytest
        pytest.fail("Ctrl-C ends in a traceback")


@pytest.mark.parametrize("out, message", [
    ("good.jsonl", "is the file of problems"), ("", "cannot|not a file that can be written"),
    ("good.jsonl/p.jsonl", "not a file that can be written")])
def test_out_must_be_a_file_of_its_own(tmp_path, out, message):
    (tmp_path / "good.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    text = failure("--accuracy", tmp_path / "good.jsonl", "--out", tmp_path / out)
    assert re.search(message, text)
    assert (tmp_path / "good.jsonl").read_text().startswith('{"question"')


def test_damaged_unfinished_predictions(tmp_path, monkeypatch):
    """One line that names the file, whatever its rows have become."""
    (tmp_path / "p.jsonl.part").write_text('{"a": 1}\n[0, 5]\n')
    with pytest.raises(ValueError, match="p.jsonl.part: damaged; remove it to start anew"):
        evaluation.resume(tmp_path / "p.jsonl.part", {"a": 1}, 3)
