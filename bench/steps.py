"""A training step beside PEFT's, in one process: what bench_train and bench_4bit share.

Llama-2-7B's shape (without a GPU: SmolLM2-135M's, in float32), the same random weights, tokens and
loss on both sides: N(0, 0.02^2) plus a decaying part of rank 64, LoRA with B = 0. PEFT runs with
its defaults (A and B in float32, and so their products), and under autocast, as by transformers'
Trainer(bf16=True). `--tiny` runs it all at toy size, without a GPU too. Every part is a process of
its own; --out is written after every result, and what fails leaves its error there.
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
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import model
import pissa
from bench import report
from bench.bench_generate import llama_config
from train import compile_layers, loss_sum

CUDA = torch.cuda.is_available()
DEVICE, TURNS = torch.device("cuda" if CUDA else "cpu"), 5
DTYPE = torch.bfloat16 if CUDA else torch.float32
SEVEN, SEVENTY = model.Config(), model.Config(
    dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=128256, ffn_dim=28672,
    rope_theta=500000.0)
SMOL = model.Config(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=49152, ffn_dim=1536)
TOY = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 128, "ffn_dim": 192,
       "head_dim": 16}
# name: rows of tokens, checkpointing, compiled, autocast
OURS = {"ours": (8, False, False, False), "ours, checkpointing": (8, True, False, False),
        "ours, 1 row, checkpointing": (1, True, False, False),
        "ours, compiled": (8, False, True, False),
        "ours, compiled, checkpointing": (8, True, True, False)}
PEFT = {"PEFT": (8, False, False, False), "PEFT, autocast": (8, False, False, True),
        "PEFT, checkpointing": (8, True, False, False),
        "PEFT, autocast, checkpointing": (8, True, False, True),
        "PEFT, 1 row, checkpointing": (1, True, False, False),
        "PEFT, 1 row, autocast, checkpointing": (1, True, False, True)}
PEFT_16 = {**PEFT, "PEFT, autocast, compiled": (8, False, True, True)}


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
    """Seconds, once the GPU has done what it was asked for; without one, seconds of computing."""
    if not CUDA:
        return time.process_time()          # of all threads: others on the same cores do not count
    torch.cuda.synchronize()
    return time.perf_counter()


def graphs():
    """How many graphs were compiled; beyond 8 of one function, torch stops compiling it."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def gib(figure, less=0.0):
    """max_memory_allocated, or another figure of torch.cuda, less some GiB; 0 without a GPU."""
    return getattr(torch.cuda, figure)() / 2**30 - less


# ------------------------------------------------------------------------------------------ models

def random_matrix(shape, name):
    """The matrix of that name: N(0, 0.02^2), and 64 singular values that stand out."""
    g = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
    (m, n), k = shape, min(64, *shape)
    W, U, V = (torch.randn(s, generator=g, device=DEVICE, dtype=DTYPE)
               for s in ((m, n), (m, k), (k, n)))
    noise = 0.02 * (m**0.5 + n**0.5)                   # about the largest one of the first part
    S = 4 * noise * torch.arange(1, k + 1, device=DEVICE) ** -0.5
    return W.mul_(0.02).addmm_(U * (S / (m * n) ** 0.5).to(DTYPE), V)


def fill(net):
    """Give what is still on the meta device numbers: matrices as above, ones for the norms."""
    for name, p in list(net.named_parameters()):
        if p.is_meta:
            value = random_matrix(p.shape, name.removesuffix(".weight")) if p.ndim > 1 else (
                torch.ones(p.shape, device=DEVICE, dtype=DTYPE))
            module, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    assert not any(t.is_meta for t in (*net.parameters(), *net.buffers()))
    return net.train()


def injected(config, method, rank, bits=4):
    """Our network, matrix by matrix; the seconds of making these, and of all the rest. bits: of
    the methods that round."""
    with torch.device("meta"):
        net = model.Llama(config).to(DTYPE)
    shapes = {name: p.shape for name, p in net.named_parameters()}
    making, done, start = 0.0, 0, clock()

    def read(name):
        nonlocal making, done
        before = clock()
        if done and done % 100 == 0:
            print(f"{done} matrices in {before - start:.1f} s", flush=True)
        W, done = random_matrix(shapes[name + ".weight"], name), done + 1
        making += clock() - before
        return W

    pissa.inject(net, rank, method, read=read, quant_iters=TURNS, bits=bits,
                 keep_base=False, progress=False)
    return net, making, clock() - start - making


def in_four_bits(net):
    """Replace the targets of transformers' network, on the meta device, by Linear4bit."""
    import bitsandbytes
    for name in list(pissa.find_linears(net, pissa.TARGETS)):
        m, options = net.get_submodule(name), {"compress_statistics": True, "quant_type": "nf4"}
        linear = bitsandbytes.nn.Linear4bit(m.in_features, m.out_features, bias=False,
                                            compute_dtype=torch.bfloat16, device="meta", **options)
        W = random_matrix(m.weight.shape, name)
        linear.weight = bitsandbytes.nn.Params4bit(W, requires_grad=False, module=linear,
                                                   **options).to(DEVICE)   # here it is quantised
        net.set_submodule(name, linear)
    net.is_loaded_in_4bit = True                                           # PEFT asks for it


def with_lora(theirs, rank):
    """PEFT's model of one of transformers, with LoRA as ours: on all targets, scaled by 1."""
    import peft
    return peft.get_peft_model(theirs, peft.LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(pissa.TARGETS)))


