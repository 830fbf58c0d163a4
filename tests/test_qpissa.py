"""qpissa.py: the methods in four bits against exact alternations of rounding and SVD."""

import pytest
import torch
from torch import nn

import adapter
import nf4
import pissa
import qpissa
from conftest import (
    QUANTISED,
    QUANTISED_IDS,
    assert_logits_equal,
    layer_of,
    optimise,
    quiet,
    relative_error,
    small_net,
    with_weights,
)

# --- four bits

def exact_factors(W, r):
    """A, B of SVD_r(W), W given as (out, in)."""
    U, S, Vh = torch.linalg.svd(W.T, full_matrices=False)
    return (U * S.sqrt())[:, :r].contiguous(), (S.sqrt()[:, None] * Vh)[:r].contiguous()


def alternation(W, method, turns, last_svd, r=4):
    """[(Q, A B transposed, |W - Q - A B|)] after 1 ... turns turns of LoftQ's Algorithm 1.

    Without the last SVD it is the loop of PiSSA's authors, A B being what Q was rounded without.
    """
    A, B = exact_factors(W, r)
    if method == "loftq":
        A, B = torch.zeros_like(A), torch.zeros_like(B)
    found = []
    for _ in range(turns):
        Q, kept = nf4.quantize(torch.addmm(W, B.T, A.T, alpha=-1)).dequantize(), (A, B)
        A, B = exact_factors(W - Q, r)
        AB = torch.matmul(*((A, B) if last_svd else kept)).T
        found.append((Q, AB, (W - Q - AB).norm().item()))
    return found


def first_rise(errors):
    """How many come before the error falls no more."""
    return next((i for i in range(1, len(errors)) if errors[i] >= errors[i - 1]), len(errors))


