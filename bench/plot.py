"""The tables and pictures of README.md, bench/RESULTS.md and docs/, from bench/results/*.json.

    python -m bench.plot --check        # writes nothing; exit status 1 if something is out of date
    python -m bench.plot --text         # writes what stands between <!-- NAME --> and <!-- end -->
    python -m bench.plot --all          # the same, and the pictures (pictures.py)

Nothing there is typed by hand.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / name for name in ("README.md", "bench/RESULTS.md", "docs/memory.md",
                                  "checkpoints/tiny/README.md", "EVIDENCE.md",
                                  "relatives/README.md")]


def read(name):
    """One result file."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def config(*numbers, **named):
    """A model.Config; torch is loaded only if one is wanted."""
    import model
    return model.Config(*numbers, **named)


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def source(result):
    """Where the figures come from. Weights are where README puts them."""
    command = result["command"].replace(" smollm2/", " checkpoints/smollm2/")
    return (f"\n\n`{command}` · {result['device']}, torch {result['torch']}, commit "
            f"{result['commit']}")


def by_rate(demo, method, key):
    """{learning rate: [value of every seed]} of one method."""
    rates = sorted({r["lr"] for r in demo["runs"] if r["method"] == method and key in r})
    return {lr: [r[key] for r in demo["runs"] if (r["method"], r["lr"]) == (method, lr)]
            for lr in rates}


def demo_table():
    """Every method at its own best learning rate, and at the others."""
    demo, cpu = read("demo_h200"), read("demo_cpu")
    rows = []
    for method, best in demo["best"].items():
        scores, losses = (by_rate(demo, method, k) for k in ("accuracy", "val_loss"))
        lr, n = best["lr"], len(scores[best["lr"]])
        sweep = ", ".join(f"{rate:g}: {statistics.mean(s):.0%}" for rate, s in scores.items())
        again = f"{statistics.mean(by_rate(cpu, method, 'accuracy')[lr]):.1%}"
        rows.append([method, f"{lr:g}", f"**{best['accuracy']:.1%}** ({min(scores[lr]):.1%} to "
                     f"{max(scores[lr]):.1%})", again, f"{statistics.mean(losses[lr]):.3f}", sweep])
    head = ["method", "best rate", f"accuracy, mean of {n} seeds", "on two CPU cores",
            "validation loss", "mean accuracy at every rate"]
    return table(head, rows) + source(demo) + source(cpu)


def gsm8k_table():
    """SmolLM2 on GSM8K: every method at its own best rate, and at the others."""
    result, rows = read("gsm8k_h200"), []
    for method, best in result["best"].items():
        at = {key: by_rate(result, method, key) for key in ("accuracy", "val_loss", "peak_gpu_gib")}
        lr, mean = best["lr"], statistics.mean
        scores = at["accuracy"][lr]
        rows.append([method, f"{lr:g}", f"{mean(at['val_loss'][lr]):.4f}",
                     f"**{mean(scores):.1%}** ({', '.join(f'{s:.1%}' for s in scores)})",
                     f"{result['alone'][method]['tokens_per_second']:,}",
                     f"{min(map(min, at['peak_gpu_gib'].values())):.1f} GiB",
                     ", ".join(f"{rate:g}: {mean(v):.3f}, {mean(at['accuracy'][rate]):.1%}"
                               for rate, v in at["val_loss"].items())])
    loss = statistics.mean(r["val_loss_before"] for r in result["runs"] if "val_loss_before" in r)
    rows.append(["none", "", f"{loss:.4f}", f"{result['base']['accuracy']:.1%}", "", "", ""])
    text = table(["method", "best rate", "validation loss", "accuracy, mean (seeds)", "tokens/s",
                  "peak memory", "validation loss and accuracy at every rate"], rows)
    return f"{text}{source(result)}; full at 8e-4: `{result['command_added']}`"


