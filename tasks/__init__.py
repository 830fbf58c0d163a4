"""The benchmarks of the paper's tables, a page each: prompt, rule, score. `eval.py --task NAME`.

Every page has

    SHOWN, RULE                             {protocol: the prompt's name, the rule}, for people
    problem(record, where, task, protocol)  a line of the data -> {"prompt": ...}; None: left out
    score(response, problem)                -> {"answer": ..., "correct": True or False}
    ended(text, problem)                    True if more text cannot change the score; problem: any
                                            one of the task

Here is what they share: reading, answering in batches, the file of predictions. With --chat, or an
adapter that was trained in a chat template, the instruction of the prompt is asked in it.
"""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tqdm import tqdm

import data
import model
from formats import jsonl, records
from support import files, predictions
from tasks import commonsense, gsm8k, humaneval, math, mbpp

PAGES = {"gsm8k": gsm8k, "math": math, "humaneval": humaneval, "mbpp": mbpp,
         **dict.fromkeys(commonsense.NAMES, commonsense)}


def read(task, path, protocol):
    """The problems of a file, a list of dicts: JSON lines, or what else data.read takes. ValueError
    names the line that is none."""
    page, found, others = PAGES[task], [], 0
    for where, record in records.rows(path):
        problem = page.problem(record, where, task, protocol)
        others += problem is None
        if problem:
            found.append({"id": len(found), **problem})
    if others:
        print(jsonl.filled(f"note: {path}: {others} problems outside the test set of {task} are "
                           "left out"))
    if not found:
        raise ValueError(f"{path}: no problems of {task}; give one JSON object per line")
    return found


def describe(task, protocol, max_new_tokens, problems, path, chat=False):
    """The line that says how a task is measured."""
    page = PAGES[task]
    shown = page.SHOWN[protocol]
    if chat:                          # the name of the page's prompt, and how the answer begins
        name, plus, begin = shown.partition(" + ")
        shown = f"the instruction of {name} in the chat template{plus}{begin}"
    return (f"protocol {protocol} of {task}: {shown}, greedy, at most "
            f"{max_new_tokens} new tokens; {page.RULE[protocol]}; {len(problems)} problems of "
            f"{path}")


def prompt_ids(prompt, tok):
    """The ids of a page's prompt. In the chat template its instruction is the user's turn."""
    if not tok.in_chat:
        return tok.encode(prompt, bos=True)
    asked, begin = turn(prompt)
    return data.prompt_ids(asked, tok, begin)


def turn(prompt):
    """(instruction, the first words of its answer) of a page's prompt."""
    asked, _, begin = prompt.rpartition("\n\n### Response:")
    return asked.partition("### Instruction:\n")[2], begin


def evaluate(net, tok, task, problems, *, max_new_tokens, batch=64, done=(), log=None):
    """A list of predictions (dicts), one a problem of `read`.

    done: {index: prediction} of those answered before. log: a file that gets [index, prediction] of
    the others, batch by batch. A prompt longer than the model's positions: ValueError.
    """
    page, rows = PAGES[task], dict(done)
    ids = {i: prompt_ids(p["prompt"], tok) for i, p in enumerate(problems) if i not in rows}
    todo = sorted(ids, key=lambda i: len(ids[i]))                 # like lengths: little padding
    limit = net.config.max_seq_len or 2**17
    if todo and len(ids[todo[-1]]) > limit:
        raise ValueError(f"problem {problems[todo[-1]]['id']} has {len(ids[todo[-1]]):,} tokens, "
                         f"more than the model's {limit:,} positions: leave it out")
    bar = tqdm(total=len(problems), initial=len(rows), desc=task, unit="problem", leave=False)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:         # of programs that are run
        for start in range(0, len(todo), batch):
            now = todo[start:start + batch]
            texts = answers(net, tok, [ids[i] for i in now], max_new_tokens,
                            partial(page.ended, problem=problems[0]))
            scores = pool.map(page.score, texts, [problems[i] for i in now])
            for i, text, score in zip(now, texts, scores, strict=True):
                about = {k: problems[i][k] for k in ("id", "prompt", "reference")
                         if k in problems[i]}
                if tok.in_chat:
                    about["prompt"] = turn(problems[i]["prompt"])[0]
                rows[i] = {**about, "response": text, **score}
                if log:
                    print(json.dumps([i, rows[i]], ensure_ascii=False), file=log, flush=True)
            share = sum(row["correct"] for row in rows.values()) / len(rows)
            bar.set_postfix_str(f"{share:.1%} right", refresh=False)
            bar.update(len(now))
    return [rows[i] for i in sorted(rows)]


def answers(net, tok, prompts, max_new_tokens, ended):
    """What the model writes, greedily, after each prompt (ids): a list of str, spaces kept."""
    def stop(new):
        return len(new) % 16 == 0 and ended(tok.decode(new))       # asked now and then: it is slow

    new = model.generate(net, prompts, max_new_tokens, eos=tok.stops, stop=stop)
    # Alone, sentencepiece would drop the first space of a text, and so an indentation.
    return [tok.decode(p + ids)[len(tok.decode(p)):] for p, ids in zip(prompts, new, strict=True)]


def show(net, tok, problems, args, weights):
    """--task: the protocol, the accuracy with its 95 % interval, and a file of predictions.

    weights: a hash of the model and its adapter. Predictions are appended to OUT.part as they come.
    A run that was interrupted goes on there.
    """
    print(jsonl.filled(describe(args.task, args.protocol, args.max_new_tokens, problems, args.data,
                                tok.in_chat)))
    out, part = predictions.places(args, args.task, args.protocol)
    header = {key: getattr(args, key) for key in ("task", "protocol", "max_new_tokens", "data",
                                                  "limit", "ckpt", "adapter")}
    asked = hashlib.sha256(json.dumps(problems).encode()).hexdigest()
    header |= {"weights": weights, "problems": asked,
               "chat template": tok.template if tok.in_chat else None}
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.named(part), open(part, "a", encoding="utf-8", newline="") as log:
        held = files.lock(part)
        try:
            done = begun(log, part, header, len(problems))
            rows = evaluate(net, tok, args.task, problems, batch=args.batch, done=done, log=log,
                            max_new_tokens=args.max_new_tokens)
        finally:
            os.close(held)
    predictions.finish(out, part, rows, f"{args.protocol} of {args.task}")


def begun(log, part, header, count):
    """{index: prediction} that an interrupted run left in the open file `log`, which is `part`.

    The file then ends with a whole line. Of another run, or damaged: ValueError.
    """
    whole = part.read_bytes().rpartition(b"\n")[0]               # less half a line
    try:
        before, done = None, {}
        if whole:
            first, *rows = map(json.loads, whole.split(b"\n"))
            before, done = {key: first[key] for key in header}, predictions.checked(rows, count)
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError):
        raise ValueError(f"{part}: damaged; remove it to begin anew") from None
    if done and (other := [key for key in header if before[key] != header[key]]):
        was, now = (f"{h[other[0]]!r:.50}" for h in (before, header))
        raise ValueError(f"{part}: begun with other {', '.join(other)} ({was}, now {now}): give "
                         "the same, another --out, or remove it to begin anew")
    if done:
        log.truncate(len(whole) + 1)
        print(f"going on: {len(done)} of {count} are done")
    else:
        log.truncate(0)
        print(json.dumps(header, ensure_ascii=False), file=log, flush=True)
    return done
