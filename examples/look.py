"""Two pictures that show what PiSSA does, for any checkpoint.

    python examples/look.py                                # the tiny model, some seconds
    python examples/look.py --ckpt smollm2 --rank 32 --only singular_values

singular_values.png (left) shows the singular values of one weight matrix W, and which of them are
trained. PiSSA trains the r largest, MiLoRA the r smallest. LoRA trains none of them: it adds a new
matrix A B that starts at 0. The right half shows why four bits cost QPiSSA less than QLoRA. NF4
divides every block of 64 entries by the largest of them and rounds to sixteen levels. The residual
W_res = W - A B has smaller entries than W, so its levels are closer together.

gradients.png shows the first steps of LoRA and PiSSA, with the same data and the same learning
rate: the gradient norms of all A and all B, and the loss. LoRA starts with B = 0. The gradient of A
is (x^T g) B^T, so it is exactly 0 at the first step. A dotted line shows LoRA at a larger rate,
which suits it better: compare methods at the best rate of each.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import model  # noqa: E402
import nf4  # noqa: E402
import pissa  # noqa: E402
from formats.jsonl import filled  # noqa: E402

# Grounds are transparent. All colours can be told from a white page and from a dark one.
PISSA, LORA, MILORA, GREY, INK = "#d1495b", "#3a86c8", "#b07d2b", "#8a8f96", "#767c84"
BLOCK = 64                                                  # entries that share one NF4 scale


# ------------------------------------------------------------------------- what is to be drawn

def read_matrix(ckpt, module=None):
    """(full module name, W (in, out) float32) of one linear layer; only its tensor is read.

    module: the end of a name, such as layers.3.self_attn.q_proj; default q_proj of the middle
    layer. Raises ValueError if no module or several modules match.
    """
    config, tensors = model.open_checkpoint(ckpt)
    module = module or f"layers.{config.n_layers // 2}.self_attn.q_proj"
    found = [n for n in tensors if f".{n}".endswith(f".{module.removesuffix('.weight')}.weight")
             and n.rpartition(".weight")[0].endswith(pissa.TARGETS)]
    if len(found) != 1:
        raise ValueError(f"--module {module} fits {len(found)} linear layers of {ckpt}, not one; "
                         "say for example layers.0.self_attn.q_proj")
    return found[0].removesuffix(".weight"), tensors[found[0]]().float().T.contiguous()


def decompose(W, rank):
    """S, W_res, shares of W (in, out).

    S: all singular values (min(in, out),), descending. W_res: W less its `rank` principal
    components. shares: those of |W|^2 in the first and in the last `rank` components.
    """
    if not 1 <= rank <= min(W.shape) // 2:
        raise ValueError(f"--rank {rank} is not between 1 and {min(W.shape) // 2}, half of the "
                         f"smaller side of a {W.shape[0]} x {W.shape[1]} matrix")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    energy = S.square() / S.square().sum()
    shares = energy[:rank].sum().item(), energy[-rank:].sum().item()
    return S, W - (U[:, :rank] * S[:rank]) @ Vh[:rank], shares


def rounding(W):
    """(|W - nf4(W)|, mean absmax of W's blocks): what four bits lose, and how wide the levels are.

    W: (in, out). It is rounded as it is stored, (out, in), by blocks of 64 along each row.
    """
    stored = W.T.contiguous()
    lost = stored - nf4.quantize(stored).dequantize(torch.float32)
    whole = stored.flatten()[:stored.numel() // BLOCK * BLOCK]
    return lost.norm().item(), whole.view(-1, BLOCK).abs().amax(1).mean().item()


def first_steps(ckpt, method, rank, lr, steps, batch, examples):
    """[{"loss", "A", "B"}] of the first steps: the loss, and the gradient norms of all A and all B.

    examples: (prompt, response) pairs. Everything except `method` is the same for two methods.
    """
    net = model.load(ckpt, dtype=torch.float32)
    encoded = data.encode(examples, data.Tokenizer(model.find(ckpt)), 256)[0]
    pissa.inject(net, rank, method, progress=False)
    device = net.lm_head.weight.device
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr,
                                  weight_decay=0.0)
    rows = []
    for one in tqdm(data.batches(encoded, batch, seed=0, epoch=0)[:steps], desc=method, unit="step",
                    leave=False):
        (tokens, labels, _), = data.micro_batches(one, sys.maxsize)    # all in one: (batch, T)
        logits = net(tokens.to(device)).flatten(0, 1)                             # (batch T, V)
        loss = F.cross_entropy(logits, labels.to(device).flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        rows.append({"loss": loss.item()})
        for k in "AB":
            squares = [getattr(m, k).grad.square().sum() for _, m in pissa.layers(net)]
            rows[-1][k] = torch.stack(squares).sum().sqrt().item()
        optimizer.step()
    return rows


# ------------------------------------------------------------------------------------- pictures

def pyplot():
    """matplotlib's pyplot with fonts that can be read on a web page; one line if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("the pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({
        "font.size": 15, "axes.titlesize": 17, "axes.titleweight": "bold", "axes.titlelocation":
        "left", "axes.titlepad": 14, "axes.spines.top": False, "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color",
                         "ytick.color"), INK),
        "figure.constrained_layout.h_pad": 0.12, "figure.constrained_layout.w_pad": 0.12,
        "legend.frameon": False, "lines.linewidth": 2.5})
    return plt


