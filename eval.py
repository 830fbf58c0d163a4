"""Use a model: complete a prompt, measure accuracy on problems, measure perplexity on text.

    python eval.py --ckpt tiny --adapter runs/demo/adapter --prompt "Tom has 3 pens. ..."
    python eval.py --ckpt tiny --adapter runs/demo/adapter --accuracy checkpoints/tiny/test.jsonl
    python eval.py --ckpt tiny --ppl some_text.txt

With an adapter, --prompt shows the base model's completion beside the adapted one.
"""
import argparse
import json
import math
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # nothing here needs it

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
import pissa
from adapter import written


def complete(net, tok, prompts, *, max_new_tokens=128, batch=64, desc=None, **sampling):
    """Responses (str) to instructions, in the paper's template; `desc` names a progress bar."""
    ids = [data.prompt_ids(p, tok) for p in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))    # like lengths: little padding
    out = [""] * len(ids)
    for start in tqdm(range(0, len(ids), batch), desc=desc, disable=desc is None, leave=False):
        rows = order[start:start + batch]
        new = model.generate(net, [ids[i] for i in rows], max_new_tokens, eos=tok.eos, **sampling)
        for i, t in zip(rows, new):
            out[i] = tok.decode(t).strip()
    return out


def references(examples, where):
    """The final answer of every reference; ValueError for one that has none."""
    answers = [data.final_answer(reference) for _, reference in examples]
    if None in answers:
        i = answers.index(None)
        raise ValueError(f"{where}: record {i + 1}: the reference answer names no number after "
                         f"'####' or 'The answer is': {examples[i][1][:60]!r}")
    return answers


def accuracy(net, tok, examples, *, max_new_tokens=128, batch=64, desc="accuracy"):
    """Share of exact final answers, and a list of predictions (dicts), greedily decoded.

    examples: (instruction, reference) from `data.read`. Protocol: the template of data.PROMPT, one
    greedy answer of at most max_new_tokens; it counts when the first number after "####" or "The
    answer is" equals the reference's as a rational number. A reference without: ValueError.
    """
    answers = references(examples, "accuracy")
    texts = complete(net, tok, [p for p, _ in examples], max_new_tokens=max_new_tokens, batch=batch,
                     desc=desc)
    rows = []
    for (prompt, _), text, reference in zip(examples, texts, answers):
        answer = data.final_answer(text)
        rows.append({"prompt": prompt, "response": text, "answer": answer, "reference": reference,
                     "correct": data.same_answer(answer, reference)})
    return sum(r["correct"] for r in rows) / len(rows), rows


@torch.inference_mode()
def perplexity(net, tok, text, length=512):
    """(exp of the mean loss per token, tokens) of a text, in windows of `length` after BOS."""
    ids = tok.encode(text)
    if not ids:
        raise ValueError("the text is empty")
    device, total = net.lm_head.weight.device, 0.0
    for start in tqdm(range(0, len(ids), length), desc="perplexity", leave=False, delay=1):
        window = torch.tensor([[tok.bos] + ids[start:start + length]], device=device)   # (1, T+1)
        total += F.cross_entropy(net(window[:, :-1])[0], window[0, 1:], reduction="sum").item()
    return math.exp(total / len(ids)), len(ids)


def load_model(ckpt, tok, device=None, dtype=None):
    """model.load, dtype by name, of a model whose vocabulary holds every id of the tokenizer."""
    net = model.load(ckpt, device, dtype and getattr(torch, dtype))
    if tok.vocab_size > net.config.vocab_size:
        raise ValueError(f"{model.find(ckpt)}: tokenizer.model has {tok.vocab_size} pieces, but "
                         f"the model embeds {net.config.vocab_size}: they do not belong together")
    return net


