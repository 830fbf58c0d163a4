"""CorDA: decompose W as it acts on the inputs that it meets (arXiv 2406.05223).

An SVD of W treats all inputs alike. CorDA measures C = E[x^T x] of a layer's inputs on a few
examples, and decomposes W^T C. With W^T (out, in), as the paper has it:

    W^T C = U S V^T,    so W^T = U S (V^T C^-1),
    A = C^-1 V_k S_k^1/2,    B = S_k^1/2 U_k^T,    W_res = W - A B,    y = x W_res + (x A) B

instruction mode (the default): k are the first r triplets, those that matter most to the examples.
Measure what is to be learnt. knowledge mode (`--option mode=knowledge`): k are the last r ones.
Measure what is to be kept: for such inputs x, x A B is almost 0. train.py measures its training
data in both modes, so for the second one --data should hold such text, too.

C is made invertible by 0.01 of the mean of its diagonal, added to the diagonal. The authors double
that until the inverse in float32 is good. In float64, as here, it always is. Their code divides the
inputs of each example by their largest entry, so examples count differently in C than here.

Cost: training as PiSSA. At the start, forward passes. Meanwhile one C, in * in float32 numbers, is
held for each distinct input. Then a randomized SVD in float64, or in knowledge mode an exact one.
"""
import torch

import pissa
import relatives
from svd import fix_signs, randomized_svd

STATISTIC, EXAMPLES = "inputs", 256
OPTIONS = {"mode": "instruction"}
CHOICES = {"mode": ("instruction", "knowledge")}


def init(weight, options):
    """weight (out, in), options with statistic C (in, in) -> W_res (out, in), A (in, r),
    B (r, out), (A, B)."""
    C, r = relatives.given(options).to(weight.device, torch.float64), options.rank
    C = C + (0.01 * C.diagonal().mean() + 1e-30) * torch.eye(len(C), device=C.device)
    if options.own["mode"] == "instruction":
        U, S, Vh = randomized_svd(weight.double() @ C, r, niter=options.niter,
                                  generator=options.generator)
    else:
        U, S, Vh = fix_signs(*torch.linalg.svd(weight.double() @ C, full_matrices=False))
        U, S, Vh = U[:, -r:], S[-r:], Vh[-r:]
    A, B = torch.linalg.solve(C, Vh.T * S.sqrt()), S.sqrt()[:, None] * U.T
    A, B = (M.to(torch.promote_types(weight.dtype, torch.float32)) for M in (A, B))
    return pissa.residual(weight, A, B), A, B, (A, B)
