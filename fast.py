# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""The same mathematics, faster.

model.py, pissa.py and train.py show every operation in its plainest PyTorch. Above some of them
stands a line `@faster(...)`. It names a function of this file that returns the same, and takes less
time or memory. Delete this file and those lines, and nothing but speed changes.

    @faster(fast.swiglu)                     swiglu(gate, up)          # the fast form
    def swiglu(gate, up):                    swiglu.plain(gate, up)    # the plain one
        return F.silu(gate) * up             with fast.off(): ...      # all plain

Each entry says what it equals and what it saves: in a training step of Llama-2-7B's shape (8 x 512
tokens, rank 128, bfloat16) on one GPU, unless it says otherwise. A form is handed all that it
needs, so this file imports nothing of ours. Second derivatives and vmap need the plain forms.
"""
import functools
import warnings
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

PLAIN = False                     # True inside `off`


def faster(fast, compiled=False):
    """Decorator of a plain function: a call runs `fast` instead, which must return the same.

    The plain function runs inside `off()`, if `fast` returns None, and inside
    torch.compile, whose own fusion is better, unless compiled=True.
    """
    def decorate(plain):
        @functools.wraps(plain)
        def function(*args):
            if PLAIN or not compiled and torch.compiler.is_compiling():
                return plain(*args)
            y = fast(*args)
            return plain(*args) if y is None else y

        function.plain = plain
        return function

    return decorate


@contextmanager
def off():
    """`with fast.off():` every `@faster` function runs in its plain form."""
    global PLAIN
    before, PLAIN = PLAIN, True
    try:
        yield
    finally:
        PLAIN = before


# ------------------------------------------------------------------- y = x W + (x A) B + bias

SKIP_OUTPUT = None                # a frozen weight: the product with it returns no numbers


class LowRank(torch.autograd.Function):
    """y = x W + (x A) B + bias, W a frozen tensor (out, in) or anything with dequantize(dtype).

    The gradients are those of autograd. With g = dL/dy:

        dL/dx = g W^T + (g B^T) A^T,    dL/dA = x^T (g B^T),    dL/dB = (x A)^T g

    Three savings: a sum of two products is accumulated by the second one, in place (10 ms). A
    quantised W stays quantised between forward and backward. If x has a `source`, (function,
    tensors, version), as `swiglu` returns it, backward computes x again.
    If W is SKIP_OUTPUT, y is returned uninitialised: `Recompute` does not read it.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, bias):
        dtype = autocast_dtype(x)
        ctx.make, kept, version = getattr(x, "source", (None, (), 0))
        if ctx.make and x._version != version:                     # x was changed in place since
            ctx.make, kept = None, ()
        ctx.W, shape, x = W, x.shape, x.reshape(-1, x.shape[-1]).to(dtype)        # x: (T, in)
        A, B = A.to(dtype), B.to(dtype)
        xA = x @ A                                                                # (T, r)
        ctx.save_for_backward(xA, A, B, *(kept or [x]))
        if W is SKIP_OUTPUT:
            return x.new_empty(*shape[:-1], len(B.T))
        bias, own = bias if bias is None else bias.to(dtype), hasattr(W, "product")
        y = W.product(x, bias) if own else F.linear(x, as_tensor(W, dtype), bias)
        # Without .view: compiled by torch 2.11, a result changed in place has no gradient.
        return y.addmm_(xA, B).view(*shape[:-1], len(B.T))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        xA, A, B, x, *more = ctx.saved_tensors
        need, shape, g = ctx.needs_input_grad, g.shape, g.reshape(-1, g.shape[-1])      # (T, out)
        gB = g @ B.T                                                              # (T, r)
        dx, own = None, hasattr(ctx.W, "product_T")
        if need[0]:
            dx = ctx.W.product_T(g) if own else g @ as_tensor(ctx.W, g.dtype)
            dx = dx.addmm_(gB, A.T).view(*shape[:-1], len(A))
        if ctx.make:
            x = ctx.make(x, *more).reshape(-1, len(A)).to(A.dtype)
        return dx, None, x.T @ gB, xA.T @ g, g.sum(0) if need[4] else None


