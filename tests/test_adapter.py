"""adapter.py: save and load, facts, compress, methods of one's own, older versions, PEFT."""
import copy
import json
import random
import resource
import warnings
from dataclasses import fields, replace
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adapter
import model
import pissa
from conftest import (
    DTYPES,
    QUANTISED,
    QUANTISED_IDS,
    ROOT,
    assert_logits_equal,
    changed,
    hugging_face,
    mlp,
    optimise,
    quiet,
    rounded_base,
    small_net,
    with_weights,
)
from formats import peft

OLD = ROOT / "tests" / "adapters_bc3224f"
TOKENS = torch.arange(1, 25).view(2, 12)


# --- a method that only its caller knows

def olora(weight, options):
    """OLoRA (arXiv 2406.01775): W = Q R; A, B are the first r columns of Q and rows of R."""
    Q, R = torch.linalg.qr(weight.T.float())
    A, B = Q[:, :options.rank].contiguous(), R[:options.rank]
    return pissa.residual(weight, A, B), A, B, (A, B)


def test_a_method_of_ones_own(tmp_path, net, tokens):
    before = net(tokens)
    pissa.inject(net, 4, olora, progress=False, keep_base=True)
    assert_logits_equal(net(tokens), before, 1e-5)
    assert net.pissa["method"] == "olora"
    m = net.model.layers[0].mlp.up_proj
    torch.testing.assert_close(m.A.T @ m.A, torch.eye(4), rtol=0, atol=1e-5)
    first = optimise(net, tokens, 3)[0][-1]
    adapter.save(net, tmp_path)
    fresh = adapter.load(small_net(), tmp_path, keep_base=True)
    assert torch.equal(fresh(tokens), net(tokens)) and adapter.facts(fresh) == adapter.facts(net)
    assert optimise(fresh, tokens, 3)[0][-1] < first
    with pissa.disabled(fresh):
        assert torch.equal(fresh(tokens), before)
    on = fresh(tokens)
    assert_logits_equal(pissa.merge(fresh)(tokens), on, 1e-5)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(hugging_face(small_net()), str(tmp_path))
    assert_logits_equal(theirs(tokens).logits, net(tokens))


@pytest.mark.parametrize("method, bits, subtracted, own_pair", [
    ("pissa", 16, True, False), ("lora", 16, False, False), (olora, 16, True, False),
    ("qpissa", 4, True, True), ("loftq", 4, True, True), ("qlora", 4, False, False),
    ("qpissa", 8, True, True), ("loftq", 8, True, True), ("qlora", 8, False, False)])
def test_facts_of_a_method(method, bits, subtracted, own_pair):
    found = adapter.facts_of(method, bits=bits)
    assert {k: found[k] for k in ("bits", "subtracted", "own_pair", "rank")} == {
        "bits": bits, "subtracted": subtracted, "own_pair": own_pair, "rank": 1}
    assert found.get("double_quant") == (True if bits == 4 else None)


# --- adapters saved at commit bc3224f

@pytest.fixture
def expected():
    return pytest.importorskip("safetensors.torch").load_file(OLD / "expected.safetensors")


def tiny():
    return model.load("tiny", "cpu", torch.float32)


@pytest.mark.parametrize("method", ["pissa", "lora", "qpissa", "qlora", "loftq"])
def test_adapters_of_before(tmp_path, expected, method):
    """They load, give the logits they gave then, go on, and are saved as they are saved now."""
    net = adapter.load(tiny(), OLD / method)
    assert_logits_equal(net(TOKENS)[:, -1, ::128], expected[method], 1e-5)
    assert adapter.is_quantised(OLD / method) == (method in ("qpissa", "qlora", "loftq"))
    adapter.save(net, tmp_path / "new")
    again = adapter.load(tiny(), tmp_path / "new")
    assert torch.equal(again(TOKENS), net(TOKENS))
    optimise(again, TOKENS, 1)
    adapter.compress(OLD / method, tmp_path / "small", 4 if method in ("pissa", "qpissa") else 2)
    assert adapter.read_facts(tmp_path / "small")["rank"] in (2, 4)
    if method in ("pissa", "lora", "qlora"):
        small = adapter.load(tiny(), tmp_path / "small")
        assert_logits_equal(small(TOKENS), net(TOKENS), 1e-4)


