"""NF4's rounding as one kernel of triton, beside nf4.quantize: the same bits, and its time.

    python -m bench.bench_rounding --out bench/results/rounding_h200.json         # on a GPU
    TRITON_INTERPRET=1 python -m bench.bench_rounding --tiny                       # anywhere

To be moved into nf4.py if it pays: QPiSSA of 70B rounds 560 matrices five times.
"""
import argparse
import functools

import torch

import nf4
from bench import program, report, steps
from bench.bench_inject import seconds_of


@functools.cache
def kernel():
    """Codes, two a byte, and absmax of N blocks of 64 at a time."""
    import triton
    from triton import language as tl

    @triton.jit
    def rounded(x, halfway, codes, absmax, n, N: tl.constexpr):
        block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        at = block[:, None] * 64 + tl.arange(0, 64)[None]
        y = tl.load(x + at, at < n, 0).to(tl.float32)
        largest = tl.max(tl.abs(y), 1)
        one, tiny = tl.full([N], 1.0, tl.float32), tl.full([N], 1e-38, tl.float32)
        scaled = y * tl.div_rn(one, tl.maximum(largest, tiny))[:, None]
        code = tl.zeros([N, 64], tl.int32)
        for i in tl.static_range(15):
            code += (scaled > tl.load(halfway + i)).to(tl.int32)
        high, low = tl.split(tl.reshape(code, [N, 32, 2]))
        to = block[:, None] * 32 + tl.arange(0, 32)[None]
        tl.store(codes + to, ((high << 4) | low).to(tl.uint8), to < (n + 1) // 2)
        tl.store(absmax + block, largest + tl.sum(y * 0, 1), block * 64 < n)     # NaN, Inf: seen

    return rounded


def quantize(W, double=True, N=16, warps=4):
    """nf4.quantize of a W on one GPU."""
    flat, n = W.reshape(-1), W.numel()
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=W.device)
    absmax = torch.empty(-(-n // 64), dtype=torch.float32, device=W.device)
    halfway, halfway_absmax = (((levels[:-1] + levels[1:]) / 2).to(W.device)
                               for levels in (nf4.LEVELS, nf4.ABSMAX_LEVELS))
    kernel()[-(-len(absmax) // N),](flat, halfway, codes, absmax, n, N, num_warps=warps)
    if not absmax.isfinite().all():
        raise ValueError("the matrix holds NaN or Inf")
    if not double:
        return nf4.NF4(W, codes, absmax)
    mean = absmax.double().mean().float()
    found, scale = nf4.nearest(absmax - mean, halfway_absmax, nf4.ABSMAX_BLOCK)
    return nf4.NF4(W, codes, found.flatten()[:len(absmax)].to(torch.uint8), scale, mean.view(1))


def differ(W, double):
    """How many numbers of any part differ from nf4.quantize's."""
    pairs = zip(quantize(W, double).parameters(), nf4.quantize(W, double).parameters(), strict=True)
    return sum(int((a != b).sum()) for a, b in pairs)


def main():
    """Bits, seconds, and what a NaN does."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true")
    p.add_argument("--out")
    args, rows = p.parse_args(), {}
    shapes = [(8, 24), (3, 5), (64, 64)] if args.tiny else [(4096, 4096), (11008, 4096),
                                                           (8192, 28672), (3, 5), (1001, 77)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            W = steps.random_matrix(shape, f"{shape}").to(dtype)
            W.view(-1)[::97] *= 30
            row = {"differ": [differ(W, double) for double in (False, True)]}
            if W.numel() > 2**20:
                row["nf4"] = seconds_of(lambda W=W: nf4.quantize(W), 7)
                for N in (4, 16, 64):
                    for warps in (2, 4, 8):
                        row[f"{N} blocks, {warps} warps"] = seconds_of(
                            lambda W=W, N=N, warps=warps: quantize(W, True, N, warps), 7)
            rows[f"{shape[0]} x {shape[1]}, {dtype}"] = row
            print(shape, dtype, row, flush=True)
    for bad in (float("nan"), float("inf")):
        W = torch.randn(64, 64, device=steps.DEVICE)
        W[3, 5] = bad
        try:
            quantize(W)
            raise AssertionError(f"{bad} was not seen")
        except ValueError as e:
            print(bad, e)
    report({"bench": "rounding", "rows": rows}, args.out)


if __name__ == "__main__":
    program(main)
