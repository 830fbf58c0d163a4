"""Will it fit, and how much work is it? From a model's numbers alone: no weight is read.

    python train.py --ckpt llama2-7b --rank 64 --plan

A micro-batch is b rows of T positions. Packing computes the n of them that are text; in float32, on
a CPU, or with heads wider than 256, attention computes all c = b T. What lies on a GPU meanwhile,
in bytes, with e bytes a number in products, 2 in bfloat16:

    frozen    e a weight; in four bits 0.516, or 0.5625 without double quantisation
    trained   16 a number of A and B: float32, its gradient, two moments of AdamW
    kept      of every layer for backward:
                  n (e (4 D + 2 (H + G) K + 3 F + 7 r) + 4 H + 8)
              or, where attention computes all c:
                  n (e (4 D + H K + 3 F + 7 r) + 8)  +  c (2 e (H + G) K + 4 H)
              and of A and B a copy of e bytes a number, unless they are multiplied in float32
    loss      12 V for a token whose logits are computed, of at most 2^25 / V tokens at a time

and before that, while pissa decomposes up to 32 matrices together, what `grouped` says.

kept, in turn: x before both norms and after them, where A multiplies it; in attention, q, k, v and
its output, which o_proj reads, or else the n of them that packing has copied out of c; gate, up and
silu(gate) up; x A seven times; what softmax and norms divide by. Checkpointing keeps e n D of a
layer, the rest of one at a time; compiled layers keep some n e (2 D + F) less, and no copies.

Gradients come while what was kept goes, so memory is fullest where forward ends, or where backward
is in the last or in the first layer: see `memory`. Not counted: the mask of a sliding window,
answers generated before and after, what CUDA itself takes, and what its allocator holds back
between micro-batches of different n: PYTORCH_ALLOC_CONF=expandable_segments:True is against that.
"""
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

import adapter
import model
import nf4
import pissa

CHUNK = 2**25                   # logits that train.py computes at a time: 128 MiB in float32
CUBLAS = 2 * 2**25              # its workspaces on an H100 or H200, for forward and for backward
# What decomposing takes on top of W, in bytes a weight of the largest W, in 16 and in 32 bits.
DECOMPOSE = {"pissa": (10, 8), "lora": (8, 4), "qlora": (9, 9), "loftq": (9, 9),
             "qpissa": (9, 9), "full": (0, 0)}
LESS = ("--checkpointing", {"checkpointing": True}), ("--micro-batch 1", {"rows": 1}), (
    "both", {"checkpointing": True, "rows": 1}), (
    "both, --method qpissa", {"checkpointing": True, "rows": 1, "method": "qpissa"})


@dataclass
class Job:
    """What is trained, how, and on how many tokens at a time."""
    config: model.Config
    method: str = "pissa"
    rank: int = 128
    targets: tuple = pissa.TARGETS
    dtype: torch.dtype = torch.bfloat16     # of products; full has its weights in float32 anyway
    rows: int = 8                           # of a micro-batch
    length: int = 512                       # positions of a row
    text: int | None = None                 # how many positions are no padding, None: all
    learnt: int | None = None               # how many have a label, None: all with text
    packed: bool = True
    gpu: bool = True
    checkpointing: bool = False
    compiled: bool = False
    double_quant: bool = True
    accumulate: bool = True                 # more micro-batches than one: they add to gradients
    group: int = pissa.GROUP                # matrices that pissa decomposes together, 1 on a CPU

    full = property(lambda self: self.method == "full")
    four = property(lambda self: self.method in pissa.QUANTISED)
    wide = property(lambda self: 4 if self.full else self.dtype.itemsize)     # bytes a number of x
    cells = property(lambda self: self.rows * self.length)
    flash = property(lambda self: self.packed and self.gpu
                     and model.fits_flash(self.dtype, self.config))
    tokens = property(lambda self: self.text if self.packed and self.text else self.cells)
    attended = property(lambda self: self.tokens if self.flash else self.cells)     # by attention
    labels = property(lambda self: self.learnt or self.text or self.cells)

    def hit(self, *leaves):
        """How many of these linear layers are trained."""
        return sum(self.full or leaf in self.targets for leaf in leaves)


