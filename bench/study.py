"""Many small trainings, several at a time on all GPUs at hand; what one of them gives is a row.

    python -m bench.study                                    # the names of all studies
    python -m bench.study rates --workers 2                  # one of them, 2 processes on each GPU
    python -m bench.study rates --tiny                       # its version for two CPU cores

A study is a list of jobs, see bench/studies.py. A job is a dict of train.py's arguments, such as

    {"ckpt": "smollm2", "data": "gsm8k/train.jsonl", "method": "pissa", "rank": 32, "lr": 1e-3}

and of what is asked beside them: `measure`, names of functions in bench/measures.py, and what
these want to know; `graphs`, to train by bench/graphs.py. A row is {"job": job} and its figures.
Rows are JSON lines in --out, written as they come. What is there already is not run again, so a
study that was interrupted goes on. All jobs on the same data have the same validation examples: a
seed changes the method's random numbers and the order of the examples.
"""
import argparse
import copy
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

import data
import model
import pissa
import relatives
import train
from bench import NO_STATES, graphs, program
from eval import accuracy
from support import options, plan

MORE = "measure", "general", "graphs"       # what a job holds beside the arguments of train.py
FREE = "lr", "seed", "steps", "epochs", "test_data", "max_new_tokens"   # networks are alike in all
KEPT = {}        # of a process: tokenizers, examples, base models, and the graphs of the last kind


# --------------------------------------------------------------------------------------- one job

def arguments(job):
    """The arguments of train.py that a job stands for."""
    flags = []
    for name, value in job.items():
        if name not in MORE and value is not None and value is not False:            # 0 is a number
            flag = f"--{name.replace('_', '-')}"
            many = value if isinstance(value, list) else [value]
            flags += [w for v in many for w in ([flag] if v is True else [flag, str(v)])]
    args = options.train_parser("").parse_args(flags)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return args


def once(make, *key):
    """make(*key), kept for the next job."""
    if (make.__name__, key) not in KEPT:
        KEPT[make.__name__, key] = make(*key)
    return KEPT[make.__name__, key]


def tokenizer(ckpt):
    return data.Tokenizer(model.find(ckpt))


def examples_of(ckpt, path, val_path, fraction, length):
    """(training examples, validation examples), encoded. The split is that of seed 0."""
    texts, tok = data.read(path), once(tokenizer, ckpt)
    parts = (texts, data.read(val_path)) if val_path else data.split(texts, fraction, 0)
    return [data.encode(part, tok, length)[0] for part in parts]


def base_of(ckpt, device, dtype):
    dtype = dtype and getattr(torch, dtype)
    return model.load(ckpt, device, dtype)


def clock():
    """Seconds, once the GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def prepared(net, examples, args):
    """Make the parameters of args.method trainable, as train.py does."""
    if args.method == "full":
        return net.requires_grad_(True)
    method = relatives.chosen(args, net, examples, train.loss_sum)
    return pissa.inject(net, args.rank, method, args.targets, args.niter, args.seed,
                        quant_iters=args.quant_iters, bits=args.bits, progress=False,
                        double_quant=not args.no_double_quant)


def begun(base, examples, args, keep):
    """A network as `prepared` makes it, and the seconds it took. keep: for the next job of the kind
    and seed, which begins with the same weights. Twice its memory is taken then."""
    seed, net, seconds = KEPT["begun"]
    if seed != args.seed or not keep:
        net, start = copy.deepcopy(base).train(), clock()
        prepared(net, examples, args)
        seconds = clock() - start
    if keep:
        KEPT["begun"] = args.seed, net, seconds
        net = copy.deepcopy(net)
    return net, seconds


def planned_bytes(args, examples):
    """What --plan would say of the largest of the micro-batches that are trained on."""
    steps = range(data.count_steps(examples, args))
    parts = [part for _, parts, _ in train.all_batches(examples, args, steps) for part in parts]
    tokens, labels, where_text = max(parts, key=lambda part: len(part[2]))
    job = replace(plan.from_arguments(args)[0], rows=len(tokens), length=tokens.shape[1],
                  text=len(where_text), learnt=int((labels != -100).sum()))
    return plan.estimate_of(job)["peak"]


def run_one(job):
    """The row of a job. Raises what train.py would raise; ValueError if the loss is not finite."""
    args = arguments(job)
    if KEPT.get("kind") != kind(job):                # the graphs of other networks are of no use
        KEPT.update(kind=kind(job), graphs={}, begun=(None, None, 0.0))
        if args.compile:
            torch._dynamo.reset()
    full, cuda = args.method == "full", args.device.type == "cuda"
    tok = once(tokenizer, args.ckpt)
    examples, val = once(examples_of, args.ckpt, args.data, args.val_data, args.val_fraction,
                         args.max_length)
    base = once(base_of, args.ckpt, args.device, "float32" if full else args.dtype)
    autocast = torch.autocast("cuda", torch.bfloat16) if full and cuda else nullcontext()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    net, seconds = begun(base, examples, args, job.get("graphs"))
    row = {"init_seconds": seconds, "trained": sum(
        p.numel() for p in net.parameters() if p.requires_grad)}
    row["val_before"] = train.validation_loss(net, val, args, autocast)
    if args.compile:
        train.compile_layers(net)
    with tempfile.TemporaryDirectory() as out:
        vars(args).update(NO_STATES, out=Path(out))
        replayed = graphs.used(net, KEPT["graphs"]) if job.get("graphs") and cuda else nullcontext()
        with replayed as why:
            rows, stopped = train.train(net, examples, args, autocast)
    if why:
        row["no_graph"] = why
    if stopped:
        raise ValueError(stopped.reason)
    later = rows[min(5, len(rows) // 2):]                    # the first ones compile, and warm up
    row |= {"train_seconds": sum(r["seconds"] for r in rows),
            "tokens_per_second": sum(r["tokens"] for r in later) / sum(r["seconds"] for r in later)}
    if cuda:
        row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        row["planned_gib"] = planned_bytes(args, examples) / 2**30
    row["val"] = train.validation_loss(net, val, args, autocast)
    if "bits" in job:
        with import_module("bench.measures").unpacked(net):
            row["val_unpacked"] = train.validation_loss(net, val, args, autocast)
    row |= {"loss": [round(r["loss"], 4) for r in rows],
            "grad_norm": [round(r["grad_norm"], 4) for r in rows]}
    if args.test_data:
        net.eval()
        with torch.compiler.set_stance("force_eager"):
            problems = data.read(args.test_data)
            row["accuracy"], _ = accuracy(net, tok, problems, max_new_tokens=args.max_new_tokens,
                                          batch=1536)
        row["problems"] = len(problems)
    for name in job.get("measure", ()):
        measures = import_module("bench.measures")
        row |= getattr(measures, name)(net, lambda n: base.get_submodule(n).weight, job)
    return row


def kind(job):
    """What jobs share that can use the same graphs, recorded or compiled, as a string."""
    return json.dumps([(k, v) for k, v in job.items() if k not in (*FREE, *MORE)])


# -------------------------------------------------------------------------------------- many jobs

def serve(card, threads, todo, done):
    """A process: rows for lists of jobs, until there is None."""
    sys.stdout = open(os.devnull, "w")
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = card
    torch.set_num_threads(threads)
    where = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
             "torch": torch.__version__}
    for job in (job for jobs in iter(todo.get, None) for job in jobs):
        try:
            row = run_one(job)
        except Exception as e:                                       # the other jobs go on
            row = {"failed": f"{type(e).__name__}: {e}".partition("\n")[0][:200]}
        done.put({"job": job, **row, **where})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rows_in(path):
    """The rows of a file, or none if there is no file. Left out, to be run again: a line that was
    cut off, a job that ran out of memory."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line is cut off, its job is run again", file=sys.stderr)
    return [r for r in rows if "OutOfMemoryError" not in r.get("failed", "")]


