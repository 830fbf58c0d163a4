"""What is seen of a run while it trains: the bar, val.jsonl, the curves of --tensorboard."""
import json
import math
from contextlib import contextmanager

from tqdm import tqdm

from formats.jsonl import write_lines
from support import parallel


def tensorboard():
    """torch's SummaryWriter. ValueError if its package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter


def check(args):
    """Refuse --tensorboard now if its package is missing, and not before the first step."""
    if args.tensorboard:
        tensorboard()


@contextmanager
def training(args, begin, steps):
    """A function show(row) that takes each row of log.jsonl, and of val.jsonl in between."""
    after, curves = {}, args.tensorboard and not parallel.RANK and tensorboard()(
        args.out / "tensorboard", purge_step=begin + 1)          # forget steps that are done again

    def show(row):
        if "lr" not in row:
            after.clear()
            after[f"val@{row['step']}"] = f"{row['loss']:.3f}"
        else:
            bar.set_postfix(tok_s=f"{row['tokens'] / row['seconds']:,.0f}",
                            loss=f"{row['loss']:.3f}", **after, refresh=False)
            bar.update()
            if bar.n == begin + 3:                   # the first estimate that is worth something
                bar.refresh()
        for key in ("loss", "grad_norm", "lr") if curves else ():
            if key in row:
                curves.add_scalar(key if "lr" in row else f"validation {key}", row[key],
                                  row["step"])

    fits = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"      # 80 columns
    with tqdm(desc="train", initial=begin, total=steps, unit="step", bar_format=fits) as bar:
        try:
            yield show
        finally:
            if curves:
                curves.close()


# ---------------------------------------------------------------------------------- val.jsonl, best

def measured(out):
    """The rows of val.jsonl, one a step: before the first step, during training, after it."""
    path = out / "val.jsonl"
    try:
        rows = map(json.loads, path.read_text("utf-8").splitlines()) if path.exists() else ()
        by_step = {row["step"]: row for row in rows}
        return [by_step[step] for step in sorted(by_step)]
    except (ValueError, RecursionError, LookupError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e!r:.80}): remove it") from None


def best(out):
    """(lowest validation loss, its step) of OUT/best, or (inf, None) if there is none.

    A row stands in val.jsonl when its weights are in best/, so a run that goes on knows it.
    """
    rows = [r for r in measured(out) if r.get("best")] if (out / "best").is_dir() else []
    found = min(((r["loss"], r["step"]) for r in rows), default=(math.inf, None))
    return parallel.agree(found)


def note(out, step, loss, is_best):
    """A row of val.jsonl."""
    row = {"step": step, "loss": loss, "best": is_best}
    if not parallel.RANK:
        write_lines(out / "val.jsonl", [*(r for r in measured(out) if r["step"] != step), row])
    return row
