"""eval.py: answers in their order, exact scores, perplexity by its definition, files, mistakes."""
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import data
import eval as evaluation
import model
import pissa
from conftest import ROOT, TINY

EXAMPLES = data.read(TINY / "test.jsonl")[:20]


@pytest.fixture(scope="module")
def tok():
    return data.Tokenizer(TINY)


@pytest.fixture(scope="module")
def net():
    return model.load("tiny", "cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes what the model says."""
    net = pissa.inject(model.load("tiny", "cpu"), 4, niter=1, progress=False)
    for _, m in pissa.layers(net):
        m.A.data *= 0.7
    folder = tmp_path_factory.mktemp("run") / "adapter"
    pissa.save(net, folder)
    return folder


def command(*argv):
    """What eval.py prints with this command line."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        evaluation.main()
    return out.getvalue()


def failure(*argv):
    """What eval.py, failing, writes as its last words, as the shell would show them."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e, \
            redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        patch.setattr(sys, "argv", ["eval.py", *map(str, argv)])
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert e.value.code not in (0, None), "it should have failed"
    return e.value.code if isinstance(e.value.code, str) else err.getvalue().strip()


def answer_with(monkeypatch, answers):
    """A model that gives these answers, whatever it is asked; the calls it gets."""
    calls = []

    def complete(net, tok, prompts, **options):
        calls.append((prompts, options))
        return answers[:len(prompts)]

    monkeypatch.setattr(evaluation, "complete", complete)
    return calls


# --- complete

def test_complete_is_the_greedy_answer(net, tok):
    """One prompt, token by token, without cache, batch or padding."""
    prompt, _ = EXAMPLES[0]
    ids = data.prompt_ids(prompt, tok)
    for _ in range(10):
        ids.append(net(torch.tensor([ids]))[0, -1].argmax().item())
    expected = tok.decode(ids[-10:]).strip()
    assert evaluation.complete(net, tok, [prompt], max_new_tokens=10) == [expected] != [""]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_complete_keeps_the_order_in_any_batch(tok, batch):
    """Prompts of many lengths, sorted inside, come back as they were given.

    Large random weights, for a model that answers every prompt differently."""
    net = model.init_weights(model.load("tiny", "cpu").requires_grad_(False), std=0.2)
    prompts = [p for p, _ in EXAMPLES[:9]] + ["Hi", "A much longer one. " * 12, ""]
    one_by_one = [evaluation.complete(net, tok, [p], max_new_tokens=6)[0] for p in prompts]
    assert len(set(one_by_one)) == len(prompts), "answers too much alike to tell the order"
    assert evaluation.complete(net, tok, prompts, max_new_tokens=6, batch=batch) == one_by_one


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
    calls = answer_with(monkeypatch, [answer])
    score, (row,) = evaluation.accuracy(None, None, [("How many?", reference)], max_new_tokens=9)
    assert (score, row["correct"]) == (float(correct), correct)
    assert (row["prompt"], row["response"]) == ("How many?", answer)
    assert calls[0][0] == ["How many?"] and calls[0][1]["max_new_tokens"] == 9
    assert "temperature" not in calls[0][1], "accuracy is measured greedily"


def test_accuracy_is_the_share(monkeypatch):
    examples = [(f"question {i}", f"#### {i}") for i in range(8)]
    answers = ["#### 0", "#### 1", "none", "#### 3", "#### 5", "#### 4", "", "#### 7"]
    answer_with(monkeypatch, answers)
    score, rows = evaluation.accuracy(None, None, examples)
    assert score == 4 / 8
    assert [r["correct"] for r in rows] == [True, True, False, True, False, False, False, True]
    assert [r["answer"] for r in rows] == ["0", "1", None, "3", "5", "4", None, "7"]
    assert [r["reference"] for r in rows] == [str(i) for i in range(8)]


def test_accuracy_names_the_record_without_an_answer(monkeypatch):
    """Before any time is spent on answers."""
    calls = answer_with(monkeypatch, ["#### 1"] * 3)
    with pytest.raises(ValueError, match="record 2: .*names no number.*'So it is blue.'"):
        evaluation.accuracy(None, None, [("a", "#### 1"), ("b", "So it is blue."), ("c", "####")])
    assert not calls


# --- perplexity

@pytest.mark.parametrize("length", [7, 64, 1000])
def test_perplexity_is_its_definition(net, tok, length):
    """Every token once, after BOS and what precedes it in its window, in float64."""
    text = " ".join(answer for _, answer in EXAMPLES[:8])
    ids, total = tok.encode(text), 0.0
    for i, token in enumerate(ids):
        if i % length == 0:
            window = [tok.bos] + ids[i:i + length]
            log_p = torch.log_softmax(net(torch.tensor([window]))[0].double(), -1)
        total -= log_p[i % length, token].item()
    got, count = evaluation.perplexity(net, tok, text, length)
    assert count == len(ids) > 64
    assert got == pytest.approx(math.exp(total / len(ids)), rel=1e-5)


def test_perplexity_tells_english_from_noise(net, tok):
    story = "Nora had 14 shells. She found 8 more."
    noise = "".join(sorted(story))
    assert evaluation.perplexity(net, tok, story)[0] * 3 < evaluation.perplexity(net, tok, noise)[0]
    with pytest.raises(ValueError, match="empty"):
        evaluation.perplexity(net, tok, "")


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


def test_prompt_shows_the_base_beside_the_adapted(net, tok, adapter):
    prompt = EXAMPLES[0][0]
    base, = evaluation.complete(net, tok, [prompt], max_new_tokens=12)
    other = pissa.load(model.load("tiny", "cpu"), adapter)
    adapted, = evaluation.complete(other, tok, [prompt], max_new_tokens=12)
    assert base != adapted
    printed = command("--adapter", adapter, "--prompt", prompt, "--max-new-tokens", 12)
    assert printed == f"--- base\n{base}\n--- with {adapter}\n{adapted}\n"


def test_accuracy_command(tmp_path, monkeypatch):
    """The protocol, the score with its error, and a row of the file for every problem."""
    answers = [f"#### {data.final_answer(a)}" for _, a in EXAMPLES]
    answers[3] = answers[7] = "I do not know."
    answers[5] += "0"
    answer_with(monkeypatch, answers)
    printed = command("--accuracy", TINY / "test.jsonl", "--limit", 20, "--max-new-tokens", 33,
                      "--out", tmp_path / "p.jsonl")
    assert "protocol: " in printed and "33 new tokens" in printed and "greedy" in printed
    score, error = re.search(r"accuracy (\S+)% ± (\S+)%", printed).groups()
    assert float(score) == 85.0 and "on 20 problems" in printed
    assert float(error) == pytest.approx(100 * math.sqrt(0.85 * 0.15 / 20), abs=0.05)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows] == [p for p, _ in EXAMPLES]
    assert [i for i, r in enumerate(rows) if not r["correct"]] == [3, 5, 7]