def peft_twin(config, rank, bits):
    """transformers' network with PEFT's LoRA, on bitsandbytes' Linear4bit for bits 4."""
    import peft
    import transformers
    c = llama_config(config, DTYPE, use_cache=False, attn_implementation="sdpa")
    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(c).to(DTYPE)
    net.model.rotary_emb = type(net.model.rotary_emb)(c).to(DEVICE)        # its table is float32
    if bits == 4:
        in_four_bits(net)
    net.requires_grad_(False)
    net = with_lora(fill(net), rank)
    found = {type(m) for n, m in net.named_modules() if n.endswith(pissa.TARGETS)}
    lora = peft.tuners.lora
    assert found == {lora.bnb.Linear4bit if bits == 4 else lora.Linear}, found
    return net.train()


def peft_loss(autocast):
    """The sum of the cross-entropies, as train.loss_sum for our network."""
    def loss(net, tokens, labels):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            logits = net(input_ids=tokens.to(DEVICE), use_cache=False).logits.float()
        labels = labels.flatten().to(DEVICE)
        return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    return loss


def trained(args, config, net, loss, rows, steps, warm=0, base=0.0, dtypes=(torch.float32,)):
    """Train on the same random tokens: seconds of a step, tokens per second, peak memory.

    dtypes: those that the trained parameters must have, for a fair comparison."""
    tokens = torch.randint(config.vocab_size, (rows, args.length + 1),
                           generator=torch.Generator().manual_seed(0))
    params = [p for p in net.parameters() if p.requires_grad]
    assert {p.dtype for p in params} == set(dtypes)
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


# -------------------------------------------------------------------------------------------- step

def side(args, whose):
    """One network, built once, in all its variants; B is 0 again for each: losses begin alike."""
    base, is_ours = gib("memory_allocated"), whose is OURS
    method = "qlora" if args.bits == 4 else "lora"
    net = fill(injected(args.seven, method, args.rank)[0]) if is_ours else (
        peft_twin(args.seven, args.rank, args.bits))
    built = {"gib": gib("memory_allocated", base), "gib_before": base}

    def variant(rows, checkpointing, compiled, autocast):
        for name, p in net.named_parameters():
            if p.requires_grad and (name.endswith(".B") or "lora_B" in name):
                nn.init.zeros_(p)
        if is_ours:
            net.checkpointing = checkpointing
            if compiled:
                compile_layers(net)
        else:
            theirs = net.get_base_model()
            if checkpointing:
                theirs.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                theirs.gradient_checkpointing_disable()
            if compiled:
                net.compile()
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        loss = loss_sum if is_ours else peft_loss(autocast)
        return trained(args, args.seven, net, loss, rows, *((8, 2) if CUDA else (5, 1)), base)

    for name, options in whose.items():
        if CUDA or args.tiny or not any(options[2:]):      # neither autocast nor compiled on a CPU
            attempt(args, "step", name, variant, *options)
    return built


def step(args):
    """Both sides, one after the other; how many times as fast ours is as the fastest of theirs.

    PEFT compiles the whole network, without checkpointing and only in 16 bits. Otherwise
    our compiled steps are set beside its eager ones.
    """
    theirs = PEFT if args.bits == 4 else PEFT_16
    with torch._functorch.config.patch(activation_memory_budget=1.0):     # compile_layers lowers it
        attempt(args, "step", "our model", side, args, OURS)
    torch._dynamo.reset()
    attempt(args, "step", "their model", side, args, theirs)
    rows = json.loads(args.file.read_text())["step"]
    speed = {name: rows.get(name, {}).get("tokens_per_second", 0.0) for name in (*OURS, *theirs)}
    best = {}
    for name, options in OURS.items():
        alike = [n for n in theirs if theirs[n][:3] == options[:3]] or [
            n for n in theirs if theirs[n][:2] == options[:2]]
        best[name] = max(speed[n] for n in alike)
    record(args, "step", "times as fast", {n: speed[n] / best[n] for n in OURS
                                           if speed[n] and best[n]})


def sizes(parser, parts):
    """The arguments that these benchmarks share; adds seven, length, and cut for other sizes."""
    add = parser.add_argument
    add("--parts", nargs="+", default=list(parts), choices=list(parts))
    add("--layers", type=int, help="fewer layers, for a trial")
    add("--tiny", action="store_true", help="toy sizes, for a trial on a CPU")
    add("--out")
    add("--file", type=Path, help=argparse.SUPPRESS)                # of the process of one part
    args = parser.parse_args()
    changes = (TOY if args.tiny else {}) | ({"n_layers": args.layers} if args.layers else {})
    args.cut = lambda config: replace(config, **changes)
    args.seven = args.cut(SEVEN if CUDA or args.tiny else SMOL)
    args.length = 16 if args.tiny else 512 if CUDA else 128
    return args


def run_parts(args, parts, module, header):
    """Every part in a process of its own, then the report."""
    if args.file:
        return attempt(args, args.parts[0], "failed", parts[args.parts[0]], args)
    args.file = Path(args.out or Path(tempfile.mkdtemp()) / "results.json")
    args.file.write_text("{}")
    for part in args.parts:
        done = subprocess.run([sys.executable, "-m", module, *sys.argv[1:], "--parts", part,
                               "--file", str(args.file)])
        if done.returncode:
            record(args, part, "failed", {"exit_status": done.returncode})
    results = json.loads(args.file.read_text())
    report({**header, "layers": args.layers, **results}, args.out)
