"""The examples run, and print what they claim."""
import ast
import os
import re
import subprocess
import sys

import pytest
import torch

import data
from conftest import ROOT, TINY
from examples import look

EXAMPLES = ROOT / "examples"


def printed(script, folder):
    """What an example prints, run as a learner runs it, from another folder."""
    done = subprocess.run([sys.executable, EXAMPLES / script], cwd=folder, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_lines(path):
    """How many lines of a script are code: no docstring, no comment, no empty line."""
    text = path.read_text()
    nodes = [n for n in ast.walk(ast.parse(text))
             if isinstance(n, ast.Module | ast.FunctionDef) and ast.get_docstring(n)]
    doc = {i for n in nodes for i in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    return sum(1 for i, line in enumerate(text.splitlines(), 1)
               if i not in doc and line.strip() and not line.strip().startswith("#"))


def numbers(out, name):
    """Of every line that starts with `name`, its numbers."""
    return [[float(n) for n in re.findall(r"\d+\.\d+", line)] for line in out.splitlines()
            if line.split()[:1] == [name]]


@pytest.mark.long
def test_40_lines(tmp_path):
    """Only torch, 40 lines, a generator for all random numbers, and what the docstring claims."""
    script = EXAMPLES / "pissa_in_40_lines.py"
    assert code_lines(script) == 40
    assert set(re.findall(r"^(?:from|import) (\w+)", script.read_text(), re.M)) == {"torch"}
    random = re.findall(r"torch\.rand\w*\(.*\)", script.read_text())
    assert len(random) == 3 and all("generator=g" in call for call in random)
    out = printed(script.name, tmp_path)
    (lora, lora2), (pissa, pissa2) = numbers(out, "lora"), numbers(out, "pissa")
    assert len(lora) == len(pissa) == 5 and lora[4] == min(lora[:4]) and pissa[4] == min(pissa[:4])
    assert pissa[0] < 0.6 * lora[0] and pissa2[0] < lora2[0]       # the smallest rate
    assert pissa[4] < 0.9 * lora[4]                                # task 1, each at its best rate
    assert pissa2[4] > 1.1 * lora2[4]                              # task 2: LoRA wins


@pytest.mark.long
def test_your_loop(tmp_path):
    out = printed("your_loop.py", tmp_path)
    differences = dict(re.findall(r"^(step 0|loaded|merged): outputs differ by ([\d.e+-]+\d)", out,
                                  re.M))
    assert set(differences) == {"step 0", "loaded", "merged"}
    assert max(map(float, differences.values())) < 1e-5
    start, loss = map(float, re.search(r"new task: ([\d.]+) -> ([\d.]+)", out).groups())
    assert loss < 0.5 * start and out.rstrip().endswith("layers are Linear")
    assert not list(tmp_path.iterdir())


def check_picture(path):
    """A wide PNG on a transparent ground, and not a blank one."""
    pixels = pytest.importorskip("matplotlib.image").imread(path)     # (h, w, 4) in 0 ... 1
    assert pixels.shape[1] > 2 * pixels.shape[0] > 800
    ground = pixels[..., 3] == 0
    assert ground[0].all() and ground[:, 0].all()
    colours = {tuple(p) for p in pixels[::7, ::7].reshape(-1, 4)}
    assert 0.4 < ground.mean() < 0.97 and len(colours) > 9


@pytest.mark.long
def test_singular_values(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    check_picture(look.singular_values(TINY, tmp_path, "layers.2.mlp.up_proj", rank=8))
    assert "layers.2.mlp.up_proj" in capsys.readouterr().out


@pytest.mark.long
def test_gradients(tmp_path):
    """LoRA's A has no gradient at the first step; with PiSSA, both have."""
    pytest.importorskip("matplotlib")
    examples = data.read(TINY / "train.jsonl")[:8]
    runs = look.gradients(TINY, tmp_path, examples, rank=4, lr=1e-3, lora_lr=2e-3, steps=2, batch=4)
    check_picture(tmp_path / "gradients.png")
    lora, pissa = runs["lora", 1e-3], runs["pissa", 1e-3]
    assert len(lora) == len(pissa) == 2
    assert lora[0]["A"] == 0.0 and lora[0]["B"] > 0 and pissa[0]["A"] > 0 and pissa[0]["B"] > 0
    assert lora[1]["A"] > 0
    assert lora[0]["loss"] == pytest.approx(pissa[0]["loss"], rel=1e-4)        # nothing changed yet


def test_numbers_of_the_picture():
    """What is drawn is W's spectrum, and the residual loses less than W in four bits."""
    name, W = look.read_matrix("tiny")
    assert name == "model.layers.3.self_attn.q_proj" and W.shape == (256, 256)
    S, W_res, shares = look.decompose(W, 16)
    torch.testing.assert_close(S, torch.linalg.svdvals(W))
    torch.testing.assert_close(torch.linalg.svdvals(W_res)[:240], S[16:], rtol=1e-3, atol=1e-4)
    whole = W.square().sum().item()
    assert shares[0] == pytest.approx(1 - W_res.square().sum().item() / whole, rel=1e-4)
    assert shares[1] == pytest.approx(S[-16:].square().sum().item() / whole, rel=1e-4)
    (lost, wide), (lost_res, wide_res) = look.rounding(W), look.rounding(W_res)
    assert lost_res < 0.9 * lost and wide_res < 0.9 * wide


@pytest.mark.long
def test_look_refuses(tmp_path):
    """One line for what a user may get wrong."""
    with pytest.raises(ValueError, match="fits 0 linear layers"):
        look.read_matrix("tiny", "layers.99.self_attn.q_proj")
    with pytest.raises(ValueError, match="fits 6 linear layers"):
        look.read_matrix("tiny", "q_proj")
    with pytest.raises(ValueError, match="--rank 200"):
        look.decompose(torch.eye(256), 200)
    done = subprocess.run([sys.executable, EXAMPLES / "look.py", "--ckpt", "nothing"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("look.py: no checkpoint nothing")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = subprocess.run([sys.executable, EXAMPLES / "look.py", "--only", "singular_values"],
                          cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.stderr == "look.py: the pictures need matplotlib: pip install matplotlib\n"


def read_notebook():
    """The walkthrough, as nbformat reads it."""
    return pytest.importorskip("nbformat").read(EXAMPLES / "walkthrough.ipynb", as_version=4)


def test_notebook_is_short():
    notebook = read_notebook()
    assert len(notebook.cells) <= 25
    assert notebook.metadata.kernelspec.name == "python3"
    stored = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert all(o.output_type == "stream" and len(o.text) < 1000 for o in stored)


@pytest.mark.slow
def test_notebook():
    """All cells run, and their asserts hold."""
    nbclient, notebook = pytest.importorskip("nbclient"), read_notebook()
    pytest.importorskip("ipykernel")
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                            resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    out = "".join(o.text for c in notebook.cells for o in c.get("outputs", [])
                  if o.get("name") == "stdout")
    assert "LoRA    A 0.00" in out and ("PEFT's logits differ by" in out or "skipped" in out)
