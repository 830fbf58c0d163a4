"""Fine-tune a LLaMA with PiSSA.

    python train.py                                        # the demo: a tiny model, two CPU cores
    python train.py --ckpt llama2-7b --rank 64             # Meta's raw weights, a GPU
    python train.py --ckpt llama2-7b --data my.jsonl --lr 2e-5 --batch 128 --micro-batch 8

The defaults are the paper's (arXiv 2404.02948). A run leaves in --out: adapter/ (a PEFT LoRA; a whole
checkpoint/ for --method full), log.jsonl (one line per step), loss.png and args.json.
"""
import argparse
import json
import math
import shlex
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
import pissa
from eval import accuracy, complete

TINY = Path(__file__).parent / "checkpoints" / "tiny"
DEMO = ("--ckpt tiny --test-data checkpoints/tiny/test.jsonl --rank 16 --lr 2e-3 --batch 32 "
        "--micro-batch 32 --steps 90 --out runs/demo")


def arguments():
    """The command line; without --ckpt, the demo's, which what was given overrides."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--ckpt", help="directory with Meta's raw weights, or a name under checkpoints/")
    add("--data", default=str(TINY / "train.jsonl"), help="jsonl with instruction/output, "
        "query/response, question/answer or text (default: the demo's word problems)")
    add("--fields", help="field names of the jsonl, e.g. question,answer")
    add("--val-data", help="jsonl for the validation loss")
    add("--val-fraction", type=float, default=0.02, help="without --val-data: this share of --data")
    add("--test-data", help="problems whose accuracy is measured before and after")
    add("--out", help="directory of the run (default: runs/CKPT-METHOD)")
    add("--method", choices=[*pissa.METHODS, "full"], default="pissa",
        help="what is trained: A and B (pissa, lora) or every weight (full)")
    add("--adapter", help="go on training this adapter instead of a new one")
    add("--rank", type=int, default=128, help="r, the width of A and B")
    add("--niter", default=8, type=lambda s: None if s == "exact" else int(s),
        help="power iterations of the SVD, or: exact")
    add("--targets", type=lambda s: s.split(","), default=pissa.TARGETS,
        help="leaf names of the linear layers, e.g. q_proj,v_proj (default: all seven)")
    add("--lr", type=float, default=2e-5, help="peak learning rate (cosine to 0)")
    add("--warmup", type=float, default=0.03, help="share of the steps that warm up")
    add("--weight-decay", type=float, default=0.0)
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--batch", type=int, default=128, help="examples per optimiser step")
    add("--micro-batch", type=int, default=8, help="examples per pass: lower it to save memory")
    add("--max-length", type=int, default=512, help="tokens; longer examples are cut")
    add("--epochs", type=int, default=1)
    add("--steps", type=int, help="stop after so many steps (default: the epochs decide)")
    add("--seed", type=int, default=0)
    add("--device", help="default: cuda if there is one, else cpu")
    add("--compile", action="store_true", help="torch.compile, layer by layer")
    add("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    add("--max-new-tokens", type=int, default=128, help="of completions before and after")
    given = sys.argv[1:]
    args = p.parse_args(given)
    if not args.ckpt:
        args = p.parse_args(DEMO.split() + given)
        print("the demo, since no --ckpt was given; spelled out:\n  python train.py "
              + shlex.join(DEMO.split() + given))
    for name in ("rank", "batch", "micro_batch", "max_length", "epochs"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    args.out = Path(args.out or f"runs/{Path(args.ckpt).name}-{args.method}")
    return args


def read_data(args, tok):
    """Training and validation examples, encoded."""
    examples = data.read(args.data, args.fields)
    if args.val_data:
        train, val = examples, data.read(args.val_data, args.fields)
    else:
        train, val = data.split(examples, args.val_fraction, args.seed)
    encoded, cut, dropped = data.encode(train, tok, args.max_length)
    print(f"data: {args.data}, {len(encoded)} examples, {len(val)} for validation; {cut} truncated to "
          f"{args.max_length} tokens, {dropped} dropped (a prompt that long leaves nothing to learn)")
    if not encoded:
        raise ValueError(f"{args.data}: no example left; raise --max-length")
    return encoded, data.encode(val, tok, args.max_length)[0], val


def loss_sum(net, tokens, labels):
    """Sum of the cross-entropies of (b, T) tokens and labels, both on the CPU (-100: no loss)."""
    device = net.lm_head.weight.device
    where = (labels.flatten() != -100).nonzero()[:, 0]     # logits only where there is something
    x = net.hidden(tokens.to(device)).flatten(0, 1)        # to learn: most of (b T, V) never exists
    logits = net.lm_head(x[where.to(device)]).float()
    return F.cross_entropy(logits, labels.flatten()[where].to(device), reduction="sum")


@torch.no_grad()
def validation_loss(net, examples, args, autocast):
    """Mean loss per learnt token."""
    total, count = 0.0, 0
    for tokens, labels in data.micro_batches(examples, args.micro_batch):
        with autocast:
            total += loss_sum(net, tokens, labels).item()
        count += int((labels != -100).sum())
    return total / max(count, 1)


def learning_rate(step, steps, args):
    """Linear warm-up over the first `warmup` share of the steps, then a cosine down to 0."""
    warm = max(1, round(args.warmup * steps))
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(net, examples, args, autocast):
    """The loop. Returns the logged rows and whether Ctrl-C ended it."""
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    epoch = math.ceil(len(examples) / args.batch)          # steps in one
    steps = args.steps or epoch * args.epochs
    rows, log = [], open(args.out / "log.jsonl", "w")
    bar = tqdm(range(steps), desc="train", unit="step")
    try:
        for step in bar:
            start = time.perf_counter()
            if step % epoch == 0:
                shuffled = data.batches(examples, args.batch, args.seed, step // epoch)
            batch = shuffled[step % epoch]
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args)
            learnt = sum(len(ids) - n_prompt for ids, n_prompt in batch)
            total = 0.0
            for tokens, labels in data.micro_batches(batch, args.micro_batch):
                # The mean over the tokens of the whole batch: it does not depend on the cut.
                with autocast:
                    loss = loss_sum(net, tokens, labels) / learnt
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(params, args.clip)
            optimizer.step()
            optimizer.zero_grad()
            row = {"step": step + 1, "loss": total.item(), "grad_norm": norm.item(), "lr": lr,
                   "tokens": sum(len(ids) for ids, _ in batch)}
            row["seconds"] = time.perf_counter() - start
            if not math.isfinite(row["loss"]):
                raise ValueError(f"the loss is {row['loss']} at step {step + 1}: lower --lr")
            rows.append(row)
            print(json.dumps(row), file=log, flush=True)
            bar.set_postfix(loss=f"{row['loss']:.3f}", norm=f"{row['grad_norm']:.2f}",
                            tok_s=f"{row['tokens'] / row['seconds']:,.0f}")
    except KeyboardInterrupt:
        print(f"\ninterrupted after {len(rows)} of {steps} steps: saving what was learnt")
        return rows, True
    finally:
        bar.close()
        log.close()
    return rows, False


def write(net, args, rows):
    """The adapter (or checkpoint) and a picture of the loss. Returns where the weights are."""
    if args.method == "full":
        model.save(net.to(torch.bfloat16), args.out / "checkpoint")
        shutil.copy(model.find(args.ckpt) / "tokenizer.model", args.out / "checkpoint")
    else:
        pissa.save(net, args.out / "adapter")
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
        plt.figure(figsize=(6, 3.5))
        plt.plot([r["step"] for r in rows], [r["loss"] for r in rows])
        plt.xlabel("step")
        plt.ylabel("training loss")
        plt.title(f"{args.ckpt}, {args.method}", fontsize=10)
        plt.tight_layout()
        plt.savefig(args.out / "loss.png", dpi=120)
    except ImportError:
        print("no loss.png: pip install matplotlib")
    return args.out / ("checkpoint" if args.method == "full" else "adapter")


def main():
    """Load, inject, train, save, show."""
    begin = time.perf_counter()
    args = arguments()
    tok = data.Tokenizer(model.find(args.ckpt))
    examples, val, val_texts = read_data(args, tok)
    test = data.read(args.test_data, args.fields) if args.test_data else []
    start = time.perf_counter()
    full = args.method == "full"
    net = model.load(args.ckpt, args.device, torch.float32 if full else None)
    device = net.lm_head.weight.device
    # Whole weights are trained in float32 with bfloat16 products; A and B are float32 anyway.
    autocast = (torch.autocast("cuda", torch.bfloat16) if full and device.type == "cuda"
                and torch.cuda.is_bf16_supported() else nullcontext())
    print(f"model: {args.ckpt}, {sum(p.numel() for p in net.parameters()):,} parameters, "
          f"{net.lm_head.weight.dtype} on {device}, read in {time.perf_counter() - start:.1f} s")
    if args.method == "pissa" and net.config.dim >= 1024 and args.lr > 1e-4:
        print(f"note: --lr {args.lr:g} suits LoRA, whose B starts at 0; PiSSA starts at the largest "
              "singular values and wants less: the paper uses 2e-5, see also arXiv 2602.04998")

    # The base model first: its loss, its answers.
    shown = [p for p, _ in val_texts if p][:2]
    tests = dict(max_new_tokens=args.max_new_tokens)
    loss0 = validation_loss(net, val, args, autocast)
    before = complete(net, tok, shown, **tests) if shown else []
    score0 = accuracy(net, tok, test, desc="accuracy before", **tests)[0] if test else None

    if full:
        net.requires_grad_(True)
    elif args.adapter:
        pissa.load(net, args.adapter, keep_base=False)
    else:
        pissa.inject(net, args.rank, args.method, args.targets, args.niter, args.seed,
                     keep_base=False)
        loss = validation_loss(net, val, args, autocast)
        print(f"step 0: validation loss {loss:.4f}, the base model's {loss0:.4f}")
        if abs(loss - loss0) > 0.02 * loss0:
            raise ValueError("the injected model is not the base model: loss differs at step 0")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "args.json").write_text(json.dumps(vars(args), indent=2, default=str) + "\n")
    net.checkpointing = args.checkpointing
    if args.compile:
        for layer in net.model.layers:
            layer.compile()

    rows, interrupted = train(net, examples, args, autocast)
    where = write(net, args, rows) if rows else None
    if interrupted or not rows:
        sys.exit(f"weights in {where}" if where else "nothing was learnt yet, nothing saved")

    with torch.compiler.set_stance("force_eager"):         # generation has a new shape every token
        loss = validation_loss(net, val, args, autocast)
        for prompt, a, b in zip(shown, before, complete(net, tok, shown, **tests) if shown else []):
            print(f"\n--- {prompt}\nbefore: {a[:300]}\nafter:  {b}")
        print(f"\nvalidation loss {loss0:.4f} -> {loss:.4f}")
        if test:
            score = accuracy(net, tok, test, desc="accuracy after", **tests)[0]
            print(f"accuracy on {len(test)} problems {score0:.1%} -> {score:.1%}")
    seconds = sum(r["seconds"] for r in rows)
    print(f"{len(rows)} steps in {seconds:.0f} s, {sum(r['tokens'] for r in rows) / seconds:,.0f} "
          f"tokens/s; {time.perf_counter() - begin:.0f} s in all"
          + (f"; peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
             if device.type == "cuda" else ""))
    use = f"--ckpt {where}" if full else f"--ckpt {args.ckpt} --adapter {where}"
    print(f"weights in {where}; use them:\n  python eval.py {use} --prompt "
          + shlex.quote(shown[0] if shown else "your question"))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:      # the user's mistakes: one line, no traceback
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
