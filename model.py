"""LLaMA in one file: the network, its KV cache, reading and writing Meta's raw weights, generation.

  embed_tokens -> n_layers x [x += self_attn(norm(x)), x += mlp(norm(x))] -> norm -> lm_head

Module and parameter names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), because
the paper's target modules, and every adapter on disk, use them. Meta's files name and order things
differently; `load` and `save` translate. This file knows nothing of PiSSA and can be copied alone.

    net = model.load("llama2-7b")                        # a directory, or a name under checkpoints/
    logits = net(tokens)                                 # (B, T) int64 -> (B, T, V) float32
    ids = model.generate(net, [[1, 306, 4658]], max_new_tokens=64)

Shapes: B batch, T new positions, S all positions so far, D width, H heads, G key/value heads,
K head width (D / H), V vocabulary.
"""
import json
import os
from dataclasses import dataclass
from math import inf
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@dataclass
class Config:
    """The numbers that make one LLaMA different from another (defaults: Llama 2 7B)."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32           # fewer than n_heads: grouped-query attention
    vocab_size: int = 32000
    ffn_dim: int = 11008
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False             # the output projection is the embedding matrix
    max_seq_len: int = 0           # positions it was trained for, 0: not stated; nothing here asks

    @property
    def head_dim(self):
        """Width of one attention head, K = D / H."""
        return self.dim // self.n_heads


# ---------------------------------------------------------------------------------------- network

def rope_tables(config, positions):
    """cos and sin of position x frequency, each (B or 1, 1, T, K/2) float32 (arXiv 2104.09864)."""
    k = torch.arange(0, config.head_dim, 2, device=positions.device)
    freqs = 1.0 / config.rope_theta ** (k.float() / config.head_dim)              # (K/2,)
    angles = positions[:, None, :, None].float() * freqs                          # (B, 1, T, K/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + K/2]) of every head, in float32. x: (B, H, T, K)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, rope, mask, cache, start):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)          # (B, H, T, K)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)          # (B, G, T, K)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)          # (B, G, T, K)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:                       # append to the cache, attend to all of it
            cache[0][:, :, start:start + T], cache[1][:, :, start:start + T] = k, v
            k, v = cache[0][:, :, :start + T], cache[1][:, :, :start + T]         # (B, G, S, K)
        if mask is not None and (groups := q.shape[1] // k.shape[1]) > 1:
            # SDPA's fast CUDA kernels take a mask or grouped heads, never both.
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and start == 0,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each RMS-normalised first (arXiv 1910.07467) and added back."""

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, rope, mask=None, cache=None, start=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole network. `checkpointing = True` recomputes every layer in backward: less memory."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.dim),
            layers=nn.ModuleList(Layer(config) for _ in range(config.n_layers)),
            norm=nn.RMSNorm(config.dim, config.norm_eps)))
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens, *, cache=None, start=0, pad=None):
        """Final hidden states, (B, T) int64 -> (B, T, D); `lm_head` turns them into logits.

        cache: from `new_cache`; `tokens` then are positions start ... start + T - 1 of it.
        pad: (B,) int64, how many positions at the left of each row are padding, not text.
        """
        T = tokens.shape[1]
        index = torch.arange(start, start + T, device=tokens.device)[None]        # (1, T)
        mask = None
        if pad is None and start and T > 1:      # is_causal would align the T x S mask top left
            pad = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        if pad is not None:
            key, query = torch.arange(start + T, device=tokens.device), index[..., None]
            # Causal and not padding; a padding position sees itself, or its softmax would be 0/0.
            mask = ((key <= query) & (key >= pad[:, None, None])) | (key == query)  # (B, T, S)
            mask, index = mask[:, None], (index - pad[:, None]).clamp(min=0)
        rope = rope_tables(self.config, index)
        x = self.model.embed_tokens(tokens)                                       # (B, T, D)
        for i, layer in enumerate(self.model.layers):
            args = x, rope, mask, cache and cache[i], start
            recompute = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        return self.model.norm(x)

    def forward(self, tokens, **kwargs):
        """Logits, (B, T) int64 -> (B, T, V) float32. Keyword arguments as in `hidden`."""
        return self.lm_head(self.hidden(tokens, **kwargs)).float()

    def new_cache(self, batch, length):
        """An empty KV cache: per layer keys and values, each (batch, G, length, K)."""
        c, w = self.config, self.model.embed_tokens.weight
        shape = (2, batch, c.n_kv_heads, length, c.head_dim)
        return [torch.zeros(shape, dtype=w.dtype, device=w.device) for _ in range(c.n_layers)]


