"""bench/measures.py against float64, and bench/studies.py's jobs."""

import copy

import pytest
import torch

import pissa
import relatives
from bench import measures, studies
from conftest import quiet, small_net
from relatives import milora
from support import options

JOB = {"ckpt": "tiny", "method": "pissa", "rank": 4, "general": "stories"}


def trained(method, rank=4):
    """(a network whose factors were moved at random, base, DeltaW of every matrix in float64)."""
    net, rng = small_net(), torch.Generator().manual_seed(1)
    W = {n: net.get_submodule(n).weight.clone() for n in measures.matrices(net)}
    deltas = {}
    if method == "full":
        for n in W:
            deltas[n] = torch.randn(W[n].shape, generator=rng, dtype=torch.float64) * 0.01
            net.get_submodule(n).weight.data = (W[n].double() + deltas[n]).float()
        return net, W.get, deltas
    quiet(net, rank, method)
    for n, m in pissa.layers(net):
        before = m.A.detach().double() @ m.B.detach().double()
        for M in m.A, m.B:
            M.data += torch.randn(M.shape, generator=rng) * 0.02
        deltas[n] = (m.A.detach().double() @ m.B.detach().double() - before).T
    return net, W.get, deltas


@pytest.mark.parametrize("method", ["pissa", "lora", "full", milora, "qpissa", "qlora", "loftq"])
def test_change(method):
    net, base, deltas = trained(method)
    assert deltas.keys() == measures.matrices(net).keys() and len(deltas) == 14
    for n, m in measures.matrices(net).items():
        error = (measures.change(m, base(n)).double() - deltas[n]).norm() / deltas[n].norm()
        assert error < (1e-3 if method == "full" else 1e-4)


def test_learnt_against_float64():
    net, base, deltas = trained("pissa")
    found = measures.learnt(net, base, JOB)
    top, bottom, angle, norm = [], [], [], []
    for n, D in deltas.items():
        W = base(n).double()
        U, V = torch.linalg.eigh(W @ W.T)[1].flip(1), torch.linalg.eigh(W.T @ W)[1].flip(1)
        k = min(W.shape)
        P = U[:, :4] @ U[:, :4].T  # projectors: no signs
        left = torch.linalg.eigh(D @ D.T)[1][:, -4:]
        top.append((P @ D).norm() ** 2 / D.norm() ** 2)
        last = V[:, k - 4 : k]
        bottom.append((D @ last).norm() ** 2 / D.norm() ** 2)
        angle.append(torch.trace(P @ left @ left.T) / 4)
        norm.append(D.norm() / W.norm())
    for key, values in (
        ("top_left", top),
        ("bottom_right", bottom),
        ("angle_left", angle),
        ("norm", norm),
    ):
        assert found[f"learnt_{key}"] == pytest.approx(float(sum(values)) / 14, rel=2e-3), key
    D = deltas["model.layers.0.self_attn.q_proj"]
    assert found["learnt_stable_rank"] > 1 and torch.linalg.matrix_rank(D) <= 8
    spectrum = found["learnt_spectrum"]
    assert len(spectrum) == 64 and max(spectrum[8:]) < 1e-5 < spectrum[7]  # rank 2 r


