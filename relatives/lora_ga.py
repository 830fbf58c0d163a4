"""LoRA-GA: begin so that the first step goes where full fine-tuning would (arXiv 2407.05000).

A few training examples give the gradient G = dL/dW (in, out). A first step changes A B along
G B^T B + A A^T G. That is nearest to G if A holds r of its 2 r leading left singular vectors and B
the r right ones of the others. In the paper's orientation, G (out, in):

    G = U S V^T,    A = c V_1..r,    B = c U_r+1..2r^T,    c = out^1/4 / gamma^1/2,
    W_res = W - A B,    y = x W_res + (x A) B

The columns of A are orthogonal, as are the rows of B. c, with gamma = 16 by default, keeps the
outputs' size independent of `out`. A B has nothing to do with W: it is subtracted only so that
step 0 is the base. The paper also multiplies A B by alpha / sqrt(r), here 1, as in PiSSA. PEFT
0.21 multiplies B by the singular values and c, and A by neither. Here and in the authors' code both
are multiplied by c alone.

Cost: training as PiSSA. At the start, backward passes with the gradient of every matrix, summed in
host memory as float32, then a randomized SVD of each.
"""
import torch

import pissa
import relatives
from svd import full_float32, randomized_svd

STATISTIC, EXAMPLES = "gradients", 64
OPTIONS = {"gamma": 16.0}


@full_float32()
def init(weight, options):
    """weight (out, in), options with statistic G (out, in) -> W_res (out, in), A (in, r),
    B (r, out), (A, B). ValueError for a rank above half of the matrix's smaller side."""
    r, gamma = options.rank, options.own["gamma"]
    if 2 * r > min(weight.shape):
        raise ValueError(f"lora_ga: rank {r} needs {2 * r} singular vectors of the gradient, and a "
                         f"matrix has {min(weight.shape)}: lower --rank")
    if not gamma > 0:
        raise ValueError(f"lora_ga: gamma should be positive, not {gamma}")
    G = relatives.given(options).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    U, _, Vh = randomized_svd(G, 2 * r, niter=options.niter, generator=options.generator)
    c = weight.shape[0] ** 0.25 / gamma ** 0.5
    A, B = c * Vh[:r].T, c * U[:, r:].T
    return pissa.residual(weight, A, B), A, B, (A, B)
