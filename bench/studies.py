"""The studies of EVIDENCE.md: each a list of jobs for bench/study.py.

    python -m bench.study rates --tiny                     # a small version, on two CPU cores
    python -m bench.studies                                # runs and tokens of each, estimated

    rates      learning rate x rank, PiSSA and LoRA                                       (1)
    seeds      two more seeds at the best rate and its neighbours; reads the rows of rates (1)
    quantised  QPiSSA, LoftQ, QLoRA, LQ-LoRA: rank, turns, rate                           (5)
    learnt     full, LoRA, PiSSA, MiLoRA: DeltaW against W, and perplexity on other text  (6)
    curves     losses and gradient norms of 200 steps                                     (2)
    length     steps and batch sizes                                                      (7)
    svd        power iterations of the SVD                                                (4)
    eight      W_res in eight bits beside sixteen, see fp8.py                (bench/RESULTS.md)

The landscape (3) is examples/landscape.py. STUDIES is in order of importance. A run that stands in
several studies is the same job in each. `learnt` needs a text that is not the task's, GENERAL.
"""
import json
import statistics
from itertools import product

from bench.plot import RESULTS

FULL = {"ckpt": "smollm2", "data": "gsm8k/train.jsonl", "batch": 32, "micro_batch": 32,
        "steps": 100, "rank": 32, "seed": 0, "graphs": True}
TINY = {"ckpt": "tiny", "data": "checkpoints/tiny/train.jsonl", "batch": 16, "micro_batch": 16,
        "steps": 30, "rank": 16, "seed": 0}
GENERAL = "runs/text/persuasion.txt"                        # any English book
RATES = [2e-5, 1e-4, 3e-4, 1e-3, 3e-3, 8e-3, 2e-2]
FOUR_BITS = ["qpissa", "loftq", "qlora", "lq_lora"]
TOKENS = {"smollm2": 214, "tiny": 100}                      # of an example, about


def grid(base, **axes):
    """A job for every combination of the values of axes."""
    return [{**base, **dict(zip(axes, values))} for values in product(*axes.values())]


def file_of(name, tiny):
    """Where the rows of a study are kept."""
    return RESULTS / f"study_{name}{'_tiny' * tiny}.jsonl"


def rows_of(name, tiny=False):
    """The rows of a study that did not fail, each with its job's values among the others; or []."""
    path = file_of(name, tiny)
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [{**r["job"], **r} for r in rows if "failed" not in r]


def losses_at(rows, **wanted):
    """{learning rate: [validation loss of every seed]} of the rows that have these values."""
    found = {}
    for r in rows:
        if all(r.get(k) == v for k, v in wanted.items()):
            found.setdefault(r["lr"], []).append(r["val"])
    return dict(sorted(found.items()))


def best_rate(rows, **wanted):
    """The rate of the lowest mean validation loss among those with the most seeds. ValueError."""
    at = losses_at(rows, **wanted)
    if not at:
        raise ValueError(f"no rows of {wanted}: run the study that makes them first")
    most = max(map(len, at.values()))
    return min((lr for lr in at if len(at[lr]) == most), key=lambda lr: statistics.mean(at[lr]))


def rates(tiny):
    """Learning rate x rank, one seed."""
    if tiny:
        return grid(TINY, method=["pissa", "lora"], rank=[4, 16], lr=[3e-4, 1e-3, 4e-3])
    return grid(FULL, method=["pissa", "lora"], rank=[16, 64, 4, 192, 1], lr=RATES)


def seeds(tiny):
    """Two more seeds at each best rate of `rates` and its neighbours. ValueError without it."""
    first, jobs = rates(tiny), []
    rows = [r for r in rows_of("rates", tiny) if r["seed"] == 0]
    tried = sorted({j["lr"] for j in first})
    for method, rank in dict.fromkeys((j["method"], j["rank"]) for j in first):
        i = tried.index(best_rate(rows, method=method, rank=rank))
        jobs += grid({**(TINY if tiny else FULL), "method": method, "rank": rank},
                     lr=tried[max(0, i - 1):i + 2], seed=[1, 2])
    return jobs


