"""Will it fit, and how much work is it? From a model's numbers alone: no weight is read.

    python train.py --ckpt llama2-7b --rank 64 --plan

Bytes on a GPU that trains n tokens at a time; e bytes a number in products, 2 in bfloat16:

    frozen    e a weight; in four bits 0.516, or 0.5625 without double quantisation
    trained   16 a number of A and B: float32, its gradient, two moments of AdamW
    kept      of every layer for backward:  n (e (4 D + 2 (H + G) K + 4 F + 7 r) + 4 H + 8)
              and of A and B a copy of e bytes a number, unless they are multiplied in float32
    loss      12 V for each token that is learnt: its logits three times in float32

kept, in turn: x before both norms and after them, where A multiplies it; q, k, v and the output of
attention; gate, silu(gate), up and their product; x A seven times; what softmax and norms divide
by. Checkpointing keeps e n D of a layer, and the rest of one at a time. Gradients come while what
was kept goes, so memory is fullest where backward begins or ends: see `memory`. Not counted: the
mask of a sliding window, answers generated before and after, what CUDA itself takes.
"""
import math
from dataclasses import dataclass, replace

import torch

import model
import nf4
import pissa
from adapter import read_config as read_adapter_config

CUBLAS = 2 * 2**25              # its workspaces on an H100 or H200, for forward and for backward
# What decomposing takes on top of W, in bytes a weight of the largest W, in 16 and in 32 bits.
DECOMPOSE = {"pissa": (10, 8), "lora": (8, 7), "qlora": (9, 9), "loftq": (13, 12),
             "qpissa": (13, 12), "full": (0, 0)}
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
    rows: int = 8                           # the micro-batch
    length: int = 512                       # positions of a row
    learnt: int | None = None               # tokens with a label at a time, None: all
    checkpointing: bool = False
    compiled: bool = False
    double_quant: bool = True
    accumulate: bool = True                 # more micro-batches than one: they add to gradients

    full = property(lambda self: self.method == "full")
    four = property(lambda self: self.method in pissa.QUANTISED)
    tokens = property(lambda self: self.rows * self.length)
    labels = property(lambda self: self.tokens if self.learnt is None else self.learnt)

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
    every, chosen = ([tuple(m.weight.shape[::-1]) for m in found.values()]
                     for found in (pissa.find_linears(net, pissa.TARGETS), targets))
    if chosen and not 1 <= job.rank <= min(map(min, chosen)):
        raise ValueError(f"rank {job.rank} is not between 1 and {min(map(min, chosen))}, the "
                         "smaller side of a target's matrix")
    return every, chosen, sum(p.numel() for p in net.parameters())


def nf4_bytes(n, double):
    """Bytes of n weights in four bits: see nf4.py."""
    absmax = math.ceil(n / nf4.BLOCK)
    scales = math.ceil(absmax / nf4.ABSMAX_BLOCK) + 1
    return math.ceil(n / 2) + (absmax + 4 * scales if double else 4 * absmax)


def kept(job):
    """Bytes that a layer keeps for backward, but for copies of A, B or whole weights; of x, too."""
    c, e, hit = job.config, job.dtype.itemsize, job.hit
    x, normed = e, (hit("q_proj", "k_proj", "v_proj") > 0) + (hit("gate_proj", "up_proj") > 0)
    if job.full:                 # x is in float32; autocast makes a copy of it for every product
        x, normed = 4, 5 if e < 4 else 2
    numbers = (normed * c.dim + 2 * (c.n_heads + c.n_kv_heads) * c.head_dim
               + (3 - job.compiled + hit("down_proj")) * c.ffn_dim     # compiled: silu once more
               + hit(*pissa.TARGETS) * job.rank * (not job.full))
    return job.tokens * (2 * x * c.dim + e * numbers + 4 * c.n_heads + 8), job.tokens * x * c.dim


