"""Several processes: `torchrun --nproc-per-node N train.py ...`. No other file knows of them.

    replicas   Every process holds all frozen weights. One all-reduce a step adds up the gradients.
    sharded    Every process holds 1/N of every layer's frozen weights (`Spread`), or with full of
               all weights (FSDP2). A layer is gathered while the one before it is computed.

Each process computes its share of a batch's micro-batches. The loss is a sum over the learnt tokens
of the whole batch, so gradients are added, not averaged. The decomposition is dealt out, too.
"""
import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import adapter
import model
import pissa
import relatives
from formats.jsonl import filled

RANK, WORLD, LOCAL = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if (
    "TORCHELASTIC_RUN_ID" in os.environ) else (0, 1, 0)                # torchrun started this one
SHARDED, MESH = False, None         # whether weights are sharded; with full, by FSDP2 among MESH


def start(device):
    """Meet the others, if torchrun started this program. Returns this process's device or None.

    Only process 0 speaks: the output of the others goes nowhere.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return device
    on_gpu = str(device or "cuda").startswith("cuda") and torch.cuda.is_available()
    if on_gpu:
        if LOCAL >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"process {LOCAL} of this host has no GPU: there are {gpus}; "
                             f"--nproc-per-node should be at most {gpus}")
        torch.cuda.set_device(LOCAL)
    store = meeting_place()
    store.set_timeout(dist.default_pg_timeout)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=RANK,
                            world_size=WORLD, timeout=timedelta(hours=1))   # 0 writes, all wait
    if RANK:
        sys.stdout = open(os.devnull, "w", errors="replace")
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
    print(filled(f"{WORLD} processes: with a copy of the model, each takes about "
                 f"{peak / 2**30:.1f} GiB, and a GPU has {there / 2**30:.1f}. So " + (
                     "the weights are spread over all of them" if SHARDED else "each has a copy")))


def end(code=0):
    """Part from the others, when all have come to the end. In a process group, this ends the
    program: without os._exit, torch 2.13's gloo aborts one exit in ten, after all is done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
    return items if SHARDED else items[RANK::WORLD]


def union(items):
    """The list that `share` has cut, in another order."""
    return items if SHARDED else sum(everyone(items), [])


def generation():
    """A context for `model.generate`: the layers of sharded weights cannot be recorded."""
    if not SHARDED:
        return nullcontext()
    import fast
    return fast.off()


# ------------------------------------------------------------------------------------ one step