def draw_spectrum(ax, S, rank, shares):
    """Singular values S on a log axis, with the components that each method trains."""
    S, n = S.clamp(min=S[0].item() * 1e-6), len(S)
    top, low = S[0].item(), S[-1].item() * 0.6

    def at(height):                                       # 0 is the bottom, 1 is s_1
        return low * (top / low) ** height

    for first, last, colour, alpha in ((0, rank, PISSA, 0.85), (rank, n - rank, GREY, 0.18),
                                       (n - rank, n, MILORA, 0.85)):
        x = [first + 0.5, *range(first + 1, last + 1), last + 0.5]
        y = S[first:last].tolist()
        ax.fill_between(x, low, [y[0], *y, y[-1]], color=colour, alpha=alpha, linewidth=0)
    ax.plot(range(1, n + 1), S.tolist(), color=INK)
    ax.set(yscale="log", xlim=(0.5, n + 0.5), ylim=(low, at(1.3)), xlabel="component $i$",
           ylabel="singular value $s_i$", title="Which part of $W$ is trained?")
    line = {"arrowstyle": "-", "linewidth": 2}
    ax.annotate(f"PiSSA: the {rank} largest,\n{shares[0]:.0%} of $|W|^2$", (rank * 0.7, at(0.9)),
                (n * 0.13, at(1.04)), color=PISSA, weight="bold", va="bottom",
                arrowprops={**line, "color": PISSA})
    ax.annotate(f"MiLoRA: the {rank} smallest,\n{100 * shares[1]:.1g}% of $|W|^2$",
                (n - rank * 0.6, at(0.15)), (n * 0.87, at(0.42)), color=MILORA, weight="bold",
                ha="right", va="center", arrowprops={**line, "color": MILORA})
    ax.text(n * 0.45, at(0.12), "frozen", color=INK, ha="center")
    ax.text(n, at(1.04), "LoRA: nothing of $W$,\na new $A\\,B$ starts at 0", color=LORA,
            weight="bold", ha="right", va="bottom")


def draw_rounding(above, below, W, W_res):
    """Histograms of W and W_res in units of W's standard deviation; below, NF4's levels of both."""
    unit, whole, edges = W.std().item(), W.norm().item(), torch.linspace(-3.4, 3.4, 86)
    for M, colour, label, y in ((W, LORA, "QLoRA rounds $W$", 1),
                                (W_res, PISSA, "QPiSSA rounds $W_{res}$", 0)):
        hist = torch.histogram(M.flatten() / unit, edges, density=True).hist.tolist()
        above.stairs(hist, edges.tolist(), fill=True, color=colour, alpha=0.25)
        above.stairs(hist, edges.tolist(), color=colour, linewidth=2.5, label=label)
        lost, absmax = rounding(M)
        levels = (nf4.LEVELS * absmax / unit).tolist()
        below.plot(levels, [y] * 16, "|", color=colour, markersize=26, markeredgewidth=3)
        below.text(4.9, y, f"error {lost / whole:.1%}", color=colour, weight="bold", va="center",
                   ha="right")
    above.legend(loc="upper right", labelcolor="linecolor", prop={"weight": "bold", "size": 15},
                 handlelength=0, bbox_to_anchor=(1.01, 1.05))
    above.set(xlim=(-3.4, 4.9), yticks=[], title="Why QPiSSA loses less in four bits")
    above.spines["left"].set_visible(False)
    above.tick_params(labelbottom=False)
    below.set(ylim=(-0.7, 1.7), xticks=range(-3, 4), yticks=[1, 0],
              xlabel="entry / standard deviation of $W$")
    below.set_yticklabels(["16 levels\nfor $W$", "for $W_{res}$"])
    below.tick_params(axis="y", length=0)
    below.spines["left"].set_visible(False)


def singular_values(ckpt, out, module=None, rank=16):
    """Draw out/singular_values.png of one matrix and return its path; print the numbers in it."""
    name, W = read_matrix(ckpt, module)
    S, W_res, shares = decompose(W, rank)
    plt = pyplot()
    figure = plt.figure(figsize=(15, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.12, 1], height_ratios=[2.4, 1], wspace=0.06)
    draw_spectrum(figure.add_subplot(grid[:, 0]), S, rank, shares)
    above = figure.add_subplot(grid[0, 1])
    draw_rounding(above, figure.add_subplot(grid[1, 1], sharex=above), W, W_res)
    figure.supxlabel(f"{label(ckpt)}, {name}, {W.shape[0]} x {W.shape[1]}, rank {rank}",
                     fontsize=13, color=INK, x=0.995, ha="right")
    before, after = rounding(W)[0] / W.norm(), rounding(W_res)[0] / W.norm()
    print(filled(f"{name}: singular values {S[0]:.3g} ... {S[rank - 1]:.3g} | ... {S[-1]:.3g}, the "
                 f"first {rank} hold {shares[0]:.1%} of |W|^2; NF4 changes W by {before:.2%} of "
                 f"|W|, W_res by {after:.2%}"))
    return save(plt, figure, out / "singular_values.png")


