"""Write a model in Meta's raw layout: params.json and consolidated.00.pth.

    meta_write.save(net, directory)

The opposite of model.open_checkpoint. Nothing that model.py imports imports this file.
"""
import json

import torch

from formats import CHECKPOINT_FILES, meta
from model import reorder
from support.files import replaced


def save(net, directory):
    """Write `net` in Meta's raw layout, in its own dtype.

    A checkpoint that is there already, in either layout, is replaced: see support/files.py.
    """
    save_tensors(directory, net.config, net.named_parameters())


def save_tensors(directory, config, tensors):
    """Write (name, tensor) pairs in Meta's raw layout. OSError if they do not fit on the disk."""
    params = params_json(config)
    state = {meta.meta_name(n): reorder(W.detach(), n, config, to_meta=True).cpu().contiguous()
             for n, W in tensors}
    with replaced(directory, CHECKPOINT_FILES) as tmp:
        try:
            torch.save(state, tmp / "consolidated.00.pth")
        except RuntimeError as e:            # torch.save raises this for a full disk
            reason = str(e).partition("\n")[0]
            raise OSError(f"{directory}: not written, is the disk full? ({reason})") from None
        (tmp / "params.json").write_text(json.dumps(params, indent=2) + "\n")


def params_json(config):
    """The dict of a params.json. ValueError for what Meta's layout cannot say."""
    c, rope, scaled = config, {}, config.rope_scaling
    if scaled and scaled["rope_type"] == "llama3":
        rope = {"use_scaled_rope": True,
                **{name: scaled[k] for k, name in meta.ROPE_KEYS.items()}}
    fixed = [k for k in meta.LLAMA3_ROPE if k not in meta.ROPE_KEYS]
    for what, wrong in {"biases": c.qkv_bias or c.o_bias, "a sliding window": c.sliding_window,
                        "heads of this width": c.head_dim * c.n_heads != c.dim,
                        "norms of q and k": c.qk_norm, "layers without RoPE": c.no_rope,
                        "Gemma's GELU": c.gelu, "Gemma's scaled embedding": c.embed_scale,
                        "this RoPE scaling": scaled and any(scaled.get(k) != meta.LLAMA3_ROPE[k]
                                                            for k in fixed)}.items():
        if wrong:
            raise ValueError(f"Meta's layout has no place for {what}: write Hugging Face's (hf)")
    exact = {"multiple_of": 1,
             "ffn_dim_multiplier": (c.ffn_dim + 0.5) / meta.ffn_dim(c.dim, 1)}
    rule = next(({"multiple_of": m} for m in (256, 128, 64, 32, 16, 8, 4, 2, 1)
                 if meta.ffn_dim(c.dim, m) == c.ffn_dim), exact)
    # Config's names are Meta's. max_seq_len is left out if it is not stated.
    named = {k: v for k, v in vars(c).items() if v and k in meta.INTS + meta.FLOATS}
    return {**named, **rope, **rule}
