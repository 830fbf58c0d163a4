"""Hugging Face's layout: config.json + model.safetensors (or shards with an index, or .bin files).

Parameter names are ours already, and RoPE pairs stand half a head apart as `model.rotate` expects
them, so weights are read as they are. What needs care is config.json: `model.Llama` computes what
transformers computes for the families below. A config that asks for something else is refused by
name. A wrong model that still speaks English is worse than none. Keys that are not known are named
on stderr. This file imports no model.

    numbers = hf.read_config(directory / "config.json")           # the fields of model.Config
    tensors = hf.open_files(directory)                            # {name: function that reads it}
    hf.save_folder(out, hf.config_json(numbers), ((name, read()) for name, read in tensors.items()))
"""
import json
import os
import sys
from functools import cache, partial

import torch

from formats import CHECKPOINT_FILES
from formats.jsonl import filled
from formats.meta import check_heads, check_names, check_number, mapped
from support.files import read_json, replaced

# The families, with what transformers takes for a key that is missing; the names of its classes.
GELU, WINDOW = "gelu_pytorch_tanh", {"sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {"llama": {}, "mistral": {"sliding_window": 4096}, "qwen2": WINDOW,
            "qwen3": {**WINDOW, "head_dim": 128},
            "smollm3": {"tie_word_embeddings": True, "rope_theta": 2e6, "sliding_window": None},
            "gemma": {"tie_word_embeddings": True, "head_dim": 256, "hidden_act": GELU}}
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}           # or .title()

# Our names of the numbers in config.json.
NUMBERS = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
           "n_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size",
           "ffn_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
           "max_seq_len": "max_position_embeddings", "head_dim": "head_dim",
           "sliding_window": "sliding_window"}
OPTIONAL = ("max_seq_len", "head_dim", "sliding_window")      # may be missing or null

# Keys that change what is computed, here or in relatives of LLaMA, and the values at which they do
# not.
NEUTRAL = {"hidden_act": ("silu", "swish", GELU), "attention_bias": (False, True),
           "hidden_activation": (GELU,), "use_bidirectional_attention": (False,),
           "mlp_bias": (False,), "partial_rotary_factor": (1,), "rope_interleaved": (False,),
           "layer_types": (), "use_sliding_window": (False,), "quantization_config": (),
           "clip_qkv": (), "qk_layernorm": (False,), "use_qk_norm": (False,), "qk_norm": (False,),
           "parallel_attn": (False,), "alibi": (False,), "no_rope_layers": (), "qkv_bias": (False,),
           "logit_scale": (1,), "logits_scaling": (1,), "embedding_multiplier": (1,),
           "residual_multiplier": (1,), "attention_multiplier": (), "query_pre_attn_scalar": (),
           "final_logit_softcapping": (), "attn_logit_softcapping": (), "num_experts": (0,),
           "num_local_experts": (0,), "n_routed_experts": (0,), "is_encoder_decoder": (False,),
           "add_cross_attention": (False,), "is_causal": (True,), "attention_chunk_size": ()}

# Keys that change nothing here, in this order: of the maker, of the files, of initialisation and
# execution, of the tokenizer, of generation, of other tasks, of a sliding window that is off.
# Others are named: transformers ignores them, but perhaps a later version does not.
HARMLESS = set("""
    architectures model_type transformers_version transformers.js_config is_llama_config
    unsloth_version unsloth_fixed   torch_dtype dtype use_safetensors
    initializer_range use_cache pretraining_tp gradient_checkpointing torchscript use_bfloat16
    chunk_size_feed_forward pruned_heads return_dict output_attentions output_hidden_states
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    tokenizer_class prefix max_sequence_length model_max_length
    do_sample temperature top_k top_p typical_p num_beams num_beam_groups num_return_sequences
    max_length min_length max_new_tokens length_penalty repetition_penalty diversity_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size early_stopping bad_words_ids
    suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty remove_invalid_values return_dict_in_generate output_scores
    id2label label2id problem_type finetuning_task task_specific_params classifier_dropout
    is_decoder cross_attention_hidden_size tie_encoder_decoder tf_legacy_loss
    max_window_layers""".split())

