# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""QPiSSA and its kin: the residual in four or eight bits, A B kept out of the rounding.

QLoRA (arXiv 2305.14314) freezes Q = nf4(W) and trains a LoRA beside it. QPiSSA (arXiv 2404.02948,
section 4) freezes Q = nf4(W - A B). The principal components are the part of W with the largest
entries. Without it, blocks of weights are narrower and their levels closer, so rounding loses less.
What rounding lost, W - Q - A B, can be looked for again, by turns (LoftQ, arXiv 2310.08659):

    Q <- nf4(W - A B),    A B <- SVD_r(W - Q)     LoftQ begins with A B = 0, QPiSSA with SVD_r(W)

    paper       code         shape
    W           weight       (in, out), y = x W; here as nn.Linear stores it, (out, in)
    Q           frozen       an nf4.NF4 of the shape of `weight`; with bits=8 an fp8.FP8
    A, B        A, B         (in, r), (r, out); float32, trained
    A_q, B_q    subtracted   the factors subtracted before the last rounding: Q = nf4(W - A_q B_q)
                             can be computed again, so Q need not be saved

These are methods for `pissa.inject`, which imports this file when one is asked for.
"""
from dataclasses import replace

import torch

import nf4
from svd import full_float32, multiplies_in_bfloat16, randomized_svd


def init_qpissa(weight, options):
    """QPiSSA: the principal components of W are not rounded."""
    A, B = factors(weight, options)
    # W - Q is A B and what rounding lost. Its leading singular values are well separated, so two
    # iterations are enough.
    return alternate(weight, A, B, replace(options, niter=options.niter and min(options.niter, 2)))


def init_loftq(weight, options):
    """LoftQ: A B makes up for what rounding W lost."""
    (n_out, n_in), dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)
    if options.quant_iters == 1 and not options.last_svd:
        raise ValueError("loftq begins with A B = 0, and one turn without the last SVD ends there, "
                         "too: nothing would ever be trained; quant_iters should be 2 or more")
    return alternate(weight, weight.new_zeros(n_in, options.rank, dtype=dtype),
                     weight.new_zeros(options.rank, n_out, dtype=dtype), options)


def init_qlora(weight, options):
    """QLoRA: A ~ N(0, 1/in), B = 0, Q = nf4(W)."""
    (n_out, n_in), dtype = weight.shape, torch.promote_types(weight.dtype, torch.float32)
    A = torch.randn(n_in, options.rank, generator=options.generator, device=weight.device,
                    dtype=dtype)
    return (quantize(weight, options.bits, options.double_quant), A * n_in ** -0.5,
            A.new_zeros(options.rank, n_out), None)


@full_float32()
def alternate(weight, A, B, options):
    """Q <- nf4(W - A B) and A B <- SVD_r(W - Q) by turns, until |W - Q - A B| falls no more.

    At most options.quant_iters turns (LoftQ's Algorithm 1). The authors of PiSSA stop before the
    last SVD, when A B is still what was subtracted to get Q: options.last_svd=False stops there.
    Returns Q, A, B and the pair that was subtracted. Raises ValueError for less than one turn.
    """
    if options.quant_iters < 1:
        raise ValueError(f"quant_iters should be at least 1, not {options.quant_iters}")
    if options.generator:     # a copy, so that the number of turns does not change the next matrix
        options = replace(options, generator=options.generator.clone_state())
    best = None
    for _ in range(options.quant_iters):
        Q, subtracted = rounded(weight, A, B, options.bits, options.double_quant), (A, B)
        rest = Q.dequantize(A.dtype).neg_().add_(weight)                          # W - Q
        # GPUs multiply bfloat16 ten times as fast, and a W in bfloat16 has no more digits itself.
        A, B = factors(rest.to(weight.dtype) if multiplies_in_bfloat16(weight) else rest, options)
        kept = (A, B) if options.last_svd else subtracted
        error = rest.addmm_(kept[1].T, kept[0].T, alpha=-1).norm().item()
        del rest                                  # as large as W, and the next turn makes a new one
        if best and error >= best[0]:
            break
        best = error, Q, *kept, subtracted
    return best[1:]


def factors(weight, options):
    """A = U_r S_r^1/2 and B = S_r^1/2 V_r^T of `weight` (out, in)."""
    U, S, Vh = randomized_svd(weight.T, options.rank, niter=options.niter,
                              generator=options.generator)
    return (U * S.sqrt()).contiguous(), (S.sqrt()[:, None] * Vh).contiguous()


@full_float32()
def rounded(weight, A, B, bits, double_quant):
    """Q = nf4(W - A B), where W - A B is float32 whatever the dtype of `weight` (out, in)."""
    W = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    Q = quantize(W.addmm_(B.T, A.T, alpha=-1), bits, double_quant)
    Q.dtype = weight.dtype
    return Q


def quantize(W, bits, double_quant):
    """W in four bits, or in eight."""
    if bits == 8:
        import fp8
        return fp8.quantize(W)
    return nf4.quantize(W, double_quant)