def autocast_dtype(x):
    """The dtype that autocast wants a product with x to have, or x's own."""
    kind = x.device.type
    wanted = not x.is_meta and torch.is_autocast_enabled(kind)      # meta tensors have no autocast
    return torch.get_autocast_dtype(kind) if wanted else x.dtype


def as_tensor(W, dtype):
    """A frozen weight as a tensor of this dtype."""
    return W.to(dtype) if isinstance(W, torch.Tensor) else W.dequantize(dtype)


# ------------------------------------------------------ A and B of many weights, in groups

GROUP = 32                        # matrices that are decomposed together, at most


def pays_in_groups(weight):
    """True on a GPU, except for float16, which would need float32 copies of a group."""
    return weight.is_cuda and weight.dtype != torch.float16


def in_groups(grouped_svd):
    """A form of `principal(weight, options)` that decomposes weights of one shape together.

    One by one, a GPU waits for small factorisations: 1.42 s become 0.46 s for Llama-2-7B's 224
    matrices. options.remaining: {name: linear} of those still to be decomposed, this one first.
    options.ready: {(name, rank, niter): (A, B)}. Any other tensor is left alone.
    """
    def principal(weight, options):
        name, first = next(iter(options.remaining.items()), (None, None))
        if not (first and pays_in_groups(weight) and first.weight.data_ptr() == weight.data_ptr()
                and like(first.weight, weight)):
            return None
        key, ready = (options.rank, options.niter), options.ready
        if options.niter is not None and (name, *key) not in ready:
            group = [((n, *key), m.weight.detach().T) for n, m in options.remaining.items()
                     if (n, *key) not in ready and like(m.weight, weight)][:GROUP]
            factors = grouped_svd([W for _, W in group], options.rank, niter=options.niter,
                                  generator=options.generator)
            for (n, _), u, s, v in zip(group, *factors, strict=True):
                ready[n] = (u * s.sqrt()).contiguous(), (s.sqrt()[:, None] * v).contiguous()
        return ready.pop((name, *key), None)

    return principal


def like(a, b):
    """True for two tensors of one shape, layout, dtype and device."""
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


# ----------------------------------------------------------------------------- RoPE and SwiGLU

LARGE, KERNELS = 2**22, {}        # entries of x from which compiling pays; {formula: compiled}
BLOCK, WARPS = 1024, 8            # of a row: entries at a time, and groups of 32 threads
SILU = F.silu, torch.ops.aten.silu_backward
GELU = [functools.partial(f, approximate="tanh") for f in (F.gelu, torch.ops.aten.gelu_backward)]


def rotate(x, cos, sin):
    """x cos + (x, its halves exchanged) sin, in float32; x (B, T, H, K), tables (B, T, 1, K).

    The gradient rotates back and needs the tables alone, so x is not kept. Saves 28 ms.
    """
    if torch.is_inference_mode_enabled():              # shapes change at every step: do not compile
        return rotate_eager(x, cos, sin)
    return Rotate.apply(x, cos, sin)


class Rotate(torch.autograd.Function):
    """`rotate` with its gradient."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return (rotate_fused if worth_compiling(x) else rotate_eager)(x, cos, sin)

    @staticmethod
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return (rotate_fused if worth_compiling(g) else rotate_eager)(g, cos, -sin), None, None


def worth_compiling(x):
    """True for a large x on a GPU for which triton makes kernels."""
    return x.numel() >= LARGE and is_ampere(x.device)


def is_ampere(device):
    """True on a GPU that computes in bfloat16 (Ampere or newer). torch.compile can trace it."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8


def has_float8(device):
    """True on a GPU that multiplies float8 (Ada, Hopper or newer)."""
    if device.type != "cuda":
        return False
    gpu = torch.cuda.get_device_properties(device)
    return (gpu.major, gpu.minor) >= (8, 9)


