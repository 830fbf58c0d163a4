"""convert.py hf, and GGUFs that convert.py merge writes: transformers, PEFT and our own reader."""
import base64
import json
import shutil
import subprocess
import sys

import pytest
import torch

import adapter
import convert
import model
import pissa
from conftest import TINY, assert_logits_equal, command, failure, small_net
from formats import gguf, hf, meta_write
from formats.tokenizer import Tokenizer
from test_convert import STRINGS, adapted, byte_names, contents, read, vocabulary

pytest.importorskip("safetensors")

pytestmark = pytest.mark.long       # only ./check leaves these out

TEXTS = [text for text in STRINGS if "<s>" not in text]


def hugging_faces(folder):
    """transformers' model and tokenizer of a folder."""
    transformers = pytest.importorskip("transformers")
    return (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            transformers.AutoTokenizer.from_pretrained(folder))


def write_base(folder, net, **keys):
    """A checkpoint in Hugging Face's layout with the vocabulary of test_convert."""
    info = {"general.architecture": "llama", **vocabulary(), **keys}
    files, ids = gguf.tokenizer_files(info, net.config.vocab_size, folder)
    hf.save_folder(folder, hf.config_json(vars(net.config), net.lm_head.weight.dtype, **ids),
                   net.named_parameters())
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def llama3(folder, **changes):
    """A checkpoint as Meta ships Llama 3: ranks of bytes and of a few words."""
    byte = {name: bytes([b]) for b, name in byte_names().items()}
    words = [*byte.values(), b"th", b"he", b"the", b" t", b" the", b"123", b"12", b" qzxj"]
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"".join(
        base64.b64encode(word) + b" %d\n" % n for n, word in enumerate(words)))
    net = small_net(vocab_size=len(words) + 256, n_layers=1, rope_theta=5e5, **changes)
    meta_write.save(net, folder)
    return net, len(words)


# --- Meta's layout for transformers and PEFT

def test_the_embedded_model_with_peft(tmp_path):
    """README's line for PEFT, word for word, on what `convert.py hf` makes of the demo's base."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("google.protobuf")
    out, before = tmp_path / "out", contents(TINY)
    text = command(convert.main, "hf", "tiny", out)
    assert "56 tensors, layout hf, bfloat16" in text and f"--ckpt {out}" in text
    (theirs, tok), net, ours = hugging_faces(out), model.load("tiny", "cpu"), Tokenizer(TINY)
    tokens = torch.tensor([ours.encode("Tom had 12 pens.", bos=True)])
    assert_logits_equal(theirs(tokens).logits, net(tokens))
    for text in [*TEXTS, (TINY / "README.md").read_text()]:
        assert tok(text)["input_ids"] == ours.encode(text, bos=True), ascii(text)
        assert Tokenizer(out).encode(text) == ours.encode(text)
    assert (tok.bos_token_id, tok.eos_token_id) == (ours.bos, ours.eos)
    generation = theirs.generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (ours.bos, ours.eos)
    assert all(torch.equal(W, read(TINY)[name]) for name, W in read(out).items())
    adapter.save(adapted(net, targets=("q_proj", "down_proj"), rank=2), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert_logits_equal(theirs(tokens).logits, net(tokens))
    assert contents(TINY) == before


def test_ranks_become_a_tokenizer_json(tmp_path):
    """Llama 3 as Meta ships it, whose tokenizer no other program than Meta's reads."""
    pytest.importorskip("tiktoken"), pytest.importorskip("tokenizers")
    net, n = llama3(tmp_path / "meta")
    command(convert.main, "hf", tmp_path / "meta", tmp_path / "out")
    (theirs, tok), ours = hugging_faces(tmp_path / "out"), Tokenizer(tmp_path / "meta")
    again, tokens = Tokenizer(tmp_path / "out"), torch.arange(2, 40)[None]
    for text in [*STRINGS, "the 12345 qzxj the"]:
        assert again.encode(text, bos=True) == ours.encode(text, bos=True), ascii(text)
        assert tok(text)["input_ids"] == ours.encode(text, bos=True), ascii(text)
        assert tok.decode(ours.encode(text)) == text
    assert (again.bos, again.eos, again.stops) == (n, n + 1, ours.stops)
    assert tok.convert_tokens_to_ids(["<|eot_id|>", "<|reserved_special_token_247|>"]) == [
        n + 9, n + 255]
    assert theirs.generation_config.eos_token_id == [n + 1, n + 9]
    assert_logits_equal(theirs(tokens).logits, net(tokens))


