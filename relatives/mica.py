"""MiCA: freeze the least used output directions as B, train A alone (arXiv 2604.01694).

LoRA trains A and B from A B = 0. MiCA fixes B to the left singular vectors of W^T (out, in) that
belong to its r smallest singular values, and trains A from 0:

    W^T = U S V^T,    B = U_m^T frozen,    A = 0 trained,    y = x W + (x A) B

m are the last r triplets. So what is learnt goes only to outputs which W hardly reaches. B has
orthonormal rows and never changes, so A needs no partner to grow with it.

Cost: r * in trained numbers, gradients and moments instead of r (in + out), about half. At the
start, an exact SVD of every matrix, see milora.py.
"""
import pissa
from svd import randomized_svd


def init(weight, options):
    """weight (out, in), options -> weight itself, A = 0 (in, r), B (r, out), None."""
    U, _, _ = randomized_svd(weight, min(weight.shape), niter=None)          # of W^T, all, exactly
    B = U[:, -options.rank:].T.clone()                         # a copy: the rest of U is freed
    return weight, B.new_zeros(weight.shape[1], options.rank), B, None


class Layer(pissa.PissaLinear):
    """A PissaLinear whose B is frozen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.B.requires_grad_(False)
