"""Will it fit, and how much work is it? From a model's numbers alone: no weight is read.

    python train.py --ckpt llama2-7b --rank 64 --plan
    plan.estimate(model.Config(), method="pissa", rank=64)["peak"]           # bytes

A micro-batch is b rows of T positions. Packing computes the n positions that are text. Attention
computes all c = b T in float32, on a CPU, or if heads are wider than 256. Memory on a GPU in bytes,
with e bytes a number in products, 2 in bfloat16:

    frozen    e a weight; in four bits 0.516, or 0.5625 without double quantisation; in eight 2
    trained   16 a number of A and B: float32, its gradient, two moments of AdamW
    kept      of every layer for backward:
                  n (e (4 D + 2 (H + G) K + 2 F + 7 r) + 4 H + 8)
              or, if attention computes all c:
                  n (e (4 D + H K + 2 F + 7 r) + 8)  +  c (2 e (H + G) K + 4 H)
              and of A and B a copy of e bytes a number, unless they are multiplied in float32
    loss      12 V for a token whose logits are computed, of at most 2^25 / V tokens at a time

and before that, while up to 32 matrices are decomposed together, the bytes of `grouped`.

kept, in turn: x before both norms and after them, where A multiplies it; in attention, q, k, v and
its output, which o_proj reads, or else the n of them that packing has copied out of c; gate and up;
x A seven times; the divisors of softmax and norms. Checkpointing keeps e n D of a layer, and the
rest of one layer at a time; offloading puts it in host memory. Compiled layers keep some 2 n e D
less, and no copies.

Gradients are allocated as saved activations are freed. So memory is fullest at the end of forward,
or in the backward of the last or of the first layer: see `memory`. Not counted: the mask of a
sliding window, answers generated before and after, CUDA itself, and the memory that its allocator
holds back between micro-batches of different n (PYTORCH_ALLOC_CONF=expandable_segments:True
reduces this).
"""
import math
from collections import Counter
from dataclasses import dataclass, field, replace

import torch

import adapter
import fast
import model
import nf4
import pissa
import relatives
from formats import peft
from support import report
from support.shapes import read_config

CUBLAS = 2 * 2**25              # its workspaces on an H100 or H200, for forward and for backward
# TFLOP/s that train.train reached on an H200 by 8 x 512 tokens of 7B, with frozen weights in so
# many bits, and a step on a thread of a CPU. In bench/results: gpus_h200.json, step_cpu.json. Eight
# bits by the ratio of steps in step_eight_h100.json, 253 to 261 ms; with --compile 243 to 177.
REACHED, REACHED_BY_A_THREAD = {16: 480, 8: 465, 4: 368}, 0.1
BOTH = {"checkpointing": True, "rows": 1}
LESS = ("--checkpointing", {"checkpointing": True}), ("--micro-batch 1", {"rows": 1}), (
    "--checkpointing --micro-batch 1", BOTH), (
    "--checkpointing --micro-batch 1 --method qpissa",
    {**BOTH, "full": False, "bits": 4, "subtracted": True}), (
    "--offload", {"checkpointing": True, "offload": True})


@dataclass
class Job:
    """What is trained, how, and on how many tokens at a time. A method is known by three facts."""
    config: model.Config
    rank: int = 128
    targets: tuple = pissa.TARGETS
    ranks: dict | None = None               # {module: rank} of an adapter; None: rank, of targets
    full: bool = False                      # every weight is trained, without A and B
    bits: int = 16                          # of the frozen weights: 4, 8, or 16 for any float dtype
    subtracted: bool = True                 # frozen is W - A_0 B_0, so W is decomposed
    double_quant: bool = True
    layer: type = pissa.PissaLinear         # a relative's may train other numbers than A and B
    own: dict = field(default_factory=dict)  # a relative's options
    all_ranks: bool = False                 # it has all singular triplets of a matrix, not `rank`
    dtype: torch.dtype = torch.bfloat16     # of products; full has its weights in float32 anyway
    rows: int = 8                           # of a micro-batch
    length: int = 512                       # positions of a row
    text: int | None = None                 # how many positions are no padding, None: all
    learnt: int | None = None               # how many have a label, None: all with text
    packed: bool = True
    gpu: bool = True                        # one that has bfloat16
    cuda: bool = True                       # cuBLAS takes its workspaces, and CUDA its part
    checkpointing: bool = False
    offload: bool = False                   # its inputs of layers are in host memory
    compiled: bool = False
    accumulate: bool = True                 # more micro-batches than one: they add to gradients
    group: int = fast.GROUP                 # matrices decomposed together, 1 on a CPU

    x_bytes = property(lambda self: 4 if self.full else self.dtype.itemsize)  # a number of x
    cells = property(lambda self: self.rows * self.length)
    flash = property(lambda self: self.packed and self.gpu
                     and fast.fits_flash(self.dtype, self.config.head_dim))
    tokens = property(lambda self: self.text if self.packed and self.text else self.cells)
    attended = property(lambda self: self.tokens if self.flash else self.cells)     # by attention
    labels = property(lambda self: self.learnt or self.text or self.cells)

    def count(self, *leaves):
        """How many of these linear layers are trained."""
        return sum(self.full or leaf in self.targets for leaf in leaves)