def generate_table():
    """Tokens per second beside transformers."""
    parts = [read(name) for name in ("generate_h200", "generate_cpu")]
    rows = [[f"{r['model']}, {r['dtype']}", "GPU" if "NVIDIA" in part["device"] else "CPU",
             r["batch"], f"{r['tokens_per_second']['ours']:,.0f}",
             f"{r['tokens_per_second']['transformers']:,.0f}", f"**{r['ratio']:.2f}x**"]
            for part in parts for r in part["rows"]]
    return table(["model", "on", "batch", "tokens/s", "transformers, eager", "ratio"],
                 rows) + "".join(map(source, parts))


def quantised_training_table():
    """The demo and SmolLM2 on GSM8K in four bits: every method at its best rate, and the others."""
    rows, parts = [], {"demo": read("demo4bit_cpu"), "GSM8K": read("gsm8k4bit_h200")}
    for name, result in parts.items():
        for method, best in result["best"].items():
            before, loss, right = (by_rate(result, method, key)
                                   for key in ("val_loss_before", "val_loss", "accuracy"))
            lr, mean = best["lr"], statistics.mean
            rows.append([name, method, f"{lr:g}", f"{mean(before[lr]):.3f}",
                         f"{mean(loss[lr]):.4f}", f"{mean(right[lr]):.1%}" if right else "",
                         len(loss[lr]), ", ".join(f"{rate:g}: {mean(v):.3f}" + (
                             f", {mean(right[rate]):.1%}" if right else "")
                             for rate, v in loss.items())])
    head = ["", "method", "best rate", "validation loss at step 0", "at the end", "accuracy",
            "seeds", "at every rate"]
    return table(head, rows) + "".join(map(source, parts.values()))


def step_rows(step, length=512):
    """Our steps beside the fastest of PEFT's that are alike; compiled ones, if there are any."""
    def kind(name):
        return "1 row" in name, "checkpointing" in name, "compiled" in name

    for ours, ratio in step["times as fast"].items():
        alike = [r for name, r in step.items() if name.startswith("PEFT")
                 and kind(name) == kind(ours)] or [
                     r for name, r in step.items() if name.startswith("PEFT")
                     and kind(name) == (*kind(ours)[:2], False)]
        mine, theirs = step[ours], max(alike, key=lambda r: r["tokens_per_second"])
        what = ", ".join(ours.split(", ")[1:]).removeprefix("1 row, ") or "eager"
        yield [f"{1 if kind(ours)[0] else 8} x {length} tokens, {what}",
               f"{mine['step_seconds']:.3f} s", f"{theirs['step_seconds']:.3f} s",
               f"**{ratio:.2f}x**",
               f"{mine['tokens_per_second']:,.0f} tokens/s",
               f"{mine['peak_gib']:.1f} / {theirs['peak_gib']:.1f} GiB"]


def step_table():
    """A step in bfloat16 beside PEFT's, and what of the GPU's arithmetic it uses."""
    from support.plan import flops_in_all, job_of
    result, rows = read("step_h200"), []
    for name, cells in zip(result["step"]["times as fast"], step_rows(result["step"])):
        job = job_of(config(), "lora", result["rank"], rows=1 if "1 row" in name else 8,
                  checkpointing="checkpointing" in name, compiled="compiled" in name)
        rate = flops_in_all(job) * result["step"][name]["tokens_per_second"]
        rows.append([*cells, f"{rate / 1e12:.0f}"])
    first = {name: result["step"][name]["first_step_seconds"]
             for name in ("ours, compiled", "PEFT, autocast, compiled")}
    return table([f"Llama-2-7B shapes, rank {result['rank']}", "ours", "PEFT", "ratio", "rate",
                  "peak memory, ours / PEFT", "TFLOP/s"], rows) + (
        "\n\nCompiled, the first step takes {:.0f} s here and {:.0f} s there.".format(
            *first.values())) + source(result)


