"""A run goes on as if nothing had happened: signals, full disks, exceptions, bad weights."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from itertools import count

import pytest
import torch

import adapter
import data
import model
import train
from conftest import ROOT, TINY, command, failure, first_lines
from convert import write_checkpoint
from formats import hf
from support import files, options, report, resume

STEPS = 8


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The start of a command line that takes a second, an epoch being 3 steps."""
    data = first_lines(tmp_path_factory.mktemp("data"), 32)
    return ["--ckpt", "tiny", "--data", data, "--val-fraction", 0.25, "--rank", 4, "--lr", 2e-3,
            "--batch", 8, "--max-new-tokens", 1, "--steps", STEPS, "--save-every", 2]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    command(train.main, *flags, "--out", out)
    return out


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def learnt(out):
    """What two runs must share, bit for bit."""
    log = [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in rows(out)]
    state = torch.load(resume.newest(out) / "state.pt", weights_only=True)
    moments = [v for kept in state["optimizer"]["state"].values() for v in kept.values()]
    return log, [*state["parameters"].values(), *moments]


def assert_same(a, b):
    (log_a, tensors_a), (log_b, tensors_b) = learnt(a), learnt(b)
    assert log_a == log_b
    assert len(tensors_a) == len(tensors_b) and all(map(torch.equal, tensors_a, tensors_b))


def interrupt(monkeypatch, step, error, kind=torch.optim.AdamW):
    """Let step number `step` of this kind of optimiser raise an error."""
    real, count = kind.step, []

    def broken(self, *args, **kwargs):
        count.append(1)
        if len(count) == step:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", broken)


def slow(*cases):
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.long
@pytest.mark.parametrize("more", [
    ["--method", "qpissa", "--quant-iters", 1, "--checkpointing"], *slow(
        ["--method", "qlora", "--bits", 8], [], ["--method", "full"], ["--checkpointing"],
        ["--no-packing"], ["--method", "lora"])],
    ids=str)
def test_resumed_is_uninterrupted(flags, whole, tmp_path, monkeypatch, more):
    """After an exception in step 6, everything that the five before it learnt is in a state."""
    expected = whole
    if more:
        expected = tmp_path / "whole"
        command(train.main, *flags, *more, "--out", expected)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as e:
        interrupt(patch, 6, torch.OutOfMemoryError("CUDA out of memory"))
        command(train.main, *flags, *more, "--out", tmp_path / "run")
    assert "in 5 steps" in e.value.saved and "--resume" in e.value.saved
    text = command(train.main, *flags, *more, "--out", tmp_path / "run", "--resume")
    assert f"after step 5 of {STEPS}" in text
    assert_same(expected, tmp_path / "run")
    if "full" not in more:
        a, b = (adapter.read_adapter(out / "adapter").pairs for out in (expected, tmp_path / "run"))
        assert all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n]))
    before, after = (json.loads((out / "summary.json").read_text())
                     for out in (expected, tmp_path / "run"))
    assert before["before"] == after["before"] and before["after"] == after["after"]


