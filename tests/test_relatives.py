"""The family of PiSSA: what holds for every relative, and the property of each."""
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F

import adapter
import model
import pissa
import relatives
import train
from conftest import (
    ROOT,
    SMALL,
    assert_logits_equal,
    command,
    first_lines,
    hugging_face,
    optimise,
    rounded_base,
    small_net,
    with_weights,
)
from relatives import calibrate
from support import options, plan, resume
from test_parallel import assert_alike, ended, torchrun
from test_resume import assert_same, interrupt

NAMES = relatives.names()
# {name: the largest relative difference of logits at step 0}
STEP_0 = {"lora_xs": 1e-4, "lq_lora": 0.3}
PLANNED = {"eva": 0.05}        # its ranks depend on the data
OWN = {"milora": {"offset": 0.25}, "corda": {"mode": "knowledge"},   # others than the defaults
       "svft": {"pattern": "banded", "d": 2}}


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
    for p in net.parameters():                             # nothing else is kept alive by a view
        assert p.untyped_storage().nbytes() == p.nbytes
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
        whole = with_weights(net, rounded_base) if adapter.quantised(net) else base
        twin = peft.PeftModel.from_pretrained(hugging_face(whole), tmp_path)
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
    own = {**getattr(method, "OPTIONS", {}), **OWN.get(name, {})}
    found = plan.estimate(SMALL, relatives.told(method, own, trial=True), 4)
    assert found["trained"] == pytest.approx(count, rel=PLANNED.get(name, 0))
    assert "expected peak" in command(train.main, "--method", name, "--plan")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    path = first_lines(tmp_path_factory.mktemp("data"), 32)
    return [*map(str, ["--ckpt", "tiny", "--data", path, "--val-fraction", 0.25, "--rank", 4,
                       "--lr", 1e-3, "--batch", 8, "--micro-batch", 2, "--max-new-tokens", 1,
                       "--steps", 10, "--save-every", 2, "--calibrate", 8, "--device", "cpu"])]


def own_flags(name):
    return [flag for key, value in OWN.get(name, {}).items()
            for flag in ("--option", f"{key}={value}")]


def assert_resumed_is_uninterrupted(flags, folder, monkeypatch, kinds):
    """kinds: the classes of optimizers, one of which raises an error in step 6 of 10."""
    command(train.main, *flags, "--out", folder / "whole")
    before, after = (json.loads((folder / "whole" / "summary.json").read_text())[k]["loss"]
                     for k in ("before", "after"))
    assert after < before
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        for kind in kinds:
            interrupt(patch, 6, RuntimeError("a CUDA error"), kind)
        command(train.main, *flags, "--out", folder / "run")
    resume.release()
    text = command(train.main, "--resume", "--out", folder / "run")
    assert "after step 5 of 10" in text
    assert not re.search("measuring (inputs|gradients|weights)", text)
    assert_same(folder / "whole", folder / "run")
    a, b = (adapter.read_adapter(folder / out / "adapter") for out in ("whole", "run"))
    assert all(torch.equal(x, y) for n in a.pairs for x, y in zip(a.pairs[n], b.pairs[n]))
    assert all(torch.equal(a.extras[k], b.extras[k]) for k in a.extras)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_resumed_is_uninterrupted(flags, tmp_path, monkeypatch, name):
    method, flags = relatives.find(name), [*flags, "--method", name, *own_flags(name)]
    own = hasattr(method, "optimizer") and type(method.optimizer(injected(name), 1e-3, 0.0))
    assert_resumed_is_uninterrupted(flags, tmp_path, monkeypatch, {own or torch.optim.AdamW})


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(flags, tmp_path, name):
    flags = [*flags, "--method", name, *own_flags(name)]
    two = torchrun(*flags, "--shard=no", "--out", tmp_path / "two")
    command(train.main, *flags, "--out", tmp_path / "one")
    ended(two)
    assert_alike(tmp_path / "one", tmp_path / "two", 1e-5)


