"""convert.py decompose: the authors' layout, read by PEFT, by bitsandbytes and by ourselves."""
import copy
import json

import pytest
import torch

import adapter
import convert
import model
import nf4
import pissa
import train
from conftest import (
    TINY,
    assert_logits_equal,
    command,
    failure,
    first_lines,
    joined,
    optimise,
    small_net,
)
from formats import hf
from test_convert import contents

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("safetensors")

pytestmark = pytest.mark.long       # only ./check leaves these out

KINDS = {"llama": {}, "tied": dict(tied=True), "qwen3": dict(qk_norm=True),
         "gemma": dict(gelu=True, embed_scale=48 ** 0.5, tied=True)}


def write(folder, net):
    """A checkpoint in Hugging Face's layout."""
    hf.save_folder(folder, hf.config_json(vars(net.config), net.lm_head.weight.dtype),
                   net.named_parameters())
    return folder


def decompose(*argv):
    return command(convert.main, "decompose", *argv)


def theirs_of(out, **more):
    """The authors' way to load it."""
    base = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, out, subfolder="pissa_init", **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("niter", ["exact", "2"])
def test_peft_has_the_base_and_trains_to_our_losses(tmp_path, tokens, kind, niter):
    net = small_net(**KINDS[kind])
    write(tmp_path / "base", net)
    before = contents(tmp_path / "base")
    text = decompose(tmp_path / "base", tmp_path / "out", "--rank", "4", "--niter", niter,
                     "--seed", "3")
    assert f"14 matrices at rank 4 in {tmp_path}/out/pissa_init train them:" in joined(text)
    assert contents(tmp_path / "base") == before
    theirs = theirs_of(tmp_path / "out", is_trainable=True)
    assert_logits_equal(theirs(tokens).logits, net(tokens), 1e-5)
    residual = model.load(tmp_path / "out", "cpu", torch.float32)
    assert (residual(tokens) - net(tokens)).abs().max() > 0.1 * net(tokens).abs().max()
    ours = adapter.load(residual, tmp_path / "out" / "pissa_init")
    assert_logits_equal(ours(tokens), net(tokens), 1e-5)
    fresh = pissa.inject(copy.deepcopy(net), 4, "pissa", seed=3, progress=False,
                         niter=None if niter == "exact" else int(niter))
    for (_, a), (_, b) in zip(pissa.layers(ours), pissa.layers(fresh), strict=True):
        assert torch.equal(a.frozen, b.frozen) and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
    for _, m in pissa.layers(ours):
        m.A.requires_grad_(), m.B.requires_grad_()
    losses = [torch.tensor(optimise(x, tokens, 4, 1e-3)[0]) for x in (ours, fresh, theirs)]
    assert torch.equal(losses[0], losses[1])
    assert torch.allclose(losses[0], losses[2], rtol=1e-4) and losses[0][3] < losses[0][0]


def test_peft_converts_what_it_trained(tmp_path, tokens):
    """To a LoRA on the untouched base, which needs pissa_init: PEFT's own way."""
    net = small_net()
    write(tmp_path / "base", net)
    decompose(tmp_path / "base", tmp_path / "out", "--rank", "4")
    theirs = theirs_of(tmp_path / "out", is_trainable=True)
    optimise(theirs, tokens, 3, 1e-3)
    theirs.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(
        tmp_path / "out" / "pissa_init"))
    ours = adapter.load(net, tmp_path / "lora")
    assert_logits_equal(ours(tokens), theirs(tokens).logits, 1e-5)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_four_bits(tmp_path, tokens, dtype):
    """bitsandbytes makes our codes of what is written; so do we, and train from there."""
    functional = pytest.importorskip("bitsandbytes").functional
    net = small_net(dim=64, ffn_dim=192, n_heads=4, n_kv_heads=4, head_dim=16)
    write(tmp_path / "base", net)
    out = tmp_path / "out"
    decompose(tmp_path / "base", out, "--rank", "4", "--method", "qpissa",
              *(["--dtype", dtype] if dtype else []))
    net = net.to(getattr(torch, dtype or "float32"))                # of what Q is made
    fresh = pissa.inject(copy.deepcopy(net), 4, "qpissa", double_quant=False, progress=False)
    written = model.load(out, "cpu", torch.float32)
    for name, m in pissa.layers(fresh):
        W = written.get_submodule(name).weight
        with torch.compiler.set_stance("force_eager"):
            codes, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
        assert torch.equal(codes.flatten(), m.frozen.codes.flatten())
        absmax = m.frozen.absmax.flatten()
        if dtype:
            assert torch.allclose(state.absmax, absmax, rtol=2**-8)
        else:
            assert torch.equal(state.absmax, absmax) and torch.equal(W, m.frozen.dequantize())
    theirs = theirs_of(out, is_trainable=True)
    tolerance = 1e-2 if dtype else 1e-5
    assert_logits_equal(theirs(tokens).logits, fresh.float()(tokens), tolerance)
    ours = adapter.load(written, out / "pissa_init")
    assert all(isinstance(m.frozen, nf4.NF4) for _, m in pissa.layers(ours))
    assert_logits_equal(ours(tokens), theirs(tokens).logits, tolerance)