def test_merged_from_metas_layout_has_a_tokenizer_for_transformers(tmp_path):
    """A sibling of the above: `merge --layout hf`. The base's own files count if there are any."""
    pytest.importorskip("google.protobuf")
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "args.json").write_text('{"method": "full"}')
    base.rename(tmp_path / "checkpoint")
    command(convert.main, "merge", tmp_path, tmp_path / "out", "--layout", "hf")
    theirs, tok = hugging_faces(tmp_path / "out")
    assert tok("  a b")["input_ids"] == Tokenizer(TINY).encode("  a b", bos=True)
    assert theirs.generation_config.eos_token_id == 7


def test_hf_refuses(tmp_path):
    """Whatever is there stays, and nothing is half written."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    (tmp_path / "bad").mkdir()
    for file in ("params.json", "consolidated.00.pth"):
        shutil.copy(TINY / file, tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.model").write_text("?")
    for base, out, message in (("tiny", "full", "is not empty"), ("none", "new", "no checkpoint"),
                               ("tiny", "full/file", "is a file"),
                               (tmp_path / "bad", "new", "tokenizer.model: of no use, perhaps")):
        text = failure("convert.py", "hf", base, tmp_path / out)
        assert message in text and "\n" not in text
        assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "full"]


# --- GGUF

# What transformers' reader of GGUFs leaves out, or families that it does not read.
UNREAD = {"rope_scaling", "o_bias", "no_rope", "gelu"}


@pytest.mark.parametrize("dtype, changes", [
    ("bfloat16", {}), ("float16", dict(tied=True)), ("float32", dict(qkv_bias=True)),
    ("bfloat16", dict(qkv_bias=True, tied=True, norm_eps=1e-6)),
    ("float16", dict(dim=64, n_heads=4, head_dim=32, rope_theta=5e4, max_seq_len=96)),
    ("float32", dict(rope_scaling={"rope_type": "linear", "factor": 4.0}, vocab_size=128)),
    ("bfloat16", dict(qk_norm=True, head_dim=128)), ("bfloat16", dict(no_rope=4, n_layers=5)),
    ("bfloat16", dict(gelu=True, embed_scale=48 ** 0.5, tied=True, head_dim=16, n_kv_heads=1)),
    ("float32", dict(qkv_bias=True, o_bias=True))])
def test_gguf_of_a_merged_model(tmp_path, tokens, dtype, changes):
    """Bit for bit the merged checkpoint, by our reader; its logits, by transformers'."""
    pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    net = small_net(**{"n_layers": 1, **changes})
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape) if p.ndim == 1 else 0
    base, path = write_base(tmp_path / "base", net), tmp_path / "x.gguf"
    adapter.save(adapted(net, targets=("q_proj", "k_proj", "up_proj")), tmp_path / "adapter")
    merge = "merge", tmp_path / "adapter"
    command(convert.main, *merge, tmp_path / "hf", "--ckpt", base, "--dtype", dtype)
    text = command(convert.main, *merge, path, "--ckpt", base, "--dtype", dtype)
    of = f"{3 * net.config.n_layers} of {len(read(base))}"
    assert f"{of} tensors changed, layout gguf, {dtype}, 0.00 GB in" in text
    assert 'FROM ./x.gguf\nTEMPLATE """Below is' in text and "{{ .Prompt }}" in text
    command(convert.main, "gguf", path, tmp_path / "back", "--dtype", dtype)
    expected, found = read(tmp_path / "hf"), read(tmp_path / "back")
    assert expected.keys() == found.keys()
    assert all(torch.equal(W, expected[name]) for name, W in found.items())
    ours, again = Tokenizer(base), Tokenizer(tmp_path / "back")
    for text in STRINGS:
        assert again.encode(text, bos=True) == ours.encode(text, bos=True)
    assert (again.bos, again.eos, again.stops) == (ours.bos, ours.eos, ours.stops)
    template = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert template["chat_template"] == "{{ messages }} — é"
    merged = model.load(tmp_path / "hf", "cpu", torch.float32)
    config = {**vars(merged.config), "max_seq_len": merged.config.max_seq_len or 4096}
    assert vars(model.open_checkpoint(tmp_path / "back")[0]) == config
    assert ("note: a context of 4096 tokens" in text) <= (not merged.config.max_seq_len)
    if not UNREAD & changes.keys():
        theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="x.gguf", dtype=torch.float32)
        assert_logits_equal(theirs(tokens).logits, merged(tokens))


