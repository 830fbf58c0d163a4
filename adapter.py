# From "PiSSA from scratch, in pure PyTorch" (MIT licence).
"""Save and load what was learnt: one directory that this code, PEFT and vLLM all read.

A trained PiSSA is a LoRA of rank 2r on the *untouched* base model, since

    Delta W = A B - A_0 B_0 = [A | A_0] [B ; -B_0]

So adapter_config.json and adapter_model.safetensors are PEFT's. They hold all it takes to go on
training: W_res = W - A_0 B_0 needs no second SVD. Two more files are ours, and PEFT ignores them:

    pissa.json          facts: bits of the frozen weight, whether a pair was subtracted from W, the
                        rank ... and checksums. If another tool has rewritten adapter_model, the
                        directory is a plain LoRA. If it is damaged, it is refused.
    pissa.safetensors   256 sampled entries of every W, by which another base is refused, and the
                        pair (A_q, B_q) with Q = nf4(W - A_q B_q), if that is not (A_0, B_0).

    pissa.inject(net, rank=64); ...train...; adapter.save(net, "there"); adapter.load(base, "there")
"""
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import pissa
import qpissa
from formats import peft
from formats.peft import FACTS, LORA, plain, read_facts, unwrapped
from pissa import PissaLinear
from support.files import check_room, replaced

EXTRAS, KEPT = "pissa", "rank niter seed base chat_template"         # EXTRAS.safetensors or .bin
OURS = "adapter_config.json", "adapter_model.*", "pissa.*", "pissa_quantised_from.*"
ROUNDED_ELSEWHERE = ("{}: some weights round to another code here than on the machine that "
                     "trained them: outputs differ a little (another dtype or kind of device?)")
EXPORTED = ("on the full-precision base, as PEFT puts it, this adapter gives W + Delta W, not the "
            "Q + A B that was trained: the two differ by what rounding to few bits lost")


# -------------------------------------------------------------------------------------------- facts

def facts(net):
    """What `save` writes to pissa.json of an injected `net`: a dict.

    bits: of the frozen weights, 16 (any float dtype), 8 or 4. double_quant: see nf4.py. subtracted:
    whether a pair was subtracted from W; own_pair: one other than (A_0, B_0); own_layer: whether
    layers are a relative's. rank: the largest. For people: method ... ValueError if they differ.
    """
    found, Qs = layers(net), quantised(net)
    if not found:
        raise ValueError("nothing to save: the model has no adapter")
    kinds = {(m.A0 is not None, m.subtracted is not None and m.subtracted[0] is not m.A0,
              *(getattr(m.frozen, k, None) for k in ("double_quant", "bits"))) for _, m in found}
    if len(kinds) > 1:
        raise ValueError("layers of several kinds cannot be saved as one adapter")
    (subtracted, own_pair, double, bits), = kinds
    rank, own = max(len(m.factors()[1]) for _, m in found), type(found[0][1])
    return {**getattr(unwrapped(net), "pissa", {}), "rank": rank, "bits": bits or 16,
            "subtracted": subtracted, "own_pair": own_pair, "own_layer": own is not PissaLinear} | (
        {"codes": codes({n: Q.checksum() for n, Q in Qs.items()})} if Qs else {}) | (
        {"double_quant": double} if bits == 4 else {})


def facts_of(method, **options):
    """The facts of a method, a name or a function, found by trying it on one small matrix."""
    net = nn.ModuleDict({"W": nn.Linear(64, 64, bias=False, device="meta")})
    net.W.weight = nn.Parameter(torch.arange(1.0, 65).diag())
    return facts(pissa.inject(net, 1, method, "W", progress=False, **options))


def quantised(net):
    """{module name: NF4 or FP8} of the layers that are in four or eight bits."""
    return {n: m.frozen for n, m in layers(net) if isinstance(m.frozen, nn.Module)}


def layers(net):
    """pissa.layers, with the names that they have without torch.compile's and other wrappers."""
    return [(plain(n), m) for n, m in pissa.layers(unwrapped(net))]