def init_weights(net, seed=0, std=0.02):
    """Draw every matrix from N(0, std^2), in place: to train from scratch and for benchmarks."""
    generator = torch.Generator(net.lm_head.weight.device).manual_seed(seed)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=std, generator=generator)
    return net


# ------------------------------------------------------------------------------------- generation

@torch.inference_mode()
def generate(net, prompts, max_new_tokens=64, *, temperature=0.0, top_p=1.0, eos=None, seed=0):
    """Continue token lists; returns the new ids of each, without the EOS that ended it.

    prompts: non-empty lists of ids, of any lengths: one batch, padded on the left.
    temperature 0 is greedy; otherwise sample from softmax(logits / temperature), restricted to the
    smallest set of tokens whose probability reaches top_p (Holtzman et al., arXiv 1904.09751).
    """
    assert prompts and all(prompts), "every prompt needs at least one token (the BOS)"
    if not 0 <= temperature < inf:
        raise ValueError(f"temperature should be 0 (greedy) or a number above 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p should be above 0 and at most 1, not {top_p}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens should be at least 1, not {max_new_tokens}")
    device = net.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    T, B = max(map(len, prompts)), len(prompts)
    pad = torch.tensor([T - len(p) for p in prompts], device=device)
    tokens = torch.tensor([[p[0]] * (T - len(p)) + p for p in prompts], device=device)  # (B, T)
    pad = pad if pad.any() else None
    cache, start, done = net.new_cache(B, T + max_new_tokens), 0, torch.zeros(B, dtype=torch.bool)
    out = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        x = net.hidden(tokens, cache=cache, start=start, pad=pad)[:, -1]          # (B, D)
        tokens, start = sample(net.lm_head(x).float(), temperature, top_p, generator), T
        T += 1
        for b, t in enumerate(tokens[:, 0].tolist()):
            done[b] |= t == eos
            if not done[b]:
                out[b].append(t)
        if done.all():
            break
    return out


def sample(logits, temperature, top_p, generator):
    """One token per row, (B, V) float32 -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probs, order = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
    # Keep a token if the mass before it is below top_p: the most likely one always stays.
    probs = probs * (probs.cumsum(-1) - probs < top_p)
    return order.gather(-1, torch.multinomial(probs, 1, generator=generator))


# ---------------------------------------------------------------------------- Meta's raw weights
# params.json + consolidated.00.pth ... NN.pth (model-parallel shards) + tokenizer.model.
#
# RoPE rotates pairs of rows of q and k. Meta keeps a pair side by side, Hugging Face half a head
# apart; the dot product q.k does not care, but `rotate` does, so the rows are reordered on reading:
#
#     Meta, one head, K = 6:      a0 b0 a1 b1 a2 b2      (K/2, 2)
#     here, as Hugging Face:      a0 a1 a2 b0 b1 b2      (2, K/2), its transpose

META = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}


def meta_name(name):
    """model.layers.3.self_attn.q_proj.weight -> layers.3.attention.wq.weight"""
    path = name.removeprefix("model.").removesuffix(".weight").split(".")
    prefix, rest = (path[:2], path[2:]) if path[0] == "layers" else ([], path)
    return ".".join([*prefix, META[".".join(rest)], "weight"])


def reorder(W, name, config, to_meta=False):
    """Rows of q and k between Meta's interleaved order and the split halves used here (a copy)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return W
    # The rows of a head are a table, (K/2, 2) in Meta's files and (2, K/2) here: transpose it.
    table = (2, -1) if to_meta else (-1, 2)
    heads = W.view(-1, config.head_dim, W.shape[1]).unflatten(1, table)
    return heads.transpose(1, 2).reshape(W.shape)


