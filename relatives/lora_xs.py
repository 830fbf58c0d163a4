"""LoRA-XS: train only an r x r matrix between two frozen ones (arXiv 2405.17604).

LoRA trains A and B. LoRA-XS takes both from the SVD of W, freezes them, and trains R alone:

    A = U_r S_r frozen,    B = V_r^T frozen,    R (r, r) trained,    y = x W + ((x A) R) B

R is N(0, 1e-5^2) at the start. So step 0 is the base to about five digits, not exactly. A zero R
would learn as well, but the paper has this. What is learnt maps the r directions that W amplifies
most to the r directions that it amplifies them into. W stays whole, nothing is subtracted.

(A R) B is a LoRA of rank r. So PEFT and vLLM get A R and B, and know nothing of R. A and R are in
pissa.safetensors, to train on.

Cost: r^2 trained numbers a matrix, however large W is: 4096 at rank 64, where LoRA has 524 288 in
a matrix of 4096 x 4096. Memory falls by their gradients and moments, time hardly: x A and B are
computed as before. At the start, the randomized SVD of PiSSA.
"""
import torch
from torch import nn

import pissa
from svd import randomized_svd

STD = 1e-5                                                    # of R at the start


def init(weight, options):
    """weight (out, in), options -> weight itself, A (in, r), B (r, out), None."""
    U, S, Vh = randomized_svd(weight.T, options.rank, niter=options.niter,
                              generator=options.generator)
    return weight, U * S, Vh, None


class Layer(pissa.PissaLinear):
    """y = x W + ((x A) R) B + bias. R (r, r) is trained."""
    state = ("A", "R")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
        r = self.A.shape[1]
        self.R = nn.Parameter(self.A.new_zeros(r, r))

    @classmethod
    def from_linear(cls, linear, init, options, keep_base=False):
        """A new layer: the same R in every process, which may not have made A and B itself."""
        layer = super().from_linear(linear, init, options, keep_base)
        g = torch.Generator().manual_seed(options.generator.initial_seed())
        layer.R.data = (torch.randn(layer.R.shape, generator=g) * STD).to(layer.A)
        return layer

    def factors(self):
        """A R (in, r) and B (r, out)."""
        return self.A @ self.R, self.B
