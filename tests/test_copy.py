"""What people copy works where it is copied to, with fast.py and without it."""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

FAST = re.compile(r" *(import fast|from fast import faster|@faster\(.*\)|with fast\.off\(\):)\n")
MLP = """
import sys
import torch
import pissa
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 30))
x, y = torch.randn(16, 40), torch.randn(16, 30)
before = net(x)
pissa.inject(net, 4, targets=("0", "2"), progress=False)
assert (net(x) - before).abs().max() < 1e-5
optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3):
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(loss.item())
pissa.merge(net)
assert type(net[0]) is nn.Linear
ours = {"adapter", "model", "nf4", "qpissa", "data", "train", "formats", "support"}
assert not ours & set(sys.modules), ours & set(sys.modules)
assert ("fast" in sys.modules) == (len(sys.argv) > 1)
"""


def stripped(path):
    """A file's text without its lines about fast.py."""
    text = path.read_text()
    assert FAST.search(text), f"{path} has no line about fast.py"
    return FAST.sub("", text)


def run(folder, *argv):
    """What a Python program prints that sees nothing of ours except this folder."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *argv], cwd=folder, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_copies_of_pissa_and_svd(tmp_path):
    """With fast.py beside them, and without it and its lines: the same losses."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    for name in ("pissa.py", "svd.py", "fast.py"):
        shutil.copy(ROOT / name, tmp_path / "with")
    shutil.copy(ROOT / "svd.py", tmp_path / "without")
    (tmp_path / "without" / "pissa.py").write_text(stripped(ROOT / "pissa.py"))
    losses = [list(map(float, run(tmp_path / folder, "-c", MLP, *more).split()))
              for folder, more in (("with", ["fast"]), ("without", []))]
    assert len(losses[0]) == 3 and losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("names, code", [
    (["svd.py"], "import torch, svd; print(svd.randomized_svd(torch.eye(50), 3)[1].sum().item())"),
    (["nf4.py"],
     "import torch, nf4; print(3 * nf4.quantize(torch.ones(64)).dequantize()[0].item())"),
    (["fast.py"], "import torch, fast; print(3 * fast.swiglu(torch.zeros(1), torch.ones(1))"
     ".exp().item())"),
    (["pissa.py", "svd.py", "fast.py", "qpissa.py", "nf4.py"],
     "import torch, pissa; net = torch.nn.Sequential(torch.nn.Linear(64, 64)); "
     "pissa.inject(net, 3, 'qpissa', '0', progress=False); print(float(net[0].A.shape[1]))")],
    ids=["svd", "nf4", "fast", "qpissa"])
def test_copies_by_themselves(tmp_path, names, code):
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    assert float(run(tmp_path, "-c", code)) == pytest.approx(3, rel=1e-6)


def losses(folder, tree, *argv):
    """The losses in the log of a run of train.py."""
    run(tree, "train.py", "--steps", "10", "--max-new-tokens", "4", "--test-data", "", "--device",
        "cpu", "--out", str(folder), *argv)
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory):
    """The demo's first ten losses."""
    return losses(tmp_path_factory.mktemp("run"), ROOT)


@pytest.mark.long
def test_without_fast(tmp_path, as_it_is):
    """fast.py deleted, and every line about it in model.py, pissa.py and train.py."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(
        ".git", "runs", "fast.py", "tests", "bench", "__pycache__", ".venv*"))
    for name in ("model.py", "pissa.py", "train.py"):
        (tree / name).write_text(stripped(ROOT / name))
    assert losses(tmp_path / "run", tree) == pytest.approx(as_it_is, rel=1e-6)


@pytest.mark.long
def test_plain(tmp_path, as_it_is):
    """train.py --plain: fast.py is there, and not used."""
    assert losses(tmp_path / "run", ROOT, "--plain") == pytest.approx(as_it_is, rel=1e-6)
