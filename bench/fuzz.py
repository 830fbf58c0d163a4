"""Damaged inputs: each should work as it says, or be refused in one line that names the file.

    python -m bench.fuzz --out bench/results/fuzz_cpu.json      # 300 of each of 19 kinds, 10 min
    python -m bench.fuzz --kinds gguf state --cases 50          # of some kinds

A case is a function of (kind, number). It runs in a process of its own, forked from this one, with
1 GB more memory and 10 s. What is accepted is compared: text with json, ids with sentencepiece,
logits with transformers and PEFT, tensors with what was written. Faults are counted and listed:
traceback, hang, memory, crash, unclear (no line, or not of this file), wrong (not what it says).
"""
import argparse
import contextlib
import copy
import gzip
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import adapter
import convert
import data
import model
import tasks
import train
from bench import program
from bench import report as publish
from bench.damage import Wrong, damaged, outcome, write_gguf
from formats import gguf, hf, meta
from support import options, report, resume

TOKENS = torch.arange(3, 40)[None]
FAULTS = "traceback", "hang", "memory", "crash", "unclear", "wrong"


# A record of every task, and what of it must stand in the prompt.
TASKS = {"gsm8k": ({"question": "2 + 3?", "answer": "It is 5.\n#### 5"}, "question"),
         "math": ({"problem": "What is $\\frac12$ of 3?", "answer": "\\frac{3}{2}",
                   "solution": "$\\boxed{\\frac{3}{2}}$", "unique_id": "test/1.json"}, "problem"),
         "humaneval": ({"task_id": "HumanEval/0", "prompt": "def f(x):\n", "entry_point": "f",
                        "test": "def check(f):\n    assert f(1) == 1\n"}, "entry_point"),
         "mbpp": ({"task_id": 11, "text": "Return x.", "test_setup_code": "",
                   "test_list": ["assert f(1) == 1", "assert f(2) == 2"]}, "text"),
         "boolq": ({"instruction": "Is it?", "input": "", "output": "the correct answer is true",
                    "answer": "true"}, "instruction")}


# ------------------------------------------------------------------------------------ the attempts

def same(ours, read):
    """Wrong unless another program's model, if that takes the file, has our logits."""
    try:
        theirs = read()(TOKENS).logits
    except Exception:
        return                                                 # it is stricter
    if not (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max():
        raise Wrong(f"logits differ by {(ours - theirs).abs().max()}")


def read_jsonl(tok, answers, path):
    """--data, or --test-data with reference answers: as json reads it."""
    found = data.read(path)
    data.encode(found, tok, 256)
    if answers:
        data.references(found, path)
    lines = [line for line in path.read_text("utf-8-sig").split("\n") if line.strip("\ufeff \t\r")]
    if found != [(r["question"], r["answer"]) for r in map(json.loads, lines)]:
        raise Wrong(f"{len(found)} records of {len(lines)} lines")


def read_adapter(net, twin, path):
    """An adapter, as PEFT reads it."""
    same(adapter.load(copy.deepcopy(net), path.parent)(TOKENS),
         lambda: PeftModel.from_pretrained(copy.deepcopy(twin), path.parent).eval())


def read_base(path):
    """A checkpoint in Hugging Face's layout, as transformers reads it."""
    same(model.load(path.parent, "cpu", torch.float32)(TOKENS),
         lambda: AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32))


def read_mistral(path):
    """Mistral's own files, as transformers reads what becomes of them."""
    net = model.load(path.parent, "cpu", torch.float32)
    with tempfile.TemporaryDirectory() as there:
        hf.save_folder(there, hf.config_json(vars(net.config), torch.float32),
                       net.named_parameters())
        same(net(TOKENS), lambda: AutoModelForCausalLM.from_pretrained(there, dtype=torch.float32))


def read_tokenizer(path):
    """A tokenizer, as sentencepiece reads it."""
    tok, text = data.Tokenizer(path.parent), "Tom has 12 pens, é \n ok"
    sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    if tok.encode(text) != sp.encode(text) or max(tok.encode(text)) >= tok.vocab_size:
        raise Wrong(f"{tok.encode(text)}, {sp.encode(text)} expected")


