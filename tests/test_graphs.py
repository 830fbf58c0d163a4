"""bench/graphs.py: padded batches give the same loss and gradients."""
import pytest
import torch

import data
import pissa
import relatives
import train
from bench import graphs
from conftest import small_net


def examples(n=8, longest=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (n,), generator=g).tolist()
    return [(torch.randint(5, 50, (k,), generator=g).tolist(), 1 + k // 3) for k in lengths]


@pytest.fixture
def net():
    return small_net().requires_grad_(True)


def test_padding_changes_nothing(net, monkeypatch):
    """Loss and gradients of a padded batch are those of train.loss_sum, in float64."""
    monkeypatch.setattr(graphs, "TEXT", 64)
    monkeypatch.setattr(graphs, "LENGTH", 16)
    (batch,), net = data.micro_batches(examples(), 10**6), net.double()
    params = list(dict.fromkeys(net.parameters()))
    tokens, where, learnt, labels = graphs.padded(*batch)
    assert tokens.shape[1] % 16 == 0 and len(where) % 64 == 0 and len(where) > len(batch[2])
    assert len(learnt) == len(labels) and len(labels) % 64 == 0 and len(labels) < len(where)
    assert (labels != -100).sum() == (batch[1] != -100).sum()
    loss, grads = graphs.loss_and_gradients(net, params, tokens, where, learnt, labels)
    expected = train.loss_sum(net, *batch)
    torch.testing.assert_close(loss, expected.detach())
    for found, exact in zip(grads, torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(found, exact)


def test_loss_sum_is_replaced_only_inside(net):
    """Its gradients are scaled like any loss's; what needs no gradient stays plain."""
    (batch,), plain = data.micro_batches(examples(), 10**6), train.loss_sum
    (plain(net, *batch) / 7).backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    with graphs.used(net):
        assert train.loss_sum is not plain
        (train.loss_sum(net, *batch) / 7).backward()
        with torch.no_grad():
            assert torch.equal(train.loss_sum(net, *batch), plain(net, *batch))
    assert train.loss_sum is plain
    for p, g in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_an_outdated_graph_is_noticed(net, monkeypatch):
    """A graph that reads weights that the network has no more."""
    (batch,) = data.micro_batches(examples(), 10**6)

    def frozen(f, pool, *tensors):
        once = f(*tensors)
        return lambda *new: once

    monkeypatch.setattr(graphs, "recorded", frozen)
    with pytest.raises(RuntimeError, match="a graph's loss"), graphs.used(net):
        train.loss_sum(net, *batch)
        net.lm_head.weight.data.normal_()


@pytest.mark.parametrize("method", ["pissa", "svft", "delta_lora", "qpissa"])
def test_what_was_recorded_serves_the_next_network(method, monkeypatch):
    """Loss and gradients of a second network, by graphs that read the first one's memory, are its
    own, also after an optimizer moved its parameters or a hook changed its buffers."""
    calls, plain = [], train.loss_sum
    (batch,), kept = data.micro_batches(examples(), 10**6), {}

    def counted(f, pool, *tensors):
        calls.append(f)
        return f

    monkeypatch.setattr(graphs, "recorded", counted)
    for seed in 0, 1:
        net = pissa.inject(small_net(), 4, relatives.known(method) or method, seed=seed,
                           progress=False)
        params = [p for p in net.parameters() if p.requires_grad]
        with graphs.used(net, kept):
            for step in range(2):
                train.loss_sum(net, *batch).backward()
                found = [p.grad for p in params]
                net.zero_grad()
                plain(net, *batch).backward()
                for g, p in zip(found, params, strict=True):
                    torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-5)
                    p.data = p.data - 0.1 * p.grad                          # at another address
                net.zero_grad()
                if hook := getattr(relatives.known(method), "after_step", None):
                    hook(net, 10 * step + 1, 10)
                assert kept["net"] is net or seed
    assert len(calls) == 1
    with graphs.used(pissa.inject(small_net(), 3, progress=False), kept):          # another shape
        assert kept["made"] == {}


def test_what_cannot_be_recorded_is_computed_as_usual(net, monkeypatch):
    """A method that copies from the host, for example."""
    (batch,), plain = data.micro_batches(examples(), 10**6), train.loss_sum

    def refused(f, pool, *tensors):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "recorded", refused)
    with graphs.used(net) as why:
        assert torch.equal(train.loss_sum(net, *batch), plain(net, *batch))
        assert torch.equal(train.loss_sum(net, *batch), plain(net, *batch))
    assert why == ["operation not permitted when stream is capturing"]