def gradients(ckpt, out, examples, rank=16, lr=1e-3, lora_lr=3e-3, steps=10, batch=8):
    """Draw out/gradients.png and return {(method, learning rate): rows of `first_steps`}.

    Both methods train at `lr`. LoRA's loss is drawn once more, at `lora_lr`, which suits it better.
    """
    runs = {(method, rate): first_steps(ckpt, method, rank, rate, steps, batch, examples)
            for method, rate in (("lora", lr), ("pissa", lr), ("lora", lora_lr))}
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.9), layout="constrained")
    titles = {"A": "Gradient norm of all $A$", "B": "Gradient norm of all $B$", "loss": "Loss"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        styles = [(("lora", lr), LORA, "o-", "LoRA"), (("pissa", lr), PISSA, "o-", "PiSSA")]
        if key == "loss" and lora_lr != lr:
            styles.append((("lora", lora_lr), LORA, "o:", f"LoRA, rate {lora_lr:g}"))
        for run, colour, style, name in styles:
            ax.plot(range(1, len(runs[run]) + 1), [r[key] for r in runs[run]], style,
                    color=colour, markersize=8, label=name, clip_on=False)
        ax.set(title=title, xlabel="step", ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(labelcolor="linecolor", loc="upper right")
    top = axes[0].get_ylim()[1]
    axes[0].set_ylim(-0.2 * top, top)                # room for a sentence below the axis of steps
    axes[0].set_yticks([t for t in axes[0].get_yticks() if 0 <= t <= top])
    axes[0].axhline(0, color=INK, linewidth=1)
    axes[0].text(1, -0.04 * top, "LoRA: exactly 0 at step 1, as $B=0$", color=LORA, weight="bold",
                 va="top")
    figure.supxlabel(f"{label(ckpt)}, rank {rank}, the same data, learning rate {lr:g}",
                     fontsize=13, color=INK, x=0.995, ha="right")
    for (method, rate), rows in runs.items():
        ends = (f"{key} {rows[0][key]:.3g} -> {rows[-1][key]:.3g}" for key in ("loss", "A", "B"))
        print(filled(f"{method}, rate {rate:g}: loss and gradient norms: {', '.join(ends)}"))
    save(plt, figure, out / "gradients.png")
    return runs


def label(ckpt):
    """What a picture calls the model."""
    return model.find(ckpt).name


def save(plt, figure, path):
    """Write a figure and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, transparent=True)
    plt.close(figure)
    print(f"wrote {path}")
    return path


def parser():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, usage="python examples/look.py [--option ...]",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=str(ROOT / "checkpoints" / "tiny"), help="directory in Meta's "
                   "or Hugging Face's layout, or a name under checkpoints/ (default: tiny)")
    p.add_argument("--out", type=Path, default=Path("docs"), help="where the pictures go "
                   "(default: docs)")
    p.add_argument("--only", choices=["singular_values", "gradients"], help="one picture, not both")
    p.add_argument("--module", help="the linear layer whose singular values are drawn, the end of "
                   "its name is enough (default: q_proj of the middle layer). Compare the first "
                   "layer with the last one, and q_proj with up_proj")
    p.add_argument("--rank", type=int, default=16, help="how many singular values are trained. A "
                   "larger rank leaves a smaller residual, and four bits then lose less "
                   "(default: %(default)s)")
    p.add_argument("--lr", type=float, default=1e-3, help="learning rate of both methods "
                   "(default: %(default)s)")
    p.add_argument("--lora-lr", type=float, default=3e-3, help="a rate that suits LoRA better. "
                   "LoRA wants a larger one than PiSSA (default: %(default)s)")
    p.add_argument("--steps", type=int, default=10, help="steps of training (default: %(default)s)")
    p.add_argument("--batch", type=int, default=8, help="examples a step (default: %(default)s)")
    p.add_argument("--data", default=str(ROOT / "checkpoints" / "tiny" / "train.jsonl"),
                   help="jsonl to train on (default: the tiny model's word problems)")
    return p


def main():
    """Draw what was asked for."""
    args = parser().parse_args()
    if args.only != "gradients":
        singular_values(args.ckpt, args.out, args.module, args.rank)
    if args.only != "singular_values":
        gradients(args.ckpt, args.out, data.read(args.data), args.rank, args.lr,
                  args.lora_lr, args.steps, args.batch)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"look.py: {e}")
