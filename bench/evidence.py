"""Tables and pictures of EVIDENCE.md, from bench/results/study_*.jsonl, and of relatives/README.md,
from family_*.json (python -m bench.plot).

Each says from which version of its study it is: the full one if that has rows, else the small one.
"""
import statistics
from functools import partial

from bench import studies
from bench.plot import RESULTS, read, source, table

MARKS = {"pissa": ("o", "-"), "lora": ("s", "--"), "full": ("^", ":"), "milora": ("D", "-."),
         "qpissa": ("o", "-"), "loftq": ("^", "-."), "qlora": ("s", "--"), "lq_lora": ("D", ":")}

STEPS = 5, 20, 50, 200


def rows(*names):
    """(rows, what they are, whether tiny) of some studies; the full ones if there are any. Of runs
    that several of them hold, the first."""
    for tiny in False, True:
        found, seen = [], set()
        for name in names:
            for r in studies.rows_of(name, tiny):
                key = tuple(str(r.get(k)) for k in ("method", "rank", "lr", "seed", "steps",
                                                    "batch", "niter", "quant_iters", "measure"))
                if key not in seen:
                    seen.add(key)
                    found.append(r)
        if found:
            return found, described(found, tiny, missing(names, tiny, found)), tiny
    return [], "Not measured yet.", True


def title(found, tiny):
    """What these rows are, and how many."""
    kind = "checkpoints/tiny, the demo's problems" if tiny else "SmolLM2-135M, GSM8K"
    return f"{kind}, {len(found)} runs"


def described(found, tiny, more=""):
    """The same, and on what they ran."""
    return f"{title(found, tiny)}{more}, {', '.join(sorted({r['device'] for r in found}))}"


def missing(names, tiny, found):
    """ of N, if the first of these studies has more runs than were done."""
    jobs = studies.STUDIES[names[0]](tiny)
    done = [r["job"] for r in found]
    return "" if all(j in done for j in jobs) else f" of {len(jobs)}: not finished"


def spread(values, form=".4f", seeds=", {} seeds"):
    """0.5812 (0.5800 to 0.5820, 3 seeds)"""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else (
        f"{mean} ({min(values):{form}} to {max(values):{form}}{seeds.format(len(values))})")


def edge(lr, rates):
    """What is to be said of the best of these rates, if it may lie outside."""
    return ", no other tried" if len(rates) == 1 else ", an edge" * (lr in (min(rates), max(rates)))


def bars(groups):
    """(means, [reaches below, above]) of lists of numbers, for errorbar."""
    means = [statistics.mean(v) for v in groups]
    return means, [[m - min(v) for m, v in zip(means, groups)],
                   [max(v) - m for m, v in zip(means, groups)]]


def under(text, what):
    """A table with what it is of."""
    return f"{text}\n\n{what}."


def curves_table():
    """Training loss (mean of five steps) and gradient norm after some steps."""
    found, tiny = longest()
    lines, methods = [], list(dict.fromkeys(r["method"] for r in found))
    for lr in sorted({r["lr"] for r in found}):
        cells = []
        for same in ([r for r in found if (r["method"], r["lr"]) == (m, lr)] for m in methods):
            mean = [statistics.mean(step) for step in zip(*(r["loss"] for r in same))]
            at = [f"{statistics.mean(mean[n - 5:n]):.3f}" if n <= len(mean) else "" for n in STEPS]
            norm = f"{statistics.mean(r['grad_norm'][0] for r in same):.2f}" if same else ""
            cells.append([str(len(same)), *at, norm])
        lines.append([f"{lr:g}", *(" / ".join(c) for c in zip(*cells))])
    head = ["rate: " + " / ".join(methods), "seeds", *(f"loss, steps {n - 4}-{n}" for n in STEPS),
            "gradient norm, step 1"]
    return under(table(head, lines), described(found, tiny)) if found else "Not measured yet."


def longest():
    """(the rows of curves and length that have the most steps at the first one's batch size,
    whether tiny)."""
    found, _, tiny = rows("curves", "length")
    found = [r for r in found if r["batch"] == found[0]["batch"]]
    most = max((r["steps"] for r in found), default=0)
    return [r for r in found if r["steps"] == most], tiny


def beside_table(names, keys, head):
    """A line for each value of keys, a column for each method: the best loss, and its rate."""
    found, what, _ = rows(*names)
    methods = list(dict.fromkeys(r["method"] for r in found))
    lines = []
    for values in sorted({tuple(r.get(k) for k in keys) for r in found}):
        cells = []
        for method in methods:
            wanted = dict(zip(keys, values), method=method)
            at = studies.losses_at(found, **wanted)
            if at:
                lr = studies.best_rate(found, **wanted)
                cells.append(f"{spread(at[lr])} at {lr:g}{edge(lr, at)}")
            else:
                cells.append("")
        lines.append([*values, *cells])
    return under(table([*head, *methods], lines), what) if found else what


