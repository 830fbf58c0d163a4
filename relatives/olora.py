"""OLoRA: begin with an orthonormal basis, by QR instead of SVD (arXiv 2406.01775).

Where PiSSA takes the r leading singular triplets of W, OLoRA takes the first r columns of Q and the
first r rows of R of a QR decomposition. The paper has W as (out, in). In y = x W that is W^T:

    W^T = Q R,    A = R_r^T,    B = Q_r^T,    W_res = W - A B,    y = x W_res + (x A) B

The rows of B are orthonormal, and A = W B^T. They span where W sends the first r inputs, so W_res
is 0 for those inputs: what is trained depends on the order of the inputs, not on singular values.
A has the size of W, B has norm sqrt(r), so the two do not learn equally fast. The paper scales A B
by alpha / r. Here that is 1, as in PiSSA.

Cost: training as LoRA. At the start, the QR of (out, r): the whole Q is never made.
"""
import torch

import pissa
from svd import full_float32


@full_float32()
def init(weight, options):
    """weight (out, in), options -> W_res (out, in), A (in, r), B (r, out), (A, B)."""
    W_T = weight.to(torch.promote_types(weight.dtype, torch.float32))                 # (out, in)
    Q, _ = torch.linalg.qr(W_T[:, :options.rank])                                     # (out, r)
    A, B = W_T.T @ Q, Q.T
    return pissa.residual(weight, A, B), A, B, (A, B)
