"""Fine-tune a LLaMA with PiSSA.

    python train.py                              # the demo, on two CPU cores
    python train.py --ckpt llama2-7b --rank 64   # Meta's raw weights, a GPU
    python train.py --ckpt llama2-7b --data my.jsonl --batch 128

    python train.py --resume --out runs/demo     # go on after an interruption
    torchrun --nproc-per-node 8 train.py --ckpt llama2-7b     # several GPUs

The defaults are the paper's (arXiv 2404.02948). A run leaves in --out: adapter/ (a PEFT LoRA; a
checkpoint/ for --method full), log.jsonl (a line per step), val.jsonl (the measurements before and
after), loss.png, args.json, summary.json, and states/, with which it can go on. With --val-every,
best/ is the adapter whose validation loss was the lowest.
"""
from support import options

if __name__ == "__main__":                                          # before torch is loaded
    options.begin(options.for_train, __doc__)

import math
import time
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from itertools import chain, count, islice

import torch
import torch._functorch.config
import torch.nn.functional as F
from tqdm import tqdm

import adapter
import data
import fast
import model
import pissa
import relatives
from convert import check_layout, layout_of, write_checkpoint
from eval import accuracy, complete, describe, load_model, positions
from fast import faster
from formats.jsonl import counted, filled
from support import chats, parallel, progress, report, resume

# ---------------------------------------------------------------------------------------- the loss


@faster(fast.chunked_loss)
def loss_of(head, x, targets):
    """Sum of the cross-entropies of head(x), x (M, D), and targets (M,)."""
    return F.cross_entropy(head(x).float(), targets, reduction="sum")


def loss_sum(net, tokens, labels, where_text=None):
    """Sum of the cross-entropies of (b, T) tokens and labels (-100: no loss), all on the CPU.

    where_text: as data.micro_batches gives it; without it, padding is computed as well.
    """
    def send(x):                                       # pinned, so that the copy is asynchronous
        return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x

    device = net.lm_head.weight.device
    labels = labels.flatten() if where_text is None else labels.flatten()[where_text]
    learnt = (labels != -100).nonzero()[:, 0]          # logits only if there is something to learn
    where_text = where_text if where_text is None else send(where_text)
    x = net.hidden(send(tokens), where_text=where_text).flatten(0, 1)
    x = x.index_select(0, send(learnt))                    # the rest is freed before logits come
    return loss_of(net.lm_head, x, send(labels[learnt]))


@faster(fast.joined)
def joined(weights):
    """The parameters that the optimizer trains."""
    return weights


def micro_batches(batch, longest, args):
    """Micro-batches, none larger than args.micro_batch examples with `longest` tokens each."""
    made = data.micro_batches(batch, args.micro_batch * longest)
    return [(tokens, labels, None) for tokens, labels, _ in made] if args.no_packing else made


@torch.no_grad()
def validation_loss(net, examples, args, autocast):
    """Mean loss per learnt token. Examples as data.encode gives them, one at least."""
    total, learnt = 0.0, 0
    longest = max(len(ids) for ids, _ in examples)
    parts = parallel.deal(micro_batches(examples, longest, args))
    for tokens, labels, where_text in tqdm(parts, "validation", unit="batch", delay=1, leave=False):
        with autocast:
            total += loss_sum(net, tokens, labels, where_text).item()
        learnt += int((labels != -100).sum())
    total, learnt = parallel.add_numbers(total, learnt)
    return total / learnt


# ---------------------------------------------------------------------------------------- the loop

def learning_rate(step, steps, args):
    """Linear warm-up over the first `warmup` share of the steps, then a cosine down to 0."""
    warm = max(1, round(args.warmup * steps))
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def all_batches(examples, args, steps):
    """For a range of steps, epoch after epoch: the batch, this process's micro-batches of it, and
    whether every process has one."""
    longest = max(len(ids) for ids, _ in examples)
    batches = chain.from_iterable(data.batches(examples, args.batch, args.seed, epoch)
                                  for epoch in count())
    for batch in islice(batches, steps.start, steps.stop):
        parts = micro_batches(batch, longest, args)
        yield batch, parallel.deal(parts), parallel.SHARDED or len(parts) >= parallel.WORLD


def validate(net, val, args, autocast, step):
    """--val-every: a row of val.jsonl after a step, and if it is the lowest loss so far, best/."""
    loss = validation_loss(net, val, args, autocast)
    lowest, at = progress.best(args.out)
    if is_best := loss < lowest or step == at:               # the same step again, after a kill
        save(net, args, args.out / "best")
    return progress.note(args.out, step, loss, is_best)


