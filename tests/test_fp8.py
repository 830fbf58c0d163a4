"""Eight bits: the rounding, the products and their gradients, beside float64."""
import pytest
import torch

import fp8


def matrix(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g) * torch.rand(shape[0], 1, generator=g).exp()


def nearest_e4m3(x):
    """The nearest numbers of E4M3, from the list of all of them."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    return every[(x.double()[..., None] - every).abs().argmin(-1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_the_nearest(dtype):
    """The largest entry of each row becomes 448; each other the nearest number there is."""
    W = matrix(7, 48).to(dtype)
    W[3] = 0
    codes, scale = fp8.by_rows(W)
    found, expected = codes.double(), nearest_e4m3(W.float() / scale)
    x = (W.float() / scale).double()
    assert torch.equal((found - x).abs(), (expected - x).abs())             # ties may go both ways
    assert (codes.float().abs().amax(1)[[0, 1, 2, 4, 5, 6]] == 448).all() and not codes[3].any()
    Q = fp8.quantize(W)
    assert Q.dequantize().dtype == dtype
    assert ((Q.dequantize(torch.float64) - W.double()).abs() <= W.abs().double() / 16
            + scale.double() * 2**-9).all()


def test_products_are_those_of_what_was_rounded():
    """y and dL/dx equal float64's products of the rounded numbers; both are near the exact ones."""
    W, x, g = matrix(40, 24), matrix(5, 24, seed=1), matrix(5, 40, seed=2)
    Q, x = fp8.quantize(W), x.requires_grad_()
    y = Q(x.view(1, 5, 24))[0]
    y.backward(g)
    codes, scale = Q.codes.double(), Q.scale.double()
    x8, a = (t.double() for t in fp8.by_rows(x.detach()))
    g8, b = (t.double() for t in fp8.by_rows(g * Q.scale.T))
    for found, expected in (y.detach(), a * x8 @ (codes * scale).T), (x.grad, b * g8 @ codes):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    for found, exact in (y.detach(), x.detach() @ W.T), (x.grad, g @ W):
        assert 0.001 < (found - exact).norm() / exact.norm() < 0.06
    assert Q.codes.grad is None and torch.equal(Q.codes_T, Q.codes.T)


def test_the_principal_components_stay_out_of_the_rounding():
    """What PiSSA argues in four bits: the residual loses less than W."""
    U, V = (torch.linalg.qr(matrix(64, 64, seed=s)).Q for s in (3, 4))
    W = (U * torch.logspace(2, -1, 64)) @ V
    left, S, right = torch.linalg.svd(W)
    residual = W - (left[:, :8] * S[:8]) @ right[:8]
    lost = [(fp8.quantize(M).dequantize() - M).norm() for M in (W, residual)]
    assert lost[1] < 0.5 * lost[0]


def test_it_moves_without_being_rounded():
    """`.to(bfloat16)` of a network leaves codes and scales; a state_dict brings them back."""
    Q = fp8.quantize(matrix(16, 32))
    before = {n: p.clone() for n, p in Q.named_parameters()}
    Q.to(torch.bfloat16)
    other = fp8.quantize(matrix(16, 32, seed=9))
    other.load_state_dict(Q.state_dict())
    for name, part in before.items():
        for found in (Q, other):
            assert torch.equal(getattr(found, name).float(), part.float())
            assert getattr(found, name).dtype == part.dtype


@pytest.mark.parametrize("W, message", [
    (torch.ones(3, 4, dtype=torch.int32), "FP8 needs a matrix of floats, not torch.int32"),
    (torch.ones(4), "FP8 needs a matrix"), (torch.full((2, 3), torch.nan), "NaN or Inf")])
def test_refusals(W, message):
    with pytest.raises(ValueError, match=message):
        fp8.quantize(W)
