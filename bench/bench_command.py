"""The README's own command at Llama-2-7B's size: `python train.py --ckpt DIR --rank 64 ...`.

    python -m bench.bench_command --tokenizer llama2/tokenizer.model --out command.json

Writes a randomly initialised Llama-2-7B in Meta's raw layout (13.5 GB) unless --ckpt is there
already, and texts long enough to fill every row; runs train.py as a user would, once for each
variant, and reads what it logged: seconds to load, to decompose, per step, tokens per second, peak
memory.
"""
import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import model
from bench import program, stamped
from formats import meta_write

VARIANTS = {"eager": [], "checkpointing": ["--checkpointing"], "compile": ["--compile"]}


def write_checkpoint(directory, tokenizer, layers):
    """Llama-2-7B with N(0, 0.02^2) weights, as Meta ships it; `layers` below 32 for a trial."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        net = model.init_weights(model.Llama(model.Config(n_layers=layers)))
    meta_write.save(net.to(torch.bfloat16), directory)
    shutil.copy(tokenizer, directory / "tokenizer.model")


def write_texts(path, source, n=400):
    """Every text is a dozen word problems in a row: more than 512 tokens, cut to 512."""
    problems = [json.loads(line) for line in Path(source).read_text().splitlines()]
    words = [f"{p['question']}\n{p['answer']}\n" for p in problems]
    rows = [{"text": "\n".join(words[i % len(words)] for i in range(12 * j, 12 * j + 12))}
            for j in range(n)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(args, scratch, name, flags):
    """One run of train.py; its figures."""
    out = scratch / name
    command = [sys.executable, "train.py", "--ckpt", str(args.ckpt), "--rank", "64", "--data",
               str(scratch / "texts.jsonl"), "--steps", str(args.steps), "--batch", "8",
               "--micro-batch", "8", "--max-length", "513", "--max-new-tokens", "16",
               "--out", str(out), *flags]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    wall = time.perf_counter() - start
    summary = json.loads((out / "summary.json").read_text())
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    step = statistics.median(s["seconds"] for s in steps[len(steps) // 2:])
    row = {"load_seconds": summary["seconds"]["load"], "init_seconds": summary["seconds"]["init"],
           "first_step_seconds": steps[0]["seconds"], "step_seconds": step,
           "tokens_per_second": 8 * 512 / step, "peak_gpu_gib": summary["peak_gpu_bytes"] / 2**30,
           "wall_seconds": wall, "loss_first": steps[0]["loss"], "loss_last": steps[-1]["loss"],
           "adapter_bytes": sum(f.stat().st_size for f in (out / "adapter").iterdir()),
           "arguments": command[1:]}
    print({k: round(v, 2) for k, v in row.items() if isinstance(v, float)}, flush=True)
    return row


def main():
    """Checkpoint, texts, runs, report."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", type=Path, default=Path("runs/bench/llama2-7b"))
    p.add_argument("--tokenizer", required=True, help="Llama 2's tokenizer.model")
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--out")
    args = p.parse_args()
    scratch = args.ckpt.parent
    if not (args.ckpt / "params.json").exists():
        write_checkpoint(args.ckpt, args.tokenizer, args.layers)
    write_texts(scratch / "texts.jsonl", "checkpoints/tiny/train.jsonl")
    shape, rows = f"Llama-2-7B shape, {args.layers} layers, random weights, bf16", {}
    for name in args.variants:
        rows[name] = run(args, scratch, name, VARIANTS[name])
        line = stamped({"bench": "command", "model": shape,
                        "batch": "8 x 512 tokens, rank 64, seven linears", "runs": rows}, args.out)
    print(line)


if __name__ == "__main__":
    program(main, clock=False)
