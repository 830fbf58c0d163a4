"""fast.py: every fast form equals its plain form, in values and gradients; `off` and `faster`."""
import inspect
import re
import sys

import pytest
import torch
from torch import nn

import fast
import model
import nf4
import pissa
import train
from conftest import register_flash, small_net
from support import parallel

# dtype of the operands, autocast, allowed relative difference
PRECISIONS = {"float32": (torch.float32, False, 1e-6), "bfloat16": (torch.bfloat16, False, 1e-2),
              "autocast": (torch.float32, True, 1e-2)}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def both_ways(function, tensors, autocast, names=None):
    """[outputs and gradients] of the plain and of the fast form, on leaves of their own."""
    results = []
    for form in (function.plain, function):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t
                  for t in tensors]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = form(*leaves)
        wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
        g = draw(*y.shape, seed=1).to(y.dtype) if y.ndim else torch.ones((), dtype=y.dtype)
        results.append([y, *torch.autograd.grad(y, wanted, g)])
    return results


def assert_same(results, rel):
    for plain, quick in zip(*results, strict=True):
        assert quick.dtype == plain.dtype and quick.shape == plain.shape
        assert (quick.float() - plain.float()).norm() <= rel * plain.float().norm()


@pytest.fixture(params=PRECISIONS, ids=str)
def precision(request):
    return PRECISIONS[request.param]


@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40), (0, 40)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_product(precision, shape, with_bias):
    dtype, autocast, rel = precision
    tensors = [draw(*shape).to(dtype), draw(60, 40).to(dtype), draw(40, 4), draw(4, 60),
               draw(60).to(dtype) if with_bias else None]
    frozen = tensors[1]

    def form(product):
        return lambda x, A, B, *bias: product(x, frozen, A, B, *(bias or (None,)))

    function = form(pissa.product)
    function.plain = form(pissa.product.plain)
    leaves = [t for i, t in enumerate(tensors) if i != 1 and t is not None]
    assert_same(both_ways(function, leaves, autocast), rel)


@pytest.mark.parametrize("with_bias", [True, False])
def test_product_in_four_bits(precision, with_bias):
    dtype, autocast, rel = precision
    Q = nf4.quantize(draw(64, 128).to(dtype))

    def form(product):
        return lambda x, A, B, *bias: product(x, Q, A, B, *(bias or (None,)))

    function = form(pissa.product)
    function.plain = form(pissa.product.plain)
    leaves = [draw(5, 128).to(dtype), draw(128, 4), draw(4, 64), *[draw(64).to(dtype)] * with_bias]
    assert_same(both_ways(function, leaves, autocast), rel)


def test_rotate(precision):
    dtype, autocast, rel = precision
    cos, sin = model.rope_tables(model.Config(head_dim=16), torch.arange(7)[None])

    def function(x):
        return model.rotate(x, cos, sin)

    function.plain = lambda x: model.rotate.plain(x, cos, sin)
    assert_same(both_ways(function, [draw(2, 7, 3, 16).to(dtype)], autocast), rel)


def test_rotate_in_one_kernel(monkeypatch):
    """As on a GPU, compiled; and eager again if nothing can be compiled, with one warning."""
    monkeypatch.setattr(fast, "worth_compiling", lambda x: True)
    rotate = fast.rotate_formula                                   # what the compiler is given
    monkeypatch.setitem(fast.KERNELS, rotate, rotate)
    cos, sin = model.rope_tables(model.Config(head_dim=16), torch.arange(7)[None])

    def function(x):
        return model.rotate(x, cos, sin)

    function.plain = lambda x: model.rotate.plain(x, cos, sin)
    assert_same(both_ways(function, [draw(2, 7, 3, 16)], False), 1e-6)

    def no_compiler(*args):
        raise RuntimeError("no triton\nat all")

    monkeypatch.setitem(fast.KERNELS, fast.rotate_formula, no_compiler)
    with pytest.warns(UserWarning, match="could not be compiled, and takes longer: no triton$"):
        function(draw(2, 7, 3, 16).requires_grad_())
    assert fast.KERNELS[fast.rotate_formula] is fast.rotate_eager
    assert_same(both_ways(function, [draw(2, 7, 3, 16)], False), 1e-6)


