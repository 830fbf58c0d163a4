"""Meta's raw layout: params.json + consolidated.00.pth ... NN.pth + tokenizer.model.

Mistral's own layout is the same, with consolidated.safetensors and some more numbers.

Here are its strict checks, on plain dicts, and those that all layouts share. A damaged file, or one
of another model, is refused in one line that names file, tensor, expected and found. model.py
translates names and the order of rows. This file imports nothing of ours.

    shards = meta.open_shards(directory)                   # one dict of tensors for each file
    numbers = meta.read_params(directory, shards)          # the fields of model.Config
    read = meta.merged(directory, shards, shapes)          # read(Meta's name) -> tensor
"""
import json
import zipfile
from math import inf

import torch

# The numbers in params.json, and the values by which it leaves one of them open.
INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
FLOATS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
OPEN = {"n_kv_heads": None, "vocab_size": -1, "max_seq_len": None, "ffn_dim_multiplier": None}
# Those that Mistral's have besides. ffn_dim is given there.
MISTRAL = ("head_dim", "hidden_dim", "sliding_window")
OPEN |= dict.fromkeys(MISTRAL)
# Llama 3.1's stretched RoPE, which params.json only switches on.
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_KEYS = {"factor": "rope_scaling_factor", "high_freq_factor": "rope_high_freq_factor"}
# Meta's names of the modules.
META = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
LARGE = 2**30                 # no whole number of a model is so large
REMAP = 1 << 27               # bytes that are read before a file is mapped anew


# ------------------------------------------------------------------------------------- params.json