def rotate_eager(x, cos, sin):
    """In two operations per half."""
    (a, b), y = x.chunk(2, -1), torch.empty_like(x)
    (first, second), (c, d), (s, t) = (z.chunk(2, -1) for z in (y, cos, sin))
    torch.addcmul(a * c, b, s, out=first)
    torch.addcmul(b * d, a, t, out=second)
    return y


def rotate_formula(x, cos, sin):
    """The definition, for the compiler."""
    y = x.float()
    return (y * cos + y.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def rotate_fused(x, cos, sin):
    """In one kernel: nine times faster."""
    return fused(rotate_formula, rotate_eager, x.detach(), cos, sin)


def fused(formula, plain, *tensors):
    """formula(*tensors) in one kernel, compiled in a few seconds. Without a compiler, plain's."""
    # With autocast off, forward, backward and recomputation share one compiled graph.
    with torch.autocast(tensors[0].device.type, enabled=False, cache_enabled=True):
        return tried(formula, plain, *tensors)


def tried(formula, plain, *tensors):
    """What is compiled of `formula`, or if that does not work, `plain` from now on."""
    try:
        if formula not in KERNELS:
            KERNELS[formula] = torch.compile(formula)
        return KERNELS[formula](*tensors)
    except Exception as e:                  # of many kinds: no triton, no C compiler, no headers
        if "out of memory" in str(e):
            raise
        why = f"takes longer: {str(e).strip().partition(chr(10))[0][:120]}"
        warnings.warn(f"{plain.__name__} could not be compiled, and {why}", stacklevel=3)
        KERNELS[formula] = plain
        return plain(*tensors)


def fused_rows(formula, x, s=None):
    """formula(x, s), `fp8.by_rows`, in one kernel. Without triton, formula's own operations."""
    if not has_float8(x.device):
        return None
    KERNELS.setdefault(formula, rounded_rows)
    return tried(formula, formula, x, s)


def rounded_rows(x, s):
    """Codes and scales of x (n, k), times s (1, k) if given. A launch by triton takes the host 0.05
    ms, a call of a compiled function 0.13, and a step needs two for each matrix in eight bits."""
    x, n, k = x.contiguous(), *x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = torch.empty(n, 1, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        row_kernel()[n,](x, x if s is None else s.contiguous(), codes, scale, k, s is not None,
                         BLOCK, num_warps=WARPS)
    return codes, scale


@functools.cache
def row_kernel():
    """A program for a row: its largest magnitude, then its codes. The second reading is from L1."""
    import triton
    from triton import language as tl

    @triton.jit
    def kernel(x, s, codes, scale, k: tl.constexpr, SCALED: tl.constexpr, N: tl.constexpr):
        row, largest = tl.program_id(0).to(tl.int64), tl.zeros([N], tl.float32)
        for start in range(0, k, N):
            at = start + tl.arange(0, N)
            y = tl.load(x + row * k + at, at < k, 0).to(tl.float32)
            if SCALED:
                y *= tl.load(s + at, at < k, 0)
            largest = tl.maximum(largest, tl.abs(y))
        a = tl.maximum(tl.div_rn(tl.max(largest), 448.0), 1e-30)
        tl.store(scale + row, a)
        for start in range(0, k, N):
            at = start + tl.arange(0, N)
            y = tl.load(x + row * k + at, at < k, 0).to(tl.float32)
            if SCALED:
                y *= tl.load(s + at, at < k, 0)
            tl.store(codes + row * k + at, tl.div_rn(y, a).to(tl.float8e4nv), at < k)

    return kernel


def swiglu(gate, up, gelu=False):
    """silu(gate) * up, or gelu(gate) * up. Backward computes silu(gate) again, which is quick,
    instead of keeping it, and the product, if a `LowRank` one takes it: 5.4 GiB less."""
    act, slope = GELU if gelu else SILU
    y = SwiGLU.apply(gate, up, act, slope)
    if not y.is_inference():
        y.source = lambda gate, up: act(gate) * up, (gate.detach(), up.detach()), y._version
    return y


class SwiGLU(torch.autograd.Function):
    """`swiglu` with its gradient."""

    @staticmethod
    def forward(ctx, gate, up, act, slope):
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.slope = act, slope
        return act(gate) * up                  # in place, torch 2.11 compiles it without a gradient

    @staticmethod
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        return ctx.slope(g * up, gate), ctx.act(gate).mul_(g), None, None


# ----------------------------------------------------------------------------------- attention

# From torch 2.12 on, varlen_attn must be told of grouped heads. (torch.__version__ compares as a
# version, not as a string.)
GROUPED = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}


def attend(q, k, v, mask):
    """Attention of grouped heads under a mask, q (B, H, T, K), k and v (B, G, S, K) -> (B, T, H K).

    The kernels of scaled_dot_product_attention take a mask or grouped heads, not both. So the H / G
    query heads of a group become rows of one head. Saves copies of the KV cache in generation.
    """
    B, H, T, K = q.shape
    G = k.shape[1]
    if mask is None and T > 1 or H == G:
        return None
    q = q.reshape(B, G, -1, K)                                                # (B, G, H/G T, K)
    if mask is not None:                       # a row for each query head; for T = 1 without a copy
        mask = mask.expand(-1, -1, H // G, -1) if T == 1 else mask.repeat(1, 1, H // G, 1)
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return y.reshape(B, H, T, K).transpose(1, 2).reshape(B, T, -1)


def attend_packed(q, k, v, mask, where_text, starts, B, T, window):
    """Attention of B packed texts, each to itself, by flash attention, which takes them packed.

    q (1, H, P, K), k and v (1, G, P, K) -> (1, P, H K). On a GPU, in 16 bits: the texts are not
    padded for it. A packed step takes 2.3 GiB less.
    """
    if not takes_flash(q):
        return None
    from torch.nn.attention.varlen import varlen_attn  # takes a second, and only GPUs need it
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))                   # (P, H or G, K)
    y = varlen_attn(q, k, v, starts, starts, T, T, window_size=(window - 1, 0), **GROUPED)
    return y.flatten(1)[None]


