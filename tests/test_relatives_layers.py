"""Relatives with layers of their own: what they train, and what stays as it was."""
import math
from functools import partial

import pytest
import torch

import adapter
import model
import pissa
import relatives
import train
from conftest import assert_logits_equal, command, hugging_face, small_net
from support import plan
from test_parallel import assert_alike, ended, torchrun
from test_relatives import batches, flags, injected, loss_of  # noqa: F401

RANK = 4


def trained(net):
    """How many numbers get a gradient."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def triplets(net, name, rank=None):
    """U, S, V^T of a matrix W (in, out), in float64."""
    W = net.get_submodule(name).weight.detach().double()
    U, S, Vh = torch.linalg.svd(W.T, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def optimise(net, steps, lr=1e-2, after=None, penalty=None):
    """AdamW on the same batch, as train.train steps."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr)
    for step in range(steps):
        optimizer.zero_grad()
        (loss_of(net, *batches(1)[0]) + (penalty(net) if penalty else 0)).backward()
        optimizer.step()
        if after:
            after(net, step + 1, steps)


def distance(X):
    """How far the rows of X are from orthonormal."""
    return (X @ X.T - torch.eye(len(X), dtype=X.dtype)).abs().max().item()


# ------------------------------------------------------------------------------------------ LoRA-XS

def test_lora_xs_is_its_equation():
    """r^2 numbers a matrix; A = U_r S_r, B = V_r^T; y = x W + ((x A) R) B with any R."""
    net, base, g = injected("lora_xs"), small_net(), torch.Generator().manual_seed(1)
    layers = pissa.layers(net)
    assert trained(net) == RANK**2 * len(layers)
    R = torch.cat([m.R.detach().flatten() for _, m in layers])
    assert R.std().item() == pytest.approx(1e-5, rel=0.2) and len(R.unique()) == len(R)
    for name, m in layers:
        U, S, Vh = triplets(base, name, RANK)
        A, B = U * S, Vh
        torch.testing.assert_close((m.A @ m.B).double(), A @ B, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(m.A.T @ m.A, S.square().diag().float(), rtol=1e-4, atol=1e-4)
        sign = (m.B.double() * B).sum(1).sign()
        m.R.data = torch.randn(RANK, RANK, generator=g)
        x, W = torch.randn(3, len(A), generator=g), base.get_submodule(name).weight.T.double()
        want = x.double() @ W + x.double() @ (A * sign) @ m.R.double() @ (sign[:, None] * B)
        torch.testing.assert_close(m(x).double(), want, rtol=1e-3, atol=1e-3)


def test_lora_xs_is_exported_as_it_is(tokens, tmp_path):
    peft = pytest.importorskip("peft")
    net = injected("lora_xs")
    for _, m in pissa.layers(net):
        m.R.data = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(2)) / 3
    adapter.save(net, tmp_path)
    twin = peft.PeftModel.from_pretrained(hugging_face(small_net()), tmp_path)
    with torch.no_grad():
        assert (net(tokens) - small_net()(tokens)).abs().max() > 0.1
        assert_logits_equal(twin(tokens).logits, net(tokens))
    assert {A.shape[1] for A, _ in adapter.read_adapter(tmp_path).pairs.values()} == {RANK}


# --------------------------------------------------------------------------------------------- SVFT

