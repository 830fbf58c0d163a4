"""support/plan.py: its formulas against what autograd keeps, what is alive, what is computed, and
what was measured on a GPU; `train.py --plan`."""
import json
import re
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import adapter
import data
import fast
import fp8
import model
import nf4
import pissa
import relatives
import train
from bench import plot
from conftest import ROOT, SMALL, command, failure, joined, register_flash, small_net
from formats import meta_write
from support import plan, report
from svd import grouped_svd

WIDE = replace(SMALL, dim=64, n_layers=3, n_heads=4, head_dim=16, n_kv_heads=4, ffn_dim=192)
METHODS = {
    "pissa": ("pissa", SMALL, 8, {"dtype": torch.float32}),
    "lora": ("lora", WIDE, 4, {"dtype": torch.float32}),
    "mica": (relatives.told(relatives.find("mica"), {}), SMALL, 8, {"dtype": torch.float32}),
    "few targets": ("pissa", WIDE, 4, {"targets": ("q_proj", "v_proj", "gate_proj"),
                                       "dtype": torch.float32}),
    "bfloat16": ("pissa", SMALL, 8, {}),
    "qpissa": ("qpissa", WIDE, 4, {}),
    "qpissa, eight bits": ("qpissa", WIDE, 4, {"bits": 8}),
    "qlora": ("qlora", SMALL, 8, {"dtype": torch.float32, "double_quant": False}),
    "loftq": ("loftq", SMALL, 4, {}),
    "full": ("full", WIDE, 128, {"dtype": torch.float32}),
    "full, tied": ("full", replace(SMALL, tied=True), 128, {"dtype": torch.float32}),
    "full, autocast": ("full", WIDE, 128, {}),
    "checkpointing": ("pissa", WIDE, 4, {"dtype": torch.float32, "checkpointing": True}),
    "qpissa, checkpointing": ("qpissa", WIDE, 4, {"checkpointing": True}),
    "full, checkpointing": ("full", WIDE, 128, {"checkpointing": True}),
    "not packed": ("pissa", SMALL, 8, {"packed": False}),
    "on a CPU": ("pissa", SMALL, 8, {"gpu": False}),
    "full, on a CPU": ("full", WIDE, 128, {"gpu": False}),
    "qwen3": ("pissa", replace(WIDE, qk_norm=True), 8, {"dtype": torch.float32}),
    "qwen3, bfloat16": ("qpissa", replace(WIDE, qk_norm=True, n_kv_heads=2), 4, {}),
    "gemma": ("pissa", replace(SMALL, gelu=True, embed_scale=7.0, tied=True), 8, {}),
    "smollm3": ("pissa", replace(WIDE, no_rope=2, o_bias=True, qkv_bias=True), 8, {}),
    "no padding": ("pissa", SMALL, 8, {"text": None, "learnt": None})}
JOBS = {name: plan.job_of(config, method, rank, rows=3, length=64,
                          **{"text": 150, "learnt": 50, **more})
        for name, (method, config, rank, more) in METHODS.items()}


