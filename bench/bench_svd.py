"""The SVD of a whole model: ours beside torch.svd_lowrank, time and distance from the optimum.

    python -m bench.bench_svd --out bench/results/svd_h200.json              # a GPU: 7B's shapes
    python -m bench.bench_svd --smollm2 model.safetensors --ranks 16 64      # a CPU: real weights

All run on the same matrices in one process, one after the other, after a warm-up; the times are
medians over the repeats. `excess` is the residual's Frobenius norm over the optimum (Eckart-Young,
from the exact singular values), minus 1. svd_lowrank(q=r, niter=4) is PEFT's pissa_niter_4.
"""
import argparse
import statistics
import time

import torch

from bench import report
from svd import randomized_svd

LLAMA_7B = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096),
            "gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}          # (in, out)


def synthetic(shape, device, seed, decay=0.35):
    """A bfloat16 matrix with singular values ~ i^-decay, from random singular vectors."""
    g = torch.Generator(device).manual_seed(seed)
    k = min(shape)
    U = torch.linalg.qr(torch.randn(shape[0], k, generator=g, device=device)).Q
    V = torch.linalg.qr(torch.randn(shape[1], k, generator=g, device=device)).Q
    S = torch.arange(1, k + 1, device=device) ** -decay
    return ((U * S) @ V.T).bfloat16()


def excess(W, S_all, U, S, Vh):
    """||W - U S Vh|| over the optimal residual of that rank, minus 1, in float64."""
    left = (W.double() - (U.double() * S.double()) @ Vh.double()).norm()
    return (left / S_all[len(S):].norm() - 1).item()


def singular_values(W):
    """All singular values, descending, from the eigenvalues of the Gram matrix in float64."""
    W = (W if W.shape[0] <= W.shape[1] else W.T).double()
    return torch.linalg.eigvalsh(W @ W.T).clamp(min=0).sqrt().flip(-1)


def lowrank(W, rank, niter):
    """torch.svd_lowrank as PEFT calls it (it returns V, not V^T)."""
    U, S, V = torch.svd_lowrank(W.float(), q=rank, niter=niter)
    return U, S, V.T


METHODS = {"ours (default)": lambda W, r: randomized_svd(W, r),
           "svd_lowrank(niter=4)": lambda W, r: lowrank(W, r, 4),
           "svd_lowrank(niter=16)": lambda W, r: lowrank(W, r, 16)}


def measure(matrices, copies, rank, repeats):
    """Seconds for copies x every matrix, and the worst and mean excess, per method."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    exact = {n: singular_values(W) for n, W in matrices.items()}
    rows = {}
    for name, method in METHODS.items():
        gaps = [excess(W, exact[n], *method(W, rank)) for n, W in matrices.items()]   # and warm-up
        times = []
        for _ in range(repeats):
            sync()
            start = time.perf_counter()
            for _ in range(copies):
                for W in matrices.values():
                    method(W, rank)
            sync()
            times.append(time.perf_counter() - start)
        rows[name] = {"seconds": statistics.median(times), "excess_max": max(gaps),
                      "excess_mean": statistics.mean(gaps)}
        print(f"rank {rank}: {name:24s} {rows[name]['seconds']:8.3f} s   excess worst "
              f"{max(gaps):.1e} mean {rows[name]['excess_mean']:.1e}", flush=True)
    ours = rows["ours (default)"]["seconds"]
    for row in rows.values():
        row["ours_faster_by"] = row["seconds"] / ours
    return rows


def main():
    """Parse, measure, report."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smollm2", help="model.safetensors: its layers' real weights instead")
    p.add_argument("--ranks", type=int, nargs="+", default=[128])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out")
    args = p.parse_args()
    if args.smollm2:
        from safetensors import safe_open
        with safe_open(args.smollm2, "pt") as f:
            matrices = {n: f.get_tensor(n).float().T.contiguous() for n in f.keys()
                        if ".15." in n and n.endswith("proj.weight")}
        copies, what = 30, "SmolLM2-135M, the 7 matrices of layer 15, 30 times"
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrices = {n: synthetic(s, device, i) for i, (n, s) in enumerate(LLAMA_7B.items())}
        copies, what = 32, "Llama-2-7B's 224 shapes, bf16, singular values i^-0.35"
    rows = {str(r): measure(matrices, copies, r, args.repeats) for r in args.ranks}
    report({"bench": "svd", "matrices": what, "ranks": rows}, args.out)


if __name__ == "__main__":
    main()