def train(net, examples, args, autocast, val=()):
    """The loop. Returns the rows of log.jsonl, and None or the resume.Stop that ended it early."""
    method = relatives.known(args.method)                       # most have none of these hooks
    penalty, after_step = getattr(method, "penalty", None), getattr(method, "after_step", None)
    params = list(parallel.trained(net).values())
    if not (method == "full" or hasattr(method, "Layer") or hasattr(method, "optimizer")):
        params = joined(params)                                         # A and B: many, and small
    if make := getattr(method, "optimizer", None):
        optimizer = make(net, args.lr, args.weight_decay)
    else:
        optimizer = torch.optim.AdamW(params, args.lr, weight_decay=args.weight_decay, fused=True)
    steps = data.count_steps(examples, args)
    parallel.overlap(params)
    with (resume.Run(net, optimizer, args, examples, steps) as run,
          progress.training(args, len(run.rows), steps) as show):
        todo = range(len(run.rows), steps)            # not from 0 if an interrupted run goes on
        batches = all_batches(examples, args, todo)
        ahead = next(batches, None)
        for step in todo:
            start, (batch, parts, dealt) = time.perf_counter(), ahead
            lr = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args)
            learnt, total = sum(map(data.n_learnt, batch)), 0.0
            if penalty and not parallel.RANK:                # of the weights, so in one process
                parallel.before_backward(net, False)
                penalty(net).backward()
            for part in parts:     # each divided by the batch's tokens: their sum is the batch mean
                parallel.before_backward(net, part is parts[-1] and dealt)
                with autocast:
                    loss = loss_sum(net, *part) / learnt
                loss.backward()
                total += loss.detach()
            assert not parts or parallel.complete(params), "a gradient is missing"
            total, *wishes = parallel.add_up(params, total, *run.wishes())
            norm = parallel.whole(torch.nn.utils.clip_grad_norm_(params, args.clip))
            ahead = next(batches, None)           # while the GPU works: the next line waits for it
            loss, norm, *wishes = parallel.floats(total, norm, *wishes)
            for name, value in ("loss", loss), ("gradient norm", norm):
                if not math.isfinite(value):                   # stop before it spoils the weights
                    return run.rows, resume.Stop(
                        f"the {name} is {value} at step {step + 1}: lower --lr", 1)
            optimizer.step()
            optimizer.zero_grad()
            if after_step:
                after_step(net, step + 1, steps)
            row = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": lr,
                   "tokens": sum(len(ids) for ids, _ in batch),
                   "seconds": time.perf_counter() - start}
            show(row)
            if args.val_every and val and ((step + 1) % args.val_every == 0 or step + 1 == steps):
                show(validate(net, val, args, autocast, step + 1))
            if stopped := run.done(row, *wishes):
                return run.rows, stopped
    return run.rows, None


# ----------------------------------------------------------------------------- before and after it

def evaluate(net, tok, val, val_texts, test, args, autocast, when, loss=None):
    """{"loss": validation loss, "answers": {prompt: answer} for two prompts, "accuracy": share}."""
    todo = [f"measuring the loss on {counted(len(val), 'example')}"] * (loss is None)
    if todo := todo + [f"answering {len(test)} problems"] * bool(test):
        print(filled(f"{when} training: {', '.join(todo)}"))
    if loss is None:
        loss = validation_loss(net, val, args, autocast)
    if when == "before" and not math.isfinite(loss):           # the first step would blame --lr
        raise ValueError(f"{args.adapter or args.ckpt}: the validation loss is {loss} before the "
                         "first step: the model is damaged, or too large for its dtype")
    shown = list(islice((prompt for prompt, _ in val_texts if prompt and len(
        data.prompt_ids(prompt, tok)) <= positions(net)), 2))
    with parallel.generation():
        mine = parallel.share(shown)
        answers = parallel.union(list(zip(map(data.as_text, mine), complete(
            net, tok, mine, max_new_tokens=args.max_new_tokens), strict=True)))
        mine = parallel.share(test)
        _, rows = accuracy(net, tok, mine, max_new_tokens=args.max_new_tokens,
                           desc=f"accuracy {when}") if mine else (0, [])
        rows = parallel.union(rows)
    right, cut = [row["correct"] for row in rows], sum(row.get("cut", False) for row in rows)
    return {"loss": loss, "answers": dict(answers),
            "accuracy": sum(right) / len(right) if right else None, "problems": len(right),
            "cut": cut}