def found(rows, job):
    """The row of a job, or None."""
    return next((r for r in rows if r["job"] == job), None)


@contextmanager
def workers(path, per_gpu=1):
    """A function: jobs -> their rows, in this order. Rows are added to the file at `path`.

    per_gpu: processes on each GPU, or without a GPU, in all. They live until the context ends.
    """
    context, cards = torch.multiprocessing.get_context("spawn"), torch.cuda.device_count()
    todo, done, n = context.Queue(), context.Queue(), max(1, cards) * per_gpu
    threads = max(1, (os.cpu_count() or 1) // n)
    started, names = [], os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = names if names != [""] else [str(i) for i in range(cards)]

    def run(jobs):
        rows = rows_in(path)
        missing = [j for i, j in enumerate(jobs) if not found(rows, j) and j not in jobs[:i]]
        os.environ["TQDM_DISABLE"] = "1"                   # for those that are started: one bar
        for i in range(len(started), min(n, len(missing))):
            started.append(context.Process(target=serve, daemon=True, args=(
                names[i % cards] if cards else None, threads, todo, done)))
            started[-1].start()
        for _, alike in itertools.groupby(missing, kind if any(
                j.get("compile") or j.get("graphs") for j in missing) else str):
            todo.put(list(alike))
        with tqdm(total=len(missing), desc="study", unit="run") as bar, open(path, "a") as file:
            for _ in missing:
                row = next_of(done, started)
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()
                bar.update()
                tqdm.write(told(row), file=sys.stdout)
        return [found(rows, job) for job in jobs]

    try:
        yield run
    finally:
        for _ in started:
            todo.put(None)
        for process in started:
            process.join(10)
            process.kill()


def next_of(done, started):
    """The next row. RuntimeError if a process has died, for want of memory, say."""
    while True:
        try:
            return done.get(timeout=5)
        except Exception as e:
            dead = [p.exitcode for p in started if not p.is_alive()]
            if dead or type(e).__name__ != "Empty":
                raise RuntimeError(f"a process of the study ended with code {dead}; the same "
                                   "command goes on") from None


def told(row):
    """A row as a line."""
    job = row["job"]
    name = " ".join([job["method"], *job.get("option", ())])
    what = row.get("failed") or f"validation loss {row['val']:.4f}" + (
        f", accuracy {row['accuracy']:.3f}" if "accuracy" in row else "")
    return (f"{name:24} rank {job.get('rank', 128):<4} lr {job.get('lr', 0):<8.3g} "
            f"seed {job.get('seed', 0)}: {what}")


def main():
    """Run a study."""
    from bench import studies
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", choices=list(studies.STUDIES), metavar="NAME",
                   help="one of " + ", ".join(studies.STUDIES))
    p.add_argument("--tiny", action="store_true", help="a small version on checkpoints/tiny")
    p.add_argument("--workers", type=int, default=1, help="processes on each GPU (without: in all)")
    p.add_argument("--out", help="JSON lines (default bench/results/study_NAME.jsonl, or "
                   "runs/study_NAME.jsonl with --tiny)")
    args = p.parse_args()
    if not args.name:
        return print("\n".join(f"{name:12} {f.__doc__}" for name, f in studies.STUDIES.items()))
    folder = Path("runs" if args.tiny else "bench/results")
    folder.mkdir(exist_ok=True)
    with workers(args.out or folder / f"study_{args.name}.jsonl", args.workers) as run:
        run(studies.STUDIES[args.name](args.tiny))


if __name__ == "__main__":
    program(main)
