"""What survives: kill -9, signals and full disks at random moments of real runs, on a CPU.

    python -m bench.faults --out bench/results/faults_cpu.json      # 100, 40 and 30 tries, 20 min

A killed run, resumed, must be the run that nothing killed, bit for bit: losses, adapter, moments.
An earlier result in its --out must be there, complete, before and after. A signal must leave all
that was learnt. A full disk must leave what was there, and end with a line that names the file.
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
from pathlib import Path

import torch

from bench import report
from support import files, resume

ROOT, STEPS = Path(__file__).parent.parent, 8
KINDS = {"pissa": [], "lora": ["--method", "lora"], "qpissa": ["--method", "qpissa"],
         "full": ["--method", "full"], "no packing": ["--no-packing"],
         "checkpointing": ["--checkpointing"]}
LIMITED = """import resource, runpy, signal, sys
sys.path.insert(0, '.')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (int(sys.argv.pop(1)),))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name='__main__')"""


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
    _, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, (err.strip().splitlines() or [""])[-1]


def train(folder, kind="pissa"):
    """The command line of a run of 8 steps, 3 an epoch."""
    return ["train.py", "--ckpt", "tiny", "--data", folder / "train.jsonl", "--val-fraction", 0.25,
            "--rank", 4, "--lr", 1e-3, "--batch", 8, "--max-new-tokens", 1, "--steps", STEPS,
            "--save-every", 2, *KINDS[kind]]


def contents(directory):
    """A hash of all files of a directory, None if it is absent."""
    if not directory.is_dir():
        return None
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in sorted(
        directory.rglob("*")) if p.is_file())).hexdigest()


def learnt(out):
    """Losses and gradient norms; a hash of the newest state's parameters and moments."""
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    state = torch.load(resume.newest(out) / "state.pt", weights_only=True)
    tensors = [*state["parameters"].values(), *(v for kept in state["optimizer"]["state"].values()
                                                for v in kept.values())]
    h = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors))
    return [(r["step"], r["loss"], r["grad_norm"]) for r in log], h.hexdigest()


def result(out):
    """The hash of a finished result, whatever the method."""
    for name in ("adapter", "checkpoint"):
        if (files.restored(out / name)).is_dir():
            return contents(out / name)
    return None


def killed(folder, whole, seconds, i):
    """One try: kill -9 at a random moment, then resume. Returns what went wrong, or None."""
    draw = random.Random(i)
    kind, again = list(KINDS)[i % len(KINDS)], i % 2
    out = folder / f"kill{i}"
    if again:
        shutil.copytree(whole["lora"], out)
    earlier = result(out)
    process = start([*train(folder, kind), *["--overwrite"] * again], out)
    time.sleep(draw.uniform(0.3, 1.0) * seconds[kind])
    done = process.poll() is not None
    process.kill()
    process.wait()
    finished = (out / "summary.json").is_file() and result(out) != earlier
    if again and not finished and earlier not in (result(out), result(resume.previous(out))):
        return f"{kind}: the earlier result is lost"
    if result(out) not in (None, earlier, result(whole[kind])):
        return f"{kind}: a mixed result"
    more = ["--overwrite"] if again and result(out) == earlier else ["--resume"]
    code, line = finish([*train(folder, kind), *more], out)
    if code:
        return f"{kind}: {line}"
    if learnt(out) != learnt(whole[kind]) or result(out) != result(whole[kind]):
        return f"{kind}: the resumed run is another one"
    shutil.rmtree(out)
    return None if not done else "ended before it was killed"


def signalled(folder, seconds, i):
    """One try: a signal at a random moment, every second time another one soon after."""
    draw, out = random.Random(i), folder / f"signal{i}"
    number = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1][i % 4]
    code = ("import signal, runpy, sys; sys.path.insert(0, '.'); sys.argv.pop(0)\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
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
    _, err = process.communicate(timeout=120)
    steps = len(log.read_text().splitlines())
    if process.returncode == 0 and (out / "summary.json").is_file():
        return "ended before the signal"
    if process.returncode not in (128 + number, -number) or "Traceback" in err:
        return f"exit code {process.returncode} of signal {number}: {err[-300:]}"
    newest = resume.newest(out)
    if steps and (not newest or int(newest.name) != steps or not result(out)):
        return f"{steps} steps, state {newest}, result {result(out)}: {err[-300:]}"


def full_disk(folder, whole, i):
    """One try: a file cannot grow beyond a random size, while one of five programs writes."""
    draw, out = random.Random(i), folder / f"disk{i}"
    limit, what = int(10 ** draw.uniform(2.5, 6.2)), ["train", "resume", "merge", "compress",
                                                      "eval"][i % 5]
    if what == "resume":
        shutil.copytree(whole["pissa"], out)
        (out / "summary.json").unlink()
        argv = ["train.py", "--resume", "--steps", STEPS + 4, "--out", out]
    elif what == "train":
        argv = [*train(folder), "--out", out]
    elif what == "eval":
        out.mkdir()
        argv = ["eval.py", "--ckpt", "tiny", "--accuracy", folder / "test.jsonl",
                "--max-new-tokens", 4, "--out", out / "predictions.jsonl"]
    else:
        argv = ["convert.py", what, whole["pissa"] / ("adapter" if what == "compress" else ""), out]
    before, state = result(out), resume.newest(out)
    state = state and (state.name, contents(state))
    code, line = finish(argv, limit=limit)
    if code == 0:
        return "there was room"
    if str(out) not in line and "jsonl" not in line:
        return f"{what}, {limit} bytes: the line names no file: {line}"
    if before != result(out) and what in ("resume", "merge", "compress"):
        return f"{what}, {limit} bytes: what was there has changed"
    if state and contents(out / "states" / state[0]) not in (state[1], None):
        return f"{what}, {limit} bytes: a state has changed"
    if list(out.rglob(".writing-*")) and code > 0:
        return f"{what}, {limit} bytes: rubbish is left"


def main():
    """All tries, two at a time."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100)
    p.add_argument("--signals", type=int, default=40)
    p.add_argument("--disks", type=int, default=30)
    p.add_argument("--out")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, count in (("train", 32), ("test", 6)):
            lines = (ROOT / f"checkpoints/tiny/{name}.jsonl").read_text().splitlines(True)[:count]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        whole, seconds = {kind: folder / kind.replace(" ", "-") for kind in KINDS}, {}
        for kind, out in whole.items():
            begin = time.perf_counter()
            assert finish(train(folder, kind), out)[0] == 0
            seconds[kind] = time.perf_counter() - begin
        found = {}
        for what, count, attempt in (
                ("kills", args.kills, lambda i: killed(folder, whole, seconds, i)),
                ("signals", args.signals, lambda i: signalled(folder, seconds, i)),
                ("disks", args.disks, lambda i: full_disk(folder, whole, i))):
            with ThreadPoolExecutor(2) as pool:
                said = Counter(x or "as it should be" for x in pool.map(attempt, range(count)))
            found[what] = dict(said)
            print(what, found[what], flush=True)
    report({"bench": "faults", "steps": STEPS, **found}, args.out)


if __name__ == "__main__":
    main()
