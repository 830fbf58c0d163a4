"""The loss landscape of the authors' page: a plane through the base, LoRA's end and PiSSA's end.

    python examples/landscape.py --tiny                    # checkpoints/tiny; minutes on a CPU
    python examples/landscape.py --ckpt smollm2 --data shared/data/gsm8k/train.jsonl \
        --rank 32 --rates 3e-3 1e-3 --steps 229 --batch 32 --out bench/results/landscape.json

Both methods train from the same W_0. With DeltaW of all target matrices as one long vector, the
plane is W_0 + x e_1 + y e_2, where e_1, e_2 are orthonormal and span both ends' DeltaW: the ends
and the base lie in it exactly. The paths are projected onto it; `outside` says how much of each
point's length is not in the plane. The loss on the grid is that of held-out examples, in float32.
Writes --out (JSON) and the picture beside it (.png). Source: arXiv 2404.02948, the page's figure.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not needed beside copied files

import data  # noqa: E402
import model  # noqa: E402
import pissa  # noqa: E402
import train  # noqa: E402
from bench import NO_STATES  # noqa: E402
from support import options  # noqa: E402

METHODS = "lora", "pissa"
NAMES = {"lora": "LoRA", "pissa": "PiSSA"}


def factors(net):
    """{name: (A, B)} on the CPU."""
    return {n: tuple(M.detach().to("cpu", copy=True) for M in m.factors())
            for n, m in pissa.layers(net)}


def trained(method, lr, asked, examples):
    """[(step, factors)] of one training, from the start to the end."""
    flags = {"ckpt": asked.ckpt, "method": method, "rank": asked.rank, "lr": lr,
             "batch": asked.batch, "micro-batch": asked.batch, "steps": asked.steps,
             "seed": asked.seed}
    args = options.train_parser("").parse_args([f"--{k}={v}" for k, v in flags.items()])
    vars(args).update(NO_STATES, out=Path(tempfile.mkdtemp()))
    net = model.load(asked.ckpt, asked.device, torch.float32)
    pissa.inject(net, asked.rank, method, seed=asked.seed, progress=False)
    points, count = [(0, factors(net))], [0]
    every = max(1, asked.steps // 20)

    def note(*_):
        count[0] += 1
        if count[0] % every == 0 or count[0] == asked.steps:
            points.append((count[0], factors(net)))

    hook = register_optimizer_step_post_hook(note)
    try:
        _, stopped = train.train(net, examples, args, nullcontext())
    finally:
        hook.remove()
    if stopped:
        raise ValueError(f"{method} at --rates {lr:g} did not finish: choose a lower rate")
    return points


def change(point, start, name):
    """DeltaW^T (in, out) of a matrix between two points' factors."""
    (A, B), (A0, B0) = point[name], start[name]
    return A @ B - A0 @ B0


def inner(one, other, starts):
    """<DeltaW, DeltaW'> over all matrices, of two points with their starts, in float64.

    DeltaW^T = (A - A_0) B + A_0 (B - B_0) = L R: L has 2 r columns and R 2 r rows. So
    <L R, L' R'> = <L^T L', R R'^T>.
    """
    total = 0.0
    for n in one:
        (L, R), (M, S) = (stacked(p[n], s[n]) for p, s in zip((one, other), starts, strict=True))
        total += ((L.T @ M) * (R @ S.T)).sum().item()
    return total


def stacked(point, start):
    """L (in, 2 r) and R (2 r, out) of `inner`, float64."""
    A, B, A0, B0 = (M.double() for M in (*point, *start))
    return torch.cat([A - A0, A0], 1), torch.cat([B, B - B0])


def coordinates(paths):
    """({method: [[step, x, y, outside]]}, Q): DeltaW of both ends = rows of Q (2, 2) in e_1, e_2.

    e_1 points at LoRA's end. outside: the share of |DeltaW| that is not in the plane.
    ValueError if the ends lie on one line.
    """
    ends, starts = ([paths[m][i][1] for m in METHODS] for i in (-1, 0))
    G = torch.tensor([[inner(ends[i], ends[j], (starts[i], starts[j])) for j in (0, 1)]
                      for i in (0, 1)], dtype=torch.float64)
    if G.det() <= 1e-9 * G[0, 0] * G[1, 1]:
        raise ValueError("both ends lie on one line through the base: there is no plane")
    Q = torch.linalg.cholesky(G)  # G = Q Q^T
    found = {}
    for k, method in enumerate(METHODS):
        found[method] = []
        for step, point in paths[method]:
            dots = torch.tensor([inner(point, ends[j], (starts[k], starts[j])) for j in (0, 1)],
                                dtype=torch.float64)
            x = torch.linalg.solve_triangular(Q, dots[:, None], upper=False)[:, 0]
            size = inner(point, point, (starts[k], starts[k]))
            outside = max(0.0, 1 - x.square().sum().item() / size) ** 0.5 if size > 0 else 0.0
            found[method].append([step, *x.tolist(), outside])
    return found, Q


