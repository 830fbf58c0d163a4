"""SVDQuant: weights and activations in four bits, outliers in 16 (arXiv 2411.05007).

A large entry widens the levels of all that are rounded with it. So outliers of the inputs x go over
to W by a factor lambda for each input, and those of W go into A B, as principal components do in
QPiSSA. With W (in, out), for inputs that are rows x:

    x^ = x / lambda,    W^ = lambda W,    L1 L2 = SVD_r(W^),    R = W^ - L1 L2,

    y = Q(x^) Q(R) + (x^ L1) L2 + bias                  L1 (in, r), L2 (r, out) in bfloat16

    Q(v) = s round(v / s),    s = max |v| / 7 of 64 neighbours along `in`,    -7 ... 7: four bits

    lambda_i = max |x_i|^a / max |W_i|^(1 - a) over calibration inputs and over outputs

a is the one of ALPHAS whose y has the least error on the calibration inputs. lambda = 1 is among
them. In the paper it is searched likewise, and lambda goes into the norm before, so it is the same
for q, k and v. Here each matrix has its own. The paper can repeat the SVD by turns, as LoftQ does,
and uses GPTQ on top: not here. Its networks are diffusion models.

It is evaluated, not trained: `python -m bench.bench_svdquant` makes the table. Four bits are
simulated in float32, s is not rounded. So this shows what is lost, not how fast it could be.

Cost: an SVD for each of ALPHAS and matrix. At inference 4 bits and two thin products in 16 bits.
"""
import torch
import torch.nn.functional as F
from torch import nn

import pissa
from svd import full_float32

STATISTIC = "inputs"
GROUP, LARGEST = 64, 7
ALPHAS = (None, 0.0, 0.25, 0.5, 0.75, 1.0)                                # None: lambda = 1


def reduce(before, x, options):
    """Of every micro-batch's inputs (tokens, in) some 64 rows: (rows, in) float32."""
    x = x[::max(1, len(x) // 64)].float()
    return x if before is None else torch.cat([before, x])


def four_bits(v):
    """v (..., in), rounded to 15 levels in groups of 64 along the last dimension. Groups of zeros
    stay zeros."""
    groups = F.pad(v, (0, -v.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    s = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST
    return ((groups / s).round() * s).flatten(-2)[..., :v.shape[-1]]


def smoothing(x, weight, alpha):
    """lambda (in,) for inputs x (rows, in) and weight (out, in)."""
    if alpha is None:
        return weight.new_ones(weight.shape[1])
    largest_x, largest_w = (M.abs().amax(0).clamp(min=1e-5) for M in (x, weight))
    return largest_x ** alpha / largest_w ** (1 - alpha)


class W4A4(nn.Module):
    """y = Q(x^) Q(R) + (x^ L1) L2 + bias, in place of an nn.Linear. rank 0: without L1 L2."""

    @full_float32()
    def __init__(self, linear, x, rank, alpha):
        super().__init__()
        weight = linear.weight.detach().float()
        self.lambda_, self.bias = smoothing(x, weight, alpha), linear.bias
        R = weight * self.lambda_                                                # W^, (out, in)
        self.L1, self.L2 = R.new_zeros(R.shape[1], rank), R.new_zeros(rank, R.shape[0])
        if rank:
            halves = pissa.principal(R, pissa.Options(rank))
            self.L1, self.L2 = (M.bfloat16().float() for M in halves)
        self.R = four_bits(R - (self.L1 @ self.L2).T)

    def forward(self, x):
        x_ = x.float() / self.lambda_
        y = F.linear(four_bits(x_), self.R, self.bias) + (x_ @ self.L1) @ self.L2
        return y.to(x.dtype)


@torch.no_grad()
def error(linear, made, x):
    """|y' - y| / |y| of a module `made` of an nn.Linear, for inputs x (rows, in)."""
    y = linear(x.to(linear.weight.dtype)).float()
    return ((made(x) - y).norm() / y.norm().clamp(min=1e-30)).item()


def quantised(linear, x, rank=32, alphas=ALPHAS):
    """The W4A4 with the least error for calibration inputs x (rows, in). ValueError for a rank that
    the matrix does not have."""
    if not 0 <= rank <= min(linear.weight.shape):
        raise ValueError(f"svdquant: rank {rank} is not between 0 and {min(linear.weight.shape)}")
    made = [W4A4(linear, x, rank, alpha) for alpha in alphas]
    return min(made, key=lambda m: error(linear, m, x)) if len(made) > 1 else made[0]


def targets(net):
    """{name: nn.Linear} of the layers of `net` that are put in four bits."""
    return pissa.find_linears(net, pissa.TARGETS)
