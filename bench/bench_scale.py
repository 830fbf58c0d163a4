"""How time and memory grow: decomposition, a training step, and what plan.py expects of it.

    python -m bench.bench_scale --device cuda --out bench/results/scale_h200.json

seven  peak memory of a step of Llama-2-7B's shape, and of making it in four bits
step   seconds and peak memory of a step against the rank, the length of one row, the depth; each
       in bfloat16 and in four bits, checkpointed and not, beside the planned peak (lora and qlora:
       what A and B start from changes neither)
init   seconds of pissa.inject against the rank, the width of a square matrix, how many there are

The weights are random, and all rows are full; steps are those of train.train. --out is written
after every measurement. `--tiny`: toy sizes, on a CPU, too; there no memory is measured.
"""
import argparse
import gc
import statistics
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import model
import pissa
import train
from bench import NO_STATES, program, stamped
from bench.steps import CUDA, DEVICE, SEVEN, TOY, clock, fill, gib, injected
from support import plan

# What is varied, and the values of all else meanwhile: in full, and for a trial.
FULL = SimpleNamespace(
    ranks=(1, 4, 16, 64, 256), lengths=(512, 1024, 2048, 4096, 8192), depths=(1, 2, 4, 8, 16),
    widths=(512, 1024, 2048, 4096, 8192), counts=(1, 2, 4, 8, 16), rank=64, width=4096,
    length=2048, seven=SEVEN, config=replace(SEVEN, n_layers=4), sevens=(128, 64), short=512)
TINY = SimpleNamespace(
    ranks=(1, 4, 8), lengths=(32, 64), depths=(1, 2), widths=(64, 128), counts=(1, 2), rank=4,
    width=64, length=32, seven=model.Config(**TOY), config=model.Config(**TOY), sevens=(8, 4),
    short=16)


def network(config, method, rank):
    """A network with random weights, ready for training; frees what is no longer used before."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return fill(injected(config, method, rank)[0])


def measured(figure, planned):
    """A planned peak, given in bytes, in GiB; on a GPU beside the measured one."""
    row = {"planned_gib": planned / 2**30}
    if CUDA:
        row |= {figure: gib("max_memory_allocated")}
        row |= {"planned_over_measured": row["planned_gib"] / row[figure]}
    return row


def step(net, method, rank, rows, length, checkpointing, compiled=False, steps=4):
    """Seconds, measured and planned peak of steps of one micro-batch, as train.py takes them."""
    job = plan.job_of(net.config, method, rank, rows=rows, length=length,
                      checkpointing=checkpointing, compiled=compiled, accumulate=False)
    net.checkpointing = checkpointing
    if compiled:
        train.compile_layers(net)
    generator = torch.Generator().manual_seed(0)
    examples = [(torch.randint(net.config.vocab_size, (length + 1,), generator=generator).tolist(),
                 1) for _ in range(rows)]
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as scratch:
        args = SimpleNamespace(batch=rows, micro_batch=rows, no_packing=False, lr=1e-5,
                               weight_decay=0.0, warmup=0.0, clip=1.0, seed=0, epochs=1,
                               steps=steps, out=Path(scratch), method=method, **NO_STATES)
        done, stopped = train.train(net, examples, args, nullcontext())
    assert not stopped, stopped
    net.zero_grad()
    moments, flops = plan.memory(job)[2], plan.flops_in_all(job) * job.tokens
    return {"method": method, "rank": rank, "layers": net.config.n_layers, "rows": rows,
            "length": length, "checkpointing": checkpointing, "compiled": compiled,
            "seconds": statistics.median(r["seconds"] for r in done[1:]), "flops": flops,
            **measured("peak_gib", max(v for k, v in moments.items() if k != "loading"))}


def sevens(size):
    """Steps of the whole network: 8 rows in bfloat16, one row in four bits, each in three ways."""
    for (method, rows), rank in zip((("lora", 8), ("qpissa", 1)), size.sevens):
        net = network(size.seven, method, rank)
        if method == "qpissa":
            job = plan.job_of(size.seven, method, rank)
            yield {"method": method, "rank": rank, "layers": size.seven.n_layers,
                   **measured("loading_gib", plan.memory(job)[2]["loading"])}
        for checkpointing, compiled in (False, False), (True, False), (False, True):
            yield step(net, method, rank, rows, size.short, checkpointing, compiled)
        del net


def steps(size):
    """Steps of one row against rank, length and depth."""
    for method in ("lora", "qlora"):
        for axis, values in ("rank", size.ranks), ("depth", size.depths):
            for value in values:
                config = replace(size.config, n_layers=value) if axis == "depth" else size.config
                rank = value if axis == "rank" else size.rank
                net = network(config, method, rank)
                for checkpointing in (False, True):
                    yield {"axis": axis, "value": value,
                           **step(net, method, rank, 1, size.length, checkpointing)}
                del net
        net = network(size.config, method, size.rank)
        for length in size.lengths:
            for checkpointing in (False, True):
                yield {"axis": "length", "value": length,
                       **step(net, method, size.rank, 1, length, checkpointing)}
        del net


def init_seconds(width, count, rank):
    """Seconds that pissa.inject takes for `count` square matrices in bfloat16, checks included."""
    with torch.device(DEVICE):
        net = nn.Sequential(*(nn.Sequential() for _ in range(count)))
        for part in net:
            part.q_proj = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    start = clock()
    pissa.inject(net, rank, targets=("q_proj",), keep_base=False, progress=False)
    return clock() - start


def inits(size):
    """Decompositions, each after one that is not timed."""
    for axis, values in ("rank", size.ranks), ("width", size.widths), ("matrices", size.counts):
        for value in values:
            job = {"rank": size.rank, "width": size.width, "matrices": 4, axis: value}
            first, seconds = (init_seconds(job["width"], job["matrices"], job["rank"])
                              for _ in range(2))
            yield {"axis": axis, "value": value, **job, "seconds": seconds, "first": first}


def main():
    """All rows, and how far the plan was off."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a trial on a CPU")
    p.add_argument("--device", choices=[DEVICE.type], default=DEVICE.type, help="the one there is")
    p.add_argument("--seconds", type=float, default=230, help="begin nothing new after so many")
    p.add_argument("--out")
    args = p.parse_args()
    size, begin, result = TINY if args.tiny else FULL, clock(), {"bench": "scale"}
    for part, rows in ("seven", sevens), ("step", steps), ("init", inits):
        result[part] = []
        for row in rows(size):
            result[part].append(row)
            print(f"{clock() - begin:5.0f} s  {part}: " + ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                flush=True)
            result["seconds"] = clock() - begin
            stamped(result, args.out)
            if result["seconds"] > args.seconds:
                break
    ratios = [row["planned_over_measured"] for part in ("seven", "step") for row in result[part]
              if CUDA] or [0.0]
    print(f"planned / measured: {min(ratios):.3f} to {max(ratios):.3f}; {clock() - begin:.0f} s")


if __name__ == "__main__":
    program(main)