def takes_flash(q):
    """True if flash attention is made for q (..., K)."""
    return is_ampere(q.device) and fits_flash(q.dtype, q.shape[-1])


def fits_flash(dtype, head_dim):
    """True for 16 bits and heads of a width that flash attention takes."""
    return dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256


class Rows(torch.autograd.Function):
    """x[index], x (N, D). No index occurs twice, so backward copies instead of adding up."""

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.n = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, g):
        return g.new_zeros(ctx.n, g.shape[1]).index_copy_(0, *ctx.saved_tensors, g), None


# -------------------------------------------------------------------------------- recomputation

class Recompute(torch.autograd.Function):
    """layer(x, *rest) that keeps x alone: backward computes the layer again.

    Like torch.utils.checkpoint, without its hooks on saved tensors, whose Python takes longer than
    a GPU needs for one layer (56 ms a step of one row). A layer ends in x + mlp.down_proj(...). No
    gradient needs that sum, so backward skips the product with the frozen weight of down_proj, if
    it is a `LowRank` one. trained: parameters that want a gradient. Hooks on them run twice.
    """

    @staticmethod
    def forward(ctx, x, layer, rest, *trained):
        ctx.layer, ctx.rest = layer, rest
        kind = "cpu" if x.is_meta else x.device.type                 # meta tensors have no autocast
        ctx.autocast = (kind, torch.get_autocast_dtype(kind),
                        torch.is_autocast_enabled(kind), False)
        ctx.save_for_backward(x, *trained)
        with torch.autocast(*ctx.autocast):         # keeps no copies of weights, each is used once
            return layer(x, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        global SKIP_OUTPUT
        x, *trained = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[0])
        try:
            mlp = ctx.layer.mlp
            if not (mlp._forward_hooks or mlp.down_proj._forward_hooks):     # these would read it
                SKIP_OUTPUT = getattr(mlp.down_proj, "frozen", None)
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.layer(x, *ctx.rest)
        finally:
            SKIP_OUTPUT = None
        wanted = [t for t in (x, *trained) if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, g, allow_unused=True))
        dx, *grads = (next(found) if t.requires_grad else None for t in (x, *trained))
        return dx, None, None, *grads