@pytest.mark.parametrize("method", ["pissa", "qpissa"])
def test_adapters_of_before_on_another_base(tmp_path, expected, method):
    net = tiny()
    net.model.layers[3].self_attn.v_proj.weight.data *= 1.1
    with pytest.raises(ValueError, match="made on another base model"):
        adapter.load(net, OLD / method)
    assert not pissa.layers(net)


@pytest.mark.parametrize("change, message", [
    (dict(pissa="yes"), "not the config of a LoRA adapter"),
    (dict(pissa={"method": "pissa"}), "not the config of a LoRA adapter"),
    (dict(pissa={"method": "pissa", "rank": 2, "base": 5}), "not the config of a LoRA adapter"),
    (dict(pissa={"method": ["pissa"], "rank": 2, "base": "?"}), "not the config of a LoRA adapter"),
    (dict(pissa={"method": "dora", "rank": 2, "base": "?"}), "method dora is none of pissa, lora"),
    (dict(pissa={"method": "pissa", "rank": 2, "base": "?"}), "made on another base model"),
    (dict(lora_alpha=16), "not the config of a LoRA adapter .*lora_alpha 16"),
    (dict(pissa={"method": "qpissa", "rank": 2, "base": "?", "codes": "0"}),
     "does not say how weights were rounded"),
    (dict(pissa={"method": "qpissa", "rank": 2, "base": "?", "double_quant": True}),
     "does not say how weights were rounded")])
def test_damaged_adapters_of_before(tmp_path, expected, change, message):
    for file in (OLD / "pissa").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        adapter.load(tiny(), tmp_path)


# --- other tools

def test_weights_that_another_tool_rewrote_are_a_plain_lora(tmp_path, net, tokens):
    """PEFT loads ours and saves it again in the same folder."""
    peft = pytest.importorskip("peft")
    pissa.inject(net, 4, progress=False)
    optimise(net, tokens, 3)
    adapter.save(net, tmp_path)
    theirs = peft.PeftModel.from_pretrained(hugging_face(small_net()), str(tmp_path),
                                            is_trainable=True)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p *= 1.5
    theirs.save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="another tool has rewritten the weights"):
        loaded = adapter.load(small_net(), tmp_path)
    assert loaded.pissa["method"] == "lora" and adapter.facts(loaded)["rank"] == 8
    assert_logits_equal(loaded(tokens), theirs(tokens).logits)


def test_peft_reads_ours_without_a_warning(tmp_path, net, recwarn):
    peft = pytest.importorskip("peft")
    pissa.inject(net, 4, progress=False)
    adapter.save(net, tmp_path)
    base = hugging_face(small_net())
    recwarn.clear()
    peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert not [w for w in recwarn if "pissa" in str(w.message)]


def test_no_program_takes_the_residual_for_the_model(tmp_path, net, tokens):
    """What save_pretrained writes of an injected model has a `weight` of one number for
    what is a residual. So from_pretrained refuses it; merged first, the model is whole."""
    transformers = pytest.importorskip("transformers")
    theirs = pissa.inject(hugging_face(net), 4, progress=False)
    with torch.no_grad():
        for _, m in pissa.layers(theirs):
            m.B *= 1.1
    want = theirs(tokens).logits
    theirs.save_pretrained(tmp_path / "injected")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "injected")
    state = theirs.state_dict()
    assert {state[f"{name}.weight"].shape for name, _ in pissa.layers(theirs)} == {(1,)}
    pissa.merge(theirs).save_pretrained(tmp_path / "merged")
    read, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_logits_equal(read(tokens).logits, want, 1e-5)


def test_without_keep_base_one_line_says_what_to_pass(tmp_path, net):
    pissa.inject(net, 4, progress=False)
    adapter.save(net, tmp_path)
    for call in (lambda: pissa.remove(net), lambda: adapter.load(net, tmp_path),
                 lambda: pissa.disabled(net).__enter__()):
        with pytest.raises(ValueError, match="keep_base=True") as e:
            call()
        assert "\n" not in str(e.value)
    assert len(pissa.layers(net)) == 14


# --- save and load

@pytest.mark.parametrize("method, options", [("pissa", {}), ("lora", {}), *QUANTISED],
                         ids=["pissa", "lora", *QUANTISED_IDS])
