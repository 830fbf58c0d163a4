"""Write GGUF, llama.cpp's format, and say what a checkpoint's vocabulary is in GGUF's words.

    gguf_write.save(path, source, config, tensors, shapes, dtype)     # the whole model in one file
    files, ids = gguf_write.hf_files(source, config)                  # a tokenizer for transformers

The opposite of formats/gguf.py. What the format has no word for is refused by name. The gguf
package writes the file (pip install gguf). Nothing that model.py imports imports this file.
"""
from importlib import import_module
from math import prod

import torch

from formats import gguf, hf
from formats import tokenizer as kinds
from formats.gguf import CONTROL, NORMAL, UNUSED, USER_DEFINED
from model import reorder
from support.files import read_json, written

# Names of Llama 3's control tokens, after its ranks. Meta's file leaves them out.
LLAMA3 = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
          "finetune_right_pad_id", "reserved_special_token_2", "start_header_id", "end_header_id",
          "eom_id", "eot_id", "python_tag", *(f"reserved_special_token_{n}" for n in range(3, 248))]


# What the file calls a dtype, and a file whose matrices have it.
KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}


def package():
    """The gguf package. ValueError if it is missing."""
    try:
        return import_module("gguf")
    except ImportError:
        raise ValueError("writing a GGUF needs the gguf package: pip install gguf") from None


# ------------------------------------------------------------------------------------- vocabulary

def vocabulary(folder, rows):
    """The keys of a checkpoint's vocabulary, as `gguf.tokenizer_files` reads them.

    rows: how many the embedding has. Those without a token get one that no text uses.
    """
    tok, config = kinds.Tokenizer(folder), kinds.optional_json(folder / "tokenizer_config.json")
    kind = {kinds.SentencePiece: pieces, kinds.HuggingFace: byte_level}.get(type(tok.lib), ranks)
    entries, keys = kind(tok.lib, folder)                       # {id: (token, its type)}
    for name, token in kinds.added_tokens(folder, config).items():
        if entries.get(token["id"], ("", NORMAL))[1] in (NORMAL, USER_DEFINED):
            entries[token["id"]] = name, CONTROL if token["special"] else USER_DEFINED
    for i in tok.stops & entries.keys():                        # no text becomes what ends one
        entries[i] = entries[i][0], CONTROL if entries[i][1] == USER_DEFINED else entries[i][1]
    if max(entries) >= rows:
        raise ValueError(f"{folder}: {max(entries) + 1} tokens, but the model embeds {rows}")
    tokens, types = zip(*(entries.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)), strict=True)
    if "scores" in keys:                                        # added tokens have none
        keys["scores"] = [keys["scores"].get(i, 0.0) for i in range(rows)]
    ends = dict(zip(("eot", "eom"), sorted(tok.stops - {tok.eos}), strict=False))
    pad = kinds.token_id(config, "pad_token", {token: i for i, token in enumerate(tokens)})
    ids = {"bos": None if tok.bos is None and tok.start == tok.eos else tok.start, "eos": tok.eos,
           **ends, "padding": tok.lib.pad if pad is None else pad}
    found = {**keys, "tokens": list(tokens), "token_type": list(types),
             **{f"{name}_token_id": i for name, i in ids.items() if i is not None},
             "add_bos_token": tok.bos is not None, "add_eos_token": False}
    template = kinds.chat_template(folder, config)
    return {**{f"tokenizer.ggml.{key}": value for key, value in found.items()},
            **({"tokenizer.chat_template": template} if template else {})}


def hf_files(folder, config):
    """({file name: bytes}, ids for config.json) of what transformers needs beside tokenizer.model.
    Nothing if there is a tokenizer.json, or no tokenizer."""
    if (folder / "tokenizer.json").is_file() or not any(folder.glob("tokenizer.model*")):
        return {}, {}
    info = {"general.architecture": "llama", "llama.context_length": config.max_seq_len or None,
            **vocabulary(folder, config.vocab_size)}
    return gguf.tokenizer_files(info, config.vocab_size, folder)


def pieces(lib, folder):
    """(entries, keys) of a sentencepiece model."""
    path = folder / "tokenizer.model"
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception:            # missing, or older than sentencepiece needs
        raise ValueError(f"{path}: to read its pieces takes a recent protobuf package: pip install "
                         "-U protobuf") from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(lib.proto)
    spec, space = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type != spec.BPE or space.precompiled_charsmap:
        raise ValueError(f"{path}: only byte-pair vocabularies that leave characters as they are "
                         "have a form in tokenizer.json and GGUF")
    return ({i: (p.piece, p.type) for i, p in enumerate(proto.pieces)},
            {"model": "llama", "pre": "default", "unknown_token_id": spec.unk_id,
             "scores": {i: p.score for i, p in enumerate(proto.pieces)},
             "add_space_prefix": space.add_dummy_prefix,
             "remove_extra_whitespaces": space.remove_extra_whitespaces})


