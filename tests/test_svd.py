"""svd.py against the exact SVD in float64: residual norms, captured energy, orthonormality."""
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, TINY
from svd import finite, fix_signs, grouped_svd, orthonormalise, products, randomized_svd


def matrix(m, n, decay=0.5, seed=0, batch=()):
    """Random singular vectors, singular values i^-decay: as flat as those of trained weights."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(*batch, m, k, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(*batch, n, k, generator=g, dtype=torch.float64)).Q
    return (U * torch.arange(1, k + 1) ** -decay) @ V.mT


def excess(W, U, S, Vh):
    """Residual norm over the optimal one (Eckart-Young), minus 1."""
    W = W.double()
    best = torch.linalg.svdvals(W)[..., S.shape[-1]:].norm(dim=-1)
    left = (W - (U.double() * S.double()[..., None, :]) @ Vh.double()).flatten(-2).norm(dim=-1)
    return (left / best - 1).max().item()


def assert_orthonormal(Q, tolerance=2e-6):
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype)
    assert (Q.mT @ Q - eye).abs().max() < tolerance


@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (200, 200)])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_close_to_optimal(shape, rank):
    W = matrix(*shape)
    U, S, Vh = randomized_svd(W.float(), rank)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    assert_orthonormal(U)
    assert_orthonormal(Vh.mT)
    assert S.dtype == torch.float32 and bool((S[:-1] >= S[1:]).all())
    assert excess(W, U, S, Vh) < 1e-3
    torch.testing.assert_close(S.double(), torch.linalg.svdvals(W)[:rank], rtol=2e-3, atol=0)


@pytest.mark.parametrize("rank", [16, 64])
def test_defaults_on_trained_weights(rank):
    """Residual within 0.1 % of the optimum on every kind of matrix of the embedded model."""
    import model
    net = model.load(TINY, "cpu")
    for name, m in net.model.layers[3].named_modules():
        if isinstance(m, torch.nn.Linear):
            W = m.weight.detach()
            assert excess(W, *randomized_svd(W, rank)) < 1e-3, name


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj",
                                  "mlp.down_proj"])
def test_defaults_on_smollm2(rank, name, smollm2):
    W = smollm2.get_tensor(f"model.layers.15.{name}.weight").float()
    assert excess(W, *randomized_svd(W, rank)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    W = matrix(90, 140).to(dtype)
    U, S, Vh = randomized_svd(W, 8)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {U.dtype, S.dtype, Vh.dtype} == {wide}
    assert excess(W, U, S, Vh) < 1e-3
    assert_orthonormal(U, 1e-12 if dtype == torch.float64 else 2e-6)


def test_batched():
    W = matrix(80, 100, batch=(3,)).float()
    U, S, Vh = randomized_svd(W, 8, oversample=16)
    assert U.shape == (3, 80, 8) and S.shape == (3, 8) and Vh.shape == (3, 8, 100)
    assert excess(W, U, S, Vh) < 1e-3
    assert_orthonormal(U)
    single = randomized_svd(W[1], 8, niter=None)
    torch.testing.assert_close(S[1], single[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("niter, oversample", [(None, 8), (4, 60)], ids=["asked", "l reaches n"])
def test_exact(niter, oversample):
    W = matrix(70, 90)
    U, S, Vh = randomized_svd(W, 20, niter=niter, oversample=oversample)
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[:20])
    assert excess(W, U, S, Vh) < 1e-12


def test_more_power_iterations_come_closer():
    W = matrix(300, 300, decay=0.3)
    gaps = [excess(W, *randomized_svd(W, 16, oversample=8, niter=q)) for q in (0, 1, 4, 16)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 10 * gaps[-1]


@pytest.mark.parametrize("true_rank", [0, 1, 5])
@pytest.mark.parametrize("shape", [(100, 60), (60, 100)])
def test_rank_deficient(true_rank, shape):
    g = torch.Generator().manual_seed(1)
    W = (torch.randn(shape[0], true_rank, generator=g)
         @ torch.randn(true_rank, shape[1], generator=g))
    for niter in (2, None):
        U, S, Vh = randomized_svd(W, 8, oversample=8, niter=niter)
        assert_orthonormal(U)
        assert_orthonormal(Vh.mT)
        torch.testing.assert_close((U * S) @ Vh, W, atol=1e-4, rtol=1e-4)
        assert bool((S[true_rank:] <= 1e-5 * S[0].clamp(min=1e-30)).all())


def test_batch_with_one_zero_matrix():
    W = matrix(60, 50, batch=(2,)).float()
    W[0] = 0
    U, S, Vh = randomized_svd(W, 5, oversample=8)
    assert_orthonormal(U)
    assert_orthonormal(Vh.mT)
    assert S[0].abs().max() == 0 and S[1, 0] > 0.9


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e7, 1e12])
def test_orthonormalise_any_condition(condition):
    """Cholesky squares the condition number; whichever path runs, the result is orthonormal."""
    W = matrix(200, 20, seed=3)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    Y = ((U * torch.logspace(0, -torch.tensor(condition).log10().item(), 20)) @ Vh).float()
    Q = orthonormalise(Y.T)[0].T
    assert_orthonormal(Q, 5e-6)
    assert (Y - Q @ (Q.mT @ Y)).norm() < 1e-5 * Y.norm()     # and spans the columns of Y


def test_signs_are_canonical():
    W = matrix(50, 40).float()
    for niter in (8, None):
        U, _, Vh = randomized_svd(W, 6, oversample=8, niter=niter)
        top = U.gather(0, U.abs().argmax(0, keepdim=True))
        assert bool((top > 0).all())
        U2, _, Vh2 = fix_signs(-U, None, -Vh)
        assert torch.equal(U2, U) and torch.equal(Vh2, Vh)


def test_deterministic_for_a_generator():
    W = matrix(120, 110).float()

    def run(seed, state=None):
        g = torch.Generator().manual_seed(seed)
        return randomized_svd(W, 6, niter=1, generator=g)[0], g

    (a, g), (b, _), (c, _) = run(1), run(1), run(2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(a, randomized_svd(W, 6, niter=1, generator=g)[0])     # g has moved on
    torch.manual_seed(0)
    d = randomized_svd(W, 6, niter=1)[0]
    torch.manual_seed(1)
    assert torch.equal(d, randomized_svd(W, 6, niter=1)[0])      # the global generator is not used


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=f"rank {rank} is not between 1 and 40, of .50, 40."):
        randomized_svd(torch.zeros(50, 40), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad):
    W = torch.ones(5, 5)
    W[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        randomized_svd(W, 2)


@pytest.mark.parametrize("shape, wrong", [((5,), {}), ((5, 5), dict(oversample=-1)),
                                          ((5, 5), dict(niter=-1))])
def test_shape_and_negative_numbers(shape, wrong):
    with pytest.raises(ValueError, match="no negative numbers"):
        randomized_svd(torch.ones(shape), 2, **wrong)


def test_nothing_is_recorded_for_autograd():
    assert not randomized_svd(matrix(50, 40).requires_grad_(), 4)[0].requires_grad


def test_integers():
    with pytest.raises(ValueError, match="floating-point matrix, not torch.int64"):
        randomized_svd(torch.ones(5, 5, dtype=torch.int64), 2)


@pytest.mark.long
@pytest.mark.parametrize("setting", ["torch.set_float32_matmul_precision('medium')",
                                     "torch.backends.fp32_precision = 'bf16'",
                                     "torch.backends.cuda.matmul.fp32_precision = 'tf32'"])
def test_tf32_settings_do_not_reach_the_svd(setting):
    """A program may allow TF32 (on some CPUs: bfloat16) products; a decomposition must not."""
    # In a process of its own: PyTorch refuses to go back from its newer settings to the older.
    code = f"""if True:
        import torch
        from svd import randomized_svd
        W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
        want, product = randomized_svd(W, 16), W @ W
        {setting}
        allowed = W @ W
        assert all(torch.equal(a, b) for a, b in zip(randomized_svd(W, 16), want))
        assert torch.equal(W @ W, allowed)                 # and afterwards it is as it was"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("view", [False, True], ids=["", "transposed"])