class Norm(torch.autograd.Function):
    """An RMSNorm that keeps what the fused one of GPUs keeps; a CPU's keeps x in float32."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale.to(x.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        return grad * scale.to(x.dtype), (grad * x).flatten(0, -2).sum(0), None


MULTIPLY = fp8.multiply
GPU = {"flash": False}                     # of the job whose network was made last


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """What fused kernels do not need is not made: norms, and weights in four bits."""
    register_flash()
    monkeypatch.setattr(fast, "takes_flash", lambda q: GPU["flash"])
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda m, x: Norm.apply(x, m.weight, m.eps))
    monkeypatch.setattr(nf4.NF4, "dequantize", lambda Q, dtype=None: torch.zeros(
        Q.shape, dtype=dtype or Q.dtype))

    def rounded(x, s=None):
        return x.new_zeros(x.shape, dtype=fp8.E4M3), x.new_zeros(len(x), 1, dtype=torch.float32)

    rounded.plain = fp8.by_rows.plain
    monkeypatch.setattr(fp8, "by_rows", rounded)
    monkeypatch.setattr(fp8, "multiply", lambda x, a, codes, s, dtype: torch.zeros(
        len(x), len(codes), dtype=dtype))


def network(job, method="pissa"):
    """The network that the job describes, ready for training."""
    net = small_net(**vars(job.config))
    GPU["flash"] = job.flash
    if job.full:
        return net.requires_grad_(True)
    pissa.inject(net.to(job.dtype), job.rank, method, job.targets, progress=False,
                 quant_iters=1, bits=min(job.bits, 8), double_quant=job.double_quant)
    return net


def loss(net, job):
    """The training loss as train.py computes it, of a micro-batch with that much text."""
    examples, text, learnt = [], job.text or job.cells, job.labels
    for below in reversed(range(job.rows)):                # rows below want a token at least
        n = min(job.length, text - below)
        examples.append((torch.randint(101, (n + 1,)).tolist(), n + 1 - min(n, learnt)))
        text, learnt = text - n, max(0, learnt - n)
    (tokens, labels, where_text), = data.micro_batches(examples, job.cells)
    assert (len(where_text), (labels != -100).sum()) == (job.text or job.cells, job.labels)
    mixed = job.full and job.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        return train.loss_sum(net, tokens, labels, where_text if job.packed else None)


class Alive(TorchDispatchMode):
    """Bytes of all tensors that are alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.add(t)
        return out


def saved(net, job):
    """Bytes of the floating-point tensors, parameters aside, that autograd keeps for backward."""
    own, kept = {t.untyped_storage()._cdata for t in (*net.parameters(), *net.buffers())}, []

    def pack(t):
        kept.append(weakref.ref(t))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(net, job)
    alive = [t for t in (ref() for ref in kept) if t is not None and t.is_floating_point()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive}
    assert value.requires_grad
    return sum(size for key, size in storages.items() if key not in own)


class Flops(TorchDispatchMode):
    """FLOPs of the products. FlopCounterMode has hooks that autograd.grad does not allow."""
    total = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, packet = f(*args, **(kwargs or {})), f.overloadpacket
        packet = torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("name", JOBS)
def test_kept_is_what_autograd_saves(name):
    job = JOBS[name]
    net, c = network(job, METHODS[name][0]), job.config
    net.checkpointing = job.checkpointing
    counted = saved(net, job)
    counted += 8 * job.tokens * c.head_dim * job.checkpointing             # RoPE, held elsewhere
    counted -= 4 * c.vocab_size * c.dim * job.full                         # planned in "loss"
    # What the last norm divides by is left out, and so are the first layer's four bytes too many.
    counted -= 4 * job.tokens * (job.full or job.checkpointing)
    assert counted == plan.memory(job)[1]["kept for backward"]


@pytest.mark.long
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("method", ["pissa", "qlora"])
def test_kept_by_compiled_layers(method, gpu, monkeypatch):
    monkeypatch.undo()                           # norms are written out in what is compiled
    monkeypatch.setattr(fast, "takes_flash", lambda q: GPU["flash"])
    job = plan.job_of(WIDE, method, 4, gpu=gpu, compiled=True, rows=3, length=64, text=150,
                      learnt=50)
    net = network(job, method)
    with torch._functorch.config.patch(activation_memory_budget=1.0):      # it is lowered, and back
        train.compile_layers(net, backend="aot_eager_decomp_partition")    # inductor's partition
        counted = saved(net, job) - (4 - 2) * job.tokens * WIDE.dim  # the last norm's, on a CPU
    torch._dynamo.reset()
    kept = plan.memory(job)[1]["kept for backward"]
    assert counted == pytest.approx(kept, rel=0.05)                  # the compiler's choice varies
    assert kept < 0.9 * plan.memory(replace(job, compiled=False))[1]["kept for backward"]


