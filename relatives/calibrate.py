"""What a relative measures before it begins: the inputs of each matrix, or its gradient.

A few training examples go through the model. Hooks reduce what they see at once, so that no more
than one gradient is on the device at a time. A relative's STATISTIC says what is measured:

    inputs      the mean of x^T x over all tokens, (in, in) float32, of the rows x that W multiplies
    gradients   dL/dW of all examples together, (out, in) float32, in host memory
    weights     W (out, in), without examples: for a `finish`, which sees all matrices together

Matrices that read the same x, such as q, k and v, share one tensor. A relative may have its own

    reduce(before, new, options) -> what is kept   before: what was, None at first; new: x (tokens,
                                                   in) or dL/dW (out, in) of one micro-batch
    finish({name: kept}, options) -> {name: statistic}      sees all matrices together

Several processes measure the same examples, and each uses what it finds for its share of matrices.
"""
from functools import partial

import torch
from tqdm import tqdm

import data
import pissa
from svd import finite, full_float32


@full_float32()
def mean_of_inputs(before, x, options):
    """(tokens so far, the mean of x^T x, (in, in)), of `before` and x (tokens, in)."""
    x, new = x.to(torch.promote_types(x.dtype, torch.float32)), len(x)
    n, C = before or (0, x.new_zeros(x.shape[1:] * 2))
    return n + new, C.addmm_(x.T, x, beta=n / (n + new), alpha=1 / (n + new))


def sum_of_gradients(before, G, options):
    """before + G, (out, in) in host memory."""
    G = G.to("cpu", torch.promote_types(G.dtype, torch.float32))
    return G if before is None else before.add_(G)


def measure(net, method, batches, loss, options, targets=pissa.TARGETS):
    """{name of a module: its statistic} for the targets of `net`, which is frozen afterwards.

    batches: tuples; loss(net, *batch) is minimised. ValueError if a statistic is not finite.
    """
    linears, found, same, last = pissa.find_linears(net, targets), {}, {}, [None, None]
    by_inputs = method.STATISTIC == "inputs"
    reduce = getattr(method, "reduce", mean_of_inputs if by_inputs else sum_of_gradients)

    def see_input(name, module, args):
        if args[0] is last[0]:                                   # another matrix has just read it
            return same.update({name: last[1]})
        last[:] = args[0], name
        found[name] = reduce(found.get(name), args[0].detach().flatten(0, -2), options)

    def see_gradient(name, weight):
        found[name] = reduce(found.get(name), weight.grad, options)
        weight.grad = None

    net.requires_grad_(False)
    if method.STATISTIC == "weights":
        found, batches = {n: m.weight.detach() for n, m in linears.items()}, ()
    hooks = [m.register_forward_pre_hook(partial(see_input, n)) if by_inputs else
             m.weight.requires_grad_().register_post_accumulate_grad_hook(partial(see_gradient, n))
             for n, m in linears.items()]
    try:
        with torch.set_grad_enabled(not by_inputs):
            for batch in tqdm(batches, f"measuring {method.STATISTIC}", unit="batch", leave=False):
                total = loss(net, *batch)
                if not by_inputs:
                    total.backward()
    finally:
        net.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    found |= {name: found[first] for name, first in same.items()}
    finish = getattr(method, "finish", lambda found, options: {
        n: kept[1] if reduce is mean_of_inputs else kept for n, kept in found.items()})
    found = finish({n: found[n] for n in linears}, options)
    if bad := [name for name, statistic in found.items() if not finite(statistic)]:
        raise ValueError(f"{bad[0]}: its {method.STATISTIC} hold NaN or Inf")
    return found


def for_train(net, method, own, examples, loss, args):
    """`measure` on --calibrate N of the examples of train.py, at most all of them."""
    options = pissa.Options(args.rank, args.niter, own=own)
    if method.STATISTIC == "weights":
        return measure(net, method, (), loss, options, args.targets)
    count = min(args.calibrate or getattr(method, "EXAMPLES", 128), len(examples))
    batch = data.batches(examples, count, args.seed, 0)[0]
    rows = max(1, args.micro_batch // 4)            # so it takes no more memory than training does
    batches = data.micro_batches(batch, rows * max(len(ids) for ids, _ in batch))
    print(f"{args.method}: measuring {method.STATISTIC} on {count} of {len(examples)} examples")
    return measure(net, method, batches, loss, options, args.targets)
