"""What eight bits cost in training: PiSSA of SmolLM2-135M on GSM8K, validation loss over seeds.

    python -m bench.bench_eight_loss --workers 6 --out bench/results/eight_loss_h200.json
    python -m bench.bench_eight_loss --ckpt tiny --data checkpoints/tiny/train.jsonl --steps 4 \\
        --rank 4 --validation 32 --batch 8 --seeds 2                                     # a trial

Every variant begins with the same A and B of a seed and sees the same batches. "e4m3, fp8.py" and
"qpissa, 8 bits" multiply as `--bits 8` does, on the tensor cores of a GPU that has them. The others
emulate: numbers are rounded by rows and multiplied in the dtype of x. A variant's name says
what is rounded: W, x, and g (dL/dy). "again" repeats the first one with another order of the
examples at each seed, so that their difference is what chance does.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import model
import pissa
from bench import NO_STATES, program, report
from train import train, validation_loss

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# name: what W, x and g are rounded to; a number of bits is an integer's
EMULATED = {"16 bits": (None, None, None), "again": (None, None, None),
            "W e4m3": (E4M3, None, None), "W, x e4m3": (E4M3, E4M3, None),
            "W, x, g e4m3": (E4M3, E4M3, E4M3), "W, x e4m3, g e5m2": (E4M3, E4M3, E5M2),
            "W, g e4m3": (E4M3, None, E4M3), "W int8": (8, None, None),
            "W, x int8": (8, 8, None), "W, x, g int8": (8, 8, 8)}
REAL = {"e4m3, fp8.py": {"quant_iters": 1, "last_svd": False}, "qpissa, 8 bits": {}}
FIRST = ["16 bits", "e4m3, fp8.py", "qpissa, 8 bits", "W, x e4m3", "W, x e4m3, g e5m2", "W e4m3",
         "W, x, g int8", "again"]


def rounded(x, kind):
    """x (n, k) with each row rounded to E4M3, E5M2 or int8."""
    if kind is None:
        return x
    largest = 127.0 if kind == 8 else torch.finfo(kind).max
    scale = (x.float().abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30)
    y = x.float() / scale
    return ((y.round() if kind == 8 else y.to(kind).float()) * scale).to(x.dtype)


class Emulated(nn.Module):
    """A frozen weight that rounds itself, what it is multiplied with, and the gradient."""
    shape = property(lambda self: self.W.shape, doc="Of W, (out, in).")
    device = property(lambda self: self.W.device, doc="Where it is.")

    def __init__(self, W, of_W, of_x, of_g):
        super().__init__()
        self.W, self.dtype, self.of_x, self.of_g = rounded(W, of_W), W.dtype, of_x, of_g
        largest = W.float().abs().amax(1) if of_g else torch.ones(len(W), device=W.device)
        self.s = (largest / 448).clamp(min=1e-30)             # multiplied into g, as in fp8.py

    def product(self, x, bias=None):
        """x W^T + bias."""
        return F.linear(rounded(x, self.of_x), self.W.to(x.dtype), bias)

    def product_T(self, g):
        """g W."""
        if self.of_g is None:
            return g @ self.W.to(g.dtype)
        return (rounded(g.float() * self.s, self.of_g) / self.s).to(g.dtype) @ self.W.to(g.dtype)


def network(base, job, args):
    """The base with the layers of a variant."""
    net = model.Llama(base.config)
    net.load_state_dict(base.state_dict(), assign=True)
    net, how = net.to(args.dtype).requires_grad_(False), REAL.get(job["variant"])
    method = "pissa" if how is None else "qpissa"
    pissa.inject(net, args.rank, method, seed=job["seed"], bits=8, progress=False, **(how or {}))
    if how is None and job["variant"] not in ("16 bits", "again"):
        for _, m in pissa.layers(net):
            W = m.frozen.detach()
            del m.frozen
            m.frozen = Emulated(W, *EMULATED[job["variant"]])
    return net.train()


def run(job, base, examples, val, args):
    """A row: the losses of one training."""
    net, start = network(base, job, args), time.perf_counter()
    order = job["seed"] + 1000 * (job["variant"] == "again")
    given = argparse.Namespace(
        **NO_STATES, method="pissa", lr=job["lr"], weight_decay=0.0, warmup=0.03, clip=1.0,
        steps=args.steps, epochs=1, batch=args.batch, micro_batch=args.batch, seed=order,
        no_packing=False, compile=False, out=Path(tempfile.mkdtemp()), checkpointing=False)
    cuda = args.device.type == "cuda"
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
    before = validation_loss(net, val, given, autocast)
    rows, stop = train(net, examples, given, autocast)
    after = validation_loss(net, val, given, autocast) if stop is None else None
    return {**job, "before": before, "after": after, "seconds": time.perf_counter() - start,
            "loss": [round(row["loss"], 4) for row in rows]}


def work(args):
    """A worker: every args.workers-th job, from the args.share-th on. Rows go to stdout's file."""
    tok = data.Tokenizer(model.find(args.ckpt))
    examples = data.encode(data.read(args.data), tok, 512)[0]
    val, examples = examples[:args.validation], examples[args.validation:]
    base = model.load(args.ckpt, args.device, args.dtype)
    for job in jobs_of(args)[args.share::args.workers]:
        row = run(job, base, examples, val, args)
        with args.file.open("a") as f:
            f.write(json.dumps(row) + "\n")
        print(f"{job['variant']}, seed {job['seed']}, {job['lr']:g}: {row['before']:.4f} -> "
              f"{row['after'] or float('nan'):.4f} in {row['seconds']:.0f} s", flush=True)


