"""PiSSA: fine-tune the principal singular components, freeze the rest (arXiv 2404.02948).

LoRA (arXiv 2106.09685) learns a low-rank change of a frozen weight and starts it at zero, from
noise: its first gradients are small and point nowhere in particular. PiSSA has the same shapes and
the same cost, and starts from the weight itself. With the r leading singular triplets of W,

    W = U S V^T,   A = U_r S_r^1/2,   B = S_r^1/2 V_r^T,   W_res = W - A B,

A and B are trained and W_res is frozen. Nothing changes at step 0, x W = x W_res + (x A) B, but the
directions that matter most to W are the ones that move.

    notation      code         shape
    W             W            (in, out); as the paper writes it, y = x W
    W_res         weight       (out, in), W_res transposed, as nn.Linear stores it, in its dtype
    A, B          A, B         (in, r), (r, out); float32, trained
    A_0, B_0      A0, B0       their values at initialisation, kept in host memory
    Delta W       save         A B - A_0 B_0 = [A | A_0] [B ; -B_0], a LoRA of rank 2r on W

That last line is why an adapter on disk is a plain PEFT LoRA on the untouched base model, and why
it holds all that is needed to go on training: no second SVD, no second copy of the model.
Everything here works on any nn.Module with nn.Linear inside.

    pissa.inject(net, rank=64); ...train...; pissa.save(net, "adapter"); pissa.load(base, "adapter")
"""
import hashlib
import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from adapter import compress, read_adapter, write_adapter  # noqa: F401
from svd import full_float32, randomized_svd, wide

NOT_KEPT = "the base weights were not kept (keep_base=False): load the model again for that"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ------------------------------------------------------------- methods: weight -> residual, A, B

@full_float32()
def residual(weight, A, B):
    """W - A B, computed in float32 and rounded once to the dtype of `weight` (out, in)."""
    return (wide(weight) - (A @ B).T).to(weight.dtype)


def init_pissa(weight, rank, niter, generator):
    """Principal components: A = U_r S_r^1/2, B = S_r^1/2 V_r^T, W_res = W - A B (eq. 2-4)."""
    U, S, Vh = randomized_svd(weight.T, rank, niter=niter, generator=generator)
    A, B = (U * S.sqrt()).contiguous(), (S.sqrt()[:, None] * Vh).contiguous()
    return residual(weight, A, B), A, B


def init_lora(weight, rank, niter, generator):
    """LoRA: A ~ N(0, 1/in), B = 0, W itself is frozen."""
    W = wide(weight).T
    A = torch.randn(W.shape[0], rank, generator=generator, device=W.device, dtype=W.dtype)
    return weight, A * W.shape[0] ** -0.5, W.new_zeros(rank, W.shape[1])


METHODS = {"pissa": init_pissa, "lora": init_lora}


# ------------------------------------------------------------------------------------------ layer

class PissaLinear(nn.Module):
    """y = x W_res + (x A) B + bias, in place of an nn.Linear; only A and B are trained.

    A0, B0, base: the initial factors and the original weight, in host memory (a plain attribute
    does not move with the module). A0 is None where `weight` is still W itself.
    """

    def __init__(self, linear, weight, A, B, A0=None, B0=None, keep_base=True):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)                   # (out, in)
        self.bias, self.enabled = linear.bias, True
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        self.A0 = self.B0 = self.base = None
        if A0 is not None:
            self.A0, self.B0 = A0.to("cpu", copy=True), B0.to("cpu", copy=True)
            self.base = linear.weight.detach().cpu() if keep_base else None

    @classmethod
    def from_linear(cls, linear, rank, *, method="pissa", niter=8, generator=None, keep_base=True):
        """Decompose `linear.weight` by `method`; the arguments are those of `inject`."""
        W = linear.weight.detach()
        weight, A, B = METHODS[method](W, rank, niter, generator)
        first = (None, None) if weight is W else (A, B)
        return cls(linear, weight, A, B, *first, keep_base)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return y + (x @ self.A.to(x.dtype)) @ self.B.to(x.dtype)

    def switch(self, on):
        """Turn the adapter on or off. Off, the original weight takes the place of the residual."""
        if self.enabled != on and self.A0 is not None:
            if self.base is None:
                raise ValueError(NOT_KEPT)
            parked = self.weight.data.cpu()
            self.weight.data, self.base = self.base.to(self.weight), parked
        self.enabled = on

    def extra_repr(self):
        return f"in={self.A.shape[0]}, out={self.B.shape[1]}, rank={self.A.shape[1]}"


# ---------------------------------------------------------------------------------------- network

