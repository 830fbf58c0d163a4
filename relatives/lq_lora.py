"""LQ-LoRA: four bits beside A B, with errors weighted by how much they matter (arXiv 2311.12023).

In QPiSSA's |W - Q - A B| all entries count alike. LQ-LoRA weights them with the Fisher information
F = E[(dL/dW)^2]. A weighted SVD has no closed form. For it, F is replaced by its row and column
means, the diagonal matrices D_in and D_out. With W (in, out), from Q = 0, by turns,

    A' B' = SVD_r(D_in (W - Q) D_out),    A = D_in^-1 A',  B = B' D_out^-1,    Q = nf4(W - A B),

until |F^1/2 * (W - Q - A B)| rises. The turn before that is kept. y = x Q + (x A) B.
F is first divided by its mean. D_in and D_out hold the square roots of its means over outputs and
over inputs, as in the authors' code, at least 0.001. If F = 1, this is QPiSSA with last_svd=False.
The authors allow 100 turns, here --quant-iters.

Mixed precision: with the error c_ij of matrix i in configuration j and its bits b_ij, `programme`
finds x_ij of 0 and 1 with the least sum c x and sum b x <= budget, one j per i. It only reports a
choice: what is trained has nf4.py's 4.13 bits, or 4.5.

Cost: QPiSSA's, and at the start backward passes on all weights in 16 bits, F in host memory, a mean
over micro-batches: with `--micro-batch 1` most hold one example.
"""
from dataclasses import replace

import torch

import nf4
import pissa
import qpissa
import relatives
from svd import full_float32

STATISTIC, EXAMPLES = "gradients", 64
CONFIGURATIONS = [(bits, block) for bits in (2, 3, 4) for block in (16, 32, 64)]


def reduce(before, G, options):
    """The sum of G^2, (out, in) in host memory."""
    F = G.to("cpu", torch.promote_types(G.dtype, torch.float32)).square()
    return F if before is None else before.add_(F)


def init(weight, options):
    """weight (out, in), options with statistic F (out, in) -> Q, A (in, r), B (r, out), (A, B)."""
    return decompose(weight, relatives.given(options), options,
                     lambda A, B: qpissa.rounded(weight, A, B, 4, options.double_quant))


@full_float32()
def decompose(weight, F, options, rounded):
    """The turns above: Q = rounded(A, B), A, B, (A, B). ValueError for less than one turn."""
    if options.quant_iters < 1:
        raise ValueError(f"quant_iters should be at least 1, not {options.quant_iters}")
    F = F.to(weight.device, torch.promote_types(weight.dtype, torch.float32)).clamp(min=0)
    F = (F / F.mean()).nan_to_num(1)                                    # F = 0: no entry matters
    D_out, D_in = (F.mean(dim).sqrt().clamp(min=1e-3) for dim in (1, 0))
    best, rest = None, weight.to(F.dtype)
    for _ in range(options.quant_iters):
        A, B = qpissa.factors(D_out[:, None] * rest * D_in, options)
        A, B = A / D_in[:, None], B / D_out
        Q = rounded(A, B)
        rest = weight - pissa.as_tensor(Q)                                               # W - Q
        error = (F.sqrt() * (rest - (A @ B).T)).norm().item()
        if best and error >= best[0]:
            break
        best = error, Q, A, B
        options = replace(options, niter=options.niter and min(options.niter, 2))   # as in QPiSSA
    return *best[1:], best[2:]


def normal_float(W, bits, block):
    """W rounded to 2^bits levels in blocks, simulated. Levels as those of NF4, if bits is 4."""
    n = 2 ** (bits - 1)
    below, above = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, k, **nf4.HOST)[:-1])
                    for k in (n, n + 1))
    levels = torch.cat([-below, torch.zeros(1), above.flip(0)]).div_(above.max()).to(W.device)
    codes, absmax = nf4.nearest(W.flatten().float(), (levels[1:] + levels[:-1]) / 2, block)
    return (levels[codes] * absmax[:, None]).flatten()[:W.numel()].view(W.shape)


def bits_of(bits, block):
    """Bits a weight: its code, and its shares of 8 bits of absmax and of 32 of their scale."""
    return bits + 8 / block + 32 / block / nf4.ABSMAX_BLOCK


def errors(weight, F, options, configurations=CONFIGURATIONS):
    """|F^1/2 * (W - Q - A B)|^2 of a matrix (out, in) in each configuration (bits, block)."""
    found = []
    for chosen in configurations:
        Q, A, B, _ = decompose(weight, F, options, lambda A, B, chosen=chosen: normal_float(
            pissa.residual(weight.float(), A, B), *chosen))
        found.append((F * (weight - Q - (A @ B).T).square()).sum().item())
    return found


def programme(found, sizes, budget, configurations=CONFIGURATIONS):
    """The configuration of each matrix, a list. found: what `errors` returns of each. sizes: how
    many weights each has. budget: bits a weight, of all. ValueError if no choice meets it.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ValueError("mixed precision needs scipy: pip install scipy") from None
    c, n, bits = (torch.tensor(v, dtype=torch.float64) for v in (
        found, sizes, [bits_of(*chosen) for chosen in configurations]))
    cost = LinearConstraint(torch.outer(n / n.sum(), bits).flatten(), ub=budget)
    one_each = LinearConstraint(torch.eye(len(c)).repeat_interleave(len(bits), 1), 1, 1)
    solved = milp((c / c.max().clamp(min=1e-300)).flatten(), integrality=1, bounds=Bounds(0, 1),
                  constraints=[cost, one_each])
    if solved.x is None:
        raise ValueError(f"no choice has {budget:g} bits a weight: the least is {bits.min():.3f}")
    return [configurations[j] for j in torch.from_numpy(solved.x).view(c.shape).argmax(1).tolist()]