def test_a_group_is_as_one_by_one(dtype, view):
    Ws = [matrix(150, 130, seed=i, decay=0.2 + i / 2).to(dtype) for i in range(4)]
    Ws = [W.T for W in Ws] if view else Ws
    for W, *usv in zip(Ws, *grouped_svd(Ws, 8)):
        rounding = 1e-10 if dtype == torch.float64 else 1e-4
        for a, b in zip(usv, randomized_svd(W, 8)):
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)
        assert excess(W, *usv) < 1e-3
        assert_orthonormal(usv[0])
        assert_orthonormal(usv[2].mT)


def test_a_group_with_members_of_low_rank():
    """The others are not spoilt by what only one of them needs."""
    g = torch.Generator().manual_seed(0)
    low = torch.randn(90, 2, generator=g) @ torch.randn(2, 100, generator=g)
    Ws = [matrix(90, 100).float(), torch.zeros(90, 100), low]
    U, S, Vh = grouped_svd(Ws, 6)
    assert_orthonormal(U)
    assert_orthonormal(Vh.mT)
    assert excess(Ws[0], U[0], S[0], Vh[0]) < 1e-3
    assert S[1].abs().max() == 0
    torch.testing.assert_close((U[2] * S[2]) @ Vh[2], low, atol=1e-4, rtol=1e-4)