def read_args(path):
    """args.json of a run that goes on: every argument has the type of its default."""
    sys.argv = ["train.py", "--resume", "--out", str(path.parent)]
    args = vars(options.for_train(""))
    default = vars(options.train_parser("").parse_args([]))
    for key, value in default.items():
        if value is not None and type(args[key]) is not type(value) and key not in ("niter", "out"):
            raise Wrong(f"{key} is {args[key]!r}")


def read_gguf(path):
    """A GGUF: shapes are checked, numbers cannot be."""
    config, tensors, info = convert.open_gguf(path)
    gguf.tokenizer_files(info, config.vocab_size, path)
    for name, read in tensors.items():
        convert.converted(name, read(), torch.float32)


def read_state(net, args, examples, before, path):
    """A run that goes on: the parameters that were saved, or none."""
    report.finished(args)
    resume.measured(args)
    net, args = copy.deepcopy(net), copy.copy(args)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=args.lr)
    run = resume.Run(net, optimizer, args, examples, 2)
    for name, p in run.params.items():
        if run.rows and not torch.equal(p.detach(), before[name]):
            raise Wrong(f"{name} is not what was saved")


def read_task(path):
    """--data of --task, or the predictions of a run that goes on: as json reads them."""
    if path.stem == "part":
        with open(path, "a") as log:
            return tasks.begun(log, path, {"task": "gsm8k", "weights": "ab"}, 9)
    for protocol in options.TASKS[path.stem]:
        found = tasks.read(path.stem, path, protocol)
    rows = [json.loads(line) for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    rows = [r for r in rows if path.stem != "mbpp" or 10 < r["task_id"] < 511]
    for row, problem in zip(rows, found, strict=True):
        if row[TASKS[path.stem][1]] not in problem["prompt"] + problem.get("tests", ""):
            raise Wrong(f"{row} became {problem}")


def read_records(path):
    """--data of other kinds: every record has an answer, and a prompt or messages."""
    for prompt, response in data.read(path):
        texts = [m["content"] for m in prompt] if isinstance(prompt, list) else [prompt]
        if not (texts and all(isinstance(text, str) for text in texts) and response.strip()):
            raise Wrong(f"{prompt!r}, {response!r}")


def read_template(path):
    """A chat template, or the configuration that holds it: what is learnt is an answer."""
    tok = data.Tokenizer(path.parent)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    try:
        ids, learnt = data.encode_chat(messages, tok)
    except ValueError as e:             # the command line adds no file to what a template says
        raise ValueError(f"{path}: {e}" if "chat template" in str(e) else str(e)) from None
    if len(ids) != len(learnt) or max(ids, default=0) >= tok.vocab_size:
        raise Wrong(f"{ids}, {learnt}")


def write_records(folder):
    """{kind: (attempt, *paths)} of small data files of other kinds, and of a chat template."""
    folder.mkdir()
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}, \"really\"."} for i in range(9)]
    talk = [{"messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1"},
                          {"role": "assistant", "content": "2"}]},
            {"conversations": [{"from": "human", "value": "3"}, {"from": "gpt", "value": "4"}]},
            {"instruction": "5", "output": "6", "system": "Add.", "history": [["1", "2"]]}] * 3
    table = "".join(f'{row["question"]},"{row["answer"].replace(chr(34), chr(34) * 2)}"\n'
                    for row in rows)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    contents = {"d.csv": f"question,answer\n{table}", "d.json": json.dumps(rows),
                "chat.jsonl": "".join(f"{json.dumps(row)}\n" for row in talk)}
    for name, content in contents.items():
        (folder / name).write_text(content)
    for name, content in ("l.jsonl.gz", lines), ("c.csv.gz", contents["d.csv"]), (
            "a.json.gz", contents["d.json"]):
        (folder / name).write_bytes(gzip.compress(content.encode()))
    kinds = {}
    with contextlib.suppress(ImportError):                # without pyarrow, there is no such kind
        from pyarrow import Table, parquet
        parquet.write_table(Table.from_pylist(rows), folder / "d.parquet")
        parquet.write_table(Table.from_pylist([{"messages": row["messages"]} for row in talk[::3]]),
                            folder / "chat.parquet", compression="zstd")
        kinds["parquet"] = (read_records, folder / "d.parquet", folder / "chat.parquet")
    template = ("{{ bos_token }}{% for m in messages %}\n[{{ m.role | upper }}] {{ m.content }}"
                "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
                "{% if add_generation_prompt %}\n[ASSISTANT] {% endif %}")
    for name in "own", "config":
        (folder / name).mkdir()
        shutil.copyfile(model.find("tiny") / "tokenizer.model", folder / name / "tokenizer.model")
    (folder / "own" / "chat_template.jinja").write_text(template)
    (folder / "config" / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}))
    return {**kinds, "csv": (read_records, folder / "d.csv"),
            "json array": (read_records, folder / "d.json"),
            "conversations": (read_records, folder / "chat.jsonl"),
            "gz": (read_records, *(folder / name for name in ("l.jsonl.gz", "c.csv.gz",
                                                              "a.json.gz"))),
            "chat template": (read_template, folder / "own" / "chat_template.jinja",
                              folder / "config" / "tokenizer_config.json")}


