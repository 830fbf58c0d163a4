"""Relatives in four bits, and a subspace that is shared: the property of each."""
import itertools
import sys

import pytest
import torch

import adapter
import model
import nf4
import pissa
import qpissa
import relatives
from conftest import TINY, failure, hugging_face, small_net
from relatives import calibrate, svdquant
from test_relatives import batches, injected, loss_of

LQ_LORA, CORA = relatives.find("lq_lora"), relatives.find("cora")


def fisher(net):
    return calibrate.measure(net, LQ_LORA, batches(rows=1), loss_of, pissa.Options(4))


def matrix(n_out=96, n_in=64, seed=0):
    """A matrix whose singular values fall, and weights for it that differ by rows and columns."""
    g = torch.Generator().manual_seed(seed)
    U, S, Vh = torch.linalg.svd(torch.randn(n_out, n_in, generator=g), full_matrices=False)
    F = torch.rand(n_out, 1, generator=g) ** 4 * torch.rand(1, n_in, generator=g) ** 4
    return (U / torch.arange(1, len(S) + 1)) @ Vh, F * torch.rand(n_out, n_in, generator=g)


# ----------------------------------------------------------------------------------------- LQ-LoRA

def test_fisher_information_is_of_squares():
    """The sum of squared gradients of the micro-batches, as a loop of autograd gives it."""
    net = small_net()
    F = fisher(net)
    for name, m in pissa.find_linears(net, pissa.TARGETS).items():
        m.weight.requires_grad_()
        want = sum(torch.autograd.grad(loss_of(net, *b), m.weight)[0].square()
                   for b in batches(rows=1))
        m.weight.requires_grad_(False)
        torch.testing.assert_close(F[name], want, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("niter", [None, 3])
@pytest.mark.parametrize("turns", [1, 5])
def test_unweighted_is_qpissa_without_the_last_svd(niter, turns):
    """To the last bit, for every number of turns."""
    lq = relatives.told(LQ_LORA, {}, lambda name: torch.ones_like(
        small_net().get_submodule(name).weight))
    a, b = (pissa.inject(small_net(), 4, method, niter=niter, quant_iters=turns, last_svd=False,
                         progress=False) for method in (lq, "qpissa"))
    for (_, x), (_, y) in zip(pissa.layers(a), pissa.layers(b), strict=True):
        assert torch.equal(x.A, y.A) and torch.equal(x.B, y.B)
        assert torch.equal(x.frozen.dequantize(), y.frozen.dequantize())
        assert torch.equal(x.subtracted[0], y.subtracted[0])


def weighted_error(F, W, Q, A, B):
    return (F.double().sqrt() * (W - Q.dequantize() - (A @ B).T).double()).norm().item()


def test_weights_lower_the_weighted_error():
    """On all matrices of a trained attention with its Fisher information, and on random ones."""
    net = model.load("tiny")
    tokens = torch.randint(0, 400, (4, 1, 33), generator=torch.Generator().manual_seed(0))
    F = calibrate.measure(net, LQ_LORA, [(t,) for t in tokens], loss_of, pissa.Options(4))
    cases = [(net.get_submodule(name).weight, F[name], 16) for name in F
             if "layers.0.self_attn" in name]
    for W, F, rank in cases + [(*matrix(seed=seed), 4) for seed in range(5)]:
        options = pissa.Options(rank, 3, last_svd=False)
        plain = qpissa.init_qpissa(W, options)
        options.statistic = F
        ours = LQ_LORA.init(W, options)
        assert weighted_error(F, W, *ours[:3]) < weighted_error(F, W, *plain[:3])


def test_turns_are_the_best_of_a_plain_loop():
    """The turn with the lowest error before the first rise, in float64 with torch.linalg."""
    W, F = matrix()
    F64 = (F / F.mean()).double()
    rows, cols = F64.mean(1).sqrt()[:, None].clamp(min=1e-3), F64.mean(0).sqrt().clamp(min=1e-3)
    Q, errors = torch.zeros_like(W), []
    for _ in range(20):
        U, S, Vh = torch.linalg.svd(rows * (W - Q).double() * cols)
        BA = (U[:, :4] * S[:4]) @ Vh[:4] / rows / cols
        Q = nf4.quantize((W - BA).float()).dequantize()
        errors.append((F64.sqrt() * (W - Q - BA)).norm().item())
    first_rise = next((i for i, (a, b) in enumerate(itertools.pairwise(errors)) if b >= a), 19)
    Q, A, B, pair = LQ_LORA.init(W, pissa.Options(4, None, quant_iters=20, statistic=F))
    assert weighted_error(F / F.mean(), W, Q, A, B) == pytest.approx(errors[first_rise], rel=1e-3)
    assert pair[0] is A and pair[1] is B
    with pytest.raises(ValueError, match="^quant_iters should be at least 1, not 0$"):
        LQ_LORA.init(W, pissa.Options(4, None, quant_iters=0, statistic=F))


def test_no_information_is_no_weight():
    """An entry, a row or a matrix that no example reaches leads to no NaN."""
    W, F = matrix()
    for G in F * 0, torch.cat([F[:5] * 0, F[5:]]), torch.cat([F[:, :5] * 0, F[:, 5:]], 1):
        _, A, B, _ = LQ_LORA.init(W, pissa.Options(4, None, statistic=G))
        assert A.isfinite().all() and B.isfinite().all()


def test_simulated_levels():
    """Four bits in blocks of 64 are NF4. Fewer have fewer levels. Smaller blocks lose less."""
    W, _ = matrix()
    torch.testing.assert_close(LQ_LORA.normal_float(W, 4, 64), nf4.quantize(W, False).dequantize())
    lost = {c: (LQ_LORA.normal_float(W, *c) - W).norm() for c in LQ_LORA.CONFIGURATIONS}
    assert all(lost[bits, 16] < lost[bits, 64] < lost[bits - 1, 16] for bits in (3, 4))
    for bits in 2, 3, 4:
        assert len(LQ_LORA.normal_float(torch.linspace(-1, 1, 64), bits, 64).unique()) == 2**bits
    assert LQ_LORA.bits_of(4, 64) == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("budget", [2.2, 3.0, 3.7, 5.0])
def test_the_programme_is_the_best_choice_within_its_budget(budget):
    """Of all 9^3 choices for three matrices of different sizes."""
    pytest.importorskip("scipy")
    cases = [matrix(96, 64, 1), matrix(64, 32, 2), matrix(128, 64, 3)]
    found = [LQ_LORA.errors(W, F, pissa.Options(4, None)) for W, F in cases]
    sizes = [W.numel() for W, _ in cases]
    configurations = LQ_LORA.CONFIGURATIONS
    chosen = LQ_LORA.programme(found, sizes, budget)
    bits = [LQ_LORA.bits_of(*c) for c in configurations]
    cells = [[(c, e, n * b / sum(sizes)) for c, e, b in zip(configurations, row, bits)]
             for row, n in zip(found, sizes)]
    allowed = [one for one in itertools.product(*cells) if sum(b for *_, b in one) <= budget]
    best = min(allowed, key=lambda one: sum(e for _, e, _ in one))
    assert chosen == [c for c, *_ in best]
    if budget == 5.0:
        assert set(chosen) == {(4, 16)}
    with pytest.raises(ValueError, match="^no choice has 2 bits a weight: the least is 2.127$"):
        LQ_LORA.programme(found, sizes, 2)


def test_scipy_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ValueError, match="^mixed precision needs scipy: pip install scipy$"):
        LQ_LORA.programme([[1.0]], [1], 5, [(4, 64)])


