"""train.py: the loss by its definition, what is trained, what a run leaves, users' mistakes."""
import copy
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import nullcontext, redirect_stdout
from functools import cache

import pytest
import torch
import torch.nn.functional as F

import adapter
import data
import eval as evaluation
import fast
import model
import pissa
import train
from conftest import ROOT, TINY, command, failure, first_lines, joined
from formats import hf, meta_write
from support import options

LEARNING_RATE = {"pissa": 2e-3, "lora": 1e-2, "full": 5e-4}      # each method at a good one


def parse(*argv):
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        return options.for_train(train.__doc__)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_state(a, b):
    assert a.keys() == b.keys()
    return {n for n in a if torch.equal(a[n], b[n])}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files of training examples and of problems."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train.jsonl", 32), ("test.jsonl", 6)):
        first_lines(folder, count, name)
    return folder


@pytest.fixture(scope="module")
def flags(files):
    """The start of a command line that takes a second."""
    return ["--ckpt", "tiny", "--data", files / "train.jsonl", "--val-fraction", 0.25, "--rank", 8,
            "--lr", 2e-3, "--batch", 8, "--micro-batch", 4, "--max-new-tokens", 8]


@pytest.fixture(scope="module")
def examples(tok, files):
    return data.encode(data.read(files / "train.jsonl"), tok, 512)[0]


@cache
def prepared_once(method, seed):
    net = model.load("tiny", "cpu")
    if method == "full":
        return net.requires_grad_(True)
    return pissa.inject(net, 8, method, seed=seed, progress=False)


def prepared(method, seed=0):
    """The tiny model, ready for training as main() makes it."""
    return copy.deepcopy(prepared_once(method, seed))


def fit(examples, out, method="pissa", steps=8, seed=0, net=None, **changes):
    """Train in `out`; the network, the rows of the log."""
    out.mkdir(exist_ok=True)
    more = [x for k, v in changes.items() for x in ("--" + k.replace("_", "-"), v)]
    args = parse("--ckpt", "tiny", "--out", out, "--method", method, "--rank", 8, "--lr",
                 LEARNING_RATE[method], "--batch", 8, "--steps", steps, "--seed", seed, *more)
    net = net or prepared(method, seed)
    rows, interrupted = train.train(net, examples, args, nullcontext())
    assert not interrupted and read_lines(out / "log.jsonl") == rows
    return net, rows


def full_logits_loss(net, batch):
    """Mean cross-entropy per learnt token, from all the logits, every example by itself."""
    total = count = 0
    for ids, n_prompt in batch:
        log_p = torch.log_softmax(net(torch.tensor([ids[:-1]]))[0].double(), -1)       # (T, V)
        learnt = torch.arange(n_prompt - 1, len(ids) - 1)
        total = total - log_p[learnt, torch.tensor(ids)[learnt + 1]].sum()
        count += len(learnt)
    return total / count


# --- the loss

@pytest.fixture(scope="module")
def by_definition(examples):
    """{method: (mean loss per learnt token of the first 4 examples, its gradients)}."""
    found = {}
    for method in ("pissa", "full"):
        net = prepared(method)
        loss = full_logits_loss(net, examples[:4])
        params = [p for p in net.parameters() if p.requires_grad]
        found[method] = loss.item(), torch.autograd.grad(loss, params)
    return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", ["pissa", "full"])
@pytest.mark.parametrize("cells", [1, 250, 10_000])
def test_loss_and_gradient_are_those_of_the_whole_batch(examples, by_definition, cells, method,
                                                        packed):
    """The mean over the tokens of a batch, however it is cut; every example by itself agrees."""
    net, batch, (expected, gradients) = prepared(method), examples[:4], by_definition[method]
    params = [p for p in net.parameters() if p.requires_grad]
    learnt = sum(len(ids) - n for ids, n in batch)
    total = 0.0
    for tokens, labels, where_text in data.micro_batches(batch, cells):
        loss = train.loss_sum(net, tokens, labels, where_text if packed else None) / learnt
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected, rel=1e-6)
    for p, e in zip(params, gradients, strict=True):
        assert (p.grad - e).norm() <= 1e-5 * e.norm()