def shapes(job):
    """[(in, out)] of all matrices of the layers, of the targets; how many parameters there are.

    ValueError for targets, or a rank, that `pissa.inject` would refuse.
    """
    with torch.device("meta"):
        net = model.Llama(job.config)
    targets = {} if job.full else pissa.find_linears(net, job.targets)
    for name, m in targets.items():
        pissa.check_rank(name, m, job.rank)
    every, chosen = ([tuple(m.weight.shape[::-1]) for m in found.values()]
                     for found in (pissa.find_linears(net, pissa.TARGETS), targets))
    return every, chosen, sum(p.numel() for p in net.parameters())


def nf4_bytes(n, double):
    """Bytes of n weights in four bits: see nf4.py."""
    absmax = math.ceil(n / nf4.BLOCK)
    scales = math.ceil(absmax / nf4.ABSMAX_BLOCK) + 1
    return math.ceil(n / 2) + (absmax + 4 * scales if double else 4 * absmax)


def kept(job):
    """Bytes that a layer keeps for backward, but for copies of A, B or whole weights."""
    c, e, n, hit = job.config, job.dtype.itemsize, job.tokens, job.hit
    normed = (hit("q_proj", "k_proj", "v_proj") > 0) + (hit("gate_proj", "up_proj") > 0)
    if job.full and e < 4:                # autocast makes a copy of a float32 x for every product
        normed = 5
    width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    copied = job.packed and not job.flash                              # out of attention's output
    # What norms and SwiGLU put out; where that is compiled, it is computed again.
    put_out = 0 if job.compiled else normed * c.dim + hit("down_proj") * c.ffn_dim
    numbers = (put_out + copied * hit("o_proj") * width + 2 * c.ffn_dim
               + hit(*pissa.TARGETS) * job.rank * (not job.full))
    # n (e (4 D + H K + 3 F + 7 r) + 8)  +  c (2 e (H + G) K + 4 H), or n and no H K
    return (n * (2 * job.wide * c.dim + e * numbers + 8)
            + job.attended * (2 * e * (width + kv_width) + 4 * c.n_heads))


def grouped(job, chosen):
    """Bytes on top of all weights, A and B while a GPU decomposes a group of matrices together.

    P (l, m) is made orthonormal beside the last one and in float64 twice, and P W, (l, n), becomes
    V^T in float64 first: see `svd.grouped_svd`.
    """
    l, r = job.rank + 32, job.rank                             # oversampled, as by default
    return max((min(count, job.group) * max(28 * l * m, 8 * l * m + 12 * (l + r) * n)
                for (m, n), count in Counter(chosen).items()), default=0)


