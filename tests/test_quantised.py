"""Models in four bits from the command line: loaded layer by layer, trained, used, merged."""
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

import adapter
import convert
import data
import eval as evaluation
import model
import nf4
import pissa
import train
from conftest import ROOT, TINY, assert_logits_equal, command, first_lines, joined, small_net
from formats import meta_write
from test_convert import write_base

QUANTISED = ["qpissa", "loftq", "qlora"]


def quiet(net, method, rank=4, **options):
    return pissa.inject(net, rank, method, progress=False, quant_iters=2, **options)


def streamed(folder, method, dtype=torch.float32, **options):
    return model.load(folder, "cpu", dtype, partial(quiet, method=method, **options))


@pytest.fixture(params=["meta", "hf"])
def folder(tmp_path, request):
    if request.param == "hf":
        pytest.importorskip("safetensors")
    return write_base(tmp_path / "base", request.param, small_net(tied=True))


# --- loading as a stream

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [*QUANTISED, "pissa", "lora"])
def test_streamed_is_unstreamed(folder, method, dtype, tokens):
    """Every bit of the network, what is trained, and the adapter's metadata."""
    got, expected = streamed(folder, method, dtype), quiet(model.load(folder, "cpu", dtype), method)
    a, b = dict(got.named_parameters()), dict(expected.named_parameters())
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert {n for n in a if a[n].requires_grad} == {n for n in b if b[n].requires_grad}
    assert got.pissa == expected.pissa and got.lm_head.weight is got.model.embed_tokens.weight
    assert torch.equal(got(tokens), expected(tokens))


@pytest.mark.parametrize("method", [*QUANTISED, "pissa", "lora"])
def test_adapter_on_a_stream(folder, method, tmp_path, tokens):
    net = streamed(folder, method)
    for _, m in pissa.layers(net):
        m.A.data *= 1.1
    adapter.save(net, tmp_path / "adapter")
    load = partial(adapter.load, directory=tmp_path / "adapter")
    got = model.load(folder, "cpu", torch.float32, load)
    assert adapter.facts(got) == adapter.facts(net) and torch.equal(got(tokens), net(tokens))
    names = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {n for n, p in got.named_parameters() if p.requires_grad} == names
    other = write_base(tmp_path / "other", "meta", small_net(seed=1, tied=True))
    with pytest.raises(ValueError, match="made on another base model"):
        model.load(other, "cpu", prepare=load)


def test_output_projection_of_a_tied_model(folder, tokens):
    """As a target it is a matrix of its own, from the embedding."""
    net = streamed(folder, "qpissa", targets=["lm_head", "q_proj"], rank=16)
    near = pissa.as_tensor(net.lm_head.frozen) + (net.lm_head.A @ net.lm_head.B).T
    W = model.load(folder, "cpu").model.embed_tokens.weight
    assert (near - W).norm() < 0.1 * W.norm()
    assert torch.equal(net.model.embed_tokens.weight, W)
    assert len(model.generate(net, [[1, 5]], 3)[0]) == 3


def test_biases_are_read(tmp_path, tokens):
    pytest.importorskip("safetensors")
    net = small_net(qkv_bias=True)
    for layer in net.model.layers:
        layer.self_attn.q_proj.bias.data += 1
    write_base(tmp_path / "base", "hf", net)
    got, expected = streamed(tmp_path / "base", "qpissa"), quiet(net, "qpissa")
    assert torch.equal(got(tokens), expected(tokens))


def test_not_finite_in_a_stream(tmp_path):
    net = small_net()
    net.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
    meta_write.save(net, tmp_path)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj: the weight holds NaN or Inf"):
        streamed(tmp_path, "qpissa")


RSS = """
import sys, model, pissa, safetensors.torch, torch
from functools import partial
torch.randn(64, 64) @ torch.randn(64, 64)
def memory(key):
    return next(int(s.split()[1]) / 1024 for s in open("/proc/self/status") if s.startswith(key))
before = memory("VmRSS")
net = model.load(sys.argv[1], "cpu", prepare=partial(
    pissa.inject, rank=16, method="qpissa", quant_iters=1, keep_base=False, progress=False))
size = sum(p.nbytes for p in net.parameters()) + sum(
    M.nbytes for _, m in pissa.layers(net) for M in (m.A0, m.B0, *m.subtracted))
print(memory("VmHWM") - before - size / 2**20, size / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory(smollm2_path):
    """While loading, SmolLM2 in four bits takes 300 MB more than in the end."""
    found = []
    for _ in range(2):          # pages of a mapped file come and go as the system likes
        done = subprocess.run([sys.executable, "-c", RSS, smollm2_path], capture_output=True,
                              text=True, cwd=ROOT, check=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        found.append([float(x) for x in done.stdout.split()])
    over, size = min(found)
    assert size < 230 and over < 300, found


# --- the commands

@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The start of a command line, with few examples."""
    path = first_lines(tmp_path_factory.mktemp("data"), 64)
    return ["--ckpt", "tiny", "--data", path, "--val-fraction", 0.25]