def recompute(layer, x, *rest):
    """layer(x, *rest) by `Recompute`: 15 GiB less for 85 ms more."""
    return Recompute.apply(x, layer, rest, *(p for p in layer.parameters() if p.requires_grad))


# ------------------------------------------------------------------------------------- the loss

CHUNK = 2**25                     # logits computed at a time: 128 MiB in float32


class ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of head(x), x (M, D), and targets (M,), `rows` of M at a time.

    The gradient of a chunk is taken along with its loss, then its logits go. So (M, V) never
    exists, and nothing is computed twice. trained: the parameters of `head` that want a gradient.
    """

    @staticmethod
    def forward(ctx, head, rows, x, targets, *trained):
        total, wanted = 0.0, any(ctx.needs_input_grad)
        dx, grads = torch.zeros_like(x), [torch.zeros_like(p) for p in trained]
        for part, target, d in zip(*(t.split(rows) for t in (x, targets, dx)), strict=True):
            with torch.set_grad_enabled(wanted):
                part = part.detach().requires_grad_(wanted)
                loss = F.cross_entropy(head(part).float(), target, reduction="sum")
            if wanted:
                found = torch.autograd.grad(loss, [part, *trained])
                for kept, new in zip([d, *grads], found, strict=True):
                    kept += new
            total += loss.detach()
        ctx.save_for_backward(dx, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, *grads = (d * g for d in ctx.saved_tensors)
        return None, None, dx, None, *grads


def chunked_loss(head, x, targets):
    """Sum of the cross-entropies of head(x) and targets, by `ChunkedLoss`: 1 GiB less."""
    trained = [p for p in head.parameters() if p.requires_grad and torch.is_grad_enabled()]
    return ChunkedLoss.apply(head, max(1, CHUNK // head.weight.shape[0]), x, targets, *trained)


# --------------------------------------------------------------------------------- the optimizer

SMALL, MANY = 2**22, 2**24          # numbers


def joined(weights):
    """The same numbers in fewer parameters, each with `parts`: those of `weights` it is made of.

    Parts become views of it, and their gradients are to be put together. For the gradient's norm
    and AdamW the host then has 20 tensors instead of 448, and a message between two GPUs is one of
    them. A step of two H200 takes 250 ms instead of 255. On one the gain is lost in the noise.
    """
    groups, size = [], MANY
    for p in weights:
        new = MANY if p.numel() > SMALL else p.numel()                     # a large one is alone
        if size + new > MANY:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += new
    return [group[0] if len(group) == 1 else join(group) for group in groups]


def join(group):
    """One parameter of several."""
    whole = torch.nn.Parameter(torch.cat([p.data.flatten() for p in group]))
    for p, view in zip(group, whole.data.split([p.numel() for p in group]), strict=True):
        p.data = view.view_as(p)
    whole.parts = group
    return whole


# ----------------------------------------------------------------------------------- generation

def record(step, tokens, last):
    """`step(tokens, start)` as one CUDA graph, recorded here and replayed at every call.

    A step is hundreds of small kernels. A GPU runs them faster than Python launches them: 16 tokens
    a second become 129 (7B, one row). tokens: (B, 1), for the shape. last: the cache's last
    position. Recording writes there, and nothing reads it before its own token is written.
    """
    if tokens.device.type != "cuda":
        return None
    tokens = torch.zeros_like(tokens)              # a graph reads and writes fixed addresses
    start = torch.full((1,), last, device=tokens.device)
    stream, graph = torch.cuda.Stream(tokens.device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(tokens.device))
    with torch.cuda.stream(stream):                # once before: libraries allocate workspaces
        step(tokens, start)
    torch.cuda.current_stream(tokens.device).wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):   # of this device, with those workspaces
        logits = step(tokens, start)

    def replay(new, position):
        tokens.copy_(new)
        start.fill_(position)
        graph.replay()
        return logits

    return replay
