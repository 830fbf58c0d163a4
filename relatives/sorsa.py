"""SORSA: train U, S and V of the principal part, and keep U and V orthonormal (arXiv 2409.00055).

PiSSA splits S evenly between A and B. SORSA trains the three factors of the r leading triplets on
their own, and adds to the loss how far U and V are from orthonormal:

    W_res = W - U_r S_r V_r^T,    y = x W_res + ((x U) S) V^T,    U, S (r numbers) and V trained
    loss + gamma sum over all matrices of |U^T U - I|^2 + |V^T V - I|^2,    gamma = 4e-4

|.| is the Frobenius norm. At step 0 this penalty is 0 but for rounding, and y = x W. With it, U and
V keep unit columns, changes of scale go to S, and U S V^T stays near to an SVD. `--option gamma=0`
leaves it out. The authors' code has the norms without squares, and their mean over all U and V.
Their gradient does not fade near orthonormality, and is not defined there. Here they are squared.

(U S) V^T is a LoRA of rank r, so PEFT and vLLM get U S and V^T.

Cost: r (in + out + 1) trained numbers a matrix, r more than PiSSA. The penalty takes products of
r^2 (in + out) per matrix and step, little beside those of a batch. At the start, PiSSA's SVD.
"""
import torch
import torch.nn.functional as F
from torch import nn

import pissa
from svd import full_float32, randomized_svd

OPTIONS = {"gamma": 4e-4}


def init(weight, options):
    """weight (out, in), options -> W_res (out, in), U S (in, r), V^T (r, out), both."""
    U, S, Vh = randomized_svd(weight.T, options.rank, niter=options.niter,
                              generator=options.generator)
    A = U * S
    return pissa.residual(weight, A, Vh), A, Vh, (A, Vh)


class Layer(pissa.PissaLinear):
    """y = x W_res + ((x A) S) B + bias. A = U (in, r), S (r,), B = V^T (r, out) are trained."""
    state = ("A", "S", "B")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)                          # with U S as its A
        self.S = nn.Parameter(self.A.detach().norm(dim=0))
        self.A.data = F.normalize(self.A.data, dim=0)

    def factors(self):
        """U S (in, r) and V^T (r, out)."""
        return self.A * self.S, self.B


@full_float32()
def penalty(net):
    """gamma times the sum of |U^T U - I|^2 + |V^T V - I|^2 over all layers of `net`, a number."""
    def distance(X):
        return (X - torch.eye(len(X), dtype=X.dtype, device=X.device)).square().sum()

    return net.pissa["own"]["gamma"] * sum(distance(m.A.T @ m.A) + distance(m.B @ m.B.T)
                                           for _, m in pissa.layers(net))
