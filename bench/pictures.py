"""The pictures in bench/figures/, from bench/results/*.json: `python -m bench.plot --all`.

Grounds are transparent. All colours can be told from a white page and from a dark one.
"""
import statistics

from bench import evidence, plot
from bench.plot import KINDS, QUANT, ROOT, by_rate, quant_rows, read

INK, RED, BLUE, GREEN, GREY, OCHRE = ("#767c84", "#d1495b", "#3a86c8", "#2a9d5c", "#8a8f96",
                                      "#b07d2b")
COLOURS = {"pissa": RED, "lora": BLUE, "full": GREY, "qpissa": RED, "qlora": BLUE, "loftq": GREEN}
NAMES = {"pissa": "PiSSA", "lora": "LoRA", "full": "all weights", "qpissa": "QPiSSA",
         "qlora": "QLoRA", "loftq": "LoftQ", "milora": "MiLoRA"}
FIGURES = ROOT / "bench" / "figures"


def panels(rows, columns, height=3.4, **options):
    """A figure and its panels, of that height in inches; options: of pyplot.subplots."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    matplotlib.rcParams.update(
        {name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color",
                                "ytick.color", "legend.labelcolor")}
        | {"legend.frameon": False, "legend.fontsize": 9, "axes.titlesize": 10,
           "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"})
    return plt.subplots(rows, columns, figsize=(9.5, height * rows), **options)


def keep(figure, name):
    """Write a figure, transparent."""
    from matplotlib import pyplot as plt
    figure.tight_layout(w_pad=2.5)
    figure.savefig(FIGURES / f"{name}.png", dpi=130, transparent=True)
    plt.close(figure)


def percent(axis):
    """Ticks of an axis as 20%."""
    axis.set_major_formatter(lambda v, _: f"{v:.0%}")


def plain_rates(axes, rates):
    """A logarithmic axis of learning rates with those that were tried as its ticks."""
    axes.set(xscale="log", xlabel="learning rate")
    names = [f"{r:.3g}".replace("e-0", "e-") for r in rates]
    axes.set_xticks(rates, names, rotation=60, fontsize=7)
    axes.set_xticks([], minor=True)


# -------------------------------------------------------------------------------- what is learnt

def smooth(losses, window):
    """Of every step the mean of the last ones, so many or all there are."""
    return [statistics.mean(losses[max(0, i + 1 - window):i + 1]) for i in range(len(losses))]


def draw_losses(axes, result, method, lr, window, less=None):
    """The training loss of a method at one rate: mean of its seeds, a running mean over `window`
    steps. less: a method and a rate whose loss is subtracted."""
    def mean(method, lr):
        runs = [r["losses"] for r in result["runs"] if (r["method"], r["lr"]) == (method, lr)]
        return smooth([statistics.mean(step) for step in zip(*runs)], window)

    y = mean(method, lr)
    if less:
        y = [a - b for a, b in zip(y, mean(*less))]
    axes.plot(range(1, len(y) + 1), y, color=COLOURS[method],
              label=f"{NAMES[method]}, rate {lr:g}")


def draw_rates(axes, result, key):
    """A measure against the learning rate, every method by its name: mean, and all seeds' range."""
    rates = sorted({r["lr"] for r in result["runs"]})
    for method in result["best"]:
        found = by_rate(result, method, key)
        x, colour = list(found), COLOURS[method]
        axes.plot(x, [statistics.mean(s) for s in found.values()], "o-", color=colour, markersize=4,
                  label=NAMES[method])
        axes.fill_between(x, [min(s) for s in found.values()], [max(s) for s in found.values()],
                          color=colour, alpha=0.25, linewidth=0)
    plain_rates(axes, rates)


def arrow(axes, result, y):
    """From LoRA's best rate to PiSSA's."""
    lora, pissa = (result["best"][m]["lr"] for m in ("lora", "pissa"))
    axes.annotate("", (pissa, y), (lora, y), arrowprops={"arrowstyle": "->", "color": RED})
    axes.annotate(f"PiSSA's best rate:\n{pissa / lora:g} of LoRA's", ((lora * pissa) ** 0.5, y),
                  (0, -4), textcoords="offset points", color=RED, ha="center", va="top",
                  fontsize=8)


