"""Four bits on a GPU: the kernel, a training step, 7B within 11 GiB, 70B on one GPU.

    python -m bench.bench_4bit --parts kernel step memory --out bench/results/nf4_h200.json
    python -m bench.bench_4bit --parts seventy --out bench/results/nf4_70b_h200.json

kernel   unpacking W, and packing it, beside bitsandbytes; whether both have the same bits
step     a QLoRA step of Llama-2-7B beside PEFT on bitsandbytes: the same weights, tokens and loss
memory   Llama-2-7B, QPiSSA, one sequence of 512 tokens: peak memory from the start of a process
seventy  Llama-3-70B, QPiSSA, made and decomposed matrix by matrix on one GPU, then trained
exact    beside that, the authors' route: exact SVDs, timed once a shape, times 5 turns, times 560

Weights are random: N(0, 0.02^2) plus a decaying part of rank 64, the same for both sides. `--tiny`
runs everything at toy size, without a GPU too. Every part is a process of its own; --out is written
after every result, and what fails leaves its error there. PEFT runs with its defaults (A and B in
float32, and so their products), and under autocast, as by transformers' Trainer(bf16=True).
"""
import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import model
import nf4
import pissa
from bench import report
from train import loss_sum

CUDA = torch.cuda.is_available()
DEVICE, TURNS = torch.device("cuda" if CUDA else "cpu"), 5
SEVEN, SEVENTY = model.Config(), model.Config(
    dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=128256, ffn_dim=28672,
    rope_theta=500000.0)
SHAPES = [(4096, 4096), (4096, 11008), (8192, 28672)]
# name: rows of tokens, checkpointing, compiled (ours) or under autocast (theirs)
OURS = {"ours": (8, False, False), "ours, checkpointing": (8, True, False),
        "ours, 1 row, checkpointing": (1, True, False), "ours, compiled": (8, False, True),
        "ours, compiled, checkpointing": (8, True, True)}
PEFT = {"PEFT": (8, False, False), "PEFT, autocast": (8, False, True),
        "PEFT, checkpointing": (8, True, False), "PEFT, autocast, checkpointing": (8, True, True),
        "PEFT, 1 row, checkpointing": (1, True, False),
        "PEFT, 1 row, autocast, checkpointing": (1, True, True)}


# ------------------------------------------------------------------------------ results and clocks

def record(args, part, name, figures):
    """Print a result and add it to the file of results."""
    print(f"{part}: {name}: " + ", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}"
                                          for k, v in figures.items()), flush=True)
    parts = json.loads(args.file.read_text() or "{}")
    parts.setdefault(part, {})[name] = figures
    args.file.write_text(json.dumps(parts) + "\n")


def attempt(args, part, name, f, *given):
    """Record the figures that f returns, or why there are none; let go of what it held."""
    try:
        figures = f(*given)
    except Exception as e:                             # one that fails leaves the others alone
        traceback.print_exc()
        figures = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
    if figures:
        record(args, part, name, figures)
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def clock():
    """Seconds, once the GPU has done what it was asked for."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def graphs():
    """How many graphs were compiled; beyond 8 of one function, torch stops compiling it."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gib(figure, less=0.0):
    """max_memory_allocated, or another figure of torch.cuda, less some GiB; 0 without a GPU."""
    return getattr(torch.cuda, figure)() / 2**30 - less


def gpu_seconds(f, n=60):
    """Median seconds that f(0), f(1), ... take the GPU, mean seconds that one takes the host."""
    for i in range(20):
        f(i)
    if not CUDA:
        start = clock()
        f(0)
        return (clock() - start,) * 2
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
    start = clock()
    torch.cuda._sleep(400_000_000)                # all wait behind this: no launch is waited for
    for i, (before, after) in enumerate(marks):
        before.record()
        f(i)
        after.record()
    host = time.perf_counter() - start
    clock()
    return statistics.median(a.elapsed_time(b) for a, b in marks) / 1e3, host / n


# ------------------------------------------------------------------------------------------ models

