"""Several GPUs, by train.train itself: tokens a second, memory, what a state costs, a worker lost.

    python -m bench.bench_gpus --out gpus.json                           # all parts, on all GPUs
    torchrun --nproc-per-node 2 -m bench.bench_gpus --part shard --out gpus.json       # one of them

Llama-2-7B's and Llama-3-70B's shapes with random weights, rank 128 and 64, 8 x 512 random tokens a
GPU and step. "128 examples": that many in all, of lengths like GSM8K's (mean 197, a twentieth above
336), so each GPU has less to do. A part is a process group of its own. `lost` kills a worker of a
run on checkpoints/tiny. --tiny runs all of it at toy size, without GPUs.
"""
import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import model
import train
from bench import faults, program, stamped
from bench.steps import CUDA, DTYPE, SEVEN, SEVENTY, TOY, fill, gib, random_matrix
from support import options, parallel, resume

# name: (processes, None: all; steps, arguments of train.py)
PARTS = {
    "one": (1, 24, []),
    "one, compiled": (1, 24, ["--compile"]),
    "replicas": (None, 24, []),
    "replicas, compiled": (None, 24, ["--compile"]),
    "shard": (None, 24, ["--shard"]),
    "one, checkpointing": (1, 14, ["--checkpointing"]),
    "shard, compiled": (None, 24, ["--shard", "--compile"]),
    "shard, checkpointing": (None, 14, ["--shard", "--checkpointing"]),
    "one, four bits": (1, 14, ["--method", "qlora"]),
    "replicas, four bits": (None, 14, ["--method", "qlora"]),
    "shard, four bits": (None, 14, ["--method", "qlora", "--shard"]),
    "one, eight bits, compiled": (1, 24, ["--method", "qlora", "--bits", "8", "--compile"]),
    "replicas, eight bits, compiled": (None, 24, ["--method", "qlora", "--bits", "8", "--compile"]),
    "shard, eight bits, compiled": (None, 24, ["--method", "qlora", "--bits", "8", "--compile",
                                               "--shard"]),
    "one, 128 examples": (1, 12, ["--batch", "128"]),
    "replicas, 128 examples": (None, 12, ["--batch", "128"]),
    "shard, 128 examples": (None, 12, ["--batch", "128", "--shard"]),
    "states": (1, 90, ["--save-every", "30"]),
    "70B in four bits, shard": (None, 5, ["--method", "qpissa", "--quant-iters", "1", "--shard",
                                          "--checkpointing", "--rank", "64", "--micro-batch", "2"])}
ROWS, LENGTH, WARM, LOST = 8, 512, 4, "a worker lost"


def network(config, args):
    """A network of random weights, prepared as train.py does it; seconds that preparing takes."""
    seconds = {}
    with torch.device("meta"):
        net = model.Llama(config).to(DTYPE)
    shapes = {n: p.shape for n, p in net.named_parameters()}

    def read(name, leaf="weight"):
        shape = shapes[f"{name}.{leaf}"]
        return random_matrix(shape, name).to(DTYPE) if len(shape) > 1 else torch.ones(
            shape, device=args.device, dtype=DTYPE)

    whole = not parallel.SHARDED and args.method == "pissa"
    if not whole:
        train.prepare(net, args, seconds, read)
    fill(net)
    if whole:
        train.prepare(net, args, seconds)
    if parallel.SHARDED:
        parallel.shard_root(net)
    if args.compile and not parallel.MESH:
        train.compile_layers(net)
    return net, seconds["init"]


