"""The demo with every method at every learning rate: which is best, and how sure can one be?

    python -m bench.bench_demo --device cuda --jobs 10 --out bench/results/demo_h200.json
    python -m bench.bench_demo --rates pissa=1e-3 lora=4e-3 full=2.5e-4 --jobs 2 --out ...
    python -m bench.bench_demo --train "--data gsm8k/train.jsonl ..." --ckpt smollm2 \
        --test gsm8k/test.jsonl --out ...

Runs the demo (train.py without --ckpt, in float32), or what --train spells out followed by eval.py
on --test, for pissa, lora and full, over learning rates and seeds; a seed changes the random
numbers of the method, the order of the data and, in --train, the validation examples. Each method's
own best rate is the one with the highest mean accuracy on the held-out problems; with --train, the
one with the lowest mean validation loss, which asks nothing of the test problems.
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import program, report

RATES = {"pissa": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3], "lora": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
         "full": [6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3]}


def lines(path):
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(method, lr, seed, args):
    """One run of the demo; its accuracy, losses and time."""
    out = Path(args.scratch) / f"{method}-{lr:g}-{seed}"
    task = ["--ckpt", args.ckpt, *shlex.split(args.train)] if args.train else [
        "--dtype", "float32"]
    flags = ["--method", method, "--lr", str(lr), "--seed", str(seed), "--out", str(out),
             "--device", args.device, *task]
    done, env = None, {**os.environ, "OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
    if args.gpus > 1:
        env["CUDA_VISIBLE_DEVICES"] = threading.current_thread().name.rpartition("_")[2]
    if not (out / "summary.json").exists():                # a sweep that was interrupted goes on
        done = subprocess.run([sys.executable, "train.py", *flags], capture_output=True, text=True,
                              env=env)
    if args.test and not (done and done.returncode) and not (out / "test.jsonl").exists():
        weights = ["--ckpt", str(out / "checkpoint")] if method == "full" else [
            "--ckpt", args.ckpt, "--adapter", str(out / "adapter")]
        done = subprocess.run(
            [sys.executable, "eval.py", *weights, "--accuracy", args.test, "--batch", "256",
             "--device", args.device, "--out", str(out / "test.jsonl")], capture_output=True,
            text=True, env=env)
    if done and done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        print(f"{method:6s} lr {lr:<7g} seed {seed}: failed, {reason}", flush=True)
        return {"method": method, "lr": lr, "seed": seed, "failed": reason}
    summary = json.loads((out / "summary.json").read_text())
    log, accuracy = lines(out / "log.jsonl"), summary["after"]["accuracy"]
    if args.test:
        accuracy = statistics.mean(row["correct"] for row in lines(out / "test.jsonl"))
    print(f"{method:6s} lr {lr:<7g} seed {seed}: validation loss {summary['after']['loss']:.4f}"
          + (f", accuracy {accuracy:.3f}" if accuracy is not None else ""), flush=True)
    return {"method": method, "lr": lr, "seed": seed, "accuracy": accuracy,
            "val_loss_before": summary["before"]["loss"], "val_loss": summary["after"]["loss"],
            "seconds": summary["seconds"]["all"], "train_seconds": summary["seconds"]["train"],
            "tokens_per_second": summary["tokens_per_second"],
            "peak_gpu_gib": summary["peak_gpu_bytes"] / 2**30,
            "losses": [round(row["loss"], 4) for row in log]}


def main():
    """All runs, then each method's best rate."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time")
    p.add_argument("--gpus", type=int, default=1, help="more than one: a run on each at a time")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rates", nargs="+", metavar="METHOD=LR,LR", help="instead of all of them")
    p.add_argument("--train", help="flags of train.py, instead of the demo")
    p.add_argument("--ckpt", help="with --train: the base")
    p.add_argument("--test", help="with --train: jsonl of problems for eval.py --accuracy")
    p.add_argument("--scratch", default="runs/bench-demo")
    p.add_argument("--out")
    args, rates = p.parse_args(), RATES
    if args.rates:
        rates = {m: [float(lr) for lr in text.split(",")]
                 for m, text in (word.split("=") for word in args.rates)}
    with ThreadPoolExecutor(max(args.jobs, args.gpus)) as pool:
        jobs = [pool.submit(run, m, lr, s, args) for m in rates for lr in rates[m]
                for s in range(args.seeds)]
        rows = [job.result() for job in jobs]
    failed = {(r["method"], r["lr"]) for r in rows if "failed" in r}
    rates = {m: [lr for lr in rates[m] if (m, lr) not in failed] for m in rates}
    best, key = {}, "val_loss" if args.train else "accuracy"
    for m in filter(rates.get, rates):
        def mean(key, lr, m=m):
            return statistics.mean(r[key] for r in rows if (r["method"], r["lr"]) == (m, lr))
        lr = (min if args.train else max)(rates[m], key=lambda lr: mean(key, lr))
        best[m] = {"lr": lr, "val_loss": mean("val_loss", lr)}
        scores = [r["accuracy"] for r in rows if (r["method"], r["lr"]) == (m, lr)]
        if None not in scores:                     # without --test, losses alone are compared
            best[m] |= {"accuracy": mean("accuracy", lr), "spread": max(scores) - min(scores)}
        print(f"{m}: best {best[m]}")
    report({"bench": "demo", "best_by": key, "best": best, "runs": rows}, args.out)


if __name__ == "__main__":
    program(main)