def random_matrix(shape, name):
    """The bfloat16 matrix of that name: N(0, 0.02^2), and 64 singular values that stand out."""
    g = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    (m, n), k = shape, min(64, *shape)
    W, U, V = (torch.randn(s, generator=g, device=DEVICE, dtype=torch.bfloat16)
               for s in ((m, n), (m, k), (k, n)))
    noise = 0.02 * (m**0.5 + n**0.5)                   # about the largest one of the first part
    S = 4 * noise * torch.arange(1, k + 1, device=DEVICE) ** -0.5
    return W.mul_(0.02).addmm_(U * (S / (m * n) ** 0.5).bfloat16(), V)


def fill(net):
    """Give what is still on the meta device numbers: matrices as above, ones for the norms."""
    for name, p in list(net.named_parameters()):
        if p.is_meta:
            value = random_matrix(p.shape, name.removesuffix(".weight")) if p.ndim > 1 else (
                torch.ones(p.shape, device=DEVICE, dtype=torch.bfloat16))
            pissa.put(net, name, nn.Parameter(value, requires_grad=False))
    assert not any(t.is_meta for t in (*net.parameters(), *net.buffers()))
    return net.train()


def injected(config, method, rank):
    """Our network, matrix by matrix; the seconds of making these, and of all the rest."""
    with torch.device("meta"):
        net = model.Llama(config).to(torch.bfloat16)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    making, done, start = 0.0, 0, clock()

    def weight(name):
        nonlocal making, done
        before = clock()
        if done and done % 100 == 0:
            print(f"{done} matrices in {before - start:.1f} s", flush=True)
        W, done = random_matrix(shapes[name + ".weight"], name), done + 1
        making += clock() - before
        return W

    pissa.inject(net, rank, method, weight=weight, quant_iters=TURNS, keep_base=False,
                 progress=False)
    return net, making, clock() - start - making


def peft_twin(config, rank):
    """transformers' network on bitsandbytes' Linear4bit, with PEFT's LoRA, of the same weights."""
    import bitsandbytes
    import peft
    import transformers
    c = transformers.LlamaConfig(
        hidden_size=config.dim, intermediate_size=config.ffn_dim, use_cache=False,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta, tie_word_embeddings=False,
        max_position_embeddings=4096, attn_implementation="sdpa", dtype=torch.bfloat16)
    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(c).to(torch.bfloat16)
    net.model.rotary_emb = type(net.model.rotary_emb)(c).to(DEVICE)        # its table is float32
    for name in list(pissa.find_linears(net, pissa.TARGETS)):
        m, options = net.get_submodule(name), {"compress_statistics": True, "quant_type": "nf4"}
        linear = bitsandbytes.nn.Linear4bit(m.in_features, m.out_features, bias=False,
                                            compute_dtype=torch.bfloat16, device="meta", **options)
        W = random_matrix(m.weight.shape, name)
        linear.weight = bitsandbytes.nn.Params4bit(W, requires_grad=False, module=linear,
                                                   **options).to(DEVICE)   # here it is quantised
        pissa.put(net, name, linear)
    net.requires_grad_(False)
    net.is_loaded_in_4bit = True                                           # PEFT asks for it
    net = peft.get_peft_model(fill(net), peft.LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(pissa.TARGETS)))
    found = {type(m) for n, m in net.named_modules() if n.endswith(pissa.TARGETS)}
    assert found == {peft.tuners.lora.bnb.Linear4bit}, found
    return net.train()


def peft_loss(autocast):
    """The sum of the cross-entropies, as train.loss_sum for our network."""
    def loss(net, tokens, labels):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            logits = net(input_ids=tokens.to(DEVICE), use_cache=False).logits.float()
        labels = labels.flatten().to(DEVICE)
        return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    return loss


def trained(args, config, net, loss, rows, steps, warm=0, base=0.0):
    """Train on the same random tokens: seconds of a step, tokens per second, peak memory."""
    tokens = torch.randint(config.vocab_size, (rows, args.length + 1),
                           generator=torch.Generator().manual_seed(0))
    params = [p for p in net.parameters() if p.requires_grad]
    assert {p.dtype for p in params} == {torch.float32}
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    seconds, losses = [], []
    for _ in range(warm + steps):
        start = clock()
        value = loss(net, tokens[:, :-1], tokens[:, 1:]) / (rows * args.length)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(clock() - start)
        losses.append(value.item())
    assert math.isfinite(losses[-1]), losses
    step = statistics.median(seconds[warm:])
    return {"step_seconds": step, "tokens_per_second": rows * args.length / step,
            "peak_gib": gib("max_memory_allocated", base), "first_step_seconds": seconds[0],
            "loss_first": losses[0], "loss_last": losses[-1],
            "trained": sum(p.numel() for p in params), "graphs": graphs()}


