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

In four bits. QPiSSA quantises the residual, Q = nf4(W - A B), which costs less accuracy than what
QLoRA does, Q = nf4(W): the principal components are the part of W with the largest entries. What Q
leaves over can be looked for again, in turns (LoftQ, arXiv 2310.08659, its Algorithm 1):

    Q <- nf4(W - A B),    A B <- SVD_r(W - Q)        LoftQ begins with A B = 0, QPiSSA with SVD_r(W)

    Q             weight       an nf4.NF4
    A_q, B_q      Aq, Bq       what was subtracted when Q was rounded the last time: W, A_q and B_q
                               give Q again, so Q need not be saved; in W_res they are A_0 and B_0

Everything here works on any nn.Module with nn.Linear inside; adapter.py saves and loads.

    pissa.inject(net, rank=64); ...train...; adapter.save(net, "there"); adapter.load(base, "there")
"""
import hashlib
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import nf4
from svd import finite, full_float32, grouped_svd, wide

NOT_KEPT = "the base weights were not kept (keep_base=False): load the model again for that"
GROUP = 32                      # matrices of one shape that a GPU decomposes together, at most
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# --------------------------------------- methods: weight -> frozen weight, A, B, (A_q, B_q) or None

@dataclass
class Options:
    """What the methods can be told; for their meaning see `inject`."""
    rank: int
    niter: int | None = 5
    generator: torch.Generator | None = None
    quant_iters: int = 5
    double_quant: bool = True
    last_svd: bool = True
    pair: tuple | None = None            # A and B of pissa, where they are known already


@full_float32()
def residual(weight, A, B):
    """W - A B, computed in float32 and rounded once to the dtype of `weight` (out, in)."""
    W = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    return W.addmm_(B.T, A.T, alpha=-1).to(weight.dtype)


def principal(weight, o):
    """A = U_r S_r^1/2 and B = S_r^1/2 V_r^T of W, given as weight (out, in) (eq. 2 and 3)."""
    return principal_alike([weight], o)[0]


def principal_alike(weights, o):
    """[(A, B)] of several weights of one shape: decomposed together, which is quicker."""
    USV = grouped_svd([W.T for W in weights], o.rank, niter=o.niter, generator=o.generator)
    return [((U * S.sqrt()).contiguous(), (S.sqrt()[:, None] * Vh).contiguous())
            for U, S, Vh in zip(*USV)]


def rounded(weight, A, B, double_quant):
    """Q = nf4(W - A B), where W - A B is in float32 whatever the dtype of `weight` (out, in)."""
    Q = nf4.quantize(residual(wide(weight), A, B), double_quant)
    Q.dtype = weight.dtype
    return Q


def init_pissa(weight, o):
    """The principal components are trained, W_res = W - A B is frozen (eq. 2 to 4)."""
    A, B = o.pair or principal(weight, o)
    return residual(weight, A, B), A, B, (A, B)


def init_lora(weight, o):
    """LoRA: A ~ N(0, 1/in), B = 0, W itself is frozen."""
    W = wide(weight).T
    A = torch.randn(W.shape[0], o.rank, generator=o.generator, device=W.device, dtype=W.dtype)
    return weight, A * W.shape[0] ** -0.5, W.new_zeros(o.rank, W.shape[1]), None


def init_qlora(weight, o):
    """QLoRA: LoRA on Q = nf4(W)."""
    _, A, B, _ = init_lora(weight, o)
    return nf4.quantize(weight, o.double_quant), A, B, None


def init_loftq(weight, o):
    """LoftQ: A B stands in for what rounding W lost."""
    A, B = (wide(weight).new_zeros(shape) for shape in ((weight.shape[1], o.rank),
                                                        (o.rank, weight.shape[0])))
    return alternate(weight, A, B, o)


def init_qpissa(weight, o):
    """QPiSSA: the principal components are not rounded (section 4)."""
    A, B = principal(weight, o)
    # W - Q is A B and what rounding lost: its leading triplets stand out, two iterations do.
    return alternate(weight, A, B, replace(o, niter=o.niter and min(o.niter, 2)))


@full_float32()
def alternate(weight, A, B, o):
    """Q <- nf4(W - A B) and A B <- SVD_r(W - Q) by turns, until |W - Q - A B| falls no more.

    At most o.quant_iters turns. The authors of PiSSA stop before the last SVD, where A B is still
    what was subtracted to get Q: o.last_svd=False does as they do.
    """
    if o.generator:        # what is drawn here leaves the next matrix as it is with fewer turns
        o = replace(o, generator=o.generator.clone_state())
    best = None
    for _ in range(o.quant_iters):
        Q, pair = rounded(weight, A, B, o.double_quant), (A, B)
        rest = Q.dequantize(A.dtype).neg_().add_(weight)                          # W - Q
        A, B = principal(rest, o)
        kept = (A, B) if o.last_svd else pair
        error = rest.addmm_(kept[1].T, kept[0].T, alpha=-1).norm().item()
        del rest                                     # as large as W; the next turn makes a new one
        if best and error >= best[0]:
            break
        best = error, Q, *kept, pair
    return best[1:]


METHODS = {"pissa": init_pissa, "lora": init_lora, "qpissa": init_qpissa, "qlora": init_qlora,
           "loftq": init_loftq}
QUANTISED = ("qpissa", "qlora", "loftq")


# ------------------------------------------------------------------------------------------ layer

class Product(torch.autograd.Function):
    """y = x W + (x A) B + bias with a frozen W, a tensor (out, in) or an nf4.NF4.

    What autograd would make of `PissaLinear.forward`, but every sum of two products is accumulated
    by the second one, in place, and an NF4 is unpacked when it is needed, and kept in four bits.
    With g = dL/dy:   dL/dx = g W^T + (g B^T) A^T,   dL/dA = x^T (g B^T),   dL/dB = (x A)^T g
    unread: nobody looks at y, it is for the gradients' sake; so its numbers are not computed.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, bias, unread):
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        ctx.W, shape, x = W, x.shape, x.reshape(-1, x.shape[-1]).to(dtype)        # x: (T, in)
        A, B = A.to(dtype), B.to(dtype)
        xA = x @ A                                                                # (T, r)
        ctx.save_for_backward(x, xA, A, B)
        if unread:
            return x.new_empty(*shape[:-1], W.shape[0])
        return F.linear(x, plain(W, dtype), bias).addmm_(xA, B).view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx, g):
        x, xA, A, B = ctx.saved_tensors
        need, shape, g = ctx.needs_input_grad, g.shape, g.reshape(-1, g.shape[-1])      # (T, out)
        gB = g @ B.T                                                              # (T, r)
        dx = (g @ plain(ctx.W, g.dtype)).addmm_(gB, A.T) if need[0] else None
        return (dx if dx is None else dx.view(*shape[:-1], -1), None, x.T @ gB, xA.T @ g,
                g.sum(0) if need[4] else None, None)


