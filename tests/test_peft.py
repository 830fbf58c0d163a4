"""formats/peft.py: what PEFT and other programs save beside the two matrices of a LoRA."""
import copy
import re

import pytest
import torch

import adapter
import convert
import model
import pissa
from conftest import assert_logits_equal, command, failure, hugging_face, small_net
from formats import hf

pytest.importorskip("transformers"), pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = [pytest.mark.long,       # only ./check leaves these out
              pytest.mark.filterwarnings("ignore:Setting .save_embedding|Model has .tie_word")]


def write(folder, net):
    """A checkpoint in Hugging Face's layout."""
    hf.save_folder(folder, hf.config_json(vars(net.config), torch.float32), net.named_parameters())


def theirs_saved(net, folder, resize=None, **options):
    """PEFT's model of `net`, adapted, changed as if trained, and saved; its base is in folder/base.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    hugging_face(net).save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if resize:
        base.resize_token_embeddings(resize)
    torch.manual_seed(0)
    trained = peft.get_peft_model(base, peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options})).eval()
    trained.save_pretrained(folder)
    return trained


@pytest.mark.parametrize("how", ["head", "head and alpha", "raw keys", "bias", "same embedding"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_peft_saves_beside_the_lora(tmp_path, tokens, how, tied):
    """Copies of the base's parameters are compared with it. Its own reader gives the same."""
    theirs, net = pytest.importorskip("peft"), small_net(tied=tied)
    options = {"head": dict(target_modules=["q_proj", "lm_head"]),
               "head and alpha": dict(target_modules=["q_proj", "lm_head", "up_proj"],
                                      alpha_pattern={"lm_head": 3, "1.mlp.up_proj": 5},
                                      rank_pattern={"q_proj": 3}),
               "bias": dict(bias="lora_only")}.get(how, {})
    if how == "same embedding" and tied:
        pytest.skip("one tensor, which safetensors writes once")
    trained = theirs_saved(net, tmp_path, **options)
    if how == "same embedding":
        trained.save_pretrained(tmp_path, save_embedding_layers=True)
    path = tmp_path / "adapter_model.safetensors"
    if how == "raw keys":                                       # as state_dict() has them
        save_file({k.replace(".weight", ".default.weight"): M for k, M in load_file(path).items()},
                  path)
    assert any("base_layer" in k or "embed" in k for k in load_file(path)) == (
        how.startswith(("head", "same")))
    expected = trained(tokens).logits
    assert_logits_equal(adapter.load(copy.deepcopy(net), tmp_path)(tokens), expected)
    write(tmp_path / "ours", net)
    command(convert.main, "merge", tmp_path, tmp_path / "merged", "--ckpt", tmp_path / "ours")
    assert_logits_equal(model.load(tmp_path / "merged", "cpu")(tokens), expected)
    ours = adapter.load(net, tmp_path)                          # and back again
    adapter.save(ours, tmp_path / "again")
    base = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32)
    again = theirs.PeftModel.from_pretrained(base, tmp_path / "again")
    assert_logits_equal(again(tokens).logits, expected)


@pytest.mark.parametrize("how, message", [
    ("resized", "lm_head.weight has 105 rows, the model's has 101; an adapter here is a LoRA"),
    ("modules_to_save", "modules_to_save=['lm_head'] trained whole matrices; an adapter here is a"),
    ("embedding", "model.embed_tokens.weight is not the model's: it was trained, too"),
    ("bias", "model.layers.1.self_attn.q_proj.bias is not the model's: it was trained"),
    ("head", "lm_head.weight is not the model's: it was trained, too, or on another base; an adap"),
    ("no bias", "the model has no model.layers.0.self_attn.q_proj.bias")])
def test_what_peft_trained_besides_is_refused(tmp_path, how, message):
    """In one line, with the reason and what to do, by `load` and by merge."""
    net = small_net(qkv_bias=how == "bias")
    for name, p in net.named_parameters():
        p.mul_(not name.endswith("bias"))
    options = {"resized": dict(resize=105), "modules_to_save": dict(modules_to_save=["lm_head"]),
               "head": dict(target_modules=["lm_head"])}.get(how, {})
    trained = theirs_saved(small_net(), tmp_path, **options)
    path = tmp_path / "adapter_model.safetensors"
    if how == "head":                     # one number, which is not among the 256 that are sampled
        state = load_file(path)
        state["base_model.model.lm_head.base_layer.weight"][5, 8] += 1e-3
        save_file(state, path)
    if how == "embedding":
        trained.get_input_embeddings().weight.data[77] += 1e-3              # one row of it
        trained.save_pretrained(tmp_path, save_embedding_layers=True)
    if how.endswith("bias"):
        name = "base_model.model.model.layers.%d.self_attn.q_proj.base_layer.bias"
        save_file({**load_file(path), name % 0: torch.zeros(48), name % 1: torch.ones(48)}, path)
    write(tmp_path / "ours", net)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        adapter.load(net, tmp_path)
    assert "\n" not in str(e.value) and not pissa.layers(net)
    text = failure("convert.py", "merge", tmp_path, tmp_path / "new", "--ckpt", tmp_path / "ours")
    assert message in text
