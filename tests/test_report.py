"""support/report.py and support/options.py: numbers that are printed, and help without torch."""
import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import convert
import data
import eval as evaluation
import model
import pissa
import train
from bench import studies
from conftest import ROOT, command, small_net
from support import mps, options, report


def injected(method, **changes):
    return pissa.inject(small_net(**changes), 4, method, progress=False)


@pytest.mark.parametrize("script", ["train.py", "eval.py", "convert.py"])
def test_help_without_torch(script):
    """torch takes seconds to import; it is not there, and help comes all the same."""
    program = ("import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
               "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program, script, "--help"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == "" and script in done.stdout
    assert ("--plain" in done.stdout) == (script == "train.py")


@pytest.mark.parametrize("columns", [80, 132])
def test_help_fits_the_terminal(monkeypatch, columns):
    """Every line of every --help; prose fills a wide terminal, and commands stay as they are."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for main, *words in ((train.main,), (evaluation.main,), (convert.main,), *(
            (convert.main, word) for word in "merge compress hf gguf decompose".split())):
        with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as out:
            command_line(monkeypatch, *words, "--help")
            main()
        lines = out.getvalue().splitlines()
        assert 0.8 * columns < max(map(len, lines)) <= columns
        assert "    python convert.py hf checkpoints/tiny runs/tiny-hf" in out.getvalue() or \
            words != ["hf"]


def test_mistakes_fit_the_terminal(monkeypatch, tmp_path):
    """A terminal breaks them at spaces; elsewhere they are one line, which grep finds."""
    monkeypatch.setenv("COLUMNS", "60")
    line = "eval.py: no checkpoint: it should hold params.json, consolidated.00.pth or others"
    assert options.last_words(line) == line
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = options.last_words(line).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) < 60 and lines[1].startswith("  ")
    assert " ".join(map(str.strip, lines)) == line
    with pytest.raises(SystemExit), redirect_stderr(io.StringIO()) as err:
        err.isatty = lambda: True
        command_line(monkeypatch, "--resume", "--out", tmp_path)
        train.main()
    assert max(map(len, err.getvalue().splitlines())) < 60 or str(tmp_path) in err.getvalue()


def command_line(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, argv)])


def test_resume_without_a_run_says_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--resume", "--out", "runs/none"
    for more in (), ("runs/a", "runs/b"):
        for i, run in enumerate(more):
            Path(run).mkdir(parents=True)
            Path(run, "args.json").write_text("{}")
            os.utime(Path(run, "args.json"), (i, i))
        with pytest.raises(SystemExit) as e:
            command(train.main, *flags)
        err = capsys.readouterr().err
        assert e.value.code == 2 and "no run has begun in runs/none (runs/none/args.json is " in err
        assert "add --ckpt" in err and ("--resume --out runs/b" in err) == bool(more)
    Path("runs/b/summary.json").touch()                                        # it is finished
    with pytest.raises(SystemExit):
        command(train.main, *flags)
    assert "--resume --out runs/a goes on" in capsys.readouterr().err


@pytest.mark.parametrize("answer, shown", [
    ("", report.NO_ANSWER), ("7", "7"), ("a b", "a b"), ("x\n" * 30, "x\n" * 11 + "x ..."),
    ("word " * 300, "word " * 199 + "word ..."), ("x" * 1000, "x" * 1000)])
def test_long_answers_are_cut(answer, shown):
    """After a dozen lines, or a thousand characters at a space."""
    assert report.shortened(answer) == shown


def test_help_is_that_of_the_module():
    """With torch imported, as main() answers it: the same parser."""
    for module, main in ((train, train.main), (evaluation, evaluation.main),
                         (convert, convert.main)):
        with pytest.raises(SystemExit) as e:
            command(main, "--help")
        assert e.value.code == 0 and module.options is options


def test_choices_are_those_of_the_modules():
    assert options.METHODS == tuple(pissa.METHODS) and options.TARGETS == pissa.TARGETS
    assert options.MAX_NEW_TOKENS.keys() == evaluation.PROTOCOLS.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", pissa.METHODS)
def test_count(method, tied):
    """A weight in four bits counts once, and so does a tied matrix."""
    net = small_net(tied=tied)
    plain = sum(p.numel() for p in net.parameters())
    sizes = [m.weight.shape for m in pissa.find_linears(net, pissa.TARGETS).values()]
    trained = sum(4 * (n_in + n_out) for n_out, n_in in sizes)
    assert report.count(net) == (0, plain)
    pissa.inject(net, 4, method, progress=False)
    assert report.count(net) == (trained, plain + trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", pissa.METHODS)
def test_relative_error_is_an_estimate(method, dtype):
    """From 256 entries, within a third of what all entries give, averaged over the matrices."""
    net = small_net(dim=96, ffn_dim=256).to(dtype)
    W = {n: m.weight.detach().clone() for n, m in pissa.find_linears(net, pissa.TARGETS).items()}
    pissa.inject(net, 4, method, progress=False)
    estimates, exact = [], []
    for name, m in pissa.layers(net):
        near = pissa.as_tensor(m.frozen).double() + (m.A.double() @ m.B.double()).T
        estimates.append(report.relative_error(m))
        exact.append(((near - W[name]).norm() / W[name].double().norm()).item())
    mean, expected = (sum(errors) / len(errors) for errors in (estimates, exact))
    assert mean == pytest.approx(expected, rel=0.33, abs=1e-7)
    assert (expected > 0.01) == (method in ("qpissa", "qlora", "loftq"))


def test_relative_error_sees_a_residual_that_is_not_there():
    m = injected("pissa").model.layers[0].self_attn.q_proj
    assert report.relative_error(m) < 1e-6
    m.frozen.data += (m.A @ m.B).T.detach()
    assert report.relative_error(m) > 0.5


def test_injected_says_it(capsys):
    report.injected(injected("pissa"))
    text = capsys.readouterr().out
    trained, total, error = re.match(
        r"([\d,]+) of ([\d,]+) parameters trained .*\n  largest relative .* about (\S+)$",
        text).groups()
    assert (int(trained.replace(",", "")), int(total.replace(",", ""))) == report.count(
        injected("pissa"))
    assert float(error) < 1e-6


@pytest.mark.parametrize("double, bits", [(False, "4.50"), (True, "4.13")])
@pytest.mark.parametrize("method, least, most", [("qpissa", 0.01, 0.05), ("qlora", 0.05, 0.15)])
def test_injected_says_it_in_four_bits(capsys, method, least, most, double, bits):
    """Between the two methods lies what rounding costs W itself, some nine per cent."""
    net = small_net(dim=96, ffn_dim=256)
    total = sum(p.numel() for p in net.parameters())
    pissa.inject(net, 4, method, double_quant=double, progress=False)
    report.injected(net)
    text = capsys.readouterr().out
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert text.startswith(f"{trained:,} of {total + trained:,} parameters trained")
    mean, worst = map(float, re.search(
        rf"{bits} bits a frozen weight, relative .* about (\S+)\s+on average, at most (\S+)$",
        text).groups())
    assert least < mean <= worst < most


@pytest.mark.parametrize("method, largest", [("pissa", True), ("qpissa", True), ("lora", False),
                                             ("qlora", False), ("loftq", False)])
def test_starts_at_the_largest(method, largest):
    """By its factors, not by its name; of random matrices, as flat as a spectrum can be."""
    net = torch.nn.Sequential()
    net.q_proj, net.k_proj = torch.nn.Linear(256, 256), torch.nn.Linear(256, 64)
    pissa.inject(net, 8, method, ("q_proj", "k_proj"), progress=False)
    assert [report.starts_at_the_largest(m) for _, m in pissa.layers(net)] == [largest] * 2


def test_starts_at_the_largest_of_a_method_of_ones_own():
    """MiLoRA's: the smallest singular values are trained."""
    def smallest(weight, options):
        U, S, Vh = torch.linalg.svd(weight.T, full_matrices=False)
        U, S, Vh = U[:, -options.rank:], S[-options.rank:].sqrt(), Vh[-options.rank:]
        A, B = U * S, S[:, None] * Vh
        return pissa.residual(weight, A, B), A, B, (A, B)

    net = injected(smallest)
    assert not any(report.starts_at_the_largest(m) for _, m in pissa.layers(net))


@pytest.mark.parametrize("method, chat, words", [
    ("pissa", True, ["--ckpt", "my models/x", "--adapter", "runs of $HOME/adapter"]),
    ("full", False, ["--ckpt", "runs of $HOME/adapter"]),
    ("full", True, ["--ckpt", "runs of $HOME/adapter", "--chat"])])
def test_printed_commands_can_be_pasted(capsys, method, chat, words):
    args = Namespace(method=method, ckpt="my models/x", out=Path("nowhere"))
    report.weights_written("runs of $HOME/adapter", args, ["", "What's 1 + 1?"], chat, {})
    line = capsys.readouterr().out.partition("use them:\n")[2].replace("\\\n", "")
    assert shlex.split(line) == ["python", "eval.py", *words, "--prompt", "What's 1 + 1?"]


class FewNames:
    """A tokenizer of words, in which one is a control token."""
    start, control, in_chat = 1, re.compile("</s>"), False

    def encode(self, text, bos=False, eos=False):
        return list(range(2, 2 + len(text.split()))) + [1] * eos


def test_counts_of_a_set_of_data(capsys):
    examples = [("", "a b c"), ("", "a </s>"), ("q " * 50, "a")]
    kept = report.encoded("validation", "v.jsonl", examples, FewNames(), 4)
    assert kept == [([1, 2, 3, 4], 1), ([1, 1], 1), ([1, 2, 3, 1], 1)]
    text = capsys.readouterr().out
    assert all(len(line) < 80 for line in text.splitlines())
    assert text.replace("\n  ", " ") == (
        "validation: v.jsonl, 3 examples 0 truncated to 4 tokens, 1 dropped (prompts that leave "
        "nothing to learn)\nnote: a loss on so few examples says little: --val-fraction or "
        "--val-data give more. They are not trained on, and the questions before and after "
        "training are theirs\nnote: validation: v.jsonl: texts that spell control tokens, such "
        "as '</s>': 1; they are plain characters here, never the tokens\n")
    report.encoded("validation", "v.jsonl", examples, FewNames(), 4, seen=True)
    assert "give\n  more\nnote" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^v.jsonl: validation: no example left; raise --max"):
        report.encoded("validation", "v.jsonl", examples[2:], FewNames(), 4)
    capsys.readouterr()
    report.problems("t.jsonl", examples, FewNames())
    report.problems("t.jsonl", examples[:1], FewNames())
    assert capsys.readouterr().out == "test: t.jsonl, 3 problems\ntest: t.jsonl, 1 problem\n"


def test_summary_of_what_others_wrote(capsys, tmp_path):
    """A terminal obeys no question and no answer. In no time there is no speed."""
    (tmp_path / "val.jsonl").write_text('{"step": 0}\n')
    args = argparse.Namespace(out=tmp_path, epochs=1, steps=1, test_data=None)
    before, after = ({"loss": 1.0, "accuracy": None, "answers": {"\x1b[2Jq": a}} for a in "a\x9b")
    report.summarise([{"step": 1, "loss": 1.0, "tokens": 5, "seconds": 0.0}], before, after, args,
                     {"all": 0.0}, torch.device("cpu"), "by hand")
    text = capsys.readouterr().out
    assert "--- \\x1b[2Jq\nbefore: a\nafter:  \\x9b\n" in text
    assert "\n1 step in 0 s, 0 s in all\n" in text
    report.weights_written("d", argparse.Namespace(method="full", out=tmp_path),
                           before["answers"], False, {})
    assert "\x1b" not in capsys.readouterr().out


def test_a_warning_of_ours_is_a_plain_line():
    ours, other = (report.plain_warning("a b " * 30, UserWarning, file, 7, None) for file in (
        report.__file__, "/lib/torch/x.py"))
    assert ours.startswith("warning: a b ") and max(map(len, ours.splitlines())) < 80
    assert other.startswith("/lib/torch/x.py:7: UserWarning: a b ")


def test_questions_are_broken_at_spaces(tmp_path):
    """In lines that fit 80 columns; a word that does not, such as a path, stays whole."""
    args = Namespace(out=tmp_path, epochs=1, steps=1, test_data="t" * 90)
    question = "How many " + "gloves " * 20 + "p" * 90 + " are left?"
    before, after = ({"loss": 1.0, "accuracy": 0.5, "problems": 4, "answers": {question: text}}
                     for text in ("so " * 200, "x\n#### 1"))
    text = report.summary_text({"seconds": {"train": 1.0, "all": 2.0}, "before": before,
                                "after": after, "tokens_per_second": 1.0, "steps": 1,
                                "peak_gpu_bytes": 0, "accuracy_by": "by hand " * 20}, args)
    long = [line.strip() for line in text.splitlines() if len(line) > 79]
    assert long == ["p" * 90, f"({'t' * 90})"]
    assert " ".join(text.split()).startswith(f"--- {question} before: so ")
    assert text.count("so ") < 70 and "so ...\nafter:  x\n#### 1\n" in text


def test_stdout_and_stderr_in_one_file_keep_their_order(tmp_path):
    program = ("import sys; from support import report\n"
               "def main():\n    for i in range(3): print(i); print(i, file=sys.stderr)\n"
               "report.run(main, 'eval.py')")
    with open(tmp_path / "log", "w") as file:
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=file, stderr=file)
    assert (tmp_path / "log").read_text().split() == list("001122")


