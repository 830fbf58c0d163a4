"""The family of PiSSA: what holds for every relative, and the property of each."""
import json

import pytest
import torch
import torch.nn.functional as F

import adapter
import model
import pissa
import relatives
import train
from conftest import (
    SMALL,
    TINY,
    assert_logits_equal,
    command,
    hugging_face,
    optimise,
    small_net,
)
from relatives import calibrate
from support import plan, resume
from test_parallel import assert_alike, ended, torchrun
from test_resume import assert_same, interrupt

NAMES = relatives.names()
STEP_0 = {}                    # {name: the largest relative difference of logits at step 0}
OWN = {}                       # options with which a relative is tested, if not its defaults


def batches(count=3, rows=4):
    g = torch.Generator().manual_seed(7)
    return [(torch.randint(0, 101, (rows, 17), generator=g),) for _ in range(count)]


def loss_of(net, tokens):
    return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def told(name, net, rank=4, **own):
    """A relative that is told its options, and what it has measured of `net`."""
    method = relatives.find(name)
    own = {**getattr(method, "OPTIONS", {}), **OWN.get(name, {}), **own}
    if not hasattr(method, "STATISTIC"):
        return relatives.told(method, own)
    options = pissa.Options(rank, own=own)
    return relatives.told(method, own, calibrate.measure(net, method, batches(), loss_of,
                                                         options).pop)


def injected(name, rank=4, net=None, **own):
    net = net or small_net()
    return pissa.inject(net, rank, told(name, net, rank, **own), progress=False, keep_base=True,
                        niter=None)


@pytest.mark.parametrize("name", NAMES)
def test_trains_saves_loads_and_merges(name, tokens, tmp_path):
    """Step 0 is the base. 10 steps lower the loss. Saved, loaded, in PEFT, merged: the same."""
    peft = pytest.importorskip("peft")
    base, net = small_net(), injected(name)
    with torch.no_grad():
        assert_logits_equal(net(tokens), base(tokens), STEP_0.get(name, 1e-5))
    losses, _ = optimise(net, tokens, 10, lr=3e-3)
    assert losses[-1] < losses[0] - 0.01
    adapter.save(net, tmp_path)
    method = relatives.find(name)
    with torch.no_grad():
        want = net(tokens)
        again = adapter.load(small_net(), tmp_path, relative=relatives.known, keep_base=True)
        assert_logits_equal(again(tokens), want, 1e-6)
        plain = adapter.load(small_net(), tmp_path)                  # without what has made it
        assert_logits_equal(plain(tokens), want)
        twin = peft.PeftModel.from_pretrained(hugging_face(small_net()), tmp_path)
        assert_logits_equal(twin(tokens).logits, want)
        with pissa.disabled(net):
            assert torch.equal(net(tokens), base(tokens))
        assert again.pissa["method"] == name
        assert again.pissa["own"] == {**getattr(method, "OPTIONS", {}), **OWN.get(name, {})}
        assert type(pissa.layers(again)[0][1]) is getattr(method, "Layer", pissa.PissaLinear)
    trained = [{n: p.shape for n, p in m.named_parameters() if p.requires_grad}
               for m in (net, again)]
    assert trained[0] == trained[1]                         # training goes on as it would have
    assert optimise(again, tokens, 3)[0] == pytest.approx(optimise(net, tokens, 3)[0], rel=1e-5)
    with torch.no_grad():
        want = net(tokens)
        assert_logits_equal(pissa.merge(net)(tokens), want)


@pytest.mark.parametrize("name", NAMES)
def test_plan(name):
    """It counts what is trained, and the command prints it."""
    net = injected(name)
    count = sum(p.numel() for p in net.parameters() if p.requires_grad)
    method = relatives.find(name)
    found = plan.estimate(SMALL, relatives.told(method, getattr(method, "OPTIONS", {})), 4)
    assert found["trained"] == count
    assert "expected peak" in command(train.main, "--method", name, "--plan")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join((TINY / "train.jsonl").read_text().splitlines(keepends=True)[:32]))
    return [*map(str, ["--ckpt", "tiny", "--data", path, "--val-fraction", 0.25, "--rank", 4,
                       "--lr", 1e-3, "--batch", 8, "--micro-batch", 2, "--max-new-tokens", 1,
                       "--steps", 10, "--save-every", 2, "--calibrate", 8, "--device", "cpu"])]


def some(*quick):
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


@pytest.mark.long
@pytest.mark.parametrize("name", some("mica"))
def test_resumed_is_uninterrupted(flags, tmp_path, monkeypatch, name):
    command(train.main, *flags, "--method", name, "--out", tmp_path / "whole")
    before, after = (json.loads((tmp_path / "whole" / "summary.json").read_text())[k]["loss"]
                     for k in ("before", "after"))
    assert after < before
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        for kind in {torch.optim.AdamW, *own_optimizer(name)}:
            interrupt(patch, 6, RuntimeError("a CUDA error"), kind)
        command(train.main, *flags, "--method", name, "--out", tmp_path / "run")
    resume.release()
    text = command(train.main, "--resume", "--out", tmp_path / "run")
    assert "after step 5 of 10" in text
    assert_same(tmp_path / "whole", tmp_path / "run")
    a, b = (adapter.read_adapter(tmp_path / out / "adapter") for out in ("whole", "run"))
    assert all(torch.equal(x, y) for n in a.pairs for x, y in zip(a.pairs[n], b.pairs[n]))
    assert all(torch.equal(a.extras[k], b.extras[k]) for k in a.extras)


def own_optimizer(name):
    """The class of a relative's own optimizer, if it has one."""
    method = relatives.find(name)
    return {type(method.optimizer(injected(name), 1e-3, 0.0))} if hasattr(
        method, "optimizer") else set()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(flags, tmp_path, name):
    two = torchrun(*flags, "--method", name, "--shard=no", "--out", tmp_path / "two")
    command(train.main, *flags, "--method", name, "--out", tmp_path / "one")
    ended(two)
    assert_alike(tmp_path / "one", tmp_path / "two", 1e-5)