def measure(part, tiny, out):
    """Run a part in this process group; process 0 writes the figures."""
    _, steps, more = PARTS[part]
    run = tempfile.mkdtemp()
    argv = ["train.py", "--ckpt", "tiny", "--rank", "128", "--lr", "1e-5", "--steps", str(steps),
            "--micro-batch", str(ROWS), "--batch", str(ROWS * parallel.WORLD),
            "--save-every", "1000", *more, "--out", run]
    with mock.patch.object(sys, "argv", argv + ["--rank", "4"] * tiny):
        args = options.for_train("")
    args.device = parallel.start(None) or ("cuda" if CUDA else "cpu")
    args.out = parallel.agree(args.out)
    parallel.choose(args.shard if args.shard == "yes" else "no", None)
    config = SEVENTY if "70B" in part else SEVEN
    if tiny:
        config = replace(config, **TOY)
    net, init = network(config, args)
    loaded, peak_loading = gib("memory_allocated"), gib("max_memory_allocated")
    frozen = CUDA and 2**30 * loaded - sum(parallel.local(p).nbytes for p in net.parameters()
                                           if p.requires_grad)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    g, n = torch.Generator().manual_seed(0), steps * args.batch
    ids = torch.randint(3, config.vocab_size, (n, LENGTH + 1), generator=g).tolist()
    if "examples" in part:
        lengths = (5.216 + 0.366 * torch.randn(n, generator=g)).exp().long().clamp(32, LENGTH)
        ids = [row[:k + 1] for row, k in zip(ids, lengths.tolist(), strict=True)]
    times, done = [time.perf_counter()], resume.Run.done

    def timed(*given):
        found = done(*given)
        times.append(time.perf_counter())
        return found

    with mock.patch.object(resume.Run, "done", timed):
        rows, stopped = train.train(net, [(row, 1) for row in ids], args, nullcontext())
    assert not stopped and len(rows) == steps
    each = [b - a for a, b in zip(times, times[1:])]
    step = statistics.median(each[min(WARM, steps // 2):])
    memory = max(parallel.everyone(gib("max_memory_allocated")))
    if parallel.RANK:
        return parallel.end()
    found = {"gpus": parallel.WORLD, "ms": 1e3 * step, "each_ms": [1e3 * t for t in each],
             "tokens_per_second": sum(len(row) - 1 for row in ids) / steps / step,
             "peak_gib": memory, "loaded_gib": loaded,
             "peak_loading_gib": peak_loading, "frozen_bytes_per_gpu": frozen,
             "init_seconds": init, "loss": [r["loss"] for r in rows],
             "state_bytes": sum(f.stat().st_size for f in Path(run).rglob("state.pt")),
             "arguments": argv[1:-2]}
    print(part, {k: v for k, v in found.items() if k not in ("each_ms", "arguments")}, flush=True)
    whole = json.loads(out.read_text())
    whole["parts"][part] = found
    out.write_text(json.dumps(whole) + "\n")
    parallel.end()


def launcher(processes, *more):
    """Words after python that run what follows them in so many processes."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
            *more] if processes > 1 else []


def lost(gpus):
    """What becomes of a run whose worker is killed, and of a stopped run on half of the GPUs.

    {"one": greatest difference between the losses of all processes and of one, "killed after": the
    step, "seconds until the next step", "restarted", "resumed": the same difference of a run that
    --max-restarts saved, and of one that goes on with half of the processes}
    """
    folder, steps = Path(tempfile.mkdtemp()), 40
    flags = ["train.py", "--ckpt", "tiny", "--data", f"{options.tiny()}/train.jsonl", "--rank", 16,
             "--lr", 1e-3, "--steps", steps, "--batch", 32, "--save-every", 5,
             "--max-new-tokens", 1, *["--device", "cpu"] * (not CUDA)]

    def whole(name, processes, *more):
        code, line = faults.finish([*launcher(processes), *flags, *more], folder / name)
        assert code == 0, line

    def after(name, count, *more):
        """A run that has made so many steps."""
        run = faults.start([*launcher(gpus, *more), *flags], folder / name)
        wait(run, name, count)
        return run

    def wait(run, name, count):
        while faults.steps_of(folder / name) < count:
            assert run.poll() is None, run.communicate()
            time.sleep(0.01)
        return time.perf_counter()

    def losses(name):
        log = (folder / name / "log.jsonl").read_text()
        return [json.loads(line)["loss"] for line in log.splitlines()]

    def apart(name, first=steps):
        pairs = zip(losses(name), losses("all"), strict=True)
        return max(abs(a - b) for a, b in list(pairs)[:first])

    whole("all", gpus)
    whole("one", 1)
    run = after("killed", 12, "--max-restarts", "1")
    killed, at = faults.steps_of(folder / "killed"), time.perf_counter()
    os.kill(faults.workers(run, gpus)[-1], signal.SIGKILL)
    seconds = wait(run, "killed", killed + 1) - at
    _, line = run.communicate()
    assert run.returncode == 0, line
    run = after("stopped", 12)
    run.send_signal(signal.SIGTERM)
    run.communicate()
    whole("stopped", gpus // 2, "--resume")
    return {"gpus": gpus, "one": apart("one", 10), "killed after": killed,
            "seconds until the next step": seconds, "restarted": apart("killed"),
            "resumed": apart("stopped")}


def main():
    """All parts, each in processes of its own; or one, in these processes."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", choices=PARTS)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--only", action="append", help="of all parts, this one; repeatable")
    p.add_argument("--tiny", action="store_true")
    args = p.parse_args()
    if args.part:
        return measure(args.part, args.tiny, args.out)
    gpus = torch.cuda.device_count() or 2
    stamped({"bench": "gpus", "gpus": gpus, "length": LENGTH, "rows": ROWS, "parts": {}},
            str(args.out))
    for part in args.only or [*PARTS, LOST]:
        if part == LOST:
            whole = json.loads(args.out.read_text())
            args.out.write_text(json.dumps({**whole, LOST: lost(gpus)}) + "\n")
            continue
        done = subprocess.run([sys.executable, *launcher(PARTS[part][0] or gpus), "-m",
                               "bench.bench_gpus", "--part", part, "--out", args.out,
                               *["--tiny"] * args.tiny],
                              timeout=400, capture_output=True, text=True)
        print(done.stdout[-1500:], "" if done.returncode == 0 else done.stderr[-3000:], flush=True)


if __name__ == "__main__":
    program(main)
