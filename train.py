"""Fine-tune a LLaMA with PiSSA.

    python train.py                                        # the demo: a tiny model, two CPU cores
    python train.py --ckpt llama2-7b --rank 64             # Meta's raw weights, a GPU
    python train.py --ckpt llama2-7b --data my.jsonl --lr 2e-5 --batch 128 --micro-batch 8

The defaults are the paper's (arXiv 2404.02948). A run leaves in --out: adapter/ (a PEFT LoRA; a
checkpoint/ for --method full), log.jsonl (a line per step), loss.png, args.json, summary.json.
"""
import argparse
import json
import math
import os
import shlex
import sys
import time
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import count, islice
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # nothing here needs it

import torch
import torch._functorch.config
import torch.nn.functional as F
from tqdm import tqdm

import adapter
import data
import model
import pissa
import plan
from convert import check_layout, layout_of, write_checkpoint
from eval import accuracy, check_ranges, complete, describe, load_model, run
from plan import CHUNK
from support.files import written

TINY = os.path.relpath(Path(__file__).parent / "checkpoints" / "tiny")
DEMO = ["--ckpt", TINY, "--data", f"{TINY}/train.jsonl", "--test-data", f"{TINY}/test.jsonl",
        *"--rank 16 --lr 1e-3 --batch 16 --steps 120 --max-new-tokens 64 --out runs/demo".split()]


def power_iterations(text):
    """--niter: a number, or `exact` for None."""
    if text != "exact" and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor: exact")
    return None if text == "exact" else int(text)


