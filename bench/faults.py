"""What survives: kill -9, signals and full disks at random moments of real runs, on a CPU.

    python -m bench.faults --out bench/results/faults_cpu.json      # 194 tries, a quarter of
                                                                    # an hour on two cores
A killed run, resumed, must be the run that nothing killed, bit for bit: losses, adapter, moments.
If one of two processes is killed, torchrun restarts both, and nobody has to resume. An earlier
result in --out must be there, complete, before and after. A signal must leave all that was learnt.
A full disk must leave what was there, and end with a line that names the file.

A try that came too late, or whose disk was large enough, is drawn again and not counted.
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import torch

import model
from bench import program, report
from convert import write_checkpoint
from support import files, resume

ROOT, STEPS = Path(__file__).parent.parent, 8
METHODS = {"pissa": [], "lora": ["--method", "lora"], "qpissa": ["--method", "qpissa"],
           "full": ["--method", "full"], "full in shards": ["--method", "full"]}
KINDS = METHODS | {"no packing": ["--no-packing"]} | {
    f"{name}, recomputing": [*flags, "--checkpointing"] for name, flags in METHODS.items()}
TWO = {f"{name}, {how} on two": [*METHODS[name], flag] for name in ("pissa", "full")
       for how, flag in (("whole", "--shard=no"), ("sharded", "--shard=yes"))}
# What is in --out when a run begins. A stopped one goes on, and what it had saved is replaced.
FOUND = ["an earlier run", "nothing", "an earlier run", "a stopped run"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
            "--max-restarts", 3]
SHARDS = """import sys
sys.path.insert(0, '.')
import train
from formats import hf
hf.save_folder.__defaults__ = 1_000_000,                            # bytes of a shard
train.report.run(train.main, 'train.py')"""
LIMITED = """import resource, runpy, signal, sys
sys.path.insert(0, '.')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv.pop(1)),))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name='__main__')"""
GOOD, AGAIN = "as it should be", "drawn again"


def start(argv, out=None, limit=None):
    """A process of one of the programs."""
    first = ["-c", LIMITED, str(limit)] if limit else []
    argv = [str(a) for a in argv] + (["--out", str(out)] if out else [])
    return subprocess.Popen([sys.executable, *first, *argv], cwd=ROOT, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(argv, out=None, limit=None):
    """(exit code, last line on stderr)."""
    process = start(argv, out, limit)
    _, err = process.communicate(timeout=600)
    assert "Traceback" not in err, err
    return process.returncode, (err.strip().splitlines() or [""])[-1]


def train(folder, kind="pissa"):
    """The command line of a run of 8 steps, 3 an epoch."""
    shards = "shards" in kind
    return [*TORCHRUN * (kind in TWO), folder / "shards.py" if shards else "train.py", "--ckpt",
            folder / "hf" if shards else "tiny", "--data", folder / "train.jsonl",
            "--val-fraction", 0.25, "--rank", 4, "--lr", 1e-3, "--batch", 8, "--micro-batch", 4,
            "--max-new-tokens", 1, "--steps", STEPS, "--save-every", 2, "--device", "cpu",
            *(KINDS | TWO)[kind]]


def prepared(folder, kind, found):
    """Where a run is that nobody killed: the whole one; an earlier one, with another result; or one
    that has stopped after a step."""
    return folder / f"{found or 'whole'} {kind}".replace(" ", "-").replace(",", "")


def prepare(folder, kind, found):
    """Let that run take place. Returns the seconds it takes."""
    more = {"an earlier run": ["--seed", 1, "--steps", 2],
            "a stopped run": ["--max-hours", 1e-9]}.get(found, [])
    begin = time.perf_counter()
    process = start([*train(folder, kind), *more], prepared(folder, kind, found))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return time.perf_counter() - begin


def contents(directory):
    """A hash of all files of a directory, None if it is absent."""
    if not directory.is_dir():
        return None
    return hashlib.sha256(b"".join(
        str(p.relative_to(directory)).encode() + p.read_bytes()
        for p in sorted(directory.rglob("*")) if p.is_file())).hexdigest()


def learnt(out):
    """Losses and gradient norms; the measurements before and after; a hash of the newest state's
    parameters and moments."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    state = torch.load(resume.newest(out) / "state.pt", weights_only=True)
    tensors = [*state["parameters"].values(), *(v for kept in state["optimizer"]["state"].values()
                                                for v in kept.values())]
    h = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors))
    return ([(r["step"], r["loss"], r["grad_norm"]) for r in log], summary["before"],
            summary["after"], h.hexdigest())


def result(out):
    """The hash of a finished result, whatever the method."""
    for name in ("adapter", "checkpoint"):
        if (files.restored(out / name)).is_dir():
            return contents(out / name)
    return None


def begun(out, since):
    """True if a run that was started at a time has made --out its own."""
    with suppress(FileNotFoundError):
        return (out / "args.json").stat().st_mtime >= since
    return False