@pytest.mark.parametrize("niter", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_is_the_trained_model(tmp_path, tokens, method, options, niter, dtype):
    net = quiet(small_net(n_layers=1).to(dtype), 4, method, niter=niter, **options)
    optimise(net, tokens, 3)
    adapter.save(net, tmp_path / "a")
    fresh = adapter.load(small_net(n_layers=1).to(dtype), tmp_path / "a", keep_base=True)
    assert torch.equal(fresh(tokens), net(tokens))
    trained = {n for n, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in net.named_parameters() if p.requires_grad}
    assert adapter.facts(fresh) == adapter.facts(net)
    with pissa.disabled(fresh):
        assert torch.equal(fresh(tokens), small_net(n_layers=1).to(dtype)(tokens))


@pytest.mark.parametrize("method, bits", [*((method, 4) for method in pissa.METHODS),
                                          ("qpissa", 8), ("qlora", 8)])
def test_reload_and_continue_is_uninterrupted(tmp_path, tokens, method, bits):
    net = quiet(small_net(), 4, method, bits=bits)
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
    net = adapter.load(small_net().bfloat16().to(used), tmp_path)
    assert len(pissa.layers(net)) == 14 and net.model.layers[0].mlp.up_proj.frozen.dtype == used


def test_roundings_of_one_base_are_the_same_base(tmp_path):
    """A float32 base that was rounded to float16 for one and to bfloat16 for another, with numbers
    near halfway, tiny ones and zeros."""
    nets = [small_net(n_layers=1) for _ in DTYPES]
    for net, dtype in zip(nets, DTYPES):
        W = net.model.layers[0].mlp.up_proj.weight.data.flatten()
        near = torch.tensor([1 + 2**-8 - 2**-14, 1 + 2**-8 + 2**-14, 3e-8, 2**-24, 0, -1e-12])
        W.copy_(near.repeat(W.numel() // 6))
        net.to(dtype)
    for made in nets:
        adapter.save(quiet(copy.deepcopy(made), 2, "lora"), tmp_path)
        for used in nets:
            adapter.load(copy.deepcopy(used), tmp_path)


def test_force_base(tmp_path, tokens):
    """Another base with a warning; but not one of another shape."""
    adapter.save(quiet(small_net(), 2, "lora"), tmp_path)
    with pytest.raises(ValueError, match="another base model: .*--force-base"):
        adapter.load(small_net(seed=1), tmp_path)
    with pytest.warns(UserWarning, match="made on another base model"):
        forced = adapter.load(small_net(seed=1), tmp_path, force_base=True)
    assert torch.equal(forced(tokens), small_net(seed=1)(tokens))            # B is zero
    with pytest.raises(ValueError, match="the model's is"):
        adapter.load(small_net(ffn_dim=96), tmp_path, force_base=True)
    with pytest.warns(UserWarning, match="made on another base model"):
        net = tiny()
        net.model.layers[3].self_attn.v_proj.weight.data *= 1.1
        adapter.load(net, OLD / "lora", force_base=True)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_base_that_is_not_finite_is_another(tmp_path, number):
    adapter.save(quiet(small_net(), niter=0), tmp_path)
    net = small_net()
    net.model.layers[1].mlp.up_proj.weight[:] = number
    with pytest.raises(ValueError, match="another base model: model.layers.1.mlp.up_proj"):
        adapter.load(net, tmp_path)


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
    (dict(peft_type="LOHA"), "not the config of a LoRA adapter .*peft_type is 'LOHA'"),
    (dict(lora_alpha=None), "not the config of a LoRA adapter"),
    (dict(r=16), "adapter_config.json: r is 16, lora_alpha is 8, but pissa.json tells of 8"),
    (dict(lora_alpha=16), "adapter_config.json: r is 8, lora_alpha is 16, but pissa.json"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save=.* trained whole matrices"),
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
    with pytest.raises(ValueError, match="adapter_config.json: not JSON"):
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


# --- damage

def test_a_flipped_bit_is_noticed(tmp_path, net, tokens):
    """Whatever the file: one line, or exactly the same model."""
    optimise(quiet(net, 2, "qpissa", targets=("q_proj", "down_proj")), tokens, 1)
    adapter.save(net, tmp_path)
    want, rng, refused = net(tokens), random.Random(0), 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for at in [rng.randrange(8 * len(whole)) for _ in range(12)]:
            damaged = bytearray(whole)
            damaged[at // 8] ^= 1 << at % 8
            path.write_bytes(damaged)
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("error", ".*another tool")
                    assert torch.equal(adapter.load(small_net(), tmp_path)(tokens), want)
            except ValueError as e:
                assert str(tmp_path) in str(e) and "\n" not in str(e)
                refused += 1
        path.write_bytes(whole)
    assert refused > 24


def test_weights_changed_by_hand(tmp_path, net):
    """Of the same size with our own config they look damaged, and the line says what to do. Of
    another size, or beside PEFT's config, they are another tool's."""
    from safetensors.torch import save_file
    adapter.save(quiet(net), tmp_path)
    tensors = peft.read_tensors(tmp_path, peft.WEIGHTS)
    key = next(k for k in tensors if "lora_B" in k)
    path, found = tmp_path / "adapter_model.safetensors", tensors | {key: 2 * tensors[key]}
    save_file(found, path)
    with pytest.raises(ValueError, match="damaged, its checksum .* remove pissa.json"):
        adapter.read_adapter(tmp_path)
    save_file({k: M.bfloat16() for k, M in found.items()}, path)
    with pytest.warns(UserWarning, match="another tool has rewritten"):
        assert not adapter.read_adapter(tmp_path).facts["subtracted"]
    save_file(found, path)
    (tmp_path / "pissa.json").unlink()
    assert not adapter.read_adapter(tmp_path).facts["subtracted"]


def lora(directory, A, B, suffix=".bin", name="layers.0.self_attn.q_proj", **config):
    """A PEFT LoRA with these lora_A and lora_B."""
    tensors = {f"base_model.model.model.{name}.lora_{k}.weight": M for k, M in zip("AB", (A, B))}
    (torch.save if suffix == ".bin" else import_module("safetensors.torch").save_file)(
        tensors, directory / f"adapter_model{suffix}")
    (directory / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": "all-linear", **config}))


A, B = torch.ones(4, 48), torch.ones(48, 4)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
@pytest.mark.parametrize("A, B, message", [
    (A * torch.nan, B, "q_proj holds NaN or Inf"), (A, B * torch.inf, "q_proj holds NaN or Inf"),
    (A, B.double() * 1e300, "q_proj holds NaN or Inf"), (A, B.int(), "not int32"),
    (A.to(torch.complex64), B, "not complex64"), (A.to(torch.float8_e4m3fn), B, "not float8_e4m"),
    (A.bool(), B, "not bool"), (A[0], B, "do not belong together"),
    (A[:0], B[:, :0], "do not belong together"), (A[..., None], B, "do not belong together"),
    (A[0, 0], B[0, 0], "do not belong together"), (A[:2], B, "do not belong together"),
    (A[:2], B[:, :2].clone(), "has rank 2, but rank 4 in adapter_config"),
    (A[:, :40].clone(), B, "q_proj is 40 x 48, the model's is 48 x 48")],
    ids=lambda v: v if isinstance(v, str) else "")
def test_tensors_that_are_no_lora(tmp_path, net, A, B, message, suffix):
    lora(tmp_path, A, B, suffix)
    with pytest.raises(ValueError, match=message) as e:
        adapter.load(net, tmp_path)
    assert not pissa.layers(net) and "\n" not in str(e.value)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_%s.weight"
BAD = {"a list": [1, 2], "a number": 3, "a tensor": torch.ones(3), "numbers": {KEY % "A": 3},
       "int keys": {1: torch.ones(2, 2)}, "nested": {"model": {KEY % "A": A, KEY % "B": B}},
       "empty": {}, "sparse": {KEY % "A": A.to_sparse(), KEY % "B": B},
       "meta": {KEY % "A": A.to("meta"), KEY % "B": B},
       "huge": {KEY % "A": A, KEY % "B": torch.zeros(1, 1).expand(10**10, 4)},
       "huge together": {f"{i}": torch.zeros(1000).expand(1000, 1000) for i in range(9)},
       "twice": {KEY % "A": A, KEY[17:] % "A": A + 1, KEY % "B": B}}


@pytest.mark.parametrize("kind", BAD)
def test_a_bin_file_of_something_else(tmp_path, net, kind):
    lora(tmp_path, A, B)
    torch.save(BAD[kind], tmp_path / "adapter_model.bin")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as e:
        adapter.load(net, tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000       # KiB


@pytest.mark.parametrize("file", ["adapter_config.json", "pissa.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "3", '{"r": 1e999', "\0"])
def test_json_that_is_no_config(tmp_path, net, file, text):
    adapter.save(quiet(net, niter=0), tmp_path)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file}: ") as e:
        adapter.load(small_net(), tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("change", [
    dict(r=0), dict(r=-4), dict(r=True), dict(r=4.0), dict(r=2**40), dict(lora_alpha=torch.nan),
    dict(lora_alpha=True), dict(lora_alpha=10**400), dict(rank_pattern=[4]), dict(rank_pattern="q"),
    dict(rank_pattern={"q_proj": "4"}), dict(rank_pattern={"(": 4}),
    dict(alpha_pattern={"q_proj": None})], ids=str)
def test_numbers_that_are_none(tmp_path, net, change):
    lora(tmp_path, A, B, **change)
    with pytest.raises(ValueError, match="adapter_config.json: not the config of a LoRA adapter"):
        adapter.load(net, tmp_path)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_is_not_saved(tmp_path, net, number):
    adapter.save(quiet(net), tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    pissa.layers(net)[3][1].B.data[0, 0] = number
    with pytest.raises(ValueError, match="is not written: .*o_proj holds NaN or Inf"):
        adapter.save(net, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


# --- ranks of their own

def several_ranks(weight, options):
    """PiSSA, with a rank that depends on the shape."""
    return pissa.init_pissa(weight, replace(options, rank=2 + (weight.shape[0] > 48)))


@pytest.mark.parametrize("method", [several_ranks, "lora"])
def test_unequal_ranks(tmp_path, net, tokens, method):
    """They are saved, loaded, trained on, compressed, and read by PEFT."""
    theirs = pytest.importorskip("peft")
    if method == "lora":
        config = theirs.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"],
            init_lora_weights=False, rank_pattern={"layers.1.self_attn.q_proj": 2, "up_proj": 5},
            alpha_pattern={"^model.layers.0.mlp.*": 3})
        trained = theirs.get_peft_model(hugging_face(small_net()), config).eval()
        trained.save_pretrained(str(tmp_path / "peft"))
        adapter.load(net, tmp_path / "peft")
        assert_logits_equal(net(tokens), trained(tokens).logits)
    else:
        quiet(net, 3, method)
    optimise(net, tokens, 2)
    adapter.save(net, tmp_path / "a")
    again = adapter.load(small_net(), tmp_path / "a")
    ranks = {n: m.A.shape[1] for n, m in pissa.layers(net)}
    assert {n: m.A.shape[1] for n, m in pissa.layers(again)} == ranks and len({*ranks.values()}) > 1
    assert torch.equal(again(tokens), net(tokens)) and adapter.facts(again) == adapter.facts(net)
    assert adapter.read_facts(tmp_path / "a")["rank"] == max(ranks.values())
    read = theirs.PeftModel.from_pretrained(hugging_face(small_net()), str(tmp_path / "a"))
    assert_logits_equal(read(tokens).logits, net(tokens))
    for rank, out in (None, "half"), (3, "three"):
        adapter.compress(tmp_path / "a", tmp_path / out, rank)
        small = {n: A.shape[1] for n, (A, _) in adapter.read_adapter(tmp_path / out).pairs.items()}
        both = 2 if method != "lora" else 1
        assert small == {n: max(1, both * r // 2) if rank is None else min(rank, both * r)
                         for n, r in ranks.items()}
        read = theirs.PeftModel.from_pretrained(hugging_face(small_net()), str(tmp_path / out))
        assert_logits_equal(read(tokens).logits, adapter.load(small_net(), tmp_path / out)(tokens))
    with pytest.raises(ValueError, match="cannot compress rank"):
        adapter.compress(tmp_path / "a", tmp_path / "b", 7)


def test_layers_of_several_kinds(tmp_path, net):
    quiet(net.model.layers[0], 2, "pissa"), quiet(net.model.layers[1], 2, "lora")
    with pytest.raises(ValueError, match="layers of several kinds"):
        adapter.save(net, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def adapted_by_peft(base, directory):
    """The names of the modules that PEFT adapts with a saved adapter."""
    theirs = pytest.importorskip("peft").PeftModel.from_pretrained(base, str(directory))
    return theirs, {n.removeprefix("base_model.model.").rpartition(".lora_A")[0]
                    for n, _ in theirs.named_parameters() if ".lora_A." in n}


def test_peft_adapts_the_same_layers(tmp_path, net, tokens, recwarn):
    """Only one layer's, although others have the same names."""
    quiet(net.model.layers[1], 2, targets=("q_proj", "up_proj"))
    for name in "ab":
        adapter.save(net, tmp_path / "a") if name == "a" else adapter.compress(
            tmp_path / "a", tmp_path / "b")
        recwarn.clear()
        theirs, found = adapted_by_peft(hugging_face(small_net()), tmp_path / name)
        assert found == {n for n, _ in pissa.layers(net)} and not [
            w for w in recwarn if "adapter" in str(w.message)]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj",
                                        "model.layers.1.self_attn.q_proj"]


def test_names_that_are_the_end_of_another(tmp_path):
    """fc1 alone, and not inner.fc1: only a regular expression tells them apart."""
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(8, 8))
    net.add_module("inner", nn.Sequential())
    net.inner.add_module("fc1", nn.Linear(8, 8))
    base = copy.deepcopy(net)
    W = net.fc1.weight.detach()
    frozen, *rest = pissa.init_pissa(W, pissa.Options(2))
    net.fc1 = pissa.PissaLinear(net.fc1, frozen, *rest[:2], *rest[:2], rest[2])
    adapter.save(net, tmp_path)
    assert adapted_by_peft(base, tmp_path)[1] == {"fc1"}


# --- networks inside others

def wrapped(net, how):
    """A network inside what torch wraps around it, or around its layers."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    if how == "compiled layer":
        net.fc2 = nn.Sequential(net.fc2)
        net.fc2 = torch.compile(net.fc2, backend="eager")
    if how == "recomputed layer":
        net.fc2 = checkpoint_wrapper(nn.Sequential(net.fc2))
    return {"compiled": lambda: torch.compile(net, backend="eager"),
            "replicated": lambda: nn.DataParallel(net),
            "both": lambda: nn.DataParallel(torch.compile(net, backend="eager"))}.get(
                how, lambda: net)()


@pytest.mark.parametrize("how", ["compiled", "replicated", "both", "compiled layer",
                                 "recomputed layer"])
def test_wrapped_networks(tmp_path, how):
    """Saved and loaded by their own names; merged and removed as others are."""
    x, layer = torch.randn(3, 40), "layer" in how
    targets = ("fc1", "0") if layer else ("fc1", "fc2")
    plain = wrapped(mlp(), "compiled layer") if layer else mlp()
    if layer:
        plain.fc2 = plain.fc2._orig_mod
    with torch.no_grad():
        before = plain(x)
        net = wrapped(mlp(), how)
        quiet(net, 4, "qpissa" if how == "compiled" else "pissa", targets)
        for _, m in pissa.layers(net):
            m.B.data += 0.1
        want = net(x)
        adapter.save(net, tmp_path)
        names = {"fc1", "fc2.0"} if layer else {"fc1", "fc2"}
        assert set(adapter.read_adapter(tmp_path).pairs) == names
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert set(config["target_modules"]) == set(targets)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for other in (copy.deepcopy(plain), wrapped(mlp(), how)):
                assert adapter.load(other, tmp_path, keep_base=True) is other
                torch.testing.assert_close(other(x), want)    # plain forms are compiled
                with pissa.disabled(other):
                    torch.testing.assert_close(other(x), before)
                adapter.save(other, tmp_path / "again")
                assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
                    tmp_path / "adapter_model.safetensors").read_bytes()
                assert_logits_equal(pissa.merge(copy.deepcopy(other))(x), want, 1e-5)
                torch.testing.assert_close(pissa.remove(other)(x), before)


def test_names_of_a_compiled_network_in_a_file(tmp_path, net, tokens):
    """PEFT writes them, and so did we."""
    config = pytest.importorskip("peft").LoraConfig(r=4, target_modules=["q_proj"],
                                                    init_lora_weights=False)
    theirs = import_module("peft").get_peft_model(hugging_face(net), config).eval()
    torch.compile(theirs, backend="eager").save_pretrained(str(tmp_path))
    tensors = peft.read_tensors(tmp_path, peft.WEIGHTS)
    import_module("safetensors.torch").save_file(
        {k.replace(".layers.1.", ".layers.1._orig_mod."): M for k, M in tensors.items()},
        tmp_path / "adapter_model.safetensors")
    assert_logits_equal(adapter.load(net, tmp_path)(tokens), theirs(tokens).logits)


def test_a_compiled_layer_of_ours(tmp_path):
    """torch.compile around a PissaLinear itself keeps what is replaced inside: it goes, too."""
    x, net = torch.randn(3, 40), quiet(mlp(), 4, targets=("fc1",))
    net.fc1.B.data += 1
    want = net(x)
    net.fc1 = torch.compile(net.fc1, backend="eager")
    net(x)
    adapter.save(net, tmp_path)
    assert torch.equal(adapter.load(mlp(), tmp_path)(x), want)
    assert torch.equal(pissa.remove(net)(x), mlp()(x))
    net.fc1 = torch.compile(net.fc1, backend="eager")
    with pytest.raises(ValueError, match="fc1 is a OptimizedModule, not an nn.Linear"):
        adapter.load(net, tmp_path)


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
    with pytest.warns(UserWarning, match="round to another code here"):
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
        for mine, their in [((m.A @ m.B).T, t.lora_B.default.weight @ t.lora_A.default.weight),
                            (m.weight, t.base_layer.weight)]:
            assert (mine - their).norm() <= 1e-5 * their.norm(), name


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


# Options of PEFT that change what is computed, or might: refused by name.
OTHER = dict(
    bias="tomorrow", modules_to_save=["lm_head"], trainable_token_indices=[1], use_dora=True,
    alora_invocation_tokens=[5], layer_replication=[(0, 2)], lora_bias=True, use_qalora=True,
    target_parameters=["x"], ensure_weight_tying=True, fan_in_fan_out=True,
    megatron_config={"a": 1},
    velora_config={"a": 1}, kasa_config={"a": 1}, arrow_config={"a": 1}, use_bdlora={"a": 1},
    monteclora_config={"a": 1})
CHANGED_BASE = ["olora", "OLoRA", "pissa", "pissa_niter_4", "corda", "loftq", "lora_ga", "tomorrow"]
# Those that are computed, or change nothing: see `test_what_is_computed_of_peft`.
SAME = dict(r=4, lora_alpha=9, use_rslora=True, rank_pattern={"layers.1.*q_proj": 2, "up_proj": 3},
            alpha_pattern={"q_proj": 5, "^model.layers.0.mlp.up_proj": 1.5}, lora_dropout=0.5,
            exclude_modules=["model.layers.0.self_attn.q_proj"], layers_to_transform=[0],
            layers_pattern="layers", megatron_core="x", qalora_group_size=8, task_type="CAUSAL_LM",
            inference_mode=True, base_model_name_or_path="x", revision="x", peft_version="1",
            auto_mapping={"a": 1}, init_lora_weights="mica", target_modules=r".*\.(q|up)_proj",
            loftq_config={"a": 1}, eva_config={}, corda_config={}, lora_ga_config={})


def test_every_option_of_peft_is_known():
    """Computed, ignored for a reason, or refused. What PEFT adds tomorrow is refused, too."""
    config = pytest.importorskip("peft").LoraConfig
    names = {f.name for f in fields(config)} - {"peft_type", "runtime_config"}
    assert not (SAME.keys() | OTHER) - names - set(peft.KNOWN), "of an older PEFT"
    assert SAME.keys() | {"peft_type", "bias", "pissa"} == peft.KNOWN
    assert not SAME.keys() & OTHER.keys()


@pytest.mark.parametrize("key, value", [*OTHER.items(), *(("init_lora_weights", v)
                                                          for v in CHANGED_BASE),
                                        ("tomorrow", 0), ("tomorrow", [0]), ("tomorrow", "x")])
def test_what_peft_computes_otherwise_is_refused(tmp_path, net, key, value):
    lora(tmp_path, A, B, **{key: value})
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{key}"):
        adapter.load(net, tmp_path)
    for neutral in (None, False, [], {}, "") if key == "tomorrow" else ():
        lora(tmp_path, A, B, **{key: neutral})
        peft.read_config(tmp_path)


@pytest.mark.parametrize("keys", [
    ("rank_pattern", "alpha_pattern", "use_rslora", "r"), ("layers_to_transform", "layers_pattern"),
    ("exclude_modules", "lora_dropout", "lora_alpha"), ("target_modules", "init_lora_weights")])
def test_what_is_computed_of_peft(tmp_path, net, tokens, keys):
    """The outputs are PEFT's."""
    theirs = pytest.importorskip("peft")
    config = theirs.LoraConfig(**{"r": 8, "target_modules": ["q_proj", "up_proj"],
                                  **{k: SAME[k] for k in keys}})
    trained = theirs.get_peft_model(hugging_face(net), config).eval()
    for n, p in trained.named_parameters():
        if "lora_" in n:
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    trained.save_pretrained(str(tmp_path))
    base = net(tokens)
    assert_logits_equal(adapter.load(net, tmp_path)(tokens), trained(tokens).logits)
    assert (net(tokens) - base).abs().max() > 1e-2


@pytest.mark.parametrize("change, words", [
    ({"target_modules": ["v_proj"]}, "q_proj has a LoRA, but"),
    ({"target_modules": ["proj"]}, "PEFT would leave it out"),
    ({"target_modules": r"model\.layers\.1\..*"}, "PEFT would leave it out"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, "leave it"),
    ({"target_modules": ["q_proj"], "exclude_modules": ".*q_proj"}, "leave it out"),
    ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "leave it out"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "leave it out"),
    *(({"target_modules": bad}, "config of a LoRA adapter .target_modules") for bad in (
        None, [], "", 3, {"q_proj": 1}, ["q_proj", 1], "q(", [None])),
    ({"exclude_modules": "q("}, "exclude_modules")], ids=str)
def test_a_config_that_leaves_tensors_out(tmp_path, net, change, words):
    """PEFT ignores tensors of modules that it does not adapt: neither is right."""
    lora(tmp_path, A, B, **change)
    with pytest.raises(ValueError, match=words):
        adapter.load(net, tmp_path)


@pytest.mark.parametrize("change", [
    {"target_modules": ["self_attn.q_proj"]}, {"target_modules": r".*\.q_proj"},
    {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "exclude_modules": ["proj", "1.self_attn.q_proj"]}], ids=str)
def test_a_config_that_names_all_tensors(tmp_path, net, change):
    lora(tmp_path, A, B, **change)
    assert [n for n, _ in pissa.layers(adapter.load(net, tmp_path))] == [
        "model.layers.0.self_attn.q_proj"]


def test_peft_copies_the_head_that_is_adapted(tmp_path, tokens):
    """Its copy of the base's matrix is no LoRA, and tells which base it was."""
    theirs = pytest.importorskip("peft")
    config = theirs.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    trained = theirs.get_peft_model(hugging_face(small_net()), config).eval()
    trained.save_pretrained(str(tmp_path), save_embedding_layers=True)
    assert_logits_equal(adapter.load(small_net(), tmp_path)(tokens), trained(tokens).logits)
    with pytest.raises(ValueError, match="another base model: lm_head differs"):
        adapter.load(small_net(seed=1), tmp_path)


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


def test_matrices_are_read_in_the_order_of_the_network(tmp_path):
    """Not in that of their names, where layer 10 comes before 2: sharding relies on it."""
    net, order = small_net(n_layers=12), []
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    adapter.save(pissa.inject(net, 2, targets="q_proj", progress=False), tmp_path)

    def read(name, leaf="weight"):
        order.append(name)
        return weights[f"{name}.{leaf}"]

    with torch.device("meta"):
        empty = model.Llama(net.config)
    adapter.load(empty, tmp_path, read=read)
    assert order == [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]


def test_a_second_name_of_a_shared_block(tmp_path):
    """An adapter may name a module by another of its names; no pair is left out for that."""
    net, name = small_net(), "model.layers.1.mlp.up_proj"
    net.model.layers[1] = net.model.layers[0]
    n_out, n_in = net.get_submodule(name).weight.shape
    adapter.write(tmp_path, {name: (torch.ones(n_in, 2), torch.ones(2, n_out))}, None, {})
    adapter.load(net, tmp_path)
    assert [m.A.shape for _, m in pissa.layers(net)] == [(n_in, 2)]
