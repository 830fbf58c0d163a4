"""What several tests share: small models, the real ones where they are, a Hugging Face twin."""
import copy
import io
import os
import re
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

# One thread: the matrices are tiny, and on a busy machine threads mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import data  # noqa: E402
import fast  # noqa: E402
import model  # noqa: E402
import pissa  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints" / "tiny"
SHARED = ROOT.parent / "shared" / "data"
SMALL = model.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=101, ffn_dim=128)
MLP_TARGETS, DTYPES = ("fc1", "fc2"), (torch.float32, torch.bfloat16, torch.float16)
QUANTISED = [("qlora", {}), ("qlora", dict(double_quant=False)), ("loftq", {}),
             ("loftq", dict(quant_iters=1)), ("loftq", dict(last_svd=False)), ("qpissa", {}),
             ("qpissa", dict(double_quant=False)), ("qpissa", dict(quant_iters=1)),
             ("qpissa", dict(quant_iters=5, last_svd=False)),
             *((method, dict(bits=8)) for method in ("qlora", "loftq", "qpissa"))]
QUANTISED_IDS = [" ".join([m, *(f"{k}={v}" for k, v in o.items())]) for m, o in QUANTISED]


def small_net(seed=0, **changes):
    """A random LLaMA, small enough for any test, with singular values ~ 1 / i, as if trained.

    The decay matters: if the spectrum is flat at the cut, A B is ill-determined, and no two
    implementations can be expected to agree on it.
    """
    if not changes:
        return copy.deepcopy(small_net_once(seed))
    net = model.init_weights(model.Llama(model.Config(**{**vars(SMALL), **changes})), seed)
    for m in net.modules():
        if isinstance(m, torch.nn.Linear) and m is not net.lm_head:
            U, S, Vh = torch.linalg.svd(m.weight.detach(), full_matrices=False)
            m.weight.data = (U * (3 / torch.arange(1, len(S) + 1))) @ Vh
    return net.requires_grad_(False)


@cache
def small_net_once(seed):
    """small_net(seed), which must not be changed: decomposing all its matrices takes a while."""
    return small_net(seed, n_layers=SMALL.n_layers)


def mlp(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(40, 60, bias=bias))
    net.add_module("act", nn.ReLU())
    net.add_module("fc2", nn.Linear(60, 30, bias=bias))
    return net.to(dtype)


def quiet(net, rank=4, method="pissa", *args, keep_base=True, quant_iters=2, **kwargs):
    """`inject` that prints nothing and keeps W. Two turns in four bits are quicker than five."""
    return pissa.inject(net, rank, method, *args, progress=False, keep_base=keep_base,
                        quant_iters=quant_iters, **kwargs)


def layer_of(linear, rank, method="pissa", **options):
    """The PissaLinear that a method makes of an nn.Linear."""
    init = getattr(import_module(pissa.METHODS[method]), f"init_{method}")
    return pissa.PissaLinear.from_linear(linear, init, pissa.Options(rank, **options))


def relative_error(W, layer):
    """|W - (frozen + A B)| / |W|, Frobenius norms, W (out, in)."""
    return ((W - pissa.as_tensor(layer.frozen) - (layer.A @ layer.B).T).norm() / W.norm()).item()


def optimise(net, tokens, steps, lr=1e-2, optimizer=None):
    """A few AdamW steps on next-token prediction; the losses and the optimizer."""
    logits = (lambda x: net(x).logits) if hasattr(net, "generation_config") else net
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def with_weights(net, weight):
    """small_net() with weight(W, m) instead of W, for the PissaLinears m of `net`."""
    plain = small_net()
    for name, m in pissa.layers(net):
        W = plain.get_submodule(name).weight
        W.copy_(weight(W, m))
    return plain


def rounded_base(W, m):
    """Q + A_0 B_0: W, up to what rounding lost."""
    return pissa.as_tensor(m.frozen) + (0 if m.A0 is None else (m.A0 @ m.B0).T)


def changed(W, m):
    """W + Delta W."""
    return W + (m.A @ m.B).T - (0 if m.A0 is None else (m.A0 @ m.B0).T)


def hugging_face(net):
    """The same network as a transformers LlamaForCausalLM, with the same weights."""
    transformers = pytest.importorskip("transformers")
    c = net.config
    config = transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tied,
        max_position_embeddings=2048, attention_bias=False, mlp_bias=False, pad_token_id=None)
    twin = transformers.LlamaForCausalLM(config).to(net.lm_head.weight.dtype).eval()
    twin.load_state_dict(net.state_dict(), strict=True)
    return twin


def assert_logits_equal(a, b, rel=1e-4):
    """max |a - b| <= rel x the scale of the reference b."""
    worst, scale = (a - b).abs().max().item(), b.abs().max().item()
    assert worst <= rel * scale, f"logits differ by {worst:.2e}, scale {scale:.2e}"


def train_tokenizer(folder, **options):
    """A tiny tokenizer with Llama 2's conventions: byte fallback, spaces kept, pad = -1."""
    source = (ROOT / "data.py").read_text()
    folder.mkdir(exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((source + "\n" + data.PROMPT).splitlines()), model_writer=file,
            vocab_size=420, model_type="bpe", byte_fallback=True, character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False, num_threads=1, minloglevel=2, **options)
    return folder