def steps_of(out):
    """How many steps a log has."""
    with suppress(FileNotFoundError):
        return (out / "log.jsonl").read_text().count("\n")
    return 0


def hidden(directory):
    """The names of what is being written in a directory, or was when a process was killed."""
    with suppress(FileNotFoundError):
        return [name for name in os.listdir(directory) if name.startswith(".")]
    return []


def phase(out, since):
    """What a run is doing, or was when it was killed."""
    if not begun(out, since):
        return "before the first step"
    if hidden(out / "states"):
        return "writing a state"
    if any("adapter" in name or "checkpoint" in name for name in hidden(out)):
        return "writing the result"
    return "training" if steps_of(out) < STEPS else "after the last step"


def wait_for_a_moment(draw, out, since, seconds, process):
    """Any moment of a run; or one after a random step; or one when a state or the result is being
    written."""
    aim = draw.choice(["any", "training", "writing a state", "writing the result"])
    step = 0 if aim == "writing the result" else draw.randrange(STEPS)
    if aim == "any":
        return time.sleep(draw.uniform(0, seconds))
    while process.poll() is None and not (phase(out, since) == aim and steps_of(out) >= step):
        if begun(out, since) and (out / "summary.json").is_file():
            return
        time.sleep(0.001)
    time.sleep(draw.uniform(0, 0.02))


def kind_and_found(kinds, i):
    """What the try number i trains, and what it finds in --out."""
    return list(kinds)[i % len(kinds)], FOUND[(i + i // len(kinds)) % len(FOUND)]


def killed(folder, seconds, kinds, i, draw):
    """One try: kill -9 at a random moment, then resume. Returns what is wrong, and where it was."""
    kind, found = kind_and_found(kinds, i)
    out, whole = folder / f"{i} {kind}", prepared(folder, kind, None)
    for path in (out, resume.previous(out)):
        shutil.rmtree(path, ignore_errors=True)
    if found != "nothing":
        shutil.copytree(prepared(folder, kind, found), out)
    earlier, new = result(out), result(whole)
    argv = [*train(folder, kind), *{"an earlier run": ["--overwrite"], "nothing": [],
                                    "a stopped run": ["--resume"]}[found]]
    since, process = time.time(), start(argv, out)
    victims = workers(process) if kind in TWO else [process.pid]
    wait_for_a_moment(draw, out, since, 0.9 * seconds[kind], process)
    with suppress(ProcessLookupError):
        os.kill(draw.choice(victims), signal.SIGKILL)
    where = phase(out, since)
    try:
        _, err = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        process.terminate()
        return f"{kind}, {found}, {where}: it hangs", where
    if "exitcode" not in err if kind in TWO else process.returncode != -signal.SIGKILL:
        return AGAIN, where                                                       # it had ended
    code, line = process.returncode, err[-3000:]
    if kind not in TWO:
        where = phase(out, since)
        if result(out) not in (earlier, new, *[None] * (found != "a stopped run")):
            return f"{kind}, {found}, {where}: a mixed result, or none", where
        done = (out / "summary.json").is_file() and result(out) == new
        if found == "an earlier run" and not done and contents(
                prepared(folder, kind, found)) not in map(contents, (out, resume.previous(out))):
            return f"{kind}, {found}, {where}: the earlier result is lost", where
        again = found == "an earlier run" and result(out) == earlier
        code, line = finish([*train(folder, kind), "--overwrite" if again else "--resume"], out)
    if code:
        return f"{kind}, {found}, {where}: {line}", where
    if learnt(out) != learnt(whole) or result(out) != new:
        return f"{kind}, {found}, {where}: the resumed run is another one", where
    if rubbish := [*out.rglob(".*"), *[p for p in (resume.previous(out),) if p.exists()]]:
        return f"{kind}, {found}, {where}: left behind are {rubbish}", where
    shutil.rmtree(out)
    return GOOD, where


def workers(process, count=2):
    """The numbers of the processes, so many, that a torchrun has started."""
    while process.poll() is None:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        if len(numbers := [int(n) for n in found.stdout.split()]) == count:
            return numbers
        time.sleep(0.01)
    raise RuntimeError(process.communicate())


def signalled(folder, seconds, i, draw):
    """One try: a signal at a random moment, every second time another one soon after."""
    out, number = folder / f"signal{i}", signal.Signals[resume.SIGNALS[i % 4]]
    shutil.rmtree(out, ignore_errors=True)
    code = ("import signal, runpy, sys; sys.path.insert(0, '.'); sys.argv.pop(0)\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)       # if a shell has\n"
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)                   # ignored them\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    process = start(["-c", code, *train(folder)], out)
    log = out / "log.jsonl"
    while not log.exists() and process.poll() is None:       # until training begins
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 0.35) * seconds["pissa"])
    process.send_signal(number)
    if i % 8 > 3:
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=400)
    if process.returncode == 0 and (out / "summary.json").is_file():
        return AGAIN, number.name                                                 # it had ended
    if process.returncode not in (128 + number, -number) or "Traceback" in err:
        return f"exit code {process.returncode} of {number.name}: {err[-300:]}", number.name
    newest, steps = resume.newest(out), steps_of(out)
    if steps and (not newest or int(newest.name) != steps or not result(out)):
        return f"{steps} steps, state {newest}, result {result(out)}: {err[-300:]}", number.name
    return GOOD, number.name


