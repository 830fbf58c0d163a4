"""nf4.py against bitsandbytes bit for bit, and against what backward must not keep."""
import copy
import math
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import nf4
import pissa
from conftest import ROOT, small_net

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def bnb():
    """bitsandbytes.functional; what it would compile runs as it is."""
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):
        yield functional


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread_rows(*shape):
    """Normal entries, rows of very different sizes: the absmax differ, as those of real weights."""
    return normal(*shape) * torch.logspace(-2, 1, shape[0])[:, None]


def with_outliers():
    W = normal(60, 90)
    W.view(-1)[::97] *= 300
    return W


def halfway():
    """Every block: the middle between two levels, its neighbours in float32, and 1."""
    middle = (nf4.LEVELS[:-1] + nf4.LEVELS[1:]) / 2
    near = [middle, middle.nextafter(torch.tensor(2.)), middle.nextafter(torch.tensor(-2.))]
    return torch.stack([torch.ones(15), *near, torch.full((15,), -1.)]).T.flatten()[:64].repeat(3)


MATRICES = {
    "normal": normal(96, 128), "blocks across rows": normal(60, 90), "odd": normal(7, 13),
    "one": normal(1), "a vector": normal(300), "three dimensions": normal(3, 5, 67),
    "outliers": with_outliers(), "spread": spread_rows(50, 70), "halfway": halfway(),
    "constant": torch.full((10, 100), -0.3), "tiny": normal(20, 100) * 1e-7,
    "below 1e-38": normal(20, 64) * 1e-40, "huge": normal(20, 100).clamp(-3, 3) * 2e4,
    "zeros": torch.zeros(4, 64), "zero blocks": normal(6, 64) * torch.arange(6)[:, None].fmod(2),
    "not contiguous": normal(90, 60).T}


# --- against bitsandbytes

def test_levels(bnb):
    assert torch.equal(nf4.LEVELS, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.ABSMAX_LEVELS, bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", MATRICES)
def test_equals_bitsandbytes(bnb, name, dtype):
    """Codes, absmax and what they stand for, in every dtype.

    Its dequantize_4bit gets a flat tensor: its C++ kernel for CPUs lets blocks begin anew with
    every row, so where rows end inside a block its numbers are wrong, by 3.0 in a normal matrix of
    2100 x 2000, of which rounding changes no entry by more than 0.6.
    """
    W = MATRICES[name].to(dtype)
    codes, state = bnb.quantize_4bit(W.flatten(), blocksize=64, quant_type="nf4")
    Q = nf4.quantize(W, double=False)
    assert torch.equal(Q.codes.flatten(), codes.flatten())
    assert torch.equal(Q.absmax.flatten(), state.absmax)
    assert torch.equal(Q.dequantize().flatten(), bnb.dequantize_4bit(codes, state).flatten())
    assert Q.dequantize().shape == W.shape and Q.dequantize().dtype == dtype


def test_larger_than_a_chunk(bnb):
    W = normal(2100, 2001)
    assert nf4.CHUNK < W.numel() < 2 * nf4.CHUNK and W.numel() % 64
    codes, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    Q = nf4.quantize(W, double=False)
    assert torch.equal(Q.codes, codes.flatten()) and torch.equal(Q.absmax, state.absmax)


def test_last_block_of_zeros(bnb):
    """The one difference: bitsandbytes takes 1e-38 for the absmax of zeros, if no full block."""
    W = F.pad(normal(64), (0, 10))
    codes, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4")
    Q = nf4.quantize(W, double=False)
    assert torch.equal(Q.codes, codes.flatten()) and Q.absmax[0] == state.absmax[0]
    assert Q.absmax[1] == 0 and state.absmax[1] == torch.tensor(1e-38)
    assert torch.equal(Q.dequantize(), bnb.dequantize_4bit(codes, state)[0])


def test_double_quantisation(bnb):
    """Scale and mean are equal to rounding, and the 8-bit codes to those by exact distance.

    The C++ kernel for CPUs of bitsandbytes finds them by another search, which is not exact: where
    its codes differ, ours are the nearer. Other dtypes take its generic path, all distances.
    """
    W = spread_rows(1200, 1000)
    _, state = bnb.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=True)
    Q, absmax = nf4.quantize(W), nf4.quantize(W, double=False).absmax.flatten()
    largest = absmax.max().item()       # the sum of float32 numbers depends on threads and device
    torch.testing.assert_close(Q.mean, state.offset.view(1), rtol=0, atol=1e-6 * largest)
    torch.testing.assert_close(Q.scale, state.state2.absmax, rtol=0, atol=1e-6 * largest)
    centred = absmax - Q.mean
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise(centred.double(), nf4.ABSMAX_LEVELS, 256)
    assert torch.equal(Q.absmax.flatten(), exact)
    differ = Q.absmax.flatten() != state.absmax
    assert differ.float().mean() < 0.005

    def distance(codes):
        scale = Q.scale.double().repeat_interleave(256)[:len(codes)]
        return (nf4.ABSMAX_LEVELS[codes.int()].double() * scale - centred.double()).abs()[differ]

    assert (distance(Q.absmax.flatten()) <= distance(state.absmax)).all()


