"""What each fast form saves: the same work with one of them in its plain form, on one GPU.

    python -m bench.bench_fast --out bench/results/fast_h200.json          # about six minutes
    python -m bench.bench_fast --tiny                                      # anywhere, a trial

Llama-2-7B's shape, rank 128, bfloat16, random weights and tokens, LoRA (which needs no SVD). Every
row is a step of 8 x 512 tokens, unless its name says otherwise: the median of eight, in
milliseconds, and the peak memory. `all fast` comes first and last: the two tell how far figures can
be trusted.
"""
import argparse
import gc
import statistics
import time
from argparse import Namespace

import torch
from torch import nn

import fast
import model
import pissa
import train
from bench import program, report, steps

# row: the module and the name of the function that is plain
FORMS = {"low-rank product": (pissa, "product"), "RoPE": (model, "rotate"),
         "SwiGLU": (model, "swiglu"), "chunked loss": (train, "loss_of")}


def measure(args, net, rows=8, where_text=None):
    """{"ms": median, "gib": peak} of a step, and its loss."""
    config, g = net.config, torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, args.length + 1), generator=g)
    params = [p for p in net.parameters() if p.requires_grad]
    for name, p in net.named_parameters():
        if name.endswith(".B"):
            nn.init.zeros_(p)
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    gc.collect()
    if steps.CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(11):
        start = steps.clock()
        loss = train.loss_sum(net, tokens[:, :-1], tokens[:, 1:], where_text)
        loss = loss / tokens[:, 1:].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(steps.clock() - start)
    return {"ms": statistics.median(seconds[3:]) * 1e3, "gib": steps.gib("max_memory_allocated"),
            "loss": loss.item()}


def plainly(module, name, f, *given, **more):
    """f(...) while module.name is its plain form."""
    function = getattr(module, name)
    setattr(module, name, function.plain)
    try:
        return f(*given, **more)
    finally:
        setattr(module, name, function)


def in_all_forms(args, net, record):
    """The steps."""
    record("all fast", measure(args, net))
    for row, place in FORMS.items():
        record(f"plain {row}", plainly(*place, measure, args, net))
    with fast.off():
        record("all plain", measure(args, net))
    net.checkpointing = True
    record("checkpointing, all fast", measure(args, net))
    record("checkpointing, plain recomputation",
           plainly(model, "checkpointed", measure, args, net))
    record("checkpointing, 1 row, all fast", measure(args, net, 1))
    record("checkpointing, 1 row, plain recomputation",
           plainly(model, "checkpointed", measure, args, net, 1))
    net.checkpointing = False
    # Texts of different lengths in one row: the longest first, as data.micro_batches packs them.
    lengths = torch.linspace(args.length, args.length // 8, 8).long()
    where = (torch.arange(args.length) < lengths[:, None]).flatten().nonzero()[:, 0]
    record("packed, all fast", measure(args, net, where_text=where))
    record("packed, plain attention", plainly(model, "attend_packed", measure, args, net,
                                              where_text=where))
    record("packed, plain attention and rows", plainly(
        model, "rows", plainly, model, "attend_packed", measure, args, net, where_text=where))
    record("all fast, again", measure(args, net))


def compiled(args, net, record):
    """Compiled layers with SwiGLU, and then packing, in each form."""
    def fresh(**more):
        torch._dynamo.reset()
        train.compile_layers(net)
        return measure(args, net, **more)

    record("compiled", fresh())
    record("compiled, plain SwiGLU", plainly(model, "swiglu", fresh))
    lengths = torch.linspace(args.length, args.length // 8, 8).long()
    where = (torch.arange(args.length) < lengths[:, None]).flatten().nonzero()[:, 0]
    record("compiled, packed", fresh(where_text=where))
    record("compiled, packed, plain rows and attention", plainly(
        model, "rows", plainly, model, "attend_packed", fresh, where_text=where))


def other_work(args, net, record):
    """Decoding, and the decomposition of all matrices one by one."""
    pissa.merge(net)
    prompts = torch.randint(3, net.config.vocab_size, (1, 64)).tolist()

    def tokens_a_second():
        model.generate(net, prompts, 8)
        start = time.perf_counter()
        model.generate(net, prompts, args.length // 4)
        return {"tokens_per_second": args.length // 4 / (time.perf_counter() - start)}

    record("decoding, batch 1, all fast", tokens_a_second())
    record("decoding, batch 1, not recorded", plainly(model, "recorded", tokens_a_second))

    def decomposition():
        linears = pissa.find_linears(net, pissa.TARGETS)
        start = steps.clock()
        options.remaining = linears
        for name in list(linears):
            pissa.principal(linears[name].weight.detach(), options)
            del linears[name]
        return {"seconds": steps.clock() - start}

    options = pissa.Options(args.rank)
    decomposition()
    record("A and B of 224 matrices, in groups", decomposition())
    record("A and B of 224 matrices, one by one", plainly(pissa, "principal", decomposition))


def main():
    """Build the network, run every row."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a trial on a CPU")
    p.add_argument("--out")
    given, rows = p.parse_args(), {}
    args = Namespace(length=16 if given.tiny else 512, rank=8 if given.tiny else 128)
    config = model.Config(**steps.TOY) if given.tiny else steps.SEVEN

    def record(row, figures):
        rows[row] = figures
        print(row, {k: round(v, 4) for k, v in figures.items()}, flush=True)
        report({"bench": "fast", "rank": args.rank, "length": args.length, "rows": rows}, given.out)

    net = steps.fill(steps.injected(config, "lora", args.rank)[0])
    in_all_forms(args, net, record)
    other_work(args, steps.fill(steps.injected(config, "lora", args.rank)[0]), record)
    compiled(args, net, record)


if __name__ == "__main__":
    program(main)