def by_method():
    """(the rows of `learnt`, what they are, whether tiny, {method: (its rows, best rate)}). Of each
    only the seeds that were run at every rate."""
    found, what, tiny = rows("learnt")
    methods = {}
    for method in dict.fromkeys(r["method"] for r in found):
        mine = [r for r in found if r["method"] == method]
        whole = set.intersection(*({r["seed"] for r in mine if r["lr"] == lr}
                                   for lr in {r["lr"] for r in mine}))
        mine = [r for r in mine if r["seed"] in whole]
        methods[method] = mine, studies.best_rate(mine, method=method)
    return found, what, tiny, methods


def learnt_table():
    """Every method at its best rate: what DeltaW is, and what is forgotten. Shares are means of the
    left and the right side."""
    from bench.pictures import NAMES
    found, what, _, methods = by_method()
    lines = []
    for method, (mine, lr) in methods.items():
        same = [r for r in mine if r["lr"] == lr]
        sides = [[f"{k}_{side}" for side in ("left", "right")]
                 for k in ("top", "bottom", "random", "angle")]
        means = [statistics.mean(r["learnt_" + k] for r in same for k in names)
                 for names in (["norm"], *sides, ["stable_rank"])]
        rates = {r["lr"] for r in mine}
        every = ", ".join(f"{rate:g}: " + spread([r["perplexity"] for r in mine if (
            r["lr"] == rate)], ".1f", "") for rate in sorted(rates))
        before = [r["perplexity_before"] for r in found if "perplexity_before" in r]
        lines.append([NAMES.get(method, method), f"{lr:g}{edge(lr, rates)}",
                      spread([r["val"] for r in same]), *(f"{x:.3f}" for x in means), every])
    head = ["method", "best rate", "validation loss", "norm of ΔW / W", "in W's top r",
            "in its bottom r", "by chance", "cos² of angles", "stable rank",
            f"perplexity of other text at every rate, {before[0]:.1f} before" if found else ""]
    return under(table(head, lines), what) if found else what


def svd_table():
    """Error, time and loss against the power iterations."""
    found, what, _ = rows("svd")
    lines = []
    for niter in dict.fromkeys(r["niter"] for r in found):
        same = [r for r in found if r["niter"] == niter]
        lines.append([niter, f"{statistics.median(r['init_seconds'] for r in same):.2f} s",
                      f"{max(r['svd_worst'] for r in same):.1e}",
                      spread([r["val"] for r in same])])
    head = ["power iterations", "time", "excess of the residual, worst", "validation loss"]
    return under(table(head, lines), what) if found else what


def family_table(name):
    """bench_family's: each method at its best rate."""
    result, rows = read(name), []
    for r in result["rows"]:
        if "failed" in r:
            rows.append([r["method"], r["failed"], *[""] * 7])
            continue
        rows.append([
            r["method"], f"{r['lr']:.3g}",
            f"{r['loss']:.4f} ({', '.join(f'{x:.4f}' for x in r['losses'])})",
            f"{statistics.mean(r['accuracies']):.1%}", f"{r['trained']:,}",
            f"{r['init_seconds']:.2f} s", f"{r['peak_gib']:.1f} GiB ({r['planned_gib']:.1f})" if (
                r["peak_gib"]) else "",
            f"{r['tokens_per_second']:,.0f}", ", ".join(
                f"{lr:.3g}: " + (f"{loss:.3f}" if loss else "failed") for lr, loss in r["rates"])])
    head = ["method", "best rate", "validation loss (two seeds)",
            f"accuracy, {max(r.get('problems', 0) for r in result['rows'])} problems",
            "trained numbers", "to initialise", "peak memory (planned)", "tokens/s",
            "seed 0's loss at every rate"]
    if not any(r.get("peak_gib") for r in result["rows"]):
        head, rows = ([line[:6] + line[7:] for line in part] for part in ([head], rows))
        head = head[0]
    return table(head, rows) + source(result) + (f". {result['note']}" if "note" in result else "")


def svdquant_table():
    """bench_svdquant's: the error of a layer's output, and perplexity."""
    result = read("svdquant_smollm2_cpu")
    kinds = list(result["rows"][-1]["kinds"])
    lines = [[r["variant"], *(f"{r['kinds'][k][0]:.1%}" if r["kinds"] else "0" for k in kinds),
              f"{r['kinds']['all'][1]:.1%}" if r["kinds"] else "0", f"{r['perplexity']:.2f}"]
             for r in result["rows"]]
    return table(["", *kinds, "worst", "perplexity"], lines) + source(result)


