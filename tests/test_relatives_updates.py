"""LoRA-Pro, LoRA-RITE and Delta-LoRA: the property of each. test_relatives.py has the rest."""
import copy
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import adapter
import pissa
import relatives
from conftest import assert_logits_equal, hugging_face, small_net
from relatives import delta_lora, lora_pro, lora_rite
from test_relatives import injected


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def pair(n, m, r, seed, kind="both"):
    """A (n, r) and B (r, m) in float64, some of which have less than the full rank."""
    A, B = random(n, r, seed=seed), random(r, m, seed=seed + 1)
    if kind == "B = 0":
        B.zero_()
    if kind == "lower rank":
        A[:, -1], B[0] = A[:, 0] - A[:, 1], 2 * B[1]
    if kind == "ill":
        A, B = A * 10.0 ** -torch.arange(r), B * 10.0 ** torch.arange(r)[:, None]
    return A, B


# ---------------------------------------------------------------------------------------- LoRA-Pro

@pytest.mark.parametrize("kind", ["both", "B = 0", "lower rank", "ill"])
@pytest.mark.parametrize("n, m, r", [(7, 9, 3), (9, 5, 4), (6, 6, 3)])
def test_lora_pro_is_a_least_squares_solution(n, m, r, kind):
    """Nearest to the full gradient, and of all those solutions the nearest to LoRA's."""
    for seed in range(0, 50, 10):
        (A, B), G = pair(n, m, r, seed, kind), random(n, m, seed=seed + 2)
        dA, dB = G @ B.T, A.T @ G
        A_g, B_g = lora_pro.adjusted(A, B, dA, dB)
        M = torch.cat([torch.kron(eye(n), B.T.contiguous()), torch.kron(A, eye(m))], 1)
        loras, found = (torch.cat([X.flatten(), Y.flatten()]) for X, Y in ((dA, dB), (A_g, B_g)))
        best = loras + torch.linalg.lstsq(M, G.flatten() - M @ loras, driver="gelsd").solution
        torch.testing.assert_close(M @ best, (A_g @ B + A @ B_g).flatten(), rtol=1e-6, atol=1e-6)
        if kind != "ill":
            torch.testing.assert_close(best, found, rtol=1e-8, atol=1e-8)
        ours, theirs = ((M @ x - G.flatten()).norm() for x in (found, loras))
        assert ours <= theirs * (1 + 1e-9)
        assert ours < 0.99 * theirs or kind == "B = 0"
        scaled = min((c * (M @ loras) - G.flatten()).norm() for c in torch.logspace(-4, 0, 100))
        assert ours <= scaled * (1 + 1e-9)                    # nor is it only of another length


@pytest.mark.parametrize("start", ["lora", "pissa"])
def test_lora_pro_gives_adamw_adjusted_gradients(start):
    """Its steps are those of torch's AdamW with gradients adjusted beforehand."""
    nets = [injected("lora_pro", start=start) for _ in range(2)]
    assert (pissa.layers(nets[0])[0][1].A0 is None) == (start == "lora")
    pairs = [p for _, m in pissa.layers(nets[1]) for p in (m.A, m.B)]
    optimizers = [lora_pro.optimizer(nets[0], 1e-2, 0.1),
                  torch.optim.AdamW(pairs, 1e-2, weight_decay=0.1)]
    before = [p.detach().clone() for p in pairs]
    for step in range(3):
        for net in nets:
            backward(net, step)
        for A, B in zip(pairs[::2], pairs[1::2]):
            A.grad, B.grad = lora_pro.adjusted(A.data, B.data, A.grad, B.grad)
        for o in optimizers:
            o.step()
            o.zero_grad()
    ours = [p for _, m in pissa.layers(nets[0]) for p in (m.A, m.B)]
    for p, q, old in zip(ours, pairs, before, strict=True):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, old)


def backward(net, step):
    tokens = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(step))
    F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


# --------------------------------------------------------------------------------------- LoRA-RITE

def trained(A, B, make, steps=8):
    """A B after some steps on a loss that depends on A B only."""
    A, B = (torch.nn.Parameter(M.clone()) for M in (A, B))
    x, y = random(20, len(A), seed=3), random(20, B.shape[1], seed=4)
    optimizer = make([A, B])
    for _ in range(steps):
        optimizer.zero_grad()
        (torch.tanh(x @ A @ B / 3) - y).square().mean().backward()
        optimizer.step()
    return (A @ B).detach()


def rite(params, escape=False):
    return lora_rite.LoRARITE(params, {"lr": 0.03, "weight_decay": 0.1, "escape": escape})


R = {"orthogonal": torch.linalg.qr(random(3, 3, seed=5))[0],
     "scaled": 10 * eye(3),
     "uneven": torch.diag(torch.tensor([0.01, 1, 30], dtype=torch.float64)),
     "any": random(3, 3, seed=6)}


