"""Eight bits: the rounding, the products and their gradients, beside float64."""
import json
import os
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import adapter
import convert
import fast
import fp8
import model
import pissa
import train
from conftest import command, failure, first_lines, small_net


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


# --- inside a network

def eight(method="qlora", dtype=torch.float32, **options):
    return pissa.inject(small_net().to(dtype), 4, method, bits=8, progress=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fast_product_is_the_plain_one(dtype, bias):
    """`fast.LowRank` and autograd through `Product`: y, and the gradients of x, A, B and bias."""
    Q, g = fp8.quantize(matrix(40, 24).to(dtype)), matrix(10, 40, seed=2).view(2, 5, 40).to(dtype)
    found = []
    for form in (pissa.product, pissa.product.plain):
        wanted = [matrix(*s, seed=i).to(dtype if i == 1 else torch.float32).requires_grad_()
                  for i, s in enumerate([(24, 4), (10, 24), (4, 40), (1, 40)])]
        A, x, B, b = wanted
        y = form(x.view(2, 5, 24), Q, A, B, b[0] if bias else None)
        assert y.dtype == dtype
        found.append([y, *torch.autograd.grad(y, wanted[:3 + bias], g)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-2,
                                   atol=1e-5 if dtype == torch.float32 else 0.3)


def test_a_compiled_layer_is_an_eager_one():
    """One graph for every length, no breaks; the same gradients."""
    torch._dynamo.reset()
    net, counted = eight(), CompileCounterWithBackend("aot_eager")
    layer = net.model.layers[0]
    rope = {n: model.rope_tables(net.config, torch.arange(n)[None]) for n in (7, 8, 9, 11)}
    compiled = torch.compile(layer.forward, backend=counted, fullgraph=True)
    for n, tables in rope.items():
        results = []
        for form in (layer.forward, compiled):
            x = matrix(2 * n, 48).view(2, n, 48).requires_grad_()
            y = form(x, tables)
            wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
            results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item())
    assert counted.frame_count <= 2, counted.frame_count
    torch._dynamo.reset()


def test_rounding_in_one_kernel(monkeypatch):
    """As on a GPU, but in triton's interpreter: rows of any length, in several blocks."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs triton, and TRITON_INTERPRET=1 from the start")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(fast, "has_float8", lambda device: True)
    monkeypatch.setattr(fast, "KERNELS", {})
    monkeypatch.setattr(fast, "BLOCK", 32)
    fast.row_kernel.cache_clear()
    for k in 16, 32, 72:
        for given in (matrix(6, k),), (matrix(6, k).bfloat16(), matrix(1, k).abs()):
            (codes, scale), (c, s) = fp8.by_rows(*given), fp8.by_rows.plain(*given)
            near = torch.isclose(codes.float(), c.float(), rtol=0.13, atol=2**-9).float().mean()
            assert torch.equal(scale, s) and near > 0.9        # the interpreter rounds its own way
    assert fast.KERNELS == {fp8.by_rows.plain: fast.rounded_rows}
    fast.row_kernel.cache_clear()


def test_rounding_without_triton(monkeypatch):
    """One warning, then the formula as it is."""
    monkeypatch.setattr(fast, "has_float8", lambda device: True)
    monkeypatch.setattr(fast, "KERNELS", {})
    monkeypatch.setitem(sys.modules, "triton", None)
    fast.row_kernel.cache_clear()
    x, s = matrix(6, 32), matrix(1, 32).abs()
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    for given in (x,), (x, s):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for a, b in zip(fp8.by_rows(*given), fp8.by_rows.plain(*given), strict=True):
                assert torch.equal(a.float(), b.float())
        assert len(said) == (given == (x,))
    assert fast.KERNELS == {fp8.by_rows.plain: fp8.by_rows.plain}


def test_bits_are_refused_elsewhere():
    """One line: what, where, the remedy."""
    for flags, message in [
            (["--method", "pissa"], "--bits 8 is for qpissa, qlora, loftq, not --method pissa"),
            (["--method", "full"], "--bits 8 is for qpissa, qlora, loftq, not --method full"),
            (["--method", "qlora", "--no-double-quant"], "--no-double-quant is for --bits 4")]:
        assert message in failure("train.py", "--ckpt", "tiny", "--bits", 8, *flags)
    assert "--bits 4 is for qpissa, qlora, loftq, not --method pissa" in failure(
        "train.py", "--ckpt", "tiny", "--bits", 4)


def test_a_run_in_eight_bits(tmp_path):
    """train.py: what it prints and saves; going on begins where it ended; merged it is Q + A B."""
    flags = ["--ckpt", "tiny", "--data", first_lines(tmp_path, 48), "--val-fraction", 0.25,
             "--batch", 8, "--max-new-tokens", 2]
    text = command(train.main, *flags, "--method", "qpissa", "--bits", 8, "--rank", 8, "--steps",
                   4, "--lr", 2e-3, "--quant-iters", 2, "--out", tmp_path / "run")
    assert "with the weights in eight bits" in text and "bits a frozen weight" in text
    found = json.loads((tmp_path / "run/adapter/pissa.json").read_text())
    assert found["bits"] == 8 and "double_quant" not in found
    after = json.loads((tmp_path / "run/summary.json").read_text())["after"]["loss"]
    text = command(train.main, *flags, "--adapter", tmp_path / "run/adapter", "--steps", 1, "--out",
                   tmp_path / "more")
    assert f"step 0: validation loss {after:.4f}, with the weights in eight bits" in text
    assert json.loads((tmp_path / "more/args.json").read_text())["bits"] == 8
    net = adapter.load(model.load("tiny", "cpu"), tmp_path / "run/adapter")
    command(convert.main, "merge", tmp_path / "run", tmp_path / "merged", "--dtype", "float32")
    merged = model.load(tmp_path / "merged", "cpu")
    for name, m in pissa.layers(net):
        near = m.frozen.dequantize(torch.float32) + (m.A @ m.B).T
        torch.testing.assert_close(merged.get_submodule(name).weight.data, near.data, rtol=0,
                                   atol=1e-5)
