# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""Frozen weights and their products in eight bits, on tensor cores that multiply float8.

A number in E4M3 has a sign, 4 bits of exponent and 3 of mantissa: the largest is 448, and rounding
changes a number by 3 % at most. Tensor cores multiply such numbers twice as fast as bfloat16. A row
of W gets one scale, so that its largest entry becomes 448, and a row of x likewise:

    W_ij ~ s_i codes_ij,    x_tj ~ a_t x8_tj,    y_ti = a_t s_i sum_j x8_tj codes_ij

For dL/dx = g W the sum goes over the rows i of W. So s_i is multiplied into g before g is rounded,
and the same codes serve again:

    s_i g_ti ~ b_t g8_ti,    dx_tj = b_t sum_i g8_ti codes_ij

    paper, code    shape, for W (out, in) and x (T, in)
    codes          (out, in) float8_e4m3fn
    codes_T        (in, out), the same numbers: the cores read both factors along the sum
    scale          (out, 1) float32, s

Both copies together take sixteen bits a weight, as bfloat16 does. PiSSA's principal components are
not part of W here, so its rows are narrower and rounding loses less. On a CPU, or a GPU without
such cores, the rounded numbers are the same and are multiplied as float32 or bfloat16.

    Q = fp8.quantize(W);  y = Q(x);  Q.dequantize(torch.float32)
"""
import torch
from torch import nn

import fast
import nf4
from fast import faster

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max                                                             # 448
CHUNK = 1 << 22                          # entries quantised at a time: bounds the memory it takes


@faster(lambda x, s=None: fast.fused_rows(by_rows.plain, x, s))
def by_rows(x, s=None):
    """x (n, k), times s (1, k) if given, as codes (n, k) in E4M3 and scales (n, 1) in float32."""
    x = x.float() if s is None else x.float() * s
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-30)
    return (x / scale).to(E4M3), scale


def on_cores(codes):
    """True if the GPU multiplies float8, and the shape suits it."""
    return fast.has_float8(codes.device) and not any(n % 16 for n in codes.shape)


def multiply(x, a, codes, s, dtype):
    """a x codes^T s: x (T, k) and codes (n, k) in E4M3, a (T, 1), s (1, n). Returns (T, n)."""
    if dtype == torch.bfloat16 and on_cores(codes):
        return torch._scaled_mm(x, codes.T, scale_a=a, scale_b=s, out_dtype=dtype,
                                use_fast_accum=True)
    exact = dtype if dtype == torch.bfloat16 and codes.is_cuda else torch.float32    # of codes
    y = (x.to(exact) @ codes.to(exact).T) * a * s
    # Compiled by torch 2.11, a cast that changes nothing, at the end, loses the gradient.
    return y if y.dtype == dtype else y.to(dtype)


def product(x, codes, scale):
    """x W^T of x (T, in)."""
    return multiply(*by_rows(x), codes, scale.T, x.dtype)


def product_T(g, codes_T, scale):
    """g W of g (T, out)."""
    return multiply(*by_rows(g, scale.T), codes_T, scale.new_ones(1, len(codes_T)), g.dtype)


class Product(torch.autograd.Function):
    """x W^T and its gradient g W, in eight bits. x (T, in), g (T, out)."""

    @staticmethod
    def forward(ctx, x, codes, codes_T, scale):
        ctx.save_for_backward(codes_T, scale)
        return product(x, codes, scale)

    @staticmethod
    def backward(ctx, g):
        return product_T(g, *ctx.saved_tensors), None, None, None


@torch.no_grad()
def quantize(W: torch.Tensor) -> "FP8":
    """An FP8 of a matrix W (out, in) of any floating dtype.

    Raises ValueError for NaN or Inf in W, or what is no matrix of floats.
    """
    if not W.is_floating_point() or W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"FP8 needs a matrix of floats, not {W.dtype} {tuple(W.shape)}")
    both = torch.empty(2, W.numel(), dtype=E4M3, device=W.device)  # torch rounds up each block
    codes, codes_T = both[0].view(W.shape), both[1].view(W.T.shape)
    scale = torch.empty(len(W), 1, device=W.device, dtype=torch.float32)
    rows = max(1, CHUNK // W.shape[1])
    for part, *made in zip(*(t.split(rows) for t in (W, codes, scale)), strict=True):
        for target, found in zip(made, by_rows.plain(part), strict=True):
            target.copy_(found)
    if not scale.isfinite().all():
        raise ValueError("the matrix holds NaN or Inf")
    return FP8(codes, codes_T.copy_(codes.T), scale, W.dtype)


class FP8(nn.Module):
    """A frozen matrix in eight bits, made by `quantize`. Called, it computes y = x W^T.

    Its parts are parameters without gradients, which keep their dtypes in `.to(torch.bfloat16)`.
    """

    shape = property(lambda self: self.codes.shape, doc="Of W, (out, in).")
    bits, device = 8, property(lambda self: self.codes.device, doc="Where it is.")
    nbytes = property(lambda self: sum(p.nbytes for p in self.parameters()), doc="All its bytes.")
    checksum = nf4.NF4.checksum

    def __init__(self, codes, codes_T, scale, dtype):
        super().__init__()
        parts = {"codes": codes, "codes_T": codes_T, "scale": scale}
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.dtype = dtype

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda part: fn(part.view(torch.uint8)).view(part.dtype), recurse)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """s * codes, (out, in), in the dtype of W or another."""
        return self.codes.float().mul_(self.scale).to(dtype or self.dtype)

    def product(self, x, bias=None):
        """x W^T + bias of x (T, in), without a gradient."""
        y = product(x, self.codes, self.scale)
        return y if bias is None else y.add_(bias)

    def product_T(self, g):
        """g W of g (T, out), without a gradient."""
        return product_T(g, self.codes_T, self.scale)

    def forward(self, x):
        x = x.to(fast.autocast_dtype(x))
        y = Product.apply(x.reshape(-1, x.shape[-1]), self.codes, self.codes_T, self.scale)
        return y.view(*x.shape[:-1], len(self.codes))

    def extra_repr(self):
        return f"{tuple(self.shape)}, {8 * self.nbytes / self.codes.numel():.2f} bits a weight"
