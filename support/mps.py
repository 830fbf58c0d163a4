"""`--device mps`, on request only. Not tested by us: we have no such machine.

Metal has no float64, which the decompositions need. So they run on the CPU.
"""
from dataclasses import replace
from importlib import import_module

import torch

import pissa


def method(args):
    """args.method for `pissa.inject`; on mps, a function that decomposes on the CPU."""
    if not str(args.device).startswith("mps"):
        return args.method
    print("note: --device mps is not tested by us; weights are decomposed on the CPU")
    return on_the_cpu(args.method)


def on_the_cpu(name):
    """A method like pissa.init_NAME. What it makes of a weight is moved to where the weight is."""
    init = getattr(import_module(pissa.METHODS[name]), "init_" + name)

    def made_on_the_cpu(weight, options):
        g = torch.Generator().manual_seed(options.generator.initial_seed())
        alone = replace(options, generator=g, remaining={}, ready={})
        frozen, A, B, subtracted = init(weight.cpu(), alone)
        moved = A.to(weight.device), B.to(weight.device)
        if subtracted and subtracted[0] is A:
            subtracted = moved
        return frozen.to(weight.device), *moved, subtracted

    made_on_the_cpu.__name__ = name
    return made_on_the_cpu