@pytest.fixture(scope="module", params=[pytest.param(method, marks=pytest.mark.long)
                                        for method in QUANTISED])
def run(request, flags, tmp_path_factory):
    """(method, directory, output) of a short run of train.py."""
    method, out = request.param, tmp_path_factory.mktemp("quantised") / request.param
    text = command(train.main, *flags, "--method", method, "--rank", 8, "--lr", 2e-3, "--batch", 8,
                   "--steps", 6, "--max-new-tokens", 8, "--quant-iters", 2, "--no-double-quant",
                   "--out", out)
    return method, out, text


def loaded(out):
    return adapter.load(model.load("tiny", "cpu"), out / "adapter")


def test_train(run):
    """The loss falls from that of Q + A B; nothing but A and B has changed."""
    method, out, text = run
    summary = json.loads((out / "summary.json").read_text())
    assert f"{method}: 42 matrices at rank 8" in text and "4.50 bits a frozen weight" in text
    assert "5,099,520 parameters" in text                        # what they are, not their bytes
    assert f"step 0: validation loss {summary['before']['loss']:.4f}, with the weights in" in text
    assert "this adapter gives W + Delta W, not the Q + A B that was trained" in joined(text)
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.3
    net, info = loaded(out), json.loads((out / "adapter/pissa.json").read_text())
    assert (info["quant_iters"], info["double_quant"]) == (2, False)
    tok, args = data.Tokenizer(TINY), json.loads((out / "args.json").read_text())
    examples = data.read(args["data"])
    val = data.encode(data.split(examples, 0.25, 0)[1], tok, 512)[0]
    assert len(val) == 16
    total = sum(train.loss_sum(net, *pair).item() for pair in data.micro_batches(val, 1000))
    count = sum(len(ids) - n for ids, n in val)
    assert total / count == pytest.approx(summary["after"]["loss"], rel=1e-5)


def test_going_on(run, flags, tmp_path):
    """--adapter: the first loss is the last one of the run before."""
    method, out, _ = run
    text = command(train.main, *flags, "--adapter", out / "adapter", "--steps", 1, "--batch", 4,
                   "--max-new-tokens", 2, "--out", tmp_path)
    after = json.loads((out / "summary.json").read_text())["after"]["loss"]
    assert f"going on with {out / 'adapter'}: {method}, rank 8" in joined(text)
    args = json.loads((tmp_path / "args.json").read_text())     # what was true, not the defaults
    assert (args["method"], args["quant_iters"], args["no_double_quant"]) == (method, 2, True)
    assert f"step 0: validation loss {after:.4f}, with the weights in four bits" in text


def test_eval(run, tmp_path):
    """The answers are those of Q + A B; the base, which may not fit, is not shown."""
    _, out, _ = run
    net, tok = loaded(out), data.Tokenizer(TINY)
    question = data.read(TINY / "test.jsonl")[0][0]
    expected, = evaluation.complete(net, tok, [question], max_new_tokens=12)
    flags = ["--ckpt", "tiny", "--adapter", out / "adapter", "--max-new-tokens", 12]
    assert command(evaluation.main, *flags, "--prompt", question) == expected + "\n"
    command(evaluation.main, *flags, "--accuracy", TINY / "test.jsonl", "--limit", 3, "--out",
            tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows[0]["response"] == expected


def test_merge(run, tmp_path, tokens):
    """convert.py merge writes Q + A B."""
    _, out, _ = run
    net, merged = loaded(out), tmp_path / "merged"
    text = command(convert.main, "merge", out, merged, "--dtype", "float32")
    assert "42 of 56 tensors changed" in text and "note" not in text
    assert_logits_equal(model.load(merged, "cpu")(tokens), net(tokens), 1e-5)
    path = out / "adapter" / "pissa.json"
    config = path.read_text()
    path.write_text(config.replace('"codes": "', '"codes": "0'))
    text = command(convert.main, "merge", out, tmp_path / "again")
    path.write_text(config)
    assert "note: " in text and "round to another code here" in text


def test_compress_says_what_it_leaves_out(run, tmp_path):
    _, out, _ = run
    text = command(convert.main, "compress", out / "adapter", tmp_path / "small")
    assert text.startswith("note: on the full-precision base")
    assert adapter.load(model.load("tiny", "cpu"), tmp_path / "small").pissa["rank"] in (4, 8)


def test_generation_in_four_bits(tokens):
    """The KV cache and the whole pass agree."""
    net = quiet(small_net(), "qpissa")
    assert isinstance(net.model.layers[0].mlp.up_proj.frozen, nf4.NF4)
    ids, = model.generate(net, [[1, 2, 3]], 10)
    whole = net(torch.tensor([[1, 2, 3, *ids]]))[0].argmax(-1)
    assert whole[2:-1].tolist() == ids
