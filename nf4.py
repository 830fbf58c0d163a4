# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""NF4: weights in four bits, after QLoRA (Dettmers et al., arXiv 2305.14314), in plain PyTorch.

The entries of a trained weight matrix look normally distributed. So every block of 64 consecutive
weights is divided by its largest magnitude, and each weight is replaced by the nearest of 16 levels
that a normal variable would meet about equally often:

    absmax = max |w| over the block,    code = nearest level of w / absmax,    w ~ level * absmax

A weight takes 4 bits and its share of absmax 32 / 64. Double quantisation subtracts the mean of the
absmax and rounds them to 8 bits likewise, in blocks of 256. Then 4.5 bits become 4.13.

    paper      code           shape, for W with n entries, row after row
    codes      codes          (n / 2,) uint8: two codes a byte, the first one in its high half
    absmax     absmax         (n / 64,) float32, or uint8 with double quantisation
    c_2        scale, mean    (n / 64 / 256,) and (1,) float32, with double quantisation only

Codes, absmax and levels equal those of bitsandbytes to the last bit. Two exceptions, on which its
own kernels disagree: the code of 0 in a block of zeros, and the mean of the absmax, which is summed
in float64 here. Parts are stored with the rows of W as rows, if these divide into bytes and blocks.

    Q = nf4.quantize(W);  Q.dequantize(torch.float32);  y = Q(x)         # y = x W^T, W is (out, in)

Q(x) unpacks W to the dtype of x and drops it again. Backward unpacks it anew. So between the two,
four bits a weight are kept instead of sixteen.
"""
import warnings
from functools import partial

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear, pad
from torch.utils.checkpoint import checkpoint

BLOCK, ABSMAX_BLOCK = 64, 256
CHUNK = 1 << 22                          # entries quantised at a time: bounds the memory it takes
HOST = {"dtype": torch.float32, "device": "cpu"}     # of the levels, whatever the defaults are


# ----------------------------------------------------------------------------------------- levels

def normal_levels():
    """The 16 levels of NF4, float32, ascending from -1 to 1, with 0 as the eighth.

    Quantiles of the normal distribution at equally spaced probabilities: 7 below 0, 8 above it. The
    outermost is 1 - (1/30 + 1/32) / 2, rounded as QLoRA's authors rounded it."""
    below, above = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, k, **HOST)[:-1].double())
                    .float() for k in (8, 9))
    levels = torch.cat([-below, torch.zeros(1, **HOST), above.flip(0)])
    return levels / levels.max()


def dynamic_levels():
    """The 256 levels for absmax, float32: the dynamic type of Dettmers (arXiv 1511.04561).

    0, 1, and with both signs, for i = 0 ... 6, the centres of 2^i equal parts of the interval
    [0.1, 1], times 10^(i - 6).
    """
    centres = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, **HOST)
        centres.append(10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2))
    above = torch.cat(centres)
    return torch.cat([-above, torch.tensor([0, 1], **HOST), above]).sort().values


LEVELS, ABSMAX_LEVELS = normal_levels(), dynamic_levels()
PAIRS = torch.stack([LEVELS.repeat_interleave(16), LEVELS.repeat(16)], 1)       # of a byte's codes


def middles(levels, device):
    """The middles between neighbouring levels."""
    return ((levels[:-1] + levels[1:]) / 2).to(device)


def nearest(x, halfway, block):
    """(codes int32, absmax) of x (n,). Zeros fill the last block. halfway: what `middles`
    returns."""
    blocks = pad(x, (0, -len(x) % block)).view(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    return torch.bucketize(scaled, halfway, out_int32=True), absmax


# ---------------------------------------------------------------------- quantise, and back again

@torch.no_grad()
def quantize(W: torch.Tensor, double: bool = True) -> "NF4":
    """An NF4 of a tensor W of any shape and floating dtype. double: quantise the absmax, too.

    Raises ValueError for NaN or Inf in W, or numbers that are not floats.
    """
    if not W.is_floating_point() or W.numel() == 0:
        raise ValueError(f"NF4 needs floating-point numbers, not {W.dtype} {tuple(W.shape)}")
    x, n = W.reshape(-1).contiguous(), W.numel()
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=W.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=W.device)
    (pack_on_gpu if W.is_cuda else pack)(x, middles(LEVELS, W.device), codes, absmax)
    if not absmax.isfinite().all():
        raise ValueError("the matrix holds NaN or Inf")
    if not double:
        return NF4(W, codes, absmax)
    mean = absmax.double().mean().float()            # the same for any number of threads
    found, scale = nearest(absmax - mean, middles(ABSMAX_LEVELS, W.device), ABSMAX_BLOCK)
    return NF4(W, codes, found.flatten()[:len(absmax)].to(torch.uint8), scale, mean.view(1))


