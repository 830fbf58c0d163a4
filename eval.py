"""Use a model: complete a prompt, measure accuracy on problems, measure perplexity on text.

    python eval.py --ckpt tiny --adapter runs/demo/adapter --interactive
    python eval.py --ckpt tiny --adapter runs/demo/adapter --prompt "Tom ..."
    python eval.py --ckpt tiny --accuracy checkpoints/tiny/test.jsonl
    python eval.py --ckpt tiny --ppl some_text.txt
    python eval.py --ckpt smollm2 --task math --data math/test.jsonl

With an adapter, --prompt and --interactive show the base model's answer beside the adapted one. An
adapter of weights in four bits is shown alone, since its base may be too large. If --accuracy or
--task was interrupted, run the same command again: it resumes.
"""
from support import options

if __name__ == "__main__":                                          # before torch is loaded
    options.begin(options.for_eval, __doc__)

import hashlib
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import adapter
import data
import model
import pissa
import tasks
from formats import jsonl
from formats.jsonl import filled, write_lines
from support import ask, chats, predictions, report
from support.files import named

# Of each protocol: the text after the template, the function that reads an answer, and its rule.
PROTOCOLS = {
    "strict": ("", data.final_answer, data.RULE),
    "paper": (data.STEPS, data.paper_answer, "the rounded number after the last 'The answer is: '")}


def describe(protocol, max_new_tokens, stop=(), chat=False):
    """The line that says how an accuracy was measured."""
    begin, _, rule = PROTOCOLS[protocol]
    form = "the chat template" if chat else "data.PROMPT"
    return (f"protocol {protocol}: {form}{begin and f' + {begin!r}'}, greedy, at most "
            f"{max_new_tokens} new tokens{f', stop at {stop}' if stop else ''}; {rule} must equal "
            "the reference")


def positions(net):
    """The most tokens that a prompt may have: those the model was trained for, if it says so."""
    return net.config.max_seq_len or 2**17


def complete(net, tok, prompts, *, max_new_tokens=128, batch=64, begin="", stop=(), watch=None,
             cut=None, **sampling):
    """Responses (str) to instructions, in the paper's template or in the model's chat template
    (see data.prompt_ids), up to the first text of `stop`.

    begin: the first words of every response, not repeated in it. sampling: see model.generate.
    watch: a function that gets the text of a response after each token. cut: a set that gets the
    indices of the responses that max_new_tokens has ended.
    """
    ids = [data.prompt_ids(p, tok, begin) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))    # like lengths: little padding
    if order and (longest := len(ids[order[-1]])) > positions(net):
        first = data.as_text(prompts[order[-1]])[:60]
        raise ValueError(f"the prompt {first!r} has {longest:,} tokens, more than the model's "
                         f"{positions(net):,} positions: leave it out")
    # The tokens that may hold a stop text: a byte each, and one whose leading space decode() drops.
    width, out = 1 + max((len(s.encode()) for s in stop), default=0), [""] * len(ids)

    def ended(new):
        if watch:
            watch(tok.decode(new))
        return any(s in tok.decode(new[-width:]) for s in stop)

    for start in range(0, len(ids), batch):
        rows = order[start:start + batch]
        new = model.generate(net, [ids[i] for i in rows], max_new_tokens, eos=tok.stops, stop=ended,
                             **sampling)
        for i, made in zip(rows, new, strict=True):
            text = tok.decode(made)
            end = min((text.find(s) for s in stop if s in text), default=None)
            out[i] = text[:end].strip()
            if cut is not None and end is None and len(made) >= max_new_tokens:
                cut.add(i)
    return out