def inject(net, rank, method="pissa", targets=TARGETS, niter=8, seed=0, *, keep_base=True,
           progress=True):
    """Replace the target linears of `net` by PissaLinear, in place, and freeze everything else.

    rank: of A and B, 1 ... min(in, out) of the smallest target. method: "pissa" or "lora".
    targets: leaf names of modules. niter: power iterations of the SVD, None for an exact one.
    keep_base: keep the original weights in host memory, for `disabled`, `remove` and a further
    `load`; without them these are refused. Raises ValueError, before anything is changed, for a
    target that matches nothing or is no nn.Linear, a rank too large, a weight with NaN or Inf, and
    an injected model.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if any(layers(net)):
        raise ValueError("the model is injected already: merge(net) or remove(net) first")
    linears = find_linears(net, targets)
    for name, m in linears.items():
        if not 1 <= rank <= min(m.weight.shape):
            raise ValueError(f"{name}: rank {rank} is not between 1 and {min(m.weight.shape)}, the "
                             f"smaller side of its {m.in_features} x {m.out_features} matrix")
        if not m.weight.isfinite().all():
            raise ValueError(f"{name}: the weight holds NaN or Inf")
    start, worst = time.perf_counter(), 0.0
    base = fingerprint(linears, lambda name: linears[name].weight)
    net.requires_grad_(False)
    generators = {d: torch.Generator(d).manual_seed(seed)
                  for d in {m.weight.device for m in linears.values()}}
    count = len(linears)
    bar = tqdm(list(linears), desc=method, unit="matrix", disable=not progress, leave=False)
    for name in bar:
        bar.set_postfix_str(name)
        linear = linears.pop(name)       # the only reference: W is freed before the next one
        layer = PissaLinear.from_linear(linear, rank, method=method, niter=niter,
                                        generator=generators[linear.weight.device],
                                        keep_base=keep_base)
        put(net, name, layer)
        worst = max(worst, relative_error(linear.weight, layer))
    net.pissa = {"method": method, "rank": rank, "niter": niter, "seed": seed, "base": base}
    if progress:
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        total = sum(p.numel() for p in net.parameters())
        print(f"{method}: {count} matrices at rank {rank} in "
              f"{time.perf_counter() - start:.1f} s, {trained:,} of {total:,} parameters trained "
              f"({trained / total:.2%}), largest relative |W - (W_res + A B)| {worst:.1e}")
    return net


@torch.no_grad()
@full_float32()
def relative_error(weight, layer):
    """|W - (W_res + A B)| / |W|, Frobenius norms: what rounding the residual to its dtype costs."""
    W = wide(weight)
    error = (W - wide(layer.weight) - (layer.A @ layer.B).T).norm()
    return (error / W.norm().clamp(min=1e-30)).item()


def find_linears(net, targets):
    """{name: nn.Linear} of the modules whose leaf name is among `targets`."""
    targets = [targets] if isinstance(targets, str) else targets
    named = {n: m for n, m in net.named_modules() if n and n.rpartition(".")[2] in targets}
    if nothing := set(targets) - {n.rpartition(".")[2] for n in named}:
        there = sorted({n.rpartition(".")[2] for n, m in net.named_modules()
                        if type(m) is nn.Linear})
        raise ValueError(f"no module is called {', '.join(sorted(nothing))}; the linear layers "
                         f"here are {', '.join(there) or 'none'}")
    for n, m in named.items():
        if type(m) is not nn.Linear:      # a subclass may read its weight in ways of its own
            raise ValueError(f"{n} is a {type(m).__name__}, not an nn.Linear")
        if isinstance(net.get_submodule(n.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(f"{n} is part of an nn.TransformerEncoderLayer, which reads its "
                             "weight without calling it")
    return named


def layers(net):
    """The PissaLinear modules of `net`, as (name, module)."""
    return ((n, m) for n, m in net.named_modules() if isinstance(m, PissaLinear))


def put(net, name, module):
    """Make `module` the submodule of `net` called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(net.get_submodule(parent), leaf, module)