def same_rate():
    """PiSSA beside LoRA: at every rate that both have, and each at its own best."""
    figure, both = panels(1, 2)
    demo, gsm8k = read("demo_h200"), read("gsm8k_h200")
    for axes, result, key in (both[0], demo, "accuracy"), (both[1], gsm8k, "val_loss"):
        at = {m: by_rate(result, m, key) for m in ("pissa", "lora")}
        shared = sorted(at["pissa"].keys() & at["lora"].keys())
        best = {m: result["best"][m]["lr"] for m in at}
        groups = [(f"{lr:g}", {m: lr for m in at}) for lr in shared] + [("each at\nits best", best)]
        for i, (_, rates) in enumerate(groups):
            for side, (method, lr) in zip((-0.2, 0.2), rates.items()):
                y, place = statistics.mean(at[method][lr]), i + side + 0.3 * (i == len(shared))
                named = {"color": COLOURS[method], "label": NAMES[method] if not i else None}
                if key == "accuracy":                            # a bar begins at 0, a point not
                    axes.bar(place, y, 0.36, **named)
                else:
                    axes.plot(place, y, "o", markersize=9, **named)
                axes.annotate(f"{y:.0%}" if key == "accuracy" else f"{y:.3f}", (place, y), (0, 7),
                              textcoords="offset points", ha="center", fontsize=8)
        places = [*range(len(shared)), len(shared) + 0.3]
        axes.set_xticks(places, [name for name, _ in groups])
        axes.tick_params(axis="x", length=0)
        axes.set(xlabel="both at the same learning rate, and each at its own best")
    both[0].set(ylabel="held-out problems solved", title="demo, tiny model: higher is better")
    both[0].set_ylim(0, 1.22)
    both[0].set_yticks([0, 0.25, 0.5, 0.75, 1])
    percent(both[0].yaxis)
    both[1].set(ylabel="validation loss", ylim=(0.58, 0.65),
                title="GSM8K, SmolLM2-135M: lower is better")
    for axes in both:
        axes.legend(loc="upper left" if axes is both[0] else "upper right", ncols=2)
    keep(figure, "same_rate")


def demo():
    """Left: loss of every method at its best rate. Right: accuracy against the learning rate."""
    result, curves = read("demo_h200"), read("demo_cpu")
    figure, (left, right) = panels(1, 2)
    for method, best in result["best"].items():
        draw_losses(left, curves, method, best["lr"], 5)
    left.set(xlabel="step", ylabel="training loss, mean of 5 steps", yscale="log",
             title="each at its best learning rate, mean of 3 seeds")
    left.legend()
    draw_rates(right, result, "accuracy")
    right.set(ylabel="held-out problems solved", ylim=(0, 1.02),
              title="accuracy at every rate; bands: 3 seeds")
    percent(right.yaxis)
    arrow(right, result, 0.3)
    right.legend(loc="lower left", bbox_to_anchor=(0.18, 0))
    keep(figure, "demo")


def gsm8k():
    """Left: training losses less LoRA's. Right: validation loss against the learning rate."""
    result, (figure, (left, right)) = read("gsm8k_h200"), panels(1, 2)
    reference = "lora", result["best"]["lora"]["lr"]
    for method in "pissa", "lora", "full":
        draw_losses(left, result, method, result["best"][method]["lr"], 15, reference)
    left.set(xlabel="step", ylabel="training loss less LoRA's",
             ylim=(-0.06, 0.06), title="each at its best rate; mean of 15 steps and 2 seeds")
    left.legend()
    draw_rates(right, result, "val_loss")
    right.set(ylabel="validation loss", title="validation loss at every rate; bands: 2 seeds")
    right.set_ylim(0.57, 0.655)
    arrow(right, result, 0.587)
    right.legend(loc="lower left")
    keep(figure, "gsm8k")


def quantised():
    """Training losses in four bits, every method at its best rate: the demo, and GSM8K."""
    figure, both = panels(1, 2)
    for axes, name, title, window in zip(both, ("demo4bit_cpu", "gsm8k4bit_h200"), (
            "the demo, tiny model", "GSM8K, SmolLM2-135M"), (5, 15)):
        result = read(name)
        for method, best in result["best"].items():
            draw_losses(axes, result, method, best["lr"], window)
        axes.set(xlabel="step", ylabel=f"training loss, mean of {window} steps",
                 title=title + ", mean of 2 seeds", yscale="log")
        axes.legend()
    both[1].set(yscale="linear", ylim=(0.55, 0.9))
    keep(figure, "quantised")