def eight_table():
    """A step in eight bits, in sixteen, and the peers': milliseconds and memory of every shape."""
    result, other = read("step_eight_h100"), read("step_eight_h200")
    ours = {part: f"ours, {part}" for part in ("16 bits", "8 bits")}
    shapes = [k for k, v in result["16 bits"].items() if "step_seconds" in v]

    def cell(figures):
        if not figures:
            return ""
        return f"{1e3 * figures['step_seconds']:.1f} ms, {figures['peak_gib']:.1f} GiB" if (
            "step_seconds" in figures) else "failed"

    def lines(result, names):
        return [[name, *(cell(result[part].get(shape)) for shape in shapes)]
                for part, name in names.items()]

    first = lines(result, ours | {"PEFT, Liger": "PEFT, Liger",
                                  "torchtune": "torchtune (A, B in bfloat16)"})
    more = lines(other, ours | {"4 bits": "ours, 4 bits", "unsloth": "unsloth"})
    ratios = table(["beside the fastest peer", "", "times as fast"], [
        [what, peer, f"**{ratio:.2f}x**"] for what, (peer, ratio) in beside_peers().items()])
    return "\n\n".join((table(["one H100", *shapes], first) + source(result),
                        table(["one H200", *shapes], more) + source(other), ratios))


def beside_peers():
    """{what: (the fastest peer, how many times as fast ours is)} of a step."""
    def ratio(shape, peer, ours="16 bits"):
        result = read("step_eight_h200" if peer == "unsloth" else "step_eight_h100")
        times = result[peer][shape]["step_seconds"] / result[ours][shape]["step_seconds"]
        return peer + " in 16 bits" * (ours == "8 bits"), times

    return {"one step, 8 x 512 tokens": ratio("8 x 512", "unsloth"),
            "the same, ours in 8 bits": ratio("8 x 512", "unsloth", "8 bits"),
            "one row of 8192 tokens": ratio("1 x 8192", "unsloth"),
            "one row of 8192, ours in 8 bits": ratio("1 x 8192", "unsloth", "8 bits"),
            "one step, checkpointing": ratio("8 x 512, checkpointing", "torchtune"),
            "one step, both compiled": ratio("8 x 512, compiled", "torchtune"),
            "compiled, ours in 8 bits": ratio("8 x 512, compiled", "torchtune", "8 bits"),
            "one row of 8192, compiled": ratio("1 x 8192, compiled", "torchtune"),
            "8192, compiled, ours in 8 bits": ratio("1 x 8192, compiled", "torchtune", "8 bits")}


def eight_loss_table():
    """Validation loss of variants of eight bits, less that of sixteen at the same seed and rate."""
    result, losses = read("eight_loss_gpu"), {}
    for r in result["rows"]:
        losses.setdefault(r["variant"], {}).setdefault((r["lr"], r["seed"]), []).append(r["after"])
    mean = {v: {k: statistics.mean(x) for k, x in of.items()} for v, of in losses.items()}
    base = mean.pop("16 bits")
    lines = [[name, f"{statistics.mean(gaps):+.4f}", len(gaps),
              ", ".join(f"{g:+.4f}" for g in gaps)] for name, of in mean.items()
             if (gaps := [of[k] - base[k] for k in sorted(of) if k in base])]
    return table(["SmolLM2-135M on GSM8K", "mean", "pairs", "each"], lines) + source(result)


def long_table():
    """Seconds and memory of rows of many tokens."""
    rows = [[f"{name}, 1 x {tokens:,}, {how}", f"{r['step_seconds']:.2f} s",
             f"{r['tokens_per_second']:,.0f}", f"{r['peak_gib']:.1f} GiB"]
            for name, tokens, how, r in long_rows()]
    return table(["", "a step", "tokens/s", "peak memory"], rows) + source(read("long_h100"))


def step_cpu_table():
    """The same of SmolLM2-135M's shape, in float32."""
    result = read("step_cpu")
    rows = [cells[:-1] for cells in step_rows(result["step"], result["length"])]
    return table([f"SmolLM2-135M's shape, rank {result['rank']}", "ours", "PEFT", "ratio", "rate"],
                 rows) + source(result)


def packing_table():
    """Steps on GSM8K packed, padded, and by PEFT."""
    lines, parts = [], [read(name) for name in ("packing_7b_h200", "packing_cpu")]
    for part in parts:
        for name, r in part["sides"].items():
            lines.append([
                f"{part['model']}, batch {part['batch']}", name, f"{r['seconds']:.1f} s",
                f"{r['tokens_per_second']:,.0f}", f"**{r['times_as_fast_as_peft']:.2f}x**",
                f"{r['peak_gib']:.1f} GiB" if r["peak_gib"] else "", f"{r['loss_difference']:.0e}"])
    return table(["", "", "3 steps", "tokens/s, padding not counted", "times PEFT's speed",
                  "peak memory", "losses differ by"], lines) + "".join(map(source, parts))