# --------------------------------------------------------------------------- one that has all hooks

class Toy:
    """What a file relatives/toy.py may hold."""
    __name__ = "relatives.toy"
    OPTIONS = {"gamma": 0.01, "on": True}
    init = staticmethod(pissa.init_pissa)

    class Layer(pissa.PissaLinear):
        """y = x W_res + (x A) R B, R trained, and a buffer that after_step changes."""
        state = ("A", "R", "drift")

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.A.requires_grad_(False)
            self.R = torch.nn.Parameter(torch.eye(self.A.shape[1]))
            self.register_buffer("drift", torch.zeros(1))

        def factors(self):
            return self.A @ self.R, self.B * (1 + self.drift)

    class Optimizer(torch.optim.Optimizer):
        """A step of a length that a state of another shape than p decides."""

        def step(self):
            for p in self.param_groups[0]["params"]:
                kept = self.state.setdefault(p, {"rows": torch.full((len(p),), 1e-16)})
                kept["rows"] += p.grad.square().sum(1)
                p.data -= self.param_groups[0]["lr"] * p.grad / kept["rows"].sqrt()[:, None]

    @classmethod
    def optimizer(cls, net, lr, weight_decay):
        return cls.Optimizer([p for p in net.parameters() if p.requires_grad], {"lr": lr})

    @staticmethod
    def penalty(net):
        return net.pissa["own"]["gamma"] * sum(m.R.square().sum() for _, m in pissa.layers(net))

    @staticmethod
    @torch.no_grad()
    def after_step(net, step, steps):
        for _, m in pissa.layers(net):
            m.drift += 1e-4 * step / steps


@pytest.fixture
def toy(monkeypatch):
    import types
    module = types.ModuleType("relatives.toy")
    vars(module).update({k: getattr(Toy, k) for k in vars(Toy) if not k.startswith("__")})
    monkeypatch.setitem(sys.modules, "relatives.toy", module)
    monkeypatch.setattr(relatives, "names", lambda: [*NAMES, "toy"])
    return module


def test_an_own_layer_trains_saves_loads_and_merges(toy, tokens, tmp_path):
    test_trains_saves_loads_and_merges("toy", tokens, tmp_path)
    m, x = pissa.layers(injected("toy"))[0][1], torch.randn(3, 48)
    m.R.data += 0.1
    m.drift += 0.5
    torch.testing.assert_close(m(x), x @ m.frozen.T + 1.5 * x @ m.A @ m.R @ m.B)


@pytest.mark.long
def test_all_hooks_together(toy, flags, tmp_path, monkeypatch):
    """Own parameters, penalty, optimizer and what a step leaves: resumed, saved and planned."""
    flags = [*flags, "--method", "toy", "--option", "gamma=0.1", "--option", "on=false"]
    assert_resumed_is_uninterrupted(flags, tmp_path, monkeypatch, {Toy.Optimizer})
    net = adapter.load(model.load("tiny", "cpu"), tmp_path / "run" / "adapter",
                       relative=relatives.known)
    m = pissa.layers(net)[0][1]
    assert type(m) is toy.Layer and net.pissa["own"] == {"gamma": 0.1, "on": False}
    assert m.drift.item() == pytest.approx(1e-4 * 5.5) and not torch.equal(m.R, torch.eye(4))
    assert {n[-1] for n, p in net.named_parameters() if p.requires_grad} == {"R", "B"}
    job, method = plan.from_arguments(train_arguments(flags))
    assert method == "toy" and plan.estimate_of(job)["trained"] == sum(
        p.numel() for p in net.parameters() if p.requires_grad)
    adapter.compress(tmp_path / "run" / "adapter", tmp_path / "small", 3)      # it ends as a LoRA
    assert adapter.read_adapter(tmp_path / "small").facts["method"] == "lora"


