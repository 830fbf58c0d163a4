"""Delta-LoRA: what a step changes of A B, it changes of W, too (arXiv 2309.02411).

LoRA's W is frozen. After K steps of LoRA, each step t moves W as well, without a gradient of W:

    W_t+1 = W_t + ratio (A_t+1 B_t+1 - A_t B_t),    y = x W_t + (x A_t) B_t

The differences add up: W_t = W + ratio (A_t B_t - A_K B_K). So W itself can stay as it is, in
16 bits, in which a single difference would be rounded away. With the pair of step K kept,

    y = x W + x [(1 + ratio) A_t | -ratio A_K] [B_t ; B_K]

is the same model, and what is saved is a LoRA of rank 2r. The gradients of A and B are those of the
first y, with W_t constant: dL/dA = G B^T, dL/dB = A^T G.

`ratio` is the paper's lambda, `--option ratio=2`. The paper's K is a number of steps. Here it is a
share of all steps, `--option after=0.1`, so that it suits runs of any length.

Cost: x is multiplied by 2r columns instead of r. A_K and B_K are as large as A and B.
"""
import torch

import pissa

OPTIONS = {"ratio": 2.0, "after": 0.1}


def init(weight, options):
    """weight (out, in), options -> what LoRA starts with. ValueError for an option out of range."""
    for name, most in ("ratio", 100), ("after", 1):
        if not 0 <= options.own[name] <= most:
            raise ValueError(f"delta_lora: {name} is from 0 to {most}, not {options.own[name]}")
    return pissa.init_lora(weight, options)


class Layer(pissa.PissaLinear):
    """A_K (in, r), B_K (r, out), ratio (1,): zeros until step K."""
    state = ("A", "B", "A_K", "B_K", "ratio")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, like in ("A_K", self.A), ("B_K", self.B), ("ratio", self.A[0, :1]):
            self.register_buffer(name, torch.zeros_like(like, requires_grad=False))

    def factors(self):
        """[(1 + ratio) A | -ratio A_K] (in, 2r) and [B ; B_K] (2r, out).

        The two terms beside A and B have no value or no gradient: they leave to A and B the
        gradients that they have if W_t is a constant.
        """
        A, B, ratio = self.A, self.B, self.ratio
        A = A + ratio * A.detach()
        B = B - ratio / (1 + ratio) * (B - B.detach())
        return torch.cat([A, -ratio * self.A_K], 1), torch.cat([B, self.B_K])


@torch.no_grad()
def after_step(net, step, steps):
    """At step K, keep A and B. If K is 0, A_K B_K is 0, as B_0 is."""
    own, layers = net.pissa["own"], [m for _, m in pissa.layers(net)]
    K = round(own["after"] * steps)
    if step < K or layers[0].ratio:                               # too early, or done
        return
    for m in layers:
        if K:
            m.A_K.copy_(m.A)
            m.B_K.copy_(m.B)
        m.ratio.fill_(own["ratio"])
