"""The score of a model on every task of tasks/, with protocol and standard error.

    python -m bench.bench_tasks --ckpt smollm2 --allow-code --out bench/results/tasks_h100.json
    python -m bench.bench_tasks --ckpt tiny --limit 4 --tokens 16 --allow-code       # a trial
    python -m bench.bench_tasks --ckpt smollm2 --adapter lora=runs/a/adapter ... --allow-code
    python -m bench.bench_tasks --ckpt smollm2 --chat --allow-code --out .../tasks_chat_h100.json

All tasks in one process: the base model, then each adapter on it. --folder holds gsm8k/test.jsonl,
math/test.jsonl, humaneval/HumanEval.jsonl, mbpp/mbpp.jsonl and commonsense/NAME.jsonl. A task that
has no file is left out. Rows are written after every task. The standard error is that of a share,
sqrt(p (1 - p) / n). It says nothing of another prompt.
"""
import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch

import adapter
import data
import eval as evaluation
import model
import tasks
from bench import program, report, stamped
from formats import chat
from support import options

FILES = {"gsm8k": "gsm8k/test", "math": "math/test", "humaneval": "humaneval/HumanEval",
         "mbpp": "mbpp/mbpp", **{name: f"commonsense/{name}" for name in options.COMMONSENSE}}


def measured(net, tok, task, protocol, path, args):
    """A row of the result: how the task was measured, and what came of it."""
    problems = tasks.read(task, path, protocol)[:args.limit]
    known = options.TASKS[task][protocol]
    most, begin = min(known, args.tokens), time.perf_counter()
    rows = tasks.evaluate(net, tok, task, problems, max_new_tokens=most, batch=args.batch)
    n, share = len(rows), sum(row["correct"] for row in rows) / len(rows)
    return {"task": task, "protocol": protocol, "problems": n, "max_new_tokens": most,
            "accuracy": share, "standard_error": math.sqrt(share * (1 - share) / n),
            "answered": sum(bool(row["answer"]) for row in rows),
            "out_of_time": sum(row.get("why") == "out of time" for row in rows),
            "seconds": round(time.perf_counter() - begin, 1),
            "how": tasks.describe(task, protocol, most, problems, path.relative_to(args.folder),
                                  tok.in_chat)}


def main():
    """Every model on every task that has a file."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--ckpt", default="tiny")
    p.add_argument("--adapter", nargs="*", default=[], metavar="NAME=DIRECTORY")
    p.add_argument("--folder", type=Path, default="../shared/data", help="of the tasks' files")
    p.add_argument("--tasks", nargs="*", default=list(FILES), choices=list(FILES))
    p.add_argument("--limit", type=int, help="problems of a task, the first ones")
    p.add_argument("--tokens", type=int, default=512, help="most new tokens, if a protocol allows "
                   "more: few answers of small models are longer, and all wait for the longest")
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--allow-code", action="store_true", help="run programs that the model writes")
    p.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    p.add_argument("--device")
    p.add_argument("--dtype", choices=options.DTYPES, help="default: bfloat16 on a GPU")
    p.add_argument("--out")
    args, rows, begin = p.parse_args(), [], time.perf_counter()
    base = evaluation.load_model(args.ckpt, tok := data.Tokenizer(model.find(args.ckpt)),
                                 args.device, args.dtype).requires_grad_(False)
    if args.chat:
        chat.use(tok)
    for name, folder in [("base", None), *(word.split("=", 1) for word in args.adapter)]:
        net = adapter.load(copy.deepcopy(base), folder) if folder else base
        for task in args.tasks:
            path = args.folder / f"{FILES[task]}.jsonl"
            if not path.is_file() or task in options.RUN_CODE and not args.allow_code:
                print(f"{task}: left out, since {path} is not here or --allow-code was not given")
                continue
            for protocol in options.TASKS[task]:
                try:
                    row = measured(net, tok, task, protocol, path, args)
                except ValueError as e:                    # prompts that are too long for the model
                    row = {"task": task, "protocol": protocol, "error": str(e)}
                rows.append({"model": name, **row})
                print(json.dumps(rows[-1]), flush=True)
                result = {"bench": "tasks", "rows": rows,
                          "model": model.find(args.ckpt).name + ", in chat" * args.chat,
                          "dtype": str(base.lm_head.weight.dtype).removeprefix("torch."),
                          "seconds": round(time.perf_counter() - begin)}
                stamped(result, args.out)
    report(result, args.out)


if __name__ == "__main__":
    with torch.inference_mode():
        program(main)