@pytest.mark.slow
def test_a_penalty_counts_and_an_adapter_goes_on(toy, flags, tmp_path):
    flags, sizes = [*flags, "--method", "toy"], []
    for gamma in "0", "0.1":
        command(train.main, *flags, "--option", f"gamma={gamma}", "--out", tmp_path / gamma)
        net = adapter.load(model.load("tiny", "cpu"), tmp_path / gamma / "adapter",
                           relative=relatives.known)
        sizes.append(sum(m.R.square().sum() for _, m in pissa.layers(net)))
    assert sizes[0] > sizes[1]
    command(train.main, *flags, "--adapter", tmp_path / "0.1/adapter", "--out", tmp_path / "on")
    on = adapter.read_adapter(tmp_path / "on" / "adapter")
    assert on.facts["own_layer"] and on.facts["own"]["gamma"] == 0.1
    assert on.extras["model.layers.0.self_attn.q_proj.drift"].item() == pytest.approx(1.1e-3)


def train_arguments(flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, flags)])
        return options.for_train("")


# ----------------------------------------------------------------------- what find and the rest say

def test_unknown_names_and_options(capsys):
    with pytest.raises(ValueError, match="^there is no method 'olra': did you mean olora. There "):
        relatives.find("olra")
    with pytest.raises(ValueError, match="^there is no method 'xyz'. There are cora, corda"):
        relatives.find("xyz")
    assert relatives.known("pissa") == "pissa" and relatives.known("my_init") == "my_init"
    corda, eva = relatives.find("corda"), relatives.find("eva")
    assert relatives.options(corda, []) == {"mode": "instruction"}
    assert relatives.options(eva, ["rho=3"]) == {"rho": 3.0}
    for method, given, message in [
            (corda, "rho=2", "^--option rho=2: corda has the options mode$"),
            (corda, "mode=x", "^--option mode=x: mode is one of instruction, knowledge$"),
            (eva, "rho=two", "^--option rho=two: rho should be float, such as 2.0$"),
            (eva, "rho", "^--option rho: rho should be float, such as 2.0$"),
            ("pissa", "rho=2", "^--option rho=2: pissa has no options$")]:
        with pytest.raises(ValueError, match=message):
            relatives.options(method, [given])


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(relatives.find(n), "STATISTIC")])
def test_what_measures_is_told_so(name):
    """Without a statistic nothing is injected."""
    method = relatives.find(name)
    for given in method, relatives.told(method, getattr(method, "OPTIONS", {})):
        with pytest.raises(ValueError, match="this method measures some examples first"):
            pissa.inject(small_net(), 4, given, progress=False)