# ------------------------------------------------------------------------------------------- parts

def packed(W, double):
    """What bitsandbytes makes of W: codes and a state."""
    from bitsandbytes.functional import quantize_4bit
    return quantize_4bit(W, blocksize=64, compress_statistics=double, quant_type="nf4")


def speed(shape, double):
    """Unpacking and packing, ours and theirs, of so many matrices in turn that no cache has any."""
    from bitsandbytes.functional import dequantize_4bit
    copies = max(2, round(6e8 / (2.6 * math.prod(shape)))) if CUDA else 2
    W = [random_matrix(shape, f"{shape} {i}") for i in range(copies)]
    Q, theirs, start = [nf4.quantize(w, double) for w in W], [packed(w, double) for w in W], clock()
    out = [Q[0].dequantize(), *[None] * (copies - 1)]             # outputs are kept for a turn
    row = {"first_call_seconds": clock() - start, "copies": copies}

    def turn(unpack):
        def run(i):
            out[i % copies] = None
            out[i % copies] = unpack(i % copies)
        return run

    unpack = {"ours": lambda i: Q[i].dequantize(), "theirs": lambda i: dequantize_4bit(*theirs[i])}
    pack = {"ours": nf4.quantize, "theirs": packed}
    for who in unpack:
        seconds, host = gpu_seconds(turn(unpack[who]))
        times = []
        for _ in range(6):
            pack[who](W[0], double)
            times.append(clock())
        row |= {f"{who}_us": 1e6 * seconds, f"{who}_host_us": 1e6 * host,
                f"{who}_gb_per_second": (Q[0].nbytes + W[0].nbytes) / seconds / 1e9,
                f"{who}_quantise_us": 1e6 * statistics.median(
                    b - a for a, b in zip(times, times[1:]))}
    return row | {"theirs_over_ours": row["theirs_us"] / row["ours_us"], "graphs": graphs()}


def bits(shape, kind, dtype, double):
    """How many codes, absmax, scales differ from bitsandbytes', and how far apart W is then."""
    from bitsandbytes.functional import dequantize_4bit
    W = random_matrix(shape, kind).to(dtype)
    if kind == "outliers":
        W.view(-1)[::997] *= 1000
    elif kind != "normal":
        W.fill_({"zeros": 0.0, "constants": 0.37}[kind])
    Q, (codes, state) = nf4.quantize(W, double), packed(W, double)
    theirs = [codes, state.absmax, *([state.state2.absmax, state.offset] if double else [])]
    apart = Q.dequantize().float() - dequantize_4bit(codes, state).float()
    return {f"{name}_differ": int((mine.flatten() != other.flatten()).sum())
            for (name, mine), other in zip(Q.named_parameters(), theirs)} | {
                "max_difference": apart.abs().max().item()}


def kernel(args):
    """Speed at every shape; bits at one."""
    shapes = [(64, 64), (64, 192)] if args.tiny else SHAPES
    for double in (False, True):
        how = "double" if double else "single"
        for m, n in shapes:
            attempt(args, "kernel", f"{m} x {n}, {how}", speed, (m, n), double)
        for kind in ("normal", "outliers", "zeros", "constants"):
            for dtype in (torch.float32, torch.bfloat16):
                attempt(args, "bits", f"{kind}, {dtype}, {how}", bits, shapes[1], kind, dtype,
                        double)


def side(args, whose):
    """One network, built once, in all its variants; B is 0 again for each: losses begin alike."""
    base, is_ours = gib("memory_allocated"), whose is OURS
    net = fill(injected(args.seven, "qlora", args.rank)[0]) if is_ours else (
        peft_twin(args.seven, args.rank))
    built = {"gib": gib("memory_allocated", base), "gib_before": base}

    def variant(rows, checkpointing, special):
        for name, p in net.named_parameters():
            if p.requires_grad and (name.endswith(".B") or "lora_B" in name):
                nn.init.zeros_(p)
        if is_ours:
            net.checkpointing = checkpointing
            for layer in net.model.layers if special else ():
                layer.compile()
        elif checkpointing:
            net.get_base_model().gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            net.get_base_model().gradient_checkpointing_disable()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        loss = loss_sum if is_ours else peft_loss(special)
        return trained(args, args.seven, net, loss, rows, 10, 3, base)

    for name, options in whose.items():
        attempt(args, "step", name, variant, *options)
    return built


