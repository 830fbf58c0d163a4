"""The README's Python does what the text beside it says, and no generated table is out of date."""
import re
from functools import partial

import pytest
import torch

import adapter
import model
import nf4
import pissa
import svd
from bench import plot
from conftest import ROOT, layer_of, relative_error, small_net

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
MARKS = {"the idea": "def forward(x)", "four bits": "nf4(W - A @ B)", "use it": "adapter.save("}


def run(name, **given):
    """What the block with this mark defines."""
    code, = (block for block in BLOCKS if MARKS[name] in block)
    exec(compile(code, f"README.md, {name}", "exec"), given)
    return given


@pytest.fixture
def linear():
    return small_net().model.layers[0].mlp.up_proj


def test_every_block_is_run():
    assert sorted(m for m in MARKS for block in BLOCKS if MARKS[m] in block) == sorted(MARKS)
    assert len(BLOCKS) == len(MARKS)


def test_the_idea(linear):
    """Step 0 is x W, the residual has no large singular values, and pissa.py agrees."""
    W, x = linear.weight.T, torch.randn(5, 48)
    found = run("the idea", W=W, r=4, randomized_svd=svd.randomized_svd)
    torch.testing.assert_close(found["forward"](x), x @ W, rtol=1e-5, atol=1e-5)
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(torch.linalg.svdvals(found["W_res"])[:8], S[4:12], rtol=1e-3,
                               atol=1e-4)
    layer = layer_of(linear, 4)
    for name, M in ("A", layer.A), ("B", layer.B), ("W_res", layer.frozen.T):
        torch.testing.assert_close(found[name], M.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["qpissa", "loftq"])
def test_four_bits(linear, method):
    """Its five turns leave the error of qpissa.py, which stops earlier if a turn makes it worse."""
    W, zero = linear.weight.T, (torch.zeros(48, 4), torch.zeros(4, 128))
    starts = [zero] if method == "loftq" else []        # what the first call returns instead

    def factors(W):
        return starts.pop() if starts else pissa.principal(W.T, pissa.Options(4, niter=None))

    def rounded(W):                                     # blocks of 64 go along the rows of W^T
        return nf4.quantize(W.T.contiguous()).dequantize().T

    found = run("four bits", W=W, svd=factors, nf4=rounded)
    left = W - found["Q"] - found["A"] @ found["B"]
    ours = relative_error(linear.weight, layer_of(linear, 4, method, niter=None, quant_iters=5))
    assert (left.norm() / W.norm()).item() == pytest.approx(ours, rel=0.02)
    assert ours <= (left.norm() / W.norm()).item() * (1 + 1e-5)


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
    for name, rank in ("mine", 32), ("small", 16):
        pairs = adapter.read_adapter(tmp_path / "runs" / name).pairs
        assert {A.shape[1] for A, _ in pairs.values()} == {rank} and len(pairs) == 12
    load = partial(adapter.load, directory=tmp_path / "runs" / "mine")
    torch.testing.assert_close(model.load("tiny", "cpu", prepare=load)(tokens), base(tokens),
                               rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("page", plot.PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_show_what_was_measured(page):
    """As `python -m bench.plot` writes them; docs/memory.md shows what `--plan` prints, too."""
    assert "<!-- end -->" in page.read_text() and plot.updated(page) == page.read_text()
