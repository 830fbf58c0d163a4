"""What W4A4 costs, and how much of that smoothing and SVDQuant win back (relatives/svdquant.py).

    python -m bench.bench_svdquant                                              # the tiny model
    python -m bench.bench_svdquant --ckpt smollm2 --calibration train.jsonl --text test.jsonl

Four bits for weights and activations of all linear layers but the head, simulated in float32:

    plain       y = Q(x) Q(W)
    smoothing   y = Q(x / lambda) Q(lambda W)
    svdquant    y = Q(x / lambda) Q(R) + (x / lambda) L1 L2

The error is |y' - y| / |y| on inputs from --text, in percent: the mean over the matrices of a kind
and (the worst). lambda is from inputs of --calibration. Both inputs are those of the network in
float32. Perplexity is that of --text with all of a variant's layers in place.
"""
import argparse
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import eval as evaluation
import model
import pissa
from bench import program, report
from relatives import calibrate, svdquant

ROOT = Path(__file__).parent.parent
VARIANTS = {"plain": (0, (None,)), "smoothing": (0, svdquant.ALPHAS),
            "svdquant": (32, svdquant.ALPHAS)}                          # name: rank, exponents


def read(path):
    """The text of a file; of .jsonl, prompts and answers, one after the other."""
    if Path(path).suffix == ".jsonl":
        return "\n\n".join(f"{prompt}\n{answer}" for prompt, answer in data.read(path))
    return Path(path).read_text("utf-8")


def windows(tok, path, count, length):
    """[(tokens (1, length + 1),)]: `count` windows of a text, evenly spaced, each with BOS."""
    ids = tok.encode(read(path))
    if len(ids) < length:
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than a window of {length}")
    step = max(1, (len(ids) - length) // count)
    starts = range(0, len(ids) - length + 1, step)[:count]
    return [(torch.tensor([[tok.start, *ids[i:i + length]]]),) for i in starts]


def measure(net, tok, args):
    """[{variant, kinds: {kind: (mean, worst)}, perplexity, seconds}] of float32 and VARIANTS."""
    linears = svdquant.targets(net)
    seen, held_out = (calibrate.measure(
        net, svdquant, windows(tok, path, args.windows, args.length),
        lambda net, tokens: net(tokens[:, :-1]), pissa.Options(1))
                      for path in (args.calibration, args.text))
    text = read(args.text)[:args.characters]
    base, *_ = evaluation.perplexity(net, tok, text, args.length)
    rows = [{"variant": "float32", "kinds": {}, "perplexity": base, "seconds": 0.0}]
    for variant, (rank, alphas) in VARIANTS.items():
        start, kinds = time.perf_counter(), {}
        for name, linear in tqdm(linears.items(), variant, unit="matrix", leave=False):
            made = svdquant.quantised(linear, seen[name], rank and args.rank, alphas)
            kinds.setdefault(name.rpartition(".")[2].removesuffix("_proj"), []).append(
                svdquant.error(linear, made, held_out[name]))
            net.set_submodule(name, made)
        seconds = time.perf_counter() - start
        perplexity, *_ = evaluation.perplexity(net, tok, text, args.length)
        kinds["all"] = sum(kinds.values(), [])
        rows.append({"variant": variant, "perplexity": perplexity, "seconds": seconds, "kinds": {
            k: (statistics.mean(v), max(v)) for k, v in kinds.items()}})
    for name, linear in linears.items():
        net.set_submodule(name, linear)
    return rows


def show(rows):
    """Print the rows as a table."""
    kinds = rows[-1]["kinds"]
    print(f"{'':10}" + "".join(f"{k:>14}" for k in kinds) + "  perplexity  seconds")
    for row in rows:
        cells = (f"{f'{100 * mean:.1f} ({100 * worst:.1f})':>14}"
                 for mean, worst in (row["kinds"].get(k, (0, 0)) for k in kinds))
        print(f"{row['variant']:10}" + "".join(cells)
              + f"{row['perplexity']:12.3f}{row['seconds']:9.1f}")


def main():
    """Parse, measure, report."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default="tiny", help="what train.py takes (default tiny)")
    p.add_argument("--calibration", default=ROOT / "checkpoints/tiny/train.jsonl",
                   help="a text or .jsonl file, for lambda")
    p.add_argument("--text", default=ROOT / "checkpoints/tiny/test.jsonl",
                   help="another one, for errors and perplexity")
    p.add_argument("--characters", type=int, default=20000, help="of it, for perplexity")
    p.add_argument("--rank", type=int, default=32, help="of L1 L2 (default 32, the paper's)")
    p.add_argument("--windows", type=int, default=8, help="for the inputs, of each text")
    p.add_argument("--length", type=int, default=256, help="tokens of a window")
    p.add_argument("--out")
    args = p.parse_args()
    tok = data.Tokenizer(model.find(args.ckpt))
    net = model.load(args.ckpt, dtype=torch.float32)
    rows = measure(net, tok, args)
    show(rows)
    report({"bench": "svdquant", "rank": args.rank, "length": args.length, "rows": rows}, args.out)


if __name__ == "__main__":
    program(main)