def find(ckpt):
    """The directory of a checkpoint: `ckpt` itself, or checkpoints/ckpt beside this file."""
    for directory in (Path(ckpt), Path(__file__).parent / "checkpoints" / ckpt):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(
        f"no checkpoint {ckpt}: neither {ckpt} nor checkpoints/{ckpt} is a directory; it should "
        "hold params.json, consolidated.00.pth (.01 ... if there are more) and tokenizer.model")


def ffn_dim(dim, multiple_of, multiplier=None):
    """Meta's rule for the feed-forward width: 2/3 of 4 dim, scaled, rounded up to a multiple."""
    width = int((multiplier or 1) * int(2 * 4 * dim / 3))
    return multiple_of * -(-width // multiple_of)


# The numbers in params.json, and the values by which it leaves one of them open.
INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
FLOATS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
OPEN = {"n_kv_heads": None, "vocab_size": -1, "max_seq_len": None, "ffn_dim_multiplier": None}


def read_config(directory, shards):
    """Config from params.json; what the file leaves open (vocab_size, tied) the tensors tell."""
    path = directory / "params.json"
    try:
        p = json.loads(path.read_text("utf-8"))
        p = {**OPEN, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 10000.0, **p}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: it comes with Meta's weights") from None
    except (TypeError, ValueError) as e:                 # not an object, not JSON, not UTF-8
        raise ValueError(f"{path}: not a LLaMA's params.json ({e})") from None
    for name in INTS + FLOATS:
        v, kind = p.get(name), "whole number" if name in INTS else "number"
        good = (type(v) is int or (type(v) is float and name in FLOATS)) and 0 < v < inf
        if not good and (name not in OPEN or v != OPEN[name]):
            raise ValueError(f"{path}: {name} is missing or not a {kind} above 0: {json.dumps(v)}")
    if unknown := {k: v for k, v in p.items() if v and k not in (*INTS, *FLOATS, "max_batch_size")}:
        raise ValueError(f"{path}: this model does not know {unknown}; it would compute something "
                         "else than the weights were trained for")
    rows, width = shards[0]["tok_embeddings.weight"].shape
    if (vocab := p["vocab_size"]) == -1:                 # Llama 1 and 2: "ask the tokenizer"
        vocab = rows if width != p["dim"] else rows * len(shards)
    c = Config(p["dim"], p["n_layers"], p["n_heads"], p["n_kv_heads"] or p["n_heads"], vocab,
               ffn_dim(p["dim"], p["multiple_of"], p["ffn_dim_multiplier"]), p["norm_eps"],
               p["rope_theta"], "output.weight" not in shards[0], p["max_seq_len"] or 0)
    if c.dim % c.n_heads or c.n_heads % c.n_kv_heads or c.head_dim % 2:
        raise ValueError(f"{path}: {c.dim} / {c.n_heads} heads / {c.n_kv_heads} kv heads do not "
                         "divide into heads of even width")
    return c


def read_shards(directory):
    """The tensors of consolidated.NN.pth, one dict per file, memory-mapped: nothing is read yet."""
    shards = []
    for i in range(max(1, len(list(directory.glob("consolidated.*.pth"))))):
        file = directory / f"consolidated.{i:02d}.pth"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        try:
            shard = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            shards.append({k: v for k, v in shard.items() if k != "rope.freqs"})
        except Exception as e:               # torch.load raises many kinds; all mean the same here
            reason = str(e).strip().partition("\n")[0][:120]
            raise ValueError(f"{file}: not a readable PyTorch file, perhaps truncated: download "
                             f"it again ({reason})") from None
        for name, W in shards[-1].items():
            if not (isinstance(W, torch.Tensor) and W.is_floating_point()):
                raise ValueError(f"{file}: {name} should be a tensor of floats, not "
                                 f"{getattr(W, 'dtype', type(W).__name__)}")
        if getattr(shards[-1].get("tok_embeddings.weight"), "ndim", 0) != 2:
            raise ValueError(f"{file}: tok_embeddings.weight is missing or not a matrix; this is "
                             "not a LLaMA in Meta's layout")
    return shards


def merge_shards(parts, shape, where):
    """One tensor of `shape` out of its model-parallel parts.

    Rows (dim 0) of wq wk wv w1 w3 output are split, columns (dim 1) of wo w2; tok_embeddings by
    columns in Llama 2, by rows in Llama 3; norms are copies. The shapes tell which: the split axis
    is the only one whose sizes add up.
    """
    merged, axis = parts[0], 0 if parts[0].shape[1:] == shape[1:] else 1
    if len(parts) > 1 and all(p.ndim == 2 and p.shape[1 - axis] == shape[1 - axis] for p in parts):
        merged = torch.cat(parts, axis)
    if merged.shape != shape:
        raise ValueError(f"{where}: expected shape {tuple(shape)}, found {tuple(merged.shape)} "
                         f"in {len(parts)} shard(s)")
    return merged


def default_device(device=None):
    """A torch.device that works here; None: the GPU if there is one, else the CPU."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=found).item()              # meta, which holds no numbers, fails too
    except Exception as e:          # of many kinds: no driver, no such index, a misspelling
        reason = str(e).strip().partition("\n")[0][:120]
        raise ValueError(f"{device or found} is not available here: {reason}") from None
    return found


def has_bfloat16(device):
    """Whether `device` is a GPU that computes in bfloat16 itself, without emulating it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def load(ckpt, device=None, dtype=None):
    """Read a LLaMA in Meta's raw layout.

    ckpt: a directory, or the name of one under checkpoints/. device: default the GPU if there is
    one. dtype: default bfloat16 on a GPU that has it, float32 on a CPU.
    The network is built without memory (on the meta device), then every tensor is read, merged,
    converted and moved by itself, so there is never a second copy of the model in memory.
    Raises FileNotFoundError or ValueError naming file, tensor, expected and found.
    """
    device = default_device(device)
    dtype = dtype or (torch.bfloat16 if has_bfloat16(device) else torch.float32)
    directory = find(ckpt)
    shards = read_shards(directory)
    with torch.device("meta"):
        net = Llama(read_config(directory, shards))
    names = {n: meta_name(n) for n, _ in net.named_parameters()}     # no lm_head if it is tied
    for i, shard in enumerate(shards):
        missing, extra = set(names.values()) - set(shard), set(shard) - set(names.values())
        if missing or extra:
            what = f"{len(missing)} missing" if missing else f"{len(extra)} unexpected"
            raise ValueError(f"{directory}/consolidated.{i:02d}.pth: {what} "
                             f"tensor(s), first {min(missing or extra, key=str)}")
    for name in tqdm(names, desc=f"load {directory.name}", unit="tensor", delay=1, leave=False):
        parts = [shard.pop(names[name]) for shard in shards]
        W = merge_shards(parts, net.get_parameter(name).shape, f"{directory}: {names[name]}")
        W = reorder(W, name, net.config).to(device, dtype)
        net.get_submodule(name.removesuffix(".weight")).weight = nn.Parameter(W)
    if net.config.tied:
        net.lm_head.weight = net.model.embed_tokens.weight
    return net


def save(net, directory):
    """Write `net` in Meta's raw layout: params.json and consolidated.00.pth, in its own dtype."""
    c, directory = net.config, Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rule = next(({"multiple_of": m} for m in (256, 128, 64, 32, 16, 8, 4, 2, 1)
                 if ffn_dim(c.dim, m) == c.ffn_dim),
                {"multiple_of": 1, "ffn_dim_multiplier": (c.ffn_dim + 0.5) / ffn_dim(c.dim, 1)})
    # Config's names are Meta's; max_seq_len is left out where it is not stated.
    params = {k: v for k, v in vars(c).items() if v and k not in ("ffn_dim", "tied")} | rule
    state = {meta_name(n): reorder(W.detach(), n, c, to_meta=True).cpu().contiguous()
             for n, W in net.named_parameters()}
    weights, numbers = directory / "consolidated.00.pth", directory / "params.json"
    tmp = {path: path.with_name(path.name + ".tmp") for path in (weights, numbers)}
    try:                     # temporary names first: an interruption never leaves half a checkpoint
        torch.save(state, tmp[weights])
        tmp[numbers].write_text(json.dumps(params, indent=2) + "\n")
        for path in tmp:
            os.replace(tmp[path], path)
    finally:
        for path in tmp.values():
            path.unlink(missing_ok=True)
    for stale in set(directory.glob("consolidated.*.pth")) - {weights}:   # an older one's shards
        stale.unlink()
