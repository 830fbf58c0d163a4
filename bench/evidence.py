"""Tables and pictures of EVIDENCE.md, from bench/results/study_*.jsonl, and of relatives/README.md,
from family_*.json (python -m bench.plot).

Each says from which version of its study it is: the full one if that has rows, else the small one.
"""
import json
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
            kind = "checkpoints/tiny, the demo's problems" if tiny else "SmolLM2-135M, GSM8K"
            return found, f"{kind}, {len(found)} runs, {found[0]['device']}", tiny
    return [], "Not measured yet.", True


def spread(values, form=".4f"):
    """0.5812 (0.5800 to 0.5820, 3 seeds)"""
    mean = f"{statistics.mean(values):{form}}"
    return mean if len(values) == 1 else (
        f"{mean} ({min(values):{form}} to {max(values):{form}}, {len(values)} seeds)")


def under(text, what):
    """A table with what it is of."""
    return f"{text}\n\n{what}."


def rates_table():
    """The best rate of each method and rank, and the loss there; every rate."""
    found, what, _ = rows("rates", "seeds")
    lines = []
    for method, rank in sorted({(r["method"], r["rank"]) for r in found}):
        at = studies.losses_at(found, method=method, rank=rank)
        lr = studies.best_rate(found, method=method, rank=rank)
        edge = " (the edge of the grid)" if lr in (min(at), max(at)) else ""
        lines.append([method, rank, f"{lr:g}{edge}", spread(at[lr]), ", ".join(
            f"{k:g}: {statistics.mean(v):.3f}" for k, v in at.items())])
    head = ["method", "rank", "best rate", "validation loss there", "at every rate"]
    return under(table(head, lines), what) if found else what


def curves_table():
    """Training loss (mean of five steps) and gradient norm after some steps."""
    found, what, _ = rows("curves")
    if not found:
        found, what, _ = rows("rates")
        most = max((r["rank"] for r in found), default=0)
        found = [r for r in found if r["rank"] == most]
        what += f"; of the study of rates, those of rank {most}" * bool(found)
    lines = []
    for method, lr in sorted({(r["method"], r["lr"]) for r in found}, key=lambda k: k[::-1]):
        same = [r for r in found if (r["method"], r["lr"]) == (method, lr)]
        mean = [statistics.mean(step) for step in zip(*(r["loss"] for r in same))]
        at = [f"{statistics.mean(mean[n - 5:n]):.3f}" if n <= len(mean) else "" for n in STEPS]
        norm = statistics.mean(r["grad_norm"][0] for r in same)
        lines.append([f"{lr:g}", method, len(same), *at, f"{norm:.2f}"])
    head = ["rate", "method", "seeds", *(f"loss, steps {n - 4}-{n}" for n in STEPS),
            "gradient norm, step 1"]
    return under(table(head, lines), what) if found else what


def grouped_table(name, keys, head):
    """Of each value of keys the best rate and the loss there."""
    found, what, _ = rows(name)
    lines = []
    for values in dict.fromkeys(tuple(r.get(k) for k in keys) for r in found):
        wanted = dict(zip(keys, values))
        lr, at = studies.best_rate(found, **wanted), studies.losses_at(found, **wanted)
        lines.append([*values, f"{lr:g}" + " (no other was tried)" * (len(at) == 1),
                      spread(at[lr])])
    return under(table([*head, "best rate", "validation loss"], lines), what) if found else what


def learnt_table():
    """Every method at its best rate: what DeltaW is, and what is forgotten."""
    found, what, _ = rows("learnt")
    lines = []
    for method in dict.fromkeys(r["method"] for r in found):
        lr = studies.best_rate(found, method=method)
        same = [r for r in found if (r["method"], r["lr"]) == (method, lr)]
        cells = [f"{statistics.mean(r['learnt_' + k] for r in same):.3f}" for k in (
            "norm", "top_left", "top_right", "random_right", "bottom_left", "bottom_right",
            "angle_left", "stable_rank")]
        before = [r["perplexity_before"] for r in found if "perplexity_before" in r]
        lines.append([method, f"{lr:g}", len(same), *cells, f"{before[0]:.2f}" if before else "",
                      spread([r["perplexity"] for r in same], ".2f")])
    head = ["method", "rate", "seeds", "norm of ΔW / W", "in W's top r, left", "right",
            "right, by chance", "bottom r, left", "right", "cos² of angles", "stable rank",
            "perplexity before", "after"]
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
    return table(head, rows) + source(result)


def search_table():
    """bench_family's rows of seed 0 on a GPU: every method so far, at all its rates."""
    found, named = jsonl("family_h100"), {}
    for r in found:
        named.setdefault(" ".join([r["job"]["method"], *r["job"].get("option", [])]), []).append(r)
    lines = []
    for name, rows in named.items():
        tried = sorted((r for r in rows if r["job"]["steps"] == 100), key=lambda r: r["job"]["lr"])
        alone = [r for r in rows if r["job"]["steps"] != 100]
        best = min(tried, key=lambda r: r["val"], default=None)
        if not best or not alone:
            continue
        edge = " (edge)" if best in (tried[0], tried[-1]) else ""
        lines.append((best["val"], [
            name, f"{best['job']['lr']:.3g}{edge}", f"{best['val']:.4f}", f"{best['trained']:,}",
            f"{alone[0]['init_seconds']:.2f} s",
            f"{alone[0]['peak_gib']:.1f} GiB ({alone[0]['planned_gib']:.1f})",
            f"{alone[0]['tokens_per_second']:,.0f}",
            ", ".join(f"{r['job']['lr']:.3g}: {r['val']:.3f}" for r in tried)]))
    return table(["method", "best rate", "validation loss", "trained numbers", "to initialise",
                  "peak memory (planned)", "tokens/s", "at every rate"],
                 [line for _, line in sorted(lines)]) + (
        f"\n\n`python -m bench.bench_family --rows bench/results/family_h100.jsonl` · "
        f"{found[0]['device']}, torch {found[0]['torch']}, one seed, not finished")