def test_source_dtype_and_metas_layout(tmp_path, tokens):
    """The embedded model, in bfloat16: what `inject` makes of it; twice, the same bytes."""
    pytest.importorskip("google.protobuf")
    for name in "a", "b":
        decompose("tiny", tmp_path / name, "--rank", "4", "--targets", "q_proj,down_proj")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    fresh = pissa.inject(model.load("tiny", "cpu", torch.bfloat16), 4, targets=("q_proj",
                         "down_proj"), progress=False)
    ours = adapter.load(model.load(tmp_path / "a", "cpu", torch.bfloat16),
                        tmp_path / "a" / "pissa_init")
    assert torch.equal(ours(tokens), fresh(tokens))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "a")("x")["input_ids"]
    config = json.loads((tmp_path / "a" / "pissa_init" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == config["lora_alpha"] == 4
    assert config["target_modules"] == ["down_proj", "q_proj"]
    with pytest.raises(ValueError, match="was made on another base model"):
        adapter.load(model.load("tiny", "cpu", torch.bfloat16), tmp_path / "a" / "pissa_init")


@pytest.mark.parametrize("argv, message", [
    (["--rank", "49"], "rank 49 is not between 1 and 48"), (["--rank", "0"], "--rank must be at"),
    (["--targets", "x_proj"], "no module is called x_proj"),
    (["--targets", "lm_head", "--rank", "4"], "lm_head is the embedding, which has no residual"),
    (["--niter", "-1"], "--niter must be at least 0"), (["--seed", "-1"], "--seed must be at leas"),
    (["--device", "nowhere"], "nowhere is not available here")])
def test_refused(tmp_path, argv, message):
    write(tmp_path / "base", small_net(tied=True))
    text = failure("convert.py", "decompose", tmp_path / "base", tmp_path / "out", *argv)
    assert message in text and not (tmp_path / "out").exists()


def test_what_fails_leaves_nothing(tmp_path, monkeypatch):
    net = small_net()
    net.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    write(tmp_path / "base", net)
    text = failure("convert.py", "decompose", tmp_path / "base", tmp_path / "out", "--rank", "4")
    assert "layers.1.mlp.up_proj: the weight holds NaN or Inf" in text
    net = small_net()
    write(tmp_path / "base", net)

    def full(*rest):
        raise OSError("No space left on device")

    monkeypatch.setattr(adapter, "write", full)
    text = failure("convert.py", "decompose", tmp_path / "base", tmp_path / "out", "--rank", "4")
    assert "No space left" in text
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("precious")
    assert "is not empty" in failure("convert.py", "decompose", TINY, tmp_path / "out")


def test_a_run_is_measured_with_its_adapter(tmp_path):
    """Before it trains, the loss is that of W_res + A B, not of the residual alone."""
    path, losses = first_lines(tmp_path, 8), []
    decompose("tiny", tmp_path / "made", "--rank", 8, "--niter", 1)
    for base in (["tiny", "--method", "lora"],
                 [tmp_path / "made", "--adapter", tmp_path / "made" / "pissa_init"]):
        out = tmp_path / str(len(losses))
        command(train.main, "--ckpt", *base, "--data", path, "--steps", 1, "--batch", 2,
                "--max-new-tokens", 2, "--out", out)
        losses.append(json.loads((out / "summary.json").read_text())["before"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