def byte_level(lib, folder):
    """(entries, keys) of a tokenizer.json. ValueError unless it is one of llama.cpp's rules."""
    path = folder / "tokenizer.json"
    found = read_json(path)
    bpe, pre = found["model"], found.get("pre_tokenizer") or {}
    parts, cuts = pre.get("pretokenizers", [pre]), []
    for part in parts:
        if part.get("type") == "ByteLevel" and not part.get("add_prefix_space"):
            cuts += [gguf.cut_at(gguf.GPT2)] if part.get("use_regex", True) else []
        else:
            cuts.append(part)
    normal = (found.get("normalizer") or {}).get("type")
    rule = next((name for name, steps in gguf.RULES.items() if steps == cuts), None)
    if (rule is None or bpe.get("type") != "BPE" or bpe.get("byte_fallback")
            or normal != ("NFC" if rule == "qwen2" else None)
            or bpe.get("ignore_merges") and rule != "llama-bpe"):
        raise ValueError(f"{path}: it cuts text by another rule than {', '.join(gguf.RULES)}; if "
                         "the model came with a tokenizer.model, put it beside this file")
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    return ({i: (token, NORMAL) for token, i in bpe["vocab"].items()},
            {"model": "gpt2", "pre": rule, "merges": merges})


def ranks(lib, folder):
    """(entries, keys) of Llama 3's ranks. A byte is spelled as GPT-2 does, by a character."""
    shown = [b for b in range(256) if 33 <= b < 127 or 161 <= b < 173 or 174 <= b]
    spelled = {b: chr(b) for b in shown}
    for b in range(256):
        spelled.setdefault(b, chr(256 + len(spelled) - len(shown)))
    tokens = ["".join(spelled[b] for b in lib.tok.decode_single_token_bytes(i))
              for i in range(lib.bos)]
    names = [*tokens, *(f"<|{name}|>" for name in LLAMA3)]
    return ({i: (name, NORMAL if i < lib.bos else CONTROL) for i, name in enumerate(names)},
            {"model": "gpt2", "pre": "llama-bpe",
             "merges": list(map(" ".join, gguf.pairs(tokens)))})


# --------------------------------------------------------------------------- numbers and weights

def numbers(config):
    """(architecture, its keys) of a model.Config."""
    c, family = vars(config), hf.family_of(vars(config)).replace("mistral", "llama")
    keys = {theirs: c[ours] for ours, theirs in gguf.NUMBERS.items()}
    keys |= {"context_length": context_length(config), "vocab_size": config.vocab_size,
             "attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim}
    if config.rope_scaling and config.rope_scaling["rope_type"] == "linear":
        factor = float(config.rope_scaling["factor"])
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
    for key in ("attention.layer_norm_rms_epsilon", "rope.freq_base"):
        keys[key] = float(keys[key])
    return family, {f"{family}.{key}": value for key, value in keys.items()}


def check_said(family, config, shapes, keys, path):
    """ValueError unless a GGUF of this family with these keys is read as the same model again."""
    tensors = {gguf.gguf_name(name): (shape, None) for name, shape in shapes.items()}
    found = gguf.read_numbers({"general.architecture": family, **keys}, tensors, path)
    other = [f"{name} {value}" for name, value in vars(config).items()
             if name in ("qkv_bias", "o_bias", "qk_norm", "no_rope", "gelu", "embed_scale")
             and value != found[name]]
    if config.tied < (family == "gemma"):
        other.append("an output projection of its own")
    if other:
        raise ValueError(f"{path}: a GGUF of the architecture {family} has no place for "
                         f"{', '.join(other)}: write Hugging Face's layout (hf)")


def context_length(config):
    """How many positions llama.cpp is told. Within the window a sliding window changes nothing, and
    there is no word for it. Meta's files state no length: it is that of Llama 2 or 3."""
    stated = [n for n in (config.max_seq_len, config.sliding_window) if n]
    return min(stated, default=8192 if config.rope_theta >= 5e5 else 4096)


def save(path, source, config, tensors, shapes, dtype):
    """Write a model to one file, which appears when it is complete.

    source: the directory of the checkpoint it was made from, for the vocabulary. config: a
    model.Config. tensors: (name, tensor) pairs, in the order of shapes, {name: shape}. Matrices are
    written in `dtype`, and vectors in float32, as llama.cpp expects.
    """
    family, keys = numbers(config)
    check_said(family, config, shapes, keys, path)
    keys |= vocabulary(source, config.vocab_size)
    scaling = config.rope_scaling or {}
    factors = ([gguf.rope_factors(config.head_dim, config.rope_theta, scaling)]
               if scaling.get("rope_type") == "llama3" else [])
    with written(path) as tmp:
        writer = package().GGUFWriter(tmp, family)
        try:
            for key, value in {"general.file_type": FILE_TYPES[dtype], **keys}.items():
                add_key(writer, key, value)
            for W in factors:
                add_info(writer, "rope_freqs.weight", W.shape, dtype)
            for name, shape in shapes.items():
                add_info(writer, gguf.gguf_name(name), shape, dtype)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for W in factors:
                writer.write_tensor_data(W.numpy())
            for name, W in tensors:
                if family in gguf.INTERLEAVED:                    # q and k in Meta's order
                    W = reorder(W, name, config, to_meta=True)
                W = W.to(stored(W.shape, dtype)).contiguous()
                W = W.view(torch.int16) if W.dtype == torch.bfloat16 else W   # NumPy has no such
                writer.write_tensor_data(W.numpy())
        finally:
            writer.close()


def stored(shape, dtype):
    """The dtype of a tensor in the file."""
    return dtype if len(shape) > 1 else torch.float32


def add_info(writer, name, shape, dtype):
    """Announce a tensor. NumPy's type is not looked at if the file's is given."""
    kind = stored(shape, dtype)
    code = package().GGMLQuantizationType[KINDS[kind]]
    writer.add_tensor_info(name, shape, None, prod(shape) * kind.itemsize, code)


def add_key(writer, key, value):
    """Write a key with the type that its value has."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
           str: writer.add_string, list: writer.add_array}[type(value)]
    add(key, value)