def read_params(directory, shards):
    """{field of model.Config: value} of params.json in a directory.

    What the file leaves open (vocab_size, tied) the tensors tell: shards, as from `open_shards`.
    """
    path = directory / "params.json"
    try:
        p = json.loads(path.read_text("utf-8"))
        # Mistral's own program takes 1e6 for a theta that is missing, and with a window Meta's.
        theta = 1e6 if p.get("hidden_dim") and not p.get("sliding_window") else 10000.0
        p = {**OPEN, "multiple_of": 256, "norm_eps": 1e-5,
             "rope_theta": theta, **p}
        rope = {k: p.pop(name, None) for k, name in ROPE_KEYS.items()}
        scaled = p.pop("use_scaled_rope", False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: it comes with Meta's weights") from None
    except (TypeError, ValueError, RecursionError, AttributeError) as e:  # no object, JSON or UTF-8
        raise ValueError(f"{path}: not a LLaMA's params.json ({str(e)[:100]})") from None
    for name in INTS + FLOATS + MISTRAL:
        if name not in OPEN or p[name] != OPEN[name]:
            check_number(p.get(name), name, path, whole=name not in FLOATS)
    if unknown := {k: v for k, v in p.items()
                   if v and k not in (*INTS, *FLOATS, *MISTRAL, "max_batch_size")}:
        raise ValueError(f"{path}: this model does not know {str(unknown)[:150]}; it would "
                         "compute something else than the weights were trained for")
    rows, width = shards[0]["tok_embeddings.weight"].shape
    if (vocab := p["vocab_size"]) == -1:                 # Llama 1 and 2: "ask the tokenizer"
        vocab = rows if width != p["dim"] else rows * len(shards)
    if scaled:           # Meta's files leave out the factor: 8 in Llama 3.1, 32 in 3.2 (1B and 3B)
        given = {k: v for k, v in rope.items() if v is not None}
        for k, v in given.items():
            check_number(v, ROPE_KEYS[k], path)
        scaled = {**LLAMA3_ROPE, "factor": 32.0 if p["dim"] in (2048, 3072) else 8.0, **given}
    width = p["hidden_dim"] or ffn_dim(p["dim"], p["multiple_of"], p["ffn_dim_multiplier"])
    check_number(width, "ffn_dim, of dim, multiple_of and ffn_dim_multiplier,", path, whole=True)
    return check_heads({
        "dim": p["dim"], "n_layers": p["n_layers"], "n_heads": p["n_heads"],
        "n_kv_heads": p["n_kv_heads"] or p["n_heads"], "vocab_size": vocab, "ffn_dim": width,
        "norm_eps": p["norm_eps"], "rope_theta": p["rope_theta"],
        "tied": "output.weight" not in shards[0], "max_seq_len": p["max_seq_len"] or 0,
        "head_dim": p["head_dim"] or 0, "sliding_window": p["sliding_window"] or 0,
        "rope_scaling": scaled or None}, path, any_width=bool(p["head_dim"]))


def ffn_dim(dim, multiple_of, multiplier=None):
    """Meta's rule for the feed-forward width: 2/3 of 4 dim, scaled, rounded up to a multiple."""
    width = int((multiplier or 1) * int(2 * 4 * dim / 3))
    return multiple_of * -(-width // multiple_of)


# ----------------------------------------------------------------------------------------- tensors

def meta_name(name):
    """model.layers.3.self_attn.q_proj.weight -> layers.3.attention.wq.weight"""
    path = name.removeprefix("model.").removesuffix(".weight").split(".")
    prefix, rest = (path[:2], path[2:]) if path[0] == "layers" else ([], path)
    return ".".join([*prefix, META[".".join(rest)], "weight"])


def open_shards(directory):
    """The tensors of consolidated.NN.pth, one dict for each file, memory-mapped: not read yet.
    Mistral has them in consolidated.safetensors."""
    shards, n = [], len(list(directory.glob("consolidated.*.pth")))
    single = directory / "consolidated.safetensors"
    for file in [single] if not n and single.is_file() else [
            directory / f"consolidated.{i:02d}.pth" for i in range(max(1, n))]:
        if not file.is_file():
            also = next(directory.glob("model*.safetensors*"), None)
            raise FileNotFoundError(f"{file} is missing" + (
                f"; or is it config.json, which belongs to {also.name}?" if also else ""))
        try:
            shard = mapped(file)
            shards.append({k: v for k, v in shard.items() if k != "rope.freqs"})
        except ImportError:
            raise ValueError(f"{file} needs the safetensors package: pip install safetensors"
                             ) from None
        except Exception as e:               # torch.load raises many kinds; all mean the same here
            reason, kind = str(e).strip().partition("\n")[0][:120], file.suffix.strip(".")
            kind = "PyTorch" if kind == "pth" else kind
            raise ValueError(f"{file}: not a readable {kind} file, perhaps truncated: download "
                             f"it again ({reason})") from None
        for name, W in shards[-1].items():
            if not (isinstance(W, torch.Tensor) and W.is_floating_point()):
                raise ValueError(f"{file}: {name} should be a tensor of floats, not "
                                 f"{getattr(W, 'dtype', type(W).__name__)}")
        if getattr(shards[-1].get("tok_embeddings.weight"), "ndim", 0) != 2:
            raise ValueError(f"{file}: tok_embeddings.weight is missing or not a matrix; this is "
                             "not a LLaMA in Meta's layout")
    return shards


def mapped(path):
    """What torch.save wrote, or safetensors, memory-mapped. Files older than torch 1.6 are not zip
    archives and cannot be mapped: they are read."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # only Mistral's layout needs it
        return load_file(path)
    mmap = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def merged(directory, shards, shapes):
    """A function from a tensor's name to the tensor, out of its model-parallel shards.

    shapes: {name: shape} of all tensors that should be there; ValueError for others, or other
    shapes. Mapped pages count as our memory until they are unmapped: files are mapped anew every
    128 MiB, if they can be.
    """
    for i, shard in enumerate(shards):
        check_names(shard, shapes, f"{directory}/consolidated.{i:02d}.pth")
    ahead = REMAP if all(map(zipfile.is_zipfile, directory.glob("consolidated.*.pth"))) else inf

    def read(name):
        nonlocal shards, ahead
        if ahead < 0:
            shards, ahead = open_shards(directory), REMAP
        parts = [shard[name] for shard in shards]
        ahead -= sum(part.nbytes for part in parts)
        return merge_shards(parts, shapes[name], f"{directory}: {name}")

    return read


def merge_shards(parts, shape, where):
    """One tensor of `shape` out of its model-parallel parts.

    Rows (dim 0) of wq wk wv w1 w3 output are split, columns (dim 1) of wo w2. tok_embeddings is
    split by columns in Llama 2, by rows in Llama 3. Norms are copies. The shapes tell which: the
    split axis is the only one whose sizes add up.
    """
    whole, axis = parts[0], 0 if parts[0].shape[1:] == shape[1:] else 1
    if len(parts) > 1 and all(p.ndim == 2 and p.shape[1 - axis] == shape[1 - axis] for p in parts):
        whole = torch.cat(parts, axis)
    if whole.shape != shape:
        raise ValueError(f"{where}: expected shape {tuple(shape)}, found {tuple(whole.shape)} "
                         f"in {len(parts)} shard(s)")
    return whole


# --------------------------------------------------------------------------- checks for all layouts

def check_number(v, name, path, whole=False):
    """ValueError unless v is a number above 0, and no larger than a model may have: a larger one
    would only fill memory."""
    good = type(v) is int or type(v) is float and not whole
    if not good or not 0 < v < (LARGE if whole else 2**63):
        kind, large = "whole number" if whole else "number", type(v) is int and v > 0
        raise ValueError(f"{path}: {name} is missing or not a {kind} above 0: "
                         f"{json.dumps(v)[:60]}{', which is too large' * large}")


def check_heads(numbers, path, any_width=False):
    """The numbers (fields of model.Config), if the heads fit. ValueError if they do not.

    any_width: the heads need not add up to the width of the network.
    """
    dim, n_heads, n_kv_heads = (numbers[k] for k in ("dim", "n_heads", "n_kv_heads"))
    width = numbers.get("head_dim") or dim // n_heads
    if n_heads % n_kv_heads or width % 2 or not width or not any_width and width * n_heads != dim:
        raise ValueError(f"{path}: {dim} / {n_heads} heads / {n_kv_heads} kv heads do not "
                         "divide into heads of even width")
    if width * n_heads >= LARGE:
        raise ValueError(f"{path}: {n_heads} heads of width {width} are too many")
    return numbers


def check_finite(W, name):
    """W, if it holds neither NaN nor Inf: either makes the sum NaN or Inf, and a sum is ten times
    cheaper. A sum of finite numbers can overflow. Only then is every entry checked."""
    if W.sum().isfinite() or W.isfinite().all():
        return W
    module, _, leaf = name.rpartition(".")
    raise ValueError(f"{module}: the {leaf} holds NaN or Inf in {str(W.dtype)[6:]}: the checkpoint "
                     "is damaged, or its numbers are too large for this dtype")


def check_names(found, expected, where):
    """ValueError unless a file holds exactly the tensors that it should."""
    expected, found = set(expected), set(found)
    missing, extra = expected - found, found - expected
    if missing or extra:
        what = f"{len(missing)} missing" if missing else f"{len(extra)} unexpected"
        raise ValueError(f"{where}: {what} tensor(s), first {min(missing or extra, key=str)}")
