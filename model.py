# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""LLaMA in one file: the network, its KV cache, generation, and reading Meta's raw weights.

  embed_tokens -> n_layers x [x += self_attn(norm(x)), x += mlp(norm(x))] -> norm -> lm_head

Llama 1 to 3.2, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 1 and their kin are this network with other
numbers in `Config`.
Module and parameter names are Hugging Face's (`model.layers.0.self_attn.q_proj.weight`), because
the paper's target modules and every adapter on disk use them. `@faster(f)` names a quicker form of
the function below it. Delete these lines and the two that import fast.py: only speed changes.

    net = model.load("llama2-7b")                        # a directory, or a name under checkpoints/
    logits = net(tokens)                                 # (B, T) int64 -> (B, T, V) float32
    ids = model.generate(net, [[1, 306, 4658]], max_new_tokens=64)

Shapes: B batch, T new positions, S all positions so far, P positions without padding, D width,
H heads, G key/value heads, K head width (mostly D / H), V vocabulary.
"""
from dataclasses import dataclass
from functools import partial
from math import inf, pi
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fast
from fast import faster
from formats import find, meta


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
    max_seq_len: int = 0           # positions it was trained for, 0: not stated; not used here
    head_dim: int = 0              # width of one attention head, 0: dim / n_heads
    qkv_bias: bool = False         # Qwen2: q, k and v have biases
    o_bias: bool = False           # the projection after attention has one, too
    qk_norm: bool = False          # Qwen3: every head of q and k is RMS-normalised
    no_rope: int = 0               # SmolLM3: 4, every 4th layer has no RoPE; 0: all have it
    gelu: bool = False             # Gemma: the gate is GELU (by tanh) instead of SiLU
    embed_scale: float = 0.0       # Gemma: sqrt(dim), times every embedding; 0: none
    sliding_window: int = 0        # Mistral v0.1: how many tokens one sees; 0: all
    rope_scaling: dict | None = None    # {"rope_type": "linear" or "llama3", "factor": ..., ...}

    def __post_init__(self):
        self.head_dim = self.head_dim or self.dim // self.n_heads


def rope_tables(config, positions):
    """cos and sin of position x frequency, each (B or 1, T, 1, K) float32 (arXiv 2104.09864).

    [cos, cos] and [-sin, sin]: a half for each member of a pair, with the sign `rotate` needs.
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


@faster(fast.rotate)
def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + K/2]) of every head, in float32. x: (B, T, H, K)."""
    y = x.float()                        # (a, b) -> (a cos - b sin, b cos + a sin); rolled: (b, a)
    return torch.addcmul(y * cos, y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


@faster(fast.attend, compiled=True)
def attend(q, k, v, mask):
    """Attention of H query heads to G key/value heads, (B, H or G, T or S, K) -> (B, T, H K).

    mask: (B or 1, 1, T, S), numbers to add to the scores. None is for T = S, then it is causal, and
    for one new position, T = 1, which sees all S.
    """
    causal = True if mask is None and q.shape[2] > 1 else False   # a bool, even in torch.compile
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal,
                                       enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Causal grouped-query attention: H query heads share G key/value heads. i: the layer's."""

    def __init__(self, config, i):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.q_proj = nn.Linear(config.dim, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.dim, bias=config.o_bias)
        self.has_rope = not config.no_rope or (i + 1) % config.no_rope > 0
        norm = nn.RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(config.head_dim, config.norm_eps) for _ in "qk")

    def forward(self, x, rope, mask=None, slot=None, packed=None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.head_dim)                          # (B, T, H, K)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))           # k, v: G heads
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)    # autocast: float32
        if self.has_rope:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                          # (B, H, T, K)
        if slot is not None:                # a KV cache: write to it, attend to what it holds now
            kv, index, S = slot
            k = kv[0].index_copy_(2, index, k.to(kv.dtype))[:, :, :S].to(q.dtype)  # (B, G, S, K)
            v = kv[1].index_copy_(2, index, v.to(kv.dtype))[:, :, :S].to(q.dtype)
        y = (attend(q, k, v, mask) if packed is None                # packed: see `attend_packed`
             else attend_packed(q, k, v, mask, *packed))                  # (B, T, H K)
        return self.o_proj(y)                                                     # (B, T, D)


@faster(fast.swiglu)
def swiglu(gate, up, gelu=False):
    """silu(gate) * up, where silu(g) = g sigmoid(g), or gelu(gate) * up (arXiv 2002.05202)."""
    return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.gelu = config.gelu

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.gelu))