def test_rotate_where_nothing_compiles(monkeypatch):
    """torch.compile itself raises: one warning, and eager from then on."""
    def not_supported(function):
        raise RuntimeError("Dynamo is not supported here\nat all")

    monkeypatch.setattr(torch, "compile", not_supported)
    monkeypatch.setattr(fast, "KERNELS", {})
    cos, sin = model.rope_tables(model.Config(head_dim=16), torch.arange(7)[None])
    x = draw(2, 7, 3, 16)
    with pytest.warns(UserWarning, match="takes longer: Dynamo is not supported here$") as warned:
        first, second = (fast.rotate_fused(x, cos, sin) for _ in range(2))
    assert len(warned) == 1 and fast.KERNELS[fast.rotate_formula] is fast.rotate_eager
    assert torch.equal(first, second)
    assert_same([[model.rotate.plain(x, cos, sin)], [first]], 1e-6)


@pytest.mark.parametrize("gelu", [False, True])
def test_swiglu(precision, gelu):
    dtype, autocast, rel = precision
    assert_same(both_ways(model.swiglu, [draw(5, 24).to(dtype), draw(5, 24, seed=2).to(dtype),
                                         gelu], autocast), rel)


def test_rows(precision):
    dtype, autocast, rel = precision
    index = torch.tensor([0, 2, 3, 7])
    function = lambda x: model.rows(x, index)                                       # noqa: E731
    function.plain = lambda x: model.rows.plain(x, index)
    assert_same(both_ways(function, [draw(9, 5).to(dtype)], autocast), rel)


@pytest.mark.parametrize("T, masked", [(1, True), (1, False), (6, True), (6, False)])
@pytest.mark.parametrize("G", [1, 2, 6])
def test_attend(precision, T, masked, G):
    dtype, autocast, rel = precision
    S = 6
    seen = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    mask = torch.zeros(2, 1, T, S).masked_fill(~seen, -torch.inf).to(dtype) if masked else None

    def function(q, k, v):
        return model.attend(q, k, v, mask)

    function.plain = lambda q, k, v: model.attend.plain(q, k, v, mask)
    tensors = [draw(2, n, t, 8, seed=s).to(dtype) for s, (n, t) in enumerate(
        [(6, T), (G, S), (G, S)])]
    assert_same(both_ways(function, tensors, autocast), max(rel, 1e-6))


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("G", [2, 6])
@pytest.mark.parametrize("way", ["flash", "padded"])
def test_attend_packed(monkeypatch, precision, way, G, window):
    """Flash attention is emulated here; without it, only taking the rows is quicker."""
    dtype, autocast, rel = precision
    if way == "flash":
        dtype = torch.bfloat16 if autocast else dtype       # as linear layers give under autocast
        register_flash()
        monkeypatch.setattr(fast, "takes_flash", lambda q: True)
    lengths, T = torch.tensor([7, 5, 2]), 7
    where = (torch.arange(T) < lengths[:, None]).flatten().nonzero()[:, 0]
    starts = torch.tensor([0, 7, 12, 14], dtype=torch.int32)
    key, query = torch.arange(T), torch.arange(T)[:, None]
    seen = (key <= query) & ((key > query - window) if window else True)
    mask = torch.zeros(1, 1, T, T).masked_fill(~seen, -torch.inf).to(dtype) if window else None

    def form(attend_packed):
        return lambda q, k, v: attend_packed(q, k, v, mask, where, starts, 3, T,
                                             window)

    function = form(model.attend_packed)
    function.plain = form(model.attend_packed.plain)
    tensors = [draw(1, n, 14, 8, seed=s).to(dtype) for s, n in enumerate([6, G, G])]
    assert_same(both_ways(function, tensors, autocast), rel)