def surface(paths, Q, axes, asked, val):
    """Losses (len(y), len(x)) of W_0 + x e_1 + y e_2, and those of the base and of both ends."""
    net = model.load(asked.ckpt, asked.device, torch.float32)
    args = options.train_parser("").parse_args(["--ckpt", asked.ckpt, "--micro-batch", "32"])
    modules = {n: net.get_submodule(n) for n in paths["lora"][0][1]}
    W0 = {n: m.weight.detach().clone() for n, m in modules.items()}
    ends = {n: [change(paths[m][-1][1], paths[m][0][1], n).T.to(W0[n]) for m in METHODS]
            for n in W0}
    inverse = torch.linalg.inv(Q)  # rows e_1, e_2 in both ends' DeltaW

    def loss(x, y):
        a, b = (torch.tensor([x, y], dtype=torch.float64) @ inverse).tolist()
        for n, m in modules.items():
            m.weight.data = W0[n] + a * ends[n][0] + b * ends[n][1]
        return train.validation_loss(net, val, args, nullcontext())

    rows = tqdm(axes[1], desc="surface", unit="row", leave=False)
    grid = [[loss(x, y) for x in axes[0]] for y in rows]
    return grid, {"base": loss(0, 0), **{m: loss(*Q[k].tolist()) for k, m in enumerate(METHODS)}}


def grid_axes(path, n):
    """n values of x and of y that show all points with a margin of a third."""
    found = []
    for i in (1, 2):
        values = [p[i] for points in path.values() for p in points]
        low, high = min(values), max(values)
        margin = 0.35 * max(high - low, 1e-9)
        found.append(torch.linspace(low - margin, high + margin, n).tolist())
    return found


def picture(result, out):
    """Contours with their losses, the paths, and where they begin and end; black and white is
    enough to tell the two apart."""
    from bench.pictures import BLUE, INK, RED, panels

    figure, axes = panels(1, 1, 5.5)
    z = torch.tensor(result["loss"])
    levels = torch.quantile(z.flatten(), torch.linspace(0.01, 0.95, 14)).unique().tolist()
    lines = axes.contour(result["x"], result["y"], result["loss"], levels=levels, colors=INK,
                         linewidths=0.8)
    axes.clabel(lines, fontsize=7, fmt="%.2f")
    for method, colour, mark, style in ("lora", BLUE, "s", "--"), ("pissa", RED, "o", "-"):
        path = result["path"][method]
        axes.plot([p[1] for p in path], [p[2] for p in path], style, marker=mark, markersize=4,
                  color=colour, label=f"{NAMES[method]}, rate {result['rates'][method]:g}, "
                  f"ends at {result['ends'][method]:.3f}")
    axes.plot(0, 0, "*", color=INK, markersize=14, label=f"base, {result['ends']['base']:.3f}")
    axes.set(xlabel="x: towards LoRA's end, |ΔW| of all matrices",
             ylabel="y: towards PiSSA's end, across x",
             title=f"{result['ckpt']}, rank {result['rank']}, {result['steps']} steps: "
             "validation loss (contours)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=3)
    figure.tight_layout()
    figure.savefig(out, dpi=130, transparent=True)


def arguments(given=None):
    """What the command line asks for."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tiny", action="store_true", help="checkpoints/tiny and the demo's problems")
    p.add_argument("--ckpt", default="smollm2")
    p.add_argument("--data", default="shared/data/gsm8k/train.jsonl")
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--rates", type=float, nargs=2, default=[3e-3, 1e-3], metavar=("LORA", "PISSA"))
    p.add_argument("--steps", type=int, default=229)
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--grid", type=int, default=15)
    p.add_argument("--examples", type=int, default=200, help="held-out ones, for the loss")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device")
    p.add_argument("--out", default="runs/landscape.json")
    if "--tiny" in (sys.argv[1:] if given is None else given):
        p.set_defaults(
            ckpt="tiny",
            data=f"{options.tiny()}/train.jsonl",
            rank=16,
            rates=[4e-3, 1e-3],
            steps=60,
            batch=16,
            grid=11,
            examples=100,
        )
    return p.parse_args(given)


def main(given=None):
    """Train both, evaluate the plane, write and draw it. Returns the result."""
    asked = arguments(given)
    tok = data.Tokenizer(model.find(asked.ckpt))
    texts = data.read(asked.data)
    val = data.encode(texts[-asked.examples :], tok, 512)[0]
    examples = data.encode(texts[: -asked.examples], tok, 512)[0]
    paths = {m: trained(m, lr, asked, examples) for m, lr in zip(METHODS, asked.rates, strict=True)}
    path, Q = coordinates(paths)
    axes = grid_axes(path, asked.grid)
    losses, ends = surface(paths, Q, axes, asked, val)
    result = {
        "ckpt": asked.ckpt,
        "rank": asked.rank,
        "steps": asked.steps,
        "seed": asked.seed,
        "rates": dict(zip(METHODS, asked.rates, strict=True)),
        "x": axes[0],
        "y": axes[1],
        "loss": losses,
        "path": path,
        "ends": ends,
    }
    out = Path(asked.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result) + "\n")
    picture(result, out.with_suffix(".png"))
    for name, loss in ends.items():
        print(f"{name:6s} validation loss {loss:.4f}")
    print(f"written: {out}, {out.with_suffix('.png')}")
    return result


if __name__ == "__main__":
    main()
