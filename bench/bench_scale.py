"""How time and memory grow: decomposition, a training step, and what plan.py expects of it.

    python -m bench.bench_scale --out bench/results/scale_h200.json

init   seconds of pissa.inject against the rank, the width of a square matrix, how many there are
step   seconds and peak memory of a step against the rank, the length of one row, the depth; each
       in bfloat16, checkpointed and not, and in four bits, beside the planned peak (lora and qlora:
       what A and B start from changes neither)

The shapes are Llama-2-7B's with few layers and random weights. `--tiny`: toy sizes, on a CPU too.
"""
import argparse
import gc
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import nn

import model
import pissa
import plan
from bench import report
from bench.steps import CUDA, DEVICE, clock, gib, trained
from train import loss_sum

KINDS = {"bfloat16": ("lora", False), "bfloat16, checkpointing": ("lora", True),
         "four bits": ("qlora", False), "four bits, checkpointing": ("qlora", True)}
# What is varied, and where the rest stands meanwhile; in full, and for a trial.
FULL = SimpleNamespace(
    ranks=(1, 4, 16, 64, 256), widths=(512, 1024, 2048, 4096, 8192), counts=(1, 2, 4, 8, 16, 32),
    lengths=(512, 1024, 2048, 4096, 8192), depths=(1, 2, 4, 8, 16, 32), rank=64, width=4096,
    length=4096, config=model.Config(n_layers=4))
TINY = SimpleNamespace(
    ranks=(1, 4, 8), widths=(64, 128), counts=(1, 2), lengths=(32, 64), depths=(1, 2), rank=4,
    width=64, length=32, config=model.Config(dim=64, n_layers=2, n_heads=4, n_kv_heads=2,
                                             vocab_size=128, ffn_dim=192))


def init_seconds(width, count, rank):
    """Seconds that pissa.inject takes for `count` square matrices in bfloat16, checks included."""
    with torch.device(DEVICE):
        net = nn.Sequential(*(nn.Sequential() for _ in range(count)))
        for i, part in enumerate(net):
            part.q_proj = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    start = clock()
    pissa.inject(net, rank, targets=("q_proj",), keep_base=False, progress=False)
    return clock() - start


def inits(size):
    """Rows of `init`, the first of each shape after one that is not timed."""
    rows = []
    for axis, values in ("rank", size.ranks), ("width", size.widths), ("matrices", size.counts):
        for value in values:
            job = {"rank": size.rank, "width": size.width, "matrices": 4, axis: value}
            warm, seconds = (init_seconds(job["width"], job["matrices"], job["rank"])
                             for _ in range(2))
            rows.append({"axis": axis, "value": value, **job, "seconds": seconds, "first": warm})
            print(rows[-1], flush=True)
    return rows


def step(size, kind, axis, value):
    """One row of `step`: seconds, measured and planned peak."""
    method, checkpointing = KINDS[kind]
    config = replace(size.config, **({"n_layers": value} if axis == "depth" else {}))
    rank, length = (value if axis == name else getattr(size, name) for name in ("rank", "length"))
    job = plan.Job(config, method, rank, rows=1, length=length, checkpointing=checkpointing,
                   accumulate=False)
    with torch.device(DEVICE):
        net = model.init_weights(model.Llama(config).to(torch.bfloat16))
    pissa.inject(net, rank, method, keep_base=False, progress=False)
    net.checkpointing = checkpointing
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    done = trained(SimpleNamespace(length=length), config, net, loss_sum, 1, 5, 2)
    moments = plan.memory(job)[2]
    planned = max(size for when, size in moments.items() if when != "loading")
    row = {"axis": axis, "value": value, "kind": kind, "seconds": done["step_seconds"],
           "peak_gib": done["peak_gib"], "planned_gib": planned / 2**30,
           "flops": sum(plan.flops(job)[k] for k in ("forward", "backward", "recomputation"))
           * job.tokens}
    print(row, flush=True)
    return row


def main():
    """All rows, and how far the plan was off."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a trial on a CPU")
    p.add_argument("--out")
    args = p.parse_args()
    size, start = TINY if args.tiny else FULL, clock()
    result = {"bench": "scale", "shape": vars(size.config), "rank": size.rank,
              "length": size.length, "width": size.width, "init": inits(size)}
    step(size, "bfloat16", "rank", 1)                        # cuBLAS allocates its workspaces
    result["step"] = [step(size, kind, axis, value) for axis, values in (
        ("rank", size.ranks), ("length", size.lengths), ("depth", size.depths))
        for value in values for kind in KINDS]
    ratios = [r["planned_gib"] / r["peak_gib"] for r in result["step"] if CUDA] or [0.0]
    report({**result, "planned_over_measured": [min(ratios), max(ratios)],
            "seconds": clock() - start, "gib_left": gib("memory_allocated")}, args.out)


if __name__ == "__main__":
    main()