def pack(x, halfway, codes, absmax):
    """Fill in codes, two a byte, and absmax of x (n,): some millions at a time."""
    for i in range(0, len(x), CHUNK):
        found, largest = nearest(x[i:i + CHUNK].float(), halfway, BLOCK)
        found = found.view(-1, 2).to(torch.uint8)
        target = codes[i // 2:(i + CHUNK) // 2]
        target.copy_((found[:, 0] << 4 | found[:, 1])[:len(target)])
        absmax[i // BLOCK:(i + CHUNK) // BLOCK] = largest


WORDS = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64)}   # of one number, of two


def unpack(codes, absmax, scale, mean, levels, absmax_levels, pairs, dtype):
    """The numbers (n,) that the flat parts of an NF4 stand for (one too many if n is odd).

    On a GPU this is compiled into one kernel. It is bound by memory traffic, half a byte read and
    two written per weight, provided that both numbers of a byte are written as one word.
    """
    if scale is not None:
        absmax = spread(absmax_levels[absmax.int()], scale, ABSMAX_BLOCK) + mean
    if not codes.is_cuda or dtype.itemsize not in WORDS:
        # On a CPU, a table of pairs takes an eighth of the time of single levels.
        return spread(pairs.index_select(0, codes.int()).flatten(), absmax, BLOCK).to(dtype)
    small, wide = WORDS[dtype.itemsize]
    bits = 8 * dtype.itemsize
    first, second = (spread(levels[half.int()], absmax, BLOCK // 2).to(dtype).view(small).to(wide)
                     for half in (codes >> 4, codes & 15))
    return (first & 2**bits - 1 | second << bits).view(dtype)             # little-endian


def spread(x, scale, block):
    """x (n,), each entry times the scale (n / block,) of its block."""
    if len(x) % block:
        return x * scale.repeat_interleave(block)[:len(x)]
    return (x.view(-1, block) * scale[:, None]).flatten()


class Product(torch.autograd.Function):
    """x W^T with W in NF4. Backward needs only W and unpacks it again instead of keeping it."""

    @staticmethod
    def forward(ctx, x, Q):
        ctx.Q = Q
        return linear(x, Q.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.Q.dequantize(grad.dtype), None              # dL/dx = dL/dy W


class NF4(nn.Module):
    """A frozen tensor in four bits, made by `quantize`. Called, it computes y = x W^T, W (out, in).

    Its parts are parameters without gradients, so they move with the module. They are never
    rounded: `.to(torch.bfloat16)` of a whole network leaves them as they are. shape, dtype: of W.
    """

    bits, device = 4, property(lambda self: self.codes.device, doc="Where it is.")
    double_quant = property(lambda self: self.scale is not None, doc="Whether absmax is rounded.")
    nbytes = property(lambda self: sum(p.nbytes for p in self.parameters()), doc="All its bytes.")

    def __init__(self, W, codes, absmax, scale=None, mean=None):
        super().__init__()
        self.shape, self.dtype = W.shape, W.dtype
        row, each = W.shape[1:].numel(), (2, BLOCK, BLOCK * ABSMAX_BLOCK, W.numel())
        named = {"codes": codes, "absmax": absmax, "scale": scale, "mean": mean}
        for (name, part), n in zip(named.items(), each, strict=True):
            if part is not None:         # as rows, if each of its entries belongs to one row of W
                part = nn.Parameter(part if row % n else part.view(-1, row // n),
                                    requires_grad=False)
            self.register_parameter(name, part)
        tables = {"levels": LEVELS, "absmax_levels": ABSMAX_LEVELS, "pairs": PAIRS}
        for name, table in tables.items():
            self.register_buffer(name, table.to(codes.device), persistent=False)

    def _apply(self, fn, recurse=True):
        def moved(part):
            raw = fn(part.view(torch.uint8))
            assert raw.dtype == torch.uint8, f"an NF4 cannot be made {raw.dtype}"
            return raw.view(part.dtype)

        return super()._apply(moved, recurse)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of the original shape, in the original dtype or another."""
        parts = [p if p is None else p.detach().flatten()
                 for p in (self.codes, self.absmax, self.scale, self.mean)]
        parts[0] = parts[0].view(torch.uint8)           # while they are sharded, another dtype
        parts += self.levels, self.absmax_levels, self.pairs
        dtype, fused = dtype or self.dtype, self.codes.is_cuda and not torch.compiler.is_compiling()
        numbers = unpack_on_gpu(*parts, dtype=dtype) if fused else unpack(*parts, dtype)
        return numbers[:self.shape.numel()].view(self.shape)

    def forward(self, x):
        if torch.compiler.is_compiling():    # otherwise the compiler keeps the unpacked W
            return checkpoint(lambda x: linear(x, self.dequantize(x.dtype)), x, use_reentrant=False)
        return Product.apply(x, self)

    def checksum(self):
        """A 64-bit hash of codes, absmax, scale and mean."""
        total = 0
        for part in self.parameters():
            words = part.flatten().view(torch.uint8)
            words = pad(words, (0, -len(words) % 8)).view(torch.int64)
            mixed = words * (2 * torch.arange(len(words), device=words.device) + 1)
            total = (31 * total + (mixed ^ mixed >> 32).sum().item()) % 2**64
        return total

    def extra_repr(self):
        return f"{tuple(self.shape)}, {8 * self.nbytes / self.shape.numel():.2f} bits a weight"


# -------------------------------------------- the same in one kernel of a GPU, with the same bits

KERNELS = {}


def tried(key, make, plain, *given):
    """Call what make() compiles, which is kept under `key`. If that fails: a warning, and `plain`
    from then on."""
    try:
        if key not in KERNELS:
            KERNELS[key] = make()
        return KERNELS[key](*given)
    except Exception as e:                  # of many kinds: no triton, no C compiler, no headers
        if "out of memory" in str(e):
            raise
        why = str(e).strip().partition("\n")[0][:120]
        warnings.warn(f"NF4 could not be compiled, and takes longer: {why}", stacklevel=3)
        KERNELS[key] = plain
        return plain(*given)


def unpack_on_gpu(*parts, dtype):
    """`unpack`, compiled in a second for every size and dtype. (The checks of torch.compile at
    every call take as long as a small matrix.)"""
    def make():
        graph = make_fx(plain, tracing_mode="fake")(*parts)
        return torch._inductor.compile(graph, parts)

    plain = partial(unpack, dtype=dtype)
    sizes = (None if p is None else len(p) for p in parts[:3])
    return tried((dtype, parts[0].device, *sizes), make, plain, *parts)


def pack_on_gpu(x, halfway, codes, absmax):
    """`pack` in a tenth of the time."""
    with torch.cuda.device(x.device):
        tried(pack, triton_pack, pack, x, halfway, codes, absmax)


def triton_pack():
    """The kernel of `pack_on_gpu`. Each of its programs rounds 16 blocks of 64."""
    import triton
    from triton import language as tl

    @triton.jit
    def kernel(x, halfway, codes, absmax, n, N: tl.constexpr):
        block = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
        at = block[:, None] * 64 + tl.arange(0, 64)[None]
        y = tl.load(x + at, at < n, 0).to(tl.float32)
        largest = tl.max(tl.abs(y), 1)
        one, tiny = tl.full([N], 1.0, tl.float32), tl.full([N], 1e-38, tl.float32)
        scaled = y * tl.div_rn(one, tl.maximum(largest, tiny))[:, None]
        code = tl.zeros([N, 64], tl.int32)
        for i in tl.static_range(15):
            code += (scaled > tl.load(halfway + i)).to(tl.int32)
        high, low = tl.split(tl.reshape(code, [N, 32, 2]))
        to = block[:, None] * 32 + tl.arange(0, 32)[None]
        tl.store(codes + to, ((high << 4) | low).to(tl.uint8), to < (n + 1) // 2)
        nan = tl.sum(y * 0, 1)         # NaN where y holds NaN or Inf, which tl.max may drop; else 0
        tl.store(absmax + block, largest + nan, block * 64 < n)

    return lambda x, halfway, codes, absmax: kernel[-(-len(absmax) // 16),](
        x, halfway, codes, absmax, len(x), 16)
