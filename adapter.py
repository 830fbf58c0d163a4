"""Adapter files in PEFT's LoRA format: adapter_config.json + adapter_model.safetensors (or .bin).

PEFT's lora_A is (r, in) and its lora_B (out, r): the transposes of A (in, r) and B (r, out) here,
under the name base_model.model.<module>.lora_A.weight. A saved PiSSA adapter is the LoRA of rank 2r
with the factors [A | A_0] and [B ; -B_0]; the key "pissa" of its config says how it was made. One
with a quantised residual has a third file, SEEN, which PEFT ignores: what was subtracted from W
before the rest was rounded to four bits (A_q and B_q in pissa.py), where that is not A_0 B_0.

    pissa.inject(net, rank=64); ...train...; adapter.save(net, "there"); adapter.load(base, "there")
"""
import json
import os
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import nf4
import pissa
from svd import wide

ROUNDED_ELSEWHERE = ("{}: some weights round to another 4-bit code here than where it was trained, "
                     "in another dtype or on another kind of device perhaps: outputs differ a "
                     "little")
EXPORTED = ("on the full-precision base, as PEFT puts it, this adapter gives W + Delta W, not the "
            "Q + A B that was trained: the two differ by what rounding to four bits lost")
UNSUPPORTED = ("use_dora", "alpha_pattern", "lora_bias", "layer_replication", "modules_to_save",
               "fan_in_fan_out", "trainable_token_indices", "target_parameters")
WEIGHTS, SEEN = "adapter_model", "pissa_quantised_from"      # .safetensors or .bin


# -------------------------------------------------------------------------------------------- files

