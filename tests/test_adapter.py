"""adapter.py: methods of one's own, adapters of an older version, and what other tools make of it."""
import json

import pytest
import torch
from torch.nn import functional as F

import adapter
import model
import pissa
from conftest import ROOT, assert_logits_equal, hugging_face, small_net

OLD = ROOT / "tests" / "adapters_bc3224f"
TOKENS = torch.arange(1, 25).view(2, 12)


def optimise(net, tokens, steps=3):
    """A few steps of AdamW; the last loss."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


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
    first = optimise(net, tokens)
    adapter.save(net, tmp_path)
    fresh = adapter.load(small_net(), tmp_path, keep_base=True)
    assert torch.equal(fresh(tokens), net(tokens)) and adapter.facts(fresh) == adapter.facts(net)
    assert optimise(fresh, tokens) < first
    with pissa.disabled(fresh):
        assert torch.equal(fresh(tokens), before)
    on = fresh(tokens)
    assert_logits_equal(pissa.merge(fresh)(tokens), on, 1e-5)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(hugging_face(small_net()), str(tmp_path))
    assert_logits_equal(theirs(tokens).logits, net(tokens))


@pytest.mark.parametrize("method, bits, subtracted, own_pair", [
    ("pissa", 16, True, False), ("lora", 16, False, False), (olora, 16, True, False),
    ("qpissa", 4, True, True), ("loftq", 4, True, True), ("qlora", 4, False, False)])
def test_facts_of_a_method(method, bits, subtracted, own_pair):
    found = adapter.facts_of(method)
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
    optimise(net, tokens)
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
    """save_pretrained of an injected model names no `weight` for what is only a residual. So
    from_pretrained reports every target as missing; merged first, the model is whole."""
    transformers = pytest.importorskip("transformers")
    theirs = pissa.inject(hugging_face(net), 4, progress=False)
    with torch.no_grad():
        for _, m in pissa.layers(theirs):
            m.B *= 1.1
    want = theirs(tokens).logits
    theirs.save_pretrained(tmp_path / "injected")
    read, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "injected", output_loading_info=True)
    targets = {f"{name}.weight" for name, _ in pissa.layers(theirs)}
    assert targets <= set(info["missing_keys"])
    assert all(any(f"{name}.frozen" in k for k in info["unexpected_keys"])
               for name, _ in pissa.layers(theirs))
    names = set(theirs.state_dict())
    pissa.merge(theirs).save_pretrained(tmp_path / "merged")
    assert not names & targets
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