class Layer(nn.Module):
    """Attention and feed-forward, each RMS-normalised first (arXiv 1910.07467) and added back."""

    def __init__(self, config, i):
        super().__init__()
        self.self_attn, self.mlp = Attention(config, i), MLP(config)
        self.input_layernorm = nn.RMSNorm(config.dim, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, rope, mask=None, slot=None, packed=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, slot, packed)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The whole network. `checkpointing = True` recomputes every layer in backward: less memory."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.dim),
            layers=nn.ModuleList(Layer(config, i) for i in range(config.n_layers)),
            norm=nn.RMSNorm(config.dim, config.norm_eps)))
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens, *, cache=None, start=0, pad=None, where_text=None):
        """Final hidden states, (B, T) int64 -> (B, T, D); `lm_head` turns them into logits.

        cache: from `new_cache`. Then `tokens` are the positions start ... start + T - 1 of it.
        pad: (B,) int64, how many positions at the left of each row are padding, not text.
        where_text: (P,) int64, ascending indices into tokens.flatten() of what is text; not with
        cache or pad. The rest, at the right of rows, is left out: the result is (1, P, D).
        """
        tokens, rope, mask, slots, packed = begin(self, tokens, cache, start, pad, where_text)
        x = self.model.embed_tokens(tokens)                                       # (B, T, D)
        if scale := self.config.embed_scale:         # rounded as x is: 55.5 for 3072 ** 0.5
            x = x * x.new_full((), scale)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer, slot in zip(self.model.layers, slots, strict=True):
            rest = rope, mask, slot, packed
            x = checkpointed(layer, x, *rest) if recompute else layer(x, *rest)
        return self.model.norm(x)

    def forward(self, tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        """Logits, (B, T) int64 -> (B, T, V) float32. Keyword arguments as in `hidden`."""
        return self.lm_head(self.hidden(tokens, **kwargs)).float()

    def new_cache(self, batch, length):
        """An empty KV cache: for each layer (2, batch, G, >= length, K), keys and values."""
        c, w = self.config, self.model.embed_tokens.weight
        shape = 2, batch, c.n_kv_heads, -(-length // 64) * 64, c.head_dim  # aligned: masks are fast
        return [torch.zeros(shape, dtype=w.dtype, device=w.device) for _ in range(c.n_layers)]


def begin(net, tokens, cache, start, pad, where_text):
    """Skip this on first reading. What the layers need: (tokens, rope, mask, slots, packed).

    mask: (B or 1, 1, T, S), 0 or -inf; None if causal attention is enough. start: an int, or an
    int64 tensor (1,) on the device. No shape then depends on its value, as a CUDA graph requires.
    slots: of each layer None, or (its cache, positions to write, S). packed: for `attend_packed`.
    """
    (B, T), device, window = tokens.shape, tokens.device, net.config.sliding_window
    index, fixed = start + torch.arange(T, device=device), type(start) is not int      # (T,)
    S = cache[0].shape[3] if fixed else start + T
    mask, positions, packed = None, index[None], None                             # (1, T)
    if pad is not None or fixed or start and T > 1 or 0 < window < S:
        key, query = torch.arange(S, device=device), index[:, None]
        mask = (key <= query)[None, None]                                         # (1, 1, T, S)
        if window:
            mask = mask & (key > query - window)
        if pad is not None:         # a padding position sees itself, or its softmax would be 0/0
            mask = mask & (key >= pad[:, None, None, None]) | (key == query)      # (B, 1, T, S)
            positions = (index - pad[:, None]).clamp(min=0)                       # (B, T)
        mask = torch.zeros_like(mask, dtype=net.lm_head.weight.dtype).masked_fill(~mask, -inf)
    rope = rope_tables(net.config, positions)
    if where_text is not None:
        starts = torch.searchsorted(where_text, torch.arange(0, B * T + 1, T, device=device),
                                    out_int32=True)
        packed = where_text, starts, B, T, window
        rope = [table[:, where_text % T] for table in rope]                       # (1, P, 1, K)
        tokens = tokens.flatten()[where_text][None]                               # (1, P)
    slots = [None] * net.config.n_layers if cache is None else [(kv, index, S) for kv in cache]
    return tokens, rope, mask, slots, packed


@faster(fast.attend_packed, compiled=True)
def attend_packed(q, k, v, mask, where_text, starts, B, T, window):
    """Attention of B texts of at most T tokens, packed into one row: each sees only itself.

    q (1, H, P, K), k and v (1, G, P, K) -> (1, P, H K). Here each gets a row of its own again.
    starts: (B + 1,) int32, where texts begin among the P, and P. The fast form needs it and window.
    """
    def unpacked(x):                                           # position i goes to where_text[i]
        cells = x.new_zeros(B * T, x.shape[1], x.shape[3])
        cells[where_text] = x.squeeze(0).transpose(0, 1)      # (index_copy would keep its source)
        return cells.unflatten(0, (B, T)).transpose(1, 2)                         # (B, H, T, K)

    y = attend(unpacked(q), unpacked(k), unpacked(v), mask)                       # (B, T, H K)
    return rows(y.flatten(0, 1), where_text)[None]


@faster(fast.Rows.apply, compiled=True)
def rows(x, index):
    """The rows `index` of x, (N, D) -> (P, D). No index occurs twice."""
    return x[index]


@faster(fast.recompute)
def checkpointed(layer, x, *rest):
    """layer(x, *rest), of which only x is kept: backward computes the layer again."""
    return torch.utils.checkpoint.checkpoint(layer, x, *rest, use_reentrant=False,
                                             preserve_rng_state=False)


def init_weights(net, seed=0, std=0.02):
    """Draw every matrix from N(0, std^2), in place: to train from scratch and for benchmarks."""
    generator = torch.Generator(net.lm_head.weight.device).manual_seed(seed)
    for p in (p for p in net.parameters() if p.ndim > 1):
        nn.init.normal_(p, std=std, generator=generator)
    return net


# ------------------------------------------------------------------------------------- generation

@torch.inference_mode()
def generate(net: Llama, prompts: list[list[int]], max_new_tokens: int = 64, *, temperature=0.0,
             top_k=0, top_p=1.0, eos=(), stop=None, seed=0, bar_after=2) -> list[list[int]]:
    """Continue token lists; returns the new ids of each, without the EOS that ended it.

    prompts: non-empty lists of ids, of any lengths: one batch, padded on the left.
    temperature 0 is greedy; otherwise sample from softmax(logits / temperature), restricted to the
    top_k most likely tokens (0: all), and of these to the smallest set whose probability reaches
    top_p (Holtzman et al., arXiv 1904.09751). eos: an id, or several: each ends a row.
    stop: a function of a row's new ids, asked after each; True ends the row. bar_after: seconds.
    """
    assert prompts and all(prompts), "every prompt needs at least one token (the BOS)"
    for name, value, good, expected in (
            ("temperature", temperature, 0 <= temperature < inf, "0 (greedy) or a number above 0"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("top_k", top_k, top_k >= 0, "0 (all tokens) or more"),
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1")):
        if not good:
            raise ValueError(f"{name} should be {expected}, not {value}")
    device, ends = net.lm_head.weight.device, {eos} if isinstance(eos, int) else set(eos or ())
    generator = torch.Generator(device).manual_seed(seed)
    T, B = max(map(len, prompts)), len(prompts)
    left = [T - len(p) for p in prompts]                                     # padding of each row
    tokens = torch.tensor([p[:1] * (T - len(p)) + p for p in prompts], device=device)    # (B, T)
    pad = torch.tensor(left, device=device) if any(left) else None
    cache, out, live = net.new_cache(B, T + max_new_tokens), [[] for _ in prompts], set(range(B))

    def step(tokens, start):                     # what follows position start + T - 1: (B, V)
        return net.lm_head(net.hidden(tokens, cache=cache, start=start, pad=pad)[:, -1]).float()

    logits = step(tokens, 0)
    step = recorded(step, tokens[:, :1], cache[0].shape[3] - 1)
    for i in tqdm(range(max_new_tokens), "generate", unit="token", delay=bar_after, leave=False):
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


@faster(fast.record)
def recorded(step, tokens, last):
    """`step` itself. tokens, last: see the fast form, which records a step as a CUDA graph."""
    return step


def sample(logits: torch.Tensor, temperature, top_k, top_p, generator) -> torch.Tensor:
    """One token per row, (B, V) float32 -> (B, 1) int64."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = logits.sort(-1, descending=True)
    logits = (logits - logits[:, :1]) / max(temperature, 1e-6)           # at most 0: no overflow
    if top_k:
        logits[:, top_k:] = -inf
    probs = torch.softmax(logits, -1)
    # Keep a token if the mass before it, up to rounding, is below top_p: the first always stays.
    if top_p < 1:
        probs = probs * (probs.cumsum(-1) - probs < max(top_p - 1e-6, 1e-9))
    return order.gather(-1, torch.multinomial(probs, 1, generator=generator))


# ---------------------------------------------------------------------------- Meta's raw weights
# RoPE rotates pairs of rows of q and k. Meta keeps a pair side by side, Hugging Face half a head
# apart. The dot product q.k is the same in both orders. `rotate` expects the second one, so rows
# are reordered on reading:
#     Meta, one head, K = 6:      a0 b0 a1 b1 a2 b2      (K/2, 2)
#     here, as Hugging Face:      a0 a1 a2 b0 b1 b2      (2, K/2), its transpose

def reorder(W, name, config, to_meta=False):
    """Rows of q and k between Meta's interleaved order and the split halves used here (a copy)."""
    if name.split(".")[-2] not in ("q_proj", "k_proj"):
        return W
    heads = W.view(-1, config.head_dim, *W.shape[1:]).unflatten(1, (2, -1) if to_meta else (-1, 2))
    return heads.transpose(1, 2).reshape(W.shape)


def parameter_shapes(config, tensors, where):
    """{parameter name: shape} of the network that `config` describes, which has `tensors` files."""
    if config.n_layers > tensors:                       # before a billion layers are constructed
        raise ValueError(f"{where}: {config.n_layers} layers, but only {tensors} tensors")
    with torch.device("meta"):
        return {n: p.shape for n, p in Llama(config).named_parameters()}


def open_checkpoint(ckpt):
    """(config, {parameter name: function that reads it}) of a checkpoint; nothing is read yet."""
    directory = find(ckpt)
    if (path := directory / "config.json").is_file():
        from formats import hf  # only Hugging Face's layout needs it
        config, found = Config(**hf.read_config(path)), hf.open_files(directory)
        shapes = parameter_shapes(config, len(found), path)
        return config, hf.checked(found, shapes, vars(config), directory)
    shards = meta.open_shards(directory)
    config = Config(**meta.read_params(directory, shards))
    shapes = parameter_shapes(config, len(shards[0]), directory / "params.json")
    names = {name: meta.meta_name(name) for name in shapes}
    read = meta.merged(directory, shards, {names[n]: shape for n, shape in shapes.items()})
    return config, {n: partial(lambda n: reorder(read(names[n]), n, config), n) for n in shapes}


def default_device(device=None):
    """A torch.device that works here; None: the GPU if there is one, else the CPU."""
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=found).item()              # meta, which holds no numbers, fails too
    except Exception as e:          # of many kinds: no driver, no such index, a misspelling
        reason = "torch lacks it" if "aten::" in str(e) else str(e).strip().split("\n")[0][:120]
        raise ValueError(f"{device or found} is not available here: {reason}") from None
    return found


def has_bfloat16(device):
    """True on a GPU that computes in bfloat16 itself, without emulating it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def load(ckpt: str | Path, device=None, dtype: torch.dtype | None = None, prepare=None) -> Llama:
    """Read a LLaMA in Meta's raw layout or in Hugging Face's. Returns a `Llama`.

    ckpt: a directory, or a name under checkpoints/. device: default the GPU if there is one. dtype:
    default bfloat16 on a GPU that has it, else float32. The network is built on the meta device,
    without memory. Then tensors are read, converted and moved one by one: there is no second copy.
    prepare: called as prepare(net, read=read) before that; read(name) returns the matrix of one
    linear layer. What `prepare` replaces is not read again: a network that it shrinks is never
    whole in memory. Raises FileNotFoundError or ValueError naming file, tensor, expected and found.
    """
    device = default_device(device)
    dtype = dtype or (torch.bfloat16 if has_bfloat16(device) else torch.float32)
    (config, tensors), where = open_checkpoint(ckpt), find(ckpt)
    with torch.device("meta"):
        net = Llama(config)

    def read(name, leaf="weight"):
        name = f"{'model.embed_tokens' if config.tied and name == 'lm_head' else name}.{leaf}"
        return meta.check_finite(tensors[name]().to(device, dtype), f"{where}: {name}")

    if prepare:
        prepare(net, read=read)
    for name in tqdm(tensors, f"load {where.name}", unit="tensor", delay=1, leave=False):
        path, _, leaf = name.rpartition(".")
        module = net.get_submodule(path)
        here = getattr(module, leaf)
        if getattr(here, "is_meta", False):
            setattr(module, leaf, nn.Parameter(read(path, leaf), requires_grad=here.requires_grad))
    if config.tied and getattr(net.lm_head.weight, "is_meta", False):
        net.lm_head.weight = net.model.embed_tokens.weight
    return net