def jobs_of(args):
    """Every variant, seed and rate; seeds come first, so that an early end leaves whole rows."""
    return [{"variant": v, "seed": s, "lr": lr} for lr in args.rates for s in range(args.seeds)
            for v in args.variants]


def summary(rows):
    """{variant: mean and spread of the final loss, and of its difference to 16 bits}, at its best
    rate."""
    found = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        best = None
        for lr in {row["lr"] for row in rows}:
            mine, ours = ({row["seed"]: row["after"] for row in rows
                           if (row["variant"], row["lr"]) == (v, lr) and row["after"]}
                          for v in (name, "16 bits"))
            if not mine:
                continue
            losses, gaps = list(mine.values()), [mine[s] - ours[s] for s in mine if s in ours]
            made = {"lr": lr, "mean": statistics.mean(losses), "seeds": len(losses),
                    "sd": statistics.stdev(losses) if len(losses) > 1 else 0.0,
                    "mean_difference": statistics.mean(gaps) if gaps else None,
                    "sd_difference": statistics.stdev(gaps) if len(gaps) > 1 else None}
            best = made if best is None or made["mean"] < best["mean"] else best
        found[name] = best
    return found


def main():
    """All jobs, in several processes."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="smollm2")
    p.add_argument("--data", default="../shared/data/gsm8k/train.jsonl")
    p.add_argument("--variants", nargs="+", default=FIRST, choices=[*EMULATED, *REAL])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--steps", type=int, default=80)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--validation", type=int, default=256, help="examples, the first ones")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--out")
    p.add_argument("--share", type=int, help=argparse.SUPPRESS)
    p.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    if args.file:
        return work(args)
    args.file = Path(tempfile.mkdtemp()) / "rows.jsonl"
    args.file.touch()
    command = [sys.executable, "-m", "bench.bench_eight_loss", *sys.argv[1:], "--file",
               str(args.file), "--share"]
    workers = [subprocess.Popen([*command, str(i)]) for i in range(args.workers)]
    failed = sum(worker.wait() != 0 for worker in workers)
    rows = [json.loads(line) for line in args.file.read_text().splitlines()]
    found = summary(rows)
    for name, row in found.items():
        print(name, row)
    report({"bench": "eight_loss", "model": args.ckpt, "rank": args.rank, "steps": args.steps,
            "batch": args.batch, "validation": args.validation, "workers_failed": failed,
            "summary": found, "rows": rows}, args.out)


if __name__ == "__main__":
    program(main, clock="--file" in sys.argv)
