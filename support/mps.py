"""`--device mps`, on request only. Not tested by us: we have no such machine.

Metal has no float64, which the decompositions need. So they run on the CPU.
"""
from dataclasses import replace

import torch

import pissa
import relatives


def method(method, device):
    """A method for `pissa.inject`; on mps, one that decomposes on the CPU."""
    if not str(device).startswith("mps"):
        return method
    print("note: --device mps is not tested by us; weights are decomposed on the CPU")
    return on_the_cpu(method)


def on_the_cpu(method):
    """The same method. What it makes of a weight is moved to where the weight is."""
    init = pissa.init_of(method)

    def made_on_the_cpu(weight, options):
        g = torch.Generator().manual_seed(options.generator.initial_seed())
        alone = replace(options, generator=g, ready={})
        frozen, A, B, subtracted = init(weight.cpu(), alone)
        moved = A.to(weight.device), B.to(weight.device)
        if subtracted and subtracted[0] is A:
            subtracted = moved
        return frozen.to(weight.device), *moved, subtracted

    return relatives.with_init(method, made_on_the_cpu)