def nf4_table():
    """The kernel and a step of QLoRA beside bitsandbytes and PEFT."""
    result = read("nf4_h200")
    rows = [[f"unpack {name} quantisation", f"{r['ours_us']:.0f} µs", f"{r['theirs_us']:.0f} µs",
             f"**{r['theirs_over_ours']:.2f}x**", f"{r['ours_gb_per_second']:,.0f} GB/s", ""]
            for name, r in result["kernel"].items()]
    rows += [["step of " + what, *cells] for what, *cells in step_rows(result["step"])]
    return table(["Llama-2-7B shapes, rank 64", "ours", "theirs", "ratio", "rate", "peak memory"],
                 rows) + source(result)


def large_table():
    """QPiSSA of 7B and of 70B on one GPU, made and trained."""
    small, large, rows = read("nf4_h200"), read("nf4_70b_h200"), []
    for name, part in ("Llama-2-7B", small["memory"]), ("Llama-3-70B", large["seventy"]):
        made, step = part["decomposition"], part["1 x 512, checkpointing"]
        rows.append([f"{name}, {made['matrices']} matrices", f"{made['seconds']:.0f} s",
                     f"{part['model']['gib']:.1f} GiB",
                     f"{made['peak_over_finished_gib']:.1f} GiB", f"{step['step_seconds']:.2f} s",
                     f"**{step['peak_gib']:.1f} GiB**"])
    exact = [r["extrapolated_so_far_seconds"] for r in large["exact"].values()][-1]
    return table(["QPiSSA, rank 64, 5 turns", "decompose and quantise", "model",
                  "memory on top meanwhile", "step of 1 x 512, checkpointing", "peak, all told"],
                 rows) + (f"\n\nThe same 5 turns for 70B with exact SVDs, timed once a shape: "
                          f"**{exact / 3600:.1f} hours**.") + source(small) + source(large)


def svd_table(result="svd_h200"):
    """Seconds and excess residual for the matrices of a whole model."""
    svd = read(result)
    rows = [[rank, name, f"{row['seconds']:.2f} s", f"{row['excess_max']:.1e}"]
            for rank, methods in svd["ranks"].items() for name, row in methods.items()]
    return table(["rank", svd["matrices"], "time", "excess residual, worst"], rows) + source(svd)


QUANT = {"quant_smollm2_cpu": "SmolLM2-135M, layers 0, 15 and 29",
         "quant_minilm_cpu": "MiniLM-L6, float32",
         "quant_eight_smollm2_cpu": "SmolLM2-135M in eight bits, layers 0, 15 and 29"}
KINDS = {"query": "q", "key": "k", "value": "v", "attention.output": "o", "intermediate": "up",
         "output": "down"}                              # MiniLM's names, and what LLaMA calls them


def quant_rows(quant, rank):
    """{method: {(niter, T): row}} of a result."""
    found = {}
    for r in quant["rows"]:
        if r["rank"] == rank:
            found.setdefault(r["method"], {})[r["niter"], r["T"]] = r
    return found


def quant_table():
    """Error reduction over all matrices against T, of both sets of weights."""
    lines, sources = [], []
    for name, what in QUANT.items():
        quant = read(name)
        sources.append(source(quant))
        for rank in sorted({r["rank"] for r in quant["rows"]}):
            for method, at in quant_rows(quant, rank).items():
                turns = [at[8, T] for T in (1, 5, 10)]
                lines.append([
                    what.partition(",")[0], rank, method, *(f"{r['all'][0]:.1%}" for r in turns),
                    f"{at[8, 5]['all'][1]:.1%}", f"{at[8, 5]['frobenius'][0]:.1%}",
                    "" if method == "LoftQ" else ", ".join(str(r["beats_loftq"]) for r in turns)
                    + f" of {quant['matrices']}", f"{at[8, 5]['seconds']:.1f} s",
                    f"{at[None, 5]['seconds']:.1f} s, {at[None, 5]['all'][0]:.1%}"
                    if (None, 5) in at else ""])
    head = ["weights", "rank", "method", "T = 1", "T = 5", "T = 10", "worst at T = 5",
            "Frobenius, T = 5", "matrices better than LoftQ's, T = 1, 5, 10", "time, T = 5",
            "T = 5 with exact SVDs"]
    return table(head, lines) + "".join(sources)