def test_statistics_are_those_of_a_loop():
    """E[x^T x] and dL/dW over all batches, as autograd and hooks of one matrix give them."""
    net, inputs, gradients = small_net(), relatives.find("corda"), relatives.find("lora_ga")
    options = pissa.Options(4)
    C = calibrate.measure(net, inputs, batches(), loss_of, options)
    net.checkpointing = True                                    # recomputed layers give the same
    G = calibrate.measure(net, gradients, batches(), loss_of, options)
    net.checkpointing = False
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    seen = []
    for name, m in pissa.find_linears(net, pissa.TARGETS).items():
        seen.clear()
        with torch.no_grad(), m.register_forward_hook(lambda m, x, y: seen.append(x[0])):
            for batch in batches():
                loss_of(net, *batch)
        x = torch.cat([x.flatten(0, 1) for x in seen]).double()
        torch.testing.assert_close(C[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        m.weight.requires_grad_()
        total = sum(torch.autograd.grad(loss_of(net, *b), m.weight)[0] for b in batches())
        torch.testing.assert_close(G[name], total, rtol=1e-4, atol=1e-7)
        m.weight.requires_grad_(False)
    q, k = (C[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q.data_ptr() == k.data_ptr()                                    # one tensor for both


# ------------------------------------------------------------------------------------- their starts

def peft_twin(**options):
    """PEFT's LoRA of rank 4 on the same weights, with scaling 1."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(pissa.TARGETS), **options)


def theirs(model, name):
    """A, B and the frozen weight of a module in PEFT's model, in our orientation."""
    m = model.get_submodule(f"base_model.model.{name}")
    return (m.lora_A["default"].weight.detach().T, m.lora_B["default"].weight.detach().T,
            m.base_layer.weight.detach())


def assert_parallel(X, Y, tolerance=1e-3):
    """The rows of X and Y are the same, up to a sign and a factor each."""
    cosines = F.cosine_similarity(X, Y, dim=1).abs()
    assert cosines.min() > 1 - tolerance, cosines


def assert_products_equal(m, A, B, frozen):
    AB = (A @ B).double()
    assert ((m.A @ m.B).double() - AB).norm() <= 1e-3 * AB.norm() + 1e-9
    torch.testing.assert_close(m.frozen, frozen, rtol=0, atol=1e-3)


def test_olora_is_pefts():
    import peft
    net = injected("olora")
    model = peft.get_peft_model(hugging_face(small_net()), peft_twin(init_lora_weights="olora"))
    for name, m in pissa.layers(net):
        A, B, frozen = theirs(model, name)
        assert_products_equal(m, A, B, frozen)
        sign = (m.B * B).sum(1).sign()
        torch.testing.assert_close(m.B * sign[:, None], B, rtol=0, atol=1e-5)
        torch.testing.assert_close(m.A * sign, A, rtol=0, atol=1e-4)
        torch.testing.assert_close(m.B @ m.B.T, torch.eye(4), rtol=0, atol=1e-5)
        assert m.frozen[:, :4].abs().max() < 1e-5               # nothing is left of four inputs


@pytest.mark.parametrize("offset", [0.0, 0.5, 1.0])
def test_milora_has_the_smallest_triplets(offset):
    net, base = injected("milora", offset=offset), small_net()
    for name, m in pissa.layers(net):
        S = torch.linalg.svdvals(base.get_submodule(name).weight.double())
        first = round((1 - offset) * (len(S) - 4))
        found = torch.linalg.svdvals((m.A @ m.B).double())
        torch.testing.assert_close(found[:4], S[first:first + 4], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(m.A.norm(dim=0), m.B.norm(dim=1), rtol=1e-4, atol=1e-5)
        assert found[4:].max() < 1e-5
    if offset == 1:
        same = pissa.inject(small_net(), 4, niter=None, progress=False)
        for (_, a), (_, b) in zip(pissa.layers(net), pissa.layers(same)):
            torch.testing.assert_close(a.A @ a.B, b.A @ b.B, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="^milora: offset is from 0 to 1, not 1.5$"):
        injected("milora", offset=1.5)


def test_mica_is_pefts():
    import peft
    net = injected("mica")
    model = peft.get_peft_model(hugging_face(small_net()), peft_twin(init_lora_weights="mica"))
    for name, m in pissa.layers(net):
        A, B, frozen = theirs(model, name)
        assert_parallel(m.B, B)
        assert not m.A.any() and not A.any() and m.A.requires_grad and not m.B.requires_grad
        assert torch.equal(m.frozen, frozen)
        W = frozen.double()
        torch.testing.assert_close((m.B.double() @ W).norm(), torch.linalg.svdvals(W)[-4:].norm(),
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode, theirs_is", [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_is_pefts(mode, theirs_is):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda
    base, batch = small_net(), batches(1, rows=1)
    corda = relatives.find("corda")
    C = calibrate.measure(base, corda, batch, loss_of, pissa.Options(4))
    net = pissa.inject(small_net(), 4, relatives.told(corda, {"mode": mode}, C.get),
                       progress=False, niter=None)
    twin = hugging_face(small_net())
    config = peft_twin(init_lora_weights="corda",
                       corda_config=CordaConfig(corda_method=theirs_is))
    preprocess_corda(twin, config, run_model=lambda: twin(batch[0][0][:, :-1]))
    model = peft.get_peft_model(twin, config)
    for name, m in pissa.layers(net):
        A, B, frozen = theirs(model, name)
        if mode == "instruction":                       # the smallest triplets are too close
            assert_products_equal(m, A, B, frozen)
            assert_parallel(m.A.T, A.T)
            assert_parallel(m.B, B)
        # W^T C = U S V^T in float64, from the definition; C of the smallest size that inverts
        W, full = base.get_submodule(name).weight.double(), C[name].double()
        full = full + 0.01 * full.diagonal().mean() * torch.eye(len(full))
        U, S, Vh = torch.linalg.svd(W @ full, full_matrices=False)
        k = slice(4) if mode == "instruction" else slice(len(S) - 4, None)
        AB = (U[:, k] * S[k]) @ Vh[k] @ torch.linalg.inv(full)
        torch.testing.assert_close((m.A @ m.B).T.double(), AB, rtol=1e-3, atol=1e-5)
        assert (m.A @ m.B - A @ B).norm() < 2e-2 * base.get_submodule(name).weight.norm()


def test_cordas_knowledge_mode_touches_the_examples_least():
    """What is trained carries less of their outputs than in any other start."""
    base = small_net()
    C = calibrate.measure(base, relatives.find("corda"), batches(), loss_of, pissa.Options(4))

    def carried(net):
        """|x A B| over the examples, relative to |x W|, of each matrix."""
        return {n: (torch.trace((m.A @ m.B).T @ C[n] @ (m.A @ m.B))
                    / torch.trace((W := base.get_submodule(n).weight) @ C[n] @ W.T)).sqrt().item()
                for n, m in pissa.layers(net)}

    kept, *others = (carried(injected(name, **own)) for name, own in [
        ("corda", {"mode": "knowledge"}), ("corda", {"mode": "instruction"}), ("olora", {}),
        ("milora", {"offset": 0.0}), ("milora", {"offset": 1.0})])
    assert all(kept[n] <= other[n] * 1.0001 for n in kept for other in others)
    assert all(kept[n] < others[0][n] / 5 for n in kept)


def test_lora_ga_has_pefts_directions():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga
    base, batch = small_net(), batches(1)
    method = relatives.find("lora_ga")
    G = calibrate.measure(base, method, batch, loss_of, pissa.Options(4))
    net = pissa.inject(small_net(), 4, relatives.told(method, method.OPTIONS, G.get),
                       progress=False, niter=None)
    twin = hugging_face(small_net())
    config = peft_twin(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    preprocess_loraga(twin, config, lambda: F.cross_entropy(
        twin(batch[0][0][:, :-1]).logits.flatten(0, 1), batch[0][0][:, 1:].flatten()).backward())
    model = peft.get_peft_model(twin, config)
    for name, m in pissa.layers(net):
        A, B, _ = theirs(model, name)
        U, S, Vh = torch.linalg.svd(G[name].double())
        assert_parallel(m.A.T, A.T, 0.02)                            # theirs is a rough SVD
        assert_parallel(m.B, B, 0.02)
        assert_parallel(m.A.T.double(), Vh[:4])
        assert_parallel(m.B.double(), U[:, 4:8].T)
        c = m.B.shape[1] ** 0.25 / 4
        torch.testing.assert_close(m.A.T @ m.A, c**2 * torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(m.B @ m.B.T, c**2 * torch.eye(4), rtol=0, atol=1e-5)


def test_lora_gas_first_step_follows_the_gradient():
    """A step of A and B changes A B more like -G than LoRA's does, in every matrix."""
    base = small_net()
    G = calibrate.measure(base, relatives.find("lora_ga"), batches(), loss_of, pissa.Options(4))

    def follows(net):
        sum(loss_of(net, *batch) for batch in batches()).backward()
        return {n: F.cosine_similarity((m.A.grad @ m.B + m.A @ m.B.grad).detach().flatten(),
                                       G[n].T.flatten(), dim=0).item()
                for n, m in pissa.layers(net)}

    ours, loras = follows(injected("lora_ga")), follows(
        pissa.inject(small_net(), 4, "lora", progress=False))
    assert all(ours[n] > loras[n] + 0.05 for n in ours), (ours, loras)
    for n in ours:                       # the projection of G on 8 triplets: no more is possible
        S = torch.linalg.svdvals(G[n].double())
        assert ours[n] == pytest.approx((S[:8].norm() / S.norm()).item(), rel=1e-3)


def test_lora_ga_needs_twice_the_rank():
    with pytest.raises(ValueError, match="rank 9 needs 18 singular vectors .* matrix has 16: low"):
        injected("lora_ga", rank=9)


def test_eva_is_an_incremental_pca():
    """Explained variances and components are scikit-learn's, minibatch after minibatch."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    eva, g = relatives.find("eva"), torch.Generator().manual_seed(0)
    options = pissa.Options(4, niter=None, own={"rho": 2.0})
    scale = 3 * 0.8 ** torch.arange(20)
    reference, kept = decomposition.IncrementalPCA(n_components=8), None
    for n in 30, 12, 50:
        x = torch.randn(n, 20, generator=g) * scale + 5 + n / 10
        kept = eva.reduce(kept, x, options)
        reference.partial_fit(x.double().numpy())
    n, mean, SVh, total = kept
    ratios = torch.from_numpy(reference.explained_variance_ratio_).float()
    torch.testing.assert_close(SVh.norm(dim=1).square() / total, ratios, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean, torch.from_numpy(reference.mean_).float())
    assert n == 92
    assert_parallel(SVh, torch.from_numpy(reference.components_).float())


def test_eva_is_pefts(tmp_path):
    """The same components; the ranks of matrices with the same inputs are the same together."""
    peft = pytest.importorskip("peft")
    base, batch, eva = small_net(), batches(1, rows=8), relatives.find("eva")
    options = pissa.Options(4, niter=None, own={"rho": 1.5})
    found = calibrate.measure(base, eva, batch, loss_of, options)
    net = pissa.inject(small_net(), 4, relatives.told(eva, options.own, found.get), progress=False)
    twin = peft.get_peft_model(hugging_face(small_net()), peft_twin(
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.5)), low_cpu_mem_usage=True)
    inputs = {"input_ids": batch[0][0][:, :-1]}
    peft.initialize_lora_eva_weights(twin, [inputs], show_progress_bar=False)
    ranks = {n: m.A.shape[1] for n, m in pissa.layers(net)}
    assert sum(ranks.values()) == 4 * len(ranks) and max(ranks.values()) <= 6
    assert len(set(ranks.values())) > 1
    sums = [{}, {}]
    for name, m in pissa.layers(net):
        A, B, _ = theirs(twin, name)
        r = min(A.shape[1], m.A.shape[1])
        assert_parallel(m.A.T[:r], A.T[:r], 0.01)                    # theirs is a rough SVD
        torch.testing.assert_close(m.A.T @ m.A, torch.eye(m.A.shape[1]), rtol=0, atol=1e-5)
        assert not m.B.any() and not B.any()
        group = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_", "gate_")
        for total, rank in (sums[0], m.A.shape[1]), (sums[1], A.shape[1]):
            total[group] = total.get(group, 0) + rank
    assert sums[0] == sums[1]
    adapter.save(net, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == sum(r != max(ranks.values()) for r in ranks.values()) > 0
    again = adapter.load(small_net(), tmp_path)
    assert {n: m.A.shape[1] for n, m in pissa.layers(again)} == ranks


def test_contributing_shows_a_whole_relative():
    """The example is the file, and every relative has a line in the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown, = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert shown in (ROOT / "relatives" / "olora.py").read_text()
    table = (ROOT / "relatives" / "README.md").read_text()
    assert [n for n in NAMES if f"[`{n}`]({n}.py)" not in table] == []


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_short(name):
    assert len((ROOT / "relatives" / f"{name}.py").read_text().splitlines()) <= 110
