"""Four bits on a GPU: the kernel, a training step, 7B within 11 GiB, 70B on one GPU.

    python -m bench.bench_4bit --parts kernel step memory --out bench/results/nf4_h200.json
    python -m bench.bench_4bit --parts seventy --out bench/results/nf4_70b_h200.json

kernel   unpacking W, and packing it, beside bitsandbytes; whether both have the same bits
step     a QLoRA step of Llama-2-7B beside PEFT on bitsandbytes: the same weights, tokens and loss
memory   Llama-2-7B, QPiSSA, one sequence of 512 tokens: peak memory from the start of a process
seventy  Llama-3-70B, QPiSSA, made and decomposed matrix by matrix on one GPU, then trained
exact    beside that, the authors' route: exact SVDs, timed once a shape, times 5 turns, times 560

`--tiny` runs everything at toy size, without a GPU too. For the rest see bench/steps.py.
"""
import argparse
import math
import statistics
import sys
import time
from collections import Counter

import torch

import model
import nf4
import pissa
from bench import program
from bench.steps import (
    CUDA,
    SEVENTY,
    TURNS,
    attempt,
    clock,
    fill,
    gib,
    graphs,
    injected,
    random_matrix,
    record,
    run_parts,
    sizes,
    step,
    trained,
)
from train import loss_sum

SHAPES = [(4096, 4096), (4096, 11008), (8192, 28672)]


def gpu_seconds(f, n=60):
    """Median seconds that f(0), f(1), ... take the GPU, mean seconds that one takes the host."""
    for i in range(20):
        f(i)
    if not CUDA:
        start = clock()
        f(0)
        return (clock() - start,) * 2
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    start = clock()
    torch.cuda._sleep(400_000_000)                # all wait behind this: no launch is waited for
    for i, (before, after) in enumerate(marks):
        before.record()
        f(i)
        after.record()
    host = time.perf_counter() - start
    clock()
    return statistics.median(a.elapsed_time(b) for a, b in marks) / 1e3, host / n


# ------------------------------------------------------------------------------------------- parts

def packed(W, double):
    """What bitsandbytes makes of W: codes and a state."""
    from bitsandbytes.functional import quantize_4bit
    return quantize_4bit(W, blocksize=64, compress_statistics=double, quant_type="nf4")


def speed(shape, double):
    """Unpacking and packing, ours and theirs, of so many matrices in turn that no cache has any."""
    from bitsandbytes.functional import dequantize_4bit
    copies = max(2, round(6e8 / (2.6 * math.prod(shape)))) if CUDA else 2
    W = [random_matrix(shape, f"{shape} {i}") for i in range(copies)]
    Q, theirs, start = [nf4.quantize(w, double) for w in W], [packed(w, double) for w in W], clock()
    out = [Q[0].dequantize(), *[None] * (copies - 1)]             # outputs are kept for a turn
    row = {"first_call_seconds": clock() - start, "copies": copies}

    def turn(unpack):
        def run(i):
            out[i % copies] = None
            out[i % copies] = unpack(i % copies)
        return run

    unpack = {"ours": lambda i: Q[i].dequantize(), "theirs": lambda i: dequantize_4bit(*theirs[i])}
    pack = {"ours": nf4.quantize, "theirs": packed}
    for who in unpack:
        seconds, host = gpu_seconds(turn(unpack[who]))
        times = []
        for _ in range(6):
            pack[who](W[0], double)
            times.append(clock())
        row |= {f"{who}_us": 1e6 * seconds, f"{who}_host_us": 1e6 * host,
                f"{who}_gb_per_second": (Q[0].nbytes + W[0].nbytes) / seconds / 1e9,
                f"{who}_quantise_us": 1e6 * statistics.median(
                    b - a for a, b in zip(times, times[1:]))}
    return row | {"theirs_over_ours": row["theirs_us"] / row["ours_us"], "graphs": graphs()}


def bits(shape, kind, dtype, double):
    """How many codes, absmax, scales differ from bitsandbytes', and how far apart W is then."""
    from bitsandbytes.functional import dequantize_4bit
    W = random_matrix(shape, kind).to(dtype)
    if kind == "outliers":
        W.view(-1)[::997] *= 1000
    elif kind != "normal":
        W.fill_({"zeros": 0.0, "constants": 0.37}[kind])
    Q, (codes, state) = nf4.quantize(W, double), packed(W, double)
    theirs = [codes, state.absmax, *([state.state2.absmax, state.offset] if double else [])]
    apart = Q.dequantize().float() - dequantize_4bit(codes, state).float()
    return {f"{name}_differ": int((mine.flatten() != other.flatten()).sum())
            for (name, mine), other in zip(Q.named_parameters(), theirs)} | {
                "max_difference": apart.abs().max().item()}


def kernel(args):
    """Speed at every shape; bits at one."""
    shapes = [(64, 64), (64, 192)] if args.tiny else SHAPES
    for double in (False, True):
        how = "double" if double else "single"
        for m, n in shapes:
            attempt(args, "kernel", f"{m} x {n}, {how}", speed, (m, n), double)
        for kind in ("normal", "outliers", "zeros", "constants"):
            for dtype in (torch.float32, torch.bfloat16):
                attempt(args, "bits", f"{kind}, {dtype}, {how}", bits, shapes[1], kind, dtype,
                        double)


def stream(args):
    """memory and seventy: a network made and decomposed matrix by matrix, then trained."""
    part = args.parts[0]
    config = args.seven if part == "memory" else args.seventy
    net, making, working = injected(config, "qpissa", args.rank)
    size = sum(t.nbytes for t in (*net.parameters(), *net.buffers()) if not t.is_meta) / 2**30
    record(args, part, "decomposition", {
        "matrices": len(list(pissa.layers(net))), "making_seconds": making, "seconds": working,
        "finished_gib": size, "peak_gib": gib("max_memory_allocated"),
        "peak_over_finished_gib": gib("max_memory_allocated", size)})
    fill(net).checkpointing = True
    size = sum(t.nbytes for t in (*net.parameters(), *net.buffers())) / 2**30
    record(args, part, "model", {"gib": size, "peak_gib": gib("max_memory_allocated")})
    attempt(args, part, f"1 x {args.length}, checkpointing", trained, args, config, net, loss_sum,
            1, 10 if part == "memory" else 5)


def exact(args):
    """What TURNS exact SVDs of every matrix of seventy take, with torch's own choice of driver."""
    with torch.device("meta"):
        found = pissa.find_linears(model.Llama(args.seventy), pissa.TARGETS)
    total, counts = 0.0, Counter(tuple(sorted(m.weight.shape)[::-1]) for m in found.values())
    torch.linalg.svd(random_matrix((64, 64), "warm-up").float())
    for shape in sorted(counts):
        W, start = random_matrix(shape, "exact").float(), clock()
        torch.linalg.svd(W, full_matrices=False)
        seconds = clock() - start
        total += seconds * TURNS * counts[shape]
        record(args, "exact", "{} x {}".format(*shape), {
            "seconds": seconds, "matrices": counts[shape], "extrapolated_so_far_seconds": total})


PARTS = {"kernel": kernel, "step": step, "memory": stream, "seventy": stream, "exact": exact}


def arguments():
    """What was asked for."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    args = sizes(p, PARTS)
    args.seventy, args.rank, args.bits = args.cut(SEVENTY), 8 if args.tiny else 64, 4
    return args


if __name__ == "__main__":
    program(lambda: run_parts(arguments(), PARTS, "bench.bench_4bit", {"bench": "4bit"}),
            clock="--file" in sys.argv)
