"""Several processes: `torchrun --nproc-per-node N train.py ...`. No other file knows of them.

    replicas   Every process holds all frozen weights. One all-reduce a step adds up the gradients.
    sharded    Every process holds 1/N of every large frozen matrix, and with full of every weight
               (FSDP2). A layer is gathered when it is used.

Each process computes its share of a batch's micro-batches. The loss is a sum over the learnt tokens
of the whole batch, so gradients are added, not averaged. The decomposition is dealt out, too.
"""
import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from importlib import import_module

import torch
import torch.distributed as dist
from torch import nn

import adapter
import model
import nf4
import pissa

RANK, WORLD, LOCAL = (int(os.environ.get(name, default)) for name, default in (
    ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
SHARDED, MESH = False, None         # whether weights are sharded, and among which processes


def start(device):
    """Meet the others, if torchrun started this program. Returns this process's device or None.

    Only process 0 speaks: the output of the others goes nowhere.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return device
    on_gpu = str(device or "cuda").startswith("cuda") and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(LOCAL)
    store = meeting_place()
    store.set_timeout(dist.default_pg_timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=RANK,
                            world_size=WORLD)
    if RANK:
        sys.stdout = open(os.devnull, "w")
    return f"cuda:{LOCAL}" if on_gpu else "cpu"


def meeting_place():
    """A new store, in which the processes find each other. Process 0 holds it.

    torchrun keeps its own store when it restarts processes. The addresses of the dead are still in
    it, so it only tells where the new one is. Nobody answers there if that is of the dead, too.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":          # torchrun keeps none
        return dist.TCPStore(host, port, WORLD, not RANK)
    theirs = dist.TCPStore(host, port)
    if not RANK:
        ours = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        theirs.set("meeting place", str(ours.port))
        return ours
    for _ in range(60):
        with suppress(dist.DistNetworkError):
            at = int(theirs.get("meeting place"))
            return dist.TCPStore(host, at, timeout=timedelta(seconds=2))
    raise OSError(f"{host}: process 0 does not answer")


def choose(wish, peak):
    """Decide whether weights are sharded. wish: yes, no, or auto: if a copy does not fit on a GPU.
    peak: a function that returns the bytes which a process with a copy takes."""
    global SHARDED
    SHARDED = WORLD > 1 and wish == "yes"
    if WORLD == 1 or wish != "auto" or not torch.cuda.is_available():
        return
    peak = peak() + 2**29                                                        # and CUDA itself
    there = torch.cuda.get_device_properties(0).total_memory
    SHARDED = peak > there
    print(f"{WORLD} processes: with a copy of the model, each takes about {peak / 2**30:.1f} GiB, "
          f"and a GPU has {there / 2**30:.1f}. So " + (
              "the weights are spread over all of them" if SHARDED else "each has a copy"))


def end():
    """Part from the others, when all have come to the end."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def agree(value):
    """The value of process 0, a small object."""
    box = [value]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def everyone(value):
    """The values of all processes, small objects."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def share(items):
    """This process's part of a list. Sharded weights need all processes together: all of it."""
    return items if MESH else items[RANK::WORLD]


def union(items):
    """The list that `share` has cut, in another order."""
    return items if MESH else sum(everyone(items), [])


def generation():
    """A context for `model.generate`: the layers of sharded weights cannot be recorded."""
    if not MESH:
        return nullcontext()
    import fast
    return fast.off()


# ------------------------------------------------------------------------------------ one step

def deal(parts):
    """This process's micro-batches. Sharded weights are gathered by all processes together, so each
    has equally many then, and the last may have nothing to learn."""
    mine = parts[RANK::WORLD]
    if MESH and len(mine) < -(-len(parts) // WORLD):
        tokens, labels, _ = parts[-1]
        mine.append((tokens[:1], torch.full_like(labels[:1], -100), None))
    return mine


BUCKET = 2**24                      # numbers of gradients that are sent together
LAST, READY, SENT = False, [], []   # in the last backward: gradients to be sent, messages under way
WAITING = 0                         # numbers in READY


def overlap(params):
    """Add up gradients over all processes while the last backward of a step computes the others."""
    for p in params if WORLD > 1 else ():
        if local(p) is p:                                   # FSDP2 does it for those it shards
            p.register_post_accumulate_grad_hook(ready)


def ready(p):
    """A gradient is complete: send it, with others."""
    global WAITING
    if LAST:
        READY.append(p)
        WAITING += p.numel()
        if WAITING >= BUCKET:
            send()


def send():
    """Begin to add up the gradients in READY."""
    global WAITING
    WAITING = 0
    if READY:
        flat = torch.cat([p.grad.flatten() for p in READY])
        SENT.append((dist.all_reduce(flat, async_op=True), *READY))
        for p, g in zip(READY, flat.split([p.numel() for p in READY]), strict=True):
            p.grad = g.view_as(p)
        READY.clear()


def before_backward(net, last):
    """last: whether it is a step's last backward, and every process has one."""
    global LAST
    LAST = last and WORLD > 1
    if MESH:
        net.set_requires_gradient_sync(last)


def add_up(params, *numbers):
    """Add up gradients, and numbers (tensors or floats), over all processes: the numbers."""
    if WORLD == 1:
        return numbers
    device = local(params[0]).device                       # (a copy to it would wait for the GPU)
    numbers = torch.stack([n if isinstance(n, torch.Tensor) else torch.full((), n, device=device)
                           for n in numbers])
    begun = {*READY, *(p for _, *those in SENT for p in those)}
    for p in params:                       # no backward was the last one of all processes
        if p not in begun and local(p) is p:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            READY.append(p)
    send()
    dist.all_reduce(numbers)
    for work, *_ in SENT:
        work.wait()
    SENT.clear()
    return numbers.unbind()


def floats(*numbers):
    """Numbers as floats. Those that are tensors come from the GPU in one copy."""
    values = iter(torch.stack([n for n in numbers if isinstance(n, torch.Tensor)]).tolist())
    return [next(values) if isinstance(n, torch.Tensor) else n for n in numbers]


def add_numbers(*numbers):
    """Sums of floats over all processes."""
    return [sum(column) for column in zip(*everyone(numbers), strict=True)]


# --------------------------------------------------------------------------- whole and sharded

def trained(net):
    """{name: parameter} of those that are trained; of sharded ones, this process's part."""
    if MESH:
        net.reshard()                             # the last forward has gathered the root's
    return {n: p for n, p in net.named_parameters() if p.requires_grad}


def local(t):
    """This process's part of a tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def whole(t):
    """A tensor, gathered if it is sharded. All processes must call this."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gathered(value):
    """Nested dicts with whole tensors."""
    if isinstance(value, dict):
        return {k: gathered(v) for k, v in value.items()}
    return whole(value) if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def put(target, value):
    """Copy a whole tensor into `target`, or this process's part of it. Returns target."""
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements,
                                  src_data_rank=None)
    return target.copy_(value)


def shard(prefix, net, read, args):
    """Spread a layer, by its name, over all processes, when its last weights are read. What is
    small or trained beside frozen weights stays whole everywhere."""
    from torch.distributed.fsdp import fully_shard
    module = net.get_submodule(prefix)
    for name, m in list(module.named_modules()):
        for leaf, p in list(m.named_parameters(recurse=False)):
            if p.is_meta:
                setattr(m, leaf, nn.Parameter(read(f"{prefix}.{name}", leaf), p.requires_grad))
        if isinstance(m, nf4.NF4):       # torch 2.11 shards only what is called floating point
            m.checksum = partial(int, m.checksum())                   # of all of it, for adapter.py
            called = torch.float8_e4m3fn if m.codes.shape[-1] % 2 else torch.float16
            m.codes = nn.Parameter(m.codes.view(called), False)
    # Recomputation must stand inside what is sharded. Around it, it would find only the parts of
    # trained weights, and silently train nothing.
    if args.compile:
        module.forward = torch.compile(module.forward)
    if args.checkpointing:
        module.forward = partial(model.checkpointed, Inside(module))
    ignored = {p for n, p in module.named_parameters() if args.method != "full" and (
        p.requires_grad or p.ndim < 2 or n.endswith((".absmax", ".scale", ".mean")))}
    add_not_average(fully_shard(module, mesh=MESH, ignored_params=ignored))


class Inside:
    """A layer without what FSDP2 does before and after it."""

    def __init__(self, layer):
        self.mlp, self.parameters, self.forward = layer.mlp, layer.parameters, layer.forward

    def __call__(self, x, *rest):
        return self.forward(x, *rest)


def add_not_average(module):
    """Gradients are sums over processes: the loss is divided by the tokens of the whole batch."""
    module.set_gradient_divide_factor(1.0)
    if MESH.device_type == "cpu":
        module.set_force_sum_reduction_for_comms(True)


def sharding(net, read, args):
    """`read` for model.load's prepare that shards each layer of `net` when the next is begun, and
    `finish`, to be called for the last one: no process ever holds more than a layer as a whole."""
    global MESH
    from torch.distributed.device_mesh import init_device_mesh
    MESH = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (WORLD,))
    todo, begun = [f"model.layers.{i}" for i in range(len(net.model.layers))], []

    def reading(name, leaf="weight"):
        layer = ".".join(name.split(".")[:3])
        if begun and layer != begun[0]:
            todo.remove(begun[0])
            shard(begun.pop(), net, read, args)
        if not begun and layer in todo:
            begun.append(layer)
        return read(name, leaf)

    def finish():
        for layer in todo:
            shard(layer, net, read, args)

    return reading, finish


def shard_root(net):
    """Shard what is left of a network whose layers are: embedding, last norm, head."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    add_not_average(fully_shard(net, mesh=MESH, reshard_after_forward=False))
    register_fsdp_forward_method(net, "hidden")
    layers = list(net.model.layers)
    for i, layer in enumerate(layers):                    # two are gathered while one computes
        layer.set_modules_to_forward_prefetch(layers[i + 1:i + 3])
        layer.set_modules_to_backward_prefetch(layers[max(0, i - 2):i][::-1])


# ---------------------------------------------------------------------------- the decomposition

def dealt(method, seed, double_quant, read=None):
    """A method for `pissa.inject` that decomposes only this process's share of the matrices.

    It works on a group of matrices at a time. Each process makes A and B (and A_q, B_q) of its own
    ones and sends them to all. Then each computes all the frozen weights itself.
    """
    init = getattr(import_module(pissa.METHODS[method]), "init_" + method)
    group_size = WORLD * (1 if read else 32)
    facts, ready = adapter.facts_of(method, double_quant=double_quant), {}

    def factors(name, weight, options):
        W = read(name) if weight.is_meta else weight.detach()
        options.generator = pissa.generator_of(name, seed, W.device)
        _, A, B, pair = init(W, options)
        return [A, B, *(pair or ())][:4 if facts["own_pair"] else 2]

    def shared(weight, options):
        name = next(iter(options.remaining))
        if name not in ready:
            group = list(options.remaining)[:group_size]
            share, made = {n: options.remaining[n] for n in group[RANK::WORLD]}, {}
            for n in list(share):
                W = weight if n == name else share[n].weight
                made[n] = factors(n, W, replace(options, remaining=share))
                del share[n]
            for i, n in enumerate(group):
                m, r = options.remaining[n], options.rank
                shapes = [(m.in_features, r), (r, m.out_features)] * (1 + facts["own_pair"])
                ready[n] = made.get(n) or [
                    torch.empty(s, device=weight.device,
                                dtype=torch.promote_types(weight.dtype, torch.float32))
                    for s in shapes]
                for M in ready[n]:
                    dist.broadcast(M, i % WORLD)
        A, B, *pair = ready.pop(name)
        pair = pair or ((A, B) if facts["subtracted"] else None)
        return adapter.frozen_of(weight, pair, facts["bits"], double_quant), A, B, pair

    shared.__name__ = method
    return shared
