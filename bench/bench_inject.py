"""Where the time of `pissa.inject` goes, for Llama-2-7B's 224 matrices at rank 128, on one GPU.

    python -m bench.bench_inject --out bench/results/inject_h200.json            # three minutes
    python -m bench.bench_inject --tiny                                          # anywhere, a trial

`inject` is timed as it is, and then with a clock that waits for the GPU around each of its pieces:
their sum is more than the whole, since nothing overlaps. QPiSSA takes one turn. `pieces of a group`
are those of svd.grouped_svd. `to the host` compares ways to copy all A and B: as it is done (fresh
memory, one thread), into memory touched before, by several threads, into page-locked memory, with
and without the time to lock it, or a copy that stays on the GPU. `eigenproblems` compares the GPU
with threads.
"""
import argparse
import gc
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

import pissa
import qpissa
import svd
from bench import program, report, steps

# Each piece of inject: a module or class, and a function of it
PIECES = {"principal": (pissa, "principal"), "residual": (pissa, "residual"),
          "layer": (pissa.PissaLinear, "__init__"), "sampled": (pissa, "sampled"),
          "finite": (pissa, "finite"), "rounded": (qpissa, "rounded"),
          "factors": (qpissa, "factors")}
OF_A_GROUP = {name: (svd, name) for name in
              ("check", "gaussian", "products", "orthonormalise", "small_svd", "fix_signs")}


@contextmanager
def clocks(pieces):
    """{piece: [seconds, calls]} of what runs inside. Each call waits for the GPU."""
    found, real = {}, {name: getattr(*place) for name, place in pieces.items()}

    def timed(name):
        def function(*args, **more):
            start = steps.clock()
            try:
                return real[name](*args, **more)
            finally:
                total = found.setdefault(name, [0.0, 0])
                total[0] += steps.clock() - start
                total[1] += 1
        return function

    for name, (where, attribute) in pieces.items():
        setattr(where, attribute, timed(name))
    try:
        yield found
    finally:
        for name, (where, attribute) in pieces.items():
            setattr(where, attribute, real[name])


def seconds_of(f, times=3):
    """The median, after a first call that does not count."""
    found = []
    for _ in range(times + 1):
        gc.collect()
        start = steps.clock()
        kept = f()
        found.append(steps.clock() - start)
        del kept
    return statistics.median(found[1:])


def injections(args, record):
    """The whole, and its pieces."""
    def inject(method, **more):
        net = steps.fill(steps.injected(args.seven, "lora", args.rank)[0])
        net = pissa.merge(net)
        start = steps.clock()
        pissa.inject(net, args.rank, method, progress=False, **more)
        seconds = steps.clock() - start
        assert all(M.device.type == "cpu" for _, m in pissa.layers(net) if m.A0 is not None
                   for M in (m.A0, m.B0, *m.subtracted))
        return seconds

    inject("pissa")                                             # libraries load their kernels
    for method, more in (("pissa", {}), ("qpissa", {"quant_iters": 1}),
                         ("qpissa", {"bits": 8, "quant_iters": 1}), ("qlora", {"bits": 8})):
        name = f"{method} {more.get('bits', '')}".strip()
        record(name, {"seconds": [inject(method, **more) for _ in range(2)]})
        for what, pieces in (("pieces", PIECES), ("pieces of a group", OF_A_GROUP)):
            with clocks(pieces) as found:
                total = inject(method, **more)
            record(f"{name}, {what}", {"total": total, **found})


def accuracy(args, record):
    """Four matrices in a group: the residual over the optimum, less 1, and whether bits repeat."""
    Ws = [steps.random_matrix((args.seven.dim,) * 2, f"accuracy {i}") for i in range(4)]
    first, again = (svd.grouped_svd(Ws, args.rank) for _ in range(2))
    excess = []
    for W, U, S, Vh in zip(Ws, *first, strict=True):
        exact = torch.linalg.svdvals(W.double())[args.rank:].norm()
        found = (W.double() - (U.double() * S.double()) @ Vh.double()).norm()
        excess.append((found / exact - 1).item())
    record("accuracy of a group", {"excess": excess, "same bits": all(
        torch.equal(a, b) for a, b in zip(first, again, strict=True))})