def job_of(config, method="pissa", rank=128, targets=pissa.TARGETS, *, double_quant=True, bits=4,
           **more):
    """The Job of a method: what `pissa.inject` takes, or "full". more: see Job."""
    if method == "full":
        return Job(config, rank, targets, None, True, 16, False, **more)
    facts = adapter.facts_of(method, double_quant=double_quant, bits=bits)
    return Job(config, rank, targets, None, False, facts["bits"], facts["subtracted"],
               double_quant, getattr(method, "Layer", pissa.PissaLinear),
               getattr(method, "OPTIONS", {}), facts["own_layer"] and facts["rank"] == 64,
               **more)                                            # of the 64 of facts_of's matrix


def estimate(config, method="pissa", rank=128, targets=pissa.TARGETS, **more):
    """What training takes: a dict. The arguments are those of `job_of`.

    peak: the most bytes. when: at which moment. moments: {moment: bytes}. numbers: {kind: how many
    parameters}. held: {kind: bytes}. trained: how many numbers. flops: {pass: FLOPs a token}.
    ValueError for a target or a rank that `pissa.inject` would refuse.
    """
    return estimate_of(job_of(config, method, rank, targets, **more))


def estimate_of(job):
    """`estimate` of a Job."""
    numbers, held, moments = memory(job)
    peak, when = max((size, when) for when, size in moments.items())
    return {"peak": peak, "when": when, "moments": moments, "numbers": numbers, "held": held,
            "trained": numbers["trained, float32"], "flops": flops(job)}


def shapes(job):
    """{name: (in, out)} of all matrices of the layers, {name: (in, out, rank)} of the targets; how
    many parameters there are."""
    with torch.device("meta"):
        net = model.Llama(job.config)
    ranks = {} if job.full else job.ranks or dict.fromkeys(
        pissa.find_linears(net, job.targets, job.rank), job.rank)
    every = {n: tuple(m.weight.shape[::-1])
             for n, m in pissa.find_linears(net, (*pissa.TARGETS, "lm_head")).items()}
    if unknown := ranks.keys() - every.keys():
        raise ValueError(f"the adapter is of another model: there is no {min(unknown)}")
    chosen = {n: (*every[n], min(every[n]) if job.all_ranks else r) for n, r in ranks.items()}
    del every["lm_head"]
    return every, chosen, sum(p.numel() for p in net.parameters())


def pair_numbers(chosen):
    """How many numbers the A and B of these targets have: see `shapes`."""
    return sum(r * (a + b) for a, b, r in chosen.values())