# What a RoPE scaling of a known type consists of.
SCALINGS = {"default": (), "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                       "original_max_position_embeddings")}


# ------------------------------------------------------------------------------------- config.json

def read_config(path):
    """{field of model.Config: value}; ValueError naming what this network does not compute."""
    p = read_json(path)
    family = p.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{path}: model_type is {json.dumps(family)[:80]}; what works here is "
                         f"{', '.join(FAMILIES)}")
    p = {**FAMILIES[family], **p}
    p = {**p, **rope(p, path)}
    if family == "llama" and p.get("num_key_value_heads") is None:
        p["num_key_value_heads"] = p.get("num_attention_heads")
    if family in ("qwen2", "qwen3", "smollm3"):
        drop_windows(p)
    every = no_rope(p, path) if family == "smollm3" else 0
    if family in ("qwen2", "mistral"):                 # they have biases, or none, whatever it says
        p["attention_bias"] = False
    if family == "gemma" and p["hidden_act"] in (None, "gelu"):        # as its first files say
        p["hidden_act"] = GELU
    if family in ("llama", "gemma") and p.get("sliding_window"):
        raise ValueError(f"{path}: sliding_window in a {family} is not known")
    kind = "sliding_attention" if p.get("sliding_window") else "full_attention"
    if isinstance(types := p.get("layer_types"), list) and all(t == kind for t in types):
        del p["layer_types"]
    for key, neutral in NEUTRAL.items():
        if p.get(key) is not None and not any(p[key] == v for v in neutral):
            raise ValueError(f"{path}: {key} is {json.dumps(p[key])[:80]}, which this network does "
                             "not compute; it would be a wrong model")
    tied = p.get("tie_word_embeddings") or False
    if type(tied) is not bool:
        raise ValueError(f"{path}: tie_word_embeddings is {json.dumps(tied)[:80]}")
    numbers = {}
    for ours, theirs in NUMBERS.items():
        if p.get(theirs) is not None or ours not in OPTIONAL:
            check_number(p.get(theirs), theirs, path, whole=ours not in ("norm_eps", "rope_theta"))
            numbers[ours] = p[theirs]
    bias = bool(p.get("attention_bias"))                                    # of q, k, v and o
    numbers |= {"tied": tied, "qkv_bias": family == "qwen2" or bias, "o_bias": bias,
                "qk_norm": family == "qwen3", "gelu": p.get("hidden_act") == GELU, "no_rope": every,
                "embed_scale": numbers["dim"] ** 0.5 if family == "gemma" else 0.0,
                "rope_scaling": p["scaling"]}
    known = {*NEUTRAL, *HARMLESS, *NUMBERS.values(), "tie_word_embeddings", "scaling",
             "rope_scaling", "rope_parameters"}
    if other := [f"{k} = {json.dumps(v)[:40]}" for k, v in p.items()
                 if v and k not in known and not k.startswith("_")]:
        say(f"note: {path}: without effect here: {', '.join(other)[:300]}")
    return check_heads(numbers, path, any_width="head_dim" in numbers)


def drop_windows(p):
    """Take a sliding window that no layer uses out of a config: it is off, or begins too late.

    A key that is left, use_sliding_window or layer_types, is refused if it is not neutral.
    """
    window, first, last = (p.get(k) for k in (*WINDOW, "num_hidden_layers"))
    del p["sliding_window"]
    late = p["model_type"] != "smollm3" and type(first) is type(last) is int and first >= last
    if isinstance(types := p.get("layer_types"), list):
        late = all(t == "full_attention" for t in types)
    if window is None or late:
        p.pop("use_sliding_window", None)


def no_rope(p, path):
    """Which layers have no RoPE: 4 for every fourth, 0 for none. ValueError for other patterns."""
    layers, every = p.get("num_hidden_layers"), p.pop("no_rope_layer_interval", 4)
    check_number(layers, "num_hidden_layers", path, whole=True)
    if (listed := p.pop("no_rope_layers", None)) is not None:
        without = [i for i, has in enumerate(listed, 1) if not has] if type(listed) is list else [0]
        every = without[0] if without else layers + 1
        if not every or len(listed) != layers or without != [*range(every, layers + 1, every)]:
            raise ValueError(f"{path}: no_rope_layers is {json.dumps(listed)[:80]}; every n-th of "
                             "all layers may be without RoPE, no others")
    check_number(every, "no_rope_layer_interval", path, whole=True)
    return every if every <= layers else 0


