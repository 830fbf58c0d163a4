"""--offload: the same gradients; what is kept comes back in time, and nothing else goes."""
import pytest
import torch

import data
import train
from conftest import failure, first_lines, quiet, small_net
from support import offload
from test_graphs import examples


@pytest.fixture
def net(monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 1)
    net = quiet(small_net()).train()
    net.checkpointing = True
    return net


def gradients(net, batch):
    net.zero_grad()
    train.loss_sum(net, *batch).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def test_gradients_are_the_same(net, monkeypatch):
    """Bit for bit. Every layer's input and what the last norm keeps is on its way back when it is
    asked for, but for the last."""
    (batch,), made, late = data.micro_batches(examples(), 10**6), [], []
    expected = gradients(net, batch)
    offload.through_host_memory(net)
    init, fetch = offload.Kept.__init__, offload.Kept.fetch
    monkeypatch.setattr(offload.Kept, "__init__",
                        lambda self, x, *rest: made.append(self) or init(self, x, *rest))
    monkeypatch.setattr(offload.Kept, "fetch",
                        lambda self: late.append(self.back is None) or fetch(self))
    found = gradients(net, batch)
    assert found.keys() == expected.keys() and len(found) > 0
    assert all(torch.equal(found[n], g) for n, g in expected.items())
    assert len(made) > net.config.n_layers
    assert sum(late) == 1 and not made[0].earlier and all(k.host is None for k in made)


def test_two_micro_batches_and_one_that_failed(net):
    """What a forward without a backward left behind is not in the way."""
    first, second = (data.micro_batches(examples(seed=s), 10**6)[0] for s in (0, 1))
    expected = [gradients(net, b) for b in (first, second)]
    offload.through_host_memory(net)
    train.loss_sum(net, *second)
    for batch, exact in zip((first, second), expected, strict=True):
        found = gradients(net, batch)
        assert all(torch.equal(found[n], g) for n, g in exact.items())


def test_small_tensors_stay(net, monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 10**9)
    monkeypatch.setattr(offload.Kept, "__init__", lambda *a: pytest.fail("a small tensor went"))
    offload.through_host_memory(net)
    gradients(net, data.micro_batches(examples(), 10**6)[0])


@pytest.mark.parametrize("more", [["--plain"], ["--shard"]])
def test_refused(more, tmp_path):
    flags = "--ckpt", "tiny", "--data", first_lines(tmp_path, 8), "--out", tmp_path / "a"
    assert "--offload" in failure("train.py", *map(str, flags), "--offload", *more)