@pytest.mark.parametrize("accumulate", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize("name", JOBS)
def test_the_peak_is_what_is_alive(name, accumulate):
    job = replace(JOBS[name], accumulate=accumulate, rows=4, length=128, text=450, learnt=200)
    net = network(job, METHODS[name][0])
    net.checkpointing = job.checkpointing
    params, alive = [p for p in net.parameters() if p.requires_grad], Alive()
    for t in net.parameters():                        # the tables of NF4 are not worth a row
        alive.add(t)
    with alive:
        moments = [torch.zeros(p.shape) for p in params for _ in range(2)]
        for _ in range(1 + accumulate):
            loss(net, job).backward()
    planned = max(v for k, v in plan.memory(job)[2].items() if k != "loading") - plan.CUBLAS
    assert moments and planned == pytest.approx(alive.most, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_takes_a_chunk_of_logits(dtype, monkeypatch):
    monkeypatch.setattr(fast, "CHUNK", 60 * 20000)
    config = replace(SMALL, vocab_size=20000)
    job = replace(JOBS["lora"], config=config, dtype=dtype, length=128, text=None, learnt=300,
                  accumulate=False)
    net, alive = network(job, "lora"), Alive()
    for t in net.parameters():
        alive.add(t)
    with alive:
        loss(net, job).backward()
    held, moments = plan.memory(job)[1:]
    assert held["loss"] == 12 * 60 * 20000 + dtype.itemsize * 300 * 48
    planned = moments["the end of forward"]
    assert planned == max(v for k, v in moments.items() if k != "loading")
    assert planned - held["AdamW's moments"] - plan.CUBLAS == pytest.approx(alive.most, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method, bits", [*((method, 4) for method in pissa.METHODS),
                                          ("qpissa", 8), ("qlora", 8)])
def test_what_decomposing_takes_on_top(method, bits, dtype, monkeypatch):
    monkeypatch.setattr(fp8, "CHUNK", 1 << 14)
    monkeypatch.setattr(nf4, "CHUNK", 1 << 14)        # small against the matrix, as for large ones
    net = torch.nn.Sequential()
    net.q_proj = torch.nn.Linear(1024, 2048, bias=False, dtype=dtype)
    job, n, alive = plan.job_of(SMALL, method, 2, dtype=dtype, bits=bits), 1024 * 2048, Alive()
    alive.add(net.q_proj.weight)
    with alive:
        pissa.inject(net, 2, method, ("q_proj",), niter=1, bits=bits, progress=False)
    top = plan.DECOMPOSING[job.bits, job.subtracted][dtype == torch.float32] + dtype.itemsize
    assert alive.most / n == pytest.approx(top, abs=0.7)


@pytest.mark.parametrize("shape, rank", [((512, 512), 16), ((512, 1400), 16), ((1400, 512), 16)])
def test_what_decomposing_together_takes_on_top(shape, rank):
    job = replace(JOBS["pissa"], rank=rank, group=4)
    weights, alive = [torch.randn(shape[::-1]) for _ in range(4)], Alive()
    for W in weights:
        alive.add(W)
    before = alive.now
    with alive:
        [((U * S.sqrt()).contiguous(), S.sqrt()[:, None] * Vh) for U, S, Vh in zip(*grouped_svd(
            [W.T for W in weights], rank, niter=2, generator=torch.Generator()))]
    # The random matrix, one for all, and those of l x l are not worth a term.
    assert plan.grouped(job, [shape] * 4) == pytest.approx(alive.most - before, rel=0.1)
    assert plan.grouped(job, [shape] * 9) == plan.grouped(job, [shape] * 4)
    assert plan.grouped(replace(job, group=1), [shape] * 9) * 4 == plan.grouped(job, [shape] * 9)


@pytest.mark.parametrize("name", JOBS)
def test_parameters_and_bytes_of_an_injected_network(name):
    job = JOBS[name]
    net, (numbers, held, _) = network(job, METHODS[name][0]), plan.memory(job)
    assert (numbers["trained, float32"], sum(numbers.values())) == report.count(net)
    trained = sum(p.nbytes for p in net.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in net.parameters()) - trained
    assert held["trained, float32"] == trained
    assert sum(size for kind, size in held.items() if kind.startswith("frozen")) == frozen


def olora(weight, options):
    """A method that no file here knows: OLoRA (arXiv 2406.01775), A and B out of a QR."""
    Q, R = torch.linalg.qr(weight.T.float())
    A, B = Q[:, :options.rank].contiguous(), R[:options.rank]
    return pissa.residual(weight, A, B), A, B, (A, B)


def in_four_bits(weight, options):
    """Another: LoRA on a weight in four bits."""
    return nf4.quantize(weight, options.double_quant), *pissa.init_lora(weight, options)[1:3], None


@pytest.mark.parametrize("method, same", [(olora, "pissa"), (in_four_bits, "qlora"),
                                          ("loftq", "qpissa")])
def test_estimate_goes_by_facts(method, same):
    """A function is planned like a method of the same facts; the peak is one of the moments."""
    for double in (False, True):
        found, expected = (plan.estimate(WIDE, m, 4, double_quant=double, rows=3, length=64)
                           for m in (method, same))
        assert found == expected
        assert found["peak"] == found["moments"][found["when"]] == max(found["moments"].values())
    net = pissa.inject(small_net(**vars(WIDE)), 4, method, progress=False)
    trained, total = report.count(net)
    assert (found["trained"], sum(found["numbers"].values())) == (trained, total)
    forward, backward = found["flops"]["forward"], found["flops"]["backward"]
    assert 0 < forward < backward and found["flops"]["recomputation"] == 0


def test_estimate_of_every_weight():
    found = plan.estimate(SMALL, "full")
    assert found["trained"] == sum(found["numbers"].values()) == sum(
        p.numel() for p in small_net().parameters())
    with pytest.raises(ValueError, match="rank 49 is not between 1 and"):
        plan.estimate(SMALL, rank=49)


@pytest.mark.parametrize("shape", [(64, 64), (48, 128), (3, 5), (128, 1000)])
@pytest.mark.parametrize("double", [False, True])
def test_bytes_in_four_bits(shape, double):
    Q = nf4.quantize(torch.randn(shape), double)
    assert plan.nf4_bytes(Q.shape.numel(), double) == Q.nbytes


@pytest.mark.parametrize("name", [n for n in JOBS if "few" not in n])
def test_flops_are_those_counted(name, monkeypatch):
    monkeypatch.setattr(fp8, "multiply", MULTIPLY)
    job = replace(JOBS[name], gpu=False)        # flash attention is one operator, and not counted
    net, expected = network(job, METHODS[name][0]), plan.flops(job)
    net.checkpointing = job.checkpointing
    # Plain attention computes the whole square of scores, and in backward no scores again.
    with Flops() as counter, sdpa_kernel(SDPBackend.MATH):
        loss(net, job).backward()
    attention, again = expected["attention"], expected["recomputation"]
    total = (expected["forward"] + attention + expected["backward"] + (4 - 2.5) * attention
             + again + job.checkpointing * attention)
    assert counter.total == pytest.approx(job.tokens * total, rel=1e-6)


@pytest.mark.parametrize("name, job, gib, moment", plot.plan_rows())
def test_what_was_measured_on_a_gpu(name, job, gib, moment):
    rel = 0.03 if job.compiled and job.bits == 4 else 0.02
    assert plot.planned_gib(job, moment) == pytest.approx(gib, rel=rel), name


@pytest.fixture
def llama2(tmp_path, monkeypatch):
    """Nothing but Llama-2-7B's params.json, with its vocabulary left open as Meta does."""
    (tmp_path / "llama2").mkdir()
    params = meta_write.params_json(model.Config()) | {"vocab_size": -1}
    (tmp_path / "llama2" / "params.json").write_text(json.dumps(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path


@pytest.mark.long
def test_command_without_weights_or_data(llama2):
    text = command(train.main, "--ckpt", "llama2", "--rank", 64, "--data", "none.jsonl", "--plan")
    assert re.search(r"frozen matrices +6,476,005,376 +12\.06\n", text)
    assert re.search(r"trained, float32 +159,907,840 +0\.60\n", text)
    assert "expected peak  29.2 GiB, at the end of forward (loading: 14.1)" in text
    assert "parameters     6,898,323,456, 159,907,840 of them trained (2.32%)" in text
    assert "--checkpointing" in text and "forward again" not in text
    assert text.startswith("There is no GPU here. This plan is for an H200; for this machine: "
                           "--device cpu\nllama2: pissa, rank 64, on an H200, products in bfloat16")
    assert max(map(len, text.splitlines())) < 80
    assert re.search(r"seconds a step  3\.8 at 480 TFLOP/s, as reached on an H200", text)
    assert [f.name for f in llama2.iterdir()] == ["llama2"]                # nothing is written
    text = command(train.main, "--ckpt", "llama2", "--plan", "--checkpointing", "--micro-batch", 1,
                   "--method", "qpissa", "--device", "cuda")
    assert "forward again" in text and "--checkpointing" not in text
    for flags in (("--device", "cpu", "--dtype", "bfloat16"), ("--niter", "exact")):
        text = command(train.main, "--ckpt", "llama2", "--rank", 64, "--plan", *flags)
        assert f"(loading: {'13.4' if 'cpu' in flags else '13.5'})" in text    # one by one


def test_configs_and_adapters(tmp_path, stories, monkeypatch):
    for layout in ("hf", "meta", "meta_mp2"):
        assert plan.read_config(stories / layout) == model.open_checkpoint(stories / layout)[0]
    (tmp_path / "config.json").write_text((stories / "hf" / "config.json").read_text())
    assert plan.read_config(tmp_path) == plan.read_config(stories / "hf")
    net = pissa.inject(model.load(stories / "hf", "cpu"), 4, "qpissa", ("q_proj", "o_proj"),
                       progress=False, double_quant=False)
    adapter.save(net, tmp_path / "adapter")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = command(train.main, "--ckpt", stories / "hf", "--adapter", tmp_path / "adapter",
                   "--plan", "--out", tmp_path / "out", "--device", "cpu")
    assert "qpissa, rank 4, on cpu, products in float32" in joined(text)
    assert f"{report.count(net)[0]:,}" in text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, words", [
    (["--rank", 4097], "rank 4097 is not between 1 and 4096"),
    (["--targets", "q_proj,query"], "no module is called query"),
    (["--rank", 0], "--rank must be at least 1")])
def test_errors(llama2, flags, words):
    last = failure("train.py", "--ckpt", "llama2", "--plan", *flags).splitlines()[-1]
    assert words in last
    assert "no checkpoint llama3" in failure("train.py", "--ckpt", "llama3", "--plan")


def write_adapter(directory, ranks, **changes):
    """A PEFT LoRA of these {module of Llama-2-7B's q and v: rank}."""
    tensors = {f"base_model.model.{n}.lora_{k}.weight": torch.zeros(shape)
               for n, r in ranks.items() for k, shape in (("A", (r, 4096)), ("B", (4096, r)))}
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
    torch.save(tensors, directory / "adapter_model.bin")
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("flags, words", [
    (["--rank", 10**9], "rank 1000000000 is not between"), (["--batch", 10**9], "TFLOPs a step"),
    (["--micro-batch", 10**9, "--batch", 10**9, "--max-length", 10**9], "TFLOPs a step"),
    (["--gpus", 10**9], "each of 1000000000 GPUs"),
    (["--max-length", 10**30], "--max-length must")])
def test_a_plan_with_huge_numbers(llama2, flags, words):
    argv = "--ckpt", "llama2", "--plan", *flags
    huge = "must" in words or "not" in words
    assert words in (failure("train.py", *argv) if huge else command(train.main, *argv))


@pytest.mark.parametrize("changes, words", [
    ({"n_layers": 2**29}, "layers are too many for a plan"), ({"dim": 10**30}, "dim is missing or"),
    ({"ffn_dim_multiplier": 1e18}, "ffn_dim, of dim,")])
def test_a_plan_of_huge_numbers(llama2, changes, words):
    path = llama2 / "llama2" / "params.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert words in failure("train.py", "--ckpt", "llama2", "--plan")


@pytest.mark.parametrize("changes, words", [
    ({"r": "8"}, "r is '8'"), ({"r": 4}, "q_proj has rank 8, but rank 4 in adapter_config.json"),
    ({"pissa": {"method": "new", "rank": 8, "base": ""}}, "method new is none of"),
    ({}, "of another model: there is no model.layers.99.self_attn.q_proj")])
def test_errors_of_adapters(llama2, changes, words):
    write_adapter(llama2, {f"model.layers.{i}.self_attn.q_proj": 8 for i in (0, 99)}, **changes)
    text = failure("train.py", "--ckpt", "llama2", "--plan", "--adapter", ".")
    assert words in text and "Traceback" not in text


def test_plan_of_an_adapter_is_of_its_own_matrices(llama2):
    """Whatever target_modules says, and of unequal ranks."""
    ranks = {f"model.layers.{i}.self_attn.{k}_proj": 8 for i in range(31) for k in "qv"}
    ranks["model.layers.3.self_attn.q_proj"] = 24
    write_adapter(llama2, ranks, rank_pattern={"layers.3.self_attn.q_proj": 24})
    text = command(train.main, "--ckpt", "llama2", "--plan", "--adapter", ".")
    assert f"{sum(ranks.values()) * 2 * 4096:,} of them trained" in text


def test_several_gpus(capsys):
    """Measured on two GPUs: bench/results/gpus_h200.json."""
    found = json.loads((ROOT / "bench/results/gpus_h200.json").read_text())["parts"]
    job = plan.job_of(model.Config(), rank=128)
    then = {"shard": 32 * 8 * 512 * 11008 * 2 / 2**30, "shard, checkpointing": 0}
    for part, more in then.items():        # more: the input of down_proj, which was kept then
        if part in found:
            expected = replace(job, accumulate=False, checkpointing="checkpointing" in part)
            assert plan.sharded(expected, 2) / 2**30 + more == pytest.approx(
                found[part]["peak_gib"], rel=0.06)
    assert plan.sharded(job, 8) < plan.sharded(job, 2) < plan.estimate_of(job)["peak"]
    full = plan.job_of(model.Config(), "full")
    assert plan.sharded(full, 8) < 0.5 * plan.estimate_of(full)["peak"]


def test_gpus_of_the_command_line(capsys):
    from test_train import parse
    plan.show(parse("--ckpt", "tiny", "--plan", "--gpus", 4, "--device", "cpu"))
    text = capsys.readouterr().out
    assert re.search(r"each of 4 GPUs.*copy of the model +\d.*--shard\) +\d", text, re.DOTALL)
    one, four = (float(re.search(rf"{start} +(\S+?),? (?:at|without) ", text)[1]) for start in (
        "\nseconds a step", "\n  seconds a step"))
    assert "(on one GPU)" in text and four == pytest.approx(one / 4, rel=0.05)


def test_a_plan_of_a_small_model(capsys):
    """On a GPU Python is what takes the time; on a CPU, host memory is no other memory."""
    from test_train import parse
    flags = "--ckpt", "tiny", "--plan", "--batch", 16, "--micro-batch", 8
    plan.show(parse(*flags, "--device", "cuda"))
    text = " ".join(capsys.readouterr().out.split())
    layers = model.load("tiny", "cpu").config.n_layers
    assert f"seconds a step {0.005 * layers * 2:.2g}, in which Python launches kernels" in text
    assert "--offload" in text
    plan.show(parse(*flags, "--device", "cpu"))
    assert "--offload" not in capsys.readouterr().out
    small, large = (plan.memory(plan.from_arguments(parse(*flags, "--device", "cpu", *more))[0])[2]
                    for more in (["--checkpointing"], ["--offload"]))
    assert small == large


def test_what_makes_it_smaller_is_spelled_out(capsys):
    """Each line can be typed as it is; in eight bits, the one in four says so."""
    from test_train import parse
    for more, bits in ([], ""), (["--method", "qpissa", "--bits", 8], " --bits 4"):
        plan.show(parse("--ckpt", "tiny", "--plan", "--checkpointing", "--micro-batch", 1, *more))
        lines = re.findall(r"^  (--.*?)  +\d", capsys.readouterr().out, re.MULTILINE)
        assert lines == ["--checkpointing --micro-batch 1 --method qpissa" + bits, "--offload"]


def test_a_plan_for_a_cpu_has_nothing_of_a_gpu(llama2):
    """D8: neither cuBLAS nor CUDA, in a sum that is less by just that, and a thread's speed."""
    gpu, cpu, bf16 = (
        command(train.main, "--ckpt", "llama2", "--rank", 64, "--plan", *flags)
        for flags in ((), ("--device", "cpu"), ("--device", "cpu", "--dtype", "bfloat16")))
    assert "cuBLAS" in gpu and "CUDA" in gpu and "GiB that CUDA itself takes" in gpu
    for text in cpu, bf16:
        assert "cuBLAS" not in text and "CUDA" not in text and "GPU" not in text
        assert "rank 64, on cpu, products in" in text and "H200" not in text
        rate = 0.1 * torch.get_num_threads()
        assert f"at {rate:g} TFLOP/s, as reached by {torch.get_num_threads()} CPU threads" in text
    job = plan.job_of(model.Config(), rank=64)
    least = {cuda: plan.estimate_of(replace(job, cuda=cuda)) for cuda in (True, False)}
    assert least[True]["peak"] - least[False]["peak"] == plan.CUBLAS


def test_minutes_of_a_plan(capsys):
    """Where --steps says how many there are: seconds a step times steps."""
    from test_train import parse
    plan.show(parse("--ckpt", "tiny", "--plan", "--steps", 90, "--device", "cpu"))
    each, minutes = re.search(r"seconds a step +(\S+) at .* 90 steps, if rows are so long: (\S+) m",
                              " ".join(capsys.readouterr().out.split())).groups()
    assert float(minutes) == pytest.approx(1.5 * float(each), rel=0.05)


@pytest.mark.parametrize("there, device, words", [
    (False, None, "on an H200"), (True, None, "on the GPU that is here"),
    (False, "cpu", "on cpu"), (True, "cuda:0", "on cuda:0"), (False, "mps", "on mps")])
def test_the_device_of_a_plan(monkeypatch, capsys, there, device, words):
    """It is in the first line, and if it is none that is here, the first line says only that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    monkeypatch.setattr(model, "has_bfloat16", lambda device: True)
    from test_train import parse
    args = parse("--ckpt", "tiny", "--plan", *(["--device", device] if device else []))
    plan.show(args)
    first, *rest = capsys.readouterr().out.splitlines()
    if not there and not device:
        assert first == "There is no GPU here. This plan is for an H200; for this machine: " \
            "--device cpu"
        first = rest[0]
    assert f", {words}, products" in first
    if not there:
        job, _ = plan.from_arguments(args)
        assert job.cuda == (device is None) and (job.dtype == torch.bfloat16) == job.cuda


def test_the_rates_of_a_plan_were_measured():
    """Tokens a second times FLOPs a token, in result files."""
    gpus, cpu = (json.loads((ROOT / f"bench/results/{name}.json").read_text()) for name in (
        "gpus_h200", "step_cpu"))
    for bits, part, method in (16, "one", "lora"), (4, "one, four bits", "qpissa"):
        flops = plan.flops_in_all(plan.job_of(model.Config(), method, 128))
        rate = gpus["parts"][part]["tokens_per_second"] * flops / 1e12
        assert plan.REACHED[bits] == pytest.approx(rate, rel=0.02)
    job = plan.job_of(model.Config(576, 30, 9, 3, 49152, 1536), "lora", cpu["rank"], gpu=False,
                      length=cpu["length"], dtype=torch.float32)
    rate = cpu["step"]["ours"]["tokens_per_second"] * plan.flops_in_all(job) / 1e12
    assert plan.REACHED_BY_A_THREAD == pytest.approx(rate, rel=0.05)
    flops = plan.flops_in_all(plan.job_of(model.Config(), "lora", 128)) * 8 * 512
    measured = gpus["parts"]["one"]["ms"] / 1e3
    assert plan.seconds(plan.job_of(model.Config()), flops)[0] == pytest.approx(measured, rel=0.02)