def plain(W, dtype):
    """An NF4 unpacked; a tensor as it is, but for autocast."""
    return W.dequantize(dtype) if isinstance(W, nf4.NF4) else W.to(dtype)


class PissaLinear(nn.Module):
    """y = x W_res + (x A) B + bias, in place of an nn.Linear; only A and B are trained.

    weight: (out, in), a parameter or an nf4.NF4. A0, B0: the initial factors, Aq, Bq: see the top;
    in host memory (a plain attribute does not move with the module), None for lora and qlora.
    base: the original weight, in host memory, unless it is `weight` itself or was not kept.
    unread: see `Product`; set for a moment by a model that recomputes what it did not keep.
    """
    unread = False

    def __init__(self, linear, weight, A, B, A0=None, B0=None, Aq=None, Bq=None, base=None):
        super().__init__()
        self.weight = weight if isinstance(weight, nf4.NF4) else nn.Parameter(
            weight, requires_grad=False)
        self.bias, self.enabled = linear.bias, True
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        self.A0, self.B0, self.Aq, self.Bq, self.base = A0, B0, Aq, Bq, base
        self.changed = A0 is not None or isinstance(weight, nf4.NF4)     # `weight` is W no more

    @classmethod
    def from_linear(cls, linear, rank, *, method="pissa", keep_base=True, **options):
        """Decompose `linear.weight` by `method`; the arguments are those of `inject`, and the
        generator of random numbers."""
        W = linear.weight.detach()
        weight, A, B, pair = METHODS[method](W, Options(rank, **options))
        base = W.cpu() if keep_base and weight is not W else None
        if pair is None:
            return cls(linear, weight, A, B, base=base)
        A0, B0 = (M.to("cpu", copy=True) for M in (A, B))
        Aq, Bq = (A0, B0) if pair[0] is A else (M.cpu() for M in pair)
        return cls(linear, weight, A, B, A0, B0, Aq, Bq, base)

    def forward(self, x):
        if self.enabled and not torch.compiler.is_compiling():
            return Product.apply(x, self.weight, self.A, self.B, self.bias, self.unread)
        if isinstance(self.weight, nf4.NF4):
            y = self.weight(x)
            y = y if self.bias is None else y + self.bias.to(y.dtype)
        else:
            y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y
        return y + (x @ self.A.to(x.dtype)) @ self.B.to(x.dtype)

    def frozen(self):
        """W_res or Q as a tensor (out, in)."""
        W = self.weight
        if isinstance(W, nf4.NF4):
            return W.dequantize(torch.promote_types(W.dtype, torch.float32))
        return W.detach()

    def switch(self, on):
        """Turn the adapter on or off. Off, the original weight takes the place of the residual."""
        if self.enabled != on and self.changed:
            if self.base is None:
                raise ValueError(NOT_KEPT)
            device, parked = self.weight.device, self.weight
            for_now = self.base.to(device)
            kept = parked if isinstance(parked, nf4.NF4) else parked.detach()
            self.__dict__["base"] = kept.cpu()               # an NF4 would become a submodule here
            if isinstance(for_now, nf4.NF4):
                del self.weight              # a parameter makes no room for a module by itself
                self.weight = for_now
            else:
                self.weight = nn.Parameter(for_now, requires_grad=False)
        self.enabled = on

    def extra_repr(self):
        return f"in={self.A.shape[0]}, out={self.B.shape[1]}, rank={self.A.shape[1]}"


