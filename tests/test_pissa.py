"""pissa.py against its own definition, against PEFT, and against what must never happen."""
import copy
import json
import math
import re
import warnings
import weakref
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adapter
import fast
import model
import nf4
import pissa
import qpissa
import svd
from conftest import SMALL, assert_logits_equal, hugging_face, small_net
from formats import peft

MLP_TARGETS, DTYPES = ("fc1", "fc2"), (torch.float32, torch.bfloat16, torch.float16)
QUANTISED = [("qlora", {}), ("qlora", dict(double_quant=False)), ("loftq", {}),
             ("loftq", dict(quant_iters=1)), ("loftq", dict(last_svd=False)), ("qpissa", {}),
             ("qpissa", dict(double_quant=False)), ("qpissa", dict(quant_iters=1)),
             ("qpissa", dict(quant_iters=3, last_svd=False))]
QUANTISED_IDS = [" ".join([m, *(f"{k}={v}" for k, v in o.items())]) for m, o in QUANTISED]


def mlp(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(40, 60, bias=bias))
    net.add_module("act", nn.ReLU())
    net.add_module("fc2", nn.Linear(60, 30, bias=bias))
    return net.to(dtype)


def quiet(net, rank=4, method="pissa", *args, keep_base=True, **kwargs):
    return pissa.inject(net, rank, method, *args, progress=False, keep_base=keep_base, **kwargs)


def layer_of(linear, rank, method="pissa", **options):
    """The PissaLinear that a method makes of an nn.Linear."""
    init = getattr(import_module(pissa.METHODS[method]), f"init_{method}")
    return pissa.PissaLinear.from_linear(linear, init, pissa.Options(rank, **options))


def relative_error(W, layer):
    """|W - (frozen + A B)| / |W|, Frobenius norms, W (out, in)."""
    return ((W - pissa.as_tensor(layer.frozen) - (layer.A @ layer.B).T).norm() / W.norm()).item()


def optimise(net, tokens, steps, lr=1e-2, optimizer=None):
    """A few AdamW steps on next-token prediction; the losses and the optimizer."""
    logits = (lambda x: net(x).logits) if hasattr(net, "generation_config") else net
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


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
    (dict(rank=4, niter=-1), "niter -1"),
    (dict(rank=4, method="qpissa", quant_iters=0), "quant_iters should be at least 1, not 0"),
    (dict(rank=4, method="loftq", quant_iters=1, last_svd=False), "nothing would ever be trained")])
def test_inject_errors_change_nothing(net, call, message):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        pissa.inject(net, **call)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


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
        assert False, "must not get here"
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


# --- save and load

@pytest.mark.parametrize("method, options", [("pissa", {}), ("lora", {}), *QUANTISED],
                         ids=["pissa", "lora", *QUANTISED_IDS])
@pytest.mark.parametrize("niter", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_is_the_trained_model(tmp_path, tokens, method, options, niter, dtype):
    net = quiet(small_net().to(dtype), 4, method, niter=niter, **options)
    optimise(net, tokens, 3)
    adapter.save(net, tmp_path / "a")
    fresh = adapter.load(small_net().to(dtype), tmp_path / "a", keep_base=True)
    assert torch.equal(fresh(tokens), net(tokens))
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in net.named_parameters() if p.requires_grad}
    assert adapter.facts(fresh) == adapter.facts(net)
    with pissa.disabled(fresh):
        assert torch.equal(fresh(tokens), small_net().to(dtype)(tokens))


@pytest.mark.parametrize("method", pissa.METHODS)
def test_reload_and_continue_is_uninterrupted(tmp_path, tokens, method):
    net = quiet(small_net(), 4, method)
    losses, optimizer = optimise(net, tokens, 3)
    adapter.save(net, tmp_path / "a")
    fresh = adapter.load(small_net(), tmp_path / "a")
    params = [p for p in fresh.parameters() if p.requires_grad]
    resumed = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimise(fresh, tokens, 3, optimizer=resumed)[0] == optimise(
        net, tokens, 3, optimizer=optimizer)[0]
    assert torch.equal(fresh(tokens), net(tokens))


