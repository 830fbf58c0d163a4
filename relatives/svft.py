"""SVFT: train single entries of a sparse M in the basis of W's singular vectors (arXiv 2405.19597).

LoRA learns new directions, r of them. SVFT keeps all those of W, and learns how they are combined:

    W = U S V^T,    y = x U (S + M) V^T = x W + ((x U) M) V^T,    U and V frozen, M = 0 trained

M is (n, n), n = min(in, out). Its trainable entries follow a pattern, fixed at the start:

    plain    the diagonal: n numbers, new singular values
    banded   d diagonals more on both sides: k = n (2 d + 1) - d (d + 1) numbers
    random   k entries, k as for banded
    top      the k entries with the largest |u_i^T v_j|; for as many inputs as outputs only

`--option pattern=banded --option d=16`. The rank of U M V^T is up to n, with far fewer numbers than
LoRA has. The paper writes M as (in, out), but counts as here. It takes the largest u_i^T v_j, whose
sign means nothing: u_i and v_i may both be negated. So here it is the size. In the authors' code M
begins with noise and has a gate. Here it begins with 0, and y = x W.

--rank is ignored, unless `--option triplets=rank`: then M is (r, r), of the r leading triplets.

Cost: few trained numbers. But U and V have one to two times the numbers of W, in float32. Each
forward also makes M V^T, as much work as n tokens. An adapter holds U and M V^T, a LoRA of rank n,
which PEFT reads, too large for vLLM. So use `convert.py merge`, or triplets=rank: then it is a LoRA
of rank r. At the start, an exact SVD.
"""
import torch
from torch import nn

import pissa
from svd import full_float32, randomized_svd

OPTIONS = {"pattern": "plain", "d": 16, "triplets": "all"}
CHOICES = {"pattern": ("plain", "banded", "random", "top"), "triplets": ("all", "rank")}


def init(weight, options):
    """weight (out, in), options -> weight itself, U (in, n), V^T (n, out), None. ValueError for a
    d below 0."""
    if options.own["d"] < 0:
        raise ValueError(f"svft: d is 0 or more, not {options.own['d']}")
    U, S, Vh = randomized_svd(weight.T, min(weight.shape), niter=None)       # all, exactly
    n = len(S) if options.own["triplets"] == "all" else options.rank
    return weight, U[:, :n], Vh[:n], None


@full_float32()
def entries(U, Vh, pattern, d, generator):
    """(2, k): rows and columns of the entries of M that are trained. ValueError: see "top"."""
    n = len(Vh)
    d = 0 if pattern == "plain" else min(d, n - 1)
    k, i = n * (2 * d + 1) - d * (d + 1), torch.arange(n)
    if pattern in ("plain", "banded"):
        return ((i[:, None] - i).abs() <= d).nonzero().T
    if pattern == "random":
        flat = torch.randperm(n * n, generator=generator)[:k]
    elif len(U) == Vh.shape[1]:
        flat = (U.T @ Vh.T).abs().flatten().topk(k).indices.cpu()
    else:
        raise ValueError(f"svft: pattern=top needs as many inputs as outputs, not {len(U)} and "
                         f"{Vh.shape[1]}: such as --targets q_proj o_proj, or another pattern")
    return torch.stack([flat // n, flat % n])


class Layer(pissa.PissaLinear):
    """y = x W + ((x A) M) B + bias, A = U, B = V^T. `m` (k,) is trained: the entries `at` of M."""
    state = ("A", "B", "m", "at")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.A.requires_grad_(False)
        self.B.requires_grad_(False)
        self.place(torch.arange(len(self.B)).expand(2, -1))

    def place(self, at):
        """M = 0, of which the entries `at` (2, k) are trained."""
        self.register_buffer("at", at.to(self.A))             # whole numbers, exact below 2^24
        self.m = nn.Parameter(self.A.new_zeros(at.shape[1]))

    @classmethod
    def from_linear(cls, linear, init, options, keep_base=False):
        """A new layer: the same M in every process, which may not have made A and B itself."""
        layer = super().from_linear(linear, init, options, keep_base)
        g, own = torch.Generator().manual_seed(options.generator.initial_seed()), options.own
        layer.place(entries(layer.A.data, layer.B.data, own["pattern"], own["d"], g))
        return layer

    def factors(self):
        """U (in, n) and M V^T (n, out)."""
        M = self.A.new_zeros(len(self.B), len(self.B)).index_put(tuple(self.at.long()), self.m)
        return self.A, M @ self.B