@pytest.mark.parametrize("shape", [(64, 512), (60, 90), (7, 13), (300, 1000), (1,)])
@pytest.mark.parametrize("double", [True, False])
def test_dequantize_is_its_parts(shape, double):
    """level x absmax, and absmax = level x scale + mean, one entry after the other."""
    Q = nf4.quantize(spread_rows(math.prod(shape), 1).view(shape), double)
    i = torch.arange(math.prod(shape))
    byte = Q.codes.flatten()[i // 2]
    level = nf4.LEVELS[torch.where(i % 2 == 0, byte >> 4, byte & 15).int()]
    absmax = Q.absmax.flatten()
    if double:
        scale = Q.scale.flatten()[torch.arange(len(absmax)) // 256]
        absmax = nf4.ABSMAX_LEVELS[absmax.int()] * scale + Q.mean.flatten()
    assert torch.equal(Q.dequantize().flatten(), level * absmax[i // 64])
    assert torch.equal(Q.dequantize(torch.bfloat16), Q.dequantize().bfloat16())


@pytest.mark.parametrize("double, bound", [(True, 0.02), (False, 0)])
def test_nearest_level(double, bound):
    """No entry could be nearer to W, up to the rounding of absmax; 0 and +-absmax are kept."""
    W = normal(64, 512)
    W[:, ::50] = 0
    absmax = W.view(-1, 64).abs().amax(1, keepdim=True)
    best = (W.view(-1, 64, 1) - nf4.LEVELS * absmax[..., None]).abs().amin(2)
    Q = nf4.quantize(W, double).dequantize()
    assert ((Q - W).abs().view(-1, 64) - best <= absmax * (bound + 1e-6)).all()
    assert not Q[W == 0].any()


# --- the layer

def saved(call, *held):
    """(bytes that autograd keeps beside the tensors of the modules `held`, the result)."""
    own = {t.untyped_storage().data_ptr() for m in held for t in (*m.parameters(), *m.buffers())}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = call()
    return sum(n for p, n in kept.items() if p not in own), y


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("shape", [(96, 128), (60, 90)])
@pytest.mark.parametrize("double", [True, False])
def test_product(shape, double, dtype):
    Q = nf4.quantize(normal(*shape).to(dtype), double)
    x = normal(2, 5, shape[1], seed=1).to(dtype).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    y, want = Q(x), F.linear(x2, Q.dequantize())
    assert torch.equal(y, want) and y.dtype == dtype
    grad = normal(*y.shape, seed=2).to(dtype)
    y.backward(grad), want.backward(grad)
    assert torch.equal(x.grad, x2.grad)
    assert all(p.grad is None and not p.requires_grad for p in Q.parameters())
    assert not Q(x.detach()).requires_grad


def test_autocast():
    """As F.linear does under autocast: the product in bfloat16, the gradient in float32."""
    Q, x = nf4.quantize(normal(96, 128)), normal(5, 128, seed=1).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kept, y = saved(lambda: Q(x), Q)
        want = F.linear(x2, Q.dequantize())
    assert y.dtype == torch.bfloat16 and torch.equal(y, want) and kept == 0
    y.float().square().sum().backward(), want.float().square().sum().backward()
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad, x2.grad)


def test_second_derivative():
    Q, x = nf4.quantize(normal(6, 8)).double(), normal(3, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(Q, x) and torch.autograd.gradgradcheck(Q, x)


def test_backward_keeps_nothing_but_the_parts():
    Q, x = nf4.quantize(normal(192, 256).bfloat16()), normal(3, 256).bfloat16().requires_grad_()
    assert saved(lambda: Q(x), Q)[0] == 0
    assert saved(lambda: F.linear(x, Q.dequantize()), Q)[0] == 2 * 192 * 256     # what it replaces


def test_backward_of_a_layer_keeps_its_input_and_factors():
    net = nn.ModuleDict({"W": nn.Linear(256, 192)})
    layer = pissa.inject(net, 4, "qpissa", "W", niter=1, progress=False).W.bfloat16()
    x = normal(3, 256).bfloat16().requires_grad_()
    assert saved(lambda: layer(x), layer)[0] == x.nbytes + 3 * 4 * 2             # x and x A


def test_backward_of_a_network_keeps_what_it_keeps_in_lora(tokens):
    """The same activations beside the weights, and the weights in about 4 of 16 bits."""
    sizes = dict(dim=192, ffn_dim=512)
    extra, held = {}, {}
    for method in ("lora", "qpissa", "qlora"):
        net = small_net(**sizes).bfloat16()
        pissa.inject(net, 4, method, niter=0, progress=False, keep_base=False)
        extra[method] = saved(lambda net=net: net(tokens), net)[0]
        held[method] = sum(t.nbytes for _, m in pissa.layers(net) for n, t in
                           (*m.named_parameters(), *m.named_buffers()) if n not in "AB")
    assert extra["lora"] == extra["qpissa"] == extra["qlora"]
    assert held["qlora"] == held["qpissa"] < 0.3 * held["lora"]


@pytest.mark.parametrize("double", [True, False])
def test_compiled(double):
    Q, x = nf4.quantize(normal(48, 128), double), normal(3, 5, 128).requires_grad_()
    compiled = torch.compile(lambda x: Q(x).relu(), backend="aot_eager", fullgraph=True)
    y, want = compiled(x), Q(x).relu()
    assert torch.equal(y, want)
    (grad,), (grad2,) = (torch.autograd.grad(r.sum(), x) for r in (y, want))
    assert torch.equal(grad, grad2)


# --- the module

def parts(Q):
    return {n: t.clone() for n, t in (*Q.named_parameters(), *Q.named_buffers())}


@pytest.mark.parametrize("move", [
    lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.cpu(),
    copy.deepcopy, lambda m: m.train().requires_grad_(False), lambda m: m.share_memory()])
def test_parts_are_never_rounded(move):
    net = nn.Sequential(nn.Linear(3, 3), nf4.quantize(spread_rows(64, 128)))
    before, sum_before = parts(net[1]), net[1].checksum()
    after = parts(move(net)[1])
    assert before.keys() == after.keys()
    for name, part in before.items():
        assert after[name].dtype == part.dtype and torch.equal(after[name], part), name
    assert net[1].checksum() == sum_before and net[1].dtype == torch.float32


def test_devices():
    Q = nf4.quantize(normal(64, 128))
    shapes = {n: (t.shape, t.dtype) for n, t in parts(Q).items()}
    assert Q.to("meta").device.type == "meta" and Q.levels.device.type == "meta"
    assert {n: (t.shape, t.dtype) for n, t in parts(Q).items()} == shapes
    assert Q(torch.empty(5, 128, device="meta")).shape == (5, 64)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict(double, assign):
    Q, other = (nf4.quantize(spread_rows(60, 90) + s, double) for s in (0, 1))
    state = copy.deepcopy(Q.state_dict())
    assert list(state) == ["codes", "absmax", "scale", "mean"][:4 if double else 2]
    assert other.checksum() != Q.checksum()
    other.load_state_dict(state, assign=assign)
    assert other.checksum() == Q.checksum()
    assert torch.equal(other.dequantize(), Q.dequantize())
    with pytest.raises(RuntimeError, match="size mismatch|Missing key|Unexpected key"):
        nf4.quantize(normal(60, 92), double).load_state_dict(state)


def test_checksum():
    """Every single bit of every part counts, and so does the order."""
    Q = nf4.quantize(spread_rows(9, 1024))
    want = Q.checksum()
    for name, part in Q.named_parameters():
        flat = part.data.view(-1).view(torch.uint8)
        for i in {0, len(flat) // 2, len(flat) - 1}:
            for bit in range(8):
                flat[i] ^= 1 << bit
                assert Q.checksum() != want, (name, i, bit)
                flat[i] ^= 1 << bit
    assert Q.checksum() == want and 0 <= want < 2**64
    Q.codes.data.copy_(Q.codes.flatten().roll(8).view(Q.codes.shape))
    assert Q.checksum() != want


@pytest.mark.parametrize("double, bits", [(True, 4 + 8 / 64 + 32 / 64 / 256), (False, 4.5)])
def test_size(double, bits):
    Q = nf4.quantize(normal(512, 512).bfloat16(), double)
    assert 8 * Q.nbytes / 512**2 == pytest.approx(bits, abs=2e-4)
    assert repr(Q) == f"NF4((512, 512), {bits:.2f} bits a weight)"


@pytest.mark.parametrize("shape, codes, absmax, scale", [
    ((4, 16384), (4, 8192), (4, 256), (4, 1)),
    ((96, 128), (96, 64), (96, 2), (1,)),
    ((60, 90), (60, 45), (85,), (1,)),
    ((2, 33), (33,), (2,), (1,)),              # two blocks, two rows; but the first block has 64
    ((4, 16000), (4, 8000), (4, 250), (4,)),   # and so here: the first is for 256 of the 250
    ((7, 13), (46,), (2,), (1,)),
    ((3, 4, 64), (3, 128), (3, 4), (1,)),
    ((), (1,), (1,), (1,))])
def test_rows_are_rows_where_blocks_allow(shape, codes, absmax, scale):
    """Dim 0 of a part is that of W exactly where a row of W can be unpacked from its row alone."""
    W = normal(max(1, math.prod(shape))).view(shape)
    Q = nf4.quantize(W)
    assert (Q.codes.shape, Q.absmax.shape, Q.scale.shape) == (codes, absmax, scale)
    assert Q.dequantize().shape == W.shape


def test_split_by_rows():
    W, whole = normal(96, 128), nf4.quantize(normal(96, 128), double=False)
    for i in (0, 32, 64):
        part = nf4.quantize(W[i:i + 32], double=False)
        assert torch.equal(part.codes, whole.codes[i:i + 32])
        assert torch.equal(part.absmax, whole.absmax[i:i + 32])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("double", [True, False])
def test_not_finite(bad, double):
    W = torch.ones(70, 70)
    W[-1, -1] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        nf4.quantize(W, double)


@pytest.mark.parametrize("W", [torch.ones(5, 5, dtype=torch.int64), torch.ones(0, 5)])
def test_no_numbers(W):
    with pytest.raises(ValueError, match=rf"floating-point numbers, not {W.dtype} \({len(W)}, 5\)"):
        nf4.quantize(W)


def test_nothing_is_recorded_for_autograd():
    W = normal(8, 64).requires_grad_()
    assert not nf4.quantize(W).dequantize().requires_grad


DEFAULTS = """
import torch
torch.set_default_dtype(torch.float64)
with torch.device("meta"):
    import nf4
W = torch.randn(60, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
print(nf4.quantize(W).checksum(), nf4.quantize(W, double=False).checksum())
torch.set_default_dtype(torch.bfloat16)
print(nf4.quantize(W).checksum(), nf4.quantize(W, double=False).checksum())
"""


@pytest.mark.long
def test_default_dtype_and_device_do_not_matter():
    """Neither where the levels are made, on import, nor where a matrix is rounded."""
    done = subprocess.run([sys.executable, "-c", DEFAULTS], capture_output=True, text=True,
                          cwd=ROOT, check=True)
    want = [nf4.quantize(normal(60, 90), double).checksum() for double in (True, False)]
    assert list(map(int, done.stdout.split())) == 2 * want


def test_without_a_compiler(monkeypatch):
    """One warning, and the same numbers in many steps."""
    def missing(*_):
        raise RuntimeError("no triton")

    monkeypatch.setattr(nf4, "KERNELS", {})
    monkeypatch.setattr(torch._inductor, "compile", missing)
    Q = nf4.quantize(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    parts = [p.detach().flatten() for p in (Q.codes, Q.absmax, Q.scale, Q.mean)]
    parts += Q.levels, Q.absmax_levels, Q.pairs
    with pytest.warns(UserWarning, match="could not be compiled.*no triton"):
        found = nf4.unpack_on_gpu(*parts, dtype=torch.float32)
    assert torch.equal(found, nf4.unpack_on_gpu(*parts, dtype=torch.float32))
    assert torch.equal(found.view(40, 64), Q.dequantize())


STRIDED = [lambda M: M[:, ::2], lambda M: M[:, :1], lambda M: M[0, ::3],
           lambda M: M[:1, :1].expand(9, 40)]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_packed_in_one_kernel(dtype, monkeypatch):
    """triton's kernel gives the bits of the plain form, of strided matrices, too, and sees NaN and
    Inf: on a GPU, or in triton's interpreter."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or triton and TRITON_INTERPRET=1 from the start")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The interpreter converts subnormal bfloat16 numbers wrongly: a GPU shifts their bits.
    wrong = {"below 1e-38"} if (device, dtype) == ("cpu", torch.bfloat16) else ()
    cases = [(W.to(dtype), lambda W: W) for name, W in MATRICES.items() if name not in wrong]
    cases += [(normal(64, 256).to(dtype), cut) for cut in STRIDED]

    def checksums(device):
        return [nf4.quantize(cut(W.to(device)), double).checksum()
                for W, cut in cases for double in (True, False)]

    want = checksums("cpu")
    monkeypatch.setattr(nf4, "KERNELS", {})
    if device == "cpu":
        monkeypatch.setattr(nf4, "pack", nf4.pack_on_gpu)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert checksums(device) == want
    for bad in (float("nan"), float("inf"), -float("inf")):
        W = normal(40, 77).to(dtype)
        W[0, 3] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            nf4.quantize(W.to(device))
    assert nf4.KERNELS[nf4.pack] is not nf4.pack


def packed(form, x):
    """codes and absmax that a form of nf4.pack finds."""
    codes = torch.zeros(-(-len(x) // 2), dtype=torch.uint8, device=x.device)
    absmax = torch.zeros(-(-len(x) // 64), device=x.device)
    form(x, nf4.middles(nf4.LEVELS, x.device), codes, absmax)
    return codes, absmax


def test_packed_without_triton(monkeypatch):
    """One warning, and the same bits."""
    monkeypatch.setattr(nf4, "KERNELS", {})
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    x = MATRICES["outliers"].flatten()
    with pytest.warns(UserWarning, match="NF4 could not be compiled"):
        found = packed(nf4.pack_on_gpu, x)
    assert all(map(torch.equal, found, packed(nf4.pack, x)))
    assert nf4.KERNELS == {nf4.pack: nf4.pack}