def memory(job):
    """({kind: parameters}, {kind: bytes}, {moment: bytes}): the last one's largest is the peak."""
    c, (every, chosen, total), e = job.config, shapes(job), job.dtype.itemsize
    sizes = [a * b for a, b in chosen]
    pairs, largest = job.rank * sum(map(sum, chosen)), max(sizes, default=0)
    rest = 0 if job.full else total - sum(sizes)
    numbers = {"frozen matrices": sum(sizes), "frozen embedding, norms, head": rest,
               "trained, float32": total if job.full else pairs}
    trained, (layer, x) = numbers["trained, float32"], kept(job)
    copies = e * trained * (e < 4)
    few = (c.n_layers + 1) * x + 8 * job.length * c.head_dim     # x at every layer's begin; RoPE
    all_kept = few if job.checkpointing else (   # layer 0's input is kept only to train embeddings
        few + c.n_layers * (layer - x) + copies - x * (not job.full))
    layer += copies // c.n_layers
    # Backward through the last product: two gradients, or one and the weight unpacked.
    work = e * job.tokens * c.ffn_dim
    work += max(work, e * largest * job.four)
    if job.full:                                 # the embedding's gradient; tied, a sum of two
        work += 4 * c.vocab_size * c.dim * (3 if c.tied else 1)
    held = {"frozen matrices": sum(nf4_bytes(n, job.double_quant) for n in sizes) if job.four
            else e * sum(sizes), "frozen embedding, norms, head": e * rest,
            "trained, float32": 4 * trained, "AdamW's moments": 8 * trained,
            "gradients": 4 * trained, "kept for backward": all_kept,
            "loss": 12 * job.labels * c.vocab_size, "work on a layer": work, "cuBLAS": CUBLAS}
    weights = sum([*held.values()][:3]) + CUBLAS
    # In four bits, matrices are made one by one, from W, before anything else is read.
    made = weights + DECOMPOSE[job.method][e // 4] * largest + job.four * e * (largest - rest)
    fixed, loss = weights + 8 * trained, held["loss"]
    start = fixed + 4 * trained * job.accumulate + all_kept
    cached = copies * job.full * job.checkpointing              # by autocast, until forward ends
    return numbers, held, {
        "loading": max(weights, made), "the end of forward": start + cached + loss * 2 // 3,
        "the beginning of backward": start + loss,
        "the last layer's backward": start + work + layer * job.checkpointing,
        "the first layer's backward": fixed + 4 * trained + x + layer + work}


def flops(job):
    """{pass: FLOPs a token}; "attention" is a part of forward: the causal half of its square.

    Two for every weight in forward, two for the gradient of x in backward, and for trained ones two
    more; flash attention's backward multiplies five times where forward does twice.
    """
    c, (every, chosen, _) = job.config, shapes(job)
    W, pairs = 2 * sum(a * b for a, b in every), 2 * job.rank * sum(map(sum, chosen))
    head = 2 * c.vocab_size * c.dim * job.labels / job.tokens
    attention = 2 * c.n_layers * job.length * c.n_heads * c.head_dim
    first = every[:3]           # layer 0's q, k and v: nothing before them wants a gradient of x
    spared = -W - head if job.full else sum(2 * a * b for a, b in first) + 2 * job.rank * sum(
        a for (a, _), name in zip(first, pissa.TARGETS) if name in job.targets)
    return {"forward": W + pairs + head + attention, "attention": attention,
            "backward": W + 2 * pairs + head + 2.5 * attention - spared,
            "recomputation": job.checkpointing * (W + pairs + attention)}


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
        there = read_adapter_config(args.adapter)
        info = there.get("pissa") or {"method": "lora", "rank": there["r"]}
        method, rank, double = info["method"], info["rank"], info.get("double_quant", True)
        targets = tuple(there["target_modules"])
    wide = args.dtype == "float32" or not args.dtype and str(args.device).startswith("cpu")
    return Job(read_config(args.ckpt), method, rank, targets,
               torch.float32 if wide else torch.bfloat16, min(args.micro_batch, args.batch),
               args.max_length - 1, None, args.checkpointing, args.compile, double,
               args.batch > args.micro_batch)


def peak(job):
    """(bytes, when)."""
    return max((size, when) for when, size in memory(job)[2].items())


def show(args):
    """Print the plan of what train.py was asked for."""
    job = from_arguments(args)
    (numbers, held, moments), work, (size, when) = memory(job), flops(job), peak(job)
    rank = "" if job.full else f", rank {job.rank}"
    print(f"{args.ckpt}: {job.method}{rank}, products in {str(job.dtype).removeprefix('torch.')}, "
          f"{job.rows} x {job.length} tokens at a time, all of them learnt\n\n"
          f"{'':30}{'parameters':>16}{'GiB':>10}")
    for kind, held_bytes in held.items():
        count = f"{numbers[kind]:,}" if kind in numbers else ""
        if held_bytes:
            print(f"{kind:30}{count:>16}{held_bytes / 2**30:10.2f}")
    print(f"\nexpected peak  {size / 2**30:.1f} GiB, at {when} (loading: "
          f"{moments['loading'] / 2**30:.1f}),\n{'':15}and some 0.5 GiB that CUDA itself takes")
    for name, change in LESS:
        if (other := replace(job, **change)) != job:
            print(f"  {name:29}{peak(other)[0] / 2**30:.1f} GiB")
    if torch.cuda.is_available():
        free, there = (b / 2**30 for b in torch.cuda.mem_get_info())
        print(f"this GPU has {there:.1f} GiB, {free:.1f} of them free: it "
              + ("fits" if size / 2**30 < free else "does not fit"))
    forward, backward, again = (work[k] for k in ("forward", "backward", "recomputation"))
    tflops = (forward + backward + again) * args.batch * job.length / 1e12
    print(f"\nGFLOPs a token  {forward / 1e9:.3g} forward ({work['attention'] / 1e9:.2g} of them "
          f"attention), {backward / 1e9:.3g} backward"
          + (f", {again / 1e9:.3g} forward again" if again else "")
          + f"\nTFLOPs a step   {tflops:,.1f} for {args.batch} x {job.length} tokens")
