"""LLaMA in one file: the network, its KV cache, generation, reading and writing Meta's raw weights.

  embed_tokens -> n_layers x [x += self_attn(norm(x)), x += mlp(norm(x))] -> norm -> lm_head

Llama 1 to 3.2, Mistral, Qwen2 and their kin are this network with other numbers in `Config`.
Module and parameter names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), because
the paper's target modules, and every adapter on disk, use them. Meta's files name and order things
differently; `load` and `save` translate. Folders in Hugging Face's own layout are read by hf.py,
the one file that this one looks for, and only then. It knows nothing of PiSSA.

    net = model.load("llama2-7b")                        # a directory, or a name under checkpoints/
    logits = net(tokens)                                 # (B, T) int64 -> (B, T, V) float32
    ids = model.generate(net, [[1, 306, 4658]], max_new_tokens=64)

Shapes: B batch, T new positions, S all positions so far, P positions that are no padding, D width,
H heads, G key/value heads, K head width (mostly D / H), V vocabulary.
"""
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, pi
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

GROUPED = {"enable_gqa": True} if torch.__version__ >= "2.12" else {}     # 2.11 need not be told


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
    head_dim: int = 0              # width of one attention head, 0: dim / n_heads
    qkv_bias: bool = False         # Qwen2: q, k and v have biases
    sliding_window: int = 0        # Mistral v0.1: tokens one can see, itself included; 0: all
    rope_scaling: dict | None = None    # {"rope_type": "linear" or "llama3", "factor": ..., ...}

    def __post_init__(self):
        self.head_dim = self.head_dim or self.dim // self.n_heads


# ---------------------------------------------------------------------------------------- network

def rope_tables(config, positions):
    """cos and sin of position x frequency, each (B or 1, T, 1, K) float32 (arXiv 2104.09864).

    Twice K/2 angles, for the two of a pair; the sine of the first has a minus (see `rotate`).
    """
    k = torch.arange(0, config.head_dim, 2, device=positions.device)
    freqs = 1.0 / config.rope_theta ** (k.float() / config.head_dim)              # (K/2,)
    if scaling := config.rope_scaling:      # stretched, for contexts longer than the original one
        slow, keep = freqs / scaling["factor"], 0.0
        if scaling["rope_type"] == "llama3":      # the faster a pair turns, the more of it is kept
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            turns = scaling["original_max_position_embeddings"] * freqs / (2 * pi)
            keep = ((turns - low) / (high - low)).clamp(0, 1)
        freqs = keep * freqs + (1 - keep) * slow
    angles = positions[:, :, None, None].float() * freqs                          # (B, T, 1, K/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + K/2]) of every head, in float32. x: (B, T, H, K)."""
    if torch.compiler.is_compiling():
        return rotated(x, cos, sin)
    answering = torch.is_inference_mode_enabled()          # lengths and batches of all kinds
    return turn(x, cos, sin) if answering else Rotate.apply(x, cos, sin)


def rotated(x, cos, sin):
    """What `rotate` means, for a compiler."""
    y = x.float()                        # (a, b) -> (a cos - b sin, b cos + a sin); rolled, (b, a)
    return (y * cos + y.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def turn(x, cos, sin):
    """The same in as few steps as it takes without one."""
    (a, b), y = x.chunk(2, -1), torch.empty_like(x)
    for u, v, out, c, s in zip((a, b), (b, a), y.chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1)):
        torch.addcmul(u * c, v, s, out=out)
    return y


KERNEL, LARGE = [], 2**22            # `rotated`, compiled, or what takes its place; numbers in x


def turn_large(x, cos, sin):
    """The same in one kernel, compiled in a few seconds; `turn` where no compiler is at hand.

    A GPU that has much to turn takes a tenth of the time: all in all, a tenth of a step of 7B.
    """
    if not KERNEL:
        KERNEL.append(torch.compile(rotated))
    try:                     # whoever asks, compiled code finds the same state: it is compiled once
        with torch.autocast(x.device.type, enabled=False, cache_enabled=True):
            return KERNEL[0](x.detach(), cos, sin)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:                  # of many kinds: no triton, no C compiler, no headers
        reason = str(e).strip().partition("\n")[0][:120]
        warnings.warn(f"RoPE could not be compiled, and takes longer: {reason}")
        KERNEL[0] = turn
        return turn(x, cos, sin)


