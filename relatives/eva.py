"""EVA: A begins with the directions in which a layer's inputs vary most (arXiv 2410.07170).

LoRA's A is noise. EVA takes the principal components of the inputs x of a layer, and gives more of
them to layers whose inputs they explain better. With X the inputs of all tokens, one in a row:

    X - mean = U S V^T,    A = the first r_i columns of V,    B = 0,    y = x W + (x A) B

V comes from minibatch after minibatch by an incremental SVD (Ross et al., 2008), `reduce`: the SVD
of [S V^T; the new rows less their mean; one row for the change of the mean]. The ranks r_i of all
N layers, r on average, are chosen together, `finish`: the share of the variance that a component
explains is s^2 / sum s^2, and the N r components with the largest shares are taken, at most rho r
of one layer. In the paper a layer may get none. Here each has its first one, so every target is
trained. The adapter has ranks of its own per module, PEFT's rank_pattern. The factor of A B is 1 in
all of them. The paper goes on until V hardly changes (tau). Here --calibrate says how long.

Cost: training as LoRA. At the start, forward passes, and a randomized SVD per minibatch of each
distinct input.
"""
from collections import Counter

import torch
import torch.nn.functional as F

import relatives
from svd import full_float32, randomized_svd

STATISTIC, EXAMPLES = "inputs", 256
OPTIONS = {"rho": 2.0}


@full_float32()
def reduce(before, x, options):
    """(tokens, mean (in,), S V^T (k, in), sum of all s^2), of `before` and x (tokens, in)."""
    x, t = x.to(torch.promote_types(x.dtype, torch.float32)), len(x)
    n, mean, SVh, total = before or (0, x.new_zeros(x.shape[1]), x.new_zeros(0, x.shape[1]), 0.0)
    new = x.mean(0)
    x, shift = x - new, (n * t / (n + t)) ** 0.5 * (mean - new)
    rows = torch.cat([SVh, x, shift[None]])
    k = min(round(options.own["rho"] * options.rank), *rows.shape)
    _, S, Vh = randomized_svd(rows, k, niter=options.niter)
    total += (x.double().square().sum() + shift.double().square().sum()).item()
    return n + t, mean + t / (n + t) * (new - mean), S[:, None] * Vh, total


def finish(found, options):
    """{name: V^T (r_i, in)} for {name: what `reduce` keeps}. ValueError for a rho below 1."""
    if not options.own["rho"] >= 1:
        raise ValueError(f"eva: rho is at least 1, not {options.own['rho']}")
    shares = {name: SVh.norm(dim=1).square() / max(total, 1e-38)
              for name, (_, _, SVh, total) in found.items()}
    first = [(2.0, name) for name in shares]                              # each has its first one
    rest = [(share, name) for name, s in shares.items() for share in s[1:].tolist()]
    best = sorted(first + rest, key=lambda pair: -pair[0])[:options.rank * len(found)]
    ranks = Counter(name for _, name in best)
    return {name: F.normalize(SVh[:ranks[name]]) for name, (_, _, SVh, _) in found.items()}


def init(weight, options):
    """weight (out, in), options with statistic V^T (r_i, in) -> weight itself, A (in, r_i), B = 0
    (r_i, out), None."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    A = relatives.given(options).to(weight.device, dtype).T
    return weight, A, A.new_zeros(A.shape[1], weight.shape[0]), None