def test_loss_sum_by_hand(tok):
    """Against cross_entropy over the logits of all positions, padding and prompt included."""
    net = model.load("tiny", "cpu")
    tokens = torch.randint(3, 2000, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, 2000, (3, 11), generator=torch.Generator().manual_seed(2))
    labels[0, :7], labels[1, 4:], labels[2] = -100, -100, -100
    expected = F.cross_entropy(net(tokens).flatten(0, 1), labels.flatten(), reduction="sum",
                               ignore_index=-100)
    torch.testing.assert_close(train.loss_sum(net, tokens, labels), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("trained", ["A and B", "the head's A and B", "everything"])
def test_loss_in_chunks(monkeypatch, trained):
    """Few logits at a time, and the gradient along with them, give what all at once give."""
    net = model.load("tiny", "cpu")
    if trained != "everything":
        pissa.inject(net, 8, targets=("lm_head",) if "head" in trained else pissa.TARGETS)
    params = [p for p in net.parameters() if p.requires_grad]
    tokens, labels = torch.randint(3, 2000, (2, 3, 11), generator=torch.Generator().manual_seed(1))
    labels[0, :7], sizes = -100, []
    expected = F.cross_entropy(net(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    monkeypatch.setattr(fast, "CHUNK", 4 * net.config.vocab_size + 1)
    hook = net.lm_head.register_forward_hook(lambda _, x, y: sizes.append(len(y)))
    got = train.loss_sum(net, tokens, labels)
    assert sizes == [4] * 6 + [2]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for g, e in zip(*(torch.autograd.grad(loss / 7, params) for loss in (got, expected))):
        assert (g - e).norm() <= 1e-5 * e.norm()
    with torch.no_grad():
        torch.testing.assert_close(train.loss_sum(net, tokens, labels), expected)
    hook.remove()


@pytest.mark.long
def test_padding_is_not_computed(examples, tmp_path):
    """Every linear layer sees as many tokens as there are; with --no-packing, more."""
    def computed(*flags):
        net, rows = prepared("pissa"), []
        net.model.layers[0].mlp.up_proj.register_forward_hook(
            lambda _, x, y: rows.append(y.shape[:2].numel()))
        args = parse("--ckpt", "tiny", "--out", tmp_path / str(len(flags)), "--steps", 1, *flags)
        args.out.mkdir()
        train.train(net, batch, args, nullcontext())
        return sum(rows)

    batch = examples[:8]
    assert computed() == sum(len(ids) - 1 for ids, _ in batch) < computed("--no-packing")


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_the_loop_averages_over_tokens(examples, by_definition, tmp_path, micro):
    """The loss and the gradient norm of the log do not depend on --micro-batch, and are those of
    the mean over tokens: not of a mean of means, which gives short answers more weight."""
    _, (row,) = fit(examples[:4], tmp_path, steps=1, micro_batch=micro, clip=1e9)
    loss, gradients = by_definition["pissa"]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert row["loss"] == pytest.approx(loss, rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_these_examples_can_tell_the_two_means_apart(examples, by_definition):
    net = model.load("tiny", "cpu").requires_grad_(False)
    of_means = sum(full_logits_loss(net, [e]).item() for e in examples[:4]) / 4
    assert abs(of_means - by_definition["pissa"][0]) > 1e-3


def test_validation_loss(examples, flags):
    net = model.load("tiny", "cpu").requires_grad_(False)
    args = parse(*flags)
    got = train.validation_loss(net, examples[:7], args, nullcontext())
    assert got == pytest.approx(full_logits_loss(net, examples[:7]).item(), rel=1e-6)


# --- the schedule

def test_learning_rate():
    args = parse("--ckpt", "tiny", "--lr", 0.5, "--warmup", 0.1)
    lr = [train.learning_rate(s, 100, args) for s in range(100)]
    assert lr[:10] == pytest.approx([0.05 * s for s in range(1, 11)])    # linear, never 0
    assert lr[9] == lr[10] == max(lr) == 0.5
    assert all(a > b for a, b in zip(lr[10:], lr[11:]))
    assert lr[55] == pytest.approx(0.25)                                 # half-way down
    assert 0 < lr[99] < 1e-3 * 0.5


@pytest.mark.parametrize("steps, warmup, expected", [
    (1, 0.03, [1.0]), (1, 0.0, [1.0]), (2, 0.03, [1.0, 1.0]), (2, 1.0, [0.5, 1.0])])
def test_learning_rate_of_short_runs(steps, warmup, expected):
    args = parse("--ckpt", "tiny", "--lr", 1, "--warmup", warmup)
    assert [train.learning_rate(s, steps, args) for s in range(steps)] == expected


# --- the loop

@pytest.mark.long
@pytest.mark.parametrize("method", ["pissa", "lora", "full"])
def test_learns_and_changes_only_what_it_should(examples, tmp_path, method):
    net = prepared(method)
    before = copy.deepcopy(net.state_dict())
    trained = {n for n, p in net.named_parameters(remove_duplicate=False) if p.requires_grad}
    net, rows = fit(examples[:24], tmp_path, method, net=net)
    losses = [r["loss"] for r in rows]
    assert max(losses[-2:]) < 0.75 * losses[0], losses
    assert same_state(before, net.state_dict()) == set(before) - trained
    with torch.no_grad():
        assert full_logits_loss(net, examples) < 0.75 * losses[0]


@pytest.mark.long
def test_the_seed_decides(examples, tmp_path):
    """Bit for bit. With --method full it draws only the order of the examples."""
    a, b, c = ([r["loss"] for r in fit(examples, tmp_path / str(i), "full", 2, seed)[1]]
               for i, seed in enumerate((0, 0, 1)))
    assert a == b and a != c


@pytest.mark.long
def test_steps_are_those_of_a_plain_loop(examples, tmp_path):
    """Three steps as a textbook writes them: all logits, one pass a batch, AdamW, clipping."""
    _, rows = fit(examples[:24], tmp_path, steps=3, micro_batch=3, warmup=0.5)
    net = prepared("pissa")
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(params, weight_decay=0.0), []
    for batch, share in zip(data.batches(examples[:24], 8, 0, 0), (0.5, 1.0, 1.0)):
        loss = full_logits_loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.param_groups[0]["lr"] = share * LEARNING_RATE["pissa"]
        optimizer.step()
        losses.append(loss.item())
    assert [r["loss"] for r in rows] == pytest.approx(losses, rel=1e-4)


@pytest.mark.long
def test_epochs(examples, tmp_path, monkeypatch):
    """Without --steps every example is seen once an epoch, in another order each time."""
    seen, real = [], data.micro_batches
    monkeypatch.setattr(data, "micro_batches", lambda b, *n: seen.append(b) or real(b, *n))
    args = parse("--ckpt", "tiny", "--out", tmp_path, "--batch", 4, "--epochs", 2)
    rows, _ = train.train(prepared("pissa"), examples[:10], args, nullcontext())
    assert [len(b) for b in seen] == [4, 4, 2, 4, 4, 2] and len(rows) == 6
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert first != second and sorted(first) == sorted(second) == sorted(examples[:10])


def test_clipping_and_weight_decay_reach_the_optimiser(examples, tmp_path, monkeypatch):
    clips, real = [], torch.nn.utils.clip_grad_norm_

    def spy(params, largest):
        norm = real(params, largest)
        clips.append(torch.stack([p.grad.norm() for p in params]).norm().item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    _, rows = fit(examples[:2], tmp_path / "a", steps=1, clip=0.5)
    assert clips == [pytest.approx(0.5, rel=1e-3)] and rows[0]["grad_norm"] > 1
    a, b = (fit(examples[:2], tmp_path / str(d), steps=1, weight_decay=d)[0] for d in (0, 100))
    layer = "model.layers.0.mlp.up_proj.A"
    lr = LEARNING_RATE["pissa"]
    decayed = prepared("pissa").get_parameter(layer) * lr * 100
    torch.testing.assert_close(a.get_parameter(layer) - b.get_parameter(layer), decayed,
                               rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_checkpointing_changes_nothing(tmp_path, flags, monkeypatch):
    """Recomputed activations are the same activations: bit for bit, in a whole run."""
    logs, recomputed, real = [], [], fast.Recompute.backward
    monkeypatch.setattr(fast.Recompute, "backward", lambda *a: recomputed.append(1) or real(*a))
    for extra in ([], ["--checkpointing"]):
        out = tmp_path / str(len(logs))
        recomputed.clear()
        command(train.main, *flags, "--steps", 2, "--out", out, *extra)
        assert bool(recomputed) == bool(extra)
        logs.append([(r["loss"], r["grad_norm"]) for r in read_lines(out / "log.jsonl")])
    assert logs[0] == logs[1]


@pytest.mark.long
@pytest.mark.parametrize("method", ["pissa", "lora", "full"])
@pytest.mark.parametrize("extra", [[], ["--no-packing"], ["--checkpointing"]], ids=str)
def test_plain_changes_nothing(flags, tmp_path, monkeypatch, method, extra):
    """Without fast.py's forms, which are not called once: the same losses to rounding.

    The rate is at most 1e-3: AdamW's first step has the size of the rate, however small a gradient
    is, so that LoRA's 1e-2 turns rounding into 1e-5.
    """
    logs, calls = [], []
    for form in (fast.LowRank, fast.Rotate, fast.SwiGLU, fast.ChunkedLoss, fast.Recompute):
        monkeypatch.setattr(form, "forward", staticmethod(
            lambda *a, forward=form.forward: calls.append(1) or forward(*a)))
    for mode in ([], ["--plain"]):
        out = tmp_path / str(len(logs))
        calls.clear()
        command(train.main, *flags, "--method", method, "--lr",
                min(1e-3, LEARNING_RATE[method]), "--steps", 3, "--niter", "exact", "--out", out,
                "--batch", 4, "--max-new-tokens", 1, *extra, *mode)
        assert bool(calls) != bool(mode)
        logs.append([r["loss"] for r in read_lines(out / "log.jsonl")])
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)
    assert not fast.PLAIN


@pytest.mark.long
def test_compile_changes_nothing(flags, tmp_path, monkeypatch):
    """torch.compile up to the generation of code, which takes minutes on a CPU: the layers are
    traced, whole, and give the same losses."""
    compiled, real = [], torch.compile

    def without_code(function, **kwargs):
        compiled.append(function)
        return real(function, **{**kwargs, "backend": "aot_eager", "fullgraph": True})

    monkeypatch.setattr(torch, "compile", without_code)
    logs = []
    for extra in ([], ["--compile"]):
        out = tmp_path / str(len(logs))
        with torch._functorch.config.patch(activation_memory_budget=1.0):  # it is lowered, and back
            command(train.main, *flags, "--steps", 2, "--out", out, *extra)
        assert len(compiled) == (6 if extra else 0)
        logs.append([r["loss"] for r in read_lines(out / "log.jsonl")])
        assert (out / "summary.json").is_file() and (out / "adapter").is_dir()
    torch._dynamo.reset()
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


# --- a run

@pytest.fixture(scope="module")
def run(flags, files, tmp_path_factory):
    """A run of 6 steps: its directory and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    text = command(train.main, *flags, "--test-data", files / "test.jsonl", "--steps", 6,
                   "--out", out)
    return out, text


def split_of_run(tok, files):
    """Training and validation examples of `run`, encoded."""
    sides = data.split(data.read(files / "train.jsonl"), 0.25, 0)
    return [data.encode(side, tok, 512)[0] for side in sides]


@pytest.mark.long
def test_run_leaves_its_files(run, flags, tok, files):
    out, _ = run
    assert {"adapter", "args.json", "log.jsonl", "summary.json"} <= set(os.listdir(out))
    assert not [f for f in out.rglob("*") if f.suffix == ".tmp"]
    args = json.loads((out / "args.json").read_text())
    assert (args["rank"], args["lr"], args["steps"], args["seed"]) == (8, 2e-3, 6, 0)
    assert args["out"] == str(out) and args["targets"] == list(pissa.TARGETS)
    rows = read_lines(out / "log.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert all(r.keys() >= {"step", "loss", "grad_norm", "lr", "tokens", "seconds"} for r in rows)
    expected = parse(*flags)
    assert [r["lr"] for r in rows] == [train.learning_rate(s, 6, expected) for s in range(6)]
    training, _ = split_of_run(tok, files)
    batches = data.batches(training, 8, 0, 0) + data.batches(training, 8, 0, 1)   # 24: 3 an epoch
    assert [r["tokens"] for r in rows] == [sum(len(ids) for ids, _ in b) for b in batches[:6]]
    assert all(r["seconds"] > 0 and r["grad_norm"] > 0 for r in rows)


@pytest.mark.long
def test_run_draws_the_loss(run):
    """The picture has the size that was asked for, and the blue line falls as the losses do."""
    image = pytest.importorskip("matplotlib.image").imread(run[0] / "loss.png")
    assert image.shape == (420, 720, 4)                                  # 6 x 3.5 inches, 120 dpi
    blue = torch.tensor(image[..., 2] - image[..., 0] > 0.3)             # matplotlib's first colour
    blue[:110, 480:] = False                                             # of the legend
    columns = blue.any(0).nonzero()[:, 0]
    assert 400 < columns[-1] - columns[0] < 720
    rows = torch.arange(420.0)[:, None]
    height = -((rows * blue).sum(0) / blue.sum(0))[columns]              # of the line, going up
    losses = torch.tensor([r["loss"] for r in read_lines(run[0] / "log.jsonl")]).log()
    at_steps = height[torch.linspace(2, len(height) - 3, len(losses)).long()]
    assert torch.corrcoef(torch.stack([at_steps, losses]))[0, 1] > 0.98


@pytest.mark.long
def test_run_starts_at_the_base_model(run, tok, files):
    """The line of step 0 says that nothing has changed yet, and so it is."""
    injected, base = re.search(r"step 0: .*?(\d+\.\d+).*?(\d+\.\d+)", run[1]).groups()
    net, (_, val) = model.load("tiny", "cpu").requires_grad_(False), split_of_run(tok, files)
    assert injected == base == f"{full_logits_loss(net, val).item():.4f}"


@pytest.mark.long
def test_run_summary_is_what_the_adapter_does(run, tok, files):
    """The adapter, on a fresh base, has the loss, the answers and the accuracy of summary.json."""
    out, text = run
    summary = json.loads((out / "summary.json").read_text())
    net, (_, val) = model.load("tiny", "cpu").requires_grad_(False), split_of_run(tok, files)
    problems = data.read(files / "test.jsonl")
    for when in ("before", "after"):
        claimed = summary[when]
        if when == "after":
            adapter.load(net, out / "adapter")
        with torch.no_grad():
            assert claimed["loss"] == pytest.approx(full_logits_loss(net, val).item(), rel=1e-5)
        questions = list(claimed["answers"])
        assert len(questions) == 2
        assert list(claimed["answers"].values()) == evaluation.complete(
            net, tok, questions, max_new_tokens=8)
        assert claimed["accuracy"] == evaluation.accuracy(net, tok, problems, max_new_tokens=8)[0]
        assert f"{claimed['loss']:.4f}" in text.partition("validation loss")[2]
        assert f"{claimed['accuracy']:.1%}" in text.partition("\naccuracy  ")[2]
        assert all(a in text for a in claimed["answers"].values())
    assert evaluation.describe("strict", 8) in re.sub(r"\s+", " ", text)
    assert max(map(len, text.partition("   before")[2].splitlines())) <= 80 + len(str(out))
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["steps"] == 6 and summary["tokens_per_second"] > 0


def eval_command(text):
    """The arguments of the eval.py command that a run prints last."""
    line = [line for line in text.replace("\\\n", "").splitlines() if "eval.py" in line][-1]
    argv = shlex.split(line)[2:]
    return [*argv[:-1], "--prompt", "Hi"] if argv[-1] == "--interactive" else argv


@pytest.mark.long
def test_run_says_how_to_use_it(run):
    out, text = run
    summary = json.loads((out / "summary.json").read_text())
    question = next(iter(summary["before"]["answers"]))
    asked = [*eval_command(text)[:-1], question]               # that one is long
    assert "\\\n      --interactive" in text or len(eval_command(text)[-1]) <= 62
    printed = command(evaluation.main, *asked, "--max-new-tokens", 8)
    base, _, adapted = printed.removeprefix("--- base\n").partition(
        f"\n--- with {out / 'adapter'}\n")
    assert base == summary["before"]["answers"][question]
    assert adapted.rstrip("\n") == summary["after"]["answers"][question]


@pytest.mark.long
def test_adapter_goes_on(run, flags, tok, files, tmp_path):
    """--adapter starts where the other run ended: the first loss is the saved adapter's."""
    first, _ = run
    second = tmp_path / "second"
    text = command(train.main, *flags, "--steps", 2, "--adapter", first / "adapter",
                   "--out", second)
    training, val = split_of_run(tok, files)
    net = adapter.load(model.load("tiny", "cpu"), first / "adapter").requires_grad_(False)
    rows = read_lines(second / "log.jsonl")
    start = full_logits_loss(net, data.batches(training, 8, 0, 0)[0]).item()
    assert rows[0]["loss"] == pytest.approx(start, rel=1e-5)
    assert rows[0]["loss"] < 0.8 * read_lines(first / "log.jsonl")[0]["loss"]
    # It is an adapter of the same base: its A_0 and B_0 are the first one's, its A and B moved on.
    again = adapter.load(model.load("tiny", "cpu"), second / "adapter")
    for (_, a), (_, b) in zip(pissa.layers(net), pissa.layers(again)):
        assert torch.equal(a.A0, b.A0) and torch.equal(a.B0, b.B0) and not torch.equal(a.A, b.A)
    after = json.loads((second / "summary.json").read_text())["after"]["loss"]
    with torch.no_grad():
        assert after == pytest.approx(full_logits_loss(again, val).item(), rel=1e-5)
    assert str(second / "adapter") in text


@pytest.mark.long
@pytest.mark.parametrize("adapter", ["rank of the file", "with --method full"])
@pytest.mark.long
def test_adapter_and_other_flags(run, flags, tmp_path, adapter):
    """args.json tells the adapter's own method and rank; --method full has no use for one."""
    if adapter == "with --method full":
        message = failure("train.py", *flags, "--method", "full", "--adapter", run[0] / "adapter",
                          "--steps", 1, "--out", tmp_path / "x")
        assert "--adapter" in message.splitlines()[-1]
        return
    flags = [*flags, "--rank", 3, "--method", "lora"]
    command(train.main, *flags, "--steps", 1, "--adapter", run[0] / "adapter", "--out", tmp_path)
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["rank"], args["method"]) == (8, "pissa")


def test_going_on_with_unequal_ranks(flags, tmp_path):
    """What PEFT's rank_pattern gives is trained, saved and read again."""
    tensors, q_proj = {}, "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    for i, r in enumerate((4, 8)):
        tensors |= {q_proj.format(i, "A"): torch.randn(r, 256) / 16,
                    q_proj.format(i, "B"): torch.zeros(256, r)}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "target_modules": "all-linear", "r": 4, "lora_alpha": 8,
        "rank_pattern": {"layers.1.self_attn.q_proj": 8}}))
    command(train.main, *flags, "--steps", 1, "--adapter", tmp_path, "--out", tmp_path / "out")
    found = adapter.read_adapter(tmp_path / "out" / "adapter").pairs
    assert [A.shape[1] for A, _ in found.values()] == [4, 8]
    assert all(B.abs().max() > 0 for _, B in found.values())


@pytest.mark.long
def test_force_base(flags, tmp_path):
    """An adapter of another base: refused, or used with a warning, by train.py and eval.py."""
    net = model.load("tiny", "cpu")
    for p in net.parameters():
        p.data *= 1.1
    adapter.save(pissa.inject(net, 2, "lora", "v_proj", progress=False), tmp_path / "a")
    asked = ["--ckpt", "tiny", "--adapter", tmp_path / "a", "--prompt", "x", "--max-new-tokens", 1]
    more = ["--steps", 1, "--adapter", tmp_path / "a", "--out", tmp_path / "out"]
    assert "another base model: " in failure("eval.py", *asked)
    assert "another base model: " in failure("train.py", *flags, *more)
    for main, argv in (evaluation.main, asked), (train.main, [*flags, *more]):
        with pytest.warns(UserWarning, match="another base model"):
            command(main, *argv, "--force-base")


@pytest.mark.long
def test_full_writes_a_checkpoint(flags, tok, files, tmp_path):
    """In Meta's layout, the tokenizer beside it: it loads like any other."""
    text = command(train.main, *flags, "--method", "full", "--lr", 5e-4, "--steps", 3,
                   "--out", tmp_path)
    there = tmp_path / "checkpoint"
    assert sorted(os.listdir(there)) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    assert not (tmp_path / "adapter").exists()
    assert data.Tokenizer(there).encode("a word") == tok.encode("a word")
    summary = json.loads((tmp_path / "summary.json").read_text())
    _, val = split_of_run(tok, files)
    net = model.load(there, "cpu").requires_grad_(False)
    loss = full_logits_loss(net, val).item()
    assert loss == pytest.approx(summary["after"]["loss"], rel=0.02)          # bfloat16 products
    assert loss < 0.9 * summary["before"]["loss"]
    assert eval_command(text)[:2] == ["--ckpt", str(there)]
    assert command(evaluation.main, *eval_command(text), "--max-new-tokens", 2).strip()


@pytest.mark.long
def test_full_writes_the_layout_that_it_read(flags, tok, tmp_path, monkeypatch):
    """From Hugging Face's layout: that layout, the rest of its config.json, and its files."""
    pytest.importorskip("safetensors")
    net, folder = model.load("tiny", "cpu"), tmp_path / "base"
    hf.save_folder(folder, hf.config_json(vars(net.config), my_note="kept"), net.named_parameters())
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    (folder / "generation_config.json").write_text("{}")
    flags = [*flags, "--ckpt", folder, "--method", "full", "--steps", 1, "--out", tmp_path / "run"]
    text = command(train.main, *flags)
    there = tmp_path / "run" / "checkpoint"
    assert {f.name for f in there.iterdir()} == {f.name for f in folder.iterdir()}
    config = json.loads((there / "config.json").read_text())
    assert config["my_note"] == "kept" and config["torch_dtype"] == "bfloat16"
    changed = model.load(there, "cpu").state_dict()
    assert same_state(changed, net.state_dict()) != set(changed)
    assert next(iter(model.open_checkpoint(there)[1].values()))().dtype == torch.bfloat16
    assert command(evaluation.main, *eval_command(text), "--max-new-tokens", 2).strip()
    monkeypatch.setattr(train, "evaluate", lambda *_: pytest.fail("it should be said before"))
    (folder / "model.safetensors").unlink()
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        command(train.main, *flags, "--overwrite")


@pytest.mark.long
def test_lora_is_a_plain_lora(flags, tmp_path):
    command(train.main, *flags, "--method", "lora", "--steps", 1, "--seed", 5, "--out", tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8
    facts = adapter.read_facts(tmp_path / "adapter")
    assert facts["method"] == "lora" and facts["seed"] == 5
    net = adapter.load(model.load("tiny", "cpu"), tmp_path / "adapter")
    assert all(m.A.shape[1] == 8 and m.A0 is None for _, m in pissa.layers(net))


@pytest.mark.long
def test_targets_and_val_data(flags, files, tmp_path):
    text = command(train.main, *flags, "--steps", 1, "--targets", "q_proj,v_proj", "--niter",
                   "exact", "--val-data", files / "test.jsonl", "--out", tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert adapter.read_facts(tmp_path / "adapter")["niter"] is None
    assert "train.jsonl, 32 examples\n" in text and "12 matrices at rank 8" in text
    assert re.search(r"\nvalidation: \S+test.jsonl, 6 examples\n", text)


@pytest.mark.long
def test_without_validation_examples(flags, tmp_path):
    """A loss of 0.0000 would be a lie, and step 0 go unchecked."""
    text = command(train.main, *flags, "--val-fraction", 0, "--steps", 1, "--out", tmp_path)
    injected, base = re.search(r"step 0: .*?(\d+\.\d+).*?(\d+\.\d+)", text).groups()
    assert injected == base and float(base) > 1


def test_a_model_that_is_not_the_base_is_refused(flags, tmp_path, monkeypatch):
    """A residual that was not installed, the classic mistake: W_res = W, A B on top of it."""
    real = pissa.init_pissa
    monkeypatch.setattr(pissa, "init_pissa", lambda W, options: (W.clone(), *real(W, options)[1:]))
    with pytest.raises(ValueError, match="not the base model"):
        command(train.main, *flags, "--steps", 1, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --- the demo

@pytest.mark.long
def test_demo(files, tmp_path):
    """Without --ckpt: the printed command means what is run, and what was given comes last."""
    text = command(train.main, "--steps", 1, "--test-data", files / "test.jsonl", "--out", tmp_path,
                   "--max-new-tokens", 2)
    line = next(line for line in text.replace("\\\n", "").splitlines()
                if line.strip().startswith("python train.py"))
    spelled_out = vars(parse(*shlex.split(line)[2:], "--overwrite")) | {"overwrite": False}
    assert "--ckpt" in line
    ran = json.loads((tmp_path / "args.json").read_text())
    assert ran == json.loads(json.dumps(spelled_out, default=str))
    assert (ran["steps"], ran["max_new_tokens"], ran["out"]) == (1, 2, str(tmp_path))
    assert model.find(ran["ckpt"]).samefile(TINY) and ran["method"] == "pissa"
    assert "demo" in text and "\naccuracy  " in text


def test_demo_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = parse()
    assert len(data.read(args.data)) == 4000 and len(data.read(args.test_data)) == 500


def test_no_demo_with_ckpt():
    with redirect_stdout(io.StringIO()) as out:
        args = parse("--ckpt", "tiny")
    assert out.getvalue() == ""
    assert (args.rank, args.lr, args.batch, args.max_length) == (128, 2e-5, 128, 512)
    assert (args.warmup, args.weight_decay, args.epochs, args.steps) == (0.03, 0.0, 1, None)


# --- advice

@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory, tok):
    """As wide as a large model, and otherwise as small as can be."""
    folder = tmp_path_factory.mktemp("wide")
    net = model.init_weights(model.Llama(model.Config(
        dim=1024, n_layers=1, n_heads=8, n_kv_heads=1, vocab_size=tok.vocab_size, ffn_dim=256,
        tied=True)))
    meta_write.save(net.bfloat16(), folder)
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes())
    return folder


@pytest.mark.long
@pytest.mark.parametrize("width, method, lr, noted", [
    ("wide", "pissa", 2e-3, True), ("wide", "pissa", 1e-4, False), ("wide", "lora", 2e-3, False),
    ("tiny", "pissa", 2e-3, False)])
def test_note_on_the_learning_rate(wide_checkpoint, flags, tmp_path, width, method, lr, noted):
    flags = [*flags, "--ckpt", wide_checkpoint if width == "wide" else "tiny"]
    text = command(train.main, *flags, "--method", method, "--lr", lr, "--rank", 2, "--niter", 1,
                   "--batch", 1, "--steps", 1, "--max-new-tokens", 1, "--out", tmp_path)
    notes = [line for line in text.replace("\n  ", " ").splitlines() if line.startswith("note:")
             and "so few examples" not in line]
    assert len(notes) == noted
    assert not noted or "2e-5" in notes[0] and f"{lr:g}" in notes[0]


@pytest.mark.long
def test_without_matplotlib(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = command(train.main, *flags, "--steps", 1, "--out", tmp_path)
    assert [line for line in text.splitlines() if "pip install matplotlib" in line]
    assert not (tmp_path / "loss.png").exists() and (tmp_path / "summary.json").exists()


# --- --val-every

@pytest.fixture(scope="module")
def watched(flags, tmp_path_factory):
    """A run of 4 steps of --val-every 2, at a rate that spoils what was learnt; what it printed."""
    out = tmp_path_factory.mktemp("watched") / "out"
    more = ["--val-every", 1, "--steps", 4, "--lr", 0.1, "--clip", 1e9, "--max-new-tokens", 1]
    return out, command(train.main, *flags, *more, "--out", out), [*flags, *more]


def test_best_is_the_lowest_validation_loss(watched, tok, files):
    """OUT/best has the loss that val.jsonl says it has, and the end names it."""
    out, text, _ = watched
    rows = read_lines(out / "val.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and "answers" in rows[0] and rows[4]
    lowest = min(rows[1:], key=lambda r: r["loss"])
    assert lowest["step"] < 4 and rows[-1]["loss"] > lowest["loss"]       # else this shows nothing
    assert (f"lowest validation loss {lowest['loss']:.4f} after step {lowest['step']}: "
            in joined(text))
    net, (_, val) = model.load("tiny", "cpu").requires_grad_(False), split_of_run(tok, files)
    adapter.load(net, out / "best")
    assert full_logits_loss(net, val).item() == pytest.approx(lowest["loss"], rel=1e-4)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best"] == {"step": lowest["step"], "loss": lowest["loss"]}


def test_best_is_kept_by_a_run_that_goes_on(watched, monkeypatch, tmp_path):
    """Later steps that are worse leave it alone; what was learnt is that of a run without it."""
    out, _, flags = watched
    shutil.copytree(out, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (out / "best").iterdir()}
    lowest = min(read_lines(out / "val.jsonl")[1:], key=lambda r: r["loss"])
    command(train.main, "--resume", "--steps", 6, "--out", tmp_path / "out")
    rows = read_lines(tmp_path / "out" / "val.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4, 5, 6]
    if min(r["loss"] for r in rows[1:]) == lowest["loss"]:
        assert before == {f.name: f.read_bytes() for f in (tmp_path / "out" / "best").iterdir()}
    at = flags.index("--val-every")
    command(train.main, *flags[:at], *flags[at + 2:], "--out", tmp_path / "plain")
    assert not (tmp_path / "plain" / "best").exists()
    for a, b in zip(read_lines(out / "log.jsonl"), read_lines(tmp_path / "plain" / "log.jsonl")):
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]


def test_best_of_a_step_that_is_done_again(flags, tmp_path, monkeypatch):
    """After a kill, the step whose weights are in best/ is done again: it stays the best one."""
    losses, real, done = {0: 3.0, 2: 2.2, 4: 2.0, 6: 2.1}, torch.optim.AdamW.step, [0]
    monkeypatch.setattr(train, "validation_loss", lambda *_: losses[done[0]])

    def step(self, *args):
        done[0] += 1
        return real(self, *args)

    def killed(self, *args):
        if done[0] == 5:
            raise SystemExit(137)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    more = [*flags, "--val-every", 2, "--steps", 6, "--save-every", 3, "--max-new-tokens", 1,
            "--out", tmp_path / "out"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="137"):
        patch.setattr(torch.optim.AdamW, "step", killed)
        command(train.main, *more)
    shutil.rmtree(tmp_path / "out/states/00000005")             # a kill has no time to write it
    best = (tmp_path / "out/best/adapter_model.safetensors").read_bytes()
    losses[3], done[0] = 3.0, 3
    assert "after step 3 of 6" in command(train.main, *more, "--resume")
    rows = {r["step"]: r for r in read_lines(tmp_path / "out/val.jsonl")}
    assert [rows[step]["best"] for step in (2, 4, 6)] == [True, True, False]
    assert json.loads((tmp_path / "out/summary.json").read_text())["best"] == {"step": 4, "loss": 2}
    assert (tmp_path / "out/best/adapter_model.safetensors").read_bytes() == best


@pytest.mark.parametrize("method", ["pissa", pytest.param("full", marks=pytest.mark.long)])
def test_killed_between_best_and_its_row(flags, tmp_path, monkeypatch, method):
    """best/ is written before its row of val.jsonl. A run that goes on writes both again."""
    more = [*flags, "--method", method, "--val-every", 1, "--steps", 3, "--max-new-tokens", 1,
            "--save-every", 1, "--out"]

    def killed(out, step, loss, is_best):
        if step == 2:
            raise SystemExit(137)
        return noted(out, step, loss, is_best)

    command(train.main, *more, tmp_path / "whole")
    noted = train.progress.note
    monkeypatch.setattr(train.progress, "note", killed)
    with pytest.raises(SystemExit, match="137"):
        command(train.main, *more, tmp_path / "out")
    assert [r["step"] for r in read_lines(tmp_path / "out" / "val.jsonl")] == [0, 1]
    monkeypatch.undo()
    command(train.main, *more, tmp_path / "out", "--resume")
    for name in "val.jsonl", "best":
        whole, again = (run / name for run in (tmp_path / "whole", tmp_path / "out"))
        found = whole.rglob("*[.]*[sh]") if whole.is_dir() else [whole]       # safetensors or pth
        assert (found := list(found))
        for path in found:
            assert path.read_bytes() == (again / path.relative_to(whole)).read_bytes(), path


def test_tensorboard(examples, tmp_path, monkeypatch):
    """Without the package one line; with one, a point of every curve after every step."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert failure("train.py", "--ckpt", "tiny", "--tensorboard", "--out", tmp_path / "x") == (
        "train.py: --tensorboard needs a package: pip install tensorboard")
    points, closed = [], []

    class SummaryWriter:
        def __init__(self, there, purge_step):
            assert there == tmp_path / "tensorboard" and purge_step == 1

        def add_scalar(self, name, value, step):
            points.append((name, step))

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=SummaryWriter))
    args = parse("--ckpt", "tiny", "--out", tmp_path, "--batch", 8, "--steps", 2, "--tensorboard",
                 "--val-every", 2)
    train.train(prepared("pissa"), examples[:8], args, nullcontext(), examples[:4])
    assert points == [(name, step) for step in (1, 2) for name in ("loss", "grad_norm", "lr")] + [
        ("validation loss", 2)] and closed


@pytest.mark.long
def test_tensorboard_reads_its_files(flags, tmp_path):
    """tensorboard itself finds every step once, also in a run that went on."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    more = [*flags, "--tensorboard", "--val-every", 2, "--max-new-tokens", 1, "--out", tmp_path]
    command(train.main, *more, "--steps", 2)
    command(train.main, "--resume", "--steps", 4, "--out", tmp_path)
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in curves.Scalars("loss")]
    assert losses == [(r["step"], r["loss"]) for r in read_lines(tmp_path / "log.jsonl")]
    assert [e.step for e in curves.Scalars("validation loss")] == [2, 4]


# --- interruptions

@pytest.mark.long
def test_ctrl_c_saves_what_was_learnt(flags, tok, files, tmp_path):
    # A shell's background jobs ignore SIGINT, and children inherit that: set it back.
    script = ("import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
              "runpy.run_path('train.py', run_name='__main__')")
    argv = [*flags, "--warmup", 0, "--steps", 5000, "--out", tmp_path]
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, argv)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, deadline = tmp_path / "log.jsonl", time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= 4:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGINT), err
    assert "Traceback" not in err and str(tmp_path / "adapter") in out + err
    done = len(read_lines(log))
    assert done >= 4 and f"interrupted after {done} of 5000 steps" in err
    net = adapter.load(model.load("tiny", "cpu"), tmp_path / "adapter").requires_grad_(False)
    assert full_logits_loss(net, split_of_run(tok, files)[1]) < 0.8 * read_lines(log)[0]["loss"]


@pytest.mark.long
def test_ctrl_c_before_anything_was_learnt(flags, tmp_path, monkeypatch):
    def ctrl_c(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", ctrl_c)
    assert "nothing" in failure("train.py", *flags, "--steps", 3, "--out", tmp_path)
    assert not (tmp_path / "adapter").exists()
    monkeypatch.setattr(pissa, "inject", ctrl_c)
    assert failure("train.py", *flags, "--steps", 3, "--out", tmp_path).endswith(
        f"interrupted; {options.NOTHING}")


@pytest.mark.long
@pytest.mark.parametrize("steps, step", [(3, 2), (1, None)])
def test_loss_that_is_not_finite(flags, tmp_path, steps, step):
    """One line with the remedy; also where the last step did it, and no further loss tells."""
    message = failure("train.py", *flags, "--lr", 1e38, "--steps", steps, "--out", tmp_path)
    assert re.search(r"loss is -?(nan|inf)" + (f" at step {step}" if step else ""), message)
    assert "--lr" in message and "\n" not in message
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.long
def test_gradient_that_is_not_finite(flags, tmp_path, monkeypatch):
    """Clipping spreads it over all weights, under a finite loss: nothing of that is saved."""
    real = torch.nn.utils.clip_grad_norm_

    def broken(params, largest):
        params[0].grad.view(-1)[0] = torch.inf
        return real(params, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    message = failure("train.py", *flags, "--steps", 1, "--out", tmp_path)
    assert "gradient" in message and "step 1" in message and "\n" not in message
    assert not (tmp_path / "adapter").exists()


def test_out_of_memory(flags, tmp_path, monkeypatch):
    def full_up(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd more")

    monkeypatch.setattr(model.Llama, "hidden", full_up)
    message = failure("train.py", *flags, "--steps", 1, "--out", tmp_path)
    assert "--micro-batch" in message and "--checkpointing" in message and "\n" not in message


# --- mistakes

@pytest.mark.long
def test_a_mistake_is_one_line_on_stderr(tmp_path):
    """As a process: the rest of the mistakes are tried in this one."""
    run = subprocess.run([sys.executable, "train.py", "--ckpt", "llama9-7b", "--out",
                          str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    line, = run.stderr.splitlines()                              # before torch is loaded
    assert line.startswith("train.py: no checkpoint llama9-7b") and "consolidated.00.pth" in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("argv, message", [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--val-data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--test-data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--data", "{tmp}/broken.jsonl"], r"broken.jsonl:2: not JSON"),
    (["--fields", "question,reply"], "no field 'reply' among question, answer"),
    (["--test-data", "{tmp}/open.jsonl"], "record 2: the reference answer names no number"),
    (["--rank", 129], r"k_proj: rank 129 is not between 1 and 128"),
    (["--targets", "nothing"], "no module is called nothing; the linear layers here are down_proj"),
    (["--max-length", 20], "no example left; raise --max-length"),
    (["--val-data", "{tmp}/long.jsonl", "--max-length", 100],
     "long.jsonl: validation: no example left; raise --max-length"),
    (["--val-fraction", 1.5], r"must be in \[0, 1\), not 1.5"),
    (["--adapter", "{tmp}"], "adapter_config.json is missing"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--device", "abacus"], "abacus")])
def test_mistakes(flags, tmp_path, argv, message):
    good = '{"question": "1 + 1?", "answer": "#### 2"}\n'
    (tmp_path / "broken.jsonl").write_text(good + '{"question": "2 +\n')
    (tmp_path / "open.jsonl").write_text(good + '{"question": "Who?", "answer": "Me."}\n')
    (tmp_path / "long.jsonl").write_text(good.replace("1 + 1?", "x " * 200))
    argv = [str(a).format(tmp=tmp_path) for a in argv]
    text = failure("train.py", *flags, "--steps", 1, "--out", tmp_path / "out", *argv)
    assert text.startswith("train.py: ") and "\n" not in text, text
    assert re.search(message, text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [
    ["--rank", 0], ["--rank", "many"], ["--batch", 0], ["--micro-batch", -1], ["--epochs", 0],
    ["--steps", 0], ["--steps", -3], ["--max-length", 0], ["--max-new-tokens", 0], ["--lr", -1],
    ["--lr", "nan"], ["--clip", 0], ["--niter", -1], ["--niter", "some"], ["--method", "dora"],
    ["--dtype", "int8"], ["--warmup", -0.5], ["--targets", ""], ["--ranks", 3],
    ["--save-every", 0], ["--save-every", "m"], ["--save-every", "1h"], ["--keep", 0],
    ["--max-hours", 0], ["--shard", "perhaps"], ["--gpus", 0],
    *([name, 10**30] for name in ("--rank", "--niter", "--quant-iters", "--max-length", "--steps",
                                  "--max-new-tokens", "--batch", "--epochs", "--seed", "--keep",
                                  "--micro-batch", "--gpus", "--save-every", "--weight-decay")),
    ["--seed", 2**63], ["--seed", -1], ["--niter", 1001], ["--lr", "1e400"], ["--lr", 10**400],
    ["--weight-decay", "inf"], ["--save-every", "1" * 400 + "m"], ["--save-every", "1e30"]],
    ids=lambda argv: f"{argv[0]} {argv[1]}"[:40])
def test_numbers_out_of_range(tmp_path, argv):
    """Refused before anything is read; a line of usage and a line that names the flag."""
    text = failure("train.py", "--ckpt", "nowhere", "--out", tmp_path / "out", *argv)
    assert argv[0] in text.splitlines()[-1] and len(text.splitlines()) <= 2, text
    assert not (tmp_path / "out").exists()


def test_each_thing_is_measured_once(flags, tmp_path, monkeypatch):
    """The final loss is; LoRA has no residual to speak of; an empty answer says that it is one."""
    calls, real = [], train.validation_loss
    monkeypatch.setattr(train, "validation_loss", lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr(train, "complete", lambda net, tok, prompts, **_: [""] * len(prompts))
    text = command(train.main, *flags, "--method", "lora", "--steps", 1, "--out", tmp_path / "a")
    assert len(calls) == 3 and text.count("after training: measuring the loss on") == 1
    assert "W_res" not in text and "largest relative |A B| / |W| about 0.0e+00" in text
    assert "after:  (nothing: it ended at once)" in text


def test_mistakes_of_a_newcomer(flags, tmp_path):
    """Part of an option's name; a rank that no matrix has, told before anything is measured; a
    finished run that is resumed with other arguments."""
    assert "--ran" in failure("train.py", *flags, "--ran", 16)
    said = failure("train.py", *flags, "--rank", 10**4, "--out", tmp_path / "a")
    assert "rank 10000 is not between 1 and" in said and not (tmp_path / "a").exists()
    assert "examples" not in said and "model:" not in said             # nor read
    data = flags[3]
    assert f"{data}: say what it is for, such as --data {data}" in failure("train.py", data)
    assert ": name the file in it" in failure("train.py", *flags, "--data", tmp_path)
    run = *flags, "--lr", 1e-3, "--out", tmp_path / "b"
    command(train.main, *run)
    assert "is finished" in command(train.main, *run, "--resume")
    with pytest.raises(ValueError, match="lr was 0.001, now 0.002; choose another --out"):
        command(train.main, *flags, "--lr", 2e-3, "--out", tmp_path / "b", "--resume")


def test_the_demo_on_data_of_ones_own(tmp_path, monkeypatch, capsys):
    """Its settings, and not its problems."""
    path = first_lines(tmp_path, 3)
    monkeypatch.setattr("sys.argv", ["train.py", "--data", str(path), "--out", str(tmp_path / "a")])
    args = options.for_train("")
    assert (args.rank, args.data, args.test_data) == (16, str(path), None)
    assert "test.jsonl" not in capsys.readouterr().out
