"""CoRA: B begins with a subspace that several weights have in common (arXiv 2409.02119).

LoRA's B is 0. CoRA's is B*, a basis of what the matrices W_1 ... W_N of one kind send their inputs
to. The paper says that B* comes from several large models and leaves open how. Ours: stack them,
and take the r leading right singular vectors. With W_i (in, out), and two variants:

    [W_1; ...; W_N] = U S V^T,    B* = V_r^T (r, out),    A = 0,    y = x W + (x A) B

    freeze=true     B = B* is frozen, A alone is trained
    freeze=false    B = B* is where B begins. A = 0 and B are trained

The W_i are those of all layers, for each kind, such as q_proj: one B* for all layers. Or, with
`--option others=checkpoint,...`, each layer has its own B*, of its W and of the same matrix of the
other checkpoints, which have the same shapes, such as fine-tuned ones. Each W_i counts by its
squared norm. V is that of sum W_i^T W_i, so no stack is ever held.

Cost: training half of LoRA's numbers with freeze, else as LoRA. At the start, W^T W of each matrix
and a float64 eigendecomposition (out, out) for each B*.
"""
import torch

import model
import pissa
import relatives
from relatives.mica import Layer  # its B is frozen
from svd import full_float32

STATISTIC = "weights"
OPTIONS = {"freeze": True, "others": ""}


@full_float32()
def finish(found, options):
    """{name: B* (r, out) float32} for {name: W (out, in)}. Those of a kind share one tensor, unless
    there are others. ValueError, FileNotFoundError: one of the others is missing or does not fit.
    """
    places = [place.strip() for place in options.own["others"].split(",") if place.strip()]
    others, kinds = [(place, model.open_checkpoint(place)[1]) for place in places], {}
    for name, W in found.items():
        kinds.setdefault(name if others else name.rpartition(".")[2], []).append((name, W))
    bases = {}
    for members in kinds.values():
        total = 0                                            # the sum of W^T W, (out, out)
        for name, W in members:
            for M in (W, *(matching(place, read, name, W) for place, read in others)):
                M = M.to(W.device, torch.promote_types(W.dtype, torch.float32))
                total = total + M @ M.T
        _, V = torch.linalg.eigh(total.double())                                 # ascending
        bases |= dict.fromkeys([n for n, _ in members], V[:, -options.rank:].flip(1).T.float())
    return {name: bases[name] for name in found}


def matching(place, read, name, W):
    """The matrix called `name` of another checkpoint. ValueError if it is not like W."""
    M = read[f"{name}.weight"]() if f"{name}.weight" in read else None
    if M is None or M.shape != W.shape:
        there = "none" if M is None else f"{M.shape[1]} x {M.shape[0]}"
        raise ValueError(f"cora: {name} is {W.shape[1]} x {W.shape[0]}, in {place} it is {there}")
    return M


def init(weight, options):
    """weight (out, in), options with statistic B* (r, out) -> weight itself, A = 0 (in, r), B = B*,
    None."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    B = relatives.given(options)[:options.rank].to(weight.device, dtype, copy=True)
    return weight, B.new_zeros(weight.shape[1], len(B)), B, None


def layer(own):
    """The kind of layers that the options ask for."""
    return Layer if own["freeze"] else pissa.PissaLinear