def eight_table():
    """PiSSA in sixteen and in eight bits at every rate, and their difference, seed by seed. Eight
    bits twice: as they are, and with x not rounded when the loss is taken."""
    found, what, _ = rows("eight")
    lines = []
    for lr in sorted({r["lr"] for r in found}):
        at = {m: {r["seed"]: r for r in found if (r["method"], r["lr"]) == (m, lr)}
              for m in ("pissa", "qpissa")}
        columns, gaps = [spread([r["val"] for r in at["pissa"].values()])], []
        for key in "val", "val_unpacked":
            columns.append(spread([r[key] for r in at["qpissa"].values()]))
            gaps.append(", ".join(f"{r[key] - at['pissa'][seed]['val']:+.4f}"
                                  for seed, r in sorted(at["qpissa"].items())))
        lines.append([f"{lr:g}", *columns, *gaps])
    head = ["rate", "16 bits", "8 bits", "the same, x not rounded in validation",
            "8 less 16, seed by seed", "x not rounded, less 16"]
    return under(table(head, lines), what) if found else what


PARTS = {"svdquant": svdquant_table, "study-eight": eight_table,
         "family-gpu": partial(family_table, "family_gpu"),
         "family-cpu": partial(family_table, "family_cpu"),
         "study-rates": partial(beside_table, ["rates", "seeds"], ["rank"], ["rank"]),
         "study-curves": curves_table, "study-svd": svd_table,
         "study-quantised": partial(beside_table, ["quantised"], ["rank", "quant_iters"],
                                    ["rank", "turns"]),
         "study-learnt": learnt_table,
         "study-length": partial(beside_table, ["length"], ["batch", "steps"], ["batch", "steps"])}


def study_rates():
    """Above, a heat map of each method's loss. Below, loss against the rate at every rank, where it
    is low, and the best rate against the rank with the laws that report.py advises by."""
    from bench.pictures import COLOURS, NAMES, keep, panels, plain_rates
    from support.report import RATES
    found, _, tiny = rows("rates", "seeds")
    if not found:
        return
    figure, (above, (left, right)) = panels(2, 2)
    ranks, every = sorted({r["rank"] for r in found}), [r["val"] for r in found]
    tried = sorted({r["lr"] for r in found})
    for axes, method in zip(above, ("pissa", "lora"), strict=True):
        (mark, style), colour = MARKS[method], COLOURS[method]
        grid = {k: studies.losses_at(found, method=method, rank=k) for k in ranks}
        best = {k: studies.best_rate(found, method=method, rank=k) for k in ranks if grid[k]}
        heat(axes, grid, best, min(every), min(max(every), 2 * min(every)))
        axes.set_title(f"{NAMES[method]}: validation loss")
        for i, (rank, at) in enumerate(grid.items()):
            mean = {lr: statistics.mean(v) for lr, v in at.items()}
            left.plot(list(mean), list(mean.values()), style, marker=mark, color=colour,
                      markersize=4, alpha=(i + 2) / (len(ranks) + 1), linewidth=1 + 0.3 * i,
                      label=NAMES[method] if rank == ranks[-1] else None)
            left.fill_between(list(at), [min(v) for v in at.values()],
                              [max(v) for v in at.values()], color=colour, alpha=0.25, linewidth=0)
            left.annotate(rank, (best[rank], mean[best[rank]]), ((-8, 8)[i % 2], -10), fontsize=7,
                          textcoords="offset points", ha="center", color=colour)
        for rank, lr in best.items():
            right.plot(rank, lr, mark, color=colour,
                       markerfacecolor="none" if lr in (tried[0], tried[-1]) else colour)
        right.plot(ranks, [RATES[method] / k ** 0.5 for k in ranks], style, color=colour,
                   label=f"{NAMES[method]}, {RATES[method]:g} / sqrt(rank)")
    plain_rates(left, tried)
    left.set(ylabel="validation loss, nats a token", title=f"{title(found, tiny)}; a number is the "
             "rank", ylim=(min(every) - 0.02, 1.4 * min(every)))
    left.legend(loc="lower left")
    right.set(xscale="log", yscale="log", xlabel="rank", ylabel="best learning rate",
              title="the rate with the lowest loss; hollow: an edge", ylim=(1e-4, 3e-2))
    right.set_xticks(ranks, ranks)
    right.set_xticks([], minor=True)
    right.legend()
    keep(figure, "study_rates")