def train_table():
    """Load, decomposition, step and memory of train.py at Llama-2-7B's size."""
    train = read("train_7b_h200")
    rows = [[name, f"{r['load_seconds']:.1f} s", f"{r['init_seconds']:.1f} s",
             f"{r['step_seconds']:.3f} s", f"{r['tokens_per_second']:,.0f}",
             f"{r['peak_gpu_gib']:.1f} GiB", f"{r['first_step_seconds']:.0f} s"]
            for name, r in train["runs"].items()]
    return table(["Llama-2-7B, rank 64, 8 x 512 tokens", "load", "decompose", "step", "tokens/s",
                  "peak memory", "first step"], rows) + source(train)


def demo_output():
    """The table at the end of what `python train.py` printed, as it was."""
    text = (RESULTS / "demo_output.txt").read_text()
    start, end = re.search(r"\n +before +after", text).start() + 1, text.index("\n\nweights: ")
    return "```\n" + text[start:end] + "\n```"


def demo_answer():
    """What README's first command for the demo's adapter printed."""
    return "```\n" + (RESULTS / "demo_answer.txt").read_text().rstrip() + "\n```"


def plan_rows():
    """[(what was measured, its Job, GiB measured, the moment if it is not the peak of a step)]."""
    from support.plan import job_of
    small, large, rows = read("nf4_h200"), read("nf4_70b_h200"), []
    for name, shape, part in ("Llama-2-7B", config(), small["memory"]), (
            "Llama-3-70B", config(8192, 80, 64, 8, 128256, 28672), large["seventy"]):
        rows.append((f"{name}, qpissa, rank 64, loading", job_of(shape, "qpissa", 64),
                     part["model"]["peak_gib"], "loading"))
    result = read("scale_h100")
    for r in result["seven"] + result["step"]:
        job = job_of(config(n_layers=r["layers"]), r["method"], r["rank"], accumulate=False)
        what = f"Llama-2-7B, {r['layers']} layers, {r['method']}, rank {r['rank']}, "
        if "loading_gib" in r:
            rows.append((what + "loading", job, r["loading_gib"], "loading"))
            continue
        job.rows, job.length, job.checkpointing = r["rows"], r["length"], r["checkpointing"]
        job.compiled = r.get("compiled", False)
        rows.append((f"{what}{r['rows']} x {r['length']}" + ", checkpointing" * r["checkpointing"]
                     + ", compiled" * job.compiled, job, r["peak_gib"], None))
    for name, tokens, how, r in long_rows():
        job = job_of(config(), *({"16 bits": ("lora", 128), "4 bits": ("qlora", 64)}[name]), rows=1,
                     length=tokens, checkpointing=how != "kept", offload=how == "offload",
                     accumulate=False)
        rows.append((f"Llama-2-7B, {name}, 1 x {tokens:,}, {how}", job, r["peak_gib"],
                     "first" if tokens > 2**16 else None))
    return rows


def long_rows():
    """[("16 bits" or "4 bits", tokens, how, figures)] of bench_long."""
    return [(name, int(what.split()[2].rstrip(",")), what.rpartition(" ")[2], r)
            for name, part in read("long_h100").items() if isinstance(part, dict)
            for what, r in part.items() if "step_seconds" in r]


def planned_gib(job, moment):
    """GiB at a moment, or at most while a step is taken; "first": the step without moments."""
    from support.plan import memory
    _, held, moments = memory(job)
    loading = moments.pop("loading")
    peak = max(moments.values()) - held["AdamW's moments"] * (moment == "first")
    return (loading if moment == "loading" else peak) / 2**30


