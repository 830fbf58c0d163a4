# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""PiSSA: train the principal singular components of a weight, freeze the rest (arXiv 2404.02948).

LoRA (arXiv 2106.09685) adds A B to a frozen W, with noise in A and B = 0. At step 0 the gradient of
A is exactly zero, and that of B depends on the noise. PiSSA has the same shapes and the same cost,
but starts from W itself. With the r leading singular triplets of W = U S V^T,

    A = U_r S_r^1/2,    B = S_r^1/2 V_r^T,    W_res = W - A B,    y = x W_res + (x A) B + bias

A and B are trained, W_res is frozen. At step 0, y = x W as before. But now the directions that
matter most to W are the ones that move. S is split evenly, so that A and B have equal norms and
learn equally fast. LoRA's factor alpha / r is 1, because A B has the size of W already. A and B are
at least float32: a step of 2e-5, the learning rate, would vanish in bfloat16.

    paper       code         shape
    W           weight       in the code always W^T, (out, in), as nn.Linear stores it; y = x W
    W_res       frozen       (out, in), in the dtype of W; in QPiSSA an nf4.NF4 or fp8.FP8
    A, B        A, B         (in, r), (r, out); float32, trained
    A_0, B_0    A0, B0       A and B at initialisation, in host memory
    A_q, B_q    subtracted   the pair subtracted from W: A_0, B_0, or in four bits another one

`@faster(f)` names a quicker form of the function below it. Delete the lines `import fast`,
`from fast import faster` and `@faster(...)`: only speed changes.
"""
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fast
from fast import faster
from svd import finite, full_float32, grouped_svd, randomized_svd

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS = {"pissa": __name__, "lora": __name__, "qpissa": "qpissa", "qlora": "qpissa",
           "loftq": "qpissa"}                      # name: the file that holds init_NAME


@dataclass
class Options:
    """What a method is told; see `inject`."""
    rank: int
    niter: int | None = 5
    generator: torch.Generator | None = None
    quant_iters: int = 5
    bits: int = 4                                  # 4 or 8, if the method rounds
    double_quant: bool = True
    last_svd: bool = True
    remaining: dict = field(default_factory=dict)  # {name: linear} not replaced, first the present
    own: dict = field(default_factory=dict)        # those of the method alone, such as its OPTIONS
    ready: dict = field(default_factory=dict)      # A, B of some: fast.in_groups works ahead
    statistic: object = None                       # what was measured of this matrix, if anything


# --- a method: weight (out, in), options -> frozen, A, B, subtracted (None if frozen is weight)

def init_of(method):
    """The function like init_pissa of a name, or of a module; a function is its own. ValueError."""
    if callable(init := getattr(method, "init", method)):
        return init
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    return getattr(import_module(METHODS[method]), "init_" + method)


def init_pissa(weight, options):
    """The principal components are trained, W_res is frozen (eq. 2 to 4)."""
    A, B = principal(weight, options)
    return residual(weight, A, B), A, B, (A, B)


@faster(fast.in_groups(grouped_svd))
def principal(weight, options):
    """A = U_r S_r^1/2 (in, r) and B = S_r^1/2 V_r^T (r, out) of W, given as weight (out, in)."""
    U, S, Vh = randomized_svd(weight.T, options.rank, niter=options.niter,
                              generator=options.generator)
    return (U * S.sqrt()).contiguous(), (S.sqrt()[:, None] * Vh).contiguous()


@full_float32()
def residual(weight, A, B, sign=-1):
    """(W - A B)^T, (out, in): computed in float32, then rounded once to the dtype of `weight`."""
    W_T = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return W_T.addmm_(B.T.to(W_T), A.T.to(W_T), alpha=sign).to(weight.dtype)  # (A B)^T = B^T A^T


def init_lora(weight, options):
    """LoRA: A ~ N(0, 1/in), B = 0, W itself is frozen."""
    n_out, n_in = weight.shape
    A = torch.randn(n_in, options.rank, generator=options.generator, device=weight.device,
                    dtype=torch.promote_types(weight.dtype, torch.float32))
    return weight, A * n_in ** -0.5, A.new_zeros(options.rank, n_out), None


# -------------------------------------------------------------------------------------- the layer

@faster(fast.LowRank.apply)
def product(x, frozen, A, B, bias):
    """y = x W_res + (x A) B + bias"""
    return linear(x, frozen, bias) + (x @ A.to(x.dtype)) @ B.to(x.dtype)


def linear(x, frozen, bias):
    """x W + bias. frozen: a tensor (out, in), or a module, such as nf4.NF4, that returns x W."""
    if isinstance(frozen, torch.Tensor):
        return F.linear(x, frozen, bias)
    y = frozen(x)
    return y if bias is None else y + bias.to(y.dtype)


class PissaLinear(nn.Module):
    """y = x W_res + (x A) B + bias, in place of an nn.Linear. Only A and B are trained.

    A0, B0, subtracted and original (W, if kept) lie in host memory: plain attributes do not move
    with the module. A state_dict's "weight" is one number: what loads it as W refuses its shape.
    """
    weight = property(lambda self: self.frozen, doc="`frozen`, read-only.")
    fingerprint = property(lambda self: self._sampled.cpu(), doc="256 entries of W.")
    state = ()                    # names of parameters and buffers that `factors` cannot tell

    def __init__(self, linear, frozen, A, B, A0=None, B0=None, subtracted=None, original=None):
        super().__init__()
        self.frozen = frozen if isinstance(frozen, nn.Module) else nn.Parameter(frozen, False)
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        self.bias, self.W = linear.bias, None                 # W: set only inside `disabled(net)`
        self.A0, self.B0, self.subtracted, self.original = A0, B0, subtracted, original
        self._sampled, self._buffers["weight"] = sampled(linear.weight, None), A.new_zeros(1)
        self.train(linear.training)

    @classmethod
    def from_linear(cls, linear, init, options, keep_base=False):
        """The layer that the method `init` makes of an nn.Linear."""
        W = linear.weight.detach()
        frozen, A, B, pair = init(W, options)
        A0, B0 = (M.clone() if pair else None for M in (A, B))
        pair = pair and ((A0, B0) if pair[0] is A and pair[1] is B else
                         tuple(M.detach().clone() for M in pair))
        original = W.cpu() if keep_base and frozen is not W else None
        return cls(linear, frozen, A, B, A0, B0, pair, original)

    def forward(self, x):
        if self.W is not None:
            return linear(x, self.W, self.bias)
        return product(x, self.frozen, *self.factors(), self.bias)

    def factors(self):
        """A (in, r) and B (r, out) as they are multiplied, made of this layer's parameters."""
        return self.A, self.B

    def base(self):
        """W (out, in) as it was before: kept, or `frozen` if nothing was subtracted. ValueError."""
        if self.original is None and (self.A0 is not None or isinstance(self.frozen, nn.Module)):
            raise ValueError("the base weights were not kept: inject or load with keep_base=True")
        return self.frozen.detach() if self.original is None else self.original