@contextmanager
def written(path):
    """`with written(path) as tmp:` write to tmp; it becomes `path` only if nothing went wrong."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_adapter(directory, tensors, info, task_type, seen=None):
    """tensors: {module name: (A (in, r), B (r, out))}, with scaling 1; info: our own metadata;
    seen: like tensors, the pairs (A_q, B_q) of modules for which they are not (A_0, B_0)."""
    ranks = {A.shape[1] for A, _ in tensors.values()}
    assert len(ranks) == 1, f"one rank for all modules, not {ranks}"
    config = {"peft_type": "LORA", "task_type": task_type, "r": min(ranks),
              "lora_alpha": min(ranks), "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
              "target_modules": sorted({n.rpartition(".")[2] for n in tensors}), "pissa": info}
    files = {WEIGHTS: {f"base_model.model.{n}.lora_{k}.weight": M.T.contiguous()
                       for n, pair in tensors.items() for k, M in zip("AB", pair)}}
    if seen:
        config["pissa"] = {**info, "seen": SEEN}
        files[SEEN] = {f"{n}.{k}_q": M.contiguous() for n, pair in seen.items()
                       for k, M in zip("AB", pair)}
    try:
        from safetensors.torch import save_file
        suffix, other = ".safetensors", ".bin"
    except ImportError:
        save_file, suffix, other = torch.save, ".bin", ".safetensors"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:               # all files are renamed when all have been written
        tmp = stack.enter_context(written(directory / "adapter_config.json"))
        try:
            for name, state in files.items():
                save_file(state, stack.enter_context(written(directory / (name + suffix))))
        except Exception as e:    # each writer raises its own kind where, say, the disk is full
            raise OSError(f"{directory}: not written ({str(e)[:100]})") from None
        tmp.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for stale in (WEIGHTS + other, SEEN + other, *([] if seen else [SEEN + suffix])):
        (directory / stale).unlink(missing_ok=True)


def read_config(directory):
    """The dict of adapter_config.json; errors as of `read_adapter`."""
    directory = Path(directory)
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        alpha, info = float(config["lora_alpha"]), config.get("pissa")
        if config["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {config['peft_type']}")
        if info and (int(config["r"]) != alpha or not isinstance(info["rank"], int)
                     or not all(isinstance(info[k], str) for k in ("method", "base"))):
            raise ValueError(f"r {config['r']}, lora_alpha {alpha:g}, pissa {info}")
    except FileNotFoundError:
        inner = directory / "adapter"
        hint = f"; perhaps {inner} is meant" if (inner / path.name).is_file() else ""
        raise FileNotFoundError(f"{path} is missing: {directory} is not an adapter{hint}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not the config of a LoRA adapter ({e!r})") from None
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "loftq")):
        raise ValueError(f"{path}: init_lora_weights={init} needs the changed base it was made "
                         "with; save it from PEFT with path_initial_model_for_weight_conversion")
    if other := [k for k in UNSUPPORTED if config.get(k)]:
        raise ValueError(f"{path}: {', '.join(other)} is not supported")
    return config


def is_quantised(directory):
    """Whether an adapter belongs to weights in four bits, for which a model is loaded layer by
    layer: `model.load(..., prepare=...)`."""
    return (read_config(directory).get("pissa") or {}).get("method") in pissa.QUANTISED


def read_adapter(directory):
    """config dict and {module name: (A (in, r), B (r, out))} float32, the scaling folded into B.

    Raises FileNotFoundError or ValueError, naming the file, for what is missing, damaged, or would
    be loaded wrongly.
    """
    directory, config, pairs = Path(directory), read_config(directory), {}
    alpha = float(config["lora_alpha"])
    for key, M in read_tensors(directory).items():
        name, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise ValueError(f"{directory}: {key} is not a LoRA matrix of a linear layer")
        pairs.setdefault(name, {})[kind[0]] = M.float().T
    if not pairs:
        raise ValueError(f"{directory}: there is no LoRA matrix in it")
    for name, p in pairs.items():
        if len(p) < 2 or p["A"].shape[1] != p["B"].shape[0]:
            raise ValueError(f"{directory}: lora_A and lora_B of {name} do not belong together")
        r = p["A"].shape[1]
        p["B"] = p["B"] * (alpha / (r ** 0.5 if config.get("use_rslora") else r))
    return config, {n: (p["A"], p["B"]) for n, p in pairs.items()}


def read_tensors(directory, name=WEIGHTS):
    """The tensors of adapter_model.safetensors or adapter_model.bin, or of SEEN."""
    path = directory / f"{name}.safetensors"
    try:
        if path.exists():
            from safetensors.torch import load_file
            return load_file(path)
        path = directory / f"{name}.bin"
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path} needs the safetensors package: pip install safetensors") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory}: {name}.safetensors is missing") from None
    except Exception as e:        # both readers raise many kinds for a damaged file
        raise ValueError(f"{path}: not readable, perhaps truncated ({str(e)[:100]})") from None


def read_seen(directory, config, pairs):
    """{module name: (A_q, B_q)} of the modules for which they are not (A_0, B_0).

    config, pairs: of `read_adapter`. Raises as it does.
    """
    if not (config.get("pissa") or {}).get("seen"):
        return {}
    tensors, seen = read_tensors(Path(directory), SEEN), {}
    for name, (A, B) in pairs.items():
        r = A.shape[1] // 2
        Aq, Bq = (tensors.get(f"{name}.{k}_q", torch.zeros(0)) for k in "AB")
        if Aq.shape != (A.shape[0], r) or Bq.shape != (r, B.shape[1]):
            raise ValueError(f"{directory}: A_q and B_q of {name} are missing in {SEEN}, or have "
                             "another shape")
        seen[name] = Aq, Bq
    return seen


def compress(directory, out, rank=None):
    """Cut a saved adapter down to `rank` (default half, 2r -> r) and write it to `out` as a LoRA.

    The best approximation of Delta W = M N takes two thin QRs and a small SVD, never the full
    matrix: M = Q_M R_M, N^T = Q_N R_N, then the leading triplets of R_M R_N^T.
    Returns {module name: (||Delta W - Delta W_r||, ||Delta W||)}, Frobenius norms.
    """
    config, pairs = read_adapter(directory)
    smallest = min(M.shape[1] for M, _ in pairs.values())
    r = smallest // 2 if rank is None else rank
    if not 1 <= r <= smallest:
        raise ValueError(f"{directory}: cannot compress rank {smallest} to {r}")
    small, errors = {}, {}
    for name, (M, N) in pairs.items():
        if not (M.isfinite().all() and N.isfinite().all()):
            raise ValueError(f"{directory}: {name} holds NaN or Inf")
        (QM, RM), (QN, RN) = torch.linalg.qr(M.double()), torch.linalg.qr(N.T.double())
        U, S, Vh = torch.linalg.svd(RM @ RN.T)
        small[name] = ((QM @ (U * S.sqrt())[:, :r]).float(),
                       ((S.sqrt()[:, None] * Vh)[:r] @ QN.T).float())
        errors[name] = S[r:].norm().item(), S.norm().item()
    info = config.get("pissa")
    if info and info["method"] not in ("lora", "qlora"):       # the others end as a LoRA on W
        info = {"method": "lora"} | {k: info.get(k) for k in ("niter", "seed", "base")}
    info = info and {**info, "rank": r}
    write_adapter(out, small, info, config.get("task_type"))
    return errors


# -------------------------------------------------------------------------------------- a network's

def save(net, directory):
    """Write the adapter of an injected `net` as a PEFT LoRA, of rank 2r, or r for lora and qlora.

    The LoRA is Delta W, to be added to W. A quantised model computes Q + A B instead: on the
    full-precision W the outputs differ by what rounding W - A_0 B_0 to Q lost.
    """
    if not hasattr(net, "pissa"):
        raise ValueError("nothing to save: the model has no adapter")
    tensors, seen = {}, {}
    for name, m in pissa.layers(net):
        A, B = m.A.detach().cpu(), m.B.detach().cpu()
        if m.A0 is not None:         # A B - A_0 B_0 = [A | A_0] [B ; -B_0]
            A, B = torch.cat([A, m.A0], 1), torch.cat([B, -m.B0])
        tensors[name] = A, B
        if m.Aq is not m.A0:
            seen[name] = m.Aq, m.Bq
    task = "CAUSAL_LM" if hasattr(net, "lm_head") else None
    write_adapter(directory, tensors, net.pissa, task, seen)


def split(A, B, seen, info):
    """A, B, A0, B0, Aq, Bq out of what `save` wrote: A, B of rank 2r, and (Aq, Bq) or None."""
    if not info or info["method"] in ("lora", "qlora"):
        return A, B, None, None, None, None
    r = A.shape[1] // 2
    A, A0, B, B0 = A[:, :r], A[:, r:].contiguous(), B[:r], -B[r:]
    return A, B, A0, B0, *(seen or (A0, B0))


def freeze(W, Aq, Bq, info):
    """The frozen weight that belongs to W (out, in), Aq and Bq, without any SVD."""
    if not info or info["method"] == "lora":
        return W
    if Aq is None:
        return nf4.quantize(W, info["double_quant"])
    Aq, Bq = (M.to(W.device, wide(W).dtype) for M in (Aq, Bq))
    if info["method"] == "pissa":
        return pissa.residual(W, Aq, Bq)
    return pissa.rounded(W, Aq, Bq, info["double_quant"])


def load(net, directory, *, weight=None, keep_base=True):
    """Put an adapter on `net`, in place: one of ours, to use or train on, or a LoRA made by PEFT.

    An adapter already on `net` is removed first. Refuses (ValueError), before anything is changed,
    an adapter of ours that was made on another base, and one whose modules `net` does not have.
    weight: as for `inject`; the base is then checked last.
    """
    def own(name):
        try:
            m = net.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{directory}: the model has no {name}") from None
        return pissa.base_weight(m, name)

    config, pairs = read_adapter(directory)
    info, seen, samples = config.get("pissa"), read_seen(directory, config, pairs), {}
    if weight:
        check_method(directory, info)
        for name, pair in pairs.items():
            check_shape(directory, name, own(name), *pair)
    else:
        found = check_base(directory, config, pairs, own)
        pissa.remove(net)
    net.requires_grad_(False)
    bar = tqdm(pairs.items(), desc="adapter", unit="matrix", delay=1, leave=False)
    for name, (A, B) in bar:
        linear = net.get_submodule(name)
        if weight:
            linear.weight = nn.Parameter(weight(name), requires_grad=False)
            samples[name] = pissa.sample(linear.weight)
        W = linear.weight.detach()
        A, B, A0, B0, Aq, Bq = split(A, B, seen.get(name), info)
        A, B = (M.to(W.device, wide(W).dtype) for M in (A, B))
        frozen = freeze(W, Aq, Bq, info)
        base = W.cpu() if keep_base and frozen is not W else None
        pissa.put(net, name, pissa.PissaLinear(linear, frozen, A, B, A0, B0, Aq, Bq, base))
        del W, linear                    # freed before the next one is asked for
    if weight:
        found = pissa.digest(samples)
        check_fingerprint(directory, info, found)
    net.pissa = dict(info) if info else {"method": "lora", "rank": config["r"], "niter": None,
                                         "seed": None, "base": found}
    net.pissa.pop("seen", None)
    if "codes" in net.pissa:
        net.pissa["codes"] = pissa.checksum(pissa.nf4_sums(net))
        if net.pissa["codes"] != info["codes"]:
            warnings.warn(ROUNDED_ELSEWHERE.format(directory))
    return net


def check_base(directory, config, pairs, weight):
    """The fingerprint of a base that an adapter fits; ValueError if it does not fit.

    directory, config, pairs: the adapter and what `read_adapter` made of it. weight(name): the
    base's matrix (out, in) of a module, or a ValueError where it has none.
    """
    check_method(directory, config.get("pissa"))
    base = pissa.fingerprint(pairs, lambda n: check_shape(directory, n, weight(n), *pairs[n]))
    check_fingerprint(directory, config.get("pissa"), base)
    return base


def check_shape(directory, name, W, A, B):
    """The base's matrix W (out, in) of a module, or ValueError if A B is of another shape."""
    if W.shape != (B.shape[1], A.shape[0]):
        raise ValueError(f"{directory}: {name} is {A.shape[0]} x {B.shape[1]}, the model's is "
                         f"{W.shape[1]} x {W.shape[0]}")
    return W


def check_fingerprint(directory, info, base):
    """ValueError if an adapter of ours is of another base."""
    if info and info["base"] != base:
        raise ValueError(f"{directory} was made on another base model (fingerprint "
                         f"{info['base'][:12]}, this one has {base[:12]})")


def check_method(directory, info):
    """ValueError if an adapter of ours is of a method that is not known, or does not say enough."""
    if info and info["method"] not in pissa.METHODS:
        raise ValueError(f"{directory}: method {info['method']} is none of "
                         + ", ".join(pissa.METHODS))
    if info and info["method"] in pissa.QUANTISED and not {"double_quant", "codes"} <= set(info):
        raise ValueError(f"{directory}: its config does not say how weights were rounded")
