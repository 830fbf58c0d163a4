"""The whole family in one harness: each method at its own best rate, on the same data.

    python -m bench.bench_family --ckpt smollm2 --data gsm8k --workers 2 \
        --rows bench/results/family_gpu.jsonl --out bench/results/family_gpu.json
    python -m bench.bench_family --tiny --out bench/results/family_cpu.json     # two CPU cores
    python -m bench.bench_family --tiny --methods yours=1e-3 --out ...          # adds a row

1. Seed 0: every method at four learning rates. If the best is the first or the last of them, half
   or twice as much, too, three times at most.
2. Seeds 1 and 2 at the rate that seed 0 chose. The table shows these two, so a lucky choice of
   the rate does not count. Their accuracy is that of eval.py on all test problems.
3. Alone on its GPU, a few steps without CUDA graphs, as train.py does them, at the lowest rate:
   seconds to initialise, peak memory, tokens/s.
"""
import argparse
import statistics
from pathlib import Path

from bench import program, report, study
from support.options import tiny

# The lowest of four rates, each twice the one before. A name may hold an option of the method.
METHODS = {
    "full": 1e-4, "pissa": 2.5e-4, "lora": 1e-3, "olora": 2.5e-4, "milora": 5e-4,
    "milora offset=0.5": 5e-4, "mica": 2e-3, "corda": 2.5e-4, "corda mode=knowledge": 5e-4,
    "eva": 1e-3, "lora_ga": 2.5e-4, "lora_xs": 2e-3, "svft": 5e-3, "sorsa": 2.5e-4, "lamda": 1e-3,
    "lora_pro": 5e-4, "lora_rite": 1e-3, "delta_lora": 1e-3, "cora": 2e-3, "qpissa": 2.5e-4,
    "loftq": 5e-4, "qlora": 1e-3, "lq_lora": 2.5e-4}


def job_of(name, base, **more):
    """The job of a method, `name` as in METHODS."""
    method, *own = name.split()
    return {**base, "method": method, **({"option": own} if own else {}), **more}


def loss_of(row):
    return row.get("val", float("inf"))


def searched(run, base, methods):
    """{name: [rows of seed 0, by rate]}: four rates, and more while the best one is at an edge."""
    rates = {name: [lowest * 2**i for i in range(4)] for name, lowest in methods.items()}
    for _ in range(4):
        flat = [(name, lr) for name, lrs in rates.items() for lr in sorted(lrs)]
        rows = run([job_of(name, base, lr=lr) for name, lr in flat])
        found = {name: [r for (n, _), r in zip(flat, rows) if n == name] for name in methods}
        more = False
        for name, by_rate in found.items():
            best = min(range(len(by_rate)), key=lambda i: loss_of(by_rate[i]))
            low, high = min(rates[name]), max(rates[name])
            if len(by_rate) < 7 and best in (0, len(by_rate) - 1):
                rates[name].append(low / 2 if best == 0 else high * 2)
                more = True
        if not more:
            break
    return found


def table(found, seeds, alone):
    """The rows of the table, by loss."""
    rows = []
    for name, by_rate in found.items():
        best, again, once = min(by_rate, key=loss_of), seeds[name], alone[name]
        if any("failed" in r for r in (best, *again, once)):
            rows.append({"method": name, "failed": next(
                r["failed"] for r in (best, *again, once) if "failed" in r)})
            continue
        rows.append({
            "method": name, "lr": best["job"]["lr"], "loss": statistics.mean(map(loss_of, again)),
            "losses": [loss_of(r) for r in again], "before": best["val_before"],
            "accuracies": [r["accuracy"] for r in again], "problems": again[0]["problems"],
            "trained": best["trained"], "init_seconds": once["init_seconds"],
            "peak_gib": once.get("peak_gib"), "planned_gib": once.get("planned_gib"),
            "tokens_per_second": once["tokens_per_second"],
            "rates": [[r["job"]["lr"], r.get("val")] for r in by_rate]})
    return sorted(rows, key=lambda r: r.get("loss", float("inf")))


def main():
    """All three parts, then the table."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="checkpoints/tiny and the demo's problems")
    p.add_argument("--ckpt", default="smollm2")
    p.add_argument("--data", default="gsm8k", help="directory with train.jsonl and test.jsonl")
    p.add_argument("--rank", type=int, default=32)
    p.add_argument("--methods", nargs="+", metavar="NAME[=LR]", help="instead of all; LR: the "
                   "lowest of four rates")
    p.add_argument("--train", nargs="*", default=[], metavar="NAME=VALUE",
                   help="arguments of train.py, e.g. batch=32 compile=true")
    p.add_argument("--workers", type=int, default=1, help="processes on each GPU (without: in all)")
    p.add_argument("--rows", default="runs/family.jsonl", help="where the single runs go")
    p.add_argument("--out")
    args = p.parse_args()
    base = {"ckpt": args.ckpt, "data": f"{args.data}/train.jsonl", "rank": args.rank, "batch": 32,
            "micro_batch": 32, "steps": 100, "graphs": True}
    test, steps = {"test_data": f"{args.data}/test.jsonl", "max_new_tokens": 256}, 12
    if args.tiny:
        base |= {"ckpt": "tiny", "data": f"{tiny()}/train.jsonl", "rank": 16, "batch": 16,
                 "steps": 40, "micro_batch": 16}
        del base["graphs"]                                                  # those of a GPU
        test, steps = {"test_data": f"{tiny()}/test.jsonl", "max_new_tokens": 64}, 6
    for word in args.train:
        name, _, value = word.partition("=")
        base[name] = {"true": True}.get(value, int(value) if value.isdigit() else value)
    methods = METHODS
    if args.methods:
        asked = (word.rpartition("=") if "=" in word.partition(" ")[0] or word.count("=") > 1
                 else (word, "", "") for word in args.methods)
        methods = {name: float(lr) if lr else METHODS.get(name, 5e-4) for name, _, lr in asked}
    Path(args.rows).parent.mkdir(parents=True, exist_ok=True)
    with study.workers(args.rows, args.workers) as run:
        found = searched(run, base, methods)
        best = {name: min(rows, key=loss_of)["job"] for name, rows in found.items()}
        again = run([{**job, **test, "seed": seed} for job in best.values() for seed in (1, 2)])
    with study.workers(args.rows) as run:
        alone = run([job_of(name, base, lr=lr, steps=steps, seed=3, graphs=False)
                     for name, lr in methods.items()])
    seeds = {name: again[2 * i:2 * i + 2] for i, name in enumerate(best)}
    rows = table(found, seeds, dict(zip(best, alone)))
    for r in rows:
        print(f"{r['method']:22} " + (r.get("failed") or f"lr {r['lr']:<8.3g} loss {r['loss']:.4f} "
              f"accuracy {statistics.mean(r['accuracies']):.3f}"))
    report({"bench": "family", "base": base, "rows": rows}, args.out)


if __name__ == "__main__":
    program(main)