# -------------------------------------------------------------------------------------------- CoRA

def kinds(net):
    found = {}
    for name, m in pissa.layers(net):
        found.setdefault(name.rpartition(".")[2], []).append((name, m))
    return found


@pytest.mark.parametrize("freeze", [True, False])
def test_coras_basis_is_common_and_orthonormal(freeze, tokens):
    """B* spans the leading singular vectors of all layers' stacked matrices of a kind."""
    net, base = injected("cora", freeze=freeze), small_net()
    assert torch.equal(net(tokens), base(tokens))                                      # step 0
    for members in kinds(net).values():
        stack = torch.cat([base.get_submodule(n).weight.double().T for n, _ in members])
        V = torch.linalg.svd(stack, full_matrices=False)[2][:4]
        for _, m in members:
            torch.testing.assert_close(m.B @ m.B.T, torch.eye(4), rtol=0, atol=1e-5)
            torch.testing.assert_close((m.B.T @ m.B).double(), V.T @ V, rtol=0, atol=1e-4)
            assert not m.A.any() and m.A.requires_grad and m.B.requires_grad is not freeze
            assert m.frozen is not None and m.A0 is None
        assert len({m.B.data_ptr() for _, m in members}) == len(members)   # each has its own copy
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    whole = sum(m.A.numel() + m.B.numel() for _, m in pissa.layers(net))
    assert trained == (sum(m.A.numel() for _, m in pissa.layers(net)) if freeze else whole)
    square = [m for n, m in pissa.layers(net) if n.endswith(("q_proj", "o_proj"))]
    if freeze:
        assert all(2 * m.A.numel() == m.A.numel() + m.B.numel() for m in square)


def test_coras_variants_are_saved(tokens, tmp_path):
    """The variant whose B is trained comes back as such."""
    net = injected("cora", freeze=False)
    adapter.save(net, tmp_path)
    again = adapter.load(small_net(), tmp_path, relative=relatives.known)
    assert all(m.B.requires_grad for _, m in pissa.layers(again))


def test_cora_of_other_checkpoints(tmp_path):
    """With others, B* is of the same matrix of each, layer by layer."""
    other, base = small_net(1), small_net()
    hugging_face(other).save_pretrained(tmp_path / "other")
    net = injected("cora", others=str(tmp_path / "other"))
    for name, m in pissa.layers(net):
        stack = torch.cat([n.get_submodule(name).weight.double().T for n in (base, other)])
        V = torch.linalg.svd(stack, full_matrices=False)[2][:4]
        torch.testing.assert_close((m.B.T @ m.B).double(), V.T @ V, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="^cora: model.layers.0.self_attn.q_proj is 48 x 48, in "
                                         ".*tiny it is .* x "):
        injected("cora", others=str(TINY))