def convergence():
    """Training losses at one rate, and PiSSA's less LoRA's at equal rates and at best rates."""
    from bench.pictures import COLOURS, GREY, NAMES, keep, panels, smooth
    found, tiny = longest()
    if not found:
        return
    figure, (left, right) = panels(1, 2)
    mean, best = {}, {m: studies.best_rate(found, method=m) for m in ("pissa", "lora")}
    for method, lr in {(r["method"], r["lr"]) for r in found}:
        runs = [r["loss"] for r in found if (r["method"], r["lr"]) == (method, lr)]
        mean[method, lr] = smooth([statistics.mean(step) for step in zip(*runs)], 5)
    for method in best:
        draw(left, [r for r in found if (r["method"], r["lr"]) == (method, 3e-4)], method,
             f"{NAMES[method]}, rate 0.0003")
    for style, (a, b) in zip((":", "-.", "-"), ((3e-4, 3e-4), (1e-3, 1e-3), best.values())):
        gap = [x - y for x, y in zip(mean["pissa", a], mean["lora", b])]
        right.plot(range(1, len(gap) + 1), gap, style, color=COLOURS["pissa"], label=(
            f"both at {a:g}" if a == b else f"best rates, {a:g} and {b:g}"))
    right.axhline(0, color=GREY, linewidth=1)
    left.set(ylabel="training loss, mean of 5 steps", title=title(found, tiny))
    right.set(ylabel="PiSSA's loss less LoRA's", xlabel="step", xscale="log")
    right.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    right.legend()
    keep(figure, "convergence")


def eight():
    """The training loss of PiSSA in sixteen and in eight bits, and the loss after it."""
    from bench.pictures import COLOURS, keep, panels, plain_rates
    found, _, _ = rows("eight")
    if not found:
        return
    figure, (left, right) = panels(1, 2)
    lr = studies.best_rate(found, method="pissa")
    for method, like, name, aside in (("pissa", "pissa", "16 bits", 0.97),
                                      ("qpissa", "lora", "8 bits", 1.03)):
        draw(left, [r for r in found if (r["method"], r["lr"]) == (method, lr)], like,
             f"PiSSA, {name}, rate {lr:g}")
        at = studies.losses_at(found, method=method)
        means, reach = bars(at.values())
        right.errorbar([x * aside for x in at], means, fmt=MARKS[like][0] + MARKS[like][1],
                       yerr=reach, color=COLOURS[like], capsize=3, label=name)
    plain_rates(right, list(at))
    left.set(ylabel="training loss, mean of 5 steps", title="SmolLM2-135M, GSM8K")
    right.set(ylabel="validation loss", title="after 100 steps; bars: three seeds")
    right.legend()
    keep(figure, "eight")


def learnt():
    """Left, the singular values of DeltaW at each method's best rate. Right, what every rate learns
    of the task, and what it does to other text."""
    from bench.pictures import COLOURS, GREY, NAMES, OCHRE, keep, panels
    found, _, tiny, methods = by_method()
    if not found:
        return
    figure, (left, right) = panels(1, 2)
    for method, (mine, best) in methods.items():
        (mark, style), colour = MARKS[method], COLOURS.get(method, OCHRE)
        spectra = [r["learnt_spectrum"] for r in mine if r["lr"] == best]
        means = [statistics.mean(x) for x in zip(*spectra)]
        there = [i for i, x in enumerate(means) if x > 1e-4]             # the rank is 2 r at most
        left.plot([i + 1 for i in there], [means[i] for i in there], style, color=colour,
                  label=f"{NAMES[method]}, rate {best:g}")
        left.fill_between([i + 1 for i in there], *([of(x[i] for x in spectra) for i in there]
                                                    for of in (min, max)), color=colour, alpha=0.25)
        at = {lr: [r for r in mine if r["lr"] == lr] for lr in sorted({r["lr"] for r in mine})}
        (x, xerr), (y, yerr) = (bars([[r[key] for r in same] for same in at.values()])
                                for key in ("val", "perplexity"))
        right.errorbar(x, y, xerr=xerr, yerr=yerr, fmt=mark + style, color=colour, markersize=5,
                       markerfacecolor="none", capsize=2)
        i = list(at).index(best)
        right.plot(x[i], y[i], mark, color=colour, label=f"{NAMES[method]}, "
                   f"{', '.join(f'{lr:g}' for lr in at)}")
    before = next(r["perplexity_before"] for r in found if "perplexity_before" in r)
    right.axhline(before, color=GREY, linewidth=1, linestyle=(0, (1, 3)))
    left.set(xscale="log", yscale="log", xlabel="index of the singular value",
             ylabel="singular value of ΔW / |ΔW|", title=title(found, tiny))
    right.set(yscale="log", xlabel="validation loss of the task, nats a token",
              ylabel="perplexity of other text", title="filled: the best rate; dotted: before")
    for axes, ticks in (left, (0.02, 0.05, 0.1, 0.2, 0.5)), (right, (40, 50, 60, 80, 100, 130)):
        ticks = [t for t in ticks if axes is left or t > 0.85 * before]
        axes.set_yticks(ticks, ticks)
        axes.set_yticks([], minor=True)
    left.legend()
    right.legend(loc=(0.41, 0.1), fontsize=8)
    keep(figure, "learnt")


