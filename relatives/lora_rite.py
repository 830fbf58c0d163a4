"""LoRA-RITE: a step that depends on A B alone, not on how it is split (arXiv 2410.20625, v2).

A B = (A R) (R^-1 B) for every invertible R (r x r). The two pairs are the same model, but Adam
moves them to different ones. LoRA-RITE moves both to the same A B. With thin QRs A = U_A R_A and
B^T = U_B R_B, step number t of A (n, r), from M = V = rho = 0, is

    g = dL/dA R_B^-1                           without the size of B
    P = U_B,t^T U_B,t-1                        from the basis of the last step to that of this one
    rho <- b2 (rho + d)                        d: the most that an eigenvalue of P V P^T has lost
    V <- b2 P V P^T + (1 - b2) g^T g / n       (r, r), where Adam has a variance of each number
    M <- b1 M P^T + (1 - b1) g (V + rho I)^-1/2
    A <- A - lr M R_B^-T

B^T takes the same step with A in the place of B. Another R only turns U_B to U_B O, O^T O = I, and
g, P, V and M turn with it. b = beta (1 - beta^(t-1)) / (1 - beta^t), which makes V and M means
from the beginning, beta 0.9 and 0.999. The paper's V is a sum, and it has the polar decomposition
for the QR: any orthonormal basis of the space does. The 1 / n is that of the authors' code: g is
scaled to numbers of about 1, as by Adam. The inverse of R is a pseudo-inverse: B = 0 stops A for a
step, as in LoRA. The start is LoRA's, or PiSSA's with `--option start=pissa`.

--clip looks at the gradients of A and B, which do depend on R.

Cost: of each matrix in each step a QR of A and B and eigendecompositions (r, r). Memory as Adam: U
takes the place of the variances.
"""
import torch

import pissa
from relatives.lora_pro import CHOICES, OPTIONS, init  # noqa: F401
from svd import full_float32

BETAS, EPSILON = (0.9, 0.999), 1e-8


def begin(p, basis):
    """The state of a parameter p (n, r) before its first step. basis (m, r): U of the other one."""
    r = p.shape[1]
    return {"step": torch.tensor(0.0), "basis": basis, "M": torch.zeros_like(p),
            "V": p.new_zeros(r, r), "rho": p.new_zeros(1)}


def inverse_root(V, rho):
    """(V + rho I)^-1/2. What rounding leaves of zero eigenvalues is not blown up."""
    w, Q = torch.linalg.eigh(V)
    w = w.clamp(min=torch.finfo(w.dtype).eps * len(w) * w[-1].clamp(min=0))
    return (Q / ((w + rho).sqrt() + EPSILON)) @ Q.T


def direction(state, gradient, basis, R_inverse):
    """What a step of (n, r) goes along; `state` goes on by a step. basis (m, r), R_inverse (r, r):
    U and R^-1 of the other parameter."""
    state["step"] += 1
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b ** t) for t in [state["step"].item()] for b in BETAS)
    g, P = gradient @ R_inverse, basis.T @ state["basis"]
    turned = P @ state["V"] @ P.T
    lost = (torch.linalg.eigvalsh(state["V"]) - torch.linalg.eigvalsh(turned)).amax().clamp(min=0)
    state["rho"] = b2 * (state["rho"] + lost)
    state["V"] = b2 * turned + (1 - b2) * g.T @ g / len(g)
    state["M"] = b1 * state["M"] @ P.T + (1 - b1) * g @ inverse_root(state["V"], state["rho"])
    state["basis"] = basis
    for key in "basis", "M", "V":            # in memory as a resumed run has it: sums round alike
        state[key] = state[key].contiguous()
    return state["M"] @ R_inverse.T


class LoRARITE(torch.optim.Optimizer):
    """For parameters A (in, r), B (r, out), A, B ... Decays weights as AdamW does."""

    @torch.no_grad()
    @full_float32()
    def step(self, closure=None):
        group, = self.param_groups
        for A, B in zip(group["params"][::2], group["params"][1::2], strict=True):
            (U_A, R_A), (U_B, R_B) = torch.linalg.qr(A), torch.linalg.qr(B.T)
            for p, basis in (A, U_B), (B, U_A):
                if not self.state[p]:
                    self.state[p] = begin(A if p is A else B.T, basis)
            step_A = direction(self.state[A], A.grad, U_B, torch.linalg.pinv(R_B))
            step_B = direction(self.state[B], B.grad.T, U_A, torch.linalg.pinv(R_A))
            for p, step in (A, step_A), (B, step_B.T):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])


def optimizer(net, lr, weight_decay):
    """Instead of AdamW, see train.py."""
    pairs = [p for _, m in pissa.layers(net) for p in (m.A, m.B)]
    return LoRARITE(pairs, {"lr": lr, "weight_decay": weight_decay})