def plan_table():
    """The planned peak beside the measured one, of whole networks; then what it depends on."""
    lines = []
    for name, job, measured, moment in plan_rows():
        if job.config.n_layers > 16:
            planned = planned_gib(job, moment)
            lines.append([name + ", first step" * (moment == "first"), f"{planned:.1f} GiB",
                          f"{measured:.1f} GiB", f"{planned / measured - 1:+.1%}"])
    return table(["on one GPU", "planned", "measured", ""], lines) + "".join(
        source(read(name)) for name in ("nf4_h200", "nf4_70b_h200", "scale_h100", "long_h100")) + (
        "\n\n![Peak memory of a step against rank, depth and tokens of a row, kept whole, with "
        "checkpointing and with offloading. Every measured point lies on the line that was planned "
        "for it](../bench/figures/planned.png)")


def plan_output():
    """What `--plan` prints if only Llama-2-7B's params.json is there."""
    from formats import meta_write
    with tempfile.TemporaryDirectory() as there:
        (folder := Path(there) / "llama2-7b").mkdir()
        (folder / "params.json").write_text(json.dumps(meta_write.params_json(config())))
        words = "train.py --ckpt llama2-7b --rank 64 --plan"
        done = subprocess.run([sys.executable, ROOT / words.split()[0], *words.split()[1:]],
                              cwd=there, capture_output=True, text=True, check=True,
                              env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    return f"```\n$ python {words}\n{done.stdout}```"


def tiny_text():
    """How checkpoints/tiny was pretrained."""
    p = read("pretrain_tiny")
    return (f"{p['steps']} steps of {p['batch']} windows of 256 tokens: {p['tokens'] / 1e6:.0f} "
            f"million tokens in {p['seconds'] / 60:.1f} minutes on one {p['device']} "
            f"({p['tokens_per_second'] / 1e6:.1f} million tokens/s, torch {p['torch']}).\n"
            f"Loss on held-out text: {p['held_out_loss']['text']} natural, "
            f"{p['held_out_loss']['stories']} generated.")


def compared(what, form, better, ours, others):
    """A row of README's table: our figure, the others' by name, and the best of all in bold."""
    best = better([ours, *others.values()])

    def shown(value):
        return f"**{form.format(value)}**" if value == best else form.format(value)

    return [what, shown(ours), ", ".join(f"{name} {shown(v)}" for name, v in others.items())]


def trained_rows():
    """What fine-tuning reaches, every method at its own best rate."""
    demo, gsm8k, four = read("demo_h200"), read("gsm8k_h200"), read("gsm8k4bit_h200")

    def row(what, form, better, result, key, ours, *others, **more):
        mean = {m: statistics.mean(by_rate(result, m, key)[result["best"][m]["lr"]])
                for m in (ours, *others)}
        return compared(f"{what} of {ours}", form, better, mean.pop(ours), mean | more)

    return [row("the demo: accuracy", "{:.1%}", max, demo, "accuracy", "pissa", "lora", "full"),
            row("SmolLM2 on GSM8K: accuracy", "{:.1%}", max, gsm8k, "accuracy", "pissa", "lora",
                "full", untrained=gsm8k["base"]["accuracy"]),
            row("the same in four bits: validation loss", "{:.3f}", min, four, "val_loss", "qpissa",
                "loftq", "qlora")]


def headline_table():
    """README's one table: ours beside the best of others, good or bad."""
    step, quant = read("step_eight_h100"), quant_rows(read("quant_minilm_cpu"), 16)
    avoided = {m: quant[m][8, 5]["all"][0] for m in ("QPiSSA", "LoftQ")}
    rows = [*trained_rows(), compared(
        "error of nf4 that QPiSSA avoids, MiniLM, rank 16", "{:.1%}", max, avoided["QPiSSA"],
        {"LoftQ": avoided["LoftQ"]})]
    a, *others = (step[name]["8 x 512"]["peak_gib"] for name in (
        "16 bits", "unsloth", "PEFT, Liger"))
    rows.append(compared("peak memory of a step of 7B, 8 x 512 tokens", "{:.1f} GiB", min, a,
                         dict(zip(("unsloth", "PEFT with Liger"), others, strict=True))))
    large = read("nf4_70b_h200")
    exact = [r["extrapolated_so_far_seconds"] for r in large["exact"].values()][-1]
    rows.append(["QPiSSA of 70B, 1 GPU: time to make it, peak of a step",
                 f"**{large['seventy']['decomposition']['seconds']:.0f} s**, "
                 f"{large['seventy']['1 x 512, checkpointing']['peak_gib']:.1f} GiB",
                 f"with exact SVDs {exact / 3600:.1f} h"])
    return table(["", "here", "beside it"], rows)


def measured(name):
    """{GPU: its result files NAME_....json}; empty before the first one is there."""
    found = {}
    for path in sorted(RESULTS.glob(f"{name}_*h?00.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["device"], []).append(result)
    return found


def commits_table():
    """Two commits beside each other on each GPU: medians, new over old, and every turn."""
    units = {"step_seconds": ("step", "{:.4f}"), "seconds": ("time", "{:.4f}"),
             "peak_gib": ("GiB", "{:.2f}")}
    texts = []
    for parts in measured("commits").values():
        rows = []
        for name, figures in (row for part in parts for row in part["rows"].items()):
            for key, (what, form) in units.items():
                if key in figures:
                    old, new = (figures[key][side] for side in ("old", "new"))
                    middle = statistics.median(old), statistics.median(new)
                    rows.append([name, what, *map(form.format, middle),
                                 f"{middle[1] / middle[0]:.3f}",
                                 " / ".join(", ".join(map(form.format, v)) for v in (old, new))])
        rows.sort(key=lambda r: ("four bits" in r[0], r[1] == "GiB"))
        texts.append(table(["", "seconds or GiB", parts[0]["old"], "new", "new / old",
                            "every turn, old / new"], rows) + "".join(map(source, parts)))
    return "\n\n".join(texts) or "Not measured yet."


def fast_table():
    """A step with one operation in its plain form, on each GPU."""
    texts = []
    for result in (r for parts in measured("fast").values() for r in parts):
        rows = [[name, f"{r['ms']:.0f} ms" if "ms" in r else f"{r['seconds']:.2f} s"
                 if "seconds" in r else f"{r['tokens_per_second']:.0f} tokens/s",
                 f"{r['gib']:.1f} GiB" if "gib" in r else ""] for name, r in result["rows"].items()]
        texts.append(table(["", "time or rate", "peak memory"], rows) + source(result))
    return "\n\n".join(texts) or "Not measured yet."


def over_one(parts, part):
    """Tokens a second of a part of bench_gpus over those of one GPU, None if there is none. Hosts
    differ in speed: only figures of one host are compared."""
    one, r = parts.get("one" + part[part.index(","):] if "," in part else "one"), parts[part]
    alike = one and r["gpus"] > 1 and one.get("host") == r.get("host")
    return r["tokens_per_second"] / one["tokens_per_second"] if alike else None


def gpus_table():
    """One and two GPUs, by train.train itself; what a state costs."""
    rows, result = [], read("gpus_h200")
    for part, r in result["parts"].items():
        ratio = over_one(result["parts"], part)
        if part != "states":
            rows.append([part, r.get("host", 1), r["gpus"], f"{r['ms']:,.0f} ms",
                         f"{r['tokens_per_second']:,.0f}", f"**{ratio:.2f}x**" if ratio else "",
                         f"{r['peak_gib']:.1f} GiB",
                         f"{r['frozen_bytes_per_gpu'] / 2**30:.2f} GiB"])
    each = result["parts"]["states"]["each_ms"]
    step = statistics.median(each)
    first, second = (sum(t - step for t in each[a:a + 30]) / 1e3 for a in (29, 59))
    states = (f"\n\nA state of {result['parts']['one']['state_bytes'] / 1e9:.1f} GB "
              f"(`--save-every 30`): the first one costs {first:.1f} s, which allocates "
              f"page-locked memory, the next one {max(second, 0):.1f} s, all slower steps while it "
              "is written included.")
    if lost := result.get("a worker lost"):
        states += (f" One of {lost['gpus']} workers was killed at step {lost['killed after']}: "
                   "`--max-restarts` had the next step done "
                   f"{lost['seconds until the next step']:.0f} s later, and losses within "
                   f"{lost['restarted']:.1g} of those of an undisturbed run. A stopped run went "
                   f"on with {lost['gpus'] // 2}: within {lost['resumed']:.1g}. All processes "
                   f"beside one, ten steps in bfloat16: {lost['one']:.1g}.")
    return table(["7B, rank 128, 8 x 512 tokens a GPU", "host", "GPUs", "step", "tokens/s",
                  "of one GPU's", "peak", "frozen weights on a GPU"],
                 rows) + states + source(result)


def tasks_table():
    """The score of every model on every task, on each GPU, and the rules."""
    texts = []
    for result in (r for parts in measured("tasks").values() for r in parts):
        found = [r for r in result["rows"] if "how" in r]
        models, scores = list(dict.fromkeys(r["model"] for r in found)), {}
        for r in found:
            cell = (f"{r['accuracy']:.1%} ± {r['standard_error']:.1%}, "
                    f"{r['answered'] / r['problems']:.0%} gave an answer")
            scores.setdefault((f"{r['task']}, {r['protocol']}", r["problems"]), []).append(cell)
        rules = {}
        for r in found:
            prompt, rule = r["how"].rpartition("; ")[0].split("; ", 1)
            rules.setdefault(f"{prompt.partition(': ')[2]}; {rule}", []).append(
                f"{r['task']}, {r['protocol']}")
        texts += [table([result["model"], "problems", *models],
                        [[*task, *cells] for task, cells in scores.items()]),
                  "\n".join(f"- {'; '.join(dict.fromkeys(names))}: {how.rstrip('.')}."
                            for how, names in rules.items()), source(result).strip()]
    return "\n\n".join(texts) or "Not measured yet."


def faults_table():
    """What survived."""
    result = read("faults_cpu")
    parts = [what for what, found in result.items() if isinstance(found, dict)]
    said = sorted({k for what in parts for k in result[what]["tries"]})
    rows = [[what, *(result[what]["tries"].get(k, 0) for k in said), result[what]["drawn again"],
             ", ".join(f"{k} {n}" for k, n in sorted(result[what]["where"].items()))]
            for what in parts]
    return table(["", *said, "drawn again", "where"], rows) + source(result)


PARTS = {"gpus": gpus_table, "faults": faults_table, "demo": demo_table, "svd": svd_table,
         "svd-cpu": lambda: svd_table("svd_smollm2_cpu"),
         "train": train_table, "tiny": tiny_text, "demo-output": demo_output,
         "demo-answer": demo_answer,
         "gsm8k": gsm8k_table, "generate": generate_table, "nf4": nf4_table,
         "large": large_table, "quantised-training": quantised_training_table,
         "quant": quant_table, "plan": plan_table, "plan-output": plan_output,
         "step": step_table, "eight": eight_table, "long": long_table,
         "eight-loss": eight_loss_table, "step-cpu": step_cpu_table,
         "packing": packing_table,
         "headline": headline_table, "commits": commits_table, "fast": fast_table,
         "tasks": tasks_table}


def updated(page):
    """The text of a page with its generated parts made anew. KeyError for an unknown name."""
    from bench import evidence
    parts = {**PARTS, **evidence.PARTS}
    return re.sub(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)",
                  lambda m: f"{m[1]}{parts[m[2]]()}\n{m[3]}", page.read_text(), flags=re.S)


def arguments():
    """What the command line asks for. One of the three: nothing is written by mistake."""
    p = argparse.ArgumentParser(description=__doc__, prog="python -m bench.plot",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    what.add_argument("--text", action="store_true", help="write the tables")
    what.add_argument("--all", action="store_true", help="write the tables and the pictures")
    return p.parse_args()


def main(args):
    """Write, or check, every page."""
    if args.check:
        stale = ", ".join(str(page.relative_to(ROOT)) for page in PAGES
                          if updated(page) != page.read_text())
        sys.exit(f"out of date: {stale}; run python -m bench.plot --text" if stale else 0)
    for page in PAGES:
        page.write_text(updated(page))
    if args.all:
        from bench import pictures
        for picture in pictures.PICTURES:
            picture()


if __name__ == "__main__":
    asked = arguments()                                           # before torch is loaded
    from bench import program
    program(lambda: main(asked))
