"""LoRA-RITE: a step that depends on A B alone, not on how it is split (arXiv 2410.20625, v2).

A B = (A R) (R^-1 B) for every invertible R (r x r). The two pairs are the same model, but Adam
moves them to different ones. LoRA-RITE moves both to the same A B. With thin QRs A = U_A R_A and
B^T = U_B R_B, step number t of A (n, r), from M = V = rho = 0, is

    g = dL/dA R_B^-1                           without the size of B
    P = U_B,t^T U_B,t-1                        from the basis of the last step to that of this one
    V <- b2 P V P^T + (1 - b2) g^T g / n       (r, r), where Adam has a variance of each number
    M <- b1 M P^T + (1 - b1) g (V + rho I)^-1/2                 rho = 0
    A <- A - lr M R_B^-T

B^T takes the same step with A in the place of B. Another R only turns U_B to U_B O, O^T O = I, and
g, P, V and M turn with it. b = beta (1 - beta^(t-1)) / (1 - beta^t), which makes V and M means
from the beginning, beta 0.9 and 0.999. The paper's V is a sum, and it has the polar decomposition
for the QR: any orthonormal basis of the space does. The 1 / n is that of the authors' code: g is
scaled to numbers of about 1, as by Adam. The inverse of R is a pseudo-inverse: B = 0 stops A for a
step, as in LoRA. The start is LoRA's, or PiSSA's with `--option start=pissa`.

The paper keeps what V loses when the basis turns: with `--option escape=true`, rho <- b2 (rho + d),
where d is the most that an eigenvalue of P V P^T has lost (b2 is the authors' code's). They leave
it out unless asked. The basis turns most in the first steps, whose gradients are large. Then rho
keeps the steps small.

--clip looks at the gradients of A and B, which do depend on R. The authors clip the norm of all g
to 1 instead, and leave out a g whose entries are above 1 in the mean.

Cost: for each pair in each step QRs, pseudo-inverses and eigendecompositions (r, r). Memory as
Adam: U takes the place of the variances.
"""
import torch

import pissa
from relatives.lora_pro import CHOICES, by_shape, init  # noqa: F401
from svd import full_float32

OPTIONS = {"start": "lora", "escape": False}
BETAS, EPSILON = (0.9, 0.999), 1e-8


def begin(P, basis):
    """The states of k parameters P (k, n, r) before a step. basis (k, m, r): U of the others."""
    k, _, r = P.shape
    return {"basis": basis, "M": torch.zeros_like(P), "V": P.new_zeros(k, r, r),
            "rho": P.new_zeros(k, 1, 1)}


def inverse_root(V, rho):
    """(V + rho I)^-1/2. What rounding leaves of zero eigenvalues is not blown up."""
    w, Q = torch.linalg.eigh(V)
    least = torch.finfo(w.dtype).eps * w.shape[-1] * w[..., -1:].clamp(min=0)
    w = torch.maximum(w, least)[..., None, :]
    return (Q / ((w + rho).sqrt() + EPSILON)) @ Q.mT


def direction(state, t, gradient, basis, R_inverse, escape):
    """What step t of k parameters (k, n, r) goes along; `state` goes on by a step. basis (k, m, r),
    R_inverse (k, r, r): U and R^-1 of the other parameters. escape: whether rho is kept."""
    b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b ** t) for b in BETAS)
    g, P = gradient @ R_inverse, basis.mT @ state["basis"]
    turned = P @ state["V"] @ P.mT
    if escape:
        lost = (torch.linalg.eigvalsh(state["V"]) - torch.linalg.eigvalsh(turned)).amax(-1)
        state["rho"] = b2 * (state["rho"] + lost.clamp(min=0)[:, None, None])
    state["V"] = b2 * turned + (1 - b2) * g.mT @ g / g.shape[1]
    state["M"] = b1 * state["M"] @ P.mT + (1 - b1) * g @ inverse_root(state["V"], state["rho"])
    state["basis"] = basis
    return state["M"] @ R_inverse.mT


class LoRARITE(torch.optim.Optimizer):
    """For parameters A (in, r), B (r, out), A, B ... Decays weights as AdamW does."""

    @torch.no_grad()
    @full_float32()
    def step(self, closure=None):
        group, = self.param_groups
        for As, Bs in by_shape(group["params"]):
            A, Bt = torch.stack(As), torch.stack(Bs).mT                           # (k, n, r)
            dA, dBt = torch.stack([p.grad for p in As]), torch.stack([p.grad for p in Bs]).mT
            (U_A, R_A), (U_B, R_B) = torch.linalg.qr(A), torch.linalg.qr(Bt)
            steps_A = self.along(As, A, dA, U_B, torch.linalg.pinv(R_B))
            steps_B = self.along(Bs, Bt, dBt, U_A, torch.linalg.pinv(R_A)).mT
            for p, step in zip((*As, *Bs), (*steps_A, *steps_B), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])

    def along(self, params, P, gradients, basis, R_inverse):
        """What a step of parameters of one shape, P (k, n, r), goes along. Keeps their states."""
        if not self.state[params[0]]:
            state, t = begin(P, basis), 1.0
        else:
            state = {key: torch.stack([self.state[p][key] for p in params])
                     for key in ("basis", "M", "V", "rho")}
            t = self.state[params[0]]["step"].item() + 1
        escape = self.param_groups[0].get("escape", False)
        step = direction(state, t, gradients, basis, R_inverse, escape)
        for i, p in enumerate(params):
            self.state[p] = {"step": torch.tensor(t), **{k: v[i].clone() for k, v in state.items()}}
        return step


def optimizer(net, lr, weight_decay):
    """Instead of AdamW, see train.py."""
    pairs = [p for _, m in pissa.layers(net) for p in (m.A, m.B)]
    return LoRARITE(pairs, {"lr": lr, "weight_decay": weight_decay,
                            # Adapters of before this option kept rho.
                            "escape": net.pissa["own"].get("escape", True)})