def read_data(args, tok):
    """(training examples, validation examples, the text of the latter); the first two encoded."""
    examples = data.read(args.data, args.fields)
    chats.choose(examples, tok, args)
    if args.val_data:
        train, val = examples, data.read(args.val_data, args.fields)
    else:
        train, val = data.split(examples, args.val_fraction, args.seed)
    if seen := not val:
        val = train[:32]
        print("no validation examples: the loss below is that of 32 training examples")
    encoded = report.encoded("data", args.data, train, tok, args.max_length)
    where = args.val_data or args.data
    encoded_val = report.encoded("validation", where, val, tok, args.max_length, seen)
    chats.begin(encoded, tok)
    return encoded, encoded_val, val


def prepare(net, args, seconds, read=None, examples=()):
    """Make the parameters of args.method trainable: every weight, a saved adapter, or a new one.

    read: as `model.load` gives it, if the weights are still to be read. examples: for a method that
    measures some of them first. Stores the time it takes in seconds["init"].
    """
    begin, finish, ahead = time.perf_counter(), None, read
    if parallel.SHARDED:
        read, finish = parallel.sharding(net, read, args)
    net.checkpointing = args.checkpointing and not parallel.MESH
    if args.offload:
        import_module("support.offload").through_host_memory(net)
    begun = args.resume and resume.newest(args.out)
    if args.method == "full":
        net.requires_grad_(True)
    elif begun or args.adapter:
        where = resume.start_of(args.out) if begun else args.adapter
        adapter.load(net, where, read=read, force_base=args.force_base, relative=relatives.known)
        if not begun:
            vars(args).update({key: net.pissa[key] for key in (
                "method", "rank", "niter", "quant_iters") if key in net.pissa})
            args.no_double_quant = not net.pissa.get("double_quant", True)
            args.bits = 8 if net.pissa["bits"] == 8 else 4
        print(filled(f"{'A_0 and B_0 are those of' if begun else 'going on with'} {where}: "
                     f"{args.method}, rank {args.rank}"))
    else:
        method = relatives.chosen(args, net, examples, loss_sum)
        if parallel.WORLD > 1:
            method = parallel.dealt(method, args.seed, not args.no_double_quant, ahead)
        method = import_module("support.mps").method(method, args.device)
        pissa.inject(net, args.rank, method, args.targets, args.niter, args.seed, read=read,
                     quant_iters=args.quant_iters, bits=args.bits,
                     double_quant=not args.no_double_quant, progress=not parallel.RANK)
        report.injected(net)
    if finish:
        finish()
    seconds["init"] = time.perf_counter() - begin


def check_start(net, val, args, autocast, base_loss):
    """Print the validation loss of an injected model. ValueError if it is not the base model's."""
    print("measuring the validation loss again, now with A and B")
    loss = validation_loss(net, val, args, autocast)
    print(f"step 0: validation loss {loss:.4f}, the base model's {base_loss:.4f}")
    if not report.quantised(net) and abs(loss - base_loss) > 0.02 * base_loss:
        raise ValueError("the injected model is not the base model: the loss differs at step 0")


def load(args, tok, seconds):
    """(network, whether it is prepared, too). It is, if it may be too large for memory: then its
    layers are quantised, or spread over several processes, while they are read. And with an adapter
    that was saved: the run begins with it."""
    start, full = time.perf_counter(), args.method == "full"
    quantised = not full and (adapter.is_quantised(args.adapter) if args.adapter
                              else adapter.facts_of(relatives.chosen(args))["bits"] == 4)
    measured = hasattr(relatives.known(args.method), "STATISTIC")     # needs the whole model first
    prepared = quantised and not measured or parallel.SHARDED
    net = load_model(args.ckpt, tok, args.device, "float32" if full else args.dtype,
                     partial(prepare, args=args, seconds=seconds) if prepared else None)
    if parallel.SHARDED:
        parallel.shard_root(net)
    if full:                          # a missing package is reported now, not after the training
        check_layout(layout_of(model.find(args.ckpt)), net.config)
    seconds["load"] = time.perf_counter() - start - seconds["init"]
    report.loaded(net, args, seconds["load"])
    if args.adapter and not prepared:             # the run begins with it: alone, W_res is no model
        prepare(net, args, seconds)
    return net, prepared or bool(args.adapter)