def draw(axes, runs, method, label):
    """Losses against steps, a running mean over five; shaded: from seed to seed."""
    from bench.pictures import COLOURS, smooth
    means = [smooth(r["loss"], 5) for r in runs]
    steps = range(1, len(means[0]) + 1)
    axes.plot(steps, [statistics.mean(x) for x in zip(*means)], MARKS[method][1],
              color=COLOURS[method], label=label)
    axes.fill_between(steps, [min(x) for x in zip(*means)], [max(x) for x in zip(*means)],
                      color=COLOURS[method], alpha=0.25, linewidth=0)
    axes.set(xlabel="step", xscale="log")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.legend()


def heat(axes, grid, best, least, most):
    """{rank: {rate: losses}} as a map, dark where the loss is low; a frame at each rank's best.
    least, most: what is black, and what is white, as is more than that."""
    from math import log
    rates = sorted({lr for at in grid.values() for lr in at})
    cells = [[statistics.mean(at[lr]) if lr in at else float("nan") for lr in rates]
             for at in grid.values()]
    axes.imshow([[log(x) for x in line] for line in cells], cmap="Greys_r", aspect="auto",
                vmin=log(least), vmax=log(most))
    for y, (rank, line) in enumerate(zip(grid, cells, strict=True)):
        for x, loss in enumerate(line):
            dark = log(loss) < (log(least) + log(most)) / 2
            axes.text(x, y, f"{loss:.3f}" if loss < 10 else f"{loss:.0f}", ha="center", va="center",
                      fontsize=7, color="white" if dark else "black",
                      weight="bold" if rates[x] == best.get(rank) else "normal")
            if rates[x] == best.get(rank):
                axes.plot(*zip(*((x + a, y + b) for a, b in ((-.47, -.44), (.47, -.44), (.47, .44),
                                                             (-.47, .44), (-.47, -.44)))), "-",
                          color="#e0a030", linewidth=2)
    axes.set_xticks(range(len(rates)), [f"{r:.3g}".replace("e-0", "e-") for r in rates], fontsize=7)
    axes.set_yticks(range(len(grid)), list(grid))
    axes.set(xlabel="learning rate", ylabel="rank")


def landscape():
    """The plane of examples/landscape.py: the real one if it was measured, else the small one."""
    import json

    from bench.pictures import FIGURES
    from examples.landscape import picture
    path = next((p for p in (studies.RESULTS / f"landscape{end}.json" for end in ("", "_tiny"))
                 if p.exists()), None)
    if path:
        picture(json.loads(path.read_text()), FIGURES / "landscape.png")


def family():
    """Loss at each one's best rate, best first, beside how many numbers it trains."""
    from bench.pictures import BLUE, GREEN, GREY, RED, keep, panels
    name = next(n for n in ("family_gpu", "family_cpu") if (RESULTS / f"{n}.json").exists())
    rows = [r for r in read(name)["rows"] if "failed" not in r]
    figure, axes = panels(1, 1, height=0.24 * len(rows) + 1)
    for y, r in enumerate(rows):
        colour = {"pissa": RED, "lora": BLUE, "full": GREY}.get(r["method"], GREEN)
        mark = {"pissa": "o", "lora": "s", "full": "^"}.get(r["method"], "D")
        axes.plot(r["losses"], [y] * len(r["losses"]), "-|", color=colour, markersize=9)
        axes.plot(r["loss"], y, mark, color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), [f"{r['method']}   {short(r['trained'])}" for r in rows],
                    fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="validation loss, nats a token; a line joins two seeds",
             ylabel="method, and numbers it trains",
             title=("checkpoints/tiny, the demo's problems" if name == "family_cpu" else
                    "SmolLM2-135M, GSM8K, 100 steps of 32") + ": each at its own best rate")
    axes.grid(axis="x", linewidth=0.4)
    keep(figure, "family")


def short(n):
    """443904 -> 444 k"""
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k"