def test_a_stream_of_few_characters(monkeypatch):
    """What it lacks is spelled out, and what follows is not lost."""
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    report.run(lambda: print("caf\u00e9\nit is"), "eval.py")
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\xe9\nit is\n"


# --- support/options.py

def for_train(*argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        return options.for_train("")


@pytest.mark.parametrize("given, meant", [
    ("--learning-rate", "--lr"), ("--lora-rank", "--rank"), ("--batch-size", "--batch"),
    ("--max_length=7", "--max-length"), ("--warmpu", "--warmup"), ("-r", "--rank"),
    ("--eval-steps", "--val-every"), ("--nothing-like-it", None)])
def test_did_you_mean(capsys, given, meant):
    with pytest.raises(SystemExit) as e:
        for_train(given, "3")
    line = capsys.readouterr().err.splitlines()[-1]
    assert e.value.code == 2 and line.endswith(
        f"there is no option {given.partition('=')[0]}: did you mean {meant}?" if meant else
        f"unrecognized arguments: {given} 3")


def test_synonyms_are_of_options():
    known = options.option_strings(options.train_parser(""))
    assert {f"--{name}" for name in options.ALSO_CALLED} <= known
    theirs = [name for names in options.ALSO_CALLED.values() for name in names.split()]
    assert len(theirs) == len(set(theirs)) and not known & {f"--{name}" for name in theirs}


def test_config(tmp_path, capsys):
    """The same arguments again, those that are given here winning; --out is one of its own."""
    first = for_train("--ckpt", "tiny", "--lr", 3e-3, "--niter", "exact", "--targets", "q_proj",
                      "--no-packing", "--out", tmp_path / "a", "--val-every", 7)
    path = tmp_path / "args.json"
    report.write_json(path, vars(first))
    again = vars(for_train("--config", path, "--rank", 5, "--out", tmp_path / "b"))
    assert again == {**vars(first), "rank": 5, "out": tmp_path / "b", "config": str(path)}
    assert str(for_train("--config", path).out).startswith("runs/tiny-pissa")
    for content, message in (
            ("[1]", "is no JSON object"), ("{", "is no JSON object"), (None, "no such file"),
            ('{"lr": "x"}', "invalid float value: 'x'"),
            ('{"learning_rate": 1}', "did you mean --lr?")):
        path.write_text(content) if content else path.unlink()
        with pytest.raises(SystemExit):
            for_train("--config", path)
        line = capsys.readouterr().err.splitlines()[-1]
        assert message in line and str(path) in line


def test_options_that_an_adapter_brings(capsys, tmp_path):
    for_train("--ckpt", "tiny", "--adapter", "a", "--rank", 32, "--lr", 1, "--out", tmp_path)
    assert capsys.readouterr().out == "note: --rank: not used, since a brings its own\n"
    for_train("--ckpt", "tiny", "--adapter", "a", "--out", tmp_path)
    for_train("--ckpt", "tiny", "--rank", 32, "--out", tmp_path)
    assert capsys.readouterr().out == ""


# --- before, during and after the steps

def advice(capsys, *argv, examples=200, net=None):
    args = for_train("--ckpt", "tiny", *argv)
    net = net or small_net(max_seq_len=64)
    if args.method != "full":
        pissa.inject(net, args.rank, args.method, niter=1, progress=False)
    report.advise(net, [([1, 2, 3], 1)] * examples, args)
    text = capsys.readouterr().out
    assert all(len(line) < 80 for line in text.splitlines())
    return text.replace("\n  ", " ").splitlines()


def test_what_to_try_is_a_command(capsys, monkeypatch):
    """The one that was given, with other settings and no --out, to copy; its own ones win."""
    given = ["--ckpt", "tiny", "--rank", "2", "--lr", "2e-5", "--method", "lora"]
    for out in ["--out", "runs/a"], ["--out=runs/a"], []:
        monkeypatch.setattr(sys, "argv", ["train.py", *out, *given])
        text = advice(capsys, *given)[1]
        assert "To try, 130 steps:" in text
        command = shlex.split(text.partition("steps: ")[2].replace("\\", ""))
        assert command == ["python", "train.py", *given, "--batch", "16", "--epochs", "10", "--lr",
                           "1e-2"]
    assert len(advice(capsys, *given, "--epochs", 10, "--batch", 16, "--lr", 1e-2)) == 1


@pytest.mark.parametrize("argv, noted", [
    ([], "2 steps will hardly teach anything; the paper has 781. Measured on 200"),
    (["--steps", 2, "--lr", 2e-5],
     "--lr 2e-05 is far from what suits a model of this size: measured on SmolLM2-135M, the best "
     "rate of --method lora is about 1e-2 at rank 2"),
    (["--steps", 2, "--method", "full", "--lr", 2e-5],
     "--lr 2e-05 is far from what suits a model of this size: measured on SmolLM2-135M, the best "
     "rate of --method full is about 4e-4"),
    (["--steps", 2], None), (["--batch", 8], None), (["--batch", 16, "--epochs", 10], None),
    (["--steps", 2, "--lr", 1], "--lr 1 is far above what suits --method lora"),
    (["--steps", 2, "--lr", 1e-2], None),
    (["--steps", 2, "--method", "full", "--lr", 2e-3], "--lr 0.002 is far above"),
    (["--steps", 2, "--method", "full", "--lr", 1e-3], None),
    (["--steps", 2, "--max-length", 4096], "--max-length 4096 is more than the 64 positions"),
    (["--steps", 2, "--rank", 16], "rank 16 trains ")])
def test_notes_before_the_first_step(capsys, argv, noted):
    """A line that says what is to come, and at most one note."""
    first, *notes = advice(capsys, "--method", "lora", "--rank", 2, "--lr", 5e-3, *argv)
    assert re.match(r"\d+ steps of \d+ examples, learning rate \S+, \S+ times? through", first)
    assert len(notes) == bool(noted) and (not noted or f"note: {noted}" in notes[0])


@pytest.mark.parametrize("n, argv, said", [
    (9, ["--batch", 128, "--epochs", 1], "1 step of 9 examples (all there are; --batch 128), "
     "learning rate 0.005, 1 time through the data"),
    (9, ["--batch", 4, "--steps", 4], "4 steps of 4 examples, learning rate 0.005, 1.44 times"),
    (9, ["--batch", 4, "--steps", 2], "2 steps of 4 examples, learning rate 0.005, 0.889 times"),
    (200, ["--batch", 128, "--epochs", 3],
     "6 steps of 128 examples, learning rate 0.005, 3 time")])
def test_how_often_the_data_is_seen(capsys, n, argv, said):
    """Counted from the batches, whose last of an epoch may be short."""
    flags = "--method", "lora", "--rank", 2, "--lr", 5e-3, *argv
    assert advice(capsys, *flags, examples=n)[0].startswith(said)
    args = for_train("--ckpt", "tiny", *map(str, flags))
    examples = [([1, 2, 3], 1)] * n
    seen = sum(len(batch) for batch, *_ in train.all_batches(
        examples, args, range(data.count_steps(examples, args))))
    assert f"{seen / n:.3g} time" in said


def test_note_on_eight_bits(capsys):
    """On a GPU, where they are for speed; its figures are those of the result file."""
    flags = "--method", "qlora", "--bits", 8, "--rank", 2, "--steps", 2, "--lr", 5e-3
    note = advice(capsys, *flags, "--device", "cuda")[1]
    result = json.loads((ROOT / "bench/results/step_eight_h100.json").read_text())
    for how in "", ", compiled":
        for bits in "8 bits", "16 bits":
            assert f"{1e3 * result[bits]['8 x 512' + how]['step_seconds']:.0f}" in note
    assert len(advice(capsys, *flags, "--device", "cuda", "--compile")) == 1
    assert len(advice(capsys, *flags, "--device", "cpu")) == 1


def test_note_on_the_rank(capsys):
    """Both shares are those of networks with these ranks."""
    note = advice(capsys, "--method", "lora", "--rank", 16, "--steps", 2, "--lr", 5e-3)[1]
    rank, share, less, smaller = re.fullmatch(
        r"note: rank (\d+) trains (\d+%) of this model's parameters; --rank (\d+) would train "
        r"about (\d+%)", note).groups()
    for r, expected in (rank, share), (less, smaller):
        net = pissa.inject(small_net(), int(r), "lora", progress=False)
        trained, total = report.count(net)
        assert f"{trained / total:.0%}" == expected


@pytest.mark.parametrize("n, batch, problems", [(200, 16, 200), (90, 8, 80), (20, 4, 20)])
def test_what_the_note_says_was_measured(monkeypatch, n, batch, problems):
    """The figures for few examples are those of the result files, and the best of those tried."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    means = [m for name in ("small_cpu", "small_few_cpu") for m in json.loads(
        (ROOT / f"bench/results/{name}.json").read_text())["means"]]
    means = {(m["batch"], m["lr"], m["epochs"]): m for m in means
             if m.get("examples", 200) == problems}
    share = means[batch, 1e-3, 10]["accuracy"]
    assert means[128, 2e-5, 1]["accuracy"] == 0 and share > 0.9 * max(
        m["accuracy"] for m in means.values() if m["epochs"] <= 10)
    args = Namespace(batch=128, epochs=1, steps=None, lr=2e-5, rank=16, method="pissa")
    text, = report.small_data(small_net(), [0] * n, args, 2)
    assert f"--batch {batch} --epochs 10 --lr 1e-3" in text and f"on {problems} of the" in text
    assert f"10 epochs of batches of {batch} solve" in text
    assert abs(float(re.search(r"(\d+) % of new", text)[1]) - 100 * share) <= 0.5


@pytest.mark.parametrize("rows, use", [
    ([(0, 3.0, False), (20, 1.0, True), (40, 2.0, False)], "best"),
    ([(0, 3.0, False), (20, 2.0, True), (40, 1.0, True)], "adapter"),
    ([(0, 3.0, False)], "adapter")])
def test_the_better_adapter_is_to_be_used(capsys, tmp_path, rows, use):
    """The last one, or with --val-every the one of the lowest validation loss."""
    (tmp_path / "best").mkdir()
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(
        {"step": step, "loss": loss, "best": is_best}) + "\n" for step, loss, is_best in rows))
    args = Namespace(method="pissa", ckpt="tiny", out=tmp_path, epochs=1, steps=40, test_data=None)
    log = [{"step": i + 1, "loss": 1.0, "tokens": 5, "seconds": 1.0} for i in range(40)]
    point = {"loss": 1.0, "accuracy": None, "answers": {}}
    summary = report.summarise(log, point, point, args, {"all": 0.0}, torch.device("cpu"), "")
    capsys.readouterr()
    report.weights_written(tmp_path / "adapter", args, [], False, summary)
    text = capsys.readouterr().out
    command = shlex.split(text.partition("use them:\n")[2].replace("\\\n", ""))
    assert command[command.index("--adapter") + 1] == str(tmp_path / use)


def test_rates_are_those_of_the_study():
    """c / sqrt(rank) is within a factor of two of the best rate at every rank that was tried."""
    rows = [r for name in ("rates", "seeds") for r in studies.rows_of(name)]
    for method in "pissa", "lora":
        for rank in {r["rank"] for r in rows}:
            best = studies.best_rate(rows, method=method, rank=rank)
            assert 0.5 <= report.RATES[method] / rank ** 0.5 / best <= 2, (method, rank)


@pytest.mark.parametrize("right, n, low, high", [
    (0, 64, 0.0, 5.7), (64, 64, 94.3, 100.0), (17, 20, 64.0, 94.8), (1, 2, 9.5, 90.5)])
def test_wilson(right, n, low, high):
    """As R's prop.test(correct=FALSE) gives it."""
    assert [round(100 * x, 1) for x in report.wilson(right / n, n)] == [low, high]


BAR = """
import sys, time
from support import options, report
from tqdm import tqdm
def main():
    with tqdm(desc="train", total=9) as bar:
        for i in range(9):
            bar.update()
            bar.refresh() if i == 2 else None
            inner = list(tqdm(range(3), "inner", leave=False, mininterval=0))
    print("the end", file=sys.stderr)
report.run(main, "x.py")
"""


@pytest.mark.parametrize("env", [{}, {"PYTHONIOENCODING": "ascii"}, {"TQDM_DISABLE": "1"}])
def test_bars_without_a_terminal(env):
    """Lines, in ASCII, no carriage return; and few of them."""
    done = subprocess.run([sys.executable, "-c", BAR], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **env})
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and not re.search("\r|\x1b|\n\n", done.stderr), done.stderr
    assert done.stderr.isascii() and lines[-1] == "the end"
    bars = [line for line in lines if line.startswith("train")]
    assert [re.search(r"\d/9", line)[0] for line in bars] == (
        [] if "TQDM_DISABLE" in env else ["0/9", "3/9", "9/9"])


