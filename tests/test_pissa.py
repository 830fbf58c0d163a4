"""pissa.py against its own definition, against autograd, and against what must never happen."""
import copy
import math
import re
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adapter
import fast
import model
import pissa
import svd
from conftest import (
    MLP_TARGETS,
    SMALL,
    assert_logits_equal,
    hugging_face,
    layer_of,
    mlp,
    optimise,
    quiet,
    relative_error,
    small_net,
)

# --- the layer

@pytest.mark.parametrize("method", ["pissa", "lora"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_linear_at_step_0(method, bias):
    linear = nn.Linear(40, 60, bias=bias)
    layer = layer_of(linear, 8, method=method, niter=None)
    x = torch.randn(5, 7, 40)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-6)
    assert layer.A.shape == (40, 8) and layer.B.shape == (8, 60)
    assert (layer.bias is linear.bias) and not layer.weight.requires_grad


def test_factors_are_the_principal_components():
    """A = U sqrt(S), B = sqrt(S) Vh of W (in, out), here from torch.linalg.svd in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(40, 60)
    layer = layer_of(linear, 8, niter=None)
    W = linear.weight.detach().double().T
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    torch.testing.assert_close((layer.A @ layer.B).double(), best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.double().T, W - best, rtol=1e-4, atol=1e-5)
    # The square root of S is split evenly: A^T A = B B^T = S_r.
    for gram in (layer.A.T @ layer.A, layer.B @ layer.B.T):
        torch.testing.assert_close(gram.double(), torch.diag(S[:8]), rtol=1e-4, atol=1e-5)


def test_forward_is_the_equation():
    layer = layer_of(nn.Linear(12, 9), 3)
    with torch.no_grad():
        layer.A.normal_(), layer.B.normal_()
    x = torch.randn(4, 12)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + (x @ layer.A) @ layer.B + layer.bias)


def test_dtypes():
    """The residual has the model's dtype, A and B are float32, the output has the input's dtype."""
    net = quiet(mlp(torch.bfloat16), targets=MLP_TARGETS)
    assert net.fc1.weight.dtype == torch.bfloat16
    assert net.fc1.A.dtype == net.fc1.B.dtype == torch.float32
    assert net(torch.randn(2, 40).bfloat16()).dtype == torch.bfloat16


def test_bfloat16_residual_error_is_one_rounding():
    """|W - (W_res + A B)| is what bfloat16 rounds off W_res: at most 2^-9 of each entry."""
    linear = nn.Linear(64, 64, bias=False).bfloat16()
    layer = layer_of(linear, 8)
    left = linear.weight.float() - (layer.A @ layer.B).T
    assert ((left - layer.weight.float()).abs() <= left.abs() * 2 ** -8 + 1e-12).all()


def test_lora_starts_at_zero_with_gaussian_a():
    net = quiet(nn.Sequential(nn.Linear(400, 300)), 64, "lora", targets=["0"])
    assert net[0].B.abs().max() == 0
    assert net[0].A.std().item() == pytest.approx(400 ** -0.5, rel=0.03)


# --- inject

def test_inject_trains_a_and_b_only(net, tokens):
    before, targets = net(tokens), len(pissa.TARGETS) * net.config.n_layers
    quiet(net, 8)
    trained = {n for n, p in net.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * targets and all(n.endswith((".A", ".B")) for n in trained)
    assert_logits_equal(net(tokens), before, 1e-5)
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    optimise(net, tokens, 3)
    assert all(torch.equal(p, frozen[n]) for n, p in net.named_parameters() if n in frozen)


def test_inject_is_deterministic():
    a, b, c = (quiet(small_net(), 4, niter=1, seed=s) for s in (0, 0, 1))
    same = [torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values())]
    assert all(same)
    assert not torch.equal(a.model.layers[0].mlp.up_proj.A, c.model.layers[0].mlp.up_proj.A)


def test_inject_reports(net, capsys):
    pissa.inject(net, 4, targets=["q_proj", "v_proj"])
    out = capsys.readouterr().out
    assert re.fullmatch(r"pissa: 4 matrices at rank 4 in \d+\.\d s\n", out), out


@pytest.mark.parametrize("call, message", [
    (dict(rank=4, targets=["q_proj", "query"]), "no module is called query; the linear layers here "
     "are down_proj, gate_proj, k_proj, lm_head"),
    (dict(rank=17, targets=["q_proj", "k_proj"]),
     "model.layers.0.self_attn.k_proj: rank 17 is not between 1 and 16"),
    (dict(rank=0), "rank 0 is not between 1 and"),
    (dict(rank=4, method="dora"), "method 'dora' is none of pissa, lora"),
    (dict(rank=4, targets=["mlp"]), "model.layers.0.mlp is a MLP, not an nn.Linear"),
    (dict(rank=4, targets="attn"), "no module is called attn;"),
    *((dict(rank=4, targets=targets), r"no module is called \(empty\); the linear layers here are "
       "down_proj, gate_proj") for targets in ((), [], set(), "", ("q_proj", ""), None)),
    (dict(rank=4, targets=("q_proj", 7)), "no module is called 7;"),
    (dict(rank=4, niter=-1), "niter -1"),
    (dict(rank=4, method="qpissa", quant_iters=0), "quant_iters should be at least 1, not 0"),
    (dict(rank=4, method="loftq", quant_iters=1, last_svd=False), "nothing would ever be trained")])
def test_inject_errors_change_nothing(net, call, message):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        pissa.inject(net, **call)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_targets_may_be_a_name_or_repeat_one():
    found = [[n for n, _ in pissa.layers(quiet(small_net(), 4, "lora", targets=targets))]
             for targets in ("q_proj", ("q_proj", "q_proj"), ["q_proj"])]
    assert found[0] == found[1] == found[2] and len(found[0]) == small_net().config.n_layers


@pytest.mark.parametrize("method", ["pissa", "qpissa"])
@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(method, training, tmp_path):
    """What replaces a module is in train or eval mode as that was, and so are its parts."""
    def modes():
        return {m.training for m in net.modules()}

    net = quiet(small_net().train(training), 4, method)
    assert modes() == {training}
    adapter.save(net, tmp_path / "adapter")
    assert pissa.remove(net) and modes() == {training}
    assert adapter.load(net, tmp_path / "adapter") and modes() == {training}
    assert pissa.merge(net) and modes() == {training}


@pytest.mark.parametrize("seed", [2**63 - 1, 2**64, -1, 10**30])
def test_any_seed(seed):
    assert pissa.layers(quiet(small_net(), 4, "lora", seed=seed))


def test_a_refused_method_changes_nothing(net):
    """Its ValueError comes at the first matrix: nothing is frozen or replaced by then."""
    def refuses(weight, options):
        raise ValueError("not this one")

    net.requires_grad_(True)
    for method, message in (refuses, "not this one"), ("loftq", "nothing would ever be trained"):
        with pytest.raises(ValueError, match=message):
            pissa.inject(net, 4, method, quant_iters=1, last_svd=False, progress=False)
        assert all(p.requires_grad for p in net.parameters()) and not pissa.layers(net)


def test_inject_frees_every_weight_before_the_next(net):
    """At no time is there more than one original weight beside the residuals."""
    refs, alive = [weakref.ref(m) for m in net.modules() if type(m) is nn.Linear][:-1], []

    def spy(weight, *args):
        alive.append(sum(r() is not None for r in refs))
        return pissa.init_pissa(weight, *args)

    quiet(net, 4, spy, keep_base=False)
    assert alive == list(range(14, 0, -1))


def on_meta(dtype):
    with torch.device("meta"):
        return model.Llama(SMALL).to(dtype)


def one_by_one(net):
    """A function name -> weight that makes a copy; the names it was asked for, and how many of the
    copies before were in memory then: a weak reference to the memory itself sees views, too."""
    asked, alive, copies = [], [], []

    def weight(name):
        W = net.get_submodule(name).weight.detach()
        memory = W.view(torch.uint8).numpy().copy()
        alive.append(sum(r() is not None for r in copies))
        asked.append(name), copies.append(weakref.ref(memory))
        return torch.from_numpy(memory).view(W.dtype)

    return weight, asked, alive


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", pissa.METHODS)
def test_one_weight_at_a_time(tmp_path, tokens, method, dtype):
    """From the meta device: the same bit for bit, every matrix asked for once, and let go."""
    whole = quiet(small_net().to(dtype), 4, method)
    adapter.save(whole, tmp_path)
    for put_on in (lambda net, **how: quiet(net, 4, method, **how),
                   lambda net, **how: adapter.load(net, tmp_path, **how)):
        weight, asked, alive = one_by_one(small_net().to(dtype))
        net = put_on(on_meta(dtype), read=weight, keep_base=False)
        assert sorted(asked) == sorted(n for n, _ in pissa.layers(whole))
        assert method == "lora" or not any(alive)                 # LoRA's frozen weight is W
        for name, m in pissa.layers(whole):
            got, want = net.get_submodule(name).state_dict(), m.state_dict()
            assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
        assert adapter.facts(net) == adapter.facts(whole)


def test_one_weight_at_a_time_is_checked(tmp_path):
    adapter.save(quiet(small_net(), 4, "qpissa", niter=0), tmp_path)
    with pytest.raises(ValueError, match="made on another base model"):
        adapter.load(on_meta(torch.float32), tmp_path, read=one_by_one(small_net(seed=1))[0])
    bad = small_net()
    bad.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: the weight holds NaN or Inf"):
        quiet(on_meta(torch.float32), 4, "qlora", read=one_by_one(bad)[0])


def test_inject_twice(net):
    quiet(net)
    with pytest.raises(ValueError, match="injected already"):
        quiet(net)


def test_inject_not_finite(net):
    net.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: the weight holds NaN or Inf"):
        quiet(net)
    assert not pissa.layers(net)


# --- off, merge, remove

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", pissa.METHODS)
def test_off_is_the_base_bit_for_bit(dtype, method, tokens):
    net = small_net().to(dtype)
    base = net(tokens)
    optimise(quiet(net, 4, method), tokens, 2)
    on = net(tokens)
    assert not torch.equal(on, base)
    with pissa.disabled(net):
        assert torch.equal(net(tokens), base)
        with pissa.disabled(net):
            assert torch.equal(net(tokens), base)
        assert torch.equal(net(tokens), base)
    assert torch.equal(net(tokens), on)
    assert torch.equal(pissa.remove(net)(tokens), base) and not pissa.layers(net)


def test_off_comes_back_on_after_an_exception(net, tokens):
    quiet(net)
    on = net(tokens)
    with pytest.raises(RuntimeError, match="inside"), pissa.disabled(net):
        raise RuntimeError("inside")
    assert torch.equal(net(tokens), on)


@pytest.mark.parametrize("method", [m for m in pissa.METHODS if m != "lora"])
def test_base_not_kept(net, method):
    quiet(net, 4, method, keep_base=False, niter=0)
    with pytest.raises(ValueError, match="base weights were not kept"), pissa.disabled(net):
        pytest.fail("must not get here")
    with pytest.raises(ValueError, match="base weights were not kept"):
        pissa.remove(net)
    assert len(list(pissa.layers(net))) == 14


@pytest.mark.parametrize("method", pissa.METHODS)
def test_merge(net, tokens, method):
    names = list(net.state_dict())
    optimise(quiet(net, 4, method), tokens, 2)
    on = net(tokens)
    pissa.merge(net)
    assert list(net.state_dict()) == names and type(net.model.layers[0].mlp.up_proj) is nn.Linear
    assert_logits_equal(net(tokens), on, 1e-5)


def test_merge_while_disabled(net, tokens):
    optimise(quiet(net), tokens, 2)
    on = net(tokens)
    with pissa.disabled(net):
        pissa.merge(net)
    assert_logits_equal(net(tokens), on, 1e-5)


def test_merge_keeps_bias():
    net = mlp()
    x, bias = torch.randn(3, 40), net.fc1.bias
    want = net(x)
    assert pissa.merge(quiet(net, targets=MLP_TARGETS)).fc1.bias is bias
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)


# --- four bits

@pytest.mark.parametrize("method", pissa.METHODS)
def test_autocast(method):
    """As nn.Linear under autocast, with a bias too: bfloat16 out, float32 gradients."""
    linear, x = nn.Linear(40, 60), torch.randn(3, 40, requires_grad=True)
    layer = layer_of(linear, 4, method=method)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = layer(x), linear(x)
    assert y.dtype == want.dtype == torch.bfloat16
    assert (y - want).abs().max() < 0.2 * want.abs().max()
    y.float().sum().backward()
    assert {g.dtype for g in (x.grad, layer.A.grad, layer.B.grad)} == {torch.float32}


@pytest.mark.parametrize("method", pissa.METHODS)
def test_float64(method):
    net, x = quiet(mlp(torch.float64), 4, method, MLP_TARGETS), torch.randn(5, 40).double()
    want = net(x)
    assert want.dtype == torch.float64
    assert_logits_equal(pissa.merge(net)(x), want, 1e-14)


def test_the_base_is_no_part_of_the_network(net):
    """While the adapter is off, W is computed with, but no state_dict has it."""
    quiet(net, 4, "qpissa", niter=0)
    before = net.state_dict()
    with pissa.disabled(net):
        assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(M, before[name]) for name, M in net.state_dict().items())


# --- other people's modules

def test_hugging_face_model(tmp_path, net, tokens):
    """The same adapter on transformers' LLaMA and on ours: names and files are the same."""
    theirs = hugging_face(net)
    optimise(quiet(theirs, 4), tokens, 2)
    adapter.save(theirs, tmp_path)
    ours = adapter.load(net, tmp_path)
    assert_logits_equal(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("method", pissa.METHODS)
def test_plain_mlp(tmp_path, method):
    net, x = mlp(), torch.randn(5, 40)
    quiet(net, 8, method, targets=MLP_TARGETS)
    F.mse_loss(net(x), torch.zeros(5, 30)).backward()
    assert net.fc1.B.grad.abs().max() > 0 and net.fc1.bias.grad is None
    adapter.save(net, tmp_path)
    assert torch.equal(adapter.load(mlp(), tmp_path)(x), net(x))


# --- the product and its gradient

@pytest.mark.parametrize("shape", [(40,), (5, 40), (2, 3, 40)])
@pytest.mark.parametrize("method", ["pissa", "qpissa"])
@pytest.mark.parametrize("dtype, autocast", [(torch.float64, False), (torch.bfloat16, False),
                                             (torch.float32, True)])
def test_product_is_what_autograd_makes_of_the_equation(method, shape, dtype, autocast):
    """Values and gradients of x, A, B and bias; beside the plain formula in the same precision."""
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(40, 60).to(dtype), 4, method=method)
    layer.bias.requires_grad_()
    x, g = torch.randn(*shape, dtype=dtype), torch.randn(*shape[:-1], 60, dtype=dtype)
    results = []
    W = pissa.as_tensor(layer.frozen)
    for formula in (layer, lambda x: F.linear(x, W.to(x.dtype), layer.bias)
                    + (x @ layer.A.to(x.dtype)) @ layer.B.to(x.dtype)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = formula(leaf)
        wrt = [leaf, layer.A, layer.B, layer.bias]
        results.append([y, *torch.autograd.grad(y, wrt, g.to(y.dtype))])
    for got, want in zip(*results):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert (got - want).norm() <= (1e-12 if dtype == torch.float64 else 1e-2) * want.norm()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """`principal` takes its fast form for any weight; what it was given is kept."""
    calls, together = [], svd.grouped_svd

    def grouped(Ws, *args, **options):
        calls.append(len(Ws))
        return together(Ws, *args, **options)

    monkeypatch.setattr(fast, "pays_in_groups", lambda W: True)
    monkeypatch.setattr(pissa, "principal", fast.faster(fast.in_groups(grouped))(
        pissa.principal.plain))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_shape_are_decomposed_together(as_on_a_gpu, dtype):
    """The same factors as one by one, within rounding, in memory of their own."""
    linears = pissa.find_linears(small_net().to(dtype), pissa.TARGETS)
    options = pissa.Options(4, remaining=linears)
    for name in list(linears):
        W = linears[name].weight.detach()
        A, B = pissa.principal(W, options)
        del linears[name]
        for got, want in zip((A, B), pissa.principal.plain(W, pissa.Options(4)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert got.is_contiguous() and got.dtype == torch.float32
    assert sum(as_on_a_gpu) == 14 and len(as_on_a_gpu) < 7 and not options.ready
    net = nn.ModuleDict({"W": nn.Linear(40, 60)})
    layer = quiet(net, targets="W").W
    assert layer.A.data_ptr() != layer.A0.data_ptr() and torch.equal(layer.A0, layer.A)


@pytest.mark.parametrize("change", [lambda W: 2 * W, lambda W: W[:, :20], lambda W: W.T,
                                    lambda W: W.clone(), lambda W: W.double()])
def test_groups_and_a_method_that_decomposes_something_else(as_on_a_gpu, change):
    """A tensor that is not the weight itself gets its own factors; the others, theirs."""
    seen = {}

    def odd(weight, options):
        A, B = pissa.principal(weight, options)
        if len(seen) % 3 != 1:                          # some matrices ask for it once, or never
            seen[len(seen)] = change(weight), pissa.principal(change(weight), options)
        else:
            seen[len(seen)] = weight, (A, B)
        return pissa.residual(weight, A, B), A, B, (A, B)

    net = pissa.inject(small_net(), 4, odd, progress=False, keep_base=True)
    for W, found in [*seen.values(), *((m.base(), (m.A, m.B)) for _, m in pissa.layers(net))]:
        for got, want in zip(found, pissa.principal.plain(W, pissa.Options(4)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_groups_and_a_method_that_decomposes_some(as_on_a_gpu):
    """What was decomposed ahead and is not asked for is not given to another matrix."""
    def every_other(weight, options):
        every_other.n += 1
        if every_other.n % 2:
            return pissa.init_lora(weight, options)
        return pissa.init_pissa(weight, options)

    every_other.n = 0
    net = pissa.inject(small_net(n_layers=4), 4, every_other, progress=False, keep_base=True)
    errors = [relative_error(m.base(), m) for _, m in pissa.layers(net) if m.A0 is not None]
    assert len(errors) == 14 and max(errors) < 1e-6
    for m in (m for _, m in pissa.layers(net) if m.A0 is not None):
        A, B = pissa.principal.plain(m.base(), pissa.Options(4))
        torch.testing.assert_close(m.A @ m.B, A @ B, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [dict(niter=None), dict(rank=2)], ids=str)
def test_groups_and_a_method_that_asks_for_something_else(as_on_a_gpu, change):
    """Every other matrix at another rank, or by an exact SVD: each gets what it asks for."""
    asked = []

    def mixed(weight, options):
        more = replace(options, **change) if len(asked) % 2 else options
        asked.append((weight, replace(more, generator=None), pissa.principal(weight, more)))
        return pissa.init_pissa(weight, options)

    pissa.inject(small_net(), 4, mixed, progress=False)
    for W, options, found in asked:
        for got, want in zip(found, pissa.principal.plain(W, options), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("again", [lambda A, B: (A.detach(), B.detach()),
                                   lambda A, B: (A, B.clone()), lambda A, B: (A, B)])
def test_what_was_subtracted_does_not_move(again):
    """Whatever objects a method returns as its pair: training A and B changes no other tensor."""
    def init(weight, options):
        A, B = pissa.principal(weight, options)
        return pissa.residual(weight, A, B), A, B, again(A, B)

    net = pissa.inject(small_net(), 4, init, progress=False)
    m = net.model.layers[0].mlp.up_proj
    before = [M.clone() for M in (m.A0, m.B0, *m.subtracted)]
    m.A.data.add_(1)
    m.B.data.add_(1)
    assert all(map(torch.equal, before, (m.A0, m.B0, *m.subtracted)))


def test_a_layer_with_two_names_is_refused():
    """Only one of its places would be replaced. A block at two places has one place for its own."""
    net = small_net()
    first, second = net.model.layers[:2]
    net.model.layers[1] = first
    pissa.inject(net, 4, targets="q_proj", progress=False)
    net = small_net()
    net.model.layers[1].mlp.up_proj = net.model.layers[0].mlp.gate_proj
    with pytest.raises(ValueError, match="gate_proj has another name, too"):
        pissa.inject(net, 4, progress=False)


@pytest.mark.parametrize("more", [{}, {"method": "qlora"}, {"method": "qlora", "bits": 8}], ids=str)
def test_shapes_without_numbers(more):
    """An injected network on the meta device tells shapes, say to count operations."""
    net = pissa.inject(small_net(), 4, progress=False, **more).to("meta")
    for net.checkpointing in False, True:
        assert net(torch.arange(3, 9, device="meta")[None]).shape == (1, 6, 101)


def test_another_dtype_after_injection():
    """net.to(bfloat16) and net.double(): forward, `disabled` and merge still work."""
    for dtype in (torch.bfloat16, torch.float64):
        net = pissa.inject(small_net(), 4, keep_base=True, progress=False).to(dtype)
        tokens = torch.arange(3, 9)[None]
        logits = net(tokens)
        with pissa.disabled(net):
            assert net(tokens).isfinite().all()
        merged = pissa.merge(net)(tokens)
        assert (merged - logits).abs().max() < 0.05 * logits.abs().max()


def test_inject_in_groups(as_on_a_gpu):
    """Every matrix gets its own factors, also one that two modules share."""
    def injected():
        net = small_net(n_layers=12)
        net.model.layers[1].mlp.up_proj.weight = net.model.layers[0].mlp.up_proj.weight
        return dict(pissa.inject(net, 4, progress=False).named_parameters())

    first, sizes, second = injected(), [*as_on_a_gpu], injected()
    with fast.off():
        single = injected()
    assert sum(sizes) >= 7 * 12 - 1 and max(sizes) > 10 and len(sizes) < 10
    for name, p in first.items():
        assert torch.equal(p, second[name]), name
        torch.testing.assert_close(p, single[name], rtol=1e-4, atol=1e-4)
    net = pissa.inject(small_net(), 4, progress=False)
    for _, m in pissa.layers(net):
        assert torch.equal(m.A0, m.A) and m.A0.data_ptr() != m.A.data_ptr()
        assert m.subtracted[0] is m.A0 and m.subtracted[1] is m.B0 and not m.A0.requires_grad