def sampled(W, device="cpu"):
    """Some 256 entries of W, by which adapter.py tells one base model from another."""
    return W.detach().flatten()[::max(1, W.numel() // 256) | 1].to(device, copy=True)  # odd: | 1


# ------------------------------------------------------------------------------------- the network

def inject(net: nn.Module, rank: int, method="pissa", targets=TARGETS, niter: int | None = 5,
           seed: int = 0, *, read: Callable | None = None, quant_iters=5, bits=4,
           double_quant=True, last_svd=True, keep_base=False, progress=True) -> nn.Module:
    """Replace the target linears of `net` by PissaLinear, in place, and freeze everything else.

    rank: 1 ... the smaller side of the smallest target. method: a key of METHODS, a function like
    init_pissa, or a module with an `init` and perhaps a `Layer`. targets: leaf names of modules.
    niter: power iterations of the SVD, None for an exact one. The residual is 0.4 % above the
    optimum with 3, 0.07 % with 5 (SmolLM2). seed: of all random numbers. quant_iters, last_svd,
    bits, double_quant: see qpissa.py, nf4.py. keep_base: keep W in host memory, for `disabled` and
    `remove`. read: a function from a module's name to its W, if `net` is on the meta device: each W
    is asked for once. ValueError: before anything changes; from `read` or the method, on the way.
    """
    init, Layer = init_of(method), getattr(method, "Layer", PissaLinear)
    linears, own = find_linears(net, targets, rank), getattr(method, "OPTIONS", {})
    options = Options(rank, niter, None, quant_iters, bits, double_quant, last_svd, linears, own)
    method = getattr(method, "__name__", str(method)).rpartition(".")[2]
    bar, kept = tqdm(list(linears), method, unit="matrix", leave=False, disable=not progress), []
    for name in bar:
        linear = linears[name]                       # the previous one is freed here, with its W
        if read:
            linear.weight = nn.Parameter(read(name), requires_grad=False)
            if not finite(linear.weight):
                raise ValueError(f"{name}: the weight holds NaN or Inf")
        options.generator = generator_of(name, seed, linear.weight.device)
        layer = Layer.from_linear(linear, init, options, keep_base)
        if len(linears) == bar.total:                # now that the method has accepted the first
            net.requires_grad_(False)
        net.set_submodule(name, layer)
        del linears[name]                            # and options.remaining[name]
        kept += [M for M in (layer.A0, layer.B0, *(layer.subtracted or ())) if M is not None]
        if len(kept) > 250 or not (options.ready and linears):   # many: each copy waits for a GPU
            for M in kept:
                M.data = M.cpu()
            kept.clear()
    net.pissa = {"method": method, "rank": rank, "niter": niter, "seed": seed,
                 "quant_iters": quant_iters, "last_svd": last_svd, "own": own}
    if progress:
        print(f"{method}: {bar.n} matrices at rank {rank} in {bar.format_dict['elapsed']:.1f} s")
    return net


def generator_of(name, seed, device):
    """The random numbers of a matrix, whatever else is replaced. A group has those of its first."""
    return torch.Generator(device).manual_seed((seed + crc32(name.encode())) % 2**63)


def find_linears(net, targets, rank=1):
    """{name: nn.Linear} of the modules whose leaf name is among `targets`. ValueError for a name
    that no module has, a module that cannot be replaced, a rank out of range, NaN or Inf."""
    targets = {t or "(empty)" for t in ([targets] if isinstance(targets, str) else targets or [""])}
    leaves = {n: n.rpartition(".")[2] for n, _ in net.named_modules() if n}
    if layers(net):
        raise ValueError("the model is injected already: merge(net) or remove(net) first")
    if nothing := targets - set(leaves.values()):
        there = {leaf for n, leaf in leaves.items() if type(net.get_submodule(n)) is nn.Linear}
        raise ValueError(f"no module is called {', '.join(sorted(map(str, nothing)))}; the linear "
                         f"layers here are {', '.join(sorted(there)) or 'none'}")
    found = {n: net.get_submodule(n) for n, leaf in leaves.items() if leaf in targets}
    places = [id(child) for parent in net.modules() for child in parent.children()]
    for n, m in found.items():
        if type(m) is not nn.Linear:      # a subclass may read its weight in ways of its own
            raise ValueError(f"{n} is a {type(m).__name__}, not an nn.Linear")
        if isinstance(net.get_submodule(n.rpartition(".")[0]), nn.TransformerEncoderLayer):
            raise ValueError(f"{n} is part of an nn.TransformerEncoderLayer, which never calls it")
        if places.count(id(m)) > 1:
            raise ValueError(f"{n} has another name, too: only one of the two would be replaced")
        if not 1 <= rank <= min(m.weight.shape):
            raise ValueError(f"{n}: rank {rank} is not between 1 and {min(m.weight.shape)}")
        if not (m.weight.is_meta or finite(m.weight)):
            raise ValueError(f"{n}: the weight holds NaN or Inf")
    return found


def layers(net):
    """[(name, module)] of the PissaLinear modules of `net`."""
    return [(n, m) for n, m in net.named_modules() if isinstance(m, PissaLinear)]


@contextmanager
def disabled(net: nn.Module):
    """`with disabled(net):` the base model, bit for bit. Needs keep_base=True, and room for W."""
    on = [m for _, m in layers(net) if m.W is None]
    try:
        for m in on:
            m.W = m.base().to(m.frozen.device, m.frozen.dtype)
        yield net
    finally:
        for m in on:
            m.W = None


def merge(net: nn.Module) -> nn.Module:
    """nn.Linear again, with what was learnt: W_res + A B, rounded once to the dtype of W."""
    return to_linears(net, lambda m: residual(as_tensor(m.frozen), *m.factors(), sign=1))


def remove(net: nn.Module) -> nn.Module:
    """nn.Linear again: the base model, bit for bit. Needs keep_base=True unless `frozen` is W."""
    bases = {m: m.base() for _, m in layers(net)}    # raises before anything changes
    return to_linears(net, bases.get)


def as_tensor(frozen):
    """A frozen weight as a tensor (out, in). One in four bits is dequantised to float32 or more."""
    dtype = torch.promote_types(frozen.dtype, torch.float32)
    return frozen.dequantize(dtype) if isinstance(frozen, nn.Module) else frozen.detach()


def to_linears(net, weight):
    """Replace every PissaLinear m by an nn.Linear with weight(m), in place."""
    for name in [name for name, _ in layers(net)]:    # names alone: each m is freed when replaced
        m = net.get_submodule(name)
        W = weight(m).to(m.frozen.device, m.frozen.dtype)
        linear = nn.Linear(*reversed(W.shape), bias=False, device="meta").train(m.training)
        linear.weight, linear.bias = nn.Parameter(W, requires_grad=False), m.bias
        net.set_submodule(name.removesuffix("._orig_mod"), linear)      # torch.compile's wrapper
    net.__dict__.pop("pissa", None)
    return net