def names(text):
    """--targets: names between commas."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("names between commas, at least one")
    return found


def parser():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, usage="python train.py [--option value ...]",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("model and method").add_argument
    add("--ckpt", help="directory in Meta's or Hugging Face's layout, or a name under checkpoints/")
    add("--method", choices=[*pissa.METHODS, "full"], default="pissa",
        help="what is trained: A and B, on weights in 16 bits (pissa, lora) or in 4 (qpissa, "
        "loftq, qlora), or every weight (full, saved in bfloat16)")
    add("--rank", type=int, default=128, help="r, the width of A and B")
    add("--niter", type=power_iterations, default=5,
        help="power iterations of the SVD, or: exact")
    add("--quant-iters", type=int, default=5,
        help="qpissa, loftq: at most so many turns of rounding and SVD")
    add("--no-double-quant", action="store_true",
        help="keep the scale of 64 weights in 32 bits instead of 8: 4.5 bits a weight, not 4.13")
    add("--targets", type=names, default=pissa.TARGETS,
        help="leaf names of the linear layers, e.g. q_proj,v_proj (default: all seven)")
    add("--adapter", help="go on training this adapter instead of a new one")
    add("--out", help="directory of the run (default: runs/CKPT-METHOD)")
    add = p.add_argument_group("data").add_argument
    add("--data", default=f"{TINY}/train.jsonl", help="jsonl with instruction/output, "
        "query/response, question/answer or text (default: the demo's word problems)")
    add("--fields", help="field names of the jsonl files, e.g. question,answer")
    add("--val-data", help="jsonl for the validation loss")
    add("--val-fraction", type=float, default=0.02, help="without --val-data: this share of --data")
    add("--test-data", help="problems whose accuracy is measured before and after")
    add("--max-length", type=int, default=512, help="tokens; longer examples are cut")
    add("--max-new-tokens", type=int, default=128, help="of completions before and after")
    add = p.add_argument_group("optimisation").add_argument
    add("--lr", type=float, default=2e-5, help="peak learning rate, decayed to 0 by a cosine")
    add("--warmup", type=float, default=0.03, help="share of the steps that warm up")
    add("--weight-decay", type=float, default=0.0, help="AdamW's")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--batch", type=int, default=128, help="examples per optimiser step")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--steps", type=int, help="stop after so many steps (default: the epochs decide)")
    add("--seed", type=int, default=0, help="of the SVD, the split and the order of the data")
    add = p.add_argument_group("machine").add_argument
    add("--micro-batch", type=int, default=8, help="examples per pass, if all are as long as the "
        "longest, and more of shorter ones: lower it to save memory")
    add("--no-packing", action="store_true",
        help="compute the padding as well: slower, same results up to rounding")
    add("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    add("--compile", action="store_true", help="torch.compile, layer by layer: less memory and "
        "a little faster; in four bits and with --checkpointing slower")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the frozen weights (default: bfloat16 on a GPU that has it, else float32)")
    add("--plan", action="store_true", help="print the memory and the FLOPs it takes, and stop")
    for action in p._actions:
        stated = action.dest == "help" or "default" in action.help
        if type(action.default) in (int, float, str) and not stated:
            action.help += f" (default: {action.default})"
    return p


def arguments():
    """What was asked for; without --ckpt, the demo, which what was given overrides."""
    p = parser()
    given = sys.argv[1:]
    args = p.parse_args(given)
    if args.ckpt is None:
        args = p.parse_args(DEMO + given)
        print("the demo, since no --ckpt was given; spelled out:\n  python train.py "
              + shlex.join(DEMO + given))
    inf, at_least_1 = math.inf, (1, math.inf)
    check_ranges(p, args, rank=at_least_1, batch=at_least_1, micro_batch=at_least_1,
                 max_length=(2, inf), epochs=at_least_1, steps=at_least_1, niter=(0, inf),
                 quant_iters=at_least_1, max_new_tokens=at_least_1, lr=(1e-12, 1e38),
                 clip=(1e-12, inf), weight_decay=(0, inf), warmup=(0, 1), seed=(0, 2**63 - 1))
    if args.method == "full" and (args.adapter or args.dtype == "bfloat16"):
        p.error("--method full trains the weights themselves, in float32: no --adapter, no --dtype")
    args.out = Path(args.out or f"runs/{Path(args.ckpt).name}-{args.method}")
    there = next(d for d in (args.out, *args.out.absolute().parents) if d.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        p.error(f"--out {args.out}: {there} is not a directory that can be written to")
    target = args.out / ("checkpoint" if args.method == "full" else "adapter")
    if target.exists() and not (target.is_dir() and (args.out / "args.json").is_file()):
        p.error(f"{target} is there already, and not of a run of train.py")
    if target.exists() and target.resolve() in {
            Path(path).resolve() for path in (args.ckpt, args.adapter or args.ckpt)}:
        p.error(f"{target} is what is read here: choose another --out")
    return args


def read_data(args, tok):
    """Training and validation examples, encoded."""
    examples = data.read(args.data, args.fields)
    if args.val_data:
        train, val = examples, data.read(args.val_data, args.fields)
    else:
        train, val = data.split(examples, args.val_fraction, args.seed)
    if not val:
        val = train[:32]
        print("no validation examples: the validation loss below is that of 32 training examples")
    encoded, cut, dropped = data.encode(train, tok, args.max_length)
    print(f"data: {args.data}, {len(encoded)} examples, {len(val)} for validation; {cut} truncated "
          f"to {args.max_length} tokens, {dropped} dropped (prompts that leave nothing to learn)")
    if not encoded:
        raise ValueError(f"{args.data}: no example left; raise --max-length")
    return encoded, data.encode(val, tok, args.max_length)[0], val


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of head(x), x (M, D), and targets (M,), `rows` of M at a time.

    The gradient of a chunk is taken along with its loss, and its logits are gone: (M, V) never
    exists, and nothing is computed twice. trained: the parameters of `head` that want a gradient.
    """

    @staticmethod
    def forward(ctx, head, rows, x, targets, *trained):
        total, wanted = 0.0, any(ctx.needs_input_grad)
        dx, grads = torch.zeros_like(x), [torch.zeros_like(p) for p in trained]
        for part, target, d in zip(x.split(rows), targets.split(rows), dx.split(rows)):
            with torch.set_grad_enabled(wanted):
                part = part.detach().requires_grad_(wanted)
                loss = F.cross_entropy(head(part).float(), target, reduction="sum")
            if wanted:
                for kept, new in zip([d, *grads], torch.autograd.grad(loss, [part, *trained])):
                    kept += new
            total += loss.detach()
        ctx.save_for_backward(dx, *grads)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, *grads = (g * grad for g in ctx.saved_tensors)
        return None, None, dx, None, *grads