def accuracy(net, tok, examples, *, protocol="strict", max_new_tokens=128, batch=64, stop=(),
             desc="accuracy", done=(), log=None):
    """Share of right final answers, by a protocol, and a list of predictions (dicts).

    examples: (instruction, reference) from `data.read`. done: {index: prediction} of those answered
    before. log: a file that gets [index, prediction] of the others, batch by batch.
    No examples, or a reference without a final answer: ValueError.
    """
    if not examples:
        raise ValueError("no problems, so there is no accuracy")
    begin, read, _ = PROTOCOLS[protocol]
    answers, rows = data.references(examples, "accuracy"), dict(done)
    todo = sorted(set(range(len(examples))) - set(rows), key=lambda i: (len(examples[i][0]), i))
    bar = tqdm(range(0, len(todo), batch), desc=desc, unit="batch", leave=False)
    for start in bar:
        now, cut = todo[start:start + batch], set()
        texts = complete(net, tok, [examples[i][0] for i in now], max_new_tokens=max_new_tokens,
                         batch=batch, begin=begin, stop=stop, cut=cut)
        for n, (i, text) in enumerate(zip(now, texts, strict=True)):
            answer, reference = read(text), answers[i]
            rows[i] = {"prompt": examples[i][0], "response": text, "answer": answer,
                       "reference": reference, "correct": data.same_answer(answer, reference),
                       **({"cut": True} if n in cut else {})}
            if log:
                print(json.dumps([i, rows[i]], ensure_ascii=False), file=log, flush=True)
        bar.set_postfix_str(f"{sum(r['correct'] for r in rows.values()) / len(rows):.1%} right",
                            refresh=False)
    return sum(r["correct"] for r in rows.values()) / len(rows), [rows[i] for i in sorted(rows)]


@torch.inference_mode()
def perplexity(net, tok, text, length=512, stride=None):
    """(exp of the mean loss per token, tokens, windows) of a text.

    Every `stride` tokens (default: `length`) a window begins: BOS and `length` tokens. A model
    without BOS gets EOS instead, as in lm-evaluation-harness. A token counts in the first window
    that has it. So past the first window it sees length - stride tokens or more.
    """
    ids, stride = tok.encode(text), stride or length
    if not ids or stride > length:
        raise ValueError(f"--stride {stride} is more than --length {length}: tokens would be left "
                         "out" if ids else "the text is empty")
    device, total, counted = net.lm_head.weight.device, 0.0, 0
    starts = range(0, max(0, len(ids) - length) + stride, stride)   # the last one reaches the end
    for start in tqdm(starts, desc="perplexity", leave=False, delay=1):
        window = torch.tensor([[tok.start] + ids[start:start + length]], device=device)  # (1, T+1)
        new = start + window.shape[1] - 1 - counted                 # tokens not counted before
        logits = net(window[:, :-1])[0, -new:]                                          # (new, V)
        total += F.cross_entropy(logits, window[0, -new:], reduction="sum").item()
        counted += new
    return math.exp(total / len(ids)), len(ids), len(starts)


def load_model(ckpt, tok, device=None, dtype=None, prepare=None):
    """model.load, dtype by name, of a model whose vocabulary holds every id of the tokenizer."""
    net = model.load(ckpt, device, dtype and getattr(torch, dtype), prepare)
    if tok.vocab_size > net.config.vocab_size:
        raise ValueError(f"{model.find(ckpt)}: the tokenizer has {tok.vocab_size} tokens, but "
                         f"the model embeds {net.config.vocab_size}: they do not belong together")
    return net


def resume(part, header, count):
    """{index: prediction} that an interrupted run with this header left in `part`, kept there.

    A damaged file: ValueError.
    """
    # The last line may be half a line, without an end. It does not count, and is not kept.
    lines = part.read_text("utf-8", "replace").split("\n")[:-1] if part.exists() else []
    same = lines[:1] == [json.dumps(header, ensure_ascii=False)]
    if lines:
        print(filled(f"going on: {len(lines) - 1} of {count} are done" if same else
                     f"starting anew: {part} is of another model, protocol or set of problems"))
    try:
        done = predictions.checked(map(json.loads, lines[1:]), count) if same else {}
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
        raise ValueError(f"{part}: damaged; remove it to start anew") from None
    write_lines(part, [header, *done.items()])
    return done