def test_gguf_of_the_embedded_model(tmp_path):
    """Sentencepiece; a run of whole weights; norms in float32, as llama.cpp asks for."""
    package = pytest.importorskip("gguf")
    pytest.importorskip("google.protobuf")
    (tmp_path / "args.json").write_text('{"method": "full"}')
    shutil.copytree(TINY, tmp_path / "checkpoint")
    path, back = tmp_path / "tiny.gguf", tmp_path / "back"
    command(convert.main, "merge", tmp_path, path)
    kinds = {t.name: t.tensor_type.name for t in package.GGUFReader(path).tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"BF16"}
    command(convert.main, "gguf", path, back)
    assert all(torch.equal(W, read(TINY)[name]) for name, W in read(back).items())
    ours, again = Tokenizer(TINY), Tokenizer(back)
    assert all(again.encode(text, bos=True) == ours.encode(text, bos=True) for text in STRINGS)
    assert (again.bos, again.eos, again.stops) == (ours.bos, ours.eos, ours.stops)


@pytest.mark.parametrize("factor", [8.0, 32.0, 4.0])
def test_gguf_of_llama_3_1(tmp_path, factor):
    """Its stretched RoPE is a tensor in a GGUF; other numbers than Meta's cannot be read back."""
    pytest.importorskip("gguf"), pytest.importorskip("tiktoken")
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    net, n = llama3(tmp_path / "checkpoint", rope_scaling=scaling, dim=96, n_heads=3, n_kv_heads=1,
                    head_dim=32)
    (tmp_path / "args.json").write_text('{"method": "full"}')
    text = command(convert.main, "merge", tmp_path, tmp_path / "x.gguf")
    assert "note: a context of 8192 tokens is stated, since the base states none" in text
    if factor == 4.0:
        back = "convert.py", "gguf", tmp_path / "x.gguf", tmp_path / "back"
        assert "has other numbers than Meta's 3.1 and 3.2" in failure(*back)
        return
    command(convert.main, "gguf", tmp_path / "x.gguf", tmp_path / "back", "--dtype", "float32")
    again = model.load(tmp_path / "back", "cpu")
    assert again.config.rope_scaling == scaling
    tokens = torch.arange(3, 90)[None]
    assert torch.equal(again(tokens), net(tokens))
    assert Tokenizer(tmp_path / "back").stops == {n + 1, n + 9}