def test_no_reader_is_there_at_the_start(monkeypatch):
    """The first line, before torch is loaded, goes nowhere, and the program goes on."""
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    for name in "stdout", "stderr":
        monkeypatch.setattr(sys, name, Closed())
    monkeypatch.setattr(options.signal, "signal", lambda *args: None)
    options.begin(lambda doc: print("the demo") or doc, args := Namespace())
    assert options.begun(None, "") is args


@pytest.mark.parametrize("argv, told", [
    (["eval.py", "--prompt", "Hi"], ""),
    (["train.py", "--ckpt", "tiny"], "; nothing was learnt yet, nothing is saved")])
def test_ctrl_c_while_torch_is_loaded(argv, told):
    """One line and exit code 130. A module that never comes stands for torch."""
    program = (f"import runpy, signal, sys, time; sys.argv = {argv}\n"
               "class Slow:\n    def find_spec(self, name, *rest):\n"
               "        if name == 'torch':\n            signal.raise_signal(signal.SIGINT)\n"
               "sys.meta_path.insert(0, Slow())\nrunpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == f"{argv[0]}: loading torch ...\n{argv[0]}: interrupted{told}\n"


def test_damaged_summary_is_named(tmp_path, capsys):
    """Before anything of it is printed."""
    args = Namespace(out=tmp_path, epochs=1, steps=2, test_data=None)
    (tmp_path / "summary.json").write_text('{"asked": [1, 2], "before": {"answers": {"q": 1}}}')
    with pytest.raises(ValueError, match=f"^{tmp_path}/summary.json is damaged .*: remove it$"):
        report.finished(args)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [
    NotImplementedError("The operator 'aten::x' is not implemented for the MPS device"),
    TypeError("Cannot convert a MPS Tensor to float64 dtype as MPS\ndoesn't support")])