def step(args):
    """Both sides, one after the other; how many times as fast ours is as the fastest of theirs."""
    attempt(args, "step", "their model", side, args, PEFT)
    attempt(args, "step", "our model", side, args, OURS)
    rows = json.loads(args.file.read_text())["step"]
    speed = {name: rows.get(name, {}).get("tokens_per_second", 0.0) for name in (*OURS, *PEFT)}
    best = {name: max(speed[n] for n in PEFT if PEFT[n][:2] == OURS[name][:2]) for name in OURS}
    record(args, "step", "times as fast", {n: speed[n] / best[n] for n in OURS if best[n]})


def stream(args):
    """memory and seventy: a network made and decomposed matrix by matrix, then trained."""
    part = args.parts[0]
    config = args.seven if part == "memory" else args.seventy
    net, making, working = injected(config, "qpissa", args.rank)
    size = sum(t.nbytes for t in (*net.parameters(), *net.buffers()) if not t.is_meta) / 2**30
    record(args, part, "decomposition", {
        "matrices": len(list(pissa.layers(net))), "making_seconds": making, "seconds": working,
        "finished_gib": size, "peak_gib": gib("max_memory_allocated"),
        "peak_over_finished_gib": gib("max_memory_allocated", size)})
    fill(net).checkpointing = True
    size = sum(t.nbytes for t in (*net.parameters(), *net.buffers())) / 2**30
    record(args, part, "model", {"gib": size, "peak_gib": gib("max_memory_allocated")})
    attempt(args, part, f"1 x {args.length}, checkpointing", trained, args, config, net, loss_sum,
            1, 10 if part == "memory" else 5)


def exact(args):
    """What TURNS exact SVDs of every matrix of seventy take, with torch's own choice of driver."""
    with torch.device("meta"):
        found = pissa.find_linears(model.Llama(args.seventy), pissa.TARGETS)
    total, counts = 0.0, Counter(tuple(sorted(m.weight.shape)[::-1]) for m in found.values())
    torch.linalg.svd(random_matrix((64, 64), "warm-up").float())
    for shape in sorted(counts):
        W, start = random_matrix(shape, "exact").float(), clock()
        torch.linalg.svd(W, full_matrices=False)
        seconds = clock() - start
        total += seconds * TURNS * counts[shape]
        record(args, "exact", "{} x {}".format(*shape), {
            "seconds": seconds, "matrices": counts[shape], "extrapolated_so_far_seconds": total})


PARTS = {"kernel": kernel, "step": step, "memory": stream, "seventy": stream, "exact": exact}


def arguments():
    """What was asked for."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    p.add_argument("--layers", type=int, help="fewer layers, for a trial")
    p.add_argument("--tiny", action="store_true", help="toy sizes, for a trial on a CPU")
    p.add_argument("--out")
    p.add_argument("--file", type=Path, help=argparse.SUPPRESS)      # of the process of one part
    args = p.parse_args()
    toy = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128,
           "ffn_dim": 192, "head_dim": 16} if args.tiny else {}
    layers = {"n_layers": args.layers} if args.layers else {}
    args.seven, args.seventy = (replace(c, **toy | layers) for c in (SEVEN, SEVENTY))
    args.rank, args.length = (8, 16) if args.tiny else (64, 512)
    return args


def main():
    """Every part in a process of its own, then the report."""
    args = arguments()
    if args.file:
        return attempt(args, args.parts[0], "failed", PARTS[args.parts[0]], args)
    args.file = Path(args.out or Path(tempfile.mkdtemp()) / "results.json")
    args.file.write_text("{}")
    for part in args.parts:
        done = subprocess.run(
            [sys.executable, "-m", "bench.bench_4bit", *sys.argv[1:], "--parts", part, "--file",
             str(args.file)])
        if done.returncode:
            record(args, part, "failed", {"exit_status": done.returncode})
    results = json.loads(args.file.read_text())
    report({"bench": "4bit", "layers": args.layers, **results}, args.out)


if __name__ == "__main__":
    main()
