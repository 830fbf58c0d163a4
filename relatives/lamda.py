"""LaMDA: train a square matrix between two bases, of which one is frozen row by row (2406.12832).

As LoRA-XS, but the principal part is taken out of W, and B learns, too, at first.

    A = U_r frozen,    S (r, r) trained,    B = V_r^T trained, then frozen,
    W_res = W - U_r S_r V_r^T,    y = x W_res + ((x A) S) B,    S = diag(S_r) at the start

After step t of T, the first r t / (0.3 T) rows of B are frozen, rounded up, so after 30 % of the
steps all of them. Those of the largest singular values come first. From then on only the r^2
numbers of S learn. `--option share=0.3` is that share of the steps.

The authors' code differs. Its A is noise, its B is 0, its S has nn.Linear's noise. It freezes
t / (0.3 T) rows, rounded down, without the r: one after 30 % of the steps, three at the end.

(A S) B is a LoRA of rank r, so PEFT and vLLM get A S and B. A frozen row gets no gradient. AdamW
would still move it by its moments, so `kept` holds what counts.

Cost: r^2 + r * out trained numbers a matrix, later r^2, where LoRA has r (in + out). Here AdamW's
moments of B stay allocated, and `kept` is r * out more. At the start, PiSSA's SVD.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import pissa
from relatives import sorsa

OPTIONS = {"share": 0.3}


def init(weight, options):
    """weight (out, in), options -> W_res (out, in), U S (in, r), V^T (r, out), both. ValueError for
    a share outside 0 ... 1."""
    if not 0 <= options.own["share"] <= 1:
        raise ValueError(f"lamda: share is from 0 to 1, not {options.own['share']}")
    return sorsa.init(weight, options)


class Layer(pissa.PissaLinear):
    """y = x W_res + ((x A) S) B + bias. S (r, r) is trained, and the rows of B not yet `kept`."""
    state = ("A", "S", "B", "kept", "count")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)                          # with U S as its A
        self.S = nn.Parameter(self.A.detach().norm(dim=0).diag())
        self.A.data = F.normalize(self.A.data, dim=0)
        self.A.requires_grad_(False)
        self.register_buffer("kept", torch.zeros_like(self.B))     # the frozen rows, or 0
        self.register_buffer("count", self.B.new_zeros(1))         # how many rows are frozen

    def is_frozen(self):
        """(r, 1): True for the frozen rows of B."""
        return torch.arange(len(self.B), device=self.B.device)[:, None] < self.count

    def factors(self):
        """A S (in, r) and B (r, out)."""
        return self.A @ self.S, torch.where(self.is_frozen(), self.kept, self.B)


@torch.no_grad()
def after_step(net, step, steps):
    """Freeze the rows of B that are due after step number `step` of `steps`."""
    share = step / max(net.pissa["own"]["share"] * steps, 1e-9)
    for _, m in pissa.layers(net):
        m.kept.copy_(m.factors()[1])
        m.count.clamp_(min=min(len(m.B), math.ceil(len(m.B) * share)))
