"""--offload: what --checkpointing keeps, the input of every layer, lies in host memory meanwhile.

A row of 32,768 tokens of Llama-2-7B has 8 GiB of such inputs. A layer computes for longer than its
input travels, so both directions are hidden behind it: forward copies on a stream of its own, and
while backward computes a layer again, the input of the one before it comes back. The memory is
page-locked, which a GPU reads and writes by itself. PyTorch keeps it for the next step.
"""
from contextlib import contextmanager, nullcontext

import torch

LEAST = 2**20                              # bytes: smaller ones are not worth the way


def on(stream):
    """`with on(stream):` its work is launched there; None is the usual order of a CPU."""
    return torch.cuda.stream(stream) if stream else nullcontext()


class Kept:
    """A tensor in host memory. `earlier`: those that were kept before it and are not back yet."""

    def __init__(self, x, stream, earlier):
        self.device, self.stream, self.earlier, self.back = x.device, stream, earlier, None
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if stream:
            stream.wait_stream(torch.cuda.current_stream(x.device))           # x is computed there
            x.record_stream(stream)                # its memory is not given away before
        with on(stream):
            self.host.copy_(x, non_blocking=True)
        earlier.append(self)

    def begin(self):
        """Begin to copy it back."""
        with on(self.stream):
            self.back = self.host.to(self.device, non_blocking=True, copy=True)

    def fetch(self):
        """It, on its device; the one before it begins to come back."""
        if self.back is None:
            self.begin()
        x, self.back, self.host = self.back, None, None
        if self.stream:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self.stream)
            x.record_stream(here)
        self.earlier.remove(self)
        if self.earlier and self.earlier[-1].back is None:
            self.earlier[-1].begin()
        return x


@contextmanager
def kept_in_host_memory(device):
    """Inside, what autograd keeps of (B, T, D) tensors goes to host memory until backward."""
    stream, earlier = torch.cuda.Stream(device) if device.type == "cuda" else None, []

    def pack(x):
        wanted = x.ndim == 3 and x.device.type == device.type and x.nbytes >= LEAST
        return Kept(x, stream, earlier) if wanted else x

    with torch.autograd.graph.saved_tensors_hooks(
            pack, lambda kept: kept.fetch() if isinstance(kept, Kept) else kept):
        yield


def through_host_memory(net):
    """Let `net.hidden` do so. net: a model.Llama with checkpointing."""
    plain = net.hidden

    def hidden(*args, **kwargs):
        with kept_in_host_memory(net.lm_head.weight.device):
            return plain(*args, **kwargs)

    net.hidden = hidden