def shape_of(pattern, n, d):
    """How many entries of M are trained."""
    return n if pattern == "plain" else sum(max(0, n - abs(i)) for i in range(-d, d + 1))


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top"])
def test_svft_trains_its_pattern(pattern, tokens, tmp_path):
    """Step 0 is the base. U^T (W' - W) V has entries in the pattern alone, and in all of it."""
    d, base = 3, small_net()
    targets = ("q_proj", "o_proj") if pattern == "top" else pissa.TARGETS
    method = relatives.find("svft")
    told = relatives.told(method, {**method.OPTIONS, "pattern": pattern, "d": d})
    inject = partial(pissa.inject, method=told, rank=1, targets=targets, progress=False)
    net, again, found = inject(small_net()), inject(small_net()), {}
    with torch.no_grad():
        assert_logits_equal(net(tokens), base(tokens), 1e-6)
    optimise(net, 2)
    for (name, m), (_, same) in zip(pissa.layers(net), pissa.layers(again)):
        A, B = (M.detach().double() for M in m.factors())
        U, S, Vh = triplets(base, name)
        n = len(S)
        # the signs of U are those of m.A, since a pair (u, v) is only known up to its sign
        sign = (U * m.A.detach().double()).sum(0).sign()
        M = (U * sign).T @ A @ B @ (sign[:, None] * Vh).T
        i = torch.arange(n)
        there = found[name] = M.abs() > 1e-4
        assert there.sum() == m.m.numel() == shape_of(pattern, n, d)
        if pattern in ("plain", "banded"):
            assert torch.equal(there, (i[:, None] - i).abs() <= (d if pattern == "banded" else 0))
        if pattern == "top":
            alike = (U.T @ Vh.T).abs()
            assert alike[there].min() > alike[~there].max()
        assert torch.equal(m.at, same.at)                                     # the same seed
        assert m.A.shape == (U.shape[0], n) and not m.A.requires_grad and not m.B.requires_grad
    if pattern == "random":
        q, o = (found[f"model.layers.0.self_attn.{k}_proj"] for k in "qo")
        assert not torch.equal(q, o) and not q.diagonal().all()
    adapter.save(net, tmp_path)
    loaded = adapter.load(small_net(), tmp_path, relative=relatives.known)
    for (_, a), (_, b) in zip(pissa.layers(net), pissa.layers(loaded)):
        assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("A", "B", "m", "at"))
    with torch.no_grad():
        want = net(tokens)
        assert_logits_equal(pissa.merge(net)(tokens), want)


def test_svft_counts_as_the_paper():
    """Gemma-2B has 0.19 M numbers with the plain pattern, and 6.35 M with d = 16 (its table 1)."""
    gemma = model.Config(dim=2048, n_layers=18, n_heads=8, n_kv_heads=1, vocab_size=256,
                         ffn_dim=16384)
    method = relatives.find("svft")
    for pattern, count in ("plain", 193_536), ("banded", 6_352_416):
        own = relatives.told(method, {**method.OPTIONS, "pattern": pattern}, trial=True)
        found = plan.estimate(gemma, own, 8)
        assert found["trained"] == count
        weights = 18 * (2 * 2048**2 + 2 * 256 * 2048 + 3 * 2048 * 16384)
        assert found["held"]["frozen A, B"] > 4 * weights                # U and V of all of W


def test_svft_of_the_leading_triplets_is_a_lora_of_its_rank(tokens, tmp_path):
    peft = pytest.importorskip("peft")
    net = injected("svft", triplets="rank", pattern="banded", d=1)
    assert trained(net) == (3 * RANK - 2) * len(pissa.layers(net))
    optimise(net, 2)
    adapter.save(net, tmp_path)
    assert {A.shape[1] for A, _ in adapter.read_adapter(tmp_path).pairs.values()} == {RANK}
    twin = peft.PeftModel.from_pretrained(hugging_face(small_net()), tmp_path)
    with torch.no_grad():
        assert_logits_equal(twin(tokens).logits, net(tokens))


def test_what_svft_and_lamda_refuse():
    with pytest.raises(ValueError, match="^svft: d is 0 or more, not -1$"):
        injected("svft", d=-1)
    with pytest.raises(ValueError, match="^svft: pattern=top needs as many inputs as outputs, not "
                                         "48 and 16: such as --targets q_proj o_proj, or another"):
        injected("svft", pattern="top")
    with pytest.raises(ValueError, match="^lamda: share is from 0 to 1, not 2.0$"):
        injected("lamda", share=2.0)


# -------------------------------------------------------------------------------------------- SORSA

