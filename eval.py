"""Use a model: complete a prompt, measure accuracy on problems, measure perplexity on text.

    python eval.py --ckpt tiny --adapter runs/demo/adapter --prompt "Tom has 3 pens. ..."
    python eval.py --ckpt tiny --adapter runs/demo/adapter --accuracy checkpoints/tiny/test.jsonl
    python eval.py --ckpt tiny --ppl some_text.txt

With an adapter, --prompt shows the base model's completion beside the adapted one.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
import pissa


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


def accuracy(net, tok, examples, *, max_new_tokens=128, batch=64, desc="accuracy"):
    """Share of exact final answers, and a list of predictions (dicts), greedily decoded.

    examples: (instruction, reference) from `data.read`. Protocol: the template of data.PROMPT, one
    greedy answer of at most max_new_tokens; it counts when the first number after "####" or "The
    answer is" equals the reference's as a rational number. A reference without: ValueError.
    """
    references = [data.final_answer(reference) for _, reference in examples]
    if None in references:
        i = references.index(None)
        raise ValueError(f"record {i + 1}: the reference answer names no number after '####' or "
                         f"'The answer is': {examples[i][1][:60]!r}")
    texts = complete(net, tok, [p for p, _ in examples], max_new_tokens=max_new_tokens, batch=batch,
                     desc=desc)
    rows = [{"prompt": p, "response": text, "answer": data.final_answer(text), "reference": ref,
             "correct": data.same_answer(data.final_answer(text), ref)}
            for (p, _), text, ref in zip(examples, texts, references)]
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


def write_lines(path, rows):
    """Write dicts as jsonl, under a temporary name until all are written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(tmp, path)


def arguments():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__,
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
    p.add_argument("--length", type=int, default=512, help="window of --ppl, in tokens")
    p.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = p.parse_args()
    if not (args.prompt or args.accuracy or args.ppl):
        p.error("nothing to do: give --prompt, --accuracy or --ppl")
    return args


def main():
    """Load the model, then whatever was asked for."""
    args = arguments()
    tok, net = data.Tokenizer(model.find(args.ckpt)), model.load(args.ckpt, args.device)
    examples = data.read(args.accuracy, args.fields)[:args.limit] if args.accuracy else []
    text = Path(args.ppl).read_text() if args.ppl else ""

    def answer():
        return complete(net, tok, [args.prompt], max_new_tokens=args.max_new_tokens, seed=args.seed,
                        temperature=args.temperature, top_p=args.top_p)[0]

    if args.adapter:
        if args.prompt:
            print(f"--- base\n{answer()}\n--- with {args.adapter}")
        pissa.load(net, args.adapter, keep_base=False)
    if args.prompt:
        print(answer())
    if args.accuracy:
        print(f"protocol: the template of data.PROMPT, greedy, at most {args.max_new_tokens} new "
              "tokens; the first number after '####' or 'The answer is' must equal the reference")
        score, rows = accuracy(net, tok, examples, batch=args.batch,
                               max_new_tokens=args.max_new_tokens)
        error = math.sqrt(score * (1 - score) / len(rows))
        folder = Path(args.adapter).parent if args.adapter else Path("runs")
        out = args.out or folder / f"predictions-{Path(args.accuracy).stem}.jsonl"
        write_lines(out, rows)
        print(f"accuracy {score:.1%} ± {error:.1%} (standard error) on {len(rows)} problems; "
              f"predictions in {out}")
    if args.ppl:
        ppl, n = perplexity(net, tok, text, args.length)
        print(f"perplexity {ppl:.4f} per token ({n:,} tokens, windows of {args.length})")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:      # the user's mistakes: one line, no traceback
        sys.exit(f"eval.py: {e}")