class Rotate(torch.autograd.Function):
    """`rotate`, whose gradient is rotated back, and needs nothing but the tables."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.turn = turn_large if x.numel() >= LARGE and has_bfloat16(x.device) else turn
        return ctx.turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ctx.turn(grad, cos, -sin), None, None


def unpack(x, real, B, T):
    """(1, H, P, K), of whose P positions `real` says where in B x T they are -> (B, H, T, K)."""
    cells = x.new_zeros(B * T, x.shape[1], x.shape[3])
    cells[real] = x.squeeze(0).transpose(0, 1)       # index_copy would keep what it copies
    return cells.unflatten(0, (B, T)).transpose(1, 2)


class Pack(torch.autograd.Function):
    """The way back: rows `real` of x (B T, D). Autograd would add up rows met twice: none is."""

    @staticmethod
    def forward(ctx, x, real):
        ctx.save_for_backward(real)
        ctx.n = len(x)
        return x.index_select(0, real)

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros(ctx.n, grad.shape[1]).index_copy_(0, *ctx.saved_tensors, grad), None


def attend(q, k, v, mask, causal):
    """Attention of H query heads to G key/value heads, (B, H or G, T or S, K) -> (B, T, H K)."""
    B, H, T, K = q.shape
    if not causal:           # SDPA's fast kernels take a mask or grouped heads, never both: so the
        q = q.reshape(B, k.shape[1], -1, K)               # H / G heads of a group become rows
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y.reshape(B, H, T, K).transpose(1, 2).reshape(B, T, -1)


def attend_packed(q, k, v, mask, causal, real, B, T, cu, window):
    """The same for B texts of at most T tokens in one row, (1, H or G, P, K) -> (1, P, H K).

    Each has its attention to itself. cu: (B + 1,) int32, where in the row they begin, if flash
    attention can take them as they are; None: `attend` gets each in a row of its own, padded.
    """
    if cu is None:
        y = attend(*(unpack(t, real, B, T) for t in (q, k, v)), mask, causal)     # (B, T, H K)
        return Pack.apply(y.flatten(0, 1), real)[None]
    from torch.nn.attention.varlen import varlen_attn       # takes a second, and only GPUs need it
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (q, k, v))                   # (P, H or G, K)
    y = varlen_attn(q, k, v, cu, cu, T, T, window_size=(window - 1, 0), **GROUPED)
    return y.flatten(1)[None]


def has_flash(net):
    """Whether flash attention is made for this network: on a GPU, in 16 bits, for such heads."""
    weight = net.lm_head.weight
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else weight.dtype
    return has_bfloat16(weight.device) and fits_flash(dtype, net.config)


def fits_flash(dtype, config):
    """Whether the numbers and the heads are such as flash attention takes."""
    return dtype.itemsize == 2 and config.head_dim % 8 == 0 and config.head_dim <= 256


class Attention(nn.Module):
    """Causal grouped-query attention: H query heads share G key/value heads."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.q_proj = nn.Linear(config.dim, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.dim, bias=False)

    def forward(self, x, rope, mask, causal, cache, packed):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim)                          # (B, T, H, K)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))           # k, v: G heads
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, *rope), rotate(k, *rope), v))
        if cache is not None:                    # write to the cache, attend to what it holds now
            kv, index, seen = cache
            k = kv[0].index_copy_(2, index, k)[:, :, :seen]                       # (B, G, S, K)
            v = kv[1].index_copy_(2, index, v)[:, :, :seen]
        y = (attend(q, k, v, mask, causal) if packed is None
             else attend_packed(q, k, v, mask, causal, *packed))
        return self.o_proj(y)                                                     # (B, T, D)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Backward takes silu(gate) anew, which is quick, and so it is not kept."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up               # in place, torch 2.11 compiles it without a gradient

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Layer(nn.Module):
    """Attention and feed-forward, each RMS-normalised first (arXiv 1910.07467) and added back."""

    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, rope, mask=None, causal=True, cache=None, packed=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, causal, cache, packed)
        return x + self.mlp(self.post_attention_layernorm(x))


