"""Two processes on gloo are one process: the same losses, adapter and answers."""
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import adapter
import train
from conftest import ROOT, TINY, command, first_lines
from support import parallel, resume

STEPS = 10


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    data = first_lines(tmp_path_factory.mktemp("data"), 40)
    return [*map(str, ["--ckpt", "tiny", "--data", data, "--val-fraction", 0.2, "--rank", 4,
                       "--lr", 1e-3, "--batch", 8, "--micro-batch", 2, "--max-new-tokens", 2,
                       "--steps", STEPS, "--device", "cpu"])]


def torchrun(*argv, restarts=0, code=None):
    """Two processes of train.py, or of a script; the finished process."""
    script = ["train.py"] if code is None else [code]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", str(restarts), *script, *map(str, argv)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def ended(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err[-3000:]
    return out


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_alike(one, two, rel=1e-6):
    """Losses, answers and the adapter of two runs agree to rounding."""
    losses = [[r["loss"] for r in rows(out)] for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=rel) and len(losses[0]) >= STEPS
    a, b = (json.loads((out / "summary.json").read_text())["after"] for out in (one, two))
    assert a["loss"] == pytest.approx(b["loss"], rel=rel) and a["accuracy"] == b["accuracy"]
    assert a["answers"] == b["answers"]
    x, y = ([json.loads(line) for line in (out / "val.jsonl").read_text().splitlines()]
            for out in (one, two))
    assert [(r["step"], r.get("best")) for r in x] == [(r["step"], r.get("best")) for r in y]
    assert [r["loss"] for r in x] == pytest.approx([r["loss"] for r in y], rel=rel)
    assert (one / "best").exists() == (two / "best").exists() == any(r.get("best") for r in x)
    if (one / "adapter").exists():
        x, y = (adapter.read_adapter(out / "adapter").pairs for out in (one, two))
        for n in x:
            for M, N in zip(x[n], y[n]):
                assert (M - N).norm() <= 1e-4 * M.norm()


CASES = [["--method", "qpissa", "--quant-iters", 1, "--shard"], ["--shard=no"], ["--shard"],
         ["--method", "qpissa", "--shard", "--checkpointing"], ["--method", "qpissa", "--shard"],
         ["--shard", "--checkpointing"], ["--method", "full", "--shard"],
         ["--batch", 3, "--micro-batch", 1, "--shard"]]          # 3 micro-batches for 2 processes
SLOW = [["--method", "qpissa", "--bits", 8, "--shard"], ["--method", "lora", "--shard=no"],
        ["--method", "qpissa", "--bits", 8, "--quant-iters", 1, "--shard=no"],
        ["--method", "loftq", "--shard=no"], ["--method", "full", "--shard=no"],
        ["--batch", 1, "--shard=no"], ["--no-packing", "--shard", "--method", "qlora"],
        ["--plain", "--shard"],
        ["--method", "full", "--shard", "--checkpointing"], ["--niter", "exact", "--shard=no"],
        ["--checkpointing", "--shard=no", "--val-every", 2],
        ["--method", "full", "--shard", "--val-every", 5],
        ["--targets", "q_proj,down_proj", "--shard"]]


@pytest.mark.long
@pytest.mark.parametrize("more", [*CASES[:1], *[pytest.param(c, marks=pytest.mark.slow)
                                                for c in (*CASES[1:], *SLOW)]], ids=str)
def test_two_processes_are_one(flags, tmp_path, more):
    test = ["--test-data", TINY / "test.jsonl"] if more == CASES[1] else []
    if test:
        problems = tmp_path / "test.jsonl"
        problems.write_text("".join((TINY / "test.jsonl").read_text().splitlines(True)[:5]))
        test = ["--test-data", problems]
    more = [*more, "--lr", "1e-4"] if "full" in more else more        # or rounding grows quickly
    two = torchrun(*flags, *more, *test, "--out", tmp_path / "two")
    command(train.main, *flags, *[m for m in more if "--shard" not in str(m)], *test, "--out",
            tmp_path / "one")
    text = ended(two)
    assert text.count("\nuse them:") == 1                             # one process speaks
    if "--bits" not in more:
        return assert_alike(tmp_path / "one", tmp_path / "two")
    # Where x is rounded, a difference of 1e-7 in A or B becomes one of 1e-4 in the loss (another
    # code of some x). So the first step is compared, and that both learn alike.
    a, b = (rows(tmp_path / name) for name in ("one", "two"))
    for key in "loss", "grad_norm":
        assert a[0][key] == pytest.approx(b[0][key], rel=1e-6)
    assert len(a) == len(b) and a[-1]["loss"] == pytest.approx(b[-1]["loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--shard=no"], ["--shard"], ["--method", "full", "--shard"]],
                         ids=str)