def shapes(args):
    """(rows, columns) of every A and B."""
    with torch.device("meta"):
        linears = pissa.find_linears(steps.model.Llama(args.seven), pissa.TARGETS)
    return [s for m in linears.values() for s in ((m.in_features, args.rank),
                                                  (args.rank, m.out_features))]


def copies(args, record):
    """Ways to copy all A and B to the host."""
    there = [torch.randn(s, device=steps.DEVICE) for s in shapes(args)]
    touched = [torch.zeros(t.shape) for t in there]

    def threads(n):
        def copy():
            with ThreadPoolExecutor(n) as pool:
                return list(pool.map(lambda t: t.to("cpu", copy=True), there))
        return copy

    ways = {"fresh memory": lambda: [t.to("cpu", copy=True) for t in there],
            "memory touched before": lambda: [a.copy_(b) for a, b in zip(touched, there,
                                                                         strict=True)],
            **{f"{n} threads": threads(n) for n in (2, 4, 8)},
            "a copy on the GPU": lambda: [t.clone() for t in there]}
    if steps.CUDA:
        def locked():
            return [torch.empty(t.shape, pin_memory=True) for t in there]

        start = time.perf_counter()
        pinned = locked()
        record("to the host, locking memory", {"seconds": time.perf_counter() - start})
        ways["page-locked"] = lambda: [a.copy_(b, non_blocking=True) for a, b in zip(
            pinned, there, strict=True)]
    for name, way in ways.items():
        record(f"to the host, {name}", {"seconds": seconds_of(way),
                                        "gb": sum(t.nbytes for t in there) / 1e9})


def eigenproblems(args, record):
    """A group's: 32 matrices of l x l in float64, on the GPU and on threads."""
    l = args.rank + 32
    Z = torch.randn(32, l, 2 * l, device=steps.DEVICE, dtype=torch.float64)
    G = Z @ Z.mT
    record("eigenproblems of a group, in a batch", {"seconds": seconds_of(
        lambda: torch.linalg.eigh(G))})
    for dtype in (torch.float32, torch.float64):
        record(f"the same in {dtype}, by gesvda", {"seconds": seconds_of(
            lambda dtype=dtype: torch.linalg.svd(G.to(dtype), driver="gesvda" if steps.CUDA else
                                                 None))})
    for n in (2, 4, 8, 16) if steps.CUDA else ():
        streams = [torch.cuda.Stream() for _ in range(n)]

        def solved(part, stream):
            with torch.cuda.stream(stream):
                return torch.linalg.eigh(part)

        with ThreadPoolExecutor(n) as pool:
            torch.cuda.synchronize()
            record(f"eigenproblems of a group, {n} streams", {"seconds": seconds_of(
                lambda n=n, streams=streams: list(pool.map(solved, G.chunk(n), streams)))})
    before = torch.get_num_threads()
    for n in (4, 8, 16):
        def on_threads(n=n):
            with ThreadPoolExecutor(n) as pool:
                here = G.cpu()
                return [t.to(steps.DEVICE) for pair in pool.map(torch.linalg.eigh, here)
                        for t in pair]

        torch.set_num_threads(1)
        record(f"eigenproblems of a group, {n} threads", {"seconds": seconds_of(on_threads)})
        torch.set_num_threads(before)


def main():
    """Every part; what was measured is written after each row."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a trial on a CPU")
    p.add_argument("--layers", type=int, help="fewer layers, for a trial")
    p.add_argument("--out")
    args, rows = p.parse_args(), {}
    changes = (steps.TOY if args.tiny else {}) | (
        {"n_layers": args.layers} if args.layers else {})
    args.rank = 8 if args.tiny else 128
    args.seven = steps.replace(steps.SEVEN, **changes)

    def record(row, figures):
        rows[row] = figures
        print(row, figures, flush=True)
        report({"bench": "inject", "rank": args.rank, "rows": rows}, args.out)

    for part in (accuracy, copies, eigenproblems, injections):
        part(args, record)


if __name__ == "__main__":
    program(main)
