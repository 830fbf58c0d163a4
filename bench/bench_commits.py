"""Two commits beside each other, on one GPU in one run: is anything slower, or larger, than before?

    git worktree add old bc3224f
    python -m bench.bench_commits --old old --out bench/results/commits_h200.json

By turns, old and new, each part in a process of its own: the training steps of bench_train (in 16
bits and in four), grouped SVDs of Llama-2-7B's 224 matrices at rank 128, greedy generation of 7B's
shape. Weights and tokens are random and equal on both sides. `ratio` is new over old, of medians.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import program, report

# What each part runs in either tree. It prints {row: {figure: number}} as its last line.
STEP = """
from argparse import Namespace
from pathlib import Path
from bench import steps
args = Namespace(seven=steps.SEVEN if steps.CUDA else steps.model.Config(**steps.TOY), tiny=TINY,
                 length=512 if steps.CUDA else 16, rank=128 if steps.CUDA else 8, bits=BITS,
                 file=Path(FILE))
args.file.write_text("{}")
steps.attempt(args, "step", "our model", steps.side, args, steps.OURS)
rows = json.loads(args.file.read_text())["step"]
keys = "step_seconds", "peak_gib", "loss_first", "loss_last"
print(json.dumps({n: {k: r[k] for k in keys} for n, r in rows.items() if "step_seconds" in r}))
"""
PARTS = {"step": STEP.replace("BITS", "16"),
         "step, four bits": STEP.replace("BITS", "4"), "svd": """
import time, torch
from bench import bench_svd
from svd import grouped_svd
device = "cuda" if torch.cuda.is_available() else "cpu"
shapes = {"s": (64, 96)} if TINY else bench_svd.LLAMA_7B
groups = {}
for i, shape in enumerate(shapes.values()):
    W = bench_svd.synthetic(shape, device, i)
    groups.setdefault(shape, []).extend(W.clone() for _ in range(32))
seconds = []
for _ in range(6):
    bench_svd.torch.cuda.synchronize() if device == "cuda" else None
    start = time.perf_counter()
    for Ws in groups.values():
        for i in range(0, len(Ws), 32):
            grouped_svd(Ws[i:i + 32], 8 if TINY else 128)
    bench_svd.torch.cuda.synchronize() if device == "cuda" else None
    seconds.append(time.perf_counter() - start)
print(json.dumps({"grouped, rank 128": {"seconds": sorted(seconds[1:])[2]}}))
""", "generate": """
import time, torch, model
device = "cuda" if torch.cuda.is_available() else "cpu"
config = model.Config(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128, ffn_dim=192) \\
    if TINY else model.Config()
with torch.device(device):
    net = model.init_weights(model.Llama(config).to(torch.bfloat16)).requires_grad_(False)
rows = {}
for batch in (1, 32):
    g = torch.Generator().manual_seed(batch)
    prompts = torch.randint(3, config.vocab_size, (batch, 64), generator=g).tolist()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        model.generate(net, prompts, 256)
        seconds.append(time.perf_counter() - start)
    rows[f"256 tokens, batch {batch}"] = {"seconds": sorted(seconds[1:])[1]}
print(json.dumps(rows))
"""}


def run(tree, part, tiny):
    """{row: {figure: number}} of one part in one tree."""
    with tempfile.TemporaryDirectory() as folder:
        code = (f"import json\nTINY, FILE = {tiny}, {folder + '/results.json'!r}\n" + PARTS[part])
        done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(tree)})
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-3000:], file=sys.stderr)
        return {}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    """Every part, old and new by turns."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--old", type=Path, required=True, help="a checkout of the older commit")
    p.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    p.add_argument("--turns", type=int, default=2)
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a trial on a CPU")
    p.add_argument("--out")
    args = p.parse_args()
    trees, rows = {"old": args.old.resolve(), "new": Path(__file__).resolve().parent.parent}, {}
    for part in args.parts:
        for turn in range(args.turns):
            for name in ("old", "new") if turn % 2 == 0 else ("new", "old"):
                for row, figures in run(trees[name], part, args.tiny).items():
                    for key, value in figures.items():
                        kept = rows.setdefault(f"{part}: {row}", {}).setdefault(key, {})
                        kept.setdefault(name, []).append(value)
        for row, figures in rows.items():
            for key, sides in figures.items():
                if len(sides) == 2 and "ratio" not in sides:
                    old, new = (statistics.median(sides[name]) for name in ("old", "new"))
                    sides["ratio"] = new / old if old else None
                    print(f"{row:45} {key:13} old {old:10.5g} new {new:10.5g} "
                          f"ratio {sides['ratio'] or 0:.4f}", flush=True)
        report({"bench": "commits", "old": "bc3224f", "turns": args.turns, "rows": rows}, args.out)


if __name__ == "__main__":
    program(main)