# ---------------------------------------------------------------------------------------- SVDQuant

def outliers(n_in=128, n_out=96, seed=0):
    """A linear layer whose spectrum falls, and inputs of which a few are far larger."""
    g = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(n_in, n_out, bias=True)
    U, S, Vh = torch.linalg.svd(torch.randn(n_out, n_in, generator=g), full_matrices=False)
    linear.weight.data = (U / torch.arange(1, len(S) + 1)) @ Vh
    linear.bias.data = torch.randn(n_out, generator=g)
    scale = torch.ones(n_in)
    scale[torch.randint(0, n_in, (4,), generator=g)] = 30.0
    x = torch.randn(512, n_in, generator=g) * scale
    return linear.requires_grad_(False), x[:256], x[256:]


def variants(linear, x, rank):
    """Plain W4A4, smoothing alone, SVDQuant."""
    return (svdquant.quantised(linear, x, 0, (None,)), svdquant.quantised(linear, x, 0),
            svdquant.quantised(linear, x, rank))


@pytest.mark.parametrize("seed", range(5))
def test_svdquant_loses_less_with_outliers(seed):
    """Than smoothing alone, which loses less than plain rounding, on inputs it has not seen."""
    linear, x, unseen = outliers(seed=seed)
    plain, smooth, ours = (svdquant.error(linear, m, unseen) for m in variants(linear, x, 16))
    assert ours < 0.9 * smooth < 0.8 * plain


def test_svdquant_loses_less_on_a_trained_model():
    """Output error of each kind of matrix of the tiny model, with its own activations."""
    net, g = model.load("tiny"), torch.Generator().manual_seed(0)
    seen, unseen = (calibrate.measure(net, svdquant, [
        (torch.randint(0, 400, (1, 129), generator=g),) for _ in range(2)], loss_of,
        pissa.Options(1)) for _ in range(2))
    for name, linear in svdquant.targets(net).items():
        if ".layers.1." in name:
            plain, smooth, ours = (svdquant.error(linear, m, unseen[name])
                                   for m in variants(linear, seen[name], 32))
            assert ours < smooth and ours < plain, name


def test_w4a4_is_its_equation():
    """In float64 and loops, for widths that are no multiple of a group, with a bias."""
    linear, x, _ = outliers(n_in=100)
    m = svdquant.W4A4(linear, x, 8, 0.5)
    W, x = linear.weight.double().T, x.double()
    lam = (x.abs().amax(0) / W.abs().amax(1)).sqrt()

    def rounded(rows):
        rows = rows.clone()
        for row in rows:
            for i in range(0, len(row), 64):
                s = row[i:i + 64].abs().max() / 7
                row[i:i + 64] = torch.round(row[i:i + 64] / s) * s
        return rows

    U, S, Vh = torch.linalg.svd(lam[:, None] * W)
    best = (U[:, :8] * S[:8]) @ Vh[:8]
    L1L2 = m.L1.double() @ m.L2.double()
    assert (L1L2 - best).norm() < 0.01 * best.norm()                         # 16 bits of L1, L2
    R = lam[:, None] * W - L1L2
    y = rounded(x / lam) @ rounded(R.T).T + (x / lam) @ L1L2 + linear.bias
    torch.testing.assert_close(m(x.float()).double(), y, rtol=0, atol=2e-3 * y.abs().max().item())
    assert all(torch.equal(M, M.bfloat16().float()) for M in (m.L1, m.L2))


def test_four_bits_are_fifteen_levels():
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(0))
    q = svdquant.four_bits(x)
    assert all(len(q[i, a:b].unique()) <= 15 for i in range(3) for a, b in ((0, 64), (64, 128)))
    assert ((q - x).abs()[:, :64].amax(1) <= x[:, :64].abs().amax(1) / 14 + 1e-6).all()
    assert torch.equal(svdquant.four_bits(q), q) or (svdquant.four_bits(q) - q).abs().max() < 1e-6
    assert not svdquant.four_bits(torch.zeros(2, 5)).any()


def test_svdquant_is_not_trained():
    """One line that says what to run; it is not in the list of methods."""
    assert "svdquant" not in relatives.names()
    with pytest.raises(ValueError, match="^svdquant is evaluated, not trained: "
                                         "python -m bench.bench_svdquant$"):
        relatives.find("svdquant")
    text = failure("train.py", "--method", "svdquant")
    assert text.splitlines()[-1].endswith("svdquant is evaluated, not trained: python -m "
                                          "bench.bench_svdquant")
    with pytest.raises(ValueError, match="^svdquant: rank 97 is not between 0 and 96$"):
        svdquant.quantised(*outliers()[:2], rank=97)