def test_a_group_is_deterministic_and_exact_where_asked():
    Ws = [matrix(60, 70, seed=i) for i in range(3)]
    for niter in (0, 2, None):
        for a, b in zip(grouped_svd(Ws, 5, niter=niter), grouped_svd(Ws, 5, niter=niter)):
            assert torch.equal(a, b)
    S = grouped_svd(Ws, 5, niter=None)[1]
    torch.testing.assert_close(S, torch.stack([torch.linalg.svdvals(W)[:5] for W in Ws]))
    for bad in (Ws[0] * float("nan"), Ws[0].long()):
        with pytest.raises(ValueError):
            grouped_svd([*Ws[:2], bad], 5)


def spectrum(kind, k):
    i = torch.arange(1, k + 1, dtype=torch.float64)
    if kind == "outliers":
        return torch.cat([torch.tensor([1000., 300, 100]), (i ** -0.35)[:-3]])
    return {"fast": (-i / 8).exp(), "steep": i ** -2, "step": torch.where(i < 20, 1.0, 0.01)}[kind]


@pytest.mark.parametrize("kind", ["outliers", "fast", "steep", "step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_spectra(kind, dtype):
    """Large singular values beside small ones; the shift must not let the small ones stand out."""
    U, _, Vh = torch.linalg.svd(matrix(300, 350), full_matrices=False)
    W = ((U * spectrum(kind, 300)) @ Vh).to(dtype)
    assert excess(W, *randomized_svd(W, 32)) < 1e-3


def test_the_shift_helps():
    """The same iterations without it, and orthonormalised by Householder, end twice as far off."""
    W = matrix(300, 300, decay=0.3)
    Q = torch.linalg.qr(W @ torch.randn(300, 48, generator=torch.Generator().manual_seed(0),
                                        dtype=W.dtype)).Q
    for _ in range(4):
        Q = torch.linalg.qr(W @ (W.T @ Q)).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    plain = excess(W, Q @ U[:, :16], S[:16], Vh[:16])
    assert excess(W, *randomized_svd(W, 16, niter=4)) < plain / 2


def test_finite():
    large = torch.full((8, 8), 3e38)
    assert finite(large) and not large.sum().isfinite()
    for bad in (float("nan"), float("inf"), -float("inf")):
        W = large.clone()
        W[3, 4] = bad
        assert not finite(W)
    assert not finite(torch.tensor([[float("inf"), -float("inf")]]))
    assert finite(torch.full((300, 300), 6e4).half())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tensor cores")
def test_products_of_bfloat16_on_a_gpu():
    Ws = [matrix(256, 320, seed=i).bfloat16().cuda() for i in range(3)]
    P = torch.linalg.qr(torch.randn(3, 256, 32, device="cuda")).Q.mT.contiguous()
    want = P.double() @ torch.stack(Ws).double()
    for rough, tolerance in ((True, 1e-2), (False, 2e-6)):
        assert (products(P, Ws, rough) - want).norm() < tolerance * want.norm()
    for W, *usv in zip(Ws, *grouped_svd(Ws, 16)):
        assert excess(W.cpu(), *(M.cpu() for M in usv)) < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    """W W^T is beyond the range of float32, for one of a group and for one by itself."""
    W = matrix(90, 100).float()
    U, S, Vh = randomized_svd(W, 6)
    for u, s, vh in (randomized_svd(W * scale, 6),
                     (M[1] for M in grouped_svd([torch.zeros(90, 100), W * scale, W], 6))):
        for a, b in ((u, U), (s / scale, S), (vh, Vh)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_reach_the_svd():
    W = matrix(90, 100).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = randomized_svd(W, 6)
        assert (W @ W.T).dtype == torch.bfloat16                      # and afterwards it is there
    assert all(torch.equal(a, b) for a, b in zip(found, randomized_svd(W, 6)))


@pytest.mark.parametrize("shapes", [[], [(50, 60), (60, 50)], [(50, 60), (50, 64)]])
def test_a_group_of_different_shapes_is_refused(shapes):
    with pytest.raises(ValueError, match="all have one shape"):
        grouped_svd([torch.randn(s) for s in shapes], 4)


def test_shapes_that_are_refused():
    for shape in ((5,), (2, 2, 50, 60)):
        with pytest.raises(ValueError, match=r"it takes \(m, n\) or \(b, m, n\)"):
            randomized_svd(torch.randn(shape), 4)
    with pytest.raises(ValueError, match="at least one matrix"):
        randomized_svd(torch.randn(0, 50, 60), 4)