def command(main, *argv):
    """What `main` prints with this command line."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["program", *map(str, argv)])
        main()
    return out.getvalue()


def joined(text):
    """A text that is printed in lines of 79 columns, as one line."""
    return " ".join(text.split())


def failure(script, *argv):
    """What a failing script writes as its last words, as the shell would show them."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e, \
            redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert e.value.code not in (0, None), "it should have failed"
    code, text = e.value.code, re.split(r"(?:loading|reading) \S+ \.\.\.\n|/s\]\n",
                                         err.getvalue())[-1]
    return code if isinstance(code, str) else text.strip()


def scores(q, k, starts, window):
    """What softmax sees of every text: (where it is, (H, n, n) float32), one after another."""
    k, (left, right) = k.repeat_interleave(q.shape[1] // k.shape[1], 1), window
    for begin, end in pairwise(starts.tolist()):
        part, t = slice(begin, end), torch.arange(end - begin)
        back = t[:, None] - t                                    # how far back the key is
        seen = (back >= -right) & ((back <= left) if left >= 0 else True)
        s = torch.einsum("qhk,shk->hqs", q[part].float(), k[part].float()) * q.shape[2]**-0.5
        yield part, s.masked_fill(~seen, -torch.inf)


def flash_forward(q, k, v, starts, starts_k, T, S, causal=False, scale=None, window=None, *rest):
    """What a GPU computes for varlen_attn: (P, H, K) and, for backward, (H, P) log-sum-exp."""
    P, H, _ = q.shape
    begins = starts.tolist()
    assert starts.dtype == torch.int32 and torch.equal(starts, starts_k)
    assert begins[0] == 0 and begins[-1] == P == len(k) == len(v)
    assert max(b - a for a, b in pairwise(begins)) <= T == S and scale is None
    assert window[1] == 0 and causal == (window[0] < 0) and {q.dtype} == {k.dtype, v.dtype}
    assert H % k.shape[1] == 0 and k.shape == v.shape
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    out, lse, v = torch.empty_like(q), q.new_empty(H, P, dtype=torch.float32), v.float()
    v = v.repeat_interleave(H // v.shape[1], 1)
    for part, s in scores(q, k, starts, window):
        lse[:, part] = s.logsumexp(-1)
        out[part] = torch.einsum("hqs,shk->qhk", s.softmax(-1), v[part]).to(q.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def flash_backward(grad, q, k, v, out, lse, starts, starts_k, T, S, causal, state, scale=None,
                   window=None):
    """Its gradients, from what forward kept: softmax is taken anew from the log-sum-exp."""
    groups, G = q.shape[1] // k.shape[1], k.shape[1]
    grad, (K, V) = grad.float(), (t.float().repeat_interleave(groups, 1) for t in (k, v))
    dq, dk, dv = torch.empty_like(grad), torch.empty_like(K), torch.empty_like(V)
    for part, s in scores(q, k, starts, window):
        p, g = (s - lse[:, part, None]).exp(), grad[part]
        dv[part] = torch.einsum("hqs,qhk->shk", p, g)
        mean = (g * out[part]).sum(-1).T[..., None]                                  # (H, n, 1)
        p = p * (torch.einsum("qhk,shk->hqs", g, V[part]) - mean) * q.shape[2]**-0.5
        dq[part] = torch.einsum("hqs,shk->qhk", p, K[part])
        dk[part] = torch.einsum("hqs,qhk->shk", p, q[part].float())
    dk, dv = (t.unflatten(1, (G, groups)).sum(2) for t in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@cache
def register_flash():
    """The two for the operators of torch.nn.attention.varlen, which only GPUs have; once."""
    import torch.nn.attention.varlen  # noqa: F401
    for name, kernel in ("", flash_forward), ("_backward", flash_backward):
        torch.library.register_kernel(f"torch_attn::_varlen_attn{name}", "cpu", kernel)


@pytest.fixture
def flash(monkeypatch):
    """Packed rows take the way of a GPU in 16 bits, on any device and in any dtype."""
    register_flash()
    monkeypatch.setattr(fast, "takes_flash", lambda q: True)


@pytest.fixture
def net():
    return small_net()


@pytest.fixture(scope="module")
def tok():
    """The tokenizer of the embedded model."""
    return data.Tokenizer(TINY)


def first_lines(folder, count, name="train.jsonl"):
    """A file in `folder` with the first lines of one of the embedded model's; its path."""
    lines = (TINY / name).read_text().splitlines(keepends=True)[:count]
    (folder / name).write_text("".join(lines))
    return folder / name


@pytest.fixture(scope="session")
def stories():
    """A small real checkpoint in Meta's and in Hugging Face's layout."""
    if not (SHARED / "stories260K").is_dir():
        pytest.skip(f"{SHARED / 'stories260K'} is not here")
    return SHARED / "stories260K"


@pytest.fixture
def tokens():
    return torch.randint(0, 101, (3, 17), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def smollm2_path():
    """The folder of SmolLM2-135M in Hugging Face's layout (see `convert.py gguf --help`)."""
    pytest.importorskip("safetensors")
    path = Path(os.environ.get("SMOLLM2", SHARED / "smollm2" / "hf" / "model.safetensors"))
    if not path.is_file():
        pytest.skip("SmolLM2 is not here: set SMOLLM2 to its model.safetensors")
    return path.parent


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    """The weights of SmolLM2-135M, opened lazily."""
    import safetensors
    with safetensors.safe_open(smollm2_path / "model.safetensors", "pt") as f:
        yield f