@cache
def say(text):
    """Print a line on stderr: once, and by one of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(filled(text), file=sys.stderr)


def rope(p, path):
    """rope_theta and scaling, from either spelling: flat, or transformers 5's rope_parameters."""
    new, old = p.get("rope_parameters"), p.get("rope_scaling")
    given = old or new or {}
    if not isinstance(given, dict) or (old and new and old != new):
        raise ValueError(f"{path}: rope_scaling {json.dumps(old)[:80]} and rope_parameters "
                         f"{json.dumps(new)[:80]} are not understood")
    given = {k: v for k, v in given.items() if v is not None}
    theta = given.pop("rope_theta", p.get("rope_theta", 10000.0))
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    if not isinstance(kind, str) or kind not in SCALINGS or set(given) != set(SCALINGS[kind]):
        raise ValueError(f"{path}: RoPE of type {json.dumps(kind)[:80]} with {', '.join(given)} is "
                         f"not known here; what works is {', '.join(SCALINGS)}")
    for key, value in given.items():
        check_number(value, key, path)
    if kind == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
        raise ValueError(f"{path}: low_freq_factor should be below high_freq_factor")
    return {"rope_theta": theta, "scaling": {"rope_type": kind, **given} if given else None}


def family_of(numbers):
    """The family that has these numbers, vars() of a model.Config."""
    n = numbers
    return ("gemma" if n["embed_scale"] else "qwen3" if n["qk_norm"] else "smollm3" if n["no_rope"]
            else "qwen2" if n["qkv_bias"] > n["o_bias"] else "mistral" if n["sliding_window"]
            else "llama")


def config_json(numbers, dtype=torch.bfloat16, **more):
    """The dict of a config.json for vars() of a model.Config; more: further keys."""
    family = family_of(numbers)
    theirs = {theirs: numbers[ours] for ours, theirs in NUMBERS.items()}
    theirs = {k: v for k, v in theirs.items() if v or k != "max_position_embeddings"}
    if every := numbers["no_rope"]:
        more |= {"no_rope_layer_interval": every, "no_rope_layers": [
            int(i % every > 0) for i in range(1, numbers["n_layers"] + 1)]}
    name = CLASSES.get(family, family.title())
    return {"architectures": [f"{name}ForCausalLM"], "model_type": family, **theirs,
            "sliding_window": numbers["sliding_window"] or None,
            "rope_scaling": numbers["rope_scaling"],
            "hidden_act": GELU if numbers["gelu"] else "silu", "attention_bias": numbers["o_bias"],
            "mlp_bias": False, "tie_word_embeddings": numbers["tied"], "pad_token_id": None,
            "torch_dtype": str(dtype).removeprefix("torch."), **more}


# ----------------------------------------------------------------------------------------- weights

def open_files(directory):
    """{tensor name: function that reads it} of all weight files of a folder; nothing is read yet.

    Old files keep RoPE's frequencies, or tables of cosines and sines: these are left out.
    """
    found = open_file_or_shards(directory)
    return {n: read for n, read in found.items() if ".rotary_emb." not in n}


def is_shifted(name, numbers):
    """True for a weight w of Gemma's norms. They multiply by 1 + w, which is the weight here. Files
    hold w: 1 is added when they are read, and subtracted when they are written, in float64."""
    return numbers["embed_scale"] > 0 and name.endswith("norm.weight")


def checked(found, shapes, numbers, directory):
    """{parameter name: function that reads it} of the tensors of `open_files`.

    shapes: {parameter name: shape} of the network. numbers: vars() of its Config. ValueError for
    other tensors at once, for other shapes or dtypes when a tensor is read. lm_head may be there
    although it is tied, if it is the embedding.
    """
    found, tied = dict(found), numbers["tied"]
    if tied and "lm_head.weight" in found:
        head, embedding = found.pop("lm_head.weight"), found.get("model.embed_tokens.weight")
        if embedding and not torch.equal(head(), embedding()):
            raise ValueError(f"{directory}: tie_word_embeddings is true, but lm_head.weight is not "
                             "the embedding; correct config.json")
    check_names(found, shapes, directory)

    def read(name, shape):
        W = found[name]()
        if W.shape != shape or not W.is_floating_point() or W.element_size() < 2:
            raise ValueError(f"{directory}: {name}: expected floats of shape {tuple(shape)}, found "
                             f"{str(W.dtype).removeprefix('torch.')} of shape {tuple(W.shape)}")
        return W.double() + 1 if is_shifted(name, numbers) else W

    return {name: partial(read, name, shape) for name, shape in shapes.items()}


