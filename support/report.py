"""What the programs say to people: the lines they print, the picture of the loss, summary.json.

Nothing here changes a weight. train.py, eval.py and convert.py read better without it.
"""
import json
import math
import os
import signal
import sys
import traceback
import warnings

import torch

import data
import pissa
from formats.jsonl import counted, filled, printable, write_lines
from support import options, parallel, progress, streams
from support.files import write_text, written

FORMAT_WARNING, HERE = warnings.formatwarning, os.path.dirname(os.path.dirname(__file__))


def run(main, name):
    """main(). An error that is no bug of ours ends the program with one line and exit code 1. A
    signal ends it with one line and 128 + its number. A closed output does not end it."""
    streams.guard()
    warnings.formatwarning = plain_warning
    if signal.getsignal(signal.SIGINT) is options.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (getattr(signal, n, None) for n in ("SIGTERM", "SIGHUP", "SIGUSR1")):
        ignored = number and signal.getsignal(number) is signal.SIG_IGN
        if number and not ignored and not parallel.RANK:   # others wait for process 0, and just end
            signal.signal(number, interrupted)
    try:
        main()
    except (Exception, KeyboardInterrupt) as e:
        if (line := one_line(e)) is None:
            if not hasattr(e, "saved"):
                raise
            traceback.print_exc()
            line = f"{type(e).__name__}: {e}".splitlines()[0]
        code = 1
        if isinstance(e, KeyboardInterrupt):
            code = 128 + (e.args[0] if e.args else signal.SIGINT)
        leave(f"{name}: {line}" + getattr(e, "saved", ""), code)


def plain_warning(message, category, *where):
    """A warning of ours, for people; those of others, with the line of code that they are about."""
    if category is not UserWarning or not str(where[0]).startswith(HERE):
        return FORMAT_WARNING(message, category, *where)
    return filled(f"warning: {message}") + "\n"


def leave(line, code):
    """End the program with a line on stderr."""
    line = options.last_words(printable(line, keep=""))
    if code == 1:
        sys.exit(line)
    print(line, file=sys.stderr)
    sys.exit(code)


def one_line(e):
    """What a person is told of an exception; None if it is none that we expect."""
    if isinstance(e, KeyboardInterrupt):
        return "interrupted"
    if isinstance(e, torch.OutOfMemoryError):
        return (f"{str(e).splitlines()[0]} Lower --batch or --micro-batch, use --checkpointing, a "
                "smaller --rank or --max-length")
    if isinstance(e, RuntimeError) and "can't allocate memory" in str(e):
        return "out of memory: lower --batch, --micro-batch or --max-new-tokens"
    if isinstance(e, (NotImplementedError, TypeError)) and "MPS" in str(e):
        return (f"mps lacks what this needs ({str(e).splitlines()[0][:80]}): set "
                "PYTORCH_ENABLE_MPS_FALLBACK=1, or take --device cpu")
    return options.told(e) if isinstance(e, (OSError, ValueError)) else None


def stop(stopped, text):
    """End train.py. stopped: a resume.Stop."""
    line = f"train.py: {stopped.reason}; {text}"
    if parallel.WORLD > 1:
        if not parallel.RANK:
            print(line, file=sys.stderr)
        parallel.end(stopped.code)
    leave(line, stopped.code)


def interrupted(number, frame):
    """A signal as an exception, so that what was begun is removed."""
    raise KeyboardInterrupt(number)