def test_adapters_one_after_another(tmp_path, tokens):
    base, want = small_net(), {}
    for name, method, rank in [("a", "pissa", 4), ("b", "lora", 3), ("c", "qpissa", 8),
                               ("d", "qlora", 4), ("e", "loftq", 2)]:
        net = quiet(small_net(), rank, method)
        optimise(net, tokens, 2)
        adapter.save(net, tmp_path / name)
        want[name] = net(tokens)
    for name in "abcdecba":
        on = adapter.load(base, tmp_path / name, keep_base=True)
        assert torch.equal(on(tokens), want[name])
    assert torch.equal(pissa.remove(base)(tokens), small_net()(tokens))


def test_saved_file_is_a_lora_of_rank_2r(tmp_path, net, tokens):
    base = {n: p.clone() for n, p in net.named_parameters()}
    optimise(quiet(net, 4), tokens, 2)
    adapter.save(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (8, 8, "LORA")
    assert "pissa" not in config                                # so that PEFT has nothing to ignore
    facts = json.loads((tmp_path / "pissa.json").read_text())
    assert (facts["method"], facts["rank"], facts["bits"]) == ("pissa", 4, 16)
    assert facts["subtracted"] is True and {"niter", "seed", "weights"} <= set(facts)
    tensors, name = peft.read_tensors(tmp_path, peft.WEIGHTS), "model.layers.1.mlp.down_proj"
    A, B = (tensors[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
    assert A.shape == (8, 128) and B.shape == (48, 8)
    m = net.get_submodule(name)
    torch.testing.assert_close(base[name + ".weight"] + B @ A,
                               m.weight + (m.A @ m.B).T, rtol=1e-4, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "pissa.json", "pissa.safetensors"]


def test_another_base_is_refused(tmp_path, net):
    adapter.save(quiet(net), tmp_path)
    other = small_net(seed=1)
    with pytest.raises(ValueError, match="made on another base model"):
        adapter.load(other, tmp_path)
    assert not pissa.layers(other)
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj is 128 x 48, the model's is"):
        adapter.load(small_net(ffn_dim=96), tmp_path)
    with pytest.raises(ValueError, match="the model has no model.layers.1"):
        adapter.load(small_net(n_layers=1), tmp_path)


@pytest.mark.parametrize("made, used", [(a, b) for a in DTYPES for b in DTYPES])
def test_a_base_in_another_dtype_is_the_same_base(tmp_path, made, used):
    """The weights of a bfloat16 checkpoint, whichever dtype they are copied to."""
    adapter.save(quiet(small_net().bfloat16().to(made), niter=0), tmp_path)
    adapter.load(small_net().bfloat16().to(used), tmp_path)


def test_the_smallest_change_of_a_base_that_is_noticed(tmp_path):
    """One sampled entry by one part in 128; a part in 512 is what bfloat16 rounds off."""
    adapter.save(quiet(small_net(), niter=0), tmp_path)
    for part, refused in (1 / 128, True), (1 / 1024, False):
        net = small_net()
        net.model.layers[1].mlp.up_proj.weight[0, 0] *= 1 + part
        if not refused:
            adapter.load(net, tmp_path)
            continue
        with pytest.raises(ValueError, match="another base model: model.layers.1.mlp.up_proj"):
            adapter.load(net, tmp_path)


def test_failed_load_keeps_the_adapter_that_is_there(tmp_path, net, tokens):
    adapter.save(quiet(small_net(n_layers=3)), tmp_path)
    quiet(net)
    want = net(tokens)
    with pytest.raises(ValueError, match="the model has no model.layers.2"):
        adapter.load(net, tmp_path)
    assert torch.equal(net(tokens), want) and net.pissa["rank"] == 4


@pytest.mark.parametrize("method", ["pissa", "qpissa"])
def test_without_safetensors(tmp_path, net, tokens, monkeypatch, method):
    import sys
    optimise(quiet(net, 4, method), tokens, 1)
    adapter.save(net, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        patch.setitem(sys.modules, "safetensors", None)
        with pytest.raises(ValueError, match="pip install safetensors"):
            adapter.load(small_net(), tmp_path)
        adapter.save(net, tmp_path)          # replaces the .safetensors of before
        assert not list(tmp_path.glob("*.safetensors"))
        assert torch.equal(adapter.load(small_net(), tmp_path)(tokens), net(tokens))


def damage(tmp_path, change, file="adapter_config.json"):
    path = tmp_path / file
    config = json.loads(path.read_text())
    config.update(change)
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


@pytest.mark.parametrize("change, message", [
    (dict(use_dora=True), "use_dora is not supported"),
    (dict(peft_type="LOHA"), "not the config of a LoRA adapter .*peft_type is LOHA"),
    (dict(lora_alpha=None), "not the config of a LoRA adapter"),
    (dict(r=16), "adapter_config.json: r is 16, lora_alpha is 8, but pissa.json tells of 8"),
    (dict(lora_alpha=16), "adapter_config.json: r is 8, lora_alpha is 16, but pissa.json"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save is not supported"),
    (dict(init_lora_weights="pissa_niter_4"), "needs the changed base it was made with")])
def test_what_cannot_be_loaded_is_refused(tmp_path, net, change, message):
    adapter.save(quiet(net), tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        adapter.load(small_net(), tmp_path)


@pytest.mark.parametrize("change", [dict(bits=8), dict(bits=4), dict(bits="gone"),
                                    dict(subtracted="yes"), dict(subtracted="gone"),
                                    dict(rank="4"), dict(rank="gone"), dict(own_pair="gone"),
                                    dict(weights="gone")], ids=str)
def test_damaged_facts(tmp_path, net, change):
    """They are refused before a weight is read."""
    adapter.save(quiet(net), tmp_path)
    damage(tmp_path, change, "pissa.json")
    for read in (None, lambda name: pytest.fail("it was read")):
        with pytest.raises(ValueError, match="pissa.json: damaged, or of a newer version"):
            adapter.load(small_net(), tmp_path, read=read)


def test_the_name_of_a_method_is_for_people(tmp_path, net, tokens):
    """Another one changes nothing."""
    adapter.save(quiet(net, niter=0), tmp_path)
    damage(tmp_path, dict(method="the method of tomorrow"), "pissa.json")
    loaded = adapter.load(small_net(), tmp_path)
    assert torch.equal(loaded(tokens), net(tokens))
    assert loaded.pissa["method"] == "the method of tomorrow"


def test_damaged_adapters(tmp_path, net):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        adapter.load(net, tmp_path)
    with pytest.raises(ValueError, match="nothing to save"):
        adapter.save(net, tmp_path)
    adapter.save(quiet(small_net()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="adapter_model.safetensors: not readable, perhaps trunc"):
        adapter.load(net, tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing"):
        adapter.load(net, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 4')
    with pytest.raises(ValueError, match="adapter_config.json: not the config of a LoRA adapter"):
        adapter.load(net, tmp_path)
    assert not pissa.layers(net)


def test_failed_save_leaves_the_old_adapter(tmp_path, net, tokens, monkeypatch):
    adapter.save(quiet(net), tmp_path)
    want = net(tokens)
    optimise(net, tokens, 1)

    def disk_full(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(json, "dumps", disk_full)
        adapter.save(net, tmp_path)
    assert torch.equal(adapter.load(small_net(), tmp_path)(tokens), want)
    assert not list(tmp_path.glob("*.tmp"))


# --- compress

@pytest.mark.parametrize("rank", [0, -1, 9])
def test_compress_to_an_impossible_rank(tmp_path, net, rank):
    adapter.save(quiet(net, 4), tmp_path / "a")
    with pytest.raises(ValueError, match=f"cannot compress rank 8 to {rank}"):
        adapter.compress(tmp_path / "a", tmp_path / "b", rank)
    assert not (tmp_path / "b").exists()


def test_compress(tmp_path, net, tokens):
    optimise(quiet(net, 4), tokens, 5)
    adapter.save(net, tmp_path / "a")
    errors = adapter.compress(tmp_path / "a", tmp_path / "b")
    full, small = (adapter.read_adapter(tmp_path / name).pairs for name in "ab")
    for name, (M, N) in full.items():
        delta, (A, B) = (M @ N).double(), small[name]
        assert A.shape[1] == 4
        S = torch.linalg.svdvals(delta)
        assert errors[name] == pytest.approx((S[4:].norm().item(), S.norm().item()), rel=1e-3)
        assert (delta - (A @ B).double()).norm().item() == pytest.approx(errors[name][0], rel=1e-3)
    assert all(0 < error < norm for error, norm in errors.values())
    loaded = adapter.load(small_net(), tmp_path / "b")
    assert loaded.pissa["method"] == "lora"
    errors = adapter.compress(tmp_path / "a", tmp_path / "c", rank=8)
    assert all(error < 1e-12 * norm for error, norm in errors.values())
    assert_logits_equal(adapter.load(small_net(), tmp_path / "c")(tokens), net(tokens), 1e-5)


# --- four bits

def with_weights(net, weight):
    """small_net() with weight(W, m) instead of W, for the PissaLinears m of `net`."""
    plain = small_net()
    for name, m in pissa.layers(net):
        W = plain.get_submodule(name).weight
        W.copy_(weight(W, m))
    return plain


def rounded_base(W, m):
    """Q + A_0 B_0: W, up to what rounding lost."""
    return pissa.as_tensor(m.frozen) + (0 if m.A0 is None else (m.A0 @ m.B0).T)


def changed(W, m):
    """W + Delta W."""
    return W + (m.A @ m.B).T - (0 if m.A0 is None else (m.A0 @ m.B0).T)


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
    assert torch.equal(pissa.as_tensor(layer.frozen), nf4.quantize(linear.weight, double).dequantize())


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
    assert_logits_equal(net(tokens), near(tokens), 1e-5)
    assert all(p.requires_grad == n.endswith((".A", ".B")) for n, p in net.named_parameters())
    frozen = adapter.facts(net)["codes"]
    losses = optimise(net, tokens, 8)[0]
    assert losses[-1] < losses[0] - 0.1 and adapter.facts(net)["codes"] == frozen


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["qlora", "qpissa"])
def test_merge_four_bits(method, dtype, tokens):
    """Q + A B, rounded once to the dtype of W."""
    net = quiet(small_net().to(dtype), 4, method)
    optimise(net, tokens, 2)
    want = {n: m.weight.dequantize(torch.float32) + (m.A @ m.B).detach().T
            for n, m in pissa.layers(net)}
    pissa.merge(net)
    for name, W in want.items():
        got = net.get_submodule(name).weight
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), W, rtol=2**-8 if dtype != W.dtype else 0, atol=1e-6)


@pytest.mark.parametrize("method, options, needed", [
    ("pissa", {}, False), ("lora", {}, False), ("qlora", {}, False), ("qpissa", {}, True),
    ("qpissa", dict(quant_iters=1), True), ("qpissa", dict(last_svd=False), False),
    ("loftq", dict(quant_iters=1), True), ("loftq", dict(last_svd=False), False)])
def test_what_q_was_rounded_from_is_kept(tmp_path, net, method, options, needed):
    """A_q and B_q are saved if Q cannot be had from A_0 and B_0."""
    adapter.save(quiet(small_net(), 4, "qpissa", niter=0), tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    adapter.save(quiet(net, 4, method, niter=0, **options), tmp_path)
    adapter.save(adapter.load(small_net(), tmp_path), tmp_path / "again")
    for directory in (tmp_path, tmp_path / "again"):
        assert {p.name for p in directory.iterdir() if p.is_file()} == before
        kinds = {name.rpartition(".")[2] for name in peft.read_tensors(directory, "pissa")}
        assert kinds == {"fingerprint", *(("A_q", "B_q") if needed else ())}
        config = json.loads((directory / "adapter_config.json").read_text())
        assert config["r"] == (4 if method in ("lora", "qlora") else 8)
    for name in peft.WEIGHTS, "pissa":
        first, second = (peft.read_tensors(d, name) for d in (tmp_path, tmp_path / "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("damage_it, error, message", [
    (lambda path, save: path.unlink(), FileNotFoundError, "pissa.safetensors is missing"),
    (lambda path, save: path.write_bytes(path.read_bytes()[:-9]), ValueError, "not readable, perh"),
    (lambda path, save: save(0), ValueError, "A_q and B_q of .*_proj are missing"),
    (lambda path, save: save(3), ValueError, "A_q and B_q of .*_proj are miss.*another shape")])
def test_damaged_file_of_what_q_was_rounded_from(tmp_path, net, damage_it, error, message):
    from safetensors.torch import save_file
    adapter.save(quiet(small_net(), 4, "qpissa", niter=0), tmp_path)
    path = tmp_path / "pissa.safetensors"

    def save(rows):
        tensors = peft.read_tensors(tmp_path, path.stem) if rows else {}
        save_file({n: M[:rows].clone() for n, M in tensors.items()}, path)

    damage_it(path, save)
    with pytest.raises(error, match=message):
        adapter.load(net, tmp_path)
    assert not pissa.layers(net) and net.lm_head.weight.isfinite().all()


@pytest.mark.parametrize("method", ["qpissa", "qlora"])
def test_other_codes_than_where_it_was_trained(tmp_path, net, method):
    adapter.save(quiet(net, 4, method, niter=0), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.load(small_net(), tmp_path)
    damage(tmp_path, dict(codes="0" * 16), "pissa.json")
    with pytest.warns(UserWarning, match="round to another 4-bit code here"):
        assert adapter.facts(adapter.load(small_net(), tmp_path)) == adapter.facts(net)


def test_compress_four_bits(tmp_path, net, tokens):
    """A qpissa adapter ends as a LoRA on W; one of qlora stays on nf4(W)."""
    for method, rank, want in [("qpissa", 8, "lora"), ("qlora", 4, "qlora")]:
        trained = quiet(small_net(), 4, method)
        optimise(trained, tokens, 3)
        adapter.save(trained, tmp_path / "a")
        adapter.compress(tmp_path / "a", tmp_path / "b", rank)
        net = adapter.load(small_net(), tmp_path / "b")
        assert (net.pissa["method"], net.pissa["rank"]) == (want, rank)
        if method == "qlora":
            assert_logits_equal(net(tokens), trained(tokens), 1e-5)
        else:
            assert_logits_equal(net(tokens), with_weights(trained, changed)(tokens), 1e-5)
        assert len(list((tmp_path / "b").iterdir())) == 4


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


# --- PEFT

def peft_model(net, rank, init, targets=pissa.TARGETS, alpha=None):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights=init,
                             target_modules=list(targets), task_type="CAUSAL_LM")
    return peft.get_peft_model(hugging_face(net), config)


def test_peft_same_decomposition(net):
    """A B and W_res equal PEFT's to 1e-5 relative, both with the exact SVD."""
    theirs = peft_model(net, 4, "pissa").base_model.model
    ours = quiet(small_net(), 4, niter=None)
    for name, m in pissa.layers(ours):
        t = theirs.get_submodule(name)
        for mine, peft in [((m.A @ m.B).T, t.lora_B.default.weight @ t.lora_A.default.weight),
                           (m.weight, t.base_layer.weight)]:
            assert (mine - peft).norm() <= 1e-5 * peft.norm(), name


def test_peft_same_training(net, tokens):
    theirs = peft_model(net, 4, "pissa")
    ours = quiet(small_net(), 4, niter=None)
    want, got = optimise(theirs, tokens, 30, lr=2e-3)[0], optimise(ours, tokens, 30, lr=2e-3)[0]
    assert max(abs(a - b) for a, b in zip(want, got)) < 1e-4
    assert want[-1] < want[0] - 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("niter", [None, 2], ids=["exact", "fast"])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_peft_loads_ours(tmp_path, net, tokens, niter, method):
    peft = pytest.importorskip("peft")
    base = hugging_face(net)
    optimise(quiet(net, 4, method, niter=niter), tokens, 5)
    adapter.save(net, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert_logits_equal(theirs(tokens).logits, net(tokens))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["qlora", "loftq", "qpissa"])
def test_peft_loads_ours_in_four_bits(tmp_path, net, tokens, method):
    """PEFT adds Delta W to whatever base it is given: on the full-precision one it computes with
    W + A B - A_0 B_0, on Q + A_0 B_0 it computes what we do."""
    peft = pytest.importorskip("peft")
    optimise(quiet(net, 4, method), tokens, 5)
    adapter.save(net, tmp_path)

    def theirs(base):
        return peft.PeftModel.from_pretrained(hugging_face(base), str(tmp_path))(tokens).logits

    assert_logits_equal(theirs(small_net()), with_weights(net, changed)(tokens), 1e-5)
    assert_logits_equal(theirs(with_weights(net, rounded_base)), net(tokens), 1e-5)


@pytest.mark.parametrize("method", ["qlora", "loftq", "qpissa"])
def test_difference_to_the_full_precision_base(net, tokens, method):
    """Layer by layer no more than what rounding lost, |W - Q - A_0 B_0| |x|."""
    inputs, base = {}, small_net()
    optimise(quiet(net, 4, method), tokens, 5)
    for name, m in pissa.layers(net):
        m.register_forward_hook(lambda m, x, y, name=name: inputs.update({name: (x[0], y)}))
    net(tokens)
    full = with_weights(net, changed)
    for name, m in pissa.layers(net):
        (x, y), W = inputs[name], base.get_submodule(name).weight
        lost = torch.linalg.matrix_norm(W - rounded_base(W, m), 2)
        error = (y - F.linear(x, full.get_submodule(name).weight)).norm(dim=-1)
        bound = lost * x.norm(dim=-1)
        assert (error <= bound * (1 + 1e-4)).all() and error.max() > 0.1 * bound.max(), name


@pytest.mark.parametrize("alpha, rslora", [(4, False), (32, False), (32, True)])
def test_ours_loads_peft(tmp_path, net, tokens, alpha, rslora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"],
                             use_rslora=rslora, init_lora_weights=False)     # B is not zero
    theirs = peft.get_peft_model(hugging_face(net), config).eval()
    theirs.save_pretrained(str(tmp_path))
    base = net(tokens)
    ours = adapter.load(net, tmp_path)
    assert_logits_equal(ours(tokens), theirs(tokens).logits)
    assert (ours(tokens) - base).abs().max() > 1e-2
    with pissa.disabled(ours):
        assert torch.equal(ours(tokens), base)


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
    for formula in (layer, lambda x: F.linear(x, pissa.as_tensor(layer.frozen).to(x.dtype), layer.bias)
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


def test_weights_of_one_shape_are_decomposed_together(as_on_a_gpu):
    """The same factors as one by one, within rounding, in memory of their own."""
    linears = pissa.find_linears(small_net(), pissa.TARGETS)
    options = pissa.Options(4, ahead=linears)
    for name in list(linears):
        W = linears.pop(name).weight.detach()
        A, B = pissa.principal(W, options)
        for got, want in zip((A, B), pissa.principal.plain(W, pissa.Options(4)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert got.is_contiguous()
    assert sum(as_on_a_gpu) == 14 and len(as_on_a_gpu) < 7 and not options.ready
    net = nn.ModuleDict({"W": nn.Linear(40, 60)})
    layer = quiet(net, targets="W").W
    assert layer.A.data_ptr() != layer.A0.data_ptr() and torch.equal(layer.A0, layer.A)


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
