"""train.train with its forward and backward as CUDA graphs, for the small models of bench/study.py.

A GPU computes a step of SmolLM2-135M (32 examples, 7,000 tokens) in 30 ms. Python needs 170 ms to
launch its kernels one by one. A CUDA graph launches all of them at once. It has fixed shapes and
addresses, so a batch is padded to one of a few shapes, and copied to where the graph reads it.

    with graphs.used(net):
        train.train(net, examples, args, autocast)

Loss and gradients are those of train.loss_sum to rounding: padding comes after the text of a row,
where causal attention does not look, and its label is -100. What cannot be recorded, a method that
copies from the host, say, is computed as usual: `used` gives a list that says so.
"""
from contextlib import contextmanager

import torch

import train

TEXT = 1024                              # the tokens of a batch are padded to a multiple of this
LENGTH = 512                             # and rows to a multiple of this


def padded(tokens, labels, where_text):
    """The same batch in one of few shapes: (tokens, where_text, learnt, labels).

    tokens, labels (b, T), where_text (P,), as data.micro_batches gives them. Returns tokens (B, S),
    where_text (Q,), learnt (L,), those of the Q positions that have a label, and labels (L,).
    S is a multiple of LENGTH, B of 32, Q and L of TEXT.
    """
    (b, T), P = tokens.shape, len(where_text)
    S, B, Q = (up(n, unit) for n, unit in ((T, LENGTH), (b, 32), (P, TEXT)))
    wide, targets = torch.zeros(B, S, dtype=tokens.dtype), torch.full((B, S), -100)
    wide[:b, :T], targets[:b, :T] = tokens, labels
    is_text = torch.zeros(B * S, dtype=torch.bool)
    is_text[where_text // T * S + where_text % T] = True
    targets[~is_text.view(B, S)] = -100
    is_text[(~is_text).nonzero()[:, 0][:Q - P]] = True
    where = is_text.nonzero()[:, 0]
    targets = targets.flatten()[where]
    learnt = (targets != -100).nonzero()[:, 0]
    others = (targets == -100).nonzero()[:, 0][:up(len(learnt), TEXT) - len(learnt)]
    learnt = torch.cat([learnt, others])
    return wide, where, learnt, targets[learnt]


def up(n, unit):
    """The next multiple of unit."""
    return -(-n // unit) * unit


def loss_and_gradients(net, params, tokens, where_text, learnt, labels):
    """(sum of the cross-entropies, its gradients by params)."""
    x = net.hidden(tokens, where_text=where_text).flatten(0, 1).index_select(0, learnt)
    loss = train.loss_of(net.lm_head, x, labels)
    return loss.detach(), torch.autograd.grad(loss, params)


def recorded(f, pool, *tensors):
    """`f(*tensors)` as a CUDA graph, a function of new tensors; on a CPU, f itself.

    pool: whose memory it shares with the other graphs of it, since only one runs at a time.
    """
    if tensors[0].device.type != "cuda":
        return f
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):               # twice before: kernels are compiled and chosen
        for _ in range(2):
            f(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    torch.clear_autocast_cache()                  # or the graph would read weights as they were
    with torch.cuda.graph(graph, pool=pool):
        found = f(*tensors)
    torch.clear_autocast_cache()

    def replay(*new):
        for old, x in zip(tensors, new, strict=True):
            old.copy_(x)
        graph.replay()
        return found

    return replay


class Replayed(torch.autograd.Function):
    """A loss whose gradients by params are known: backward only scales them."""

    @staticmethod
    def forward(ctx, loss, grads, *params):
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx, g):
        return None, None, *torch._foreach_mul(ctx.grads, g)


def shapes(net):
    """Of all parameters and buffers."""
    return [x.shape for x in (*net.parameters(), *net.buffers())]


@contextmanager
def used(net, kept=None):
    """Inside, train.loss_sum is replayed. Gives a list: why a graph could not be recorded.

    kept: a dict. It keeps what was recorded, for the next network of the same kind, the same but
    for the values of its tensors. These are then copied to where the graphs read them: recording
    takes longer than training. RuntimeError at the end if a graph went out of date.
    """
    kept = {} if kept is None else kept
    if kept and shapes(kept["net"]) != shapes(net):
        kept.clear()
    plain, device, last, why = train.loss_sum, net.lm_head.weight.device, [], []
    if not kept:
        kept |= {"net": net, "made": {}, "pool": (
            torch.cuda.graph_pool_handle() if device.type == "cuda" else None)}
    made, params, theirs = kept["made"], list(net.parameters()), list(kept["net"].parameters())
    values = [*params, *net.buffers()], [*theirs, *kept["net"].buffers()]

    def loss_sum(network, tokens, labels, where_text=None):
        if network is not net or where_text is None or not torch.is_grad_enabled() or why:
            return plain(network, tokens, labels, where_text)
        trained = [i for i, p in enumerate(params) if p.requires_grad]
        given = [x.to(device) for x in padded(tokens, labels, where_text)]
        key = tuple(x.shape for x in given), tuple(trained)
        if net is not kept["net"]:
            with torch.no_grad():
                torch._foreach_copy_(*reversed(values))
        if key not in made:
            for old, new in zip(theirs, params, strict=True):
                old.requires_grad_(new.requires_grad)
            try:
                made[key] = recorded(lambda *x: loss_and_gradients(
                    kept["net"], [theirs[i] for i in trained], *x), kept["pool"], *given)
            except RuntimeError as error:
                why.append(str(error).partition("\n")[0])
                return plain(network, tokens, labels, where_text)
        last[:] = tokens, labels, where_text
        loss, grads = made[key](*given)
        return Replayed.apply(loss, grads, *(params[i] for i in trained))

    train.loss_sum = loss_sum
    try:
        yield why
        if last and not why:
            found, expected = loss_sum(net, *last).item(), plain(net, *last).item()
            if not abs(found - expected) <= 0.02 * abs(expected):
                raise RuntimeError(f"a graph's loss is {found}, the network's {expected}")
    finally:
        train.loss_sum = plain
        if why:
            kept.clear()
