"""formats/hf.py against transformers: every family, both spellings of the config, odd files."""
import copy
import json
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch

import adapter
import convert
import fast
import model
import pissa
from conftest import TINY, assert_logits_equal, command, joined, optimise
from formats import hf, meta_write
from formats.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

pytestmark = pytest.mark.long       # only ./check leaves these out

SMALL = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
             vocab_size=101, rms_norm_eps=1e-6, initializer_range=0.2)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
FAMILIES = {
    "llama1": ("Llama", dict(num_key_value_heads=6, max_position_embeddings=64)),
    "llama2-gqa": ("Llama", dict(num_key_value_heads=2, max_position_embeddings=64)),
    "llama3": ("Llama", dict(num_key_value_heads=2, rope_theta=5e5)),
    "llama3.1": ("Llama", dict(num_key_value_heads=2, rope_theta=100.0, rope_scaling=LLAMA3)),
    "llama3.2": ("Llama", dict(num_key_value_heads=2, rope_theta=100.0, tie_word_embeddings=True,
                               rope_scaling={**LLAMA3, "factor": 32.0})),
    "linear": ("Llama", dict(num_key_value_heads=6,
                             rope_scaling={"rope_type": "linear", "factor": 4.0})),
    "head_dim": ("Llama", dict(num_key_value_heads=3, head_dim=10)),
    "mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=7)),
    "mistral-v0.2": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, rope_theta=1e6)),
    "mistral-nemo": ("Mistral", dict(num_key_value_heads=2, sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, rope_theta=1e6)),
    "qwen2-tied": ("Qwen2", dict(num_key_value_heads=3, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16, rope_theta=1e6)),
    "qwen3-tied": ("Qwen3", dict(num_key_value_heads=3, head_dim=8, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(num_key_value_heads=2, num_hidden_layers=5,
                                tie_word_embeddings=True, rope_theta=100.0)),
    "gemma": ("Gemma", dict(num_key_value_heads=1, head_dim=16)),
    "biases": ("Llama", dict(num_key_value_heads=2, attention_bias=True)),
    "qwen3-biases": ("Qwen3", dict(num_key_value_heads=2, head_dim=8, attention_bias=True)),
}


def twin(family, **changes):
    """A random transformers model of a family, its biases and norms drawn as well."""
    name, options = FAMILIES[family]
    torch.manual_seed(3)
    options = {**SMALL, **copy.deepcopy(options), **changes}
    config = getattr(transformers, f"{name}Config")(**options, bos_token_id=1, eos_token_id=2,
                                                      pad_token_id=0)
    net = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for n, p in net.named_parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float("norm" in n and name != "Gemma"), std=0.3)
    return net.requires_grad_(False)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request, tmp_path_factory):
    """(transformers' model, ours read from the folder that theirs wrote)."""
    folder, theirs = tmp_path_factory.mktemp(request.param), twin(request.param)
    theirs.save_pretrained(folder)
    return theirs, model.load(folder, "cpu", torch.float32).requires_grad_(False)


def draw(*shape, seed=0):
    return torch.randint(3, 101, shape, generator=torch.Generator().manual_seed(seed))


# What makes a family another one.
OTHERS = {
    "gemma": [lambda net: setattr(net.config, "embed_scale", 7.0),
              lambda net: [setattr(m.mlp, "gelu", False) for m in net.model.layers]],
    "qwen3": [lambda net: net.model.layers[1].self_attn.k_norm.weight.mul_(1.1)],
    "smollm3": [lambda net: setattr(net.model.layers[3].self_attn, "has_rope", True)]}


def test_logits(pair):
    """50 tokens: longer than the scaled RoPEs' 16 original positions and Mistral's window of 7."""
    theirs, ours = pair
    tokens = draw(3, 50)
    assert_logits_equal(ours(tokens), theirs(tokens).logits)