def compile_layers(net, **options):
    """torch.compile, layer by layer: they are alike, so it takes seconds. options: its own.

    Backward computes the outputs of norms again instead of keeping them: a twelfth less memory for
    a hundredth more time. This changes a global setting of torch.
    """
    torch._functorch.config.activation_memory_budget = 0.9
    for layer in net.model.layers:
        layer.forward = torch.compile(layer.forward, **options)


def save(net, args, there=None):
    """Write the adapter, or for --method full a checkpoint like the one read; its directory."""
    there = there or args.out / ("checkpoint" if args.method == "full" else "adapter")
    learnt = parallel.gathered({n: p.detach() for n, p in parallel.trained(net).items()})
    if parallel.RANK:
        return there
    if args.method == "full":
        dtype = torch.bfloat16
        write_checkpoint(there, model.find(args.ckpt), net.config,
                         ((n, p.to(dtype)) for n, p in learnt.items()), dtype)
    else:
        adapter.save(net, there, learnt)
    return there


def fine_tune(args):
    """Load, evaluate, inject, train, save, evaluate again."""
    begin, seconds = time.perf_counter(), {"init": 0.0}
    args.device, args.out = parallel.start(args.device), parallel.agree(args.out)
    if args.resume and resume.is_same(args) and report.finished(args):
        return resume.finish(args)
    parallel.choose(args.shard, lambda: import_module("support.plan").peak(args))
    tok = chats.tokenizer(args)
    examples, val, val_texts = read_data(args, tok)
    test = data.read(args.test_data, args.fields) if args.test_data else []
    data.references(test, args.test_data)
    report.problems(args.test_data, test, tok)
    net, prepared = load(args, tok, seconds)
    device, full = net.lm_head.weight.device, args.method == "full"
    # Every weight is trained in float32 with bfloat16 products. A and B are float32 anyway.
    mixed = full and not args.dtype and model.has_bfloat16(device)
    autocast = torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()
    earlier = resume.measured(args)                   # if an interrupted run goes on
    before = earlier or evaluate(net, tok, val, val_texts, test, args, autocast, "before")
    if not prepared:
        prepare(net, args, seconds, examples=examples)
    quantised = bool(report.quantised(net))
    if prepared:
        few = f", with the weights in {'eight' if args.bits == 8 else 'four'} bits" * quantised
        print(f"step 0: validation loss {before['loss']:.4f}{few}")
    report.advise(net, examples, args)
    if args.compile and not parallel.MESH:
        compile_layers(net)
    if not full and not prepared and not earlier:
        check_start(net, val, args, autocast, before["loss"])
    chats.note(net, tok)
    resume.claim(args, net, before)
    with resume.signals_noted():
        rows, stopped = train(net, examples, args, autocast, val)
        if not rows:
            report.stop(stopped, options.NOTHING)
        by_signal = stopped and stopped.code != 1
        if not by_signal:
            print(filled(f"after training: measuring the loss on {counted(len(val), 'example')}"))
        loss = rows[-1]["loss"] if by_signal else validation_loss(net, val, args, autocast)
        if not (math.isfinite(loss) and resume.finite(net)):
            stopped = stopped or resume.Stop(
                f"the validation loss is {loss} after the last step: lower --lr", 1)
            report.stop(stopped, resume.not_written(args.out))
        directory = save(net, args)
        report.plot(rows, args, None if by_signal else loss)
        stopped = stopped or resume.asked(f"interrupted after the last of {len(rows)} steps")
    if stopped:
        report.stop(stopped, f"what was learnt before is in {directory}; the same command with "
                             "--resume goes on")
    with torch.compiler.set_stance("eager_on_recompile"):  # generation has a new shape every token
        after = evaluate(net, tok, val, val_texts, test, args, autocast, "after", loss)
    seconds["all"] = time.perf_counter() - begin
    summary = report.summarise(rows, before, after, args, seconds, device,
                               describe("strict", args.max_new_tokens, chat=tok.in_chat))
    if quantised:
        print(filled(f"note: {adapter.EXPORTED}; convert.py merge writes the latter"))
    prompts = [data.as_text(prompt) for prompt, _ in val_texts]
    report.weights_written(directory, args, prompts, tok.in_chat, summary)
    resume.finish(args)


def main():
    """Do what the command line asks for."""
    args = options.begun(options.for_train, __doc__)
    progress.check(args)
    if args.plan:
        from support import plan
        return plan.show(args)                                 # before anything is read
    with fast.off() if args.plain else nullcontext(), resume.told(args):
        resume.check_free(args.out)
        import_module("support.shapes").check(args)
        fine_tune(args)
    parallel.end()


if __name__ == "__main__":
    report.run(main, "train.py")