def fingerprint(names, weight):
    """A hash of names, shapes and 256 entries of every weight, to tell one base from another.

    weight(name): the matrix (out, in) of a module; they are asked for one by one, and none is kept.
    The entries are rounded to bfloat16, so that a checkpoint has one fingerprint whether it is read
    in float32 or in bfloat16.
    """
    h, sample = hashlib.sha256(), []
    for name in sorted(names):
        W = weight(name).detach()
        h.update(f"{name} {tuple(W.shape)}\n".encode())
        step = max(1, W.numel() // 256) | 1                # odd, or it could stay in one column
        sample.append(W.flatten()[::step].bfloat16().cpu())
    h.update(bytes(torch.cat(sample).view(torch.uint8).tolist()))
    return h.hexdigest()


def check_base(directory, config, pairs, weight):
    """The fingerprint of a base that an adapter fits; ValueError if it does not fit.

    directory, config, pairs: the adapter and what `read_adapter` made of it. weight(name): the
    base's matrix (out, in) of a module, or a ValueError where it has none.
    """
    def checked(name):
        (A, B), W = pairs[name], weight(name)
        if W.shape != (B.shape[1], A.shape[0]):
            raise ValueError(f"{directory}: {name} is {A.shape[0]} x {B.shape[1]}, the model's is "
                             f"{W.shape[1]} x {W.shape[0]}")
        return W

    base, info = fingerprint(pairs, checked), config.get("pissa")
    if info and info["base"] != base:
        raise ValueError(f"{directory} was made on another base model (fingerprint "
                         f"{info['base'][:12]}, this one has {base[:12]})")
    if info and info["method"] not in METHODS:
        raise ValueError(f"{directory}: method {info['method']} is none of {', '.join(METHODS)}")
    return base


def base_weight(m, name):
    """The original weight (out, in) of an nn.Linear or of the PissaLinear in its place."""
    if isinstance(m, PissaLinear) and m.A0 is not None and m.enabled:
        if m.base is None:
            raise ValueError(NOT_KEPT)
        return m.base
    if type(m) not in (nn.Linear, PissaLinear):
        raise ValueError(f"{name} is a {type(m).__name__}, not an nn.Linear")
    return m.weight


@contextmanager
def disabled(net):
    """`with disabled(net):` the base model, bit for bit."""
    on = [m for _, m in layers(net) if m.enabled]
    try:
        for m in on:
            m.switch(False)
        yield net
    finally:
        for m in on:
            m.switch(True)


def to_linears(net, weight):
    """Replace every PissaLinear m by an nn.Linear with weight(m), in place."""
    for name in [n for n, _ in layers(net)]:          # names, so that each m is freed at once
        m = net.get_submodule(name)
        W = weight(m)
        linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(W, requires_grad=False), m.bias
        put(net, name, linear)
    net.__dict__.pop("pissa", None)
    return net


def merge(net):
    """nn.Linear again, with what was learnt: W_res + A B, rounded once to the weight's dtype."""
    for _, m in layers(net):
        m.switch(True)               # inside `disabled`, `weight` is W: A B would come on top of it
    return to_linears(net, lambda m: residual(m.weight, -m.A.detach(), m.B.detach()))


def remove(net):
    """nn.Linear again, without what was learnt: the base model, bit for bit."""
    for _, m in layers(net):
        m.switch(False)
    return to_linears(net, lambda m: m.weight.data)


# --------------------------------------------------------------------------------- save and load

def save(net, directory):
    """Write the adapter of an injected `net` as a PEFT LoRA: of rank 2r for pissa, r for lora."""
    if not hasattr(net, "pissa"):
        raise ValueError("nothing to save: the model has no adapter")
    tensors = {}
    for name, m in layers(net):
        A, B = m.A.detach().cpu(), m.B.detach().cpu()
        if m.A0 is not None:         # A B - A_0 B_0 = [A | A_0] [B ; -B_0]
            A, B = torch.cat([A, m.A0], 1), torch.cat([B, -m.B0])
        tensors[name] = A, B
    write_adapter(directory, tensors, net.pissa, "CAUSAL_LM" if hasattr(net, "lm_head") else None)


def load(net, directory, *, keep_base=True):
    """Put an adapter on `net`, in place: one of ours, to use or train on, or a LoRA made by PEFT.

    An adapter already on `net` is removed first. Refuses (ValueError), before anything is changed,
    an adapter of ours that was made on another base, and one whose modules `net` does not have.
    """
    def weight(name):
        try:
            return base_weight(net.get_submodule(name), name)
        except AttributeError:
            raise ValueError(f"{directory}: the model has no {name}") from None

    config, pairs = read_adapter(directory)
    base, info = check_base(directory, config, pairs, weight), config.get("pissa")
    remove(net)
    net.requires_grad_(False)
    for name, (A, B) in pairs.items():
        linear = net.get_submodule(name)
        W = linear.weight.detach()
        A, B = (M.to(W.device, wide(W).dtype).contiguous() for M in (A, B))
        if not info or info["method"] == "lora":
            layer = PissaLinear(linear, W, A, B)
        else:
            r = A.shape[1] // 2
            A, A0, B, B0 = A[:, :r], A[:, r:].contiguous(), B[:r], -B[r:]
            layer = PissaLinear(linear, residual(W, A0, B0), A, B, A0, B0, keep_base)
        put(net, name, layer)
    net.pissa = info or {"method": "lora", "rank": config["r"], "niter": None, "seed": None,
                         "base": base}
    return net