def test_shares_of_known_directions():
    """In the first r directions of W, in the last, and in none."""
    torch.manual_seed(0)
    W = torch.randn(12, 20, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    first = measures.subspaces(U[:, :3] @ Vh[:3], W, 3)
    last = measures.subspaces(U[:, -3:] @ Vh[-3:], W, 3)
    for name in "top_left", "top_right", "angle_left", "angle_right":
        assert first[name] == pytest.approx(1) and last[name] == pytest.approx(0, abs=1e-12)
    assert [last["bottom_left"], last["bottom_right"]] == pytest.approx([1, 1])
    assert not any(measures.subspaces(0 * W, W, 3).values())


def test_nothing_learnt():
    net = small_net()
    W = {n: net.get_submodule(n).weight.clone() for n in measures.matrices(net)}
    quiet(net, 4, "pissa")
    found = measures.learnt(net, W.get, JOB)
    assert found["learnt_norm"] == found["learnt_stable_rank"] == 0


@pytest.mark.parametrize("niter", [0, None])
def test_svd_error(niter):
    net = small_net()
    W = {n: net.get_submodule(n).weight.clone() for n in measures.matrices(net)}
    quiet(net, 4, "pissa", niter=niter)
    module = net.get_submodule("model.layers.1.mlp.up_proj")
    module.A0, module.B0 = 1.3 * module.A0, module.B0  # the worst by far
    S = torch.linalg.svdvals(W["model.layers.1.mlp.up_proj"].double())
    rest = (
        W["model.layers.1.mlp.up_proj"].double() - (module.A0.double() @ module.B0.double()).T
    ).norm()
    found = measures.svd_error(net, W.get, JOB)
    assert found["svd_worst"] == pytest.approx(float(rest / S[4:].norm() - 1), rel=1e-3)
    assert 0 <= found["svd_mean"] < found["svd_worst"]


def test_svd_error_needs_what_was_subtracted():
    net = quiet(small_net(), 4, "lora")
    with pytest.raises(ValueError, match="lora subtracts no A B"):
        measures.svd_error(net, None, {**JOB, "method": "lora"})


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked(bits):
    """The same weights, and x is not rounded for the product: as a plain layer has it."""
    net = pissa.inject(small_net(), 4, "qpissa", bits=bits, progress=False)
    tokens = torch.arange(30).view(2, 15)
    before = net(tokens)
    merged = copy.deepcopy(net)
    for _, m in pissa.layers(merged):
        m.W = pissa.residual(pissa.as_tensor(m.frozen), *m.factors(), sign=1)
    with measures.unpacked(net):
        torch.testing.assert_close(net(tokens), merged(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(net(tokens), before)
    apart = (before - merged(tokens)).norm() / before.norm()
    assert (apart > 1e-3) == (bits == 8)


def test_forgetting():
    """Perplexity by its definition; W stands in only meanwhile."""
    import model

    net = model.load("tiny", "cpu", torch.float32)
    W = {n: net.get_submodule(n).weight.clone() for n in measures.matrices(net)}
    total, n = 0.0, 0
    plain = copy.deepcopy(net)
    with torch.no_grad():
        for ids, _ in measures.windows("tiny", "stories"):
            logits = plain(torch.tensor([ids]))[0, :-1].double()
            total -= logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum().item()
            n += len(ids) - 1
    quiet(net, 4, "lora")
    for _, m in pissa.layers(net):
        m.B.data += 0.3
    found = measures.forgetting(net, W.get, JOB)
    before = float(torch.tensor(total / n).exp())
    assert found["perplexity_before"] == pytest.approx(before, rel=1e-4)
    assert found["perplexity"] > 1.05 * before and all(m.W is None for _, m in pissa.layers(net))


@pytest.mark.parametrize("name", studies.STUDIES)
@pytest.mark.parametrize("tiny", [False, True])
def test_jobs(name, tiny, monkeypatch):
    """No job twice; every key, method and measure exists; the tiny grid is small."""
    fake = [{**j, "val": abs(j["lr"] - 1e-3)} for j in studies.rates(tiny)]
    monkeypatch.setattr(studies, "rows_of", lambda *_: fake)
    jobs = studies.STUDIES[name](tiny)
    assert len({str(sorted(j.items())) for j in jobs}) == len(jobs)
    known = vars(options.train_parser("").parse_args([]))
    for j in jobs:
        assert set(j) <= {*known, "measure", "general", "graphs"}
        relatives.known(j["method"])
        assert all(callable(getattr(measures, m)) for m in j.get("measure", ()))
        assert j.get("niter") is None or options.power_iterations(str(j["niter"])) != ""
    assert not tiny or len(jobs) <= 24 and {j["steps"] for j in jobs} <= {30, 8}


def test_seeds_surround_the_best(monkeypatch):
    fake = [{**j, "val": abs(j["lr"] - 1e-3)} for j in studies.rates(False)]
    monkeypatch.setattr(studies, "rows_of", lambda *_: fake)
    jobs = studies.seeds(False)
    assert {j["lr"] for j in jobs} == {3e-4, 1e-3, 3e-3} and {j["seed"] for j in jobs} == {1, 2}
    monkeypatch.setattr(studies, "rows_of", lambda *_: [])
    with pytest.raises(ValueError, match="run the study"):
        studies.seeds(True)