NAMES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("last_svd", [True, False])
@pytest.mark.parametrize("method", ["qpissa", "loftq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alternation(net, dtype, method, last_svd, name):
    """Q and A B for T turns, as long as the error falls; it stops before it would rise."""
    linear, stopped = net.model.layers[1].get_submodule(name).to(dtype), False
    W = linear.weight.float()              # W - A B is not rounded to bfloat16 on its way to Q
    want, errors = alternation(W, method, 12, last_svd), []
    for T in (1, 2, 5, 12):
        if (T, method, last_svd) == (1, "loftq", False):            # refused by init_loftq
            A, B = W.new_zeros(W.shape[1], 4), W.new_zeros(4, W.shape[0])
            Q, A, B, pair = qpissa.alternate(linear.weight, A, B, pissa.Options(
                4, niter=None, quant_iters=1, last_svd=False))
            layer = pissa.PissaLinear(linear, Q, A, B, A, B, pair)
        else:
            layer = layer_of(linear, 4, method, niter=None, quant_iters=T, last_svd=last_svd)
        turns = min(T, first_rise([error for *_, error in want]))
        stopped |= turns < T
        Q, AB, error = want[turns - 1]
        assert (pissa.as_tensor(layer.frozen) - Q).norm() <= 1e-5 * W.norm()
        assert ((layer.A @ layer.B).T - AB).norm() <= 1e-5 * W.norm()
        errors.append((W - pissa.as_tensor(layer.frozen) - (layer.A @ layer.B).T).norm().item())
        assert errors[-1] == pytest.approx(error, rel=1e-5)
        again = nf4.quantize(pissa.residual(W, *layer.subtracted))
        assert again.checksum() == layer.frozen.checksum()                # W, A_q, B_q give Q
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    assert stopped or method == "qpissa"


@pytest.mark.long
@pytest.mark.parametrize("method", ["qpissa", "loftq"])
def test_another_turn_makes_no_matrix_worse(method):
    """Of a whole network, whose matrices share a source of random numbers for their SVDs."""
    before = {}
    for turns in range(1, 10):
        net = small_net(dim=96, ffn_dim=256)
        weights = {n: m.weight for n, m in net.named_modules() if isinstance(m, nn.Linear)}
        quiet(net, 4, method, niter=1, quant_iters=turns)
        errors = {n: relative_error(weights[n], m) for n, m in pissa.layers(net)}
        assert all(errors[n] <= before.get(n, 1) for n in errors), turns
        before = errors


@pytest.mark.parametrize("double", [True, False])
def test_qlora_is_lora_on_rounded_weights(double):
    linear = nn.Linear(128, 96)
    layer, lora = (layer_of(linear, 4, method=m, double_quant=double,
                                                 generator=torch.Generator().manual_seed(3))
                   for m in ("qlora", "lora"))
    assert torch.equal(layer.A, lora.A) and torch.equal(layer.B, lora.B) and layer.A0 is None
    Q = nf4.quantize(linear.weight, double)
    assert torch.equal(pissa.as_tensor(layer.frozen), Q.dequantize())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("iters", [1, 5])
def test_what_rounding_costs(net, name, iters):
    """qpissa < loftq < qlora, with spectra like trained weights'; one more SVD at the end helps."""
    linear = net.model.layers[0].get_submodule(name)

    def error(method, **options):
        layer = layer_of(linear, 4, method=method, niter=None,
                                              quant_iters=iters, **options)
        return relative_error(linear.weight, layer)

    assert error("qpissa") < error("qpissa", last_svd=False)
    assert error("qpissa") < 0.5 * error("loftq") < 0.5 * error("qlora")


@pytest.mark.parametrize("method, options", QUANTISED, ids=QUANTISED_IDS)
def test_quantised_step_0(net, tokens, method, options):
    """The outputs are those of the weights Q + A B; A and B are all that is trained."""
    quiet(net, 4, method, **options)
    near = with_weights(net, lambda W, m: m.weight.dequantize() + (m.A @ m.B).T)
    # Eight bits round x, too, by 3 % in each of 14 products.
    assert_logits_equal(net(tokens), near(tokens), 0.2 if "bits" in options else 1e-5)
    assert all(p.requires_grad == n.endswith((".A", ".B")) for n, p in net.named_parameters())
    frozen = adapter.facts(net)["codes"]
    losses = optimise(net, tokens, 8)[0]
    assert losses[-1] < losses[0] - 0.1 and adapter.facts(net)["codes"] == frozen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["qlora", "qpissa"])
@pytest.mark.parametrize("bits", [4, 8])
def test_merge_quantised(bits, method, dtype, tokens):
    """Q + A B, rounded once to the dtype of W."""
    net = quiet(small_net().to(dtype), 4, method, bits=bits)
    optimise(net, tokens, 2)
    want = {n: m.weight.dequantize(torch.float32) + (m.A @ m.B).detach().T
            for n, m in pissa.layers(net)}
    pissa.merge(net)
    for name, W in want.items():
        got = net.get_submodule(name).weight
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), W, rtol=2**-8 if dtype != W.dtype else 0, atol=1e-6)


@pytest.mark.parametrize("method", ["qpissa", "loftq"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_turns_in_bfloat16(method, device, monkeypatch):
    """As on a GPU, W - Q is decomposed in bfloat16 if W is: the error that is left is the same."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    linear = torch.nn.Linear(512, 768, bias=False)
    linear.weight.data = torch.randn(768, 512, generator=torch.Generator().manual_seed(0))
    linear, errors = linear.bfloat16(), []
    for there, rounds in ("cpu", False), (device, True):
        monkeypatch.setattr(qpissa, "multiplies_in_bfloat16", lambda W, rounds=rounds: rounds)
        layer = layer_of(linear.to(there), 16, method)
        errors.append((linear.weight.float() - pissa.as_tensor(layer.frozen)
                       - (layer.A @ layer.B).T).norm().item())
    assert errors[0] != errors[1] == pytest.approx(errors[0], rel=1e-3)