class Recompute(torch.autograd.Function):
    """layer(x, *rest), which keeps nothing but x: backward computes the layer again.

    trained: its parameters that want a gradient; hooks on them would be called twice.
    torch.utils.checkpoint does the same for anything, and as it should be with hooks, but its own
    ones on every tensor kept take Python longer than a GPU needs for a layer.
    """

    @staticmethod
    def forward(ctx, x, layer, rest, *trained):
        ctx.layer, ctx.rest, kind = layer, rest, x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind),
                        torch.is_autocast_enabled(kind), False)
        ctx.save_for_backward(x, *trained)
        with torch.autocast(*ctx.autocast):         # keeps no copies of weights, each is used once
            return layer(x, *rest)

    @staticmethod
    def backward(ctx, grad):
        x, *trained = ctx.saved_tensors
        x, last = x.detach().requires_grad_(ctx.needs_input_grad[0]), ctx.layer.mlp.down_proj
        try:
            last.unread = True           # y's numbers are in nobody's gradient: PissaLinear knows
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                y = ctx.layer(x, *ctx.rest)
        finally:
            last.unread = False
        wanted = [t for t in (x, *trained) if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        dx, *grads = (next(found) if t.requires_grad else None for t in (x, *trained))
        return dx, None, None, *grads


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

    def hidden(self, tokens, *, cache=None, start=0, pad=None, real=None):
        """Final hidden states, (B, T) int64 -> (B, T, D); `lm_head` turns them into logits.

        cache: from `new_cache`; `tokens` then are positions start ... start + T - 1 of it. start
        may be an int64 tensor (1,) on the device: nothing then depends on its value but numbers.
        pad: (B,) int64, how many positions at the left of each row are padding, not text.
        real: (P,) int64, without a cache: which of the B T positions, counted row by row, are text,
        ascending; the rest, at the right of each row, is padding. The P are packed into one row,
        (1, P, D) is returned, and nothing is computed for padding, but for attention where
        `has_flash` says no. Numbers are those of the same positions without it.
        """
        T, window, fixed = tokens.shape[1], self.config.sliding_window, type(start) is not int
        index = start + torch.arange(T, device=tokens.device)                     # (T,)
        seen = cache[0].shape[3] if fixed else start + T                          # S
        mask, positions = None, index[None]                                       # (1, T)
        flash = real is not None and has_flash(self)
        if pad is not None or fixed or start and T > 1 or 0 < window < seen and not flash:
            key, query = torch.arange(seen, device=tokens.device), index[:, None]
            mask = (key <= query)[None]                                           # (1, T, S)
            if window:
                mask = mask & (key > query - window)
            if pad is not None:      # a padding position sees itself, or its softmax would be 0/0
                mask = mask & (key >= pad[:, None, None]) | (key == query)        # (B, T, S)
                positions = (index - pad[:, None]).clamp(min=0)                   # (B, T)
        if mask is not None:    # as numbers to add, once for all layers; a row for each query head
            mask = torch.zeros_like(mask, dtype=self.lm_head.weight.dtype).masked_fill(~mask, -inf)
            mask = mask.repeat(1, self.config.n_heads // self.config.n_kv_heads, 1)[:, None]
        rope, causal = rope_tables(self.config, positions), mask is None and start == 0
        packed = None
        if real is not None:
            cu = None if not flash else torch.searchsorted(                           # (B + 1,)
                real, torch.arange(0, tokens.numel() + 1, T, device=tokens.device), out_int32=True)
            packed = real, *tokens.shape, cu, window
            rope = [table[:, real % T] for table in rope]                         # (1, P, 1, K)
            tokens = tokens.flatten()[real][None]                                 # (1, P)
        x = self.model.embed_tokens(tokens)                                       # (B, T, D)
        for i, layer in enumerate(self.model.layers):
            rest = rope, mask, causal, cache and (cache[i], index, seen), packed
            if self.checkpointing and torch.is_grad_enabled():
                trained = [p for p in layer.parameters() if p.requires_grad]
                x = Recompute.apply(x, layer, rest, *trained)
            else:
                x = layer(x, *rest)
        return self.model.norm(x)

    def forward(self, tokens, **kwargs):
        """Logits, (B, T) int64 -> (B, T, V) float32. Keyword arguments as in `hidden`."""
        return self.lm_head(self.hidden(tokens, **kwargs)).float()

    def new_cache(self, batch, length):
        """An empty KV cache: per layer keys and values, each (batch, G, >= length, K)."""
        c, w = self.config, self.model.embed_tokens.weight
        length = -(-length // 64) * 64                     # aligned, as attention with a mask likes
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
def generate(net, prompts, max_new_tokens=64, *, temperature=0.0, top_k=0, top_p=1.0, eos=(),
             stop=None, seed=0):
    """Continue token lists; returns the new ids of each, without the EOS that ended it.

    prompts: non-empty lists of ids, of any lengths: one batch, padded on the left.
    temperature 0 is greedy; otherwise sample from softmax(logits / temperature), restricted to the
    top_k most likely tokens (0: all), and of these to the smallest set whose probability reaches
    top_p (Holtzman et al., arXiv 1904.09751). eos: an id, or several: each ends a row.
    stop: a function of a row's new ids, asked after each of them; True ends the row.
    """
    assert prompts and all(prompts), "every prompt needs at least one token (the BOS)"
    if not 0 <= temperature < inf:
        raise ValueError(f"temperature should be 0 (greedy) or a number above 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p should be above 0 and at most 1, not {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k should be 0 (all tokens) or more, not {top_k}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens should be at least 1, not {max_new_tokens}")
    device, ends = net.lm_head.weight.device, {eos} if isinstance(eos, int) else set(eos or ())
    generator = torch.Generator(device).manual_seed(seed)
    T, B = max(map(len, prompts)), len(prompts)
    pad = torch.tensor([T - len(p) for p in prompts], device=device)
    tokens = torch.tensor([[p[0]] * (T - len(p)) + p for p in prompts], device=device)  # (B, T)
    pad = pad if pad.any() else None
    cache, out, live = net.new_cache(B, T + max_new_tokens), [[] for _ in prompts], set(range(B))
    logits = net.lm_head(net.hidden(tokens, cache=cache, pad=pad)[:, -1]).float()       # (B, V)
    step = decoder(net, cache, pad)
    for i in range(max_new_tokens):
        logits = step(tokens, T + i - 1) if i else logits
        tokens = sample(logits, temperature, top_k, top_p, generator)             # (B, 1)
        for b, t in enumerate(tokens[:, 0].tolist()):
            if b in live and t not in ends:
                out[b].append(t)
            if t in ends or b in live and stop and stop(out[b]):
                live.discard(b)
        if not live:
            break
    return out


def decoder(net, cache, pad):
    """step(tokens (B, 1), start) -> logits (B, V) float32 of one new token per row.

    A step is hundreds of small kernels, and a GPU runs them faster than Python can launch them:
    there, they are recorded once as a CUDA graph, which every later step replays as a whole.
    """
    def step(tokens, start):
        return net.lm_head(net.hidden(tokens, cache=cache, start=start, pad=pad)[:, -1]).float()

    device = net.lm_head.weight.device
    if device.type != "cuda":
        return step
    tokens = torch.zeros(cache[0].shape[1], 1, dtype=torch.int64, device=device)
    # A graph reads and writes fixed addresses. What recording writes is the cache's last position,
    # which is either overwritten by its own token or never reached.
    start = torch.full((1,), cache[0].shape[3] - 1, device=device)
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):            # once before: libraries allocate their workspaces
        step(tokens, start)
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        logits = step(tokens, start)

    def replay(new, position):
        tokens.copy_(new)
        start.fill_(position)
        graph.replay()
        return logits

    return replay


def sample(logits, temperature, top_k, top_p, generator):
    """One token per row, (B, V) float32 -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = logits.sort(-1, descending=True)
    logits = (logits - logits[:, :1]) / max(temperature, 1e-6)           # at most 0: no overflow
    if top_k:
        logits[:, top_k:] = -inf
    probs = torch.softmax(logits, -1)
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
    here = Path(__file__).parent
    for directory in (Path(ckpt), here / "checkpoints" / ckpt, here / ckpt):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(
        f"no checkpoint {ckpt}: neither {ckpt} nor checkpoints/{ckpt} is a directory; it should "
        "hold params.json, consolidated.00.pth (.01 ... if there are more) and tokenizer.model, or "
        "config.json, model.safetensors and tokenizer.json")


def ffn_dim(dim, multiple_of, multiplier=None):
    """Meta's rule for the feed-forward width: 2/3 of 4 dim, scaled, rounded up to a multiple."""
    width = int((multiplier or 1) * int(2 * 4 * dim / 3))
    return multiple_of * -(-width // multiple_of)


# What a checkpoint's weights and numbers may be called, in either layout.
WEIGHTS = ("params.json", "consolidated.[0-9][0-9].pth", "config.json",
           "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")

# The numbers in params.json, and the values by which it leaves one of them open.
INTS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len")
FLOATS = ("ffn_dim_multiplier", "norm_eps", "rope_theta")
OPEN = {"n_kv_heads": None, "vocab_size": -1, "max_seq_len": None, "ffn_dim_multiplier": None}
# Llama 3.1's stretched RoPE, which params.json only switches on.
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
REMAP = 1 << 27               # bytes read until a file is mapped anew
ROPE_KEYS = {"factor": "rope_scaling_factor", "high_freq_factor": "rope_high_freq_factor"}


def read_config(directory, shards):
    """Config from params.json; what the file leaves open (vocab_size, tied) the tensors tell."""
    path = directory / "params.json"
    try:
        p = json.loads(path.read_text("utf-8"))
        p = {**OPEN, "multiple_of": 256, "norm_eps": 1e-5, "rope_theta": 10000.0, **p}
        rope = {k: p.pop(name, None) for k, name in ROPE_KEYS.items()}
        scaled = p.pop("use_scaled_rope", False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: it comes with Meta's weights") from None
    except (TypeError, ValueError) as e:                 # not an object, not JSON, not UTF-8
        raise ValueError(f"{path}: not a LLaMA's params.json ({e})") from None
    for name in INTS + FLOATS:
        if name not in OPEN or p[name] != OPEN[name]:
            check_number(p.get(name), name, path, whole=name in INTS)
    if unknown := {k: v for k, v in p.items() if v and k not in (*INTS, *FLOATS, "max_batch_size")}:
        raise ValueError(f"{path}: this model does not know {unknown}; it would compute something "
                         "else than the weights were trained for")
    rows, width = shards[0]["tok_embeddings.weight"].shape
    if (vocab := p["vocab_size"]) == -1:                 # Llama 1 and 2: "ask the tokenizer"
        vocab = rows if width != p["dim"] else rows * len(shards)
    if scaled:           # Meta's files leave out the factor: 8 in Llama 3.1, 32 in 3.2 (1B and 3B)
        given = {k: v for k, v in rope.items() if v is not None}
        for k, v in given.items():
            check_number(v, ROPE_KEYS[k], path)
        scaled = {**LLAMA3_ROPE, "factor": 32.0 if p["dim"] in (2048, 3072) else 8.0, **given}
    c = Config(p["dim"], p["n_layers"], p["n_heads"], p["n_kv_heads"] or p["n_heads"], vocab,
               ffn_dim(p["dim"], p["multiple_of"], p["ffn_dim_multiplier"]), p["norm_eps"],
               p["rope_theta"], "output.weight" not in shards[0], p["max_seq_len"] or 0,
               rope_scaling=scaled or None)
    return check_heads(c, path)


def check_number(v, name, path, whole=False):
    """ValueError unless v is a number above 0; one that no model has would only fill memory."""
    good = type(v) is int or type(v) is float and not whole
    if not good or not 0 < v < (2**30 if whole else 2**63):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{path}: {name} is missing or not a {kind} above 0: {json.dumps(v)}")


def check_heads(c, path, any_width=False):
    """The Config, if its heads fit; any_width: they need not add up to the network's."""
    if (c.n_heads % c.n_kv_heads or c.head_dim % 2 or not c.head_dim
            or not any_width and c.head_dim * c.n_heads != c.dim):
        raise ValueError(f"{path}: {c.dim} / {c.n_heads} heads / {c.n_kv_heads} kv heads do not "
                         "divide into heads of even width")
    return c


def mapped(path):
    """What torch.save wrote, memory-mapped; files of before torch 1.6 are no zip, and are read."""
    mmap = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_shards(directory):
    """The tensors of consolidated.NN.pth, one dict per file, memory-mapped: nothing is read yet."""
    shards = []
    for i in range(max(1, len(list(directory.glob("consolidated.*.pth"))))):
        file = directory / f"consolidated.{i:02d}.pth"
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing")
        try:
            shard = mapped(file)
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


def parameter_shapes(config, tensors, where):
    """{parameter name: shape} of the network that `config` describes, which has `tensors` files."""
    if config.n_layers > tensors:                       # before a billion layers are constructed
        raise ValueError(f"{where}: {config.n_layers} layers, but only {tensors} tensors")
    with torch.device("meta"):
        return {n: p.shape for n, p in Llama(config).named_parameters()}


def check_names(found, expected, where):
    """ValueError unless a file holds just the tensors that it should."""
    expected, found = set(expected), set(found)
    missing, extra = expected - found, found - expected
    if missing or extra:
        what = f"{len(missing)} missing" if missing else f"{len(extra)} unexpected"
        raise ValueError(f"{where}: {what} tensor(s), first {min(missing or extra, key=str)}")


def open_meta(directory):
    """(config, {parameter name: function that reads it}) of Meta's layout; nothing is read yet."""
    shards = read_shards(directory)
    config = read_config(directory, shards)
    shapes = parameter_shapes(config, len(shards[0]), directory / "params.json")
    for i, shard in enumerate(shards):
        check_names(shard, map(meta_name, shapes), f"{directory}/consolidated.{i:02d}.pth")

    ahead = REMAP if all(map(zipfile.is_zipfile, directory.glob("consolidated.*.pth"))) else inf

    def read(name):
        nonlocal shards, ahead
        if ahead < 0:        # pages that were read count as ours as long as the mapping exists
            shards, ahead = read_shards(directory), REMAP
        parts = [shard[meta_name(name)] for shard in shards]
        ahead -= sum(part.nbytes for part in parts)
        W = merge_shards(parts, shapes[name], f"{directory}: {meta_name(name)}")
        return reorder(W, name, config)

    return config, {name: partial(read, name) for name in shapes}         # no lm_head if it is tied


def open_checkpoint(ckpt):
    """(config, {parameter name: function that reads it}) of a checkpoint in either layout."""
    directory = find(ckpt)
    if not (directory / "config.json").is_file():
        return open_meta(directory)
    from hf import open_folder                            # Hugging Face's layout has its own file
    return open_folder(directory)


def load(ckpt, device=None, dtype=None, prepare=None):
    """Read a LLaMA in Meta's raw layout or in Hugging Face's.

    ckpt: a directory, or the name of one under checkpoints/. device: default the GPU if there is
    one. dtype: default bfloat16 on a GPU that has it, float32 on a CPU.
    The network is built without memory (on the meta device), then every tensor is read, merged,
    converted and moved by itself, so there is never a second copy of the model in memory.
    prepare: a function called as prepare(net, weight=...) before anything is read; weight(name)
    reads the matrix of one linear layer. Layers that it replaces are not read again: a network that
    it shrinks, say partial(pissa.inject, rank=64, method="qpissa"), is never whole in memory.
    Raises FileNotFoundError or ValueError naming file, tensor, expected and found.
    """
    device = default_device(device)
    dtype = dtype or (torch.bfloat16 if has_bfloat16(device) else torch.float32)
    config, tensors = open_checkpoint(ckpt)
    with torch.device("meta"):
        net = Llama(config)

    def weight(name):
        tied = config.tied and name == "lm_head"
        return tensors[f"{'model.embed_tokens' if tied else name}.weight"]().to(device, dtype)

    if prepare:
        prepare(net, read=weight)
    bar = tqdm(tensors, desc=f"load {find(ckpt).name}", unit="tensor", delay=1, leave=False)
    for name in bar:
        module, _, leaf = name.rpartition(".")
        module = net.get_submodule(module)
        here = getattr(module, leaf)
        if getattr(here, "is_meta", False):
            setattr(module, leaf, nn.Parameter(tensors[name]().to(device, dtype),
                                               requires_grad=here.requires_grad))
    if config.tied and getattr(net.lm_head.weight, "is_meta", False):
        net.lm_head.weight = net.model.embed_tokens.weight
    return net


@contextmanager
def replaced(directory, patterns=WEIGHTS):
    """`with replaced(directory) as tmp:` write files to tmp; they move to `directory` in the end.

    An interruption while they are written leaves what was there. Afterwards, what was there of
    another checkpoint, in either layout, goes: the files whose names match `patterns`.
    """
    directory = Path(directory)
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        yield tmp
        names = {file.name for file in tmp.iterdir()}
        stale = {file for pattern in patterns for file in directory.glob(pattern)}
        for name in names:
            os.replace(tmp / name, directory / name)
        for file in stale:
            if file.name not in names and file.is_file():
                file.unlink()
        new = False
    finally:
        shutil.rmtree(tmp)
        if new and not any(directory.iterdir()):              # nothing came of it: leave no trace
            directory.rmdir()


def save(net, directory):
    """Write `net` in Meta's raw layout: params.json and consolidated.00.pth, in its own dtype.

    A checkpoint that is there already, in either layout, is replaced (see WEIGHTS).
    """
    save_meta(directory, net.config, net.named_parameters())


def save_meta(directory, config, tensors):
    """Write (name, tensor) pairs in Meta's raw layout, for whose params.json see `meta_params`."""
    params = meta_params(config)
    state = {meta_name(n): reorder(W.detach(), n, config, to_meta=True).cpu().contiguous()
             for n, W in tensors}
    with replaced(directory) as tmp:
        try:
            torch.save(state, tmp / "consolidated.00.pth")
        except RuntimeError as e:            # which is what a full disk is to torch.save
            reason = str(e).partition("\n")[0]
            raise OSError(f"{directory}: not written, is the disk full? ({reason})") from None
        (tmp / "params.json").write_text(json.dumps(params, indent=2) + "\n")


def meta_params(c):
    """params.json of a Config; ValueError for what Meta's layout cannot say."""
    rope, scaled = {}, c.rope_scaling
    if scaled and scaled["rope_type"] == "llama3":
        rope = {"use_scaled_rope": True, **{name: scaled[k] for k, name in ROPE_KEYS.items()}}
    fixed = [k for k in LLAMA3_ROPE if k not in ROPE_KEYS]
    for what, wrong in {"biases": c.qkv_bias, "a sliding window": c.sliding_window,
                        "heads of this width": c.head_dim * c.n_heads != c.dim,
                        "this RoPE scaling": scaled and any(scaled.get(k) != LLAMA3_ROPE[k]
                                                            for k in fixed)}.items():
        if wrong:
            raise ValueError(f"Meta's layout has no place for {what}: write Hugging Face's (hf)")
    rule = next(({"multiple_of": m} for m in (256, 128, 64, 32, 16, 8, 4, 2, 1)
                 if ffn_dim(c.dim, m) == c.ffn_dim),
                {"multiple_of": 1, "ffn_dim_multiplier": (c.ffn_dim + 0.5) / ffn_dim(c.dim, 1)})
    # Config's names are Meta's. max_seq_len is left out where it is not stated.
    named = {k: v for k, v in vars(c).items() if v and k in INTS + FLOATS}
    return {**named, **rope, **rule}