def memory(job):
    """({kind: parameters}, {kind: bytes}, {moment: bytes}): the last one's largest is the peak."""
    c, (every, chosen, total), e = job.config, shapes(job), job.dtype.itemsize
    sizes = [a * b for a, b in chosen]
    pairs, largest = job.rank * sum(map(sum, chosen)), max(sizes, default=0)
    rest = 0 if job.full else total - sum(sizes)
    numbers = {"frozen matrices": sum(sizes), "frozen embedding, norms, head": rest,
               "trained, float32": total if job.full else pairs}
    trained, layer, x = numbers["trained, float32"], kept(job), job.tokens * job.wide * c.dim
    # Copies in 16 bits, of A and B, or by autocast of whole matrices.
    copies = e * (e < 4 and not job.compiled) * (sum(a * b for a, b in every) if job.full
                                                 else pairs)
    # x at every layer's begin, the loss's gradient of the last one, RoPE's two tables.
    chosen_x = job.labels * job.wide * c.dim
    few = (c.n_layers + 1) * x + chosen_x + 8 * c.head_dim * (
        job.tokens if job.packed else job.length)
    all_kept = few if job.checkpointing else (   # layer 0's input is kept only to train embeddings
        few + c.n_layers * (layer - x) + copies - x * (not job.full))
    layer += copies // c.n_layers
    # Logits three times: themselves, softmax, its gradient; then what of x had a label, once more.
    loss = 12 * min(job.labels, max(1, CHUNK // c.vocab_size)) * c.vocab_size + chosen_x
    # Backward of silu(gate) up has three of its size on top, but what down_proj kept is gone; in
    # that of down_proj, a gradient and the weight unpacked may be more.
    work = e * job.tokens * c.ffn_dim
    work += max(work * (2 - job.hit("down_proj")), e * largest * job.four)
    # A gradient of the head, or the embedding; or the head's copy by autocast, until forward ends.
    head = 4 * c.vocab_size * c.dim * job.full
    weights = {"frozen matrices": sum(nf4_bytes(n, job.double_quant) for n in sizes) if job.four
               else e * sum(sizes), "frozen embedding, norms, head": e * rest,
               "trained, float32": 4 * trained}
    held = {**weights, "AdamW's moments": 8 * trained, "gradients": 4 * trained,
            "kept for backward": all_kept, "loss": loss + 2 * head, "work on a layer": work,
            "cuBLAS": CUBLAS}
    weights = sum(weights.values()) + CUBLAS
    # In four bits, matrices are made one by one, from W, before anything else is read.
    made = weights + DECOMPOSE[job.method][e // 4] * largest + job.four * e * (largest - rest)
    if job.method == "pissa":
        made = max(made, weights + grouped(job, chosen))
    fixed = weights + 8 * trained
    start = fixed + 4 * trained * job.accumulate + all_kept
    moments = {"loading": max(weights, made), "the end of forward": start + head + held["loss"],
               "the last layer's backward": (start - chosen_x + head + work
                                             + layer * job.checkpointing),
               "the first layer's backward": fixed + 4 * trained + x + layer + work + head}
    if job.full:                                       # tied, a sum of two
        moments["the embedding's backward"] = fixed + 4 * trained + x + head * (1 + 2 * c.tied)
    return numbers, held, moments


def flops(job):
    """{pass: FLOPs a token}; "attention" is a part of forward: the causal half of T x T a row.

    Two for every weight in forward, two for the gradient of x in backward, and for trained ones two
    more; flash attention's backward multiplies five times where forward does twice. Recomputation
    ends before a layer's last product, if that is a PissaLinear, and not compiled.
    """
    c, (every, chosen, _) = job.config, shapes(job)
    W, pairs = 2 * sum(a * b for a, b in every), 2 * job.rank * sum(map(sum, chosen))
    head = 2 * c.vocab_size * c.dim * job.labels / job.tokens
    attention = 2 * c.n_layers * job.length * c.n_heads * c.head_dim * job.attended / job.tokens
    first = every[:3]           # layer 0's q, k and v: nothing before them wants a gradient of x
    spared = -W - head if job.full else sum(2 * a * b for a, b in first) + 2 * job.rank * sum(
        a for (a, _), name in zip(first, pissa.TARGETS) if name in job.targets)
    last = 2 * c.n_layers * c.dim * (c.ffn_dim + job.rank) * (
        "down_proj" in job.targets and not job.full and not job.compiled)
    return {"forward": W + pairs + head + attention, "attention": attention,
            "backward": W + 2 * pairs + head + 2.5 * attention - spared,
            "recomputation": job.checkpointing * (W + pairs + attention - last)}


def flops_in_all(job):
    """FLOPs a token, of all passes."""
    return sum(work for name, work in flops(job).items() if name != "attention")


def read_config(ckpt):
    """The Config of a checkpoint, be it only its config.json or params.json."""
    directory = model.find(ckpt)
    if (directory / "config.json").is_file():
        import hf
        return hf.read_config(directory / "config.json")
    if any(directory.glob("consolidated.*.pth")):
        return model.open_checkpoint(ckpt)[0]
    # What the tensors would say: Llama 1 and 2, which leave their vocabulary open, have 32000.
    shard = {"tok_embeddings.weight": torch.empty(32000, 0), "output.weight": None}
    return model.read_config(directory, [shard])


def from_arguments(args):
    """The Job of train.py's command line."""
    method, rank, targets, double = args.method, args.rank, args.targets, not args.no_double_quant
    if args.adapter:
        there = adapter.read_config(args.adapter)
        adapter.check_method(args.adapter, there.get("pissa"))
        info = there.get("pissa") or {"method": "lora", "rank": there.get("r")}
        method, rank, double = info["method"], info["rank"], info.get("double_quant", True)
        found = there.get("target_modules")
        if type(rank) is not int or type(found) is not list:        # PEFT also takes a pattern
            raise ValueError(f"{args.adapter}: a plan takes a number as r and a list as "
                             f"target_modules, not {rank!r} and {found!r}")
        targets = tuple({name.rpartition(".")[2] for name in found})
    on_cpu = str(args.device).startswith("cpu")
    without = on_cpu or (                                           # where there is no bfloat16
        torch.cuda.is_available() and not model.has_bfloat16(torch.device("cuda")))
    wide = args.dtype == "float32" or not args.dtype and without
    one_by_one = on_cpu or args.adapter or args.niter is None
    return Job(read_config(args.ckpt), method, rank, targets,
               torch.float32 if wide else torch.bfloat16, min(args.micro_batch, args.batch),
               args.max_length - 1, packed=not args.no_packing, gpu=not without,
               checkpointing=args.checkpointing, compiled=args.compile, double_quant=double,
               accumulate=args.batch > args.micro_batch,
               group=1 if one_by_one else pissa.GROUP)


def peak(job):
    """(bytes, when)."""
    return max((size, when) for when, size in memory(job)[2].items())


def show(args):
    """Print the plan of what train.py was asked for."""
    job = from_arguments(args)
    (numbers, held, moments), work, (size, when) = memory(job), flops(job), peak(job)
    unit, unit_name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    rank = "" if job.full else f", rank {job.rank}"
    print(f"{args.ckpt}: {job.method}{rank}, products in {str(job.dtype).removeprefix('torch.')}, "
          f"{job.rows} x {job.length} tokens at a time, all of them learnt\n\n"
          f"{'':30}{'parameters':>16}{unit_name:>10}")
    for kind, held_bytes in held.items():
        count = f"{numbers[kind]:,}" if kind in numbers else ""
        if held_bytes:
            print(f"{kind:30}{count:>16}{held_bytes / unit:10.2f}")
    trained, total = numbers["trained, float32"], sum(numbers.values())
    print(f"\nparameters     {total:,}, {trained:,} of them trained ({trained / total:.2%})\n"
          f"expected peak  {size / unit:.1f} {unit_name}, at {when} (loading: "
          f"{moments['loading'] / unit:.1f}),\n{'':15}and some 0.5 GiB that CUDA itself takes")
    for name, change in LESS:
        if (other := replace(job, **change)) != job:
            print(f"  {name:29}{peak(other)[0] / unit:.1f} {unit_name}")
    if torch.cuda.is_available():
        free, there = (b / 2**30 for b in torch.cuda.mem_get_info())
        print(f"this GPU has {there:.1f} GiB, {free:.1f} of them free: it "
              + ("fits" if size / 2**30 < free else "does not fit"))
    forward, backward, again = (work[k] for k in ("forward", "backward", "recomputation"))
    tflops = flops_in_all(job) * args.batch * job.length / 1e12
    print(f"\nGFLOPs a token  {forward / 1e9:.3g} forward ({work['attention'] / 1e9:.2g} of them "
          f"attention), {backward / 1e9:.3g} backward"
          + (f", {again / 1e9:.3g} forward again" if again else "")
          + f"\nTFLOPs a step   {tflops:,.1f} for {args.batch} x {job.length} tokens")