def test_a_sliding_window_bounds_the_context(tmp_path, tokens):
    """GGUF has no word for Mistral v0.1's window: up to it, the model is the same."""
    pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    net = small_net(sliding_window=32, max_seq_len=64, n_layers=1)
    write_base(tmp_path / "checkpoint", net)
    (tmp_path / "args.json").write_text('{"method": "full"}')
    text = command(convert.main, "merge", tmp_path, tmp_path / "x.gguf")
    assert "note: a context of 32 tokens is stated, the sliding window" in text
    command(convert.main, "gguf", tmp_path / "x.gguf", tmp_path / "back", "--dtype", "float32")
    again = model.load(tmp_path / "back", "cpu")
    assert again.config.max_seq_len == 32 and torch.equal(again(tokens), net(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {}, dict(qkv_bias=True), dict(qk_norm=True, head_dim=16), dict(no_rope=4, n_layers=5),
    dict(gelu=True, embed_scale=48 ** 0.5, tied=True, head_dim=16, n_kv_heads=1),
    dict(qkv_bias=True, o_bias=True)], ids=str)
def test_llama_cpp_computes_the_same(tmp_path, changes):
    """llama.cpp itself (pip install xllamacpp): greedy tokens, and the likeliest ones' logarithms.
    Its cache has 32 bits here: by default 16, which are off by 1e-3."""
    package = pytest.importorskip("xllamacpp")
    net = small_net(**changes)
    torch.manual_seed(0)
    for p in net.parameters():
        p.data += 0.3 * torch.randn(p.shape) if p.ndim == 1 else 0
    if not net.config.tied:
        net.lm_head.weight.mul_(20)
    write_base(tmp_path / "checkpoint", net)
    (tmp_path / "args.json").write_text('{"method": "full"}')
    command(convert.main, "merge", tmp_path, tmp_path / "x.gguf", "--dtype", "float32")
    params = package.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(tmp_path / "x.gguf"), 256, False
    params.cache_type_k = params.cache_type_v = package.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    prompt = [5, 17, 60, 33, 8, 90, 41, 3, 77, 20]
    found = package.Server(params).handle_completions({
        "prompt": prompt, "n_predict": 12, "temperature": 0.0, "n_probs": 20, "ignore_eos": True})
    steps, ids = found["choices"][0]["logprobs"]["content"], []
    for step in steps:
        expected = net(torch.tensor([prompt + ids]))[0, -1].log_softmax(-1)
        scale = expected.max() - expected.min()
        for top in step["top_logprobs"]:
            assert abs(expected[top["id"]] - top["logprob"]) < 1e-4 * scale
        ids.append(step["id"])
    assert ids == model.generate(net, [prompt], 12)[0]


@pytest.mark.parametrize("changes, message", [
    (dict(no_rope=3, n_layers=4), "architecture smollm3 has no place for no_rope 3: write Hugging"),
    (dict(qk_norm=True, qkv_bias=True, o_bias=True), "qkv_bias True, o_bias True: write Hugging"),
    (dict(gelu=True, embed_scale=48 ** 0.5), "an output projection of its own: write Hugging Face"),
    (dict(gelu=True), "architecture llama has no place for gelu True: write Hugging Face's")])
def test_models_that_gguf_cannot_name(tmp_path, changes, message):
    pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    write_base(tmp_path / "checkpoint", small_net(**{"n_layers": 1, **changes}))
    (tmp_path / "args.json").write_text('{"method": "full"}')
    text = failure("convert.py", "merge", tmp_path, tmp_path / "x.gguf")
    assert message in text and "\n" not in text
    assert not list(tmp_path.glob("*.gguf"))


def digits(found):
    found["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Punctuation"})


@pytest.mark.parametrize("change, message", [
    (digits, "it cuts text by another rule than gpt-2, smollm"),
    (lambda found: found.update(normalizer={"type": "NFKC"}), "it cuts text by another rule"),
    (lambda found: found["model"].update(ignore_merges=True), "it cuts text by another rule")])