@pytest.mark.parametrize("method, bits", [("pissa", 4), ("qpissa", 4)])
def test_checkpointed(precision, method, bits, tokens):
    """Recomputation changes nothing, though it skips a layer's last product."""
    dtype, autocast, rel = precision
    net = pissa.inject(small_net().to(dtype), 4, method, niter=0, bits=bits, progress=False)
    layer, rope = net.model.layers[0], model.rope_tables(net.config, torch.arange(9)[None])
    x, results = draw(2, 9, 48).to(dtype), []
    for form in (layer, lambda *a: model.checkpointed.plain(layer, *a),
                 lambda *a: model.checkpointed(layer, *a)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = form(leaf, rope)
        wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y))])
    assert_same(results[:2], rel)
    assert_same(results[::2], 1e-12 if not autocast else rel)       # the fast one is bit for bit
    assert fast.SKIP_OUTPUT is None


def test_an_output_is_skipped_only_in_the_backward_of_recomputation(monkeypatch):
    net = pissa.inject(small_net(), 4, "lora", progress=False)
    layer, rope = net.model.layers[0], model.rope_tables(net.config, torch.arange(9)[None])
    skipped, real = [], fast.LowRank.forward

    def spy(ctx, x, W, *rest):
        skipped.append(W is fast.SKIP_OUTPUT)
        return real(ctx, x, W, *rest)

    monkeypatch.setattr(fast.LowRank, "forward", staticmethod(spy))
    y = model.checkpointed(layer, draw(2, 9, 48).requires_grad_(), rope)
    assert skipped == [False] * 7
    y.sum().backward()
    assert skipped[7:] == [False] * 6 + [True]                                    # down_proj
    layer(draw(2, 9, 48), rope)
    assert skipped[14:] == [False] * 7


@pytest.mark.parametrize("trained_head", [False, True])
def test_loss(monkeypatch, precision, trained_head):
    dtype, autocast, rel = precision
    monkeypatch.setattr(fast, "CHUNK", 300)                                 # three rows at a time
    head = nn.Linear(16, 101, bias=False).to(dtype).requires_grad_(trained_head)
    targets = torch.randint(101, (10,), generator=torch.Generator().manual_seed(0))
    results = []
    for form in (train.loss_of.plain, train.loss_of):
        x = draw(10, 16).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = form(head, x, targets)
        results.append([y, *torch.autograd.grad(y, [x, *([head.weight] if trained_head else [])])])
    assert_same(results, rel)


# --- faster and off

def test_faster_and_off():
    calls = []

    @fast.faster(lambda x: calls.append("fast") or (None if x == 0 else x))
    def double(x):
        """Documented."""
        calls.append("plain")
        return x

    assert double(1) == 1 and double(0) == 0 and calls == ["fast", "fast", "plain"]
    assert double.plain(1) == 1 and double.__doc__ == "Documented."
    calls.clear()
    with fast.off():
        double(1)
        with fast.off():
            double(1)
        double(1)
    assert calls == ["plain"] * 3
    with pytest.raises(RuntimeError, match="inside"), fast.off():
        raise RuntimeError("inside")
    double(1)
    assert calls[3:] == ["fast"]


def test_off_is_plain_everywhere(tokens):
    """The loss and its gradients of a whole network, with and without fast.py."""
    results = []
    where = (torch.arange(16) < torch.tensor([16, 9, 4])[:, None]).flatten().nonzero()[:, 0]
    for plain in (False, True):
        net = pissa.inject(small_net(), 4, niter=0, progress=False)
        net.checkpointing = True
        labels = tokens[:, 1:].clone()
        with fast.off() if plain else torch.enable_grad():
            loss = train.loss_sum(net, tokens[:, :-1], labels, where)
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in net.parameters() if p.requires_grad)])
    assert_same(results[::-1], 1e-5)