def write_json(path, content):
    """Write a dict to a file, which appears when it is complete."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


# ------------------------------------------------------------------------------------ sets of data

def encoded(what, path, examples, tok, max_length, seen=False):
    """data.encode's examples, after a line that counts them. ValueError if none is left. seen:
    whether validation examples are trained on."""
    kept, truncated, dropped = data.encode(examples, tok, max_length)
    print(f"{what}: {path}, {counted(len(kept), 'example')}")
    if truncated or dropped:
        print(filled(f"  {truncated} truncated to {max_length} tokens, {dropped} dropped (prompts "
                     "that leave nothing to learn)"))
    if not kept:
        raise ValueError(f"{path}: {what}: no example left; raise --max-length")
    if what == "validation" and len(kept) < 10:
        unseen = ". They are not trained on, and the questions before and after training are theirs"
        print(filled("note: a loss on so few examples says little: --val-fraction or --val-data "
                     f"give more{unseen * (not seen)}"))
    spelled(f"{what}: {path}", (f"{data.as_text(p)} {r}" for p, r in examples), tok)
    return kept


def problems(path, examples, tok):
    """Print how many problems --test-data has. Their prompts are never cut."""
    if examples:
        print(f"test: {path}, {counted(len(examples), 'problem')}")
        spelled(f"test: {path}", (data.as_text(prompt) for prompt, _ in examples), tok)


def spelled(where, texts, tok):
    """Print a note if texts spell control tokens, as chats with a template do."""
    found = [m[0] for m in map(tok.control.search, texts) if m]
    if found:
        print(filled(f"note: {where}: texts that spell control tokens, such as {found[0]!r}: "
                     f"{len(found)}; they are plain characters here, never the tokens"))


# ---------------------------------------------------------------------------- an injected network

def count(net):
    """(parameters that are trained, parameters); a weight in four bits counts once."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    total = sum(p.numel() for p in net.parameters())
    return trained, total + sum(Q.shape.numel() - sum(p.numel() for p in Q.parameters())
                                for Q in quantised(net))


def loaded(net, args, seconds):
    """Print what was read: the parameters of the model, without those of an adapter."""
    weight = net.lm_head.weight
    model = count(net)[1] - sum(p.numel() for _, m in pissa.layers(net)
                                for n, p in m.named_parameters(recurse=False)
                                if n not in ("frozen", "bias"))
    print(filled(f"model: {args.ckpt}, {model:,} parameters, {str(weight.dtype)[6:]} on "
                 f"{weight.device}, read in {seconds:.1f} s"))


def quantised(net):
    """The frozen weights of an injected network that are quantised modules, such as nf4.NF4."""
    return [m.frozen for _, m in pissa.layers(net) if isinstance(m.frozen, torch.nn.Module)]