def test_a_vocabulary_that_gguf_cannot_name(tmp_path, change, message):
    pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    base = write_base(tmp_path / "base", small_net(n_layers=1))
    found = json.loads((base / "tokenizer.json").read_text())
    change(found)
    (base / "tokenizer.json").write_text(json.dumps(found))
    adapter.save(adapted(small_net(n_layers=1), targets=("q_proj",)), tmp_path / "adapter")
    merge = "convert.py", "merge", tmp_path / "adapter", tmp_path / "x.gguf", "--ckpt", base
    text = failure(*merge)
    assert message in text and "\n" not in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_where_a_gguf_may_be_written(tmp_path, monkeypatch):
    """Only to a new file that ends in .gguf, and with its package."""
    pytest.importorskip("gguf")
    (tmp_path / "old.gguf").write_text("precious")
    (tmp_path / "args.json").write_text('{"method": "full"}')
    shutil.copytree(TINY, tmp_path / "checkpoint")
    merge = "convert.py", "merge", tmp_path
    assert "old.gguf is there already: name a new file that ends in .gguf" in failure(
        *merge, tmp_path / "old.gguf")
    assert "new: name a new file that ends in .gguf" in failure(*merge, tmp_path / "new",
                                                                "--layout", "gguf")

    def interrupted(W, *rest, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "converted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            command(convert.main, "merge", tmp_path, tmp_path / "new.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in failure(*merge, tmp_path / "new.gguf")
    assert (tmp_path / "old.gguf").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["args.json", "checkpoint", "old.gguf"]


def test_four_bits(tmp_path):
    """Q + A B, as `merge` writes it in any layout."""
    pytest.importorskip("gguf"), pytest.importorskip("tokenizers")
    net = small_net(n_layers=1)
    base = write_base(tmp_path / "base", net)
    pissa.inject(net, 4, "qpissa", ("q_proj",), progress=False, quant_iters=1)
    adapter.save(net, tmp_path / "adapter")
    merge = "merge", tmp_path / "adapter"
    command(convert.main, *merge, tmp_path / "x.gguf", "--ckpt", base)
    command(convert.main, *merge, tmp_path / "hf", "--ckpt", base)
    command(convert.main, "gguf", tmp_path / "x.gguf", tmp_path / "back", "--dtype", "float32")
    expected = read(tmp_path / "hf")
    assert all(torch.equal(W, expected[name]) for name, W in read(tmp_path / "back").items())


# llama.cpp, in a process of its own: it writes to the terminal and does not unload.
LLAMA_CPP = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
for text in json.load(open(sys.argv[2])):
    found = server.handle_completions({"prompt": text, "max_tokens": 24, "temperature": 0})
    print("=", json.dumps([found["usage"]["prompt_tokens"], found["choices"][0]["text"]]))
"""


def test_llama_cpp_answers_as_we_do(tmp_path):
    """The same number of tokens of odd texts, and the same greedy continuations of plain ones."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp brings llama.cpp")
    (tmp_path / "args.json").write_text('{"method": "full"}')
    shutil.copytree(TINY, tmp_path / "checkpoint")
    command(convert.main, "merge", tmp_path, tmp_path / "tiny.gguf", "--dtype", "float32")
    plain = [row["question"] for row in map(json.loads, open(TINY / "test.jsonl"))][:12]
    texts = [text for text in TEXTS if text.strip()] + plain
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    done = subprocess.run([sys.executable, "-c", LLAMA_CPP, tmp_path / "tiny.gguf",
                           tmp_path / "texts.json"], capture_output=True, text=True, timeout=100)
    found = [json.loads(line[2:]) for line in done.stdout.splitlines() if line.startswith("= ")]
    net, tok = model.load(TINY, "cpu"), Tokenizer(TINY)
    for text, (length, answer) in zip(texts, found, strict=True):
        ids = tok.encode(text, bos=True)
        assert length == len(ids), text
        if text in plain:
            ours = model.generate(net, [ids], 24, eos=tok.stops)[0]
            assert tok.decode(ours).strip() == answer.strip(), text
