"""The README's Python does what the text beside it says, and no generated table is out of date."""
import argparse
import json
import re
import runpy
import shlex
import shutil
import sys
from functools import partial

import pytest
import torch

import adapter
import convert
import data
import eval as evaluation
import formats
import model
import pissa
import train
from bench import plot
from conftest import (
    ROOT,
    TINY,
    assert_logits_equal,
    command,
    first_lines,
    hugging_face,
    layer_of,
)
from formats import meta_write
from support import options

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
MARKS = {"the idea": "def forward(x)", "PEFT": "PeftModel",
         "use it": "pissa.disabled(net)", "Trainer": "TrainingArguments"}


def run(name):
    """What the block with this mark defines, if it is pasted as it is."""
    code, = (block for block in BLOCKS if MARKS[name] in block)
    exec(compile(code, f"README.md, {name}", "exec"), given := {})
    return given


@pytest.fixture
def linear():
    """The layer that both of the first blocks take."""
    return model.load("tiny", "cpu").model.layers[0].mlp.up_proj


@pytest.fixture
def tiny_hf(tmp_path, monkeypatch):
    """The working directory has what `convert.py hf checkpoints/tiny runs/tiny-hf` writes."""
    monkeypatch.chdir(tmp_path)
    net = model.load("tiny", "cpu")
    hugging_face(net).save_pretrained("runs/tiny-hf")
    return net.requires_grad_(False)


def test_every_block_is_run():
    assert sorted(m for m in MARKS for block in BLOCKS if MARKS[m] in block) == sorted(MARKS)
    assert len(BLOCKS) == len(MARKS)


def test_the_idea(linear):
    """Step 0 is x W, the residual has no large singular values, and pissa.py agrees."""
    W, x, found = linear.weight.detach().T, torch.randn(5, 256), run("the idea")
    torch.testing.assert_close(found["W"], W)
    torch.testing.assert_close(found["forward"](x), x @ W, rtol=1e-4, atol=1e-4)
    S, r = torch.linalg.svdvals(W), found["r"]
    torch.testing.assert_close(torch.linalg.svdvals(found["W_res"])[:8], S[r:r + 8], rtol=0.02,
                               atol=0)
    layer = layer_of(linear, r)
    for name, M in ("A", layer.A), ("B", layer.B), ("W_res", layer.frozen.T):
        assert (found[name] - M).norm() < 0.1 * M.norm(), name       # another draw of randomness



def test_peft(tiny_hf):
    """The demo's adapter, here one that was only made, on PEFT's side."""
    pytest.importorskip("peft")
    tokens, net = torch.arange(20)[None], pissa.inject(tiny_hf, 4, progress=False)
    for _, m in pissa.layers(net):
        m.B.data *= 1.1
    adapter.save(net, "runs/demo/adapter")
    assert_logits_equal(run("PEFT")["net"](tokens).logits, net(tokens))


