"""Rows of many tokens: seconds and memory of a step, kept whole, checkpointed, and offloaded.

    python -m bench.bench_long --out bench/results/long_h100.json          # on a GPU
    python -m bench.bench_long --tiny                                      # anywhere, a trial

Llama-2-7B's shape: LoRA of rank 128 in 16 bits, one row of 8192 and 32,768 tokens, and QLoRA of
rank 64 in four bits, one row of 32,768 and 131,072. Every peak stands beside what --plan says.
"""
import argparse
import copy

import torch

from bench import program
from bench.steps import attempt, fill, gib, injected, record, run_parts, sizes, trained
from support import offload, plan
from train import loss_sum

# name: (bits, rank, [(tokens, how)]); how: kept, checkpointing or offload
PARTS = {"16 bits": (16, 128, [(8192, "kept"), (8192, "checkpointing"), (8192, "offload"),
                               (32768, "checkpointing"), (32768, "offload")]),
         "4 bits": (4, 64, [(8192, "checkpointing"), (8192, "offload"), (32768, "checkpointing"),
                            (32768, "offload"), (131072, "offload")])}


def part(args, name):
    """One network, and its steps."""
    bits, rank, rows = PARTS[name]
    rank, method = 4 if args.tiny else rank, "lora" if bits == 16 else "qlora"
    before = gib("memory_allocated")
    net = fill(injected(args.seven, method, rank, 4)[0])
    plain = net.hidden

    def one(tokens, how):
        net.checkpointing, net.hidden = how != "kept", plain
        if how == "offload":
            offload.through_host_memory(net)
        given = copy.copy(args)
        given.length = tokens // 512 if args.tiny else tokens
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        job = plan.job_of(args.seven, method, rank, rows=1, length=given.length, accumulate=False,
                          checkpointing=how != "kept", offload=how == "offload")
        steps, warm = (1, 0) if tokens > 2**16 else (2, 1)          # the longest takes a minute
        figures = trained(given, args.seven, net, loss_sum, 1, steps, warm, before)
        return {**figures, "planned_gib": plan.estimate_of(job)["peak"] / 2**30}

    for tokens, how in rows:
        attempt(args, name, f"1 x {tokens}, {how}", one, tokens, how)
    record(args, name, "held", {"gib": gib("memory_allocated", before)})


def main():
    """Each part in a process of its own."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    args = sizes(p, PARTS)
    run_parts(args, {name: lambda args, name=name: part(args, name) for name in PARTS},
              "bench.bench_long", {"bench": "long"})


if __name__ == "__main__":
    program(main)