@torch.no_grad()
def relative_error(m):
    """|W - (W_res + A B)| / |W| of a PissaLinear, estimated from the entries of m.fingerprint."""
    n_out, n_in = m.B.shape[1], m.A.shape[0]
    step = max(1, n_out * n_in // 256) | 1                 # as in pissa.sampled
    where = torch.arange(0, n_out * n_in, step, device=m.A.device)
    A, B = m.factors()
    AB = (A[where % n_in] * B.T[where // n_in]).sum(1).cpu()
    W, W_res = m.fingerprint.to(AB.dtype), pissa.sampled(pissa.as_tensor(m.frozen)).to(AB.dtype)
    return ((W - W_res - AB).norm() / W.norm().clamp(min=1e-30)).item()


def injected(net):
    """Print what is trained of an injected `net`, and how close W_res + A B is to W."""
    (trained, total), Qs = count(net), quantised(net)
    if parallel.SHARDED:                             # no process has a whole weight
        return print(f"{trained:,} of {total:,} parameters trained ({trained / total:.2%})")
    errors = [relative_error(m) for _, m in pissa.layers(net)]
    error = f"  largest relative |W - (W_res + A B)| about {max(errors):.1e}"
    if all(m.A0 is None for _, m in pissa.layers(net)):                 # W itself is frozen
        error = f"  largest relative |A B| / |W| about {max(errors):.1e}"
    if Qs:
        bits = 8 * sum(Q.nbytes for Q in Qs) / sum(Q.shape.numel() for Q in Qs)
        error = (f"  {bits:.2f} bits a frozen weight, relative |W - (Q + A B)| about "
                 f"{sum(errors) / len(errors):.4f}\n  on average, at most {max(errors):.4f}")
    print(f"{trained:,} of {total:,} parameters trained ({trained / total:.2%})\n{error}")


def starts_at_the_largest(m):
    """True if A B of a PissaLinear begins with the largest singular value of W, sigma_1.

    A column of A_0 = U S^1/2 has the squared norm sigma. With W (m, n) and s the root mean square
    of its entries, sigma_1 >= |W|_F / sqrt(min(m, n)) = s sqrt(max(m, n)). What rounding to four
    bits loses, with which LoftQ begins, is far below.
    """
    if m.A0 is None:
        return False
    s = m.fingerprint.float().square().mean().sqrt()
    largest = m.A0.square().sum(0).max()
    return (largest >= s * max(m.A0.shape[0], m.B0.shape[1]) ** 0.5).item()


def advise(net, examples, args):
    """Print how many steps are to come, and notes on settings that are legal and probably
    unintended."""
    steps, n = data.count_steps(examples, args), len(examples)
    whole, more = divmod(steps, -(-n // args.batch))                # epochs, steps of one more
    times = whole + min(more * args.batch, n) / n
    print(filled(f"{counted(steps, 'step')} of {counted(min(args.batch, n), 'example')}"
                 f"{f' (all there are; --batch {args.batch})' * (n < args.batch)}, learning rate "
                 f"{args.lr:g}, {times:.3g} time{'s' * (times != 1)} through the data"))
    few = list(small_data(net, examples, args, steps))
    for text in (*unlikely(net, examples, args, steps), *(few or far_rate(net, args))):
        print(filled(f"note: {text}"))


# Batch to suggest: (from so many examples on, of the demo it was measured on, % solved).
# Ten epochs at 1e-3, PiSSA of rank 16: bench/results/small_cpu.json, small_few_cpu.json.
SUGGESTED = {16: (160, 200, 78), 8: (50, 80, 54), 4: (0, 20, 20)}


def small_data(net, examples, args, steps):
    """A note if the epochs make few steps: what to try."""
    n = len(examples)
    batch, (_, problems, solved) = next(
        (size, row) for size, row in SUGGESTED.items() if n >= row[0])
    if args.steps or steps >= 100 or args.batch <= batch:
        return
    rate = better_rate(net, args, min(args.rank, 16))
    flags = [*["--rank", 16] * (args.rank > 16), "--batch", batch, "--epochs", 10,
             *(["--lr", one_digit(rate)] if rate else [])]
    yield (f"{counted(steps, 'step')} will hardly teach anything; the paper has 781. Measured on "
           f"{problems} of the demo's problems, PiSSA of rank 16 at 1e-3: 10 epochs of batches of "
           f"{batch} solve {solved} % of new ones, and one epoch at 2e-5 none. To try, "
           f"{10 * -(-n // batch)} steps:\n" + options.pasted(
               ["python", "train.py", *without(sys.argv[1:], "--out"), *flags]))


def without(words, flag):
    """The words of a command line without a flag and its value."""
    i = next((i for i, word in enumerate(words) if word.partition("=")[0] == flag), len(words))
    return [*words[:i], *words[i + 2 - ("=" in "".join(words[i:i + 1])):]]


# c of the rate c / sqrt(rank) that was the best on SmolLM2-135M, see EVIDENCE.md.
RATES = {"pissa": 4e-3, "qpissa": 4e-3, "lora": 2e-2, "qlora": 2e-2}


def better_rate(net, args, rank):
    """For a small model: about the best rate, if args.lr is ten times off; otherwise None."""
    best = 4e-4 if args.method == "full" else RATES.get(args.method, args.lr) / rank ** 0.5
    far = net.config.dim < 1024 and not 0.1 <= args.lr / best <= 10
    return best if far else None


def one_digit(rate):
    """0.00071 -> 7e-4"""
    return f"{rate:.0e}".replace("e-0", "e-")


def far_rate(net, args):
    """A note if a larger rate suits a small model."""
    best = better_rate(net, args, args.rank)
    if best and args.lr < best:
        yield (f"--lr {args.lr:g} is far from what suits a model of this size: measured on "
               f"SmolLM2-135M, the best rate of --method {args.method} is about {one_digit(best)}"
               + f" at rank {args.rank}" * (args.method != "full"))


def unlikely(net, examples, args, steps):
    """Notes on the rate, the rank and the length."""
    high = 1e-3 if args.method == "full" else 1e-2
    if args.lr > high:
        yield (f"--lr {args.lr:g} is far above what suits --method {args.method}: "
               f"at most {high:g}, and less for large models")
    trained, total = count(net)
    if args.method != "full" and trained > total / 5:
        less = max(1, args.rank // 8)
        yield (f"rank {args.rank} trains {trained / total:.0%} of this model's parameters; "
               f"--rank {less} would train about "
               f"{trained * less / (trained * less + (total - trained) * args.rank):.0%}")
    if 1e-4 < args.lr <= high and net.config.dim >= 1024:
        largest = [starts_at_the_largest(m) for _, m in pissa.layers(net)]
        if sum(largest) > len(largest) / 2:
            yield (f"--lr {args.lr:g} suits LoRA, whose B starts at 0; {args.method} starts at "
                   "the largest singular values and wants less: PiSSA's paper uses 2e-5, see "
                   "also arXiv 2602.04998")
    if args.bits == 8 and not args.compile and str(args.device).startswith("cuda"):
        yield ("--bits 8 without --compile: short rows then take longer than in 16 bits. Measured "
               "on 7B, 8 x 512 tokens: 261 ms, 253 in 16 bits; with --compile 177 and 243")
    longest, positions = max(len(ids) for ids, _ in examples), net.config.max_seq_len
    if 0 < positions < longest:
        yield (f"the longest example has {longest} tokens, and the model was trained for "
               f"{positions} positions: see --max-length")
    elif 0 < positions < args.max_length and args.max_length > 512:          # not the default
        yield (f"--max-length {args.max_length} is more than the {positions} positions that the "
               "model was trained for; no example is that long")


# ------------------------------------------------------------------------------- a run of train.py

def plot(rows, args, last=None):
    """Draw loss.png, if matplotlib is installed. rows: of log.jsonl. last: the validation loss
    after them, if it is known."""
    if parallel.RANK:
        return
    try:
        import matplotlib
    except ImportError:
        return print("no loss.png: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter
    steps, losses = [r["step"] for r in rows], torch.tensor([r["loss"] for r in rows])
    width = max(1, len(rows) // 20)                            # of the mean around a step
    padded = torch.nn.functional.pad(losses, (width // 2, (width - 1) // 2), value=math.nan)
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="tight")
    axes.plot(steps, losses, color="0.75", linewidth=1)
    axes.plot(steps, padded.unfold(0, width, 1).nanmean(1), label="training", color="tab:blue")
    val = {r["step"]: r["loss"] for r in progress.measured(args.out) if r["step"] <= len(rows)}
    val |= {} if last is None else {len(rows): last}
    axes.plot(val.keys(), val.values(), "o", color="tab:orange", label="validation", markersize=4,
              clip_on=False)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    lowest, highest = axes.get_ylim()
    if highest > 3 * lowest:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_yscale("linear")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)
    rank = "" if args.method == "full" else f", rank {args.rank}"
    axes.set_title(f"{args.ckpt}: {args.method}{rank}, batch {args.batch}, learning rate "
                   f"{args.lr:g}", fontsize=9)
    with written(args.out / "loss.png") as tmp:
        figure.savefig(tmp, dpi=120, format="png")
    plt.close(figure)


def summarise(rows, before, after, args, seconds, device, accuracy_by):
    """Print the results and write them to summary.json; returns that.

    rows: of log.jsonl. before, after: of train.evaluate. seconds: a dict of load, init, all.
    accuracy_by: the line that says how the accuracy was measured.
    """
    trained, gpu = sum(r["seconds"] for r in rows), device.type == "cuda"
    best, at = progress.best(args.out)
    summary = {"steps": len(rows), "asked": [args.epochs, args.steps],
               "seconds": {**seconds, "train": trained},
               "tokens_per_second": sum(r["tokens"] for r in rows) / trained if trained else None,
               "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if gpu else 0,
               "before": before, "after": after, "accuracy_by": accuracy_by,
               "best": {"step": at, "loss": best} if at else None}
    if not parallel.RANK:
        measured = {m["step"]: m for m in progress.measured(args.out) if m["step"] <= len(rows)}
        last = {**measured.pop(len(rows), {}), "step": len(rows), **after}
        write_lines(args.out / "val.jsonl", [*measured.values(), last])
        write_json(args.out / "summary.json", summary)
    print(summary_text(summary, args))
    say_cut(after.get("cut"))
    return summary


def finished(args):
    """True if the run in --out has done all that is asked for; then its results are printed."""
    path = args.out / "summary.json"
    try:
        summary = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        if summary.get("asked") != [args.epochs, args.steps]:
            return False
        text = summary_text(summary, args)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged ({e!r:.80}): remove it") from None
    print(f"{args.out} is finished:\n{text}")
    say_cut(summary["after"].get("cut"))
    in_chat = bool(getattr(args, "date", None))             # a run in a chat template keeps the day
    weights_written(args.out / ("checkpoint" if args.method == "full" else "adapter"), args,
                    summary["before"]["answers"], in_chat, summary)
    return True


def say_cut(count):
    """Print a note if so many answers reached --max-new-tokens."""
    if count:
        print(filled(f"note: --max-new-tokens cut {counted(count, 'answer')}; more tokens may let "
                     "them end"))


def wilson(share, n):
    """(lowest, highest): the 95 % interval of a share that was measured on n (Wilson 1927)."""
    z = 1.959964
    middle, half = share + z * z / (2 * n), z * math.sqrt(
        share * (1 - share) / n + z * z / (4 * n * n))
    return tuple(min(1.0, max(0.0, x / (1 + z * z / n))) for x in (middle - half, middle + half))


NO_ANSWER = "(nothing: it ended at once)"


def shortened(answer, most=1000, lines=12):
    """An answer, or if it is longer than so many characters or lines, its beginning and "..."."""
    short = "\n".join(answer.split("\n")[:lines])
    short = short if len(short) <= most else short[:most].rpartition(" ")[0]
    return f"{short} ..." if len(short) < len(answer) else answer or NO_ANSWER


def summary_text(summary, args):
    """What summary.json holds, in lines for people."""
    seconds, before, after, lines = *(summary[k] for k in ("seconds", "before", "after")), []
    for prompt, answer in before["answers"].items():
        lines += ["", *(filled(printable(text), "        ") for text in (
            f"--- {prompt}", f"before: {shortened(answer, 200)}",
            f"after:  {shortened(after['answers'][prompt])}"))]
    lines += ["", f"{'':17}{'before':>14}{'after':>14}",
              f"validation loss  {before['loss']:14.4f}{after['loss']:14.4f}"]
    if after["accuracy"] is not None:
        n, shares = after.get("problems"), (before["accuracy"], after["accuracy"])
        lines += ["accuracy         " + "".join(f"{s:14.1%}" for s in shares)
                  + (f"   of {n} problems" if n else "")]
        if n:
            lines += ["95 % interval    " + "".join(
                f"{'{:.1f} - {:.1%}'.format(100 * low, high):>14}"
                for low, high in (wilson(s, n) for s in shares))]
        lines += [filled(f"{summary['accuracy_by']} ({args.test_data})")]
    if best := summary.get("best"):
        lines += [filled(f"lowest validation loss {best['loss']:.4f} after step {best['step']}: "
                         f"{args.out / 'best'}")]
    speed = summary["tokens_per_second"]
    lines += [f"{counted(summary['steps'], 'step')} in {seconds['train']:.0f} s, "
              + (f"{speed:,.0f} tokens/s; " if speed else "") + f"{seconds['all']:.0f} s in all"
              + " since it went on" * (seconds["all"] < seconds["train"])]
    if summary["peak_gpu_bytes"]:
        lines += [f"peak GPU memory {summary['peak_gpu_bytes'] / 2**30:.1f} GiB"]
    return "\n".join(lines)


def weights_written(directory, args, prompts, chat, summary):
    """Print which files there are, and the command that uses the weights, or better earlier ones.

    summary: of `summarise`. prompts: texts of the validation. chat: whether they were asked in the
    chat template. An adapter holds that template. A checkpoint holds the model's, which may not
    have been used.
    """
    lowest = summary.get("best")
    best = args.out / "best" if lowest and lowest["step"] < summary["steps"] else directory
    use = ["--ckpt", best, *["--chat"] * chat] if args.method == "full" else [
        "--ckpt", args.ckpt, "--adapter", best]
    short = [p for p in map(printable, prompts) if 0 < len(p) <= 62]
    use += ["--prompt", min(short, key=len)] if short else ["--interactive"]
    others = [n for n in ("loss.png", "log.jsonl", "val.jsonl", "summary.json")
              if (args.out / n).exists()]
    print(f"\nweights: {directory}\nbeside them: {', '.join(others)}\nuse them:\n"
          + options.pasted(["python", "eval.py", *use]))


# ------------------------------------------------------------------------------------ train --plan

def plan(args, job, method, found, less, step):
    """Print a plan. job: a plan.Job. found: its plan.estimate. less: {change: bytes at most}. step:
    its seconds, in words."""
    size, numbers = found["peak"], found["numbers"]
    trained, total = found["trained"], sum(numbers.values())
    unit, unit_name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    rank = "" if job.full else f", rank {job.rank}"
    here = torch.cuda.is_available()
    if not here and (args.device or "cuda").startswith("cuda"):
        print("There is no GPU here. This plan is for an H200; for this machine: --device cpu")
    where = args.device or ("the GPU that is here" if here else "an H200")
    print(filled(f"{args.ckpt}: {method}{rank}, on {where}, products in {str(job.dtype)[6:]}, "
                 f"{job.rows} x {job.length} tokens at a time, all of them learnt"))
    print(f"\n{'':30}{'parameters':>16}{unit_name:>10}")
    for kind, held in found["held"].items():
        count = f"{numbers[kind]:,}" if kind in numbers else ""
        if held:
            print(f"{kind:30}{count:>16}{held / unit:10.2f}")
    print(f"\nparameters     {total:,}, {trained:,} of them trained ({trained / total:.2%})\n"
          f"expected peak  {size / unit:.1f} {unit_name}, at {found['when']} (loading: "
          f"{found['moments']['loading'] / unit:.1f})"
          + f",\n{'':15}and some 0.5 GiB that CUDA itself takes" * job.cuda)
    width = max(map(len, less), default=0) + 2
    for change, peak in less.items():
        print(f"  {change:{width}}{peak / unit:.1f} {unit_name}")
    if job.cuda and here:
        free, there = (b / 2**30 for b in torch.cuda.mem_get_info())
        print(f"this GPU has {there:.1f} GiB, {free:.1f} of them free: it "
              + ("fits" if size / 2**30 < free else "does not fit"))
    forward, attention, backward, again = (found["flops"][k] / 1e9 for k in (
        "forward", "attention", "backward", "recomputation"))
    tflops = (forward + backward + again) * args.batch * job.length / 1e3
    print(filled(f"\nGFLOPs a token  {forward:.3g} forward ({attention:.2g} of them attention), "
                 f"{backward:.3g} backward" + (f", {again:.3g} forward again" if again else "")
                 + f"\nTFLOPs a step   {tflops:,.1f} for {args.batch} x {job.length} tokens"
                 + f"\nseconds a step  {step}", 16 * " "))


def plan_of_gpus(args, whole, spread, seconds):
    """Print what each of several GPUs holds: bytes with a copy of the model, and with a part; and
    the seconds of a step."""
    print(f"\neach of {args.gpus} GPUs, {args.micro_batch} rows at a time:\n"
          f"  a copy of the model          {whole / 2**30:.1f} GiB\n"
          f"  weights spread (--shard)     {spread / 2**30:.1f} GiB\n"
          f"  seconds a step               {seconds:.2g}, without what they send each other")
