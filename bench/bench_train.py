"""A training step of Llama-2-7B's shape in bfloat16, rank 128, 8 x 512 tokens, beside PEFT's.

    python -m bench.bench_train --out bench/results/step_h200.json               # minutes, on a GPU
    OMP_NUM_THREADS=1 python -m bench.bench_train                      # SmolLM2, 8 x 128, rank 16
    python -m bench.bench_train --tiny                                           # anywhere, a trial

Eager, checkpointing and compiled; seconds, tokens per second, peak memory, the time to compile, and
losses, which begin alike. What is compared with what, and on which numbers: see steps.py.
"""
import argparse
import sys

from bench import program
from bench.steps import CUDA, run_parts, sizes, step

PARTS = {"step": step}


def main():
    """The step in 16 bits."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    args = sizes(p, PARTS)
    args.rank, args.bits = 8 if args.tiny else 128 if CUDA else 16, 16
    run_parts(args, PARTS, "bench.bench_train",
              {"bench": "train", "rank": args.rank, "length": args.length})


if __name__ == "__main__":
    program(main, clock="--file" in sys.argv)