def loss_sum(net, tokens, labels, real=None):
    """Sum of the cross-entropies of (b, T) tokens and labels (-100: no loss), all on the CPU.

    real: as data.micro_batches gives it; without it, padding is computed as well.
    """
    def send(x):                   # from pinned memory: nobody waits for the GPU to get that far
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    device, head = net.lm_head.weight.device, net.lm_head
    labels = labels.flatten() if real is None else labels.flatten()[real]
    where = (labels != -100).nonzero()[:, 0]       # logits only where there is something to learn
    real = real if real is None else send(real)
    x = net.hidden(send(tokens), where_text=real).flatten(0, 1).index_select(0, send(where))
    trained = [p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled()]
    return ChunkedLoss.apply(head, max(1, CHUNK // net.config.vocab_size), x, send(labels[where]),
                             *trained)


def cut(batch, longest, args):
    """Micro-batches, none larger than args.micro_batch examples with `longest` tokens each."""
    made = data.micro_batches(batch, args.micro_batch * longest)
    return [(tokens, labels, None) for tokens, labels, _ in made] if args.no_packing else made


@torch.no_grad()
def validation_loss(net, examples, args, autocast):
    """Mean loss per learnt token."""
    total, learnt = 0.0, 0
    longest = max((len(ids) for ids, _ in examples), default=0)
    for tokens, labels, real in cut(examples, longest, args):
        with autocast:
            total += loss_sum(net, tokens, labels, real).item()
        learnt += int((labels != -100).sum())
    return total / max(learnt, 1)


def learning_rate(step, steps, args):
    """Linear warm-up over the first `warmup` share of the steps, then a cosine down to 0."""
    warm = max(1, round(args.warmup * steps))
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def feed(examples, args):
    """Every step's batch and its micro-batches, epoch after epoch, without end."""
    longest = max(len(ids) for ids, _ in examples)
    for epoch in count():
        for batch in data.batches(examples, args.batch, args.seed, epoch):
            yield batch, cut(batch, longest, args)


def train(net, examples, args, autocast):
    """The loop. Returns the logged rows and why it ended early, or None."""
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    steps = args.steps or args.epochs * math.ceil(len(examples) / args.batch)
    rows, log = [], open(args.out / "log.jsonl", "w")
    bar = tqdm(range(steps), desc="train", unit="step")
    batches = islice(feed(examples, args), steps)
    ahead = next(batches)
    try:
        for step in bar:
            start, (batch, micro_batches) = time.perf_counter(), ahead
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args)
            learnt = sum(len(ids) - n_prompt for ids, n_prompt in batch)
            total = 0.0
            for micro_batch in micro_batches:
                # The mean over the tokens of the whole batch: it does not depend on the cut.
                with autocast:
                    loss = loss_sum(net, *micro_batch) / learnt
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
            ahead = next(batches, None)           # while the GPU works: the next line waits for it
            loss, norm = torch.stack([total, norm]).tolist()
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr,
                   "tokens": sum(len(ids) for ids, _ in batch)}
            for name, value in ("loss", loss), ("gradient norm", norm):
                if not math.isfinite(value):                   # stop before it spoils the weights
                    return rows, f"the {name} is {value} at step {step + 1}: lower --lr"
            optimizer.step()
            optimizer.zero_grad()
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            print(json.dumps(row), file=log, flush=True)
            bar.set_postfix(loss=f"{row['loss']:.3f}", norm=f"{row['grad_norm']:.2f}",
                            tok_s=f"{row['tokens'] / row['seconds']:,.0f}")
    except KeyboardInterrupt:
        return rows, f"interrupted after {len(rows)} of {steps} steps"
    finally:
        bar.close()
        log.close()
    return rows, None