@pytest.mark.parametrize("kind", R)
@pytest.mark.parametrize("start", ["both", "B = 0"])
def test_lora_rite_does_not_depend_on_the_factors(kind, start):
    """(A R) (R^-1 B) becomes what A B becomes. With Adam it does not."""
    A, B = pair(12, 10, 3, 0, start)
    other = A @ R[kind], torch.linalg.solve(R[kind], B)
    torch.testing.assert_close(other[0] @ other[1], A @ B)

    def apart(make):
        one, two = trained(A, B, make), trained(*other, make)
        return ((one - two).norm() / (one - A @ B).norm()).item()

    assert apart(rite) < 1e-6 and apart(lambda p: rite(p, escape=True)) < 1e-6
    assert apart(lambda p: torch.optim.AdamW(p, 0.03, weight_decay=0.1)) > 0.02


def test_lora_rites_first_step_is_whitened():
    """Without the size of B, the columns of the first step of A are orthogonal, of length sqrt n.

    They span what those of the gradient do. So it is lr U V^T sqrt n of the gradient's SVD.
    """
    A, B = (torch.nn.Parameter(M) for M in pair(12, 10, 3, 0))
    before, dA = A.detach().clone(), random(12, 3, seed=7)
    A.grad, B.grad = dA, torch.zeros_like(B)
    basis, size = torch.linalg.qr(B.detach().T)
    lora_rite.LoRARITE([A, B], {"lr": 0.1, "weight_decay": 0.0}).step()
    U, _, Vh = torch.linalg.svd(dA @ torch.linalg.inv(size), full_matrices=False)
    torch.testing.assert_close((before - A.detach()) @ size.T, 0.1 * 12**0.5 * U @ Vh, rtol=1e-5,
                               atol=1e-5)


def test_lora_rite_moves_its_moments_to_a_new_basis():
    """rho is the largest eigenvalue that the new basis has lost: 0 if it is the old one turned."""
    O, basis = R["orthogonal"], torch.linalg.qr(random(10, 3))[0]
    V = torch.diag(torch.tensor([3.0, 2, 1])).double()
    state = {"basis": basis[None], "V": V[None], "rho": torch.zeros(1, 1, 1).double(),
             "M": random(1, 12, 3)}
    zero, one = torch.zeros(1, 12, 3).double(), eye(3)[None]
    b1, b2 = (b * (1 - b**5) / (1 - b**6) for b in (0.9, 0.999))
    turned = copy.deepcopy(state)
    lora_rite.direction(turned, 6.0, zero, (basis @ O)[None], one, True)
    torch.testing.assert_close(turned["V"][0], b2 * O.T @ V @ O)
    torch.testing.assert_close(turned["M"], b1 * state["M"] @ O)
    assert turned["rho"].abs() < 1e-12
    lost = basis.clone()
    full = torch.linalg.qr(torch.cat([basis, random(10, 1, seed=9)], 1))[0]
    lost[:, 0] = full[:, 3]                          # the direction with the largest eigenvalue
    lora_rite.direction(state, 6.0, zero, lost[None], one, True)
    torch.testing.assert_close(state["V"][0], b2 * torch.diag(torch.tensor([0.0, 2, 1])).double())
    torch.testing.assert_close(state["rho"].item(), b2)                       # 3, 2, 1 -> 2, 1, 0
    state |= {"basis": basis[None], "V": V[None], "rho": torch.zeros(1, 1, 1).double()}
    lora_rite.direction(state, 6.0, zero, lost[None], one, False)
    assert state["rho"] == 0


@pytest.mark.parametrize("escape", [False, True])
def test_lora_rite_is_told_whether_to_keep_what_escapes(escape):
    """By --option escape=true."""
    net = small_net()
    method = relatives.chosen(Namespace(method="lora_rite", option=[f"escape={escape}".lower()],
                                        rank=3), net, [], None)
    made = lora_rite.optimizer(pissa.inject(net, 3, method, progress=False), 0.1, 0.0)
    assert made.param_groups[0]["escape"] is escape


@pytest.mark.parametrize("method", [lora_pro, lora_rite], ids=lambda m: m.__name__[10:])
def test_pairs_together_step_as_each_by_itself(method):
    """Of two shapes, one of them square, in three steps; the states are each parameter's own."""
    shapes = (6, 9), (4, 4), (6, 9), (6, 9), (4, 4)
    start = [M for i, (n, m) in enumerate(shapes) for M in pair(n, m, 4, i)]
    make = {lora_pro: lambda p: lora_pro.LoRAPro(p, 0.1, weight_decay=0.1),
            lora_rite: lambda p: lora_rite.LoRARITE(p, {"lr": 0.1, "weight_decay": 0.1})}[method]
    one, other = ([torch.nn.Parameter(M.clone()) for M in start] for _ in range(2))
    optimizers = [make(one)], [make(other[i:i + 2]) for i in range(0, len(other), 2)]
    for step in range(3):
        for params in one, other:
            for i, p in enumerate(params):
                p.grad = random(*p.shape, seed=10 * step + i)
        for optimizer in (*optimizers[0], *optimizers[1]):
            optimizer.step()
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    state = optimizers[0][0].state[one[0]]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