def test_sorsas_penalty_is_its_equation():
    """0 at step 0, and |U^T U - I|^2 + |V^T V - I|^2 later."""
    net, base, penalty = injected("sorsa", gamma=2.0), small_net(), relatives.find("sorsa").penalty
    assert penalty(net).item() < 1e-8
    total = 0.0
    for name, m in pissa.layers(net):
        _, S, _ = triplets(base, name, RANK)
        torch.testing.assert_close(m.S.double(), S, rtol=1e-4, atol=1e-5)
        assert distance(m.A.T) < 1e-5 and distance(m.B) < 1e-5
        m.A.data += 0.1 * torch.randn(m.A.shape, generator=torch.Generator().manual_seed(3))
        for X in m.A.T.double(), m.B.double():
            total += torch.dist(X @ X.T, torch.eye(RANK).double()).item() ** 2
    assert penalty(net).item() == pytest.approx(2 * total, rel=1e-4)
    penalty(net).backward()
    assert all(m.A.grad.norm() > 0 and m.S.grad is None for _, m in pissa.layers(net))


@pytest.mark.parametrize("gamma", [0.0, 1e4])
def test_sorsa_keeps_u_and_v_orthonormal(gamma):
    net, penalty = injected("sorsa", gamma=gamma), relatives.find("sorsa").penalty
    before = loss_of(net, *batches(1)[0]).item()
    optimise(net, 40, lr=1e-3, penalty=penalty)
    optimise(net, 20, lr=1e-4, penalty=penalty)
    assert loss_of(net, *batches(1)[0]).item() < before
    far = max(max(distance(m.A.detach().T), distance(m.B.detach())) for _, m in pissa.layers(net))
    assert far < 1e-3 if gamma else far > 1e-2


# -------------------------------------------------------------------------------------------- LaMDA

def test_lamda_starts_with_the_principal_part():
    net, base = injected("lamda"), small_net()
    for name, m in pissa.layers(net):
        U, S, Vh = triplets(base, name, RANK)
        torch.testing.assert_close(m.S.double(), S.diag(), rtol=1e-4, atol=1e-5)
        assert distance(m.A.T) < 1e-5 and distance(m.B) < 1e-5
        W = base.get_submodule(name).weight.double().T
        torch.testing.assert_close(m.frozen.T.double(), W - (U * S) @ Vh, rtol=1e-4, atol=1e-4)
        assert not m.A.requires_grad
    assert trained(net) == sum(RANK**2 + m.B.numel() for _, m in pissa.layers(net))


@pytest.mark.parametrize("share, steps", [(0.3, 20), (0.5, 6), (0.0, 3)])
def test_lamda_freezes_b_row_by_row(share, steps):
    """In step t + 1 the first r t / (share T) rows of B do not move, whatever AdamW has of them.
    That they are frozen changes none."""
    net, method, seen = injected("lamda", share=share), relatives.find("lamda"), []

    def after(net, step, steps):
        trained = [m.factors()[1].detach().clone() for _, m in pissa.layers(net)]
        method.after_step(net, step, steps)
        assert all(torch.equal(B, m.factors()[1]) for B, (_, m) in zip(trained, pissa.layers(net)))
        seen.append([(m.factors()[1].detach().clone(), m.S.detach().clone())
                     for _, m in pissa.layers(net)])

    optimise(net, steps, after=after)
    for t in range(1, steps):                                       # from step t to step t + 1
        frozen = min(RANK, math.ceil(RANK * t / (share * steps) - 1e-9)) if share else RANK
        for (B, S), (B_next, S_next) in zip(seen[t - 1], seen[t]):
            moved = (B != B_next).any(dim=1)
            assert moved.tolist() == [False] * frozen + [True] * (RANK - frozen)
            assert (S != S_next).any()
    assert all((m.count == RANK).all() for _, m in pissa.layers(net))


# ------------------------------------------------------------------------------- several processes

@pytest.mark.slow
@pytest.mark.parametrize("name", ["mica", "lora_xs", "svft", "sorsa", "lamda"])
def test_spread_weights_change_nothing(flags, tmp_path, name):  # noqa: F811
    """--shard spreads W, but not what a relative freezes beside it."""
    flags = [*flags, "--method", name]
    two = torchrun(*flags, "--shard", "--out", tmp_path / "two")
    command(train.main, *flags, "--out", tmp_path / "one")
    ended(two)
    assert_alike(tmp_path / "one", tmp_path / "two", 1e-5)