def codes(sums):
    """A hash of {module name: Q.checksum()}, to tell whether weights were rounded alike."""
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


def is_quantised(directory):
    """True if an adapter is of weights in 4 or 8 bits: then see `prepare` of model.load."""
    return read_facts(directory)["bits"] != 16


# ------------------------------------------------------------------------------------ a directory

@dataclass
class Saved:
    """What a directory holds. pairs: {module: (A (in, r), B (r, out))} as PEFT adds them to W."""
    directory: Path
    config: dict
    facts: dict
    pairs: dict
    extras: dict          # {"<module>.fingerprint": entries of W, "<module>.A_q": ..., ".B_q": ...}
    force_base: bool      # warn of another base, instead of ValueError
    bases: dict           # {name: parameter that should be the base's}, whole, as PEFT copies some

    def check(self, name, W):
        """W (out, in), if it is the module's base weight; ValueError if it is not."""
        A, B = self.pairs[name]
        if W.shape != (B.shape[1], A.shape[0]):
            raise ValueError(f"{self.directory}: {name} is {A.shape[0]} x {B.shape[1]}, the "
                             f"model's is {W.shape[1]} x {W.shape[0]}: give the model that it was "
                             "made on")
        if not W.is_meta and (a := self.extras.get(f"{name}.fingerprint")) is not None:
            b = pissa.sampled(W)
            if a.shape != b.shape or not peft.same_base(a, b):
                self.differs(f": {name} differs")
        return W

    def check_old(self, entries):
        """ValueError if {module: (shape, entries)} are not those of the base of an old adapter."""
        if "base" in self.facts and self.facts["base"] != peft.old_fingerprint(entries):
            self.differs()

    def differs(self, what=""):
        """The base is another one: ValueError, or a warning if that is wanted."""
        if not self.force_base:
            raise ValueError(f"{self.directory} was made on another base model{what}; --force-base "
                             "uses it all the same")
        warnings.warn(f"{self.directory} was made on another base model", stacklevel=1)

    def rebuild(self, name, W):
        """frozen, A, B, A0, B0, subtracted for the base weight W (out, in), without any SVD."""
        dtype = torch.promote_types(W.dtype, torch.float32)
        (A, B), bits, double = self.pairs[name], *map(self.facts.get, ("bits", "double_quant"))
        if not self.facts["subtracted"]:
            A, B = (M.to(W.device, dtype) for M in (A, B))
            return frozen_of(W, None, bits, double), A, B, None, None, None
        r = A.shape[1] // 2
        A, A0, B, B0 = A[:, :r], A[:, r:].contiguous(), B[:r], -B[r:]
        subtracted = tuple(self.extras.get(f"{name}.{k}", M) for k, M in (("A_q", A0), ("B_q", B0)))
        A, B, Aq, Bq = (M.to(W.device, dtype) for M in (A, B, *subtracted))
        return frozen_of(W, (Aq, Bq), bits, double), A, B, A0, B0, subtracted


def frozen_of(W, subtracted, bits, double_quant):
    """What is frozen of W (out, in), in 16, 8 or 4 bits: W less the pair `subtracted`, if any."""
    if bits != 16:
        return (qpissa.rounded(W, *subtracted, bits, double_quant) if subtracted
                else qpissa.quantize(W, bits, double_quant))
    return pissa.residual(W, *subtracted) if subtracted else W


def read_adapter(directory, force_base=False):
    """`Saved` of an adapter directory, ours or PEFT's. FileNotFoundError or ValueError names the
    file that is missing or damaged, or that would be loaded wrongly."""
    directory, found = Path(directory), read_facts(directory)
    config = peft.read_config(directory)
    pairs, bases = peft.read_pairs(directory, config)
    extras = {f"{name}.fingerprint": pissa.sampled((bases.pop if force_base else bases.get)(
              f"{name}.weight"))
              for name in pairs if f"{name}.weight" in bases}
    if "weights" in found or "seen" in found:                        # "seen": before pissa.json
        read = peft.read_tensors(directory, found.get("seen", EXTRAS))
        extras |= {plain(name): M for name, M in read.items()}
    peft.check_extras(directory, EXTRAS, found, pairs, extras)
    found["rank"] = max(A.shape[1] for A, _ in pairs.values()) // (1 + found["subtracted"])
    return Saved(directory, config, found, pairs, extras, force_base, bases)