def quant(rank=16, turns=5):
    """Error reduction of every kind of matrix."""
    figure, both = panels(1, 2, sharey=True)
    colours = {"QPiSSA": RED, "QPiSSA, authors'": OCHRE, "LoftQ": BLUE}
    for axes, (name, what) in zip(both, QUANT.items()):
        for i, (method, at) in enumerate(quant_rows(read(name), rank).items()):
            kinds = {KINDS.get(k, k): mean for k, (mean, _) in at[8, turns]["kinds"].items()}
            order = sorted(kinds, key="q k v o gate up down".split().index)
            heights = [kinds[k] for k in order] + [at[8, turns]["all"][0]]
            places = [*range(len(order)), len(order) + 0.4]
            axes.bar([p + 0.27 * (i - 1) for p in places], heights, 0.25, label=method,
                     color=colours[method])
        axes.set_xticks(places, [*order, "all"])
        axes.set(title=f"{what}, rank {rank}, {turns} turns")
        axes.tick_params(axis="x", length=0)
    percent(both[0].yaxis)
    both[0].set(ylabel="error of nf4(W) that is avoided,\nnuclear norm")
    both[1].legend()
    keep(figure, "quant")


# --------------------------------------------------------------------------------- time and memory

def speeds():
    """[(what, the fastest peer, how many times as fast ours is)], from the result files."""
    packing = read("packing_7b_h200")["sides"]
    rows = [(what, peer, ratio) for what, (peer, ratio) in plot.beside_peers().items()]
    rows += [("steps on GSM8K, packed", "PEFT, padded", packing["packed"]["times_as_fast_as_peft"])]
    rows += [(f"generation, {r['batch']} answer{'s' * (r['batch'] > 1)}", "transformers, eager",
              r["ratio"]) for r in read("generate_h200")["rows"] if "Llama" in r["model"]]
    for what, name, rank, ours in (("A and B, 7B, rank 128", "svd_h200", "128", "ours (grouped)"),
                                   ("A and B, SmolLM2, rank 16, a CPU core", "svd_smollm2_cpu",
                                    "16", "ours (default)")):
        found = read(name)["ranks"][rank]
        peft = found["svd_lowrank(niter=4)"]
        times = peft["excess_max"] / found[ours]["excess_max"]
        rows.append((what, f"PEFT's SVD, whose error is {times:.0f} times ours",
                     peft["seconds"] / found[ours]["seconds"]))
    return rows


def speed():
    """How many times as fast as the fastest peer, at 7B's size unless it says otherwise."""
    figure, axes = panels(1, 1, 5.4)
    rows = speeds()[::-1]
    for i, (_, _, ratio) in enumerate(rows):
        axes.barh(i, ratio - 1, 0.62, left=1, color=RED if ratio >= 1 else GREY)
        axes.annotate(f"{ratio:.2f}x", (ratio, i), (4 if ratio >= 1 else -4, 0), va="center",
                      textcoords="offset points", ha="left" if ratio >= 1 else "right", fontsize=9)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{what}\nbeside {peer}" for what, peer, _ in rows],
                    fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "as fast", "2x", "4x", "8x"])
    axes.set_xticks([], minor=True)
    axes.set(xlim=(0.22, 12), xlabel="times as fast as the fastest peer",
             title="Llama-2-7B's shape on one H100 or H200, unless it says otherwise")
    axes.tick_params(axis="y", length=0)
    keep(figure, "speed")


