"""What rounding to four bits costs, and how much of that QPiSSA and LoftQ win back.

    python -m bench.bench_quant --ckpt smollm2 --layers 0 15 29 --ranks 16 64
    python -m bench.bench_quant --ckpt minilm/model.safetensors --niter 8 exact    # and exact SVDs
    python -m bench.bench_quant --ckpt llama2-7b --ranks 128 --device cuda         # on a GPU

The figure is the paper's error reduction (Table 4), in nuclear norms, sums of singular values:

    1 - ||W - (Q + A B)||_* / ||W - nf4(W)||_*           the denominator is QLoRA's, whose own is 0

in percent, for every kind of matrix, mean and (worst); `frob` is the same in Frobenius norms. T is
the number of turns of quantising and decomposing, see pissa.alternate. QPiSSA and LoftQ end on an
SVD; the authors' QPiSSA on the quantisation before it. Seconds are those of all the matrices.
"""
import argparse
import re
import statistics
import time

import torch
from tqdm import tqdm

import model
from bench import program, report
from bench.bench_svd import singular_values
from pissa import Options, init_of

VARIANTS = {"QPiSSA": ("qpissa", True), "QPiSSA, authors'": ("qpissa", False),
            "LoftQ": ("loftq", True)}                                   # name: method, last_svd


def linears(ckpt, layers=None):
    """[(kind, function that reads the matrix)] of a checkpoint's layers, or of those with the
    numbers `layers`. ckpt: what model.load takes, or a .safetensors file of some other model."""
    if ckpt.endswith(".safetensors"):
        from safetensors import safe_open
        file = safe_open(ckpt, "pt")
        tensors = {n: lambda n=n: file.get_tensor(n) for n in sorted(file.keys())}
    else:
        _, tensors = model.open_checkpoint(ckpt)
    found = []
    for name, read in tensors.items():
        parts = re.search(r"\blayers?\.(\d+)\.(.+)\.weight$", name)
        if parts and "norm" not in name.lower() and (not layers or int(parts[1]) in layers):
            kind = re.sub(r"self_attn\.|mlp\.|_proj|attention\.self\.|\.dense", "", parts[2])
            found.append((kind, read))
    if not found:
        raise SystemExit(f"{ckpt} has no linear layers called layers.N. or layer.N., with N in "
                         f"{layers or 'any'}")
    return found


def decompose(W, method, **options):
    """Seconds, and the nuclear and the Frobenius norm of W - (Q + A B) that is left."""
    sync = torch.cuda.synchronize if W.is_cuda else lambda: None
    generator = torch.Generator(W.device).manual_seed(0)
    sync()
    start = time.perf_counter()
    Q, A, B, _ = init_of(method)(W, Options(generator=generator, **options))
    sync()
    seconds = time.perf_counter() - start
    error = W.double() - Q.dequantize(torch.float32).double() - (A.double() @ B.double()).T
    S = singular_values(error)
    return seconds, S.sum().item(), S.norm().item()


def measure(matrices, settings, device, **how):
    """{(niter, rank, T, variant): [(kind, nuclear, Frobenius reduction, seconds) per matrix]}.

    how: bits, double_quant."""
    cells = {(*s, name): [] for s in settings for name in VARIANTS}
    for kind, read in tqdm(matrices, unit="matrix", leave=False):
        W = read().to(device).float()
        if not cells[next(iter(cells))]:                           # a GPU compiles at the first use
            decompose(W, "loftq", rank=settings[0][1], quant_iters=1, **how)
        _, *base = decompose(W, "qlora", rank=1, **how)
        for (niter, rank, turns, name), cell in cells.items():
            method, last_svd = VARIANTS[name]
            seconds, *left = decompose(W, method, rank=rank, niter=niter, quant_iters=turns,
                                       last_svd=last_svd, **how)
            cell.append((kind, *(1 - e / e0 for e, e0 in zip(left, base)), seconds))
    return cells


def summarise(cells):
    """A row for every cell: mean and worst per kind and over all, and how often LoftQ loses."""
    def of(reductions):
        return [round(statistics.mean(reductions), 5), round(min(reductions), 5)]

    rows = []
    for (*setting, name), cell in cells.items():
        kinds, nuclear, frobenius, seconds = zip(*cell)
        loftq = [c[1] for c in cells[*setting, "LoftQ"]]
        rows.append(dict(zip(("niter", "rank", "T"), setting)) | {
            "method": name, "seconds": round(sum(seconds), 3),
            "kinds": {k: of([c[1] for c in cell if c[0] == k]) for k in dict.fromkeys(kinds)},
            "all": of(nuclear), "frobenius": of(frobenius),
            "beats_loftq": sum(a > b for a, b in zip(nuclear, loftq))})
    return rows


def show(rows, count):
    """Print the rows as tables, one for every setting, in the layout of the paper's Table 4."""
    before = None
    for r in rows:
        columns = r["kinds"] | {"all": r["all"], "frob": r["frobenius"]}
        wide = [max(13, len(name) + 2) for name in columns]
        if before != (before := (r["niter"], r["rank"], r["T"])):
            print(f"\nrank {r['rank']}, T = {r['T']}, SVD "
                  f"{'exact' if r['niter'] is None else 'of niter ' + str(r['niter'])}:\n{'':17}"
                  + "".join(f"{name:>{w}}" for name, w in zip(columns, wide))
                  + f"  beats LoftQ  seconds\n{'QLoRA':17}" + "".join(f"{'0':>{w}}" for w in wide))
        print(f"{r['method']:17}" + "".join(
            f"{f'{mean:.1%} ({worst:.1%})'.replace('%', ''):>{w}}"
            for (mean, worst), w in zip(columns.values(), wide))
            + f"{r['beats_loftq']:>6} of {count:<3}{r['seconds']:9.1f}")


def main():
    """Parse, measure, report."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="a checkpoint, or a .safetensors file")
    p.add_argument("--layers", type=int, nargs="+", help="numbers of layers (default all)")
    p.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    p.add_argument("--iters", type=int, nargs="+", default=[1, 5], help="T, turns")
    p.add_argument("--niter", nargs="+", default=[8], help="power iterations, or the word exact",
                   type=lambda s: None if s == "exact" else int(s))
    p.add_argument("--bits", type=int, choices=[4, 8], default=4)
    p.add_argument("--double", action="store_true", help="quantise the absmax, too")
    p.add_argument("--single", action="store_false", dest="double", help="do not (default)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out")
    args = p.parse_args()
    matrices = linears(args.ckpt, args.layers)
    settings = [(n, r, t) for n in args.niter for r in args.ranks for t in args.iters]
    rows = summarise(measure(matrices, settings, args.device, bits=args.bits,
                             double_quant=args.double))
    show(rows, len(matrices))
    report({"bench": "quant", "matrices": len(matrices), "layers": args.layers, "bits": args.bits,
            "double_quant": args.double, "rows": rows}, args.out)


if __name__ == "__main__":
    program(main)