def test_logits_can_fail(pair):
    """Other numbers in the config give other logits: what the test above relies on."""
    theirs, ours = pair
    wrong = copy.deepcopy(ours)
    wrong.config.rope_theta *= 1.5
    tokens = draw(3, 50)
    for change in OTHERS.get(theirs.config.model_type, ()):
        other = copy.deepcopy(ours)
        change(other)
        with pytest.raises(AssertionError, match="logits differ"):
            assert_logits_equal(other(tokens), theirs(tokens).logits)
    with pytest.raises(AssertionError, match="logits differ"):
        assert_logits_equal(wrong(tokens), theirs(tokens).logits)
    if ours.config.rope_scaling or ours.config.sliding_window:
        wrong.config.rope_theta, wrong.config.rope_scaling = ours.config.rope_theta, None
        wrong.config.sliding_window = 0
        with pytest.raises(AssertionError, match="logits differ"):
            assert_logits_equal(wrong(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("cuts", [(50,), (1,) * 50, (20, 1, 1, 9, 19), (3, 47)],
                         ids=["whole", "singly", "mixed", "two"])
def test_logits_with_cache(pair, cuts):
    """In pieces of any size, written to a cache, the start given as an int or as a tensor."""
    theirs, ours = pair
    tokens = draw(2, 50, seed=1)
    expected = theirs(tokens).logits
    for kind in (int, lambda n: torch.tensor([n])):
        cache, start, pieces = ours.new_cache(2, 50), 0, []
        for piece in tokens.split(cuts, 1):
            pieces.append(ours(piece, cache=cache, start=kind(start)))
            start += piece.shape[1]
        assert_logits_equal(torch.cat(pieces, 1), expected)


def test_left_padding(pair):
    """Every row of a left-padded batch as if it stood alone, with cache and without."""
    theirs, ours = pair
    rows = [draw(1, n, seed=n) for n in (40, 23, 1)]
    pad = torch.tensor([40 - r.shape[1] for r in rows])
    batch = torch.cat([torch.cat([draw(1, 40 - r.shape[1], seed=9), r], 1) for r in rows])
    expected = [theirs(r).logits[0] for r in rows]
    attention = torch.arange(40) >= pad[:, None]
    theirs_padded = theirs(batch, attention_mask=attention.long(),
                           position_ids=(attention.cumsum(1) - 1).clamp(min=0)).logits
    cache = ours.new_cache(3, 40)
    first = ours(batch[:, :25], cache=cache, pad=pad)
    last = ours(batch[:, 25:], cache=cache, start=25, pad=pad)
    for logits in (ours(batch, pad=pad), torch.cat([first, last], 1)):
        for b, p in enumerate(pad):
            assert_logits_equal(logits[b, p:], expected[b])
            assert_logits_equal(logits[b, p:], theirs_padded[b, p:])


def test_packed(pair):
    """Texts packed into one row, each as if it stood alone."""
    theirs, ours = pair
    lengths, batch = [30, 7, 19], draw(3, 30, seed=5)
    where = torch.cat([torch.arange(n) + 30 * b for b, n in enumerate(lengths)])
    logits = ours(batch, where_text=where)[0].split(lengths)
    for row, n, found in zip(batch, lengths, logits, strict=True):
        assert_logits_equal(found, theirs(row[None, :n]).logits[0])


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments ..pissa")
def test_adapted_in_peft(pair, tmp_path):
    """Injected, trained with the fast forms and the plain ones, saved: PEFT has the same logits."""
    peft = pytest.importorskip("peft")
    (theirs, base), tokens, found = pair, draw(2, 30, seed=6), []
    for plain in fast.off, nullcontext:
        ours = pissa.inject(copy.deepcopy(base), 4, progress=False)
        with plain():
            losses, _ = optimise(ours, tokens, 3, lr=1e-3)
        found.append(torch.tensor(losses))
    assert torch.allclose(*found, rtol=1e-5) and found[0][2] < found[0][0]
    adapter.save(ours, tmp_path)
    adapted, after = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path), ours(tokens)
    assert_logits_equal(adapted(tokens).logits, after)
    assert (after - base(tokens)).abs().max() > 1e-2 * after.abs().max()


def test_right_padding(pair):
    """As in training: what stands to the right of a token cannot change it."""
    theirs, ours = pair
    row, batch = draw(1, 30), draw(2, 45, seed=4)
    batch[0, :30] = row[0]
    assert_logits_equal(ours(batch)[0, :30], theirs(row).logits[0])


def test_greedy_generation(pair):
    """transformers' own greedy tokens, prompts of different lengths in one batch."""
    theirs, ours = pair
    prompts = [draw(n, seed=n).tolist() for n in (3, 17, 9)]
    out = model.generate(ours, prompts, 20)
    for prompt, new in zip(prompts, out):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False,
                                   eos_token_id=None, pad_token_id=0,
                                   attention_mask=torch.ones(1, len(prompt)))
        assert new == expected[0, len(prompt):].tolist()