def trained_numbers(job, chosen):
    """How many numbers of A and B are trained, or of what a relative's layer has instead.

    Such a layer is made of each shape. Its weight is memory that is asked for and hardly touched.
    """
    if job.layer is pissa.PissaLinear:
        return pair_numbers(chosen)
    count = {}
    for a, b, r in set(chosen.values()):
        linear = torch.nn.Linear(a, b, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(torch.empty(b, a), requires_grad=False)
        made = linear.weight, torch.ones(a, r), torch.ones(r, b), None
        layer = job.layer.from_linear(linear, lambda *_, made=made: made, pissa.Options(
            r, generator=torch.Generator(), own=job.own))
        count[a, b, r] = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return sum(count[shape] for shape in chosen.values())


def frozen_bytes(job, a, b):
    """Bytes of a frozen matrix of a x b, in the dtype of the weights, or quantised."""
    if job.bits == 8:                                # codes, codes_T, a scale a row: see fp8.py
        return 2 * a * b + 4 * b
    return nf4_bytes(a * b, job.double_quant) if job.bits == 4 else job.dtype.itemsize * a * b


def nf4_bytes(n, double):
    """Bytes of n weights in four bits: see nf4.py."""
    absmax = math.ceil(n / nf4.BLOCK)
    scales = math.ceil(absmax / nf4.ABSMAX_BLOCK) + 1
    return math.ceil(n / 2) + (absmax + 4 * scales if double else 4 * absmax)


def kept(job, ranks):
    """Bytes that a layer keeps for backward, without copies of A, B or whole weights. ranks: the
    sum of those of its targets."""
    c, e, n, count = job.config, job.dtype.itemsize, job.tokens, job.count
    normed = (count("q_proj", "k_proj", "v_proj") > 0) + (count("gate_proj", "up_proj") > 0)
    if job.full and e < 4:                # autocast makes a copy of a float32 x for every product
        normed = 5
    width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    copied = job.packed and not job.flash                              # out of attention's output
    # Outputs of norms, and of SwiGLU for a weight's gradient. Compiled layers compute them again.
    outputs = 0 if job.compiled else normed * c.dim + job.full * c.ffn_dim
    numbers = outputs + copied * count("o_proj") * width + 2 * c.ffn_dim + ranks
    # n (e (4 D + H K + 2 F + 7 r) + 8)  +  c (2 e (H + G) K + 4 H), or n and no H K
    norms = c.qk_norm * (e * (width + kv_width) + 4 * (c.n_heads + c.n_kv_heads))   # of q and k
    return (n * (2 * job.x_bytes * c.dim + e * numbers + 8 + norms)
            + job.attended * (2 * e * (width + kv_width) + 4 * c.n_heads))


def grouped(job, chosen):
    """Bytes on top of all weights, A and B while a GPU decomposes a group of matrices together.

    P (l, m) is made orthonormal: that takes the last P and two copies in float64. P W, (l, n),
    becomes V^T in float64 first: see `svd.grouped_svd`.
    """
    l, r = job.rank + 32, job.rank                             # oversampled, as by default
    return max((min(count, job.group) * max(28 * l * m, 8 * l * m + 12 * (l + r) * n)
                for (m, n), count in Counter(chosen).items()), default=0)


# Bytes on top of all weights while a matrix is initialised: (bits, subtracted): a weight of it, in
# 16 and in 32 bits. Measured: tests/test_plan.py counts the bytes that are alive in every method.
# Rounding by turns holds W - Q in float32 beside two Q. A residual is computed in float32, and
# then W is replaced by it. The other two copy nothing of W.
DECOMPOSING = {(4, True): (6, 6), (4, False): (1, 1), (8, True): (9, 9), (8, False): (2, 2),
               (16, True): (6, 4), (16, False): (0, 0)}


def memory(job):
    """({kind: parameters}, {kind: bytes}, {moment: bytes}): the last one's largest is the peak."""
    c, (every, chosen, total), e = job.config, shapes(job), job.dtype.itemsize
    sizes = [a * b for a, b, _ in chosen.values()]
    pairs, largest = pair_numbers(chosen), max(sizes, default=0)
    ranks = -(-sum(r for *_, r in chosen.values()) // c.n_layers)
    rest = 0 if job.full else total - sum(sizes)
    numbers = {"frozen matrices": sum(sizes), "frozen embedding, norms, head": rest,
               "trained, float32": total if job.full else trained_numbers(job, chosen)}
    trained, layer = numbers["trained, float32"], kept(job, ranks)
    still = {"frozen A, B": pairs - trained} if trained < pairs and not job.full else {}
    numbers |= still
    x = job.tokens * job.x_bytes * c.dim
    # Copies in 16 bits, of A and B, or by autocast of whole matrices.
    copies = e * (e < 4 and not job.compiled) * (sum(a * b for a, b in every.values())
                                                 if job.full else pairs)
    # The input x of every layer, the loss's gradient of the last one, RoPE's two tables.
    chosen_x = job.labels * job.x_bytes * c.dim
    # --offload: one that is computed with, one on its way, the last.
    inputs = min(3, c.n_layers + 1) if job.offload else c.n_layers + 1
    between = inputs * x + chosen_x + 8 * c.head_dim * (job.tokens if job.packed else job.length)
    all_kept = between if job.checkpointing else (    # layer 0's input only to train embeddings
        between + c.n_layers * (layer - x) + copies - x * (not job.full))
    layer += copies // c.n_layers
    # Logits three times: themselves, softmax, its gradient. Then the rows of x that have a label.
    loss = 12 * min(job.labels, max(1, fast.CHUNK // c.vocab_size)) * c.vocab_size + chosen_x
    # Backward of silu(gate) up has three of its size on top, less the input that a whole down_proj
    # kept. In the backward of down_proj, a gradient and the unpacked weight may be more.
    work = e * job.tokens * c.ffn_dim
    work += max(work * (2 - job.full), e * largest * (job.bits == 4))
    # A gradient of the head, or the embedding; or the head's copy by autocast, until forward ends.
    head = 4 * c.vocab_size * c.dim * job.full
    weights = {"frozen matrices": sum(frozen_bytes(job, a, b) for a, b, _ in chosen.values()),
               "frozen embedding, norms, head": e * rest,
               "trained, float32": 4 * trained, **{k: 4 * n for k, n in still.items()}}
    held = {**weights, "AdamW's moments": 8 * trained, "gradients": 4 * trained,
            "kept for backward": all_kept, "loss": loss + 2 * head, "work on a layer": work,
            "cuBLAS": CUBLAS * job.cuda}
    weights = sum(weights.values()) + CUBLAS * job.cuda
    made = weights + DECOMPOSING[job.bits, job.subtracted][e // 4] * largest
    if job.bits != 16:         # matrices are made one by one from W, before anything else is read
        made += e * (largest - rest)
    elif job.subtracted:
        made = max(made, weights + grouped(job, [(a, b) for a, b, _ in chosen.values()]))
    fixed = weights + 8 * trained
    start = fixed + 4 * trained * job.accumulate + all_kept
    moments = {"loading": max(weights, made), "the end of forward": start + head + held["loss"],
               "the last layer's backward": (start - chosen_x + head + work
                                             + layer * job.checkpointing),
               "the first layer's backward": (fixed + 4 * trained + x * (1 + 2 * job.offload)
                                              + layer + work + head)}
    if job.full:                                       # tied, a sum of two
        moments["the embedding's backward"] = fixed + 4 * trained + x + head * (1 + 2 * c.tied)
    return numbers, held, moments


def flops(job):
    """{pass: FLOPs a token}. "attention" is a part of forward: the causal half of T x T a row.

    Two for every weight in forward, two for the gradient of x in backward, and two more if it is
    trained. Flash attention multiplies twice in forward and five times in backward. Recomputation
    ends before a layer's last product, if that is a PissaLinear and not compiled.
    """
    c, (every, chosen, _) = job.config, shapes(job)
    W, pairs = 2 * sum(a * b for a, b in every.values()), 2 * pair_numbers(chosen)
    head = 2 * c.vocab_size * c.dim * job.labels / job.tokens
    attention = 2 * c.n_layers * job.length * c.n_heads * c.head_dim * job.attended / job.tokens
    # Layer 0's q, k and v: no layer before them wants a gradient of x.
    spared = -W - head if job.full else sum(
        2 * a * (b + chosen[n][2] if n in chosen else b) for n, (a, b) in [*every.items()][:3])
    last = 0 if job.compiled else sum(2 * b * (a + r) for n, (a, b, r) in chosen.items()
                                      if n.endswith("down_proj"))
    return {"forward": W + pairs + head + attention, "attention": attention,
            "backward": W + 2 * pairs + head + 2.5 * attention - spared,
            "recomputation": job.checkpointing * (W + pairs + attention - last)}


def flops_in_all(job):
    """FLOPs a token, of all passes."""
    return sum(flops(job).values()) - flops(job)["attention"]


def from_arguments(args):
    """(Job, the method's name) of train.py's command line."""
    on_cpu = not str(args.device or "cuda").startswith("cuda")                    # or on mps
    without = on_cpu or (                                           # a GPU that has no bfloat16
        torch.cuda.is_available() and not model.has_bfloat16(torch.device("cuda")))
    float32 = args.dtype == "float32" or not args.dtype and without
    more = {"dtype": torch.float32 if float32 else torch.bfloat16,
            "rows": min(args.micro_batch, args.batch), "length": args.max_length - 1,
            "packed": not args.no_packing, "gpu": not without, "cuda": not on_cpu,
            "compiled": args.compile, "checkpointing": args.checkpointing,
            "offload": args.offload and not on_cpu,
            "accumulate": args.batch > args.micro_batch,
            "group": 1 if on_cpu or args.adapter or args.niter is None else fast.GROUP}
    config = read_config(args.ckpt)
    if config.n_layers > 1000:                            # no tensors contradict a damaged number
        raise ValueError(f"{args.ckpt}: {config.n_layers} layers are too many for a plan")
    if not args.adapter:
        return job_of(config, relatives.chosen(args), args.rank, args.targets,
                      double_quant=not args.no_double_quant, bits=args.bits, **more), args.method
    facts = adapter.read_facts(args.adapter)
    pairs, _ = peft.find_pairs(args.adapter, peft.read_config(args.adapter))
    ranks = {n: A.shape[0] // (1 + facts["subtracted"]) for n, (A, _) in pairs.items()}
    targets = tuple({name.rpartition(".")[2] for name in ranks})
    method = facts.get("method")
    layer = getattr(relatives.known(method) if facts.get("own_layer") else None, "Layer",
                    pissa.PissaLinear)
    return Job(config, max(ranks.values()), targets, ranks, False, facts["bits"],
               facts["subtracted"], facts.get("double_quant", True), layer, facts.get("own", {}),
               **more), method


def sharded(job, gpus):
    """The most bytes on each of several GPUs among which the weights are spread (--shard).

    A frozen matrix, or with full everything that is trained, takes 1 / gpus. The layers that are
    whole at a time come on top: two, and with full three. A, B and their moments are whole on every
    GPU.
    """
    found = estimate_of(job)
    spread = 16 * found["trained"] if job.full else found["held"]["frozen matrices"]
    numbers = sum(a * b for a, b in shapes(job)[0].values()) // job.config.n_layers
    one = 12 * numbers if job.full else 2 * found["held"]["frozen matrices"] // job.config.n_layers
    return found["peak"] - spread * (gpus - 1) // gpus + one


def seconds(job, flops, parts=0):
    """The seconds that so many FLOPs take, by what was measured; also in words, with the rate.

    parts: micro-batches. Python takes some 5 ms to launch the kernels of a layer for each, forward
    and backward: measured on SmolLM2-135M, 30 layers, 170 ms. A small model waits for that."""
    rate, where = REACHED[job.bits], "on an H200 by 8 x 512 tokens of 7B; less at a time is slower"
    if not job.cuda:
        rate, where = REACHED_BY_A_THREAD * (n := torch.get_num_threads()), f"by {n} CPU threads"
    seconds, launching = flops / rate / 1e12, 0.005 * job.config.n_layers * parts * job.cuda
    text = f" at {rate:g} TFLOP/s, as reached {where}"
    if launching > seconds:
        seconds, text = launching, ", in which Python launches kernels; the GPU has little to do"
    return seconds, (f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.2g}") + text


def peak(args):
    """The bytes that a command line of train.py takes on one GPU."""
    return estimate_of(from_arguments(args)[0])["peak"]


def show(args):
    """Print the plan of a command line of train.py."""
    job, method = from_arguments(args)
    less = {name + " --bits 4" * (job.bits == 8 and "bits" in change): estimate_of(other)["peak"]
            for name, change in LESS if (other := replace(job, **change)) != job
            and (job.cuda or "offload" not in change)}     # a CPU's memory is the host's
    found = estimate_of(job)
    step = flops_in_all(job) * args.batch * job.length
    each, words = seconds(job, step, math.ceil(args.batch / args.micro_batch))
    words += " (on one GPU)" * (args.gpus > 1)
    if args.steps:
        words += f"; {args.steps} steps, if rows are so long: {each * args.steps / 60:.2g} minutes"
    report.plan(args, job, method, found, less, words)
    if args.gpus > 1:
        report.plan_of_gpus(args, found["peak"], sharded(job, args.gpus), each / args.gpus)