def deal(parts):
    """This process's micro-batches. Sharded weights are gathered by all processes together, so each
    has equally many then, and the last may have nothing to learn."""
    mine = parts[RANK::WORLD]
    if SHARDED and len(mine) < -(-len(parts) // WORLD):
        tokens, labels, _ = parts[-1]
        mine.append((tokens[:1], torch.full_like(labels[:1], -100), None))
    return mine


LAST, COUNT, SENT = False, {}, {}   # whether this backward is a step's last one; gradients of
                                    # its parts that a parameter has; messages under way


def parts(p):
    """The parameters of the network that one of the optimizer's is made of: see `fast.joined`."""
    return getattr(p, "parts", [p])


def by_part(p, value):
    """What AdamW keeps for p, for each of its parts."""
    mine = parts(p)
    if mine == [p] or not value.ndim:                                     # or the number of steps
        return [value] * len(mine)
    pieces = value.split([part.numel() for part in mine])
    return [piece.view_as(part) for piece, part in zip(pieces, mine, strict=True)]


def from_parts(p, values):
    """The opposite of `by_part`."""
    return values[0] if parts(p) == [p] else torch.cat([v.flatten() for v in values])


def overlap(params):
    """Add up gradients over all processes while the last backward of a step computes the others."""
    for p in params if WORLD > 1 else ():
        if local(p) is p:                                   # FSDP2 does it for those it shards
            for part in parts(p):
                part.register_post_accumulate_grad_hook(partial(ready, p))


def ready(p, part):
    """The gradient of a part of p is complete."""
    COUNT[p] = COUNT.get(p, 0) + LAST
    if COUNT[p] == len(parts(p)):
        send(p)


def complete(params):
    """True if all gradients of this process's micro-batches are there, or under way."""
    return all(p in SENT or all(part.grad is not None for part in parts(p)) for p in params)


def send(p):
    """Begin to add up the gradient of p over all processes. It is that of its parts, and zero if no
    micro-batch was left for this process."""
    grads = [torch.zeros_like(q) if q.grad is None else q.grad for q in parts(p)]
    for part in parts(p):
        part.grad = None
    p.grad = from_parts(p, grads)
    if local(p) is p and WORLD > 1:
        SENT[p] = dist.all_reduce(p.grad, async_op=True)


def before_backward(net, last):
    """last: whether it is a step's last backward, and every process has one."""
    global LAST
    LAST = last
    if MESH:
        net.set_requires_gradient_sync(last)


def add_up(params, *numbers):
    """Add up gradients, and numbers (tensors or floats), over all processes: the numbers."""
    for p in params:                       # no backward was the last one of all processes
        if p not in SENT:
            send(p)
    if WORLD == 1:
        return numbers
    device = local(params[0]).device                       # (a copy to it would wait for the GPU)
    numbers = torch.stack([n if isinstance(n, torch.Tensor) else torch.full((), n, device=device)
                           for n in numbers])
    dist.all_reduce(numbers)
    for work in SENT.values():
        work.wait()
    SENT.clear()
    COUNT.clear()
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
    """Nested dicts with whole tensors. Those that are sharded go to process 0's host memory, one
    after the other, and to no other process."""
    if isinstance(value, dict):
        return {k: gathered(v) for k, v in value.items()}
    if not hasattr(value, "full_tensor"):
        return value
    value = value.full_tensor()
    return None if RANK else value.cpu()


@torch.no_grad()
def put(target, value):
    """Copy a whole tensor into `target`, or this process's part of it. Returns target."""
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements,
                                  src_data_rank=None)
    return target.copy_(value)


class Spread:
    """Frozen weights of layers: each process keeps 1/N of a layer's bytes, in one row.

    Two `places` hold a whole layer each. While one layer is computed, the next one comes to the
    other place. Parameters are views of their place, so what came need not be copied.
    """

    def __init__(self):
        self.layers, self.places, self.held, self.coming = [], [], [None, None], [None, None]

    def add(self, layer):
        """The next layer. It keeps this process's part. What a relative freezes beside W stays."""
        stays = {id(p) for _, m in pissa.layers(layer) for p in m._parameters.values()
                 if p is not m.frozen}
        frozen = [p for p in layer.parameters() if not p.requires_grad and id(p) not in stays]
        rows = [F.pad(p.flatten().view(torch.uint8), (0, -p.nbytes % 256)) for p in frozen]
        row, i = torch.cat(rows), len(self.layers)
        part = F.pad(row, (0, -len(row) % WORLD)).chunk(WORLD)[RANK].clone()
        self.layers.append((part, frozen, [len(r) for r in rows]))
        for p in frozen:
            p.data = p.new_empty(1).expand(p.shape)
        layer.register_forward_pre_hook(lambda *_: self.need(i))
        layer.register_forward_hook(lambda _, x, y: self.before_backward_of(i, y))

    def place(self):
        """After the last layer."""
        size = WORLD * max(len(part) for part, *_ in self.layers)
        self.places = torch.empty(2, size, dtype=torch.uint8, device=self.layers[0][0].device)
        for i, (_, frozen, sizes) in enumerate(self.layers):
            rows = self.places[i % 2].split([*sizes, size - sum(sizes)])
            for p, row in zip(frozen, rows, strict=False):
                p.data = row[:p.numel() * p.element_size()].view(p.dtype).view(p.shape)

    def gather(self, i):
        """Begin to bring layer i to its place. Whichever layer is there was used before."""
        place, part = i % 2, self.layers[i][0]
        if self.held[place] != i:
            if work := self.coming[place]:           # one that was not needed after all
                work.wait()
            self.held[place] = i
            self.coming[place] = dist.all_gather_into_tensor(
                self.places[place, :WORLD * len(part)], part, async_op=True)

    def need(self, i):
        """Wait for layer i, and begin to bring the one that is computed after it."""
        self.gather(i)
        if work := self.coming[i % 2]:
            work.wait()
            self.coming[i % 2] = None
        after = i + 1 if torch._C._current_graph_task_id() < 0 else i - 1           # in backward
        if 0 <= after < len(self.layers):
            self.gather(after)

    def before_backward_of(self, i, output):
        """The gradient of a layer's output comes before its weights are used in backward."""
        if output.requires_grad:
            output.register_hook(lambda _: self.need(i))


