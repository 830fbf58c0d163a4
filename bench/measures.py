"""What bench/study.py measures of a trained network: what is learnt, what is forgotten, the SVD.

A measure is a function (net, base, job) -> {name: plain value}, called after training. net: the
trained network. base: a function from a matrix's name to its original W, (out, in). Here
DeltaW = A B - A_0 B_0, transposed to (out, in) like W: what training added, without the rounding of
the residual. For --method full it is the trained weight less W.

Where a network has more than 60 matrices, those of every fifth layer stand for all.
"""

import math
import sys
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path

import torch

import data
import model
import pissa
import train
from support import options

FULL_RANK = 32  # the r of the subspaces if the method has none: --method full
TEXT = 40_000  # characters of other text


def matrices(net):
    """{name: module} of the target matrices that are looked at."""
    found = {n: m for n, m in net.named_modules() if n.rpartition(".")[2] in pissa.TARGETS}
    if len(found) <= 60:
        return found
    return {
        n: m for n, m in found.items() if not int(n.partition("layers.")[2].partition(".")[0]) % 5
    }


def change(module, W):
    """DeltaW (out, in), float32, on W's device."""
    if not isinstance(module, pissa.PissaLinear):
        return module.weight.detach().float() - W.float()
    A, B = (M.detach().to(W.device, torch.float32) for M in module.factors())
    change = A @ B
    if module.A0 is not None:
        change -= module.A0.to(change) @ module.B0.to(change)
    return change.T


def subspaces(D, W, r):
    """How D (out, in) lies to the singular vectors of W (out, in) = U S V^T.

    {"top_left": |U_r^T D|^2 / |D|^2, "top_right": |D V_r|^2 / |D|^2, the same of the bottom r of
    the min(out, in), "angle_left", "angle_right": mean squared cosine of the principal angles
    between the first r singular vectors of D and those of W}. A random D of full rank has
    r / out and r / in in the first four. Zeros if D is 0. `r` is at most min(out, in).
    """
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    left, _, right = torch.linalg.svd(D, full_matrices=False)
    r, total = min(r, len(Vh)), D.square().sum()
    if not total:
        return dict.fromkeys(
            ("top_left", "top_right", "bottom_left", "bottom_right", "angle_left", "angle_right"),
            0.0,
        )
    shares = {
        "top_left": (U[:, :r].T @ D).square().sum() / total,
        "top_right": (D @ Vh[:r].T).square().sum() / total,
        "bottom_left": (U[:, -r:].T @ D).square().sum() / total,
        "bottom_right": (D @ Vh[-r:].T).square().sum() / total,
        "angle_left": (U[:, :r].T @ left[:, :r]).square().sum() / r,
        "angle_right": (Vh[:r] @ right[:r].T).square().sum() / r,
    }
    return {name: x.item() for name, x in shares.items()}


@torch.no_grad()
def learnt(net, base, job):
    """Means over the matrices: |DeltaW| / |W|, `subspaces` for r of the job, the first 64 singular
    values of DeltaW over |DeltaW|, and the stable rank |DeltaW|^2 / s_1^2."""
    r, rows, spectra = job.get("rank") or FULL_RANK, [], []
    if job.get("method") == "full":
        r = min(r, FULL_RANK)
    for name, module in matrices(net).items():
        W = base(name).float()
        D = change(module, W)
        S = torch.linalg.svdvals(D)
        size = S.norm()
        spectrum = (S / size if size else S)[:64]
        spectra.append(torch.nn.functional.pad(spectrum, (0, 64 - len(spectrum))))
        rows.append(
            {
                "norm": (size / W.norm()).item(),
                **subspaces(D, W, r),
                "stable_rank": (size / S[0]).square().item() if size else 0.0,
            }
        )
    means = {f"learnt_{k}": sum(row[k] for row in rows) / len(rows) for k in rows[0]}
    return {
        **means,
        "learnt_random_left": random_share(net, base, r, 0),
        "learnt_random_right": random_share(net, base, r, 1),
        "learnt_spectrum": [round(x, 6) for x in torch.stack(spectra).mean(0).tolist()],
    }


def random_share(net, base, r, side):
    """The mean of r / out (side 0) or r / in (1): the shares of a change with no direction."""
    sides = [base(name).shape for name in matrices(net)]
    return sum(min(r, *shape) / shape[side] for shape in sides) / len(sides)


def other_text(where):
    """Text that is not the task's: of a file, or "stories", what checkpoints/tiny was made of."""
    if where == "stories":
        folder = str(Path(options.tiny()).resolve())
        if folder not in sys.path:  # it imports what lies beside it
            sys.path.append(folder)
        return import_module("stories").chunk(10**6, TEXT)
    return Path(where).read_text("utf-8")[10_000 : 10_000 + TEXT]  # past the title pages


@cache
def windows(ckpt, where):
    """The ids of that text in windows of 256."""
    return data.encode([("", other_text(where))], data.Tokenizer(model.find(ckpt)), 256)[0]


@torch.no_grad()
def forgetting(net, base, job):
    """Perplexity per token on job["general"], after training, and before it (with the matrices W;
    not for --method full, which changes the rest as well)."""
    text, on = windows(job["ckpt"], job["general"]), [m for _, m in pissa.layers(net)]
    args = Namespace(micro_batch=8, no_packing=False)
    device = next(net.parameters()).device
    mixed = job.get("method") == "full" and model.has_bfloat16(device)
    autocast = torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()

    def perplexity():
        return math.exp(train.validation_loss(net, text, args, autocast))

    found = {"perplexity": perplexity()}
    if on:
        try:
            for name, module in pissa.layers(net):
                plain = module.frozen if isinstance(module.frozen, torch.Tensor) else module.A
                module.W = base(name).to(plain.device, net.lm_head.weight.dtype)
            found["perplexity_before"] = perplexity()
        finally:
            for module in on:
                module.W = None
    return found


@contextmanager
def unpacked(net):
    """Inside, quantised frozen weights are tensors with the same values, (out, in), in bfloat16 on
    a GPU, else float32: eight bits then round W alone, and no x for the product with it."""
    packed = {m: m.frozen for _, m in pissa.layers(net) if isinstance(m.frozen, torch.nn.Module)}
    try:
        for m, frozen in packed.items():
            del m.frozen
            kind = torch.bfloat16 if m.A.is_cuda else torch.float32
            m.frozen = torch.nn.Parameter(frozen.dequantize(kind), requires_grad=False)
        yield
    finally:
        for m, frozen in packed.items():
            del m.frozen
            m.frozen = frozen


@torch.no_grad()
def svd_error(net, base, job):
    """|W - A_0 B_0| over the least possible, less 1: worst and mean over the matrices. In float64:
    the least is the norm of the other singular values, of the eigenvalues of W W^T."""
    found = []
    for name, module in pissa.layers(net):
        if name not in matrices(net) or module.A0 is None:
            continue
        W = base(name).double()
        W = W if W.shape[0] <= W.shape[1] else W.T
        product = module.A0.to(W) @ module.B0.to(W)
        rest = (base(name).double() - product.T).norm()
        values = torch.linalg.eigvalsh(W @ W.T)[: -job["rank"]].clamp(min=0)
        least = values.sum().sqrt()
        found.append((rest / least - 1).item() if least > 0 else 0.0)
    if not found:
        raise ValueError(f"svd_error: method {job.get('method')} subtracts no A B from W")
    return {"svd_worst": max(found), "svd_mean": sum(found) / len(found)}