def write_tasks(folder):
    """A file of every task, and one of predictions; their paths."""
    folder.mkdir()
    for task, (record, _) in TASKS.items():
        (folder / f"{task}.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    rows = [{"task": "gsm8k", "weights": "ab"}, *([i, {"id": i, "correct": True}] for i in (0, 4))]
    (folder / "part.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return sorted(folder.iterdir())


# ----------------------------------------------------------------------------------------- set up

def write_relatives(there, vocab_size):
    """(config.json of a small Qwen3, a SmolLM3 and a Gemma, each with weights; Mistral's files)."""
    changes = {"qwen3": {"qk_norm": True}, "smollm3": {"no_rope": 2, "tied": True}, "gemma": {
        "gelu": True, "tied": True, "embed_scale": 32 ** 0.5}, "mistral": {"sliding_window": 9}}
    for family, change in changes.items():
        config = model.Config(32, 2, 4, 2, vocab_size, 48, **change)
        net = model.init_weights(model.Llama(config), std=0.3).requires_grad_(False)
        if family != "mistral":
            hf.save_folder(there / family, hf.config_json(vars(config), torch.float32),
                           net.named_parameters())
    folder = there / "mistral"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48,
        "norm_eps": 1e-5, "vocab_size": vocab_size, "sliding_window": 9, "rope_theta": 1e4}))
    save_file({meta.meta_name(n): model.reorder(W, n, config, to_meta=True).contiguous()
               for n, W in net.named_parameters()}, folder / "consolidated.safetensors")
    return ([there / family / "config.json" for family in ("qwen3", "smollm3", "gemma")],
            [folder / "params.json", folder / "consolidated.safetensors"])


def write_peft(folder, twin):
    """PEFT's own adapter of a model, with patterns, and a copy of the head that is adapted."""
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj", "lm_head"], lora_alpha=3,
                        init_lora_weights=False, alpha_pattern={"q_proj": 5, "lm_head": 1},
                        rank_pattern={"1.mlp.up_proj": 3})
    get_peft_model(copy.deepcopy(twin), config).save_pretrained(folder)
    return [folder / "adapter_config.json", folder / "adapter_model.safetensors"]