def shard(prefix, net, read, args, spread):
    """Spread a layer, by its name, over all processes, when its last weights are read."""
    module = net.get_submodule(prefix)
    for name, m in list(module.named_modules()):
        for leaf, p in list(m.named_parameters(recurse=False)):
            if p.is_meta:
                setattr(m, leaf, nn.Parameter(read(f"{prefix}.{name}", leaf), p.requires_grad))
        if hasattr(m, "checksum"):
            m.checksum = partial(int, m.checksum())                   # of all of it, for adapter.py
    if not MESH:
        return spread.add(module)
    from torch.distributed.fsdp import fully_shard
    # Recomputation must stand inside what is sharded. Around it, it would find only the parts of
    # trained weights, and silently train nothing.
    if args.compile:
        module.forward = torch.compile(module.forward)
    if args.checkpointing:
        module.forward = partial(model.checkpointed, Inside(module))
    add_not_average(fully_shard(module, mesh=MESH))


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
    if args.method == "full":
        from torch.distributed.device_mesh import init_device_mesh
        MESH = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (WORLD,))
    spread = Spread()
    todo, begun = [f"model.layers.{i}" for i in range(len(net.model.layers))], []

    def reading(name, leaf="weight"):
        layer = ".".join(name.split(".")[:3])
        if begun and layer != begun[0]:
            todo.remove(begun[0])
            shard(begun.pop(), net, read, args, spread)
        if not begun and layer in todo:
            begun.append(layer)
        return read(name, leaf)

    def finish():
        for layer in todo:
            shard(layer, net, read, args, spread)
        if not MESH:
            spread.place()

    return reading, finish


def shard_root(net):
    """With full, shard what is left of a network whose layers are: embedding, last norm, head."""
    if not MESH:
        return
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
    init, group_size, ready = pissa.init_of(method), WORLD * (1 if read else 32), {}

    def factors(name, weight, options):
        W = read(name) if weight.is_meta else weight.detach()
        options.generator = pissa.generator_of(name, seed, W.device)
        frozen, A, B, pair = init(W, options)
        pair, bits = pair or (), getattr(frozen, "bits", 16)
        sent = [A, B] if not pair or pair[0] is A else [A, B, *pair]
        return [M.contiguous() for M in sent], bool(pair), bits

    def shared(weight, options):
        name = next(iter(options.remaining))
        if name not in ready:
            group = list(options.remaining)[:group_size]
            share, made = {n: options.remaining[n] for n in group[RANK::WORLD]}, {}
            for n in list(share):
                W = weight if n == name else share[n].weight
                made[n] = factors(n, W, replace(options, remaining=share))
                del share[n]
            shapes = {n: ([M.shape for M in Ms], *facts) for n, (Ms, *facts) in made.items()}
            shapes = {n: found for theirs in everyone(shapes) for n, found in theirs.items()}
            for i, n in enumerate(group):
                Ms = made[n][0] if n in made else [
                    torch.empty(s, device=weight.device,
                                dtype=torch.promote_types(weight.dtype, torch.float32))
                    for s in shapes[n][0]]
                for M in Ms:
                    dist.broadcast(M, i % WORLD)
                ready[n] = Ms, *shapes[n][1:]
        (A, B, *pair), subtracted, bits = ready.pop(name)
        pair = (tuple(pair) or (A, B)) if subtracted else None
        return adapter.frozen_of(weight, pair, bits, double_quant), A, B, pair

    return relatives.with_init(method, shared)
