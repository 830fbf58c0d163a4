"""What several tests share: small models, the real ones where they are, a Hugging Face twin."""
import io
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

# One thread: the matrices are tiny, and on a busy machine threads mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402

ROOT = Path(__file__).parent.parent
TINY = ROOT / "checkpoints" / "tiny"
SHARED = ROOT.parent / "shared" / "data"
SMALL = model.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=101, ffn_dim=128)


def small_net(seed=0, **changes):
    """A random LLaMA, small enough for any test, with singular values ~ 1 / i, as if trained.

    The decay matters: where the spectrum is flat at the cut, A B is ill-determined, and no two
    implementations can be expected to agree on it.
    """
    net = model.init_weights(model.Llama(model.Config(**{**vars(SMALL), **changes})), seed)
    for m in net.modules():
        if isinstance(m, torch.nn.Linear) and m is not net.lm_head:
            U, S, Vh = torch.linalg.svd(m.weight.detach(), full_matrices=False)
            m.weight.data = (U * (3 / torch.arange(1, len(S) + 1))) @ Vh
    return net.requires_grad_(False)


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


def failure(script, *argv):
    """What a failing script writes as its last words, as the shell would show them."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as e, \
            redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert e.value.code not in (0, None), "it should have failed"
    return e.value.code if isinstance(e.value.code, str) else err.getvalue().strip()


@pytest.fixture
def net():
    return small_net()


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
    """The folder of SmolLM2-135M in Hugging Face's layout (the README makes it from GGUF)."""
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