def write(directory, pairs, found, extras, task_type=None, modules=None):
    """Write a directory: see `Saved`. It appears when it is complete. Files of others stay in it.
    modules: the names of all modules of the network. OSError if it cannot be written, ValueError
    before anything is written if it could not be read again."""
    save_file, suffix, _ = peft.writer()
    texts = {"adapter_config.json": peft.config_json(pairs, task_type, modules)}
    peft.check_finite([*((n, M) for n, pair in pairs.items() for M in pair), *extras.items()],
                      f"{directory} is not written")
    check_room(directory, sum(A.nbytes + B.nbytes for A, B in pairs.values()), "the adapter")
    with replaced(directory, OURS) as tmp:
        try:
            save_file(peft.tensors_of(pairs), tmp / (peft.WEIGHTS + suffix))
            if found:
                save_file({k: M.contiguous() for k, M in extras.items()}, tmp / (EXTRAS + suffix))
        except Exception as e:    # each writer raises its own kind if, say, the disk is full
            raise OSError(f"{directory}: not written ({str(e)[:100]})") from None
        if found:
            texts[FACTS] = found | peft.checksums(tmp / (peft.WEIGHTS + suffix),
                                                  tmp / (EXTRAS + suffix))
        for name, content in texts.items():
            (tmp / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def compress(directory: str | Path, out: str | Path, rank: int | None = None) -> dict:
    """Cut a saved adapter down to `rank` (default half, 2r -> r) and write it to `out` as a LoRA.

    A matrix whose rank is `rank` or less keeps its own. The best approximation of Delta W = M N
    takes two thin QRs, M = Q_M R_M and N^T = Q_N R_N, and the leading triplets of R_M R_N^T.
    Returns {module name: (||Delta W - Delta W_r||, ||Delta W||)}, Frobenius norms.
    """
    saved, small, errors = read_adapter(directory), {}, {}
    largest = max(A.shape[1] for A, _ in saved.pairs.values())
    if not 1 <= (r := largest // 2 if rank is None else rank) <= largest:
        raise ValueError(f"{directory}: cannot compress rank {largest} to {r}")
    for name, (M, N) in tqdm(saved.pairs.items(), "compress", unit="matrix", leave=False):
        r = max(1, M.shape[1] // 2) if rank is None else min(rank, M.shape[1])
        (QM, RM), (QN, RN) = torch.linalg.qr(M.double()), torch.linalg.qr(N.T.double())
        U, S, Vh = torch.linalg.svd(RM @ RN.T)
        small[name] = ((QM @ (U * S.sqrt())[:, :r]).float(),
                       ((S.sqrt()[:, None] * Vh)[:r] @ QN.T).float())
        errors[name] = S[r:].norm().item(), S.norm().item()
    found = {**saved.facts, "rank": max(A.shape[1] for A, _ in small.values())}
    if found["subtracted"] or found.get("own_layer"):                # it ends as a LoRA on W
        found = {k: v for k, v in found.items() if k in KEPT.split()} | LORA
    ours = {"weights", "base"} & set(saved.facts)
    prints = {k: M for k, M in saved.extras.items() if k.endswith(".fingerprint")}
    write(out, small, found if ours else None, prints, saved.config.get("task_type"))
    return errors


# -------------------------------------------------------------------------------------- a network

def save(net: nn.Module, directory: str | Path, learnt: dict | None = None) -> None:
    """Write the adapter of an injected `net` as a PEFT LoRA, of rank 2r if A_0 and B_0 exist.

    learnt: {"<module>.A": tensor, "<module>.B": ...}, if other A and B are to be written. The LoRA
    is Delta W, to be added to W. A quantised model computes Q + A B instead. On the full-precision
    W the outputs differ by what rounding W - A_q B_q to Q lost.
    """
    found, pairs, extras = facts(net), {}, {}
    for name, m in layers(net):
        A, B = (M.detach().cpu() for M in (m.factors() if m.state else (
            (learnt or {}).get(f"{name}.{k}", getattr(m, k)) for k in "AB")))
        if m.A0 is not None:                           # A B - A_0 B_0 = [A | A_0] [B ; -B_0]
            A, B = torch.cat([A, m.A0.cpu()], 1), torch.cat([B, -m.B0.cpu()])
        pairs[name] = A, B
        extras |= {f"{name}.{k}": getattr(m, k).detach().cpu() for k in ("fingerprint", *m.state)}
        if found["own_pair"]:
            extras[f"{name}.A_q"], extras[f"{name}.B_q"] = (M.cpu() for M in m.subtracted)
    modules = [plain(n) for n, _ in unwrapped(net).named_modules()]
    write(directory, pairs, found, extras, "CAUSAL_LM" if "lm_head" in modules else None, modules)


def load(net: nn.Module, directory: str | Path, *, read=None, keep_base=False,
         force_base=False, relative=None) -> nn.Module:
    """Put an adapter on `net`, in place: one of ours, to use or to train on, or a LoRA of PEFT's.

    An adapter already on `net` is removed first, which needs keep_base=True when it was put there.
    read, keep_base: as for `pissa.inject`; read(module, "bias"), too. Raises ValueError, before
    anything changes, for an adapter of ours that was made on another base, or whose modules `net`
    does not have; with `read`, a base is checked matrix by matrix. force_base: only a warning for
    another base. relative: a function from a method's name to the module with its `Layer`.
    """
    outside, net = net, unwrapped(net)
    saved, entries = read_adapter(directory, force_base), {}
    paths = {plain(n): n for n, _ in reversed([*net.named_modules()])}   # the outermost of a name
    for name in saved.pairs:
        W = saved.check(name, base_weight(net, paths.get(name, name), directory))
        entries[name] = W.shape, None if read else pissa.sampled(W)
    peft.check_bases(directory, saved.bases, peft.parameters(net, read))
    if not read:
        saved.check_old(entries)
        pissa.remove(net)
    net.requires_grad_(False)
    own = relative and saved.facts.get("own_layer") and relative(saved.facts["method"])
    Layer = getattr(own, "Layer", PissaLinear)
    order = {n: i for i, n in enumerate(reversed(paths))}          # as the network computes them
    for name in tqdm(sorted(saved.pairs, key=lambda n: order.get(n, -1)), "adapter", unit="matrix",
                     delay=1, leave=False):
        linear = net.get_submodule(path := paths.get(name, name))
        if read:
            linear.weight = nn.Parameter(saved.check(name, read(name)), requires_grad=False)
            entries[name] = linear.weight.shape, pissa.sampled(linear.weight)
        W = linear.weight.detach()
        frozen, A, B, A0, B0, subtracted = saved.rebuild(name, W)
        original = W.cpu() if keep_base and frozen is not W else None
        layer = Layer(linear, frozen, A, B, A0, B0, subtracted, original)
        for key in layer.state:
            getattr(layer, key).data = saved.extras[f"{name}.{key}"].to(A, copy=True)
        net.set_submodule(path, layer)
        del W, linear, frozen, original                  # freed before the next one is asked for
    saved.check_old(entries)
    net.pissa = {k: v for k, v in saved.facts.items() if k not in ("base", "seen", *peft.SUMS)}
    if "codes" in saved.facts and facts(net)["codes"] != saved.facts["codes"]:
        warnings.warn(ROUNDED_ELSEWHERE.format(directory), stacklevel=2)
    return outside


def base_weight(net, name, directory):
    """The original weight (out, in) of an nn.Linear, or of the PissaLinear in its place."""
    try:
        m = net.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{directory}: the model has no {name}") from None
    if isinstance(m, PissaLinear):
        return m.base()
    if type(m) is not nn.Linear:
        raise ValueError(f"{name} is a {type(m).__name__}, not an nn.Linear")
    return m.weight
