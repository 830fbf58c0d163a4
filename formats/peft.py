"""PEFT's LoRA files: adapter_config.json + adapter_model.safetensors (or .bin).

PEFT's lora_A is (r, in) and its lora_B (out, r): the transposes of our A (in, r) and B (r, out).
A module's pair has the keys base_model.model.<module>.lora_A.weight and lora_B.weight. A config
that asks for anything we would compute wrongly is refused by name. This file imports none of ours.
"""
import hashlib
import json
from pathlib import Path

import torch

WEIGHTS = "adapter_model"                                    # .safetensors or .bin
UNSUPPORTED = ("use_dora", "alpha_pattern", "lora_bias", "layer_replication", "modules_to_save",
               "fan_in_fan_out", "trainable_token_indices", "target_parameters")


def read_config(directory):
    """The dict of adapter_config.json. FileNotFoundError or ValueError names the file."""
    path = Path(directory) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        float(config["lora_alpha"])
        if config["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {config['peft_type']}")
    except FileNotFoundError:
        inner = Path(directory) / "adapter"
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


def config_json(pairs, task_type):
    """The dict of adapter_config.json for {module: (A (in, r), B (r, out))}, with scaling 1."""
    ranks = {A.shape[1] for A, _ in pairs.values()}
    assert len(ranks) == 1, f"one rank for all modules, not {ranks}"
    return {"peft_type": "LORA", "task_type": task_type, "r": min(ranks), "lora_alpha": min(ranks),
            "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
            "target_modules": sorted({n.rpartition(".")[2] for n in pairs})}


def read_pairs(directory, config):
    """{module: (A (in, r), B (r, out))} float32, the scaling folded into B. Raises as read_config,
    naming the file, for what is missing, damaged, or no LoRA of linear layers."""
    pairs = {}
    for key, M in read_tensors(directory, WEIGHTS).items():
        name, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        if kind not in ("A.weight", "B.weight"):
            raise ValueError(f"{directory}: {key} is not a LoRA matrix of a linear layer")
        pairs.setdefault(name, {})[kind[0]] = M.float().T
    if not pairs:
        raise ValueError(f"{directory}: there is no LoRA matrix in it")
    for name, p in pairs.items():
        if len(p) < 2 or p["A"].shape[1] != p["B"].shape[0]:
            raise ValueError(f"{directory}: lora_A and lora_B of {name} do not belong together")
        r, alpha = p["A"].shape[1], float(config["lora_alpha"])
        p["B"] = p["B"] * (alpha / (r ** 0.5 if config.get("use_rslora") else r))
    return {n: (p["A"], p["B"]) for n, p in pairs.items()}


def tensors_of(pairs):
    """The tensors of adapter_model.safetensors for {module: (A, B)}."""
    return {f"base_model.model.{n}.lora_{k}.weight": M.T.contiguous()
            for n, pair in pairs.items() for k, M in zip("AB", pair, strict=True)}


def read_tensors(directory, name):
    """The tensors of NAME.safetensors, or of NAME.bin if the former is not there."""
    path = Path(directory) / f"{name}.safetensors"
    try:
        if path.exists():
            from safetensors.torch import load_file
            return load_file(path)
        path = path.with_suffix(".bin")
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise ValueError(f"{path} needs the safetensors package: pip install safetensors") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory}: {name}.safetensors is missing") from None
    except Exception as e:        # both readers raise many kinds for a damaged file
        raise ValueError(f"{path}: not readable, perhaps truncated ({str(e)[:100]})") from None


def writer():
    """(function that writes a dict of tensors, suffix of its files, the other suffix)."""
    try:
        from safetensors.torch import save_file
        return save_file, ".safetensors", ".bin"
    except ImportError:
        return torch.save, ".bin", ".safetensors"


# ------------------------------------- adapters of ours from before pissa.json: a key in the config

OLD_BITS = {"pissa": (16, True), "lora": (16, False), "qpissa": (4, True), "loftq": (4, True),
            "qlora": (4, False)}


def old_facts(config, path):
    """The facts that adapter.py keeps in pissa.json, from the config's key "pissa", or None."""
    if not (info := config.get("pissa")):
        return None
    try:
        if (int(config["r"]) != float(config["lora_alpha"]) or not isinstance(info["rank"], int)
                or not all(isinstance(info[k], str) for k in ("method", "base"))):
            raise ValueError(f"r {config['r']}, lora_alpha {config['lora_alpha']}, pissa {info}")
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: not the config of a LoRA adapter ({e!r})") from None
    if info["method"] not in OLD_BITS:
        raise ValueError(f"{path}: method {info['method']} is none of {', '.join(OLD_BITS)}")
    bits, subtracted = OLD_BITS[info["method"]]
    if bits == 4 and not {"double_quant", "codes"} <= set(info):
        raise ValueError(f"{path}: its config does not say how weights were rounded")
    return {**info, "bits": bits, "subtracted": subtracted, "own_pair": "seen" in info}


def old_fingerprint(entries):
    """The hash of their base that those adapters have, of {module: (shape, sampled entries)}."""
    h = hashlib.sha256()
    for name in sorted(entries):
        h.update(f"{name} {tuple(entries[name][0])}\n".encode())
    numbers = torch.cat([entries[name][1].bfloat16() for name in sorted(entries)])
    h.update(bytes(numbers.view(torch.uint8).tolist()))
    return h.hexdigest()