def set_up(there):
    """{kind: (attempt(path), *paths)} of small inputs, which are made in `there`."""
    tiny = model.find("tiny")
    for name in "base", "data", "tok":
        (there / name).mkdir()
    shutil.copyfile(tiny / "tokenizer.model", there / "tok" / "tokenizer.model")
    tok = data.Tokenizer(there / "tok")
    net = model.init_weights(model.Llama(model.Config(
        32, 2, 4, 2, tok.vocab_size, 48)), std=0.3).requires_grad_(False)
    convert.write_checkpoint(there / "base", there / "tok", net.config, net.state_dict().items(),
                             torch.float32, "hf")
    for name in "train", "test":
        lines = (tiny / f"{name}.jsonl").read_text().splitlines(keepends=True)[:24]
        (there / "data" / f"{name}.jsonl").write_text("".join(lines))
    sys.argv = list(map(str, ["train.py", "--ckpt", there / "base", "--data", there / "data" /
                              "train.jsonl", "--rank", 2, "--steps", 2, "--batch", 4, "--lr", 1e-2,
                              "--max-new-tokens", 1, "--device", "cpu", "--out", there / "run"]))
    args = options.for_train("")
    train.fine_tune(args)
    args.resume = True
    examples, *_ = train.read_data(args, tok)
    started = adapter.load(copy.deepcopy(net), resume.start_of(args.out))
    state = resume.newest(args.out) / "state.pt"
    before = torch.load(state, weights_only=True)["parameters"]
    shutil.copytree(args.out / "adapter", there / "bin")
    torch.save(load_file(there / "bin" / "adapter_model.safetensors"),
               there / "bin" / "adapter_model.bin")
    (there / "bin" / "adapter_model.safetensors").unlink()
    write_gguf(there / "x.gguf", net, sentencepiece.SentencePieceProcessor(
        model_file=str(tiny / "tokenizer.model")))
    twin = AutoModelForCausalLM.from_pretrained(there / "base", dtype=torch.float32)
    both, folder, out = partial(read_adapter, net, twin), there / "data", args.out
    configs, mistral = write_relatives(there, tok.vocab_size)
    return {
        "training jsonl": (partial(read_jsonl, tok, False), folder / "train.jsonl"),
        "test jsonl": (partial(read_jsonl, tok, True), folder / "test.jsonl"),
        "adapter config": (both, *(out / "adapter" / f"{name}.json"
                                   for name in ("adapter_config", "pissa"))),
        "adapter of PEFT's": (both, *write_peft(there / "peft", twin)),
        "other families": (read_base, *configs), "Mistral's": (read_mistral, *mistral),
        "safetensors": (read_base, there / "base" / "model.safetensors"),
        "bin": (both, there / "bin" / "adapter_model.bin"),
        "tokenizer.model": (read_tokenizer, there / "tok" / "tokenizer.model"),
        "args.json": (read_args, out / "args.json"),
        "gguf": (read_gguf, there / "x.gguf"),
        **write_records(there / "records"),
        "task files": (read_task, *write_tasks(there / "tasks")),
        "state": (partial(read_state, started, args, examples, before), state, state,
                  out / "val.jsonl", out / "summary.json")}


def main():
    """All cases; prints what came of them."""
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--cases", type=int, default=300, help="of each kind")
    p.add_argument("--kinds", nargs="*", help="default: all of them")
    p.add_argument("--out")
    asked, argv, begin, counts, faults = p.parse_args(), sys.argv, time.perf_counter(), {}, []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as there:
        kinds = set_up(Path(there))
        for kind in asked.kinds or kinds:
            attempt, *files = kinds[kind]
            for path in files:                               # undamaged, all of them are accepted
                found = outcome(partial(attempt, path), path)
                assert found == ("accepted", ""), (path, found)
            count = counts[kind] = Counter()
            for case in tqdm(range(asked.cases), kind, leave=False):
                rng = random.Random(f"{kind} {case}")
                path = rng.choice(files)
                whole = path.read_bytes()
                path.write_bytes(damaged(whole, rng, path.suffix))
                found, line = outcome(partial(attempt, path), path)
                path.write_bytes(whole)
                count[found] += 1
                if found in FAULTS:
                    faults.append([kind, case, path.name, found, line.replace(there, "")])
            print(f"{kind:16}", ", ".join(f"{n} {name}" for name, n in count.most_common()))
    print(*(" ".join(map(str, fault)) for fault in faults), sep="\n")
    sys.argv = argv
    publish({"cases": asked.cases, "counts": counts, "faults": faults,
             "seconds": round(time.perf_counter() - begin)}, asked.out)


if __name__ == "__main__":
    program(main)
