"""LoRA-Pro: a step of A and B that changes A B as nearly as it can like full fine-tuning
(arXiv 2407.18242).

A step along A_g and B_g changes A B along A_g B + A B_g. LoRA takes the gradients A_g = G B^T and
B_g = A^T G, with G = dL/dW. LoRA-Pro takes those for which |A_g B + A B_g - G| is least:

    A_g = (I - P) dL/dA (B B^T)^-1 - A X,    B_g = (A^T A)^-1 dL/dB + X B,    P = A (A^T A)^-1 A^T

G itself is not needed. Any X (r x r) gives the same change of A B. The paper takes the one for
which A_g and B_g are nearest to LoRA's. It solves the Sylvester equation

    A^T A X + X B B^T = -(A^T A)^-1 dL/dB B^T

The inverses are pseudo-inverses, so that B = 0 is no special case. The paper's W is (out, in), so
its A and B are A^T and B^T here, and its two formulas change places. Its scaling is 1, as here.

The start is LoRA's. `--option start=pissa` takes PiSSA's. AdamW gets A_g and B_g as its gradients,
as in the authors' implementation for DeepSpeed. The paper's AdamW has moments of A_g B + A B_g,
which are as large as W.

Cost: two eigendecompositions (r, r) for each pair A, B in each step. Memory as LoRA's.
"""
import torch

import pissa
from svd import full_float32

OPTIONS = {"start": "lora"}
CHOICES = {"start": ("lora", "pissa")}


def init(weight, options):
    """weight (out, in), options -> what the start returns: frozen, A (in, r), B (r, out), pair."""
    return pissa.init_of(options.own["start"])(weight, options)


def inverse(S):
    """1 / S of eigenvalues S (..., r) >= 0; 0 for those that are 0, up to rounding."""
    least = S.amax(-1, keepdim=True) * torch.finfo(S.dtype).eps * S.shape[-1]
    return torch.where(S > least, 1 / S, 0)


@full_float32()
def adjusted(A, B, dA, dB):
    """A (..., in, r), B (..., r, out) and their gradients -> A_g and B_g of the same shapes."""
    (S, U), (T, V) = torch.linalg.eigh(A.mT @ A), torch.linalg.eigh(B @ B.mT)
    one_S, one_T = inverse(S)[..., None, :], inverse(T)[..., None, :]
    AtA_inverse, BBt_inverse = (U * one_S) @ U.mT, (V * one_T) @ V.mT
    right = -AtA_inverse @ (dB @ B.mT)
    sums = S[..., :, None] + T[..., None, :]                                      # (..., r, r)
    X = U @ (U.mT @ right @ V * inverse(sums.flatten(-2)).view_as(sums)) @ V.mT
    dA = dA @ BBt_inverse
    return dA - A @ (AtA_inverse @ (A.mT @ dA)) - A @ X, AtA_inverse @ dB + X @ B


def by_shape(params):
    """Of parameters A, B, A, B ... lists ([A, ...], [B, ...]) of one shape: a GPU takes as long for
    the small matrices of one pair as for those of all together."""
    found = {}
    for A, B in zip(params[::2], params[1::2], strict=True):
        found.setdefault((A.shape, B.shape), []).append((A, B))
    return [tuple(zip(*pairs, strict=True)) for pairs in found.values()]


class LoRAPro(torch.optim.AdamW):
    """AdamW for parameters A, B, A, B ...: of each pair it gets the adjusted gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        for As, Bs in by_shape(self.param_groups[0]["params"]):
            gradients = [A.grad for A in As], [B.grad for B in Bs]
            found = adjusted(*map(torch.stack, (As, Bs, *gradients)))
            for p, g in zip((*As, *Bs), (*found[0], *found[1]), strict=True):
                p.grad.copy_(g)
        return super().step(closure)


def optimizer(net, lr, weight_decay):
    """Instead of AdamW, see train.py."""
    pairs = [p for _, m in pissa.layers(net) for p in (m.A, m.B)]
    return LoRAPro(pairs, lr, weight_decay=weight_decay, fused=True)