# ---------------------------------------------------------------------------------------- network

def inject(net, rank, method="pissa", targets=TARGETS, niter=5, seed=0, *, weight=None,
           quant_iters=5, double_quant=True, last_svd=True, keep_base=True, progress=True):
    """Replace the target linears of `net` by PissaLinear, in place, and freeze everything else.

    rank: of A and B, 1 ... min(in, out) of the smallest target. method: a key of METHODS.
    targets: leaf names of modules. niter: power iterations of the SVD, None for an exact one; with
    3 it takes three quarters of the time, and the residual is within 0.4 % of the optimum instead
    of 0.07 % (SmolLM2, ranks 16 to 128). On a GPU, matrices of one shape, but in float16, are
    decomposed together, unless `weight` is given.
    quant_iters, last_svd: of qpissa and loftq, see `alternate`; double_quant: see nf4.py.
    weight: where `net` is on the meta device, a function from the name of a module to its matrix
    (out, in): each is asked for once and let go, so that all of them are never in memory together.
    keep_base: keep the original weights in host memory, for `disabled`, `remove` and a further
    `load`; without them these are refused. Raises ValueError, before anything is changed, for a
    target that matches nothing or is no nn.Linear, a rank too large, an injected model, and a
    weight with NaN or Inf; from `weight`, the latter is found when its turn comes.
    """
    check_method_options(method, quant_iters, last_svd)
    if any(layers(net)):
        raise ValueError("the model is injected already: merge(net) or remove(net) first")
    linears = find_linears(net, targets)
    for name, m in linears.items():
        check_rank(name, m, rank)
        if not weight:
            check_finite(name, m.weight)
    start, samples, errors, generators, pairs = time.perf_counter(), {}, {}, {}, {}
    grouped = method == "pissa" and niter is not None and not weight
    net.requires_grad_(False)
    bar = tqdm(list(linears), desc=method, unit="matrix", disable=not progress, leave=False)
    for name in bar:
        bar.set_postfix_str(name)
        linear = linears.pop(name)       # the only reference: W is freed before the next one
        if weight:
            linear.weight = nn.Parameter(check_finite(name, weight(name)), requires_grad=False)
        W = linear.weight
        samples[name] = sample(W)
        if W.device not in generators:
            generators[W.device] = torch.Generator(W.device).manual_seed(seed)
        if grouped and quicker_together(W) and name not in pairs:
            o = Options(rank, niter, generators[W.device])
            pairs |= principal_of_group(name, {name: linear} | linears, o)
        layer = PissaLinear.from_linear(
            linear, rank, method=method, niter=niter, generator=generators[W.device],
            quant_iters=quant_iters, double_quant=double_quant, last_svd=last_svd,
            keep_base=keep_base, pair=pairs.pop(name, None))
        put(net, name, layer)
        errors[name] = relative_error(W, layer)
        del W
    net.pissa = {"method": method, "rank": rank, "niter": niter, "seed": seed,
                 "base": digest(samples)}
    if method in QUANTISED:
        net.pissa |= {"quant_iters": quant_iters, "double_quant": double_quant,
                      "last_svd": last_svd, "codes": checksum(nf4_sums(net))}
    if progress:
        print(summary(net, errors, time.perf_counter() - start))
    return net