@pytest.mark.parametrize("many", [1, 40, 2**24])
def test_joined_parameters(monkeypatch, many):
    """train.joined.plain are the weights themselves: AdamW makes the same numbers of both."""
    monkeypatch.setattr(fast, "MANY", many)
    monkeypatch.setattr(fast, "SMALL", 30)
    results = []
    for form in (train.joined.plain, train.joined):
        g = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(s, generator=g))
                   for s in ((3, 4), (4, 2), (5, 7), (6,), (2, 2, 2), (1, 1))]
        params = form(weights)
        optimizer = torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True)
        for _ in range(3):
            sum(((p - 1) ** 2).sum() for p in weights).backward()
            norms = parallel.add_up(params) or torch.nn.utils.clip_grad_norm_(params, 1e9)
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in weights)
        results.append([norms, *weights])
        moments = {key: [v for p in params for v in parallel.by_part(p, optimizer.state[p][key])]
                   for key in ("exp_avg", "exp_avg_sq")}
        results[-1] += [*moments["exp_avg"], *moments["exp_avg_sq"]]
        for p in params:
            rejoined = parallel.from_parts(p, parallel.by_part(p, optimizer.state[p]["exp_avg"]))
            assert torch.equal(rejoined, optimizer.state[p]["exp_avg"])
    assert len(params) == {1: 6, 40: 3, 2**24: 3}[many] and len(results[0]) == 19
    assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in zip(*results, strict=True))


def test_second_derivatives_are_refused():
    """The plain forms have them; a fast one says so instead of leaving terms out."""
    x, A, B, W = (draw(*s).requires_grad_() for s in ((5, 40), (40, 4), (4, 60), (60, 40)))
    net, head = pissa.inject(small_net(), 4, progress=False), nn.Linear(40, 9)
    net.checkpointing, weight = True, net.model.layers[0].mlp.up_proj.A
    for y, leaf in ((pissa.product(x, W.detach(), A, B, None), A),
                    (train.loss_of(head, x, torch.arange(5)), x),
                    (net(torch.arange(3, 9)[None]), weight)):
        grad, = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


def test_a_product_that_was_changed_is_not_computed_again():
    """A mask put on swiglu's result in place, as a hook may do, counts in the gradient of A."""
    gate, up, A, B = (draw(*s).requires_grad_() for s in ((5, 40), (5, 40), (40, 4), (4, 8)))
    results = []
    for swiglu in (model.swiglu, model.swiglu.plain):
        x = swiglu(gate, up).mul_(0.5)
        y = pissa.product(x, draw(8, 40), A, B, None)
        results.append(torch.autograd.grad(y.square().sum(), [gate, up, A, B]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_the_mlp_see_numbers_again():
    """With checkpointing, what backward computes again is what a forward hook saw before."""
    net, seen = pissa.inject(small_net(), 4, progress=False), []
    net.checkpointing = True
    net.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, x, y: seen.append(y.detach().clone()))
    torch.use_deterministic_algorithms(True)             # fills memory that is not initialised
    try:
        net(torch.arange(3, 9)[None]).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(seen) == 2 and torch.equal(*seen)


def test_every_form_is_compared_with_its_plain_one():
    """A new `@faster` line wants a test in this file. Groups are compared in test_pissa.py, and
    recorded graphs need a GPU."""
    marked = re.compile(r"^@faster\(.*\)\n(?:@.*\n)*def (\w+)\(", re.M)
    forms = {f"{module.__name__}.{name}" for module in (model, pissa, train)
             for name in marked.findall(inspect.getsource(module))}
    assert forms == {"model.rotate", "model.attend", "model.swiglu", "model.attend_packed",
                     "model.rows", "model.checkpointed", "model.recorded", "pissa.principal",
                     "pissa.product", "train.loss_of", "train.joined"}
    source = inspect.getsource(sys.modules[__name__])
    for form in forms - {"model.recorded", "pissa.principal"}:
        assert f"{form}.plain" in source or f"both_ways({form}" in source, form