def write_lines(path, rows):
    """Write dicts as jsonl; the file appears when all are written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as tmp, open(tmp, "w", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), file=file)


def check_ranges(parser, args, **ranges):
    """Refuse an option outside its (low, high), both included; NaN is outside of any."""
    for name, (low, high) in ranges.items():
        value, limit = getattr(args, name), f" and at most {high:g}" if high < math.inf else ""
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be at least {low:g}{limit}, not {value}")


def arguments():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, usage="python eval.py [--option value ...]",
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny", help="directory, or a name under checkpoints/")
    p.add_argument("--adapter", help="adapter directory, as train.py or PEFT wrote it")
    p.add_argument("--prompt", help="an instruction to answer")
    p.add_argument("--accuracy", metavar="JSONL", help="problems with final answers after '####'")
    p.add_argument("--ppl", metavar="TEXT", help="a text file")
    p.add_argument("--fields", help="field names of the jsonl, e.g. question,answer")
    p.add_argument("--limit", type=int, help="only the first so many problems")
    p.add_argument("--out", help="file for --accuracy's predictions (default: by the adapter)")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=64, help="prompts decoded together")
    p.add_argument("--length", type=int, help="window of --ppl, in tokens (default: 512, or what "
                   "the model was trained for, if that is less)")
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    args, at_least_1 = p.parse_args(), (1, math.inf)
    check_ranges(p, args, limit=at_least_1, max_new_tokens=at_least_1, batch=at_least_1,
                 length=at_least_1, temperature=(0, 1e6), top_p=(1e-9, 1), seed=(0, 2**63 - 1))
    if not (args.prompt or args.accuracy or args.ppl):
        p.error("nothing to do: give --prompt, --accuracy or --ppl")
    if (args.prompt or "").encode(errors="replace").decode() != (args.prompt or ""):
        p.error("--prompt is not valid UTF-8")
    return args


def show_accuracy(net, tok, examples, args):
    """--accuracy: the protocol, the score with its standard error, and a file of predictions."""
    print(f"protocol: the template of data.PROMPT, greedy, at most {args.max_new_tokens} new "
          "tokens; the first number after '####' or 'The answer is' must equal the reference")
    score, rows = accuracy(net, tok, examples, batch=args.batch, max_new_tokens=args.max_new_tokens)
    error = math.sqrt(score * (1 - score) / len(rows))
    folder = Path(args.adapter).parent if args.adapter else Path("runs")
    out = args.out or folder / f"predictions-{Path(args.accuracy).stem}.jsonl"
    write_lines(out, rows)
    print(f"accuracy {score:.1%} ± {error:.1%} (standard error) on {len(rows)} problems; "
          f"predictions in {out}")


def main():
    """Read everything, load the model, then do whatever was asked for."""
    args = arguments()
    examples = data.read(args.accuracy, args.fields)[:args.limit] if args.accuracy else []
    references(examples, args.accuracy)
    try:
        text = Path(args.ppl).read_text(encoding="utf-8") if args.ppl else ""
    except UnicodeDecodeError:
        raise ValueError(f"{args.ppl}: not UTF-8; convert the file (see iconv)") from None
    tok = data.Tokenizer(model.find(args.ckpt))
    net = load_model(args.ckpt, tok, args.device)
    if args.adapter:
        pissa.load(net, args.adapter, keep_base=bool(args.prompt))
    if args.prompt:
        sampling = {k: getattr(args, k) for k in ("max_new_tokens", "temperature", "top_p", "seed")}
        if args.adapter:
            with pissa.disabled(net):
                print(f"--- base\n{complete(net, tok, [args.prompt], **sampling)[0]}")
            print(f"--- with {args.adapter}")
        print(complete(net, tok, [args.prompt], **sampling)[0])
    if args.accuracy:
        show_accuracy(net, tok, examples, args)
    if args.ppl:
        length = args.length or min(512, net.config.max_seq_len or 512)
        ppl, n = perplexity(net, tok, text, length)
        print(f"perplexity {ppl:.4f} per token ({n:,} tokens, windows of {length})")


def run(main, name):
    """main(), with one line and exit code 1 in place of a traceback for what is no bug of ours."""
    try:
        main()
    except torch.OutOfMemoryError as e:
        sys.exit(f"{name}: {str(e).splitlines()[0]} Lower --batch or --micro-batch, use "
                 "--checkpointing, a smaller --rank or --max-length")
    except OSError as e:
        sys.exit(f"{name}: {e.filename}: {e.strerror.lower()}" if e.filename else f"{name}: {e}")
    except ValueError as e:
        sys.exit(f"{name}: {e}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")


if __name__ == "__main__":
    run(main, "eval.py")