# ------------------------------------------------------------------------------- both have a state

@pytest.mark.parametrize("method", [lora_pro, lora_rite], ids=lambda m: m.__name__[10:])
def test_its_state_goes_on(method):
    """Steps with a state that was stored and loaded are bit for bit those without a break."""
    def steps(net, optimizer, todo):
        for step in todo:
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()

    net = injected(method.__name__[10:])
    optimizer = method.optimizer(net, 1e-2, 0.1)
    steps(net, optimizer, range(3))
    other = copy.deepcopy(net)
    again = method.optimizer(other, 1e-2, 0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for kept in again.state.values():                      # a file does not tell how rows lie
        kept.update({k: t.clone(memory_format=torch.contiguous_format) for k, t in kept.items()})
    steps(net, optimizer, range(3, 6))
    steps(other, again, range(3, 6))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q) and p.isfinite().all()


# -------------------------------------------------------------------------------------- Delta-LoRA

@pytest.mark.parametrize("after, K", [(0.0, 0), (0.5, 3)])
def test_delta_lora_is_the_papers_loop(after, K, tmp_path):
    """A, B and W are those of LoRA with W changed in place, in float64. What is saved is the net.

    W has changed by ratio times the change of A B since step K.
    """
    nets = [injected("delta_lora", ratio=0.5, after=after, net=small_net().double()),
            pissa.inject(small_net().double(), 4, "lora", progress=False)]
    make = [torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 3e-3)
            for net in nets]
    layers = [[m for _, m in pissa.layers(net)] for net in nets]
    for ours, m in zip(*layers, strict=True):
        m.W_0, m.kept = m.frozen.clone(), torch.zeros_like(m.A @ m.B) if K == 0 else None
        assert torch.equal(ours.A, m.A)
    for step in range(1, 7):
        old = [(m.A @ m.B).detach() for m in layers[1]]
        for net, optimizer in zip(nets, make, strict=True):
            optimizer.zero_grad()
            backward(net, step)
            optimizer.step()
        delta_lora.after_step(nets[0], step, 6)
        for m, before in zip(layers[1], old, strict=True):
            if step > K:
                m.frozen.data += 0.5 * (m.A @ m.B - before).T
            if step == K:
                m.kept = (m.A @ m.B).detach()
    x = random(5, 48)
    for ours, m in zip(*layers, strict=True):
        change = m.frozen - m.W_0
        torch.testing.assert_close(change.T, 0.5 * (m.A @ m.B - m.kept).detach())
        torch.testing.assert_close(ours.A, m.A, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(ours.B, m.B, rtol=1e-7, atol=1e-9)
        assert change.norm() > 1e-3 and torch.equal(ours.frozen, m.W_0)
        if m.A.shape[0] == 48:
            torch.testing.assert_close(ours(x), m(x))
    assert_exported(nets[0].float(), tmp_path)


def assert_exported(net, tmp_path):
    """Saved, loaded, in PEFT, merged: what the net computes. Its rank is doubled."""
    tokens = torch.randint(0, 101, (2, 12))
    with torch.no_grad():
        want = net(tokens)
        adapter.save(net, tmp_path)
        saved = adapter.read_adapter(tmp_path)
        assert {A.shape[1] for A, _ in saved.pairs.values()} == {8}
        assert_logits_equal(adapter.load(small_net(), tmp_path)(tokens), want)
        again = adapter.load(small_net(), tmp_path, relative=relatives.known)
        assert_logits_equal(again(tokens), want)
        for (_, a), (_, b) in zip(pissa.layers(again), pissa.layers(net), strict=True):
            assert all(torch.equal(getattr(a, k), getattr(b, k)) for k in delta_lora.Layer.state)
        delta_lora.after_step(again, 6, 6)                     # it goes on from the same A_K, B_K
        assert_logits_equal(again(tokens), want)
        peft = pytest.importorskip("peft")
        twin = peft.PeftModel.from_pretrained(hugging_face(small_net()), tmp_path)
        assert_logits_equal(twin(tokens).logits, want)
        assert_logits_equal(pissa.merge(net)(tokens), want)


@pytest.mark.parametrize("own", [{"ratio": -1.0}, {"after": 1.5}])
def test_delta_lora_refuses_options(own):
    with pytest.raises(ValueError, match=r"^delta_lora: (ratio|after) is from 0 to .*, not "):
        injected("delta_lora", **own)