def svdquant_table():
    """bench_svdquant's: the error of a layer's output, and perplexity."""
    result = read("svdquant_smollm2_cpu")
    kinds = list(result["rows"][-1]["kinds"])
    lines = [[r["variant"], *(f"{r['kinds'][k][0]:.1%}" if r["kinds"] else "0" for k in kinds),
              f"{r['kinds']['all'][1]:.1%}" if r["kinds"] else "0", f"{r['perplexity']:.2f}"]
             for r in result["rows"]]
    return table(["", *kinds, "worst", "perplexity"], lines) + source(result)


def jsonl(name):
    """The rows of a file in bench/results."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def begun_table():
    """PiSSA and LoRA on real weights, as far as the study of rates and the family's search went."""
    found = jsonl("study_rates_begun") + [r for r in jsonl("family_h100") if (
        r["job"]["method"] in ("pissa", "lora") and r["job"]["steps"] == 100)]
    lines = []
    for rank, method in sorted({(r["job"]["rank"], r["job"]["method"]) for r in found}):
        same = sorted((r for r in found if (r["job"]["rank"], r["job"]["method"]) == (
            rank, method)), key=lambda r: r["job"]["lr"])
        lines.append([method, rank, f"{same[0]['grad_norm'][0]:.2f}", "; ".join(
            f"{r['job']['lr']:g}: {statistics.mean(r['loss'][:5]):.2f}, {r['val']:.3f}"
            for r in same)])
    head = ["method", "rank", "first gradient norm",
            "at every rate: training loss of steps 1-5, validation loss after 100"]
    return under(table(head, lines), f"SmolLM2-135M, GSM8K, 32 examples a step, one seed, "
                 f"{len(found)} runs, {found[0]['device']}; not finished")


PARTS = {"study-begun": begun_table, "svdquant": svdquant_table,
         "family-gpu": search_table, "family-cpu": partial(family_table, "family_cpu"),
         "study-rates": rates_table, "study-curves": curves_table, "study-svd": svd_table,
         "study-quantised": partial(grouped_table, "quantised", ["rank", "quant_iters", "method"],
                                    ["rank", "turns", "method"]),
         "study-learnt": learnt_table,
         "study-length": partial(grouped_table, "length", ["batch", "steps", "method"],
                                 ["batch", "steps", "method"])}


def study_rates():
    """Above, a heat map of each method's loss. Below, loss against the rate at every rank, and the
    best rate against the rank."""
    from bench.pictures import BLUE, NAMES, RED, keep, panels, plain_rates
    found, what, _ = rows("rates", "seeds")
    if not found:
        return
    figure, (above, (left, right)) = panels(2, 2)
    ranks, every = sorted({r["rank"] for r in found}), [r["val"] for r in found]
    for axes, method, colour in zip(above, ("pissa", "lora"), (RED, BLUE), strict=True):
        mark, style = MARKS[method]
        grid = {k: studies.losses_at(found, method=method, rank=k) for k in ranks}
        best = {k: studies.best_rate(found, method=method, rank=k) for k in ranks if grid[k]}
        heat(axes, grid, best, min(every), max(every))
        axes.set_title(f"{NAMES[method]}: validation loss")
        for i, (rank, at) in enumerate(grid.items()):
            left.plot(list(at), [statistics.mean(v) for v in at.values()], style, marker=mark,
                      color=colour, markersize=4, alpha=(i + 2) / (len(ranks) + 1),
                      linewidth=0.8 + 0.5 * i, label=f"{NAMES[method]}, rank {rank}")
            left.fill_between(list(at), [min(v) for v in at.values()],
                              [max(v) for v in at.values()], color=colour, alpha=0.25, linewidth=0)
        right.plot(list(best), list(best.values()), style, marker=mark, color=colour,
                   label=NAMES[method])
    plain_rates(left, sorted({r["lr"] for r in found}))
    left.set(ylabel="validation loss, nats a token", title=what.rpartition(", ")[0], yscale="log")
    left.legend(fontsize=7)
    right.set(xscale="log", yscale="log", xlabel="rank", ylabel="best learning rate",
              title="the rate with the lowest loss", ylim=(1.5e-5, 3e-2))
    right.set_xticks(ranks, ranks)
    right.set_xticks([], minor=True)
    right.legend()
    keep(figure, "study_rates")


def heat(axes, grid, best, least, most):
    """{rank: {rate: losses}} as a map, dark where the loss is low; a frame at each rank's best.
    least, most: what is black, and what is white."""
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
        axes.plot(r["losses"], [y] * len(r["losses"]), "-|", color=colour, linewidth=1)
        axes.plot(r["loss"], y, mark, color=colour, markersize=5)
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