@pytest.mark.parametrize("first", ["one", "two"])
def test_another_number_of_processes_goes_on(flags, tmp_path, more, first):
    """From 1 to 2 and from 2 to 1, after 5 steps."""
    flags = [*flags, "--lr", "1e-4"] if "full" in more else flags
    more_of_one = [m for m in more if "--shard" not in m]
    command(train.main, *flags, *more_of_one, "--out", tmp_path / "one")
    out = tmp_path / "run"
    stop = ["--max-hours", "1e-9"]
    for n, name in enumerate((first, "two" if first == "one" else "one")):
        argv = ["--resume", "--out", out] if n else [*flags, "--out", out, *stop]
        if name == "two":
            assert torchrun(*argv, *more).wait(120) == 0
        else:
            try:
                command(train.main, *argv, *more_of_one)
            except SystemExit as e:
                assert e.code == 0
            resume.release()
    assert_alike(tmp_path / "one", out)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--shard=no"], ["--shard"]], ids=str)
def test_a_killed_process_is_restarted(flags, tmp_path, more):
    """--max-restarts goes on with the newest state, to the result of a run that nothing killed."""
    out, long = tmp_path / "run", [*flags, "--steps", "60", "--save-every", "5", *more]
    ended(torchrun(*long, "--out", tmp_path / "whole"))
    process = torchrun(*long, "--out", out, restarts=2)
    deadline = time.time() + 60
    while time.time() < deadline and (not (out / "log.jsonl").exists() or len(rows(out)) < 12):
        time.sleep(0.02)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    ended(process)
    states = [torch.load(resume.newest(d) / "state.pt", weights_only=True)
              for d in (tmp_path / "whole", out)]
    assert [r["loss"] for r in rows(out)] == [r["loss"] for r in rows(tmp_path / "whole")]
    assert all(torch.equal(p, states[1]["parameters"][n])
               for n, p in states[0]["parameters"].items())


@pytest.mark.parametrize("out", [["--out", "run"], []], ids=str)
def test_a_restart_goes_on_only_with_what_it_began(out, tmp_path, monkeypatch):
    """A process may be killed before the run has begun. Then an earlier run is still in --out."""
    from test_train import parse
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this one")
    there = tmp_path / (out[1] if out else "runs/tiny-pissa")
    there.mkdir(parents=True)
    for began in (None, "another one", "this one"):
        (there / "args.json").write_text(json.dumps({"torchrun": began, "rank": 3}))
        args = parse("--ckpt", TINY, *out, "--overwrite")
        assert args.resume == (began == "this one") and args.torchrun == "this one"
        assert args.rank == (3 if args.resume else 128)
        again = out or args.resume
        assert args.out.resolve() == (there if again else there.with_name("tiny-pissa-2"))


@pytest.mark.long
def test_restarted_processes_do_not_meet_the_dead(monkeypatch):
    """torchrun's store still says where a process 0 was that has been killed."""
    theirs = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    theirs.set("meeting place", "1")
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", str(theirs.port))):
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(parallel, "RANK", 1)
        other = pool.submit(parallel.meeting_place)           # comes first, and tries for 2 seconds
        time.sleep(1)
        monkeypatch.setattr(parallel, "RANK", 0)
        mine = parallel.meeting_place()
        mine.set("said", "by 0")
        assert other.result().get("said") == b"by 0" and mine.port != theirs.port


TRAP = """
import sys
from support import parallel
import fast, model, train
from support import options

class Around:
    pass

def shard(module, *rest, real=parallel.shard):
    args = rest[-1]
    args.checkpointing = False
    real(module, *rest)
    args.checkpointing = True

parallel.shard = shard
finish = train.report.advise
def advise(net, *rest):
    net.checkpointing = True                                    # recompute around the layer
    finish(net, *rest)
train.report.advise = advise
train.report.run(train.main, "train.py")
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_fails_ends_all(flags, tmp_path, rank):
    """Saving what was learnt waits for no process that is not there."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, train\nfrom support import parallel\ncount = []\n"
        "real = torch.optim.AdamW.step\ndef step(self, *args):\n    count.append(1)\n"
        f"    if len(count) == 4 and parallel.RANK == {rank}:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory')\n    return real(self, *args)\n"
        "torch.optim.AdamW.step = step\ntrain.main()\n")
    process = torchrun(*flags, "--shard=no", "--out", tmp_path / "run", code=script)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "out of memory" in err
    assert rank or resume.newest(tmp_path / "run").name == "00000003"


def test_a_process_without_a_gpu(monkeypatch):
    """More processes than GPUs: one line."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(parallel, "LOCAL", 1)
    with pytest.raises(ValueError, match="no GPU: there are 1; --nproc-per-node should be at most"):
        parallel.start(None)


def test_variables_of_other_launchers_are_not_torchruns():
    """RANK and WORLD_SIZE alone, as some schedulers set them, are not two processes that meet."""
    env = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    env.pop("TORCHELASTIC_RUN_ID", None)
    found = subprocess.run([sys.executable, "-c", "from support import parallel as p\n"
                            "print(p.RANK, p.WORLD)"], cwd=ROOT, env=env, capture_output=True)
    assert found.stdout.split() == [b"0", b"1"]


@pytest.mark.slow
def test_the_trap_of_recomputation_around_sharded_layers(flags, tmp_path):
    """It finds no gradient for sharded weights: training stops instead of learning nothing."""
    (tmp_path / "trap.py").write_text(TRAP)
    process = torchrun(*flags, "--method", "full", "--shard", "--checkpointing", "--out",
                       tmp_path / "run", code=tmp_path / "trap.py")
    _, err = process.communicate(timeout=120)
    assert process.returncode and "a gradient is missing" in err