def open_file_or_shards(directory):
    """{tensor name: function that reads it} of a folder's one weight file, or of its shards."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (directory / single).is_file():
            return open_file(directory / single)
        index = directory / f"{single}.index.json"
        if index.is_file():
            break
    else:
        raise FileNotFoundError(f"{directory}: neither model.safetensors nor pytorch_model.bin, "
                                "nor the index of their shards, is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
            isinstance(f, str) and f not in ("", "..") and not set(f) & set("/\\\0")
            for f in weight_map.values()):
        raise ValueError(f"{index}: weight_map should name a file of this folder for every tensor")
    files = {f: open_file(directory / f) for f in sorted(set(weight_map.values()))}
    for name, f in weight_map.items():
        if name not in files[f]:
            raise ValueError(f"{directory / f}: {name} is missing, which {index.name} puts there")
    return {name: files[f][name] for name, f in weight_map.items()}


def open_file(path):
    """{tensor name: function that reads it} of one .safetensors or .bin file, memory-mapped."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            def read(name):              # a mapping of its own, which goes when the tensor goes
                with safe_open(path, framework="pt") as f:
                    return f.get_tensor(name)

            with safe_open(path, framework="pt") as f:
                return {name: partial(read, name) for name in f.keys()}
        tensors = mapped(path)
        if not all(isinstance(W, torch.Tensor) for W in tensors.values()):
            raise ValueError("not only tensors")
        return {name: lambda W=W: W for name, W in tensors.items()}
    except ImportError:
        raise ValueError(f"{path} needs the safetensors package: pip install safetensors") from None
    except Exception as e:               # both readers raise many kinds for a damaged file
        reason = str(e).strip().partition("\n")[0][:120]
        raise ValueError(f"{path}: not readable, perhaps truncated: download it again "
                         f"({reason})") from None


def writer():
    """safetensors' save_file, and what it raises; ValueError if the package is missing."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ValueError("writing this layout needs the safetensors package: pip install "
                         "safetensors") from None
    return save_file, SafetensorError


def save_folder(directory, config, tensors, shard_bytes=5_000_000_000):
    """Write config.json and (name, tensor) pairs as safetensors, in shards of at most shard_bytes.

    config: a dict, as from `config_json`. Only one shard is in memory at a time.
    """
    (save_file, failure), numbers = writer(), {"embed_scale": config.get("model_type") == "gemma"}
    with replaced(directory, CHECKPOINT_FILES) as tmp:
        shards, shard, size, total = [], {}, 0, 0

        def flush():
            try:
                save_file(shard, tmp / f"{len(shards)}.part", metadata={"format": "pt"})
            except failure as e:                                     # a full disk, for example
                raise OSError(f"{directory}: not written: {e}") from None
            shards.append(list(shard))

        for name, W in tensors:
            if is_shifted(name, numbers):
                dtype = config.get("dtype") or config["torch_dtype"]
                W = (W.double() - 1).to(getattr(torch, dtype))
            W = W.detach().cpu().contiguous()
            if shard and size + W.nbytes > shard_bytes:
                flush()
                shard, size = {}, 0
            shard[name], size, total = W, size + W.nbytes, total + W.nbytes
        flush()
        files = ["model.safetensors"] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for i, file in enumerate(files):
            (tmp / f"{i}.part").rename(tmp / file)
        if len(shards) > 1:
            weight_map = {name: file for names, file in zip(shards, files, strict=True)
                          for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (tmp / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if any("lm_head.weight" in names for names in shards):     # tied once, but adapted since
            config = {**config, "tie_word_embeddings": False}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (tmp / "config.json").write_text(text + "\n", encoding="utf-8")