def quantised(tiny):
    """Methods in four bits: rates at each rank, then turns at rank 64."""
    base = {**(TINY if tiny else FULL), "quant_iters": 5}
    if tiny:
        return grid(base, method=FOUR_BITS, lr=[3e-4, 1e-3, 4e-3]) + grid(
            base, method=["qpissa", "loftq"], lr=[1e-3], quant_iters=[1, 10])
    base |= {"steps": 60, "measure": ["learnt"]}
    jobs = (grid(base, rank=[64, 16, 128], method=FOUR_BITS)
            + grid(base, method=["qpissa", "loftq"], rank=[64], quant_iters=[1, 10])
            + grid(base, method=FOUR_BITS, rank=[64], seed=[1, 2]))
    rates = {"qpissa": [1e-4, 3e-4, 1e-3, 3e-3], "loftq": [3e-4, 1e-3, 3e-3, 8e-3]}
    rates |= {"lq_lora": rates["qpissa"], "qlora": rates["loftq"]}
    return [{**job, "lr": lr} for job in jobs for lr in rates[job["method"]]]


def learnt(tiny):
    """What every method changes, at rates about its best. full has no rank: that of the others."""
    base = {**(TINY if tiny else FULL), "measure": ["learnt", "forgetting"],
            "general": "stories" if tiny else GENERAL}
    low = [1e-3] if tiny else [3e-4, 1e-3, 3e-3]
    high = [4e-3] if tiny else [1e-3, 3e-3, 8e-3]
    rates = {"full": [2.5e-4] if tiny else [1e-4, 2e-4, 4e-4], "lora": high, "pissa": low,
             "milora": high}
    return [{**base, "method": method, "lr": lr, "seed": seed}
            for seed in ([0] if tiny else [0, 1, 2]) for method in rates for lr in rates[method]]


def curves(tiny):
    """Losses and gradient norms after 5, 20, 50, 200 steps; equal rates, and each at its best."""
    if tiny:
        return grid(TINY, method=["pissa", "lora"], lr=[3e-4, 1e-3, 4e-3], seed=[0, 1, 2])
    return grid({**FULL, "steps": 200}, seed=[0, 1, 2], method=["pissa", "lora"],
                lr=[2e-5, 3e-4, 1e-3, 3e-3, 8e-3])


def length(tiny):
    """Steps at one batch size, and batch sizes over the same examples."""
    kinds = ["pissa", "lora"]
    if tiny:
        return (grid(TINY, method=kinds, steps=[8, 30], lr=[1e-3, 4e-3])
                + grid(TINY, method=kinds, batch=[4], lr=[1e-3, 4e-3]))
    rates = [3e-4, 1e-3, 3e-3, 8e-3]
    jobs = grid(FULL, method=kinds, lr=rates, steps=[25, 50, 100, 200])
    return jobs + [job for batch in (8, 128) for job in grid(
        {**FULL, "batch": batch, "steps": 3200 // batch}, method=kinds, lr=rates)]


def svd(tiny):
    """PiSSA with 0 ... 16 power iterations, and the exact SVD."""
    base = {**(TINY if tiny else FULL), "method": "pissa", "lr": 1e-3, "measure": ["svd_error"]}
    return grid(base, seed=[0] if tiny else [0, 1, 2], niter=[0, 1, 2, 4, 8, 16, "exact"])


def eight(tiny):
    """PiSSA with the residual in sixteen and in eight bits: three seeds, four rates."""
    base = TINY if tiny else FULL
    axes = {"seed": [0] if tiny else [0, 1, 2],
            "lr": [3e-4, 1e-3] if tiny else [3e-4, 6e-4, 1e-3, 2e-3]}
    return grid(base, method=["pissa"], **axes) + grid(base, method=["qpissa"], bits=[8], **axes)


STUDIES = {f.__name__: f for f in (rates, seeds, quantised, learnt, curves, length, svd, eight)}


def tokens(jobs):
    """About how many tokens these jobs train on."""
    return sum(j["steps"] * j["batch"] * TOKENS[j["ckpt"]] for j in jobs)


def main():
    """Print the size of every study."""
    for name, make in STUDIES.items():
        for tiny in False, True:
            try:
                jobs = make(tiny)
            except ValueError as error:
                print(f"{name:10s} {'tiny' if tiny else 'full':4s} {error}")
                continue
            print(f"{name:10s} {'tiny' if tiny else 'full':4s} {len(jobs):4d} runs "
                  f"{tokens(jobs) / 1e6:6.1f} M tokens")


if __name__ == "__main__":
    main()
