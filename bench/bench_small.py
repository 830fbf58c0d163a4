"""200 examples or fewer: which batch, learning rate and epochs? The demo's model and problems.

    OMP_NUM_THREADS=1 python -m bench.bench_small --out bench/results/small_cpu.json

Trains on the first 200 examples of checkpoints/tiny/train.jsonl, PiSSA at rank 16, two seeds, and
on the first 20 and 80. Loss on the last 200, accuracy on the first 100 of the test problems. The
first row of each is what the defaults of train.py do.
"""
import argparse
import statistics
import tempfile
from contextlib import nullcontext

import data
import model
import pissa
import train
from bench import NO_STATES, program, report
from eval import accuracy
from support import options

SETTINGS = [(128, 2e-5, 1), (16, 1e-3, 1), (16, 2e-4, 3), (16, 1e-3, 3), (16, 3e-3, 3),
            (16, 1e-3, 10), (8, 2e-4, 3), (8, 1e-3, 3), (8, 3e-3, 3), (8, 1e-3, 10)]
FEWER = {n: [(128, 2e-5, 1), (4, 1e-3, 3), (4, 1e-3, 10), (4, 1e-3, 30), (8, 1e-3, 10),
             (8, 1e-3, 30), (16, 1e-3, 10)] for n in (20, 80)}


def run(examples, val, test, tok, setting, seed):
    """One training: its numbers."""
    batch, lr, epochs = setting
    args = options.train_parser("").parse_args(
        f"--ckpt tiny --rank 16 --batch {batch} --lr {lr} --epochs {epochs} --seed {seed}".split())
    net = model.load("tiny", "cpu")
    pissa.inject(net, args.rank, args.method, seed=seed, niter=args.niter, progress=False)
    with tempfile.TemporaryDirectory() as out:
        vars(args).update(NO_STATES, out=options.Path(out))
        rows, _ = train.train(net, examples, args, nullcontext())
    row = {"examples": len(examples), "batch": batch, "lr": lr, "epochs": epochs, "seed": seed,
           "steps": len(rows),
           "loss": train.validation_loss(net, val, args, nullcontext()),
           "accuracy": accuracy(net, tok, test, max_new_tokens=64)[0]}
    print(row, flush=True)
    return row


def main():
    """All settings."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--examples", type=int, nargs="+", default=[200, *FEWER], metavar="N")
    p.add_argument("--out")
    asked, tok = p.parse_args(), data.Tokenizer(model.find("tiny"))
    texts, test = (data.read(f"{options.tiny()}/{n}.jsonl") for n in ("train", "test"))
    examples, val = (data.encode(part, tok, 512)[0] for part in (texts[:200], texts[-200:]))
    todo = [(n, setting) for n, settings in {200: SETTINGS, **FEWER}.items() for setting in settings
            if n in asked.examples]
    rows, means = [], []
    for n, setting in todo:
        same = [run(examples[:n], val, test[:100], tok, setting, seed)
                for seed in range(asked.seeds)]
        rows += same
        means.append({**{key: same[0][key] for key in (
            "examples", "batch", "lr", "epochs", "steps")}, **{
            key: statistics.mean(r[key] for r in same) for key in ("loss", "accuracy")}})
    report({"bench": "small", "means": means, "runs": rows}, asked.out)


if __name__ == "__main__":
    program(main)