def full_disk(folder, i, draw):
    """One try: a file cannot grow beyond a random size, while one of five programs writes."""
    out, whole = folder / f"disk{i}", prepared(folder, "pissa", None)
    limit, what = int(10 ** draw.uniform(2.5, 6.2)), ["train", "resume", "merge", "compress",
                                                      "eval"][i % 5]
    shutil.rmtree(out, ignore_errors=True)
    if what == "resume":
        shutil.copytree(whole, out)
        (out / "summary.json").unlink()
        argv = ["train.py", "--resume", "--steps", STEPS + 4, "--out", out]
    elif what == "train":
        argv = [*train(folder), "--out", out]
    elif what == "eval":
        out.mkdir()
        argv = ["eval.py", "--ckpt", "tiny", "--accuracy", folder / "test.jsonl",
                "--max-new-tokens", 4, "--out", out / "predictions.jsonl"]
    else:
        argv = ["convert.py", what, whole / ("adapter" if what == "compress" else ""), out]
    before, state = result(out), resume.newest(out)
    state = state and (state.name, contents(state))
    code, line = finish(argv, limit=limit)
    if code == 0:
        return AGAIN, what                                                        # there was room
    if str(out) not in line and "jsonl" not in line:
        return f"{what}, {limit} bytes: the line names no file: {line}", what
    if before != result(out) and what in ("resume", "merge", "compress"):
        return f"{what}, {limit} bytes: what was there has changed", what
    if state and contents(out / "states" / state[0]) not in (state[1], None):
        return f"{what}, {limit} bytes: a state has changed", what
    if list(out.rglob(".writing-*")) and code > 0:
        return f"{what}, {limit} bytes: rubbish is left", what
    return GOOD, what


def tried(attempt, i):
    """(what is found, where, how often it was drawn again) of the try number i."""
    for again in count():
        said, where = attempt(i, random.Random(f"{i} {again}"))
        if said != AGAIN or again == 20:
            if said != GOOD:
                print(i, said, flush=True)
            return said, where, again


def write_inputs(folder):
    """The data; the tiny checkpoint in Hugging Face's layout; a train.py that writes shards."""
    for name, lines in (("train", 32), ("test", 6)):
        text = (ROOT / f"checkpoints/tiny/{name}.jsonl").read_text().splitlines(True)[:lines]
        (folder / f"{name}.jsonl").write_text("".join(text))
    net = model.load("tiny", "cpu", torch.float32)
    write_checkpoint(folder / "hf", model.find("tiny"), net.config, net.named_parameters(),
                     torch.float32, layout="hf")
    (folder / "shards.py").write_text(SHARDS)


def main():
    """All tries, two at a time."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--torchrun", type=int, default=24)
    p.add_argument("--signals", type=int, default=40)
    p.add_argument("--disks", type=int, default=30)
    p.add_argument("--out")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        folder = Path(folder)
        write_inputs(folder)
        needed = {("pissa", None)}
        for kinds, tries in ((KINDS, args.kills), (TWO, args.torchrun)):
            for kind, found in (kind_and_found(kinds, i) for i in range(tries)):
                needed |= {(kind, None), (kind, found)}
        needed = sorted((n for n in needed if n[1] != "nothing"), key=str)
        took = pool.map(lambda n: prepare(folder, *n), needed)
        seconds = {kind: t for (kind, found), t in zip(needed, took, strict=True) if not found}
        print(f"{len(needed)} runs are prepared", seconds, flush=True)
        parts = {"kills": (args.kills, lambda i, draw: killed(folder, seconds, KINDS, i, draw)),
                 "torchrun": (args.torchrun, lambda i, draw: killed(folder, seconds, TWO, i, draw)),
                 "signals": (args.signals, lambda i, draw: signalled(folder, seconds, i, draw)),
                 "disks": (args.disks, lambda i, draw: full_disk(folder, i, draw))}
        found = {}
        for part, (tries, attempt) in parts.items():
            got = list(pool.map(lambda i, attempt=attempt: tried(attempt, i), range(tries)))
            found[part] = {"tries": Counter(said for said, *_ in got),
                           "where": Counter(where for _, where, _ in got),
                           AGAIN: sum(again for *_, again in got)}
            print(part, found[part], flush=True)
    report({"bench": "faults", "steps": STEPS, **found}, args.out)


if __name__ == "__main__":
    program(main)