def test_the_authors_layout(tiny_hf):
    """The command writes it, and the call trains it: at first it is the base."""
    transformers, peft = map(pytest.importorskip, ("transformers", "peft"))
    words = re.search(r"`(python\s+convert.py decompose BASE OUT [^`]*)`", TEXT)[1].split()
    argv = [{"BASE": "runs/tiny-hf", "128": "8"}.get(word, word) for word in words[2:]]
    command(convert.main, *argv)
    call, = re.findall(r"`(PeftModel\.[^`]*\"OUT\"[^`]*)`", TEXT)
    base = transformers.AutoModelForCausalLM.from_pretrained("OUT", dtype=torch.float32)
    net, tokens = eval(call, {"PeftModel": peft.PeftModel, "base": base}), torch.arange(20)[None]
    assert_logits_equal(net(tokens).logits, tiny_hf(tokens), 1e-5)
    assert {n.split(".")[-3] for n, p in net.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B"}


def test_trainer(tiny_hf):
    """With Trainer's own defaults: what it leaves is an adapter, a model, and a checkpoint that is
    refused as a model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    tokens, found = torch.arange(20)[None], run("Trainer")
    trained = found["net"].eval().cpu()(tokens).logits
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    assert_logits_equal(from_pretrained("runs/trainer/merged")(tokens).logits, trained)
    base = from_pretrained("runs/tiny-hf")
    assert (base(tokens).logits - trained).abs().max() > 0.01
    assert_logits_equal(adapter.load(base, "runs/trainer/adapter")(tokens).logits, trained)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        from_pretrained("runs/trainer/checkpoint-3")


def test_the_prompt(tmp_path):
    """The template that README shows is what data.py asks, and its record is one that it reads."""
    shown = re.search(r"^```text\n(.*?)\n```", TEXT, re.M | re.S)[1]
    record = re.search(r"`(\{\"question.*?\})`", TEXT)[1]
    (tmp_path / "my.jsonl").write_text(record)
    (prompt, response), = data.read(tmp_path / "my.jsonl")
    assert shown == data.PROMPT.format(instruction=prompt) and response in record


@pytest.mark.long
def test_use_it(tmp_path, monkeypatch):
    """The files that it names are there, and the network is what it says at the end."""
    monkeypatch.chdir(tmp_path)
    found = run("use it")
    base = model.load("tiny", device="cpu")
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(found["logits"], base(tokens), rtol=0, atol=0)
    assert {m.A.shape[1] for _, m in pissa.layers(found["net"])} == {16}
    assert adapter.facts(found["net"])["bits"] == 4
    pairs = adapter.read_adapter(tmp_path / "runs" / "mine").pairs
    assert {A.shape[1] for A, _ in pairs.values()} == {32} and len(pairs) == 12
    load = partial(adapter.load, directory=tmp_path / "runs" / "mine")
    torch.testing.assert_close(model.load("tiny", "cpu", prepare=load)(tokens), base(tokens),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("page", plot.PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_show_what_was_measured(page):
    """As `python -m bench.plot` writes them; docs/memory.md shows what `--plan` prints, too."""
    assert "<!-- end -->" in page.read_text() and plot.updated(page) == page.read_text()


# --- commands

SHOWN = [*plot.PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "NOTES.md"]
PROGRAMS = {"pip", "hf", "curl", "python", "torchrun", "./check"}


def commands(page):
    """Every command that a page shows: fenced, indented, behind a `$`, or in a line of text."""
    text = re.sub(r"^```(python|text)\n.*?^```", "", page.read_text(), flags=re.M | re.S)
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
             for line in block.splitlines()]
    lines += re.findall(r"^(?:    |\$ )((?:python|torchrun) .*)", text, re.M)
    lines += re.findall(r"`((?:\w+=\w+ )?python [^`]*)`", text)
    for line in lines:
        for one in " ".join(line.split()).partition(";")[0].split(" && "):
            words = shlex.split(one, comments=True)
            yield words[words[0].startswith("OMP_"):]


class Parsed(BaseException):
    """A command line was understood."""


def parse(words, monkeypatch):
    """Hand the words to the program's own parser; whatever comes after that is not run."""
    def stop(parser, *args):
        _, rest = parse_known_args(parser, *args)
        if rest:
            parser.error(f"unrecognized arguments: {rest}")
        raise Parsed
    parse_known_args = argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    name, module = words[0], words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[module:])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)        # --device cuda is a choice
    monkeypatch.syspath_prepend((ROOT / name).parent)
    source = ROOT / (words[1].replace(".", "/") + ".py" if module else name)
    if "argparse" in source.read_text() or "options.for_" in source.read_text():
        with pytest.raises(Parsed):
            run_it, what = (runpy.run_module, words[1]) if module else (runpy.run_path, str(source))
            run_it(what, run_name="__main__")


@pytest.mark.long
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_understood(page, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = list(commands(page))
    assert found
    for program, *words in found:
        assert program in PROGRAMS, program
        if program == "torchrun":
            from torch.distributed.run import get_args_parser
            launch = get_args_parser().parse_args(words)
            program, words = "python", [launch.training_script, *launch.training_script_args]
        later = words[:2] == ["convert.py", "hf"] and 'command("hf"' not in (
            ROOT / "support" / "options.py").read_text()
        if program == "python" and words[:2] != ["-m", "pytest"] and not later:
            with monkeypatch.context() as patch:
                try:
                    parse(words, patch)
                except SystemExit as e:                              # --help ends with 0
                    assert not e.code, f"{' '.join(words)}: {capsys.readouterr().err}"


@pytest.mark.long
def test_llama2_as_readme_says(tmp_path, monkeypatch):
    """`train.py --ckpt llama2-7b --rank 64` on Meta's files under checkpoints/: a small model of
    the same layout, with the vocabulary left open, and few of the demo's problems as the default.
    """
    folder = tmp_path / "checkpoints" / "llama2-7b"
    net = model.init_weights(model.Llama(model.Config(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=2048, ffn_dim=192)), 0)
    meta_write.save_tensors(folder, net.config, net.named_parameters())
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    shutil.copy(TINY / "tokenizer.model", folder)
    first_lines(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(formats, "__file__", str(tmp_path / "formats" / "__init__.py"))  # the root
    monkeypatch.setattr(options, "tiny", lambda: ".")
    argv = next(words[1:] for program, *words in commands(ROOT / "README.md")
                if words[:4] == ["train.py", "--ckpt", "llama2-7b", "--rank"])
    assert argv == ["--ckpt", "llama2-7b", "--rank", "64"]
    command(train.main, *argv)
    saved = adapter.read_adapter(tmp_path / "runs" / "llama2-7b-pissa" / "adapter")
    assert {A.shape[1] for A, _ in saved.pairs.values()} == {128} and len(saved.pairs) == 7
    out = command(evaluation.main, "--ckpt", "llama2-7b", "--adapter",
                  "runs/llama2-7b-pissa/adapter", "--prompt", "1 + 1?", "--max-new-tokens", 4)
    assert "runs/llama2-7b-pissa/adapter" in out