def draw_scale(axes, x, label):
    """Logarithmic axes whose ticks are the values that were measured."""
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_xticks(x, [str(v) for v in x], fontsize=8)
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    ticks = [t * 10**e for e in range(-1, 4) for t in (1, 2, 5) if low <= t * 10**e <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    axes.set_yticks([], minor=True)


def draw_steps(axes, result, axis, measured, planned=None):
    """A measure of steps against rank, length or depth: points, and what was planned as lines."""
    for method, checkpointing in dict.fromkeys(
            (r["method"], r["checkpointing"]) for r in result["step"]):
        rows = [r for r in result["step"] if axis == r["axis"]
                and (r["method"], r["checkpointing"]) == (method, checkpointing)]
        x, colour = [r["value"] for r in rows], RED if method == "lora" else BLUE
        name = ("four bits" if method == "qlora" else "bfloat16") + (
            ", checkpointing" if checkpointing else "")
        axes.plot(x, [r[measured] for r in rows], "o" if planned else "o-", color=colour,
                  markersize=4, markerfacecolor="none" if checkpointing else None, label=name)
        if planned:
            axes.plot(x, [r[planned] for r in rows], color=colour, linewidth=1,
                      linestyle=":" if checkpointing else "-")
    draw_scale(axes, x, axis)


def planned():
    """The peak of a step: points are measured, lines are planned."""
    result, (figure, row) = read("scale_h100"), panels(1, 3)
    for axes, axis in zip(row, ("rank", "depth")):
        axes.set_ylim(1, 20)
        draw_steps(axes, result, axis, "peak_gib", "planned_gib")
    found, rows = {}, plot.long_rows()
    for (name, tokens, how, r), (_, job, _, moment) in zip(
            rows, plot.plan_rows()[-len(rows):], strict=True):
        found.setdefault((name, how), []).append(
            (tokens, r["peak_gib"], plot.planned_gib(job, moment)))
    for (name, how), points in found.items():
        x, measured, lines = zip(*points)
        colour, style = RED if name == "16 bits" else BLUE, {"kept": "-", "offload": "--"}
        row[2].plot(x, measured, "o", color=colour, markersize=4,
                    markerfacecolor=None if how == "kept" else "none")
        row[2].plot(x, lines, color=colour, linewidth=1, linestyle=style.get(how, ":"),
                    label=f"{name}, {how}")
    row[2].set_ylim(5, 200)
    draw_scale(row[2], [8192, 32768, 131072], "tokens of a row")
    row[0].set(ylabel="peak GiB; lines: planned")
    row[0].legend(loc="upper left", fontsize=8)
    row[0].set(title="7B's shape, 4 layers, 2048 tokens")
    row[1].set(title="2048 tokens")
    row[2].set(title="all 32 layers")
    row[2].legend(loc="upper left", fontsize=7)
    keep(figure, "planned")


def scale():
    """Seconds to decompose, and seconds of a step, each against what it depends on."""
    result, (figure, grid) = read("scale_h200"), panels(2, 3, 2.8)
    for axes, axis in zip(grid[0], ("rank", "width", "matrices")):
        rows = [r for r in result["init"] if r["axis"] == axis]
        axes.plot([r["value"] for r in rows], [r["seconds"] * 1e3 for r in rows], "o-", color=INK,
                  markersize=4)
        axes.set_ylim(5, 100)
        draw_scale(axes, [r["value"] for r in rows], axis)
    for axes, axis in zip(grid[1], ("rank", "length", "depth")):
        axes.set_ylim(0.005, 0.3)
        draw_steps(axes, result, axis, "seconds")
        axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2], [10, 20, 50, 100, 200], fontsize=8)
    grid[0, 0].set(ylabel="ms to decompose")
    grid[1, 0].set(ylabel="ms a step")
    grid[0, 1].set(title="matrices of 7B's shape")
    grid[1, 1].set(title="4 layers, one row of 2048 tokens, unless the axis says another")
    grid[1, 2].legend(fontsize=7)
    keep(figure, "scale")


def gpus():
    """Tokens a second of several GPUs over those of one, beside as many times as there are GPUs."""
    figure, axes = panels(1, 1, 3.6)
    found = {}
    for path in sorted(plot.RESULTS.glob("gpus_*.json")):
        parts = read(path.stem)["parts"]
        for part, r in parts.items():
            if ratio := plot.over_one(parts, part):
                found.setdefault(part, {1: 1.0})[r["gpus"]] = ratio
    most = max(max(at) for at in found.values())
    axes.plot([1, most], [1, most], "-", color=GREY, linewidth=1, label="ideal")
    for i, (part, at) in enumerate(sorted(found.items(), key=lambda f: -f[1][max(f[1])])):
        axes.plot(list(at), list(at.values()), ["-", "--", "-.", ":"][i % 4],
                  marker="os^Dvx*P"[i % 8], color=RED if part.startswith("replicas") else BLUE,
                  markersize=5, label=f"{part}: {at[max(at)]:.2f}")
    axes.set(xlabel="GPUs", ylabel="tokens a second, over one GPU's",
             title="7B, rank 128, 8 x 512 tokens a GPU and step")
    axes.set_xticks(sorted({n for at in found.values() for n in at}))
    axes.legend(fontsize=8)
    keep(figure, "gpus")


PICTURES = (same_rate, demo, gsm8k, quantised, quant, speed, planned, scale, gpus,
            evidence.study_rates, evidence.convergence, evidence.learnt, evidence.eight,
            evidence.landscape, evidence.family)