def look(net, tok, val, val_texts, test, args, autocast, when):
    """What the model does now: validation loss, answers to two prompts, accuracy."""
    shown = [prompt for prompt, _ in val_texts if prompt][:2]
    n = args.max_new_tokens
    return {"loss": validation_loss(net, val, args, autocast),
            "answers": dict(zip(shown, complete(net, tok, shown, max_new_tokens=n))),
            "accuracy": accuracy(net, tok, test, max_new_tokens=n, desc=f"accuracy {when}")[0]
            if test else None}


def write_weights(net, args):
    """The adapter, or for --method full a checkpoint like the one read; returns the directory."""
    with written(args.out / "args.json") as tmp:
        tmp.write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    if args.method == "full":
        there, dtype = args.out / "checkpoint", torch.bfloat16
        write_checkpoint(there, model.find(args.ckpt), net.config,
                         net.to(dtype).named_parameters(), dtype)
        return there
    adapter.save(net, args.out / "adapter")
    return args.out / "adapter"


def plot(rows, args):
    """loss.png, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return print("no loss.png: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.figure(figsize=(6, 3.5))
    plt.plot([r["step"] for r in rows], [r["loss"] for r in rows])
    plt.xlabel("step")
    plt.ylabel("training loss")
    plt.title(f"{args.ckpt}, {args.method}, learning rate {args.lr:g}", fontsize=10)
    plt.tight_layout()
    with written(args.out / "loss.png") as tmp:
        plt.savefig(tmp, dpi=120, format="png")
    plt.close()


def summarise(rows, before, after, args, seconds, device):
    """Print what came out and write it to summary.json. seconds: dict of load, init, all."""
    trained, gpu = sum(r["seconds"] for r in rows), device.type == "cuda"
    summary = {"steps": len(rows), "seconds": {**seconds, "train": trained},
               "tokens_per_second": sum(r["tokens"] for r in rows) / trained,
               "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if gpu else 0,
               "before": before, "after": after}
    with written(args.out / "summary.json") as tmp:
        tmp.write_text(json.dumps(summary, indent=2) + "\n")
    for prompt, answer in before["answers"].items():
        print(f"\n--- {prompt}\nbefore: {answer[:200]}\nafter:  {after['answers'][prompt]}")
    print(f"\nvalidation loss {before['loss']:.4f} -> {after['loss']:.4f}")
    if args.test_data:
        print(f"accuracy on {args.test_data}: {before['accuracy']:.1%} -> {after['accuracy']:.1%}\n"
              + describe("strict", args.max_new_tokens))
    print(f"{len(rows)} steps in {trained:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s; "
          f"{seconds['all']:.0f} s in all")
    if gpu:
        print(f"peak GPU memory {summary['peak_gpu_bytes'] / 2**30:.1f} GiB")


def prepare(net, args, seconds, weight=None):
    """Make the parameters of args.method trainable: whole weights, an adapter, or a new one.

    weight: as `model.load` gives it, where the network is still to be read. What it takes goes into
    seconds["init"].
    """
    start = time.perf_counter()
    if args.method == "full":
        net.requires_grad_(True)
    elif args.adapter:
        adapter.load(net, args.adapter, weight=weight, keep_base=False)
        vars(args).update({key: net.pissa[key] for key in ("method", "rank", "niter", "quant_iters")
                           if key in net.pissa})
        args.no_double_quant = not net.pissa.get("double_quant", True)
        print(f"going on with {args.adapter}: {args.method}, rank {args.rank}")
    else:
        pissa.inject(net, args.rank, args.method, args.targets, args.niter, args.seed,
                     weight=weight, quant_iters=args.quant_iters,
                     double_quant=not args.no_double_quant, keep_base=False)
    net.checkpointing = args.checkpointing
    seconds["init"] = time.perf_counter() - start


def compile_layers(net, **options):
    """torch.compile, layer by layer: they are alike, so it takes seconds. options: its own.

    What norms and SwiGLU put out is not kept for backward, but computed again: a sixth less memory
    for a hundredth more time. That is a setting of torch, which it leaves behind.
    """
    torch._functorch.config.activation_memory_budget = 0.9
    for layer in net.model.layers:
        layer.compile(**options)


def advise(net, examples, args):
    """A line for what would run, but not as the user may expect."""
    if args.method in ("pissa", "qpissa") and net.config.dim >= 1024 and args.lr > 1e-4:
        print(f"note: --lr {args.lr:g} suits LoRA, whose B starts at 0; PiSSA starts at the largest"
              " singular values and wants less: the paper uses 2e-5, see also arXiv 2602.04998")
    longest = max(len(ids) for ids, _ in examples)
    if 0 < net.config.max_seq_len < longest:
        print(f"note: the longest example has {longest} tokens, and the model was trained for "
              f"{net.config.max_seq_len} positions: see --max-length")


def main():
    """Load, look, inject, train, save, look again."""
    begin, args = time.perf_counter(), arguments()
    if args.plan:                               # before anything is read
        return plan.show(args)
    tok = data.Tokenizer(model.find(args.ckpt))
    examples, val, val_texts = read_data(args, tok)
    test = data.read(args.test_data, args.fields) if args.test_data else []
    data.references(test, args.test_data)
    start, full = time.perf_counter(), args.method == "full"
    seconds = {"init": 0.0}
    # In four bits, the base as a whole may not fit: its layers are quantised while they are read.
    quantised = (adapter.is_quantised(args.adapter) if args.adapter
                 else args.method in pissa.QUANTISED)
    net = load_model(args.ckpt, tok, args.device, "float32" if full else args.dtype,
                     partial(prepare, args=args, seconds=seconds) if quantised else None)
    if full:                                   # to say now, not after training, what is missing
        check_layout(layout_of(model.find(args.ckpt)), net.config)
    seconds["load"] = time.perf_counter() - start - seconds["init"]
    device = net.lm_head.weight.device
    # Whole weights are trained in float32 with bfloat16 products; A and B are float32 anyway.
    mixed = full and not args.dtype and model.has_bfloat16(device)
    autocast = torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()
    print(f"model: {args.ckpt}, {pissa.count(net)[1]:,} parameters, {net.lm_head.weight.dtype} on "
          f"{device}, read in {seconds['load']:.1f} s")
    before = look(net, tok, val, val_texts, test, args, autocast, "before")

    if quantised:
        print(f"step 0: validation loss {before['loss']:.4f}, with the weights in four bits")
    else:
        prepare(net, args, seconds)
    advise(net, examples, args)
    if args.compile:
        compile_layers(net)
    if not full and not quantised:
        loss = validation_loss(net, val, args, autocast)
        print(f"step 0: validation loss {loss:.4f}, the base model's {before['loss']:.4f}")
        if not args.adapter and abs(loss - before["loss"]) > 0.02 * before["loss"]:
            raise ValueError("the injected model is not the base model: the loss differs at step 0")
    args.out.mkdir(parents=True, exist_ok=True)

    rows, stopped = train(net, examples, args, autocast)
    if not rows:
        sys.exit(f"train.py: {stopped}; nothing was learnt yet, nothing is saved")
    where = write_weights(net, args)
    plot(rows, args)
    if stopped:
        sys.exit(f"train.py: {stopped}; what was learnt before is in {where}")
    with torch.compiler.set_stance("eager_on_recompile"):  # generation has a new shape every token
        after = look(net, tok, val, val_texts, test, args, autocast, "after")
    if not math.isfinite(after["loss"]):
        raise ValueError(f"the validation loss is {after['loss']} after the last step: lower --lr")
    seconds["all"] = time.perf_counter() - begin
    summarise(rows, before, after, args, seconds, device)
    if quantised:
        print(f"note: {adapter.EXPORTED}; convert.py merge writes the latter")
    use = f"--ckpt {where}" if full else f"--ckpt {args.ckpt} --adapter {where}"
    print(f"weights in {where}; use them:\n  python eval.py {use} --prompt "
          + shlex.quote(next(iter(before["answers"]), "your question")))


if __name__ == "__main__":
    run(main, "train.py")
