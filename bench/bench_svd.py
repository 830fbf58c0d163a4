"""The SVD of a whole model: ours beside torch.svd_lowrank, time and distance from the optimum.

    python -m bench.bench_svd --out bench/results/svd_h200.json              # a GPU: 7B's shapes
    python -m bench.bench_svd --ranks 16 64 --smollm2 checkpoints/smollm2/model.safetensors  # a CPU

All run on the same matrices in one process, by turns, after a warm-up; the times are medians over
the repeats. `grouped` decomposes up to 32 matrices of one shape together, as inject does; p and q
are oversample and niter. `excess` is the residual's Frobenius norm over the optimum (Eckart-Young,
from the exact singular values), minus 1. svd_lowrank(q=r, niter=4) is PEFT's pissa_niter_4.
"""
import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from bench import program, report
from svd import grouped_svd, orthonormalise, products, randomized_svd, small_svd

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


def single(method):
    """A method for one matrix as one for many of the same shape."""
    return lambda Ws, rank: [method(W, rank) for W in Ws]


def grouped(most=32, **options):
    """grouped_svd, at most so many together."""
    def method(Ws, rank):
        parts = [grouped_svd(Ws[i:i + most], rank, **options) for i in range(0, len(Ws), most)]
        return [usv for part in parts for usv in zip(*part)]
    return method


METHODS = {"ours (default)": single(randomized_svd),
           "ours (grouped)": grouped(),
           "ours (grouped, q=3)": grouped(niter=3),
           "ours (grouped, p=16, q=2)": grouped(oversample=16, niter=2),
           "ours (grouped, p=8, q=2)": grouped(oversample=8, niter=2),
           "svd_lowrank(niter=4)": single(lambda W, r: lowrank(W, r, 4)),
           "svd_lowrank(niter=16)": single(lambda W, r: lowrank(W, r, 16))}


def measure(matrices, copies, rank, repeats):
    """Seconds for copies x every matrix, and the worst and mean excess, per method."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    exact = {n: singular_values(W) for n, W in matrices.items()}
    shapes = {}          # {shape: copies}, each in memory of its own: the same again is in a cache
    for W in matrices.values():
        shapes.setdefault(W.shape, []).extend(W.clone() for _ in range(copies))
    gaps = {name: [excess(W, exact[n], *method([W], rank)[0]) for n, W in matrices.items()]
            for name, method in METHODS.items()}
    times = {name: [] for name in METHODS}
    for turn in range(repeats + 1):          # the first is the warm-up
        for name, method in METHODS.items():
            sync()
            start = time.perf_counter()
            for Ws in shapes.values():
                method(Ws, rank)
            sync()
            times[name] += [time.perf_counter() - start] if turn else []
    rows = {name: {"seconds": statistics.median(times[name]), "excess_max": max(gaps[name]),
                   "excess_mean": statistics.mean(gaps[name])} for name in METHODS}
    for name, row in rows.items():
        row["ours_faster_by"] = row["seconds"] / rows["ours (default)"]["seconds"]
        print(f"rank {rank}: {name:26s} {row['seconds']:8.3f} s   excess worst "
              f"{row['excess_max']:.1e} mean {row['excess_mean']:.1e}", flush=True)
    return rows


def parts(m, n, l, batch=32):
    """Milliseconds per matrix of what grouped_svd consists of, on a GPU, and of the eigenproblems
    on the CPU's threads instead; and of a copy, which is the floor of a pass over W."""
    def ms(f):
        for _ in range(2):
            f()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            f()
        torch.cuda.synchronize()
        return round((time.perf_counter() - start) / 5 / batch * 1e3, 4)

    def on_threads():
        with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(torch.linalg.eigh, G.cpu()))

    Ws = [torch.randn(m, n, device="cuda").bfloat16() for _ in range(batch)]
    P = torch.randn(batch, l, m, device="cuda")
    G = P.double() @ P.double().mT
    L = torch.linalg.cholesky(G)
    steps = {"copy of W": lambda: [W.clone() for W in Ws],
             "rough product": lambda: products(P, Ws, rough=True),
             "precise product": lambda: products(P, Ws),
             "orthonormalise": lambda: orthonormalise(P),
             "of which Gram, float64": lambda: P.double() @ P.double().mT,
             "of which Cholesky": lambda: torch.linalg.cholesky_ex(G),
             "of which inverse": lambda: torch.linalg.solve_triangular(
                 L, torch.eye(l, device="cuda", dtype=L.dtype), upper=False),
             "small_svd": lambda: small_svd(P, l),
             "of which eigh": lambda: torch.linalg.eigh(G),
             "eigh one by one": lambda: [torch.linalg.eigh(g) for g in G],
             "eigh in float32": lambda: torch.linalg.eigh(G.float()),
             "eigh on CPU threads": on_threads}
    row = {name: ms(f) for name, f in steps.items()}
    print(f"{m} x {n}, l = {l}, ms per matrix in a group of {batch}: {row}", flush=True)
    return row


def main():
    """Parse, measure, report."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smollm2", help="model.safetensors: its layers' real weights instead")
    p.add_argument("--ranks", type=int, nargs="+", default=[128])
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--copies", type=int, help="of every matrix; as many as there are layers")
    p.add_argument("--out")
    args = p.parse_args()
    if args.smollm2:
        from safetensors import safe_open
        with safe_open(args.smollm2, "pt") as f:
            matrices = {n: f.get_tensor(n).float().T.contiguous() for n in f.keys()
                        if ".15." in n and n.endswith("proj.weight")}
        copies = args.copies or 30
        what = f"SmolLM2-135M, the 7 matrices of layer 15, {copies} times"
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrices = {n: synthetic(s, device, i) for i, (n, s) in enumerate(LLAMA_7B.items())}
        copies = args.copies or 32
        what = f"Llama-2-7B's {7 * copies} shapes, bf16, singular values i^-0.35"
    rows = {str(r): measure(matrices, copies, r, args.repeats) for r in args.ranks}
    result = {"bench": "svd", "matrices": what, "ranks": rows}
    if torch.cuda.is_available():
        result["parts"] = {str(r): parts(4096, 4096, r + 32) for r in args.ranks}
    report(result, args.out)


if __name__ == "__main__":
    program(main)