def check_method_options(method, quant_iters, last_svd):
    """Raise ValueError for what `inject` does not know, or what would train nothing."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if quant_iters < 1:
        raise ValueError(f"quant_iters should be at least 1, not {quant_iters}")
    if method == "loftq" and quant_iters == 1 and not last_svd:
        raise ValueError("loftq begins with A B = 0, and one turn without the last SVD ends "
                         "there, too: nothing would ever be trained; quant_iters should be 2 or "
                         "more")


def check_rank(name, m, rank):
    """Raise ValueError for a rank that the nn.Linear m does not have."""
    if not 1 <= rank <= min(m.weight.shape):
        raise ValueError(f"{name}: rank {rank} is not between 1 and {min(m.weight.shape)}, the "
                         f"smaller side of its {m.in_features} x {m.out_features} matrix")


def quicker_together(W):
    """Whether W is decomposed in a group: on a GPU, but float16 would be copied in float32."""
    return W.is_cuda and W.dtype != torch.float16


def alike(name, linears, most=GROUP):
    """`name` and the next of `linears` whose weights have its shape, dtype and device."""
    def kind(n):
        W = linears[n].weight
        return W.shape, W.dtype, W.device

    return [n for n in linears if kind(n) == kind(name)][:most]


def principal_of_group(name, linears, o):
    """{name: (A, B)} of `name` and of the next of `linears` that are like it."""
    names = alike(name, linears)
    return dict(zip(names, principal_alike([linears[n].weight.detach() for n in names], o)))


def summary(net, errors, seconds):
    """What `inject` did, in a line."""
    quantised, (trained, total) = [*nf4_weights(net).values()], count(net)
    method, mean = net.pissa["method"], sum(errors.values()) / len(errors)
    text = (f"{method}: {len(errors)} matrices at rank {net.pissa['rank']} in {seconds:.1f} s, "
            f"{trained:,} of {total:,} parameters trained ({trained / total:.2%}), ")
    if not quantised:
        return text + f"largest relative |W - (W_res + A B)| {max(errors.values()):.1e}"
    bits = 8 * sum(Q.nbytes for Q in quantised) / sum(Q.shape.numel() for Q in quantised)
    return text + (f"{bits:.2f} bits a frozen weight, relative |W - (Q + A B)| {mean:.4f} on "
                   f"average, at most {max(errors.values()):.4f}")


def count(net):
    """How many parameters are trained, and how many there are; in four bits, a weight is one."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    total = sum(p.numel() for p in net.parameters())
    return trained, total + sum(Q.shape.numel() - sum(p.numel() for p in Q.parameters())
                                for Q in nf4_weights(net).values())


def nf4_weights(net):
    """{module name: NF4} of the layers that are in four bits."""
    return {n: m.weight for n, m in layers(net) if isinstance(m.weight, nf4.NF4)}


def check_finite(name, W):
    """W, or ValueError."""
    if not finite(W):
        raise ValueError(f"{name}: the weight holds NaN or Inf")
    return W


@torch.no_grad()
@full_float32()
def relative_error(weight, layer):
    """|W - (W_res + A B)| / |W|, Frobenius norms: what rounding the residual costs."""
    norm = torch.linalg.vector_norm
    near = torch.addmm(wide(layer.frozen()), layer.B.T, layer.A.T)
    return (norm(near.sub_(weight)) / norm(weight, dtype=near.dtype).clamp(min=1e-30)).item()


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
    """
    return digest({name: sample(weight(name)) for name in names})


def sample(W):
    """Shape and some 256 entries of W, in bfloat16, so that a checkpoint has one fingerprint
    whether it is read in float32 or in bfloat16."""
    step = max(1, W.numel() // 256) | 1                    # odd, or it could stay in one column
    # a copy, since a view would keep all of W in memory
    return tuple(W.shape), W.detach().flatten()[::step].to("cpu", torch.bfloat16, copy=True)


def digest(samples):
    """The hash of {name: sample(W)}."""
    h = hashlib.sha256()
    for name in sorted(samples):
        h.update(f"{name} {samples[name][0]}\n".encode())
    entries = torch.cat([samples[name][1] for name in sorted(samples)])
    h.update(bytes(entries.view(torch.uint8).tolist()))
    return h.hexdigest()


def nf4_sums(net):
    """{module name: NF4.checksum()}, for `checksum`."""
    return {n: Q.checksum() for n, Q in nf4_weights(net).items()}


def checksum(sums):
    """A hash of such sums, to tell whether weights were rounded in the same way."""
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


def base_weight(m, name):
    """The original weight (out, in) of an nn.Linear or of the PissaLinear in its place."""
    if isinstance(m, PissaLinear) and m.changed and m.enabled:
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
    return to_linears(net, lambda m: residual(
        m.frozen(), -m.A.detach(), m.B.detach()).to(m.weight.dtype))


def remove(net):
    """nn.Linear again, without what was learnt: the base model, bit for bit."""
    for _, m in layers(net):
        m.switch(False)
    return to_linears(net, lambda m: m.weight.data)
