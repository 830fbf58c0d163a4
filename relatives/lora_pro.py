"""LoRA-Pro: a step of A and B that changes A B as nearly as it can like full fine-tuning
(arXiv 2407.18242).

A step along A_g and B_g changes A B along A_g B + A B_g. LoRA takes the gradients A_g = G B^T and
B_g = A^T G, with G = dL/dW. LoRA-Pro takes those for which |A_g B + A B_g - G| is least:

    A_g = (I - P) dL/dA (B B^T)^-1 - A X,    B_g = (A^T A)^-1 dL/dB + X B,    P = A (A^T A)^-1 A^T

G itself is not needed. Any X (r x r) gives the same change of A B. The paper takes the one for
which A_g and B_g are nearest to LoRA's. It solves the Sylvester equation

    A^T A X + X B B^T = -(A^T A)^-1 dL/dB B^T

The inverses are pseudo-inverses, so that B = 0 is no special case. The paper's W is (out, in), so
its A and B are B^T and A^T here. Its scaling is 1, as everywhere here.

The start is LoRA's. `--option start=pissa` takes PiSSA's. AdamW gets A_g and B_g as its gradients,
as in the authors' implementation for DeepSpeed. The paper's AdamW has moments of A_g B + A B_g,
which are as large as W.

Cost: two eigendecompositions (r, r) of each matrix in each step. Memory as LoRA's.
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
    """1 / S of eigenvalues S >= 0; 0 for those that are 0, up to rounding."""
    return torch.where(S > S.max() * torch.finfo(S.dtype).eps * len(S), 1 / S, 0)


@full_float32()
def adjusted(A, B, dA, dB):
    """A (in, r), B (r, out) and their gradients -> A_g (in, r), B_g (r, out)."""
    (S, U), (T, V) = torch.linalg.eigh(A.T @ A), torch.linalg.eigh(B @ B.T)
    AtA_inverse, BBt_inverse = (U * inverse(S)) @ U.T, (V * inverse(T)) @ V.T
    right = -AtA_inverse @ (dB @ B.T)
    X = U @ (U.T @ right @ V * inverse(S[:, None] + T)) @ V.T
    dA = dA @ BBt_inverse
    return dA - A @ (AtA_inverse @ (A.T @ dA)) - A @ X, AtA_inverse @ dB + X @ B


class LoRAPro(torch.optim.AdamW):
    """AdamW for parameters A, B, A, B ...: of each pair it gets the adjusted gradients."""

    @torch.no_grad()
    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        for A, B in zip(params[::2], params[1::2], strict=True):
            A.grad, B.grad = adjusted(A, B, A.grad, B.grad)
        return super().step(closure)


def optimizer(net, lr, weight_decay):
    """Instead of AdamW, see train.py."""
    pairs = [p for _, m in pissa.layers(net) for p in (m.A, m.B)]
    return LoRAPro(pairs, lr, weight_decay=weight_decay, fused=True)