def test_resume_alone_takes_the_arguments_of_the_run(flags, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        interrupt(patch, 4, RuntimeError("a CUDA error"))
        command(train.main, *flags, "--out", tmp_path / "run")
    with open(tmp_path / "run" / "log.jsonl", "a") as log:           # what a kill may leave
        log.write('{"step": 4, "lo')
    command(train.main, "--resume", "--out", tmp_path / "run")
    assert_same(whole, tmp_path / "run")
    left = [tmp_path / "run" / "states" / ".writing-00000099", resume.previous(tmp_path / "run")]
    for path in left:                                                # by kills at other moments
        path.mkdir()
    text = command(train.main, "--resume", "--out", tmp_path / "run")
    assert "is finished" in text and "validation loss" in text and "step 0" not in text
    assert f"\nweights: {tmp_path}/run/adapter\n" in text and "use them:\n  python eval.py" in text
    assert not any(path.exists() for path in left)


def test_longer_if_asked_for(flags, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    command(train.main, "--resume", "--out", out, "--steps", STEPS + 2)
    assert [r["step"] for r in rows(out)] == list(range(1, STEPS + 3))
    assert rows(out)[:STEPS] == rows(whole)
    assert [json.loads(line)["step"] for line in (out / "val.jsonl").read_text().splitlines()] == [
        0, STEPS, STEPS + 2]


@pytest.mark.parametrize("more, message", [
    (["--lr", 1e-3], "lr was 0.002, now 0.001"), (["--rank", 5], "rank was 4, now 5"),
    (["--seed", 1], "the data was "), (["--steps", 2], "has 8 steps already")])
def test_another_run_is_refused(flags, whole, tmp_path, more, message):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "summary.json").unlink()
    text = failure("train.py", "--resume", "--out", out, *more)
    assert message in text and "\n" not in text
    assert_same(whole, out)


@pytest.mark.long
def test_a_checkpoint_that_was_moved(flags, whole, tmp_path, monkeypatch):
    """The base is known by its weights, not by its path."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        interrupt(patch, 4, RuntimeError("a CUDA error"))
        command(train.main, *flags, "--out", tmp_path / "run")
    shutil.copytree(TINY, tmp_path / "moved")
    command(train.main, "--resume", "--out", tmp_path / "run", "--ckpt", tmp_path / "moved")
    assert_same(whole, tmp_path / "run")


def test_without_a_state_it_begins(flags, tmp_path):
    command(train.main, *flags, "--steps", 1, "--resume", "--out", tmp_path / "run")
    assert len(rows(tmp_path / "run")) == 1


def test_what_a_run_without_a_state_began_with_is_forgotten(flags, tmp_path):
    """A kill may leave A_0, B_0 and no state. A run that begins anew there has others."""
    command(train.main, *flags, "--steps", 1, "--out", tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "states":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (tmp_path / "states").glob("0*"):
        shutil.rmtree(path)
    text = command(train.main, *flags, "--steps", 2, "--niter", 0, "--resume", "--out", tmp_path)
    assert "begins" in text or "step 0" in text
    for name, (A, _) in adapter.read_adapter(tmp_path / "adapter").pairs.items():
        began, _ = adapter.read_adapter(resume.start_of(tmp_path)).pairs[name]
        assert torch.equal(A[:, 4:], began[:, 4:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_resumed_on_a_gpu(flags, tmp_path, monkeypatch):
    """AdamW's own kernel wants all of its state on the GPU, the number of steps, too."""
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        interrupt(patch, 6, torch.OutOfMemoryError("CUDA out of memory"))
        command(train.main, *flags, "--out", tmp_path)
    command(train.main, *flags, "--out", tmp_path, "--resume")
    assert [r["step"] for r in rows(tmp_path)] == list(range(1, STEPS + 1))


def test_a_run_is_not_replaced_by_accident(flags, whole, tmp_path):
    text = failure("train.py", *flags, "--out", whole)
    assert "--resume" in text and "--overwrite" in text
    out = shutil.copytree(whole, tmp_path / "run")
    command(train.main, *flags, "--out", out, "--overwrite", "--steps", 1)
    assert len(rows(out)) == 1 and not resume.previous(out).exists()


def test_a_finished_run_outlives_two_unfinished_ones(flags, whole, tmp_path):
    """A run that was stopped has an adapter, too, but what was finished is worth more."""
    out = shutil.copytree(whole, tmp_path / "run")
    for _ in range(2):
        with pytest.raises(SystemExit):
            command(train.main, *flags, "--out", out, "--overwrite", "--max-hours", 1e-9)
        assert (out / "adapter").exists()
        assert_same(whole, resume.previous(out))


def test_default_names(flags, tmp_path, monkeypatch):
    """The first free one; with --resume the last that is not."""
    from test_train import parse
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        out = parse("--ckpt", ROOT / "checkpoints" / "tiny").out
        out.mkdir(parents=True)
        names.append(str(out))
    assert names == ["runs/tiny-pissa", "runs/tiny-pissa-2", "runs/tiny-pissa-3"]
    assert str(parse("--ckpt", ROOT / "checkpoints" / "tiny", "--resume").out) == names[2]


@pytest.mark.slow
def test_only_the_newest_states_are_kept(flags, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError):
        interrupt(monkeypatch, 8, RuntimeError())
        command(train.main, *flags, "--keep", 3, "--save-every", 1, "--out", tmp_path / "run")
    kept = sorted(os.listdir(tmp_path / "run" / "states"))
    assert len(kept) == 4 and kept[2:] == ["00000007", "start"]


# --- results that are not finite

@pytest.mark.parametrize("method", ["pissa", *slow("lora", "qlora", "full")])
def test_a_good_result_survives_a_bad_run(flags, whole, tmp_path, method):
    out = shutil.copytree(whole, tmp_path / "run")
    for _ in range(2):                                               # the second time, too
        text = failure("train.py", *flags, "--out", out, "--overwrite", "--lr", 1e38, "--steps", 1,
                       "--method", method)
        assert "not written" in text and "run.previous stays" in text and "--lr" in text
        assert not (out / "adapter").exists() and not (out / "checkpoint").exists()
        assert_same(whole, resume.previous(out))


def test_states_hold_no_nan(flags, tmp_path, monkeypatch):
    real = torch.optim.AdamW.step

    def spoil(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if self.state[p := self.param_groups[0]["params"][0]]["step"] == 5:
            p.data[0, 0] = torch.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    failure("train.py", *flags, "--save-every", 1, "--out", tmp_path / "run")
    assert resume.newest(tmp_path / "run").name == "00000004"


# --- signals, in processes of their own

@pytest.fixture
def start(flags):
    """start(out, more, code): a process that trains for ever, after running some code."""
    running = []

    def begin(out, *more, code="", steps=5000):
        script = ("import os, signal, sys; signal.signal(signal.SIGINT, "
                  f"signal.default_int_handler)\n{code}\nimport runpy\n"
                  "runpy.run_path('train.py', run_name='__main__')")
        argv = map(str, [*flags, "--out", out, "--steps", steps, "--save-every", 1000, *more])
        running.append(subprocess.Popen(
            [sys.executable, "-c", script, *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def wait_for(out, steps, process):
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.mark.long
@pytest.mark.parametrize("name, code", [
    ("SIGTERM", 143), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 138)))])
def test_signals(start, tmp_path, name, code):
    """The step is finished, everything is saved, one line says so; a second one changes nothing."""
    out = tmp_path / "run"
    process = start(out)
    wait_for(out, 3, process)
    process.send_signal(getattr(signal, name))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    done = len(rows(out))
    assert process.returncode == code, err
    assert f"interrupted after {done} of 5000 steps ({name})" in err.splitlines()[-1]
    assert resume.newest(out).name == f"{done:08d}"
    assert str(out / "adapter") in err and adapter.read_adapter(out / "adapter")


def test_ctrl_c_outside_of_training_tells_what_is_saved(flags, tmp_path, monkeypatch):
    """Before the first step nothing is, and after the last one all is."""
    out, measure = tmp_path / "run", train.evaluate
    def interrupted(*args):
        if when in args[-2:]:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(train, "evaluate", interrupted)
    for when, more, told in (
            ("before", (), f"; {options.NOTHING}"), ("after", (), f"; what was learnt is in {out}/"
             "adapter; the same command with --resume measures it")):
        resume.release()
        with pytest.raises(KeyboardInterrupt) as e:
            command(train.main, *flags, "--out", out, "--steps", 2, *more)
        assert e.value.saved == told and out.exists() == (when == "after")
    resume.release()
    when = None
    command(train.main, *flags, "--out", out, "--steps", 2, "--resume")
    assert (out / "summary.json").exists()
    monkeypatch.setattr(train, "load", lambda *args: signal.raise_signal(signal.SIGINT))
    (out / "summary.json").unlink()
    resume.release()
    with pytest.raises(KeyboardInterrupt) as e:
        command(train.main, "--out", out, "--steps", 3, "--resume")
    assert e.value.saved == f"; nothing was learnt since {out}/states/00000002, with which " \
        "--resume goes on"


@pytest.mark.slow
def test_nohup_goes_on(start, tmp_path):
    out = tmp_path / "run"
    process = start(out, code="signal.signal(signal.SIGHUP, signal.SIG_IGN)", steps=6)
    wait_for(out, 2, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0 and len(rows(out)) == 6


@pytest.mark.long
def test_signal_inside_saving(start, tmp_path):
    """Ctrl-C, twice, while the adapter is written after the last step: it is written."""
    code = ("import adapter; real = adapter.save\n"
            "def save(*a):\n"
            "    if a[1].name == 'adapter':\n"
            "        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
            "    return real(*a)\n"
            "adapter.save = save")
    process = start(tmp_path / "run", code=code, steps=3)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "after the last of 3 steps" in err
    assert adapter.read_adapter(tmp_path / "run" / "adapter")


@pytest.mark.slow
def test_readers_that_go_away(start, tmp_path):
    """`2>&1 | head`: training goes on without its reader."""
    out = tmp_path / "run"
    process = start(out, steps=6)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(90) == 0 and len(rows(out)) == 6 and (out / "summary.json").exists()


@pytest.mark.slow
def test_two_runs_in_one_place(start, flags, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_for(out, 1, process)
    for more in (["--resume"], ["--overwrite"]):
        text = failure("train.py", *flags, "--out", out, *more)
        assert "another process is at work there: wait for it, or write elsewhere" in text
        assert "measuring" not in text                             # before it takes long


@pytest.mark.slow
def test_max_hours(flags, tmp_path):
    with pytest.raises(SystemExit) as e:
        command(train.main, *flags, "--max-hours", 1e-9, "--out", tmp_path / "run")
    assert e.value.code == 0 and len(rows(tmp_path / "run")) == 1
    command(train.main, "--resume", "--out", tmp_path / "run")
    assert len(rows(tmp_path / "run")) == STEPS


@pytest.mark.slow
def test_faults(tmp_path):
    """A few of the tries of bench.faults, which takes a quarter of an hour."""
    tries = {"kills": 6, "torchrun": 2, "signals": 4, "disks": 5}
    subprocess.run([sys.executable, "-m", "bench.faults", "--out", tmp_path / "x.json",
                    *[f"--{what}={n}" for what, n in tries.items()]], cwd=ROOT, check=True)
    found = json.loads((tmp_path / "x.json").read_text())
    assert all(found[what]["tries"] == {"as it should be": n} for what, n in tries.items())


@pytest.mark.long
def test_a_checkpoint_in_shards_is_the_old_or_the_new(tmp_path, monkeypatch):
    """kill -9 at each of the file operations of a process that replaces one, as --method full."""
    there, config = tmp_path / "checkpoint", model.open_checkpoint(TINY)[0]
    monkeypatch.setattr(hf.save_folder, "__defaults__", (10_000,))          # bytes of a shard
    tensors = [[(name, torch.full((64, 64), value)) for name in "abc"] for value in (1.0, 2.0)]

    def write(which):
        write_checkpoint(there, TINY, config, tensors[which], torch.bfloat16, layout="hf")
        return contents()

    def contents():
        return {p.name: p.read_bytes() for p in files.restored(there).iterdir()}

    def kill_at(moment):
        operations = count()
        sys.addaudithook(lambda event, args: event in ("open", "os.rename", "os.remove", "os.mkdir",
                                                       "os.rmdir", "os.chmod")
                         and str(tmp_path) in str(args[0]) and next(operations) == moment
                         and os.kill(os.getpid(), signal.SIGKILL))

    new, old = write(1), write(0)
    assert len([name for name in old if name.endswith(".safetensors")]) == 3
    seen = []
    for moment in count():
        if not (pid := os.fork()):
            kill_at(moment)
            write(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        seen.append(contents())
        assert seen[-1] in (old, new)
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if seen[-1] == new:
            write(0)
    assert seen[-1] == new and seen.count(new) > 2 and seen.count(old) > 20


# --- full disks

def test_no_room(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    text = failure("train.py", *flags, "--out", tmp_path / "run")
    assert "a run with --keep 2 takes 0.00" in text and "1e-06 GB are free" in text
    assert "\n" not in text and not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_file_that_cannot_grow(flags, whole, tmp_path):
    """RLIMIT_FSIZE stands for a full disk: the run stops with one line, the old state is intact."""
    out = tmp_path / "run"
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n" \
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    code = f"{limit}import runpy, sys; runpy.run_path('train.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *map(str, flags), "--out", out], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    assert done.returncode == 1 and resource.RLIMIT_FSIZE
    line = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "GB are free" in line
    assert line.count("is not written") == 1
    assert not (out / "adapter").exists() and len(rows(out)) <= 4


# --- args.json

@pytest.mark.parametrize("content, message", [
    ("[" * 100_000, "args.json is damaged"), ("[1]", "args.json is damaged"), ("7", "is damaged"),
    ("{", "args.json is damaged"), (b"\xff", "args.json is damaged"), ("", "is damaged"),
    ({"rank": "wide"}, "args.json: argument --rank: invalid int value: 'wide'"),
    ({"rank": 1.5}, "args.json: argument --rank: invalid int value: '1.5'"),
    ({"rank": [1]}, "args.json: argument --rank: invalid int value: '[1]'"),
    ({"rank": True}, "args.json: argument --rank: invalid int value: 'True'"),
    ({"rank": 10**30}, "--rank must be at least 1 and at most 1e+09, not 1000"),
    ({"lr": {}}, "args.json: argument --lr: invalid float value"),
    ({"lr": 1e999}, "--lr must be"), ({"targets": []}, "args.json: argument --targets: names"),
    ({"shard": "perhaps"}, "--shard: there is no 'perhaps': it is one of yes, "),
    ({"checkpointing": 5}, "args.json: argument --checkpointing: ignored explicit argument '5'"),
    ({"method": ["pissa"]}, "none of pissa, lora"), ({"save_every": "1h"}, "argument --save-every"),
    ({"ckpt": None}, "--ckpt"), ({"niter": -1}, "--niter must be at least 0")])
def test_damaged_arguments_of_a_run(whole, tmp_path, content, message):
    """What is stored is checked as a command line is."""
    if isinstance(content, dict):
        content = json.dumps({**json.loads((whole / "args.json").read_text()), **content})
    (tmp_path / "args.json").write_bytes(content if type(content) is bytes else content.encode())
    text = failure("train.py", "--resume", "--out", tmp_path)
    assert message in text.splitlines()[-1] and len(text.splitlines()) <= 2, text


def test_stored_arguments_come_back(whole, tmp_path, monkeypatch):
    """Every kind of them: lists, flags, none, exact."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out", str(tmp_path)])
    stored = {**json.loads((whole / "args.json").read_text()), "niter": None, "checkpointing": True,
              "targets": ["q_proj", "v_proj"], "lr": 1.25e-7, "fields": "a b,-c", "method": "mine"}
    (tmp_path / "args.json").write_text(json.dumps(stored))
    again = json.loads(json.dumps(vars(options.for_train("")), default=str))
    same = {k: v for k, v in stored.items() if k not in ("out", "resume")}
    assert {k: again[k] for k in same} == same


@pytest.mark.parametrize("seed", [2**63 - 1, 2**62, 10**30])
def test_a_large_seed(seed):
    """It fails before anything is read (--seed), or not at all."""
    examples = list(range(9))
    assert sorted(sum(data.batches(examples, 2, seed, 3), [])) == examples
    assert sorted(sum(data.split(examples, 0.3, seed), [])) == examples
    if seed < 2**63:
        assert data.batches(examples, 2, seed, 3) != data.batches(examples, 2, seed - 1, 3)


def test_a_base_that_is_no_number(flags, tmp_path):
    """It is named before the first step, and not --lr."""
    shutil.copytree(TINY, tmp_path / "base")
    path = tmp_path / "base" / "consolidated.00.pth"
    state = torch.load(path, weights_only=True)
    state["norm.weight"][3] = float("nan")
    torch.save(state, path)
    text = failure("train.py", *flags, "--ckpt", tmp_path / "base", "--out", tmp_path / "out")
    assert "model.norm: the weight holds NaN or Inf" in text and "--lr" not in text
    state["norm.weight"][:] = 3e38                                    # numbers, but not for long
    torch.save(state, path)
    text = failure("train.py", *flags, "--ckpt", tmp_path / "base", "--out", tmp_path / "out")
    assert "the validation loss is nan before the first step" in text and "--lr" not in text
    assert not (tmp_path / "out").exists()


# --- what a run has written, damaged

def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


@pytest.mark.parametrize("change", [
    lambda c: c[:-1], lambda c: b"", lambda c: b"x" * 99, lambda c: c[:len(c) // 2],
    lambda c: flipped(c, len(c) // 2), lambda c: flipped(c, len(c) // 3), lambda c: c[999:]],
    ids=["end", "empty", "other", "half", "bit", "another bit", "begin"])
def test_damaged_state(whole, tmp_path, change):
    """One changed bit of a number would be another run, without a word: the checksums tell."""
    content = (resume.newest(whole) / "state.pt").read_bytes()
    (tmp_path / "state.pt").write_bytes(content)
    assert resume.read_state(tmp_path)["step"] == STEPS
    (tmp_path / "state.pt").write_bytes(change(content))
    with pytest.raises(ValueError, match=f"{tmp_path}/state.pt is damaged .*: remove") as e:
        resume.read_state(tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "", "7", "[]", b"\xff", '{"loss": 1}'],
                         ids=lambda content: content[:9])
def test_damaged_results(whole, tmp_path, content):
    shutil.copytree(whole, tmp_path / "run")
    args = Namespace(out=tmp_path / "run", resume=True, epochs=1, steps=STEPS, test_data=None,
                     method="pissa", ckpt="tiny")
    content = content if type(content) is bytes else content.encode()
    for name, read in ("val.jsonl", resume.measured), ("summary.json", report.finished):
        assert read(args)
        (args.out / name).write_bytes(content)
        if content == b'{"loss": 1}' and name == "summary.json":
            content = json.dumps({"asked": [1, STEPS]}).encode()              # and nothing else
            (args.out / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{args.out / name} is damaged .*: remove it") as e:
            read(args)
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_signal_is_answered_at_once(capfd):
    """The first one, in a line: a step may take long."""
    with resume.signals_noted():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert resume.ASKED == [signal.SIGTERM] * 2
    assert capfd.readouterr().err == "\nSIGTERM: after this step it saves, and ends\n"
    resume.ASKED.clear()
