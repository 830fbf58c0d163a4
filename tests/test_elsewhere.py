"""Adapters of every model family through PEFT, and pissa.py on other people's modules."""
import copy

import pytest
import torch

import adapter
import model
import pissa
from conftest import assert_logits_equal
from test_hf import draw, twin

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.filterwarnings("ignore:Unexpected keyword arguments ..pissa"),
              pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers")]
ADAPTED = ["llama2-gqa", "llama3.1", "llama3.2", "mistral", "mistral-nemo", "qwen2", "qwen2-tied"]


def train(net, loss, steps=3, lr=1e-2):
    """A few steps of somebody else's loop: AdamW on whatever requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=ADAPTED)
def pair(request, tmp_path):
    """(transformers' model, ours, read from the same folder)."""
    theirs = twin(request.param)
    theirs.save_pretrained(tmp_path / "base")
    return theirs, model.load(tmp_path / "base", "cpu", torch.float32).requires_grad_(False)


@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_peft_loads_ours(pair, tmp_path, method):
    theirs, ours = pair
    tokens = draw(2, 30)
    before = theirs(tokens).logits
    pissa.inject(ours, 4, method, progress=False, keep_base=True)
    assert_logits_equal(ours(tokens), before)
    train(ours, lambda: ours(tokens).square().mean())
    adapter.save(ours, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    assert_logits_equal(adapted(tokens).logits, ours(tokens))
    with adapted.disable_adapter(), pissa.disabled(ours):
        assert_logits_equal(adapted(tokens).logits, ours(tokens))
    assert (ours(tokens) - before).abs().max() > 0.01 * before.abs().max()       # it has learnt


def test_ours_loads_peft(pair, tmp_path):
    theirs, ours = pair
    tokens = draw(2, 30)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"],
                             task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(theirs, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    adapter.load(ours, tmp_path / "adapter")
    assert_logits_equal(ours(tokens), adapted(tokens).logits)


@pytest.mark.parametrize("options, message", [
    (dict(modules_to_save=["lm_head"]), "adapter_config.json: modules_to_save=.*whole matrices"),
    (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens.* is not a LoRA matrix of"),
    (dict(bias="all"), "layers.0.self_attn.k_proj.bias is not the model's: it was trained, too"),
    (dict(bias="lora_only"), "layers.0.self_attn.q_proj.bias is not the model's: it was trained"),
    (dict(use_dora=True), "use_dora is not supported")])
def test_more_than_a_lora_is_refused(tmp_path, options, message):
    """Tensors that were trained beside the LoRA are never dropped silently."""
    theirs = twin("qwen2")
    theirs.save_pretrained(tmp_path / "base")
    ours = model.load(tmp_path / "base", "cpu", torch.float32)
    config = peft.LoraConfig(r=4, **{"target_modules": ["q_proj"], **options})
    theirs = peft.get_peft_model(theirs, config)
    for name, p in theirs.named_parameters():
        p.data += p.requires_grad * name.endswith("bias")
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        adapter.load(ours, tmp_path / "adapter")


# --- networks of others: (network, its call -> tensor, targets)

def bert():
    config = transformers.BertConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                                     num_attention_heads=4, vocab_size=101)
    net = transformers.BertModel(config).eval()
    return net, lambda net: net(draw(2, 9)).last_hidden_state, ("query", "key", "value", "dense")


def vit():
    config = transformers.ViTConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                                    num_attention_heads=4, image_size=16, patch_size=4)
    net, image = transformers.ViTModel(config).eval(), torch.linspace(-1, 1, 768).view(1, 3, 16, 16)
    names = {n.rpartition(".")[2] for n, m in net.named_modules() if type(m) is torch.nn.Linear}
    return net, lambda net: net(image).last_hidden_state, sorted(names)


def causal(family):
    return lambda: (twin(family), lambda net: net(draw(2, 9)).logits, pissa.TARGETS)


@pytest.mark.parametrize("build", [causal("llama3.1"), causal("qwen2"), bert, vit],
                         ids=["llama", "qwen2", "bert", "vit"])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_other_peoples_modules(tmp_path, build, method):
    """Equal at step 0, trained by any loop, off is the base, saved and loaded, read by PEFT."""
    torch.manual_seed(0)
    net, call, targets = build()
    base = copy.deepcopy(net)
    before = call(net).detach()
    pissa.inject(net, 4, method, targets, progress=False, keep_base=True)
    assert_logits_equal(call(net).detach(), before)
    trained = {n.rpartition(".")[2] for n, p in net.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}
    train(net, lambda: call(net)[..., :7].square().mean())
    after = call(net).detach()
    assert (after - before).abs().max() > 1e-3 * before.abs().max()
    adapter.save(net, tmp_path)
    again = adapter.load(copy.deepcopy(base), tmp_path)
    assert_logits_equal(call(again).detach(), after, rel=1e-5)
    assert_logits_equal(call(pissa.merge(copy.deepcopy(net))).detach(), after)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert_logits_equal(call(theirs.base_model.model).detach(), after)
    with pissa.disabled(net):
        assert torch.equal(call(net).detach(), call(base).detach())


def test_conv1d_is_refused_by_name():
    net = transformers.GPT2Model(transformers.GPT2Config(n_embd=48, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="h.0.attn.c_attn is a Conv1D, not an nn.Linear"):
        pissa.inject(net, 4, targets=("c_attn",), progress=False)
    with pytest.raises(ValueError, match="no module is called q_proj; the linear layers here are"):
        pissa.inject(net, 4, targets=("q_proj",), progress=False)


def test_multihead_attention_is_refused_by_name():
    """It reads out_proj.weight itself: a module in its place would never be called."""
    net = torch.nn.TransformerEncoderLayer(48, 4, 80)
    with pytest.raises(ValueError, match="self_attn.out_proj is a NonDynamicallyQuantizableLinear"):
        pissa.inject(net, 4, targets=("out_proj",), progress=False)


def test_torch_encoder_is_refused_by_name():
    """In eval mode its fast path hands linear1.weight, the residual alone, to one fused kernel."""
    layer = torch.nn.TransformerEncoderLayer(48, 4, 80, batch_first=True)
    net = torch.nn.TransformerEncoder(layer, 2)
    with pytest.raises(ValueError, match="layers.0.linear1 is part of an nn.TransformerEncoderLay"):
        pissa.inject(net, 4, targets=("linear1", "linear2"), progress=False)


# --- what a Trainer writes

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the folder of a Trainer's checkpoint, the injected network it is of, its base)."""
    folder, base = tmp_path_factory.mktemp("trainer"), twin("llama2-gqa")
    net = pissa.inject(copy.deepcopy(base), 4, progress=False)
    rows = [{"input_ids": row, "labels": row} for row in draw(4, 9)]
    arguments = transformers.TrainingArguments(str(folder), max_steps=2, learning_rate=1e-2,
                                               save_steps=1, use_cpu=True, report_to=[],
                                               disable_tqdm=True)
    trainer = transformers.Trainer(net, arguments, train_dataset=rows)
    trainer.train()
    return folder / "checkpoint-2", net, base


def test_a_trainers_checkpoint_is_no_model(checkpoint):
    """Nothing can take W_res, or weights that are drawn anew, for the model that was trained."""
    folder, net, base = checkpoint
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="checkpoint-2: .* tensor"):
        model.load(folder, "cpu")
    for strict in True, False:                   # torch itself draws nothing anew, and says nothing
        with pytest.raises(RuntimeError, match="size mismatch"):
            base.load_state_dict(net.state_dict(), strict=strict)


@pytest.mark.parametrize("assign", [False, True])
def test_a_trainers_checkpoint_goes_on(checkpoint, assign):
    """An injected network takes it, as `resume_from_checkpoint` does, and merges to a model."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder, net, base = checkpoint
    tokens, again = draw(2, 9), pissa.inject(copy.deepcopy(base), 4, seed=1, progress=False)
    again.load_state_dict(safetensors.load_file(folder / "model.safetensors"), strict=True,
                          assign=assign)
    assert torch.equal(again(tokens).logits, net(tokens).logits)
    pissa.merge(again).save_pretrained(folder / "merged")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert_logits_equal(plain(tokens).logits, net(tokens).logits)
    assert (net(tokens).logits - base(tokens).logits).abs().max() > 0.01