def test_what_mps_lacks(error):
    line = report.one_line(error)
    assert line.startswith("mps lacks what this needs (") and "\n" not in line
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in line and "--device cpu" in line
    assert report.one_line(TypeError("a bug of ours")) is None


@pytest.mark.parametrize("method", ["pissa", "lora", "qpissa", "loftq"])
def test_mps_decomposes_on_the_cpu(method, capsys):
    """The same A, B and frozen weights as by name; nothing is changed on other devices."""
    by_name, by_function = (pissa.inject(small_net(), 4, m, progress=False, quant_iters=2)
                            for m in (method, mps.method(method, "mps:0")))
    assert "not tested by us" in capsys.readouterr().out
    assert by_function.pissa == by_name.pissa
    for (_, a), (_, b) in zip(pissa.layers(by_name), pissa.layers(by_function)):
        frozen = tuple(pissa.as_tensor(m.frozen) for m in (a, b))
        for x, y in (a.A, b.A), (a.B, b.B), frozen:
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
        assert (a.A0 is None) == (b.A0 is None) and (a.A0 is None or torch.equal(a.A0, b.A0))
    for device in None, "cpu", "cuda":
        assert mps.method(method, device) == method


def test_mps_is_refused_in_plain_words(monkeypatch):
    """Where it is not built in, and never by default."""
    def zeros(*args, device):
        raise NotImplementedError("Could not run 'aten::empty.memory_format' with arguments from")
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match="^mps is not available here: torch lacks it$"):
        model.default_device("mps")