def content_hash(net, directory, asked):
    """A hash of the weights (some 256 entries of each), the adapter's files and the problems."""
    h = hashlib.sha256(json.dumps([str(net.lm_head.weight.dtype), asked]).encode())
    for name, p in net.named_parameters():
        h.update(f"{name} {tuple(p.shape)} {pissa.sampled(p).tolist()}".encode())
    for file in sorted(Path(directory).glob("adapter_*")) if directory else []:
        h.update(file.read_bytes())
    return h.hexdigest()


def show_accuracy(net, tok, examples, args):
    """--accuracy: the protocol, the score with its 95 % interval, and a file of predictions."""
    how = {key: getattr(args, key) for key in ("protocol", "max_new_tokens", "stop")}
    print(filled(describe(**how, chat=tok.in_chat)))
    out, part = predictions.places(args, Path(args.accuracy).stem, args.protocol)
    asked = [(data.prompt_ids(prompt, tok), reference) for prompt, reference in examples]
    header = {"ckpt": args.ckpt, "adapter": args.adapter, **how,
              "sha256": content_hash(net, args.adapter, asked)}
    done = resume(part, header, len(examples))
    with named(part), open(part, "a", encoding="utf-8") as log:
        _, rows = accuracy(net, tok, examples, batch=args.batch, done=done, log=log, **how)
    predictions.finish(out, part, rows, args.protocol)


def main():
    """Read the files, load the model, then do what the command line asks for."""
    args = options.begun(options.for_eval, __doc__)
    examples = data.read(args.accuracy, args.fields)[:args.limit] if args.accuracy else []
    data.references(examples, args.accuracy)
    problems = tasks.read(args.task, args.data, args.protocol)[:args.limit] if args.task else []
    try:
        text = Path(args.ppl).read_text(encoding="utf-8") if args.ppl else ""
    except UnicodeDecodeError:
        raise ValueError(f"{args.ppl}: {jsonl.other_kind(args.ppl)}") from None
    if args.ppl and not text:
        raise ValueError(f"{args.ppl}: the text is empty")
    tok = chats.tokenizer(args)
    for where, texts in ((args.ppl, [text]), (args.data, [p["prompt"] for p in problems]),
                         (args.accuracy, [data.as_text(p) for p, _ in examples])):
        report.spelled(where, texts, tok)
    quantised = args.adapter and adapter.is_quantised(args.adapter)

    def adapt(net, read=None):
        keep_base = bool(args.prompt or args.interactive) and not quantised
        adapter.load(net, args.adapter, read=read, keep_base=keep_base,
                     force_base=args.force_base)

    print(f"eval.py: reading {args.ckpt} ...", file=sys.stderr, flush=True)
    net = load_model(args.ckpt, tok, args.device, prepare=adapt if quantised else None)
    if args.adapter and not quantised:
        adapt(net)
    both = bool(args.adapter) and not quantised       # the base of a quantised one may be too large
    if quantised and (args.prompt or args.interactive):
        print("note: the base model's answers are not shown: with rounded weights it is not in "
              "memory", file=sys.stderr)
    answer = partial(ask.answer, partial(complete, net, tok), net, tok, args, both)
    if args.prompt:
        answer(args.prompt)
    if args.interactive:
        ask.session(answer, chats.form(tok))
    if args.accuracy:
        show_accuracy(net, tok, examples, args)
    if args.task:
        tasks.show(net, tok, problems, args, content_hash(net, args.adapter, []))
    if args.ppl:
        length = args.length or min(512, net.config.max_seq_len or 512)
        ppl, n, windows = perplexity(net, tok, text, length, args.stride)
        print(filled(f"perplexity {ppl:.4f} per token ({n:,} tokens, {windows:,} windows of "
                     f"{length}, stride {args.stride or length})"))


if __name__ == "__main__":
    report.run(main, "eval.py")