def test_accuracy_of_the_real_model(net, tok, adapter):
    """Predictions go beside the adapter, and are those of the adapted model."""
    command("--adapter", adapter, "--accuracy", TINY / "test.jsonl", "--limit", 5,
            "--max-new-tokens", 8, "--batch", 2)
    other = pissa.load(model.load("tiny", "cpu"), adapter)
    expected = evaluation.accuracy(other, tok, EXAMPLES[:5], max_new_tokens=8)[1]
    path = adapter.parent / "predictions-test.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


def test_ppl_command(net, tok, tmp_path, adapter):
    text = "Nora had 14 shells. She found 8 more — at café “Sol”.\n" * 5
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    other = pissa.load(model.load("tiny", "cpu"), adapter)
    for which, more in ((net, []), (other, ["--adapter", adapter])):
        printed = command("--ppl", tmp_path / "text.txt", "--length", 50, *more)
        value, count = evaluation.perplexity(which, tok, text, 50)
        assert f"perplexity {value:.4f}" in printed and f"{count} tokens" in printed


# --- mistakes

def test_a_mistake_is_one_line_on_stderr():
    """As a process: the rest of the mistakes are tried in this one."""
    run = subprocess.run([sys.executable, "eval.py", "--ckpt", "llama9-7b", "--prompt", "Hi"],
                         cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("eval.py: no checkpoint llama9-7b") and "consolidated.00.pth" in line


@pytest.mark.parametrize("argv, message", [
    (["--prompt", "Hi", "--adapter", "{tmp}"], "adapter_config.json is missing"),
    (["--prompt", "Hi", "--device", "abacus"], "abacus"),
    (["--accuracy", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
    (["--accuracy", "{tmp}/broken.jsonl"], "broken.jsonl:2: not JSON"),
    (["--accuracy", "{tmp}/open.jsonl", "--out", "{tmp}/p.jsonl"],
     "record 2: the reference answer names no number"),
    (["--accuracy", "{tmp}/open.jsonl", "--fields", "question,reply"], "no field 'reply'"),
    (["--ppl", "{tmp}/nowhere.txt"], "nowhere.txt"),
    (["--ppl", "{tmp}/latin.txt"], "latin.txt"),
    (["--ppl", "{tmp}/empty.txt"], "empty")])
def test_mistakes(tmp_path, argv, message):
    good = '{"question": "1 + 1?", "answer": "#### 2"}\n'
    (tmp_path / "broken.jsonl").write_text(good + '{"question": "2 +\n')
    (tmp_path / "open.jsonl").write_text(good + '{"question": "Who?", "answer": "Me."}\n')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    text = failure(*(a.format(tmp=tmp_path) for a in argv))
    assert text.startswith("eval.py: ") and "\n" not in text, text
    assert re.search(message, text)
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("argv, name", [
    ([], "--prompt"),
    (["--prompt", "Hi", "--max-new-tokens", 0], "--max-new-tokens"),
    (["--prompt", "Hi", "--top-p", 0], "--top-p"),
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