def test_round_trip(pair, tmp_path):
    """What `save_folder` writes from our Config, transformers reads as the same model."""
    theirs, ours = pair
    config = hf.config_json(vars(ours.config), torch.float32)
    hf.save_folder(tmp_path, config, ours.named_parameters(), shard_bytes=40_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    if "Mistral" not in type(theirs).__name__ or ours.config.sliding_window:
        assert type(again) is type(theirs)             # without a window a Mistral is a Llama
    tokens = draw(2, 50)
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    ours_again = model.load(tmp_path, "cpu", torch.float32)
    assert ours_again.config == ours.config
    assert torch.equal(ours_again(tokens), ours(tokens))


@pytest.mark.parametrize("family", ["qwen3", "smollm3", "gemma", "biases", "mistral"])
def test_merged(tmp_path, family):
    """transformers computes the adapted network; what was not adapted keeps every bit."""
    from safetensors.torch import load_file
    theirs = twin(family).bfloat16()
    theirs.save_pretrained(tmp_path / "base")
    ours, tokens = model.load(tmp_path / "base", "cpu", torch.float32), draw(2, 30)
    pissa.inject(ours, 4, targets=("q_proj", "down_proj"), progress=False)
    optimise(ours, tokens, 2, lr=1e-3)
    adapter.save(ours, tmp_path / "adapter")
    for dtype in "source", "float32":
        command(convert.main, "merge", tmp_path / "adapter", tmp_path / dtype, "--ckpt",
                tmp_path / "base", "--dtype", dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32")
    assert_logits_equal(again(tokens).logits, ours(tokens))
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("base", "source"))
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    for name, W in after.items():
        same = not name.endswith(("q_proj.weight", "down_proj.weight"))
        assert torch.equal(W, before[name]) == same and W.dtype == torch.bfloat16, name


@pytest.mark.parametrize("family, what", [
    ("qwen3-tied", "norms of q and k"), ("smollm3", "layers without RoPE"), ("biases", "biases"),
    ("gemma", "heads of this width")])
def test_metas_layout_has_no_place_for_them(tmp_path, family, what):
    twin(family).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=f"no place for {what}: write Hugging Face's"):
        meta_write.save(model.load(tmp_path / "in", "cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the two spellings of a config, and what a config may not say

@pytest.fixture
def folder(tmp_path):
    twin("llama3.1").save_pretrained(tmp_path)
    return tmp_path


def change(folder, **changes):
    """Rewrite config.json; a value of ... removes the key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def read_config(folder):
    """The Config of a folder."""
    return model.Config(**hf.read_config(folder / "config.json"))


def test_flat_spelling(folder):
    """rope_theta and rope_scaling as transformers 4 wrote them, or rope_parameters: one Config."""
    nested = read_config(folder)
    change(folder, rope_parameters=..., rope_theta=100.0, rope_scaling=LLAMA3)
    assert read_config(folder) == nested
    assert nested.rope_theta == 100.0 and nested.rope_scaling == LLAMA3
    change(folder, rope_scaling={"type": "linear", "factor": 2})        # the oldest spelling
    assert read_config(folder).rope_scaling == {"rope_type": "linear", "factor": 2}
    change(folder, rope_scaling=None, rope_theta=...)
    c = read_config(folder)
    assert (c.rope_theta, c.rope_scaling) == (10000.0, None)


def test_llama1_config_is_enough(folder):
    """The first conversions state no key/value heads, no RoPE, no tie; unknown keys do no harm."""
    change(folder, num_key_value_heads=..., rope_parameters=..., tie_word_embeddings=...,
           head_dim=..., max_position_embeddings=..., my_note="hello", max_sequence_length=2048)
    c = read_config(folder)
    assert (c.n_kv_heads, c.rope_theta, c.tied, c.head_dim, c.max_seq_len) == (6, 1e4, False, 8, 0)


# Keys of config.json as they stand in the folders of real models, besides the numbers.
COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "torch_dtype": "bfloat16",
          "transformers_version": "4.40.0", "use_cache": True, "hidden_act": "silu"}
LLAMA = {**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False,
         "attention_bias": False, "pretraining_tp": 1, "bos_token_id": 128000}
QWEN = {**COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}
REAL = {
    "llama2": {**LLAMA, "_name_or_path": "meta-llama/Llama-2-7b-hf", "rope_scaling": None},
    "llama3.1": {**LLAMA, "eos_token_id": [128001, 128008, 128009], "rope_scaling": LLAMA3},
    "tinyllama": {**LLAMA, "rope_scaling": None, "max_position_embeddings": 2048},
    "smollm2": {**LLAMA, "is_llama_config": True, "rope_interleaved": False, "pad_token_id": 2,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    "vicuna": {**LLAMA, "max_sequence_length": 2048, "pad_token_id": 0, "temperature": 0.9,
               "do_sample": True, "_attn_implementation_autoset": True, "unsloth_version": "2025"},
    "mistral": {**COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
                "sliding_window": 4096},
    "qwen2": QWEN, "qwen2.5": {**QWEN, "use_mrope": False, "tie_word_embeddings": True},
    **{name: getattr(transformers, f"{name}Config") for name in ("Llama", "Mistral", "Qwen2")}}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_need_no_note(name, tmp_path, capsys):
    numbers = dict(hidden_size=64, intermediate_size=80, num_hidden_layers=2, vocab_size=101,
                   num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6)
    found = REAL[name] if type(REAL[name]) is dict else REAL[name](**numbers).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**numbers, **found}))
    assert hf.read_config(tmp_path / "config.json")["dim"] == 64
    assert capsys.readouterr() == ("", "")


def test_keys_without_effect_are_named(folder, capsys):
    for path, value in ("attention_dropout", 0.1), ("fancy_attention", {"a": 1}), ("auto_map", "x"):
        change(folder, **{"attention_dropout": 0.0, "fancy_attention": None, path: value})
        assert read_config(folder)
        err, shown = capsys.readouterr().err, json.dumps(value)
        assert f"{folder}/config.json: without effect here: {path} = {shown}" in joined(err)
        assert err.count("note:") == 1
        assert read_config(folder) and capsys.readouterr().err == ""             # said once
        change(folder, **{path: ...})


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="gpt2"), 'model_type is "gpt2"; what works here is llama, mistral, qwen2'),
    (dict(model_type="mixtral"), 'model_type is "mixtral"'),
    (dict(hidden_act="gelu"), 'hidden_act is "gelu", which this network does not compute'),
    (dict(attention_bias=True), r"8 missing tensor\(s\), first model.layers.0.self_attn.k_proj.b"),
    (dict(attention_bias=3), "attention_bias is 3, which"),
    (dict(model_type="smollm3", no_rope_layers=[1, 0, 1]), r"no_rope_layers is \[1, 0, 1\]; every"),
    (dict(model_type="smollm3", no_rope_layers=[0, 1]), r"no_rope_layers is \[0, 1\]; every"),
    (dict(model_type="smollm3", no_rope_layers="x"), "no_rope_layers is \"x\"; every"),
    (dict(model_type="smollm3", no_rope_layer_interval=0), "no_rope_layer_interval is missing or"),
    (dict(model_type="smollm3", num_hidden_layers=2**40), "num_hidden_layers is missing or not"),
    (dict(no_rope_layers=[1, 1]), "no_rope_layers is"),
    (dict(model_type="gemma", hidden_act="relu"), "hidden_act is \"relu\", which"),
    (dict(model_type="gemma", hidden_activation="gelu"), "hidden_activation is \"gelu\", which"),
    (dict(model_type="gemma", use_bidirectional_attention=True), "use_bidirectional_attention is"),
    (dict(model_type="qwen3"), r"4 missing tensor\(s\), first model.layers.0.self_attn.k_norm.w"),
    (dict(model_type="gemma2"), 'model_type is "gemma2"; what works here is llama, mistral, qwen2, '
     "qwen3, smollm3, gemma"),
    (dict(mlp_bias=True), "mlp_bias is true, which"),
    (dict(is_causal=False), "is_causal is false, which"),
    (dict(num_attention_heads=2**29, head_dim=2**29, num_key_value_heads=2), "are too many"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, which"),
    (dict(logit_scale=0.1), "logit_scale is 0.1, which"),
    (dict(num_local_experts=8), "num_local_experts is 8, which"),
    (dict(quantization_config={"bits": 4}), 'quantization_config is {"bits": 4}, which'),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types is"),
    (dict(sliding_window=8), "sliding_window in a llama is not known"),
    (dict(rope_parameters=..., rope_scaling={"rope_type": "yarn", "factor": 2.0}),
     'RoPE of type "yarn" with factor is not known here; what works is default, linear, llama3'),
    (dict(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}), '"dynamic"'),
    (dict(rope_parameters=..., rope_scaling={"rope_type": "linear", "factor": 2.0, "beta": 1}),
     "linear.* with factor, beta"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_scaling .* rope_parameters"),
    (dict(rope_parameters=[1]), "are not understood"),
    (dict(rope_parameters={**LLAMA3, "rope_theta": 1e4, "factor": -1.0}), "factor is missing or"),
    (dict(rope_parameters={**LLAMA3, "rope_theta": "x"}), "rope_theta is missing or not a number"),
    (dict(hidden_size=...), "hidden_size is missing or not a whole number above 0: null"),
    (dict(rms_norm_eps=...), "rms_norm_eps is missing"),
    (dict(hidden_size="48"), "hidden_size is missing or not a whole number"),
    (dict(num_hidden_layers=10**9), "1000000000 layers, but only 21 tensors"),
    (dict(vocab_size=10**30), "vocab_size is missing or not a whole number above 0"),
    (dict(num_key_value_heads=4), "do not divide into heads"),
    (dict(head_dim=7), "do not divide into heads"),
    (dict(head_dim=4), r"q_proj.weight: expected floats of shape \(24, 48\), found float32"),
    (dict(tie_word_embeddings="yes"), "tie_word_embeddings is"),
    (dict(tie_word_embeddings=True), "lm_head.weight is not the embedding; correct config.json"),
    (dict(num_hidden_layers=1), r"9 unexpected tensor\(s\), first model.layers.1.input_layernorm"),
    (dict(num_hidden_layers=3), r"9 missing tensor\(s\), first model.layers.2"),
    (dict(vocab_size=100), r"embed_tokens.weight: expected floats of shape \(100, 48\)"),
    (dict(model_type="qwen2"), r"6 missing tensor\(s\), first model.layers.0.self_attn.k_proj.b")])
def test_refused_by_name(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(ValueError, match=message) as e:
        model.load(folder, "cpu")
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, '{"hidden_size": 1%s}' % (
    "0" * 5000)], ids=["list", "dict", "number"])
def test_json_that_is_no_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: not JSON") as e:
        model.load(tmp_path, "cpu")
    assert len(str(e.value)) < 300


def test_biases_that_the_config_denies(tmp_path):
    twin("biases").save_pretrained(tmp_path)
    change(tmp_path, attention_bias=False)
    with pytest.raises(ValueError, match=r"8 unexpected tensor\(s\), first .*k_proj.bias"):
        model.load(tmp_path, "cpu")


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_layers(tmp_path, family, listed):
    """A window that begins above the last layer is none. One that begins below is refused."""
    for first in 1, 2:
        theirs = twin(family, use_sliding_window=True, sliding_window=8, max_window_layers=first)
        theirs.save_pretrained(tmp_path)
        change(tmp_path, **({} if listed else {"layer_types": ...}))
        if first == 1:
            with pytest.raises(ValueError, match="layer_types is|use_sliding_window is true"):
                model.load(tmp_path, "cpu")
    tokens = draw(2, 30)
    assert_logits_equal(model.load(tmp_path, "cpu")(tokens), theirs(tokens).logits)


# --- Mistral's own files

def write_mistral(folder, theirs, **changes):
    """consolidated.safetensors and params.json, as Mistral publishes them."""
    from safetensors.torch import save_file
    c, state = theirs.config, {}
    for name, W in theirs.state_dict().items():
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(
            name.split(".")[-2])
        if heads:                              # of a pair, the rows stand side by side
            halves = W.view(heads, 2, -1, W.shape[1])
            W = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(W.shape)
        for a, b in (("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"),
                     ("model.", ""), ("self_attn.", "attention."), ("_proj", ""),
                     ("mlp.gate", "feed_forward.w1"), ("mlp.down", "feed_forward.w2"),
                     ("mlp.up", "feed_forward.w3"), ("input_layernorm", "attention_norm"),
                     ("post_attention_layernorm", "ffn_norm")):
            name = name.replace(a, b)
        for letter in "qkvo":
            name = name.replace(f"attention.{letter}.", f"attention.w{letter}.")
        state[name] = W.contiguous()
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "head_dim": c.head_dim,
              "hidden_dim": c.intermediate_size, "n_heads": c.num_attention_heads,
              "n_kv_heads": c.num_key_value_heads, "norm_eps": c.rms_norm_eps,
              "vocab_size": c.vocab_size, "rope_theta": c.rope_parameters["rope_theta"],
              "sliding_window": c.sliding_window, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(
        {k: v for k, v in params.items() if v is not ...}))
    save_file(state, folder / "consolidated.safetensors")


@pytest.mark.parametrize("family, changes", [
    ("mistral", {"rope_theta": ...}), ("mistral-v0.2", {"rope_theta": ..., "sliding_window": ...}),
    ("mistral-nemo", {})])
def test_mistrals_own_layout(tmp_path, family, changes):
    """What Mistral publishes, read, and written for transformers."""
    theirs = twin(family)
    write_mistral(tmp_path / "in", theirs, **changes)
    shutil.copy(TINY / "tokenizer.model", tmp_path / "in" / "tokenizer.model.v3")
    ours, tokens = model.load(tmp_path / "in", "cpu", torch.float32), draw(2, 50)
    assert_logits_equal(ours(tokens), theirs(tokens).logits)
    assert Tokenizer(tmp_path / "in").encode("Tom") == Tokenizer(TINY).encode("Tom")
    hf.save_folder(tmp_path / "out", hf.config_json(vars(ours.config), torch.float32),
                   ours.named_parameters())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_logits_equal(again(tokens).logits, theirs(tokens).logits)


def test_mistrals_own_layout_is_checked(tmp_path):
    write_mistral(tmp_path, twin("mistral-nemo"))
    path, params = tmp_path / "params.json", json.loads((tmp_path / "params.json").read_text())
    for changes, message in (
            ({"head_dim": 2}, "layers.0.attention.wq.weight: expected shape"),
            ({"head_dim": "16"}, "head_dim is missing or not a whole number"),
            ({"hidden_dim": 81}, "expected shape .*81"), ({"moe": {"num_experts": 8}}, "moe"),
            ({"sliding_window": [7, None]}, "sliding_window is missing or not a whole number")):
        path.write_text(json.dumps({**params, **changes}))
        with pytest.raises(ValueError, match=message):
            model.load(tmp_path, "cpu")
    path.write_text(json.dumps(params))
    ours = model.load(tmp_path, "cpu")
    with pytest.raises(ValueError, match="heads of this width: write Hugging Face's"):
        meta_write.save(ours, tmp_path / "out")
    (tmp_path / "consolidated.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="consolidated.safetensors: not a readable safetensors f"):
        model.load(tmp_path, "cpu")
    with pytest.raises(FileNotFoundError, match="tokenizer.model: no such file, and no tokenizer"):
        Tokenizer(tmp_path)
    (tmp_path / "tekken.json").touch()
    with pytest.raises(FileNotFoundError, match="tekken.json, Mistral's, is not read: tok"):
        Tokenizer(tmp_path)


# --- files

def weights(folder, net, suffix, shards):
    """Replace a folder's weights by .safetensors or .bin files."""
    from safetensors.torch import save_file
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    state = {n: W.contiguous() for n, W in net.state_dict().items() if n != "lm_head.weight"
             or not net.config.tie_word_embeddings}
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    save = save_file if suffix == "safetensors" else torch.save
    if shards == 1:
        return save(state, folder / name)
    stem, weight_map = name.split(".")[0], {}
    for i in range(shards):
        part = {n: state[n] for n in sorted(state)[i::shards]}
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["llama3.2", "qwen2"])
def test_every_kind_of_file(tmp_path, suffix, shards, family):
    theirs = twin(family)
    theirs.save_pretrained(tmp_path)
    weights(tmp_path, theirs, suffix, shards)
    ours, tokens = model.load(tmp_path, "cpu", torch.float32), draw(2, 20)
    assert_logits_equal(ours(tokens), theirs(tokens).logits)


def test_frequencies_in_the_file_are_passed_over(folder):
    """Llama 1's first conversions hold RoPE's frequencies as tensors, others its tables."""
    from safetensors.torch import load_file, save_file
    state = load_file(folder / "model.safetensors")
    before = model.load(folder, "cpu")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    state["model.rotary_emb.inv_freq"] = torch.ones(4)
    for name in "cos", "sin":
        state[f"model.layers.1.self_attn.rotary_emb.{name}_cached"] = torch.ones(1, 1, 9, 8)
    save_file(state, folder / "model.safetensors")
    after = model.load(folder, "cpu")
    assert all(map(torch.equal, after.state_dict().values(), before.state_dict().values()))


def test_damaged_files(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:5], b"", b"\xff" * 100,
                    (2**62).to_bytes(8, "little") + whole[8:]):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors: not readable, perhaps truncated"):
            model.load(folder, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        model.load(folder, "cpu")


@pytest.mark.parametrize("weight_map, message", [
    ({"model.norm.weight": "../model.safetensors"}, "should name a file of this folder"),
    ({"model.norm.weight": 3}, "should name a file of this folder"),
    ([], "should name a file of this folder"),
    ({"model.norm.weight": "model-1.safetensors"}, "model-1.safetensors is missing"),
    ({"other": "a.safetensors"}, "a.safetensors: other is missing, which model.safetensors.index")])
def test_wrong_index(folder, weight_map, message):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        model.load(folder, "cpu")


def test_missing_package(folder, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="needs the safetensors package: pip install safetensors"):
        model.load(folder, "cpu")
    with pytest.raises(ValueError, match="pip install safetensors"):
        hf.save_folder(folder, {}, [])


def test_interrupted_save_leaves_the_old_folder(folder):
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def tensors():
        yield "a", torch.ones(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save_folder(folder, {}, tensors(), shard_bytes=1)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_saving_replaces_what_was_there(folder):
    ours = model.load(folder, "cpu", torch.float32)
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00009.safetensors")
    hf.save_folder(folder, hf.config_json(vars(ours.config)), ours.named_parameters())
    assert sorted(f.name for f in folder.glob("model*")) == ["model.safetensors"]


# --- a real model

@pytest.fixture(scope="module")
def real(request):
    path = request.getfixturevalue("smollm2_path")
    return path, transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_smollm2(real):
    path, theirs = real
    ours = model.load(path, "cpu", torch.float32)
    tokens = torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert_logits_equal(ours(tokens), expected)
        for layer in ours.model.layers:           # Meta's order of rows: the classic mistake
            for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                proj.weight.data = model.reorder(proj.weight.data, "q_proj.weight", ours.config,
                                                 to_meta=True)
        with pytest.raises(AssertionError, match="logits differ"):
            assert_logits_equal(ours(tokens), expected)


PARAGRAPH = """It is a truth universally acknowledged, that a single man in possession of a good
fortune, must be in want of a wife. However little known the feelings or views of such a man may be
on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding
families, that he is considered as the rightful property of some one or other of their daughters."""


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments ..pissa")
def test_smollm2_from_an_adapter_to_everywhere(real, tmp_path):
    """Meta's layout, perplexity, PEFT, both merged layouts, the compressed adapter: one model."""
    import data
    import eval
    peft = pytest.importorskip("peft")
    path, theirs = real
    tok, tokens = data.Tokenizer(path), draw(1, 40, seed=2)
    ours = model.load(path, "cpu", torch.float32).requires_grad_(False)
    meta_write.save(ours, tmp_path / "meta")
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert_logits_equal(model.load(tmp_path / "meta", "cpu", torch.float32)(tokens), expected)
        ids = torch.tensor([[tok.start] + tok.encode(PARAGRAPH)])
        loss = theirs(ids, labels=ids).loss
        found, n, _ = eval.perplexity(ours, tok, PARAGRAPH)
        assert n == ids.shape[1] - 1 and found == pytest.approx(loss.exp().item(), rel=5e-5)

    pissa.inject(ours, 4, niter=2, targets=("q_proj", "down_proj"), progress=False)
    params = [p for p in ours.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    for _ in range(2):
        ours(tokens).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter.save(ours, tmp_path / "adapter")
    with torch.no_grad():
        after = ours(tokens)
        assert (after - expected).abs().max() > 0.05 * expected.abs().max()
        for layout in ("hf", "meta"):
            argv = ["convert.py", "merge", str(tmp_path / "adapter"), str(tmp_path / (layout * 2)),
                    "--ckpt", str(path), "--layout", layout, "--dtype", "float32"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", argv)
                convert.main()
            merged = model.load(tmp_path / (layout * 2), "cpu", torch.float32)
            assert_logits_equal(merged(tokens), after)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hfhf")
        assert_logits_equal(again(tokens).logits, after)
        errors = adapter.compress(tmp_path / "adapter", tmp_path / "small")
        assert all(lost <= whole for lost, whole in errors.values())
        small = adapter.load(model.load(path, "cpu", torch.float32), tmp_path / "small")
        share = max(lost / whole for lost, whole in errors.values())
        distance = (small(tokens) - after).norm() / (after - expected).norm()
        assert distance < 3 * share, (distance, share)
        adapted = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
        assert_logits_equal(adapted(tokens).logits, after)
