"""PEFT's LoRA files: adapter_config.json + adapter_model.safetensors (or .bin). And pissa.json.

PEFT's lora_A is (r, in) and its lora_B (out, r): the transposes of our A (in, r) and B (r, out).
A module's pair has the keys base_model.model.<module>.lora_A.weight and lora_B.weight. A config
that asks for anything we would compute wrongly is refused by name, and so is a key that we do not
know.
"""
import functools
import hashlib
import math
import os
import re
import warnings
import zipfile
from pathlib import Path

import torch

from formats import adapter_config
from support.files import read_json, restored

WEIGHTS, FACTS = "adapter_model", "pissa.json"               # WEIGHTS.safetensors or .bin
LORA = {"method": "lora", "bits": 16, "subtracted": False, "own_pair": False}

# The keys of adapter_config.json whose meaning is computed here, and those that may say anything.
# Any other key is refused, unless its value is null, false or empty.
COMPUTED = ("peft_type", "target_modules", "exclude_modules", "layers_to_transform",
            "layers_pattern", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
            "bias", "init_lora_weights")
IGNORED = {
    "names and notes": ("task_type", "inference_mode", "base_model_name_or_path", "revision",
                        "auto_mapping", "peft_version"),
    "A and B are in the file, however they began": (
        "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
    "not used in evaluation": ("lora_dropout",),
    "used only with a key that is refused": ("qalora_group_size", "megatron_core"),
    "ours, of before pissa.json; see old_facts": ("pissa",)}
KNOWN = {*COMPUTED, *(key for keys in IGNORED.values() for key in keys)}
# The keys that we write. Another tool writes more.
WRITTEN = {"peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
           "lora_dropout", "bias", "inference_mode", "target_modules", "init_lora_weights"}
# What to do with an adapter that trained more than its LoRA.
MERGE = ("an adapter here is a LoRA alone: put it into the base with PEFT (merge_and_unload, "
         "save_pretrained)")
# Those that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga) change it.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


# --------------------------------------------------------------------------------------- the config

def read_config(directory):
    """The dict of adapter_config.json. FileNotFoundError or ValueError names the file."""
    path = adapter_config(directory)
    config = {"r": 8, **read_json(path)}                               # as PEFT has it
    wrong = [f"{key} is {config.get(key)!r:.60}" for key, right in (
        ("peft_type", config.get("peft_type") == "LORA"), ("r", is_rank(config["r"])),
        ("lora_alpha", is_number(config.get("lora_alpha"))),
        ("target_modules", is_names(config.get("target_modules")) and config["target_modules"]),
        ("exclude_modules", is_names(config.get("exclude_modules") or [])),
        ("rank_pattern", is_pattern(config.get("rank_pattern"), is_rank)),
        ("alpha_pattern", is_pattern(config.get("alpha_pattern"), is_number))) if not right]
    if wrong:
        raise ValueError(f"{path}: not the config of a LoRA adapter ({', '.join(wrong)})")
    init = config.get("init_lora_weights")
    if init not in BEGINNINGS and str(init).lower() not in BEGINNINGS:
        raise ValueError(f"{path}: init_lora_weights={init!r:.60} needs the changed base it was "
                         "made with; save it from PEFT with "
                         "path_initial_model_for_weight_conversion")
    other = [k for k, v in config.items()
             if not (k in KNOWN or v is None or v is False or v in ("", [], {}))]
    if config.get("bias") not in (None, "none", "lora_only", "all"):
        other.append(f"bias={config['bias']!r:.60}")
    if config.get("modules_to_save"):
        raise ValueError(f"{path}: modules_to_save={config['modules_to_save']!r:.60} trained whole "
                         f"matrices; {MERGE}")
    if other:
        raise ValueError(f"{path}: {', '.join(other)} is not supported")
    return config


def is_rank(value):
    return type(value) is int and 0 < value < 2**31


def is_number(value):
    return type(value) in (int, float) and abs(value) < 1e30


def is_names(value):
    """True for a list of names, or a regular expression."""
    try:
        return all(type(n) is str for n in value) and (type(value) is list or bool(
            re.compile(value)))
    except (TypeError, re.error, RecursionError, OverflowError):
        return False


def is_pattern(patterns, is_right):
    """True for None, or a dict of good values under regular expressions."""
    try:
        return all(re.compile(k) and is_right(v) for k, v in (patterns or {}).items())
    except (AttributeError, re.error, RecursionError, OverflowError):
        return False


def rank_and_scale(config, name):
    """The rank of a module and the factor of its A B, as PEFT finds them."""
    def of(patterns, default):
        return next((v for k, v in (patterns or {}).items()
                     if re.match(rf"(.*\.)?({k})$", name)), default)

    r = of(config.get("rank_pattern"), config["r"])
    alpha = of(config.get("alpha_pattern"), config["lora_alpha"])
    return r, alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def is_named(names, module):
    """True if a list of names or their endings, or a regular expression, means the module."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def is_adapted(config, module):
    """True if PEFT, told this config, adapts the module."""
    targets, only = config["target_modules"], config.get("layers_to_transform")
    if is_named(config.get("exclude_modules"), module) or not is_named(targets, module):
        return False
    if only in (None, []) or isinstance(targets, str) or module in targets:
        return True
    index = re.search(r"\.(\d+)\.", module)
    return index is not None and int(index[1]) in (only if isinstance(only, list) else [only])


def config_json(pairs, task_type, every=None):
    """The dict of adapter_config.json for {module: (A (in, r), B (r, out))}, with scaling 1.

    every: the names of all modules of the network, if they are known.
    """
    ranks = {n: A.shape[1] for n, (A, _) in pairs.items()}
    r = max(ranks.values())
    config = {"peft_type": "LORA", "task_type": task_type, "r": r, "lora_alpha": r,
              "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
              "target_modules": targets_of(pairs, every)}
    if other := {"^" + re.escape(n): k for n, k in ranks.items() if k != r}:
        config |= {"rank_pattern": other, "alpha_pattern": other}
    return config


def targets_of(adapted, every=None):
    """target_modules by which PEFT adapts exactly these modules: their leaf names if no other
    module has one of them, else whole names, else a regular expression."""
    others = [n.split(".") for n in set(every or ()) - set(adapted)]
    endings = {".".join(parts[i:]) for parts in others for i in range(len(parts))}
    leaves = {n.rpartition(".")[2] for n in adapted}
    for names in ([leaves] if every else []) + [set(adapted)]:
        if not names & endings:
            return sorted(names)
    return "|".join(map(re.escape, sorted(adapted)))


# ------------------------------------------------------------------------------ names of modules

def unwrapped(net):
    """The network inside torch.compile and data parallelism."""
    while (inner := getattr(net, "_orig_mod", None)) or isinstance(
            net, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        net = inner or net.module
    return net


def plain(name):
    """A module's name without what torch.compile, recomputation and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in (
        "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))


# ---------------------------------------------------------------------------------------- the facts

def read_facts(directory):
    """The facts of a saved adapter, see adapter.py; of one that is not ours, those of a LoRA."""
    directory = restored(directory)
    config, path = read_config(directory), directory / FACTS
    if not path.is_file():
        return old_facts(config, directory) or {**LORA, "rank": config["r"]}
    found = read_json(path)
    try:
        bits, r = found["bits"], found["rank"] * (1 + found["subtracted"])
        if (bits not in (16, 8, 4) or {found["subtracted"], found["own_pair"]} - {True, False}
                or type(r) is not int or not isinstance(found["weights"], str)
                or bits == 4 and not {"double_quant", "codes"} <= set(found)
                or bits == 8 and "codes" not in found):
            raise ValueError(f"{found}"[:200])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: damaged, or of a newer version ({e!r})") from None
    file = file_of(directory, WEIGHTS)
    if file.is_file() and sha256(file) != found["weights"]:
        read_tensors(directory, WEIGHTS)                     # which tells if it is cut short
        size = file.stat().st_size
        if set(config) <= WRITTEN and size == found.get("bytes", size):
            raise ValueError(f"{file}: damaged, its checksum is not that in {FACTS}: copy it "
                             f"again. If it was changed on purpose, remove {FACTS}, and it is a "
                             "plain LoRA")
        warnings.warn(f"{directory}: another tool has rewritten the weights, so this is a plain "
                      "LoRA now", stacklevel=1)             # 1: said once, however often it is read
        return {**LORA, "rank": config["r"]}
    if not is_unscaled(config, r):
        raise ValueError(f"{directory}/adapter_config.json: r is {config['r']}, lora_alpha is "
                         f"{config['lora_alpha']}, but {FACTS} tells of {r}")
    return found


def is_unscaled(config, r):
    """True if the largest rank is r and A B is added as it is."""
    return (config["r"] == config["lora_alpha"] == r and not config.get("use_rslora")
            and (config.get("rank_pattern") or {}) == (config.get("alpha_pattern") or {}))


SUMS = "weights", "bytes", "extras"         # of pissa.json: what `checksums` makes


def checksums(weights, extras):
    """The SHA-256 of two files, and the size of the first one: a part of pissa.json."""
    return {"weights": sha256(weights), "bytes": weights.stat().st_size, "extras": sha256(extras)}


def check_extras(directory, name, found, pairs, extras):
    """ValueError if the tensors of NAME.safetensors do not fit the pairs, or are damaged."""
    for module, (A, B) in pairs.items():
        r = A.shape[1] // 2
        if found["subtracted"] and A.shape[1] % 2:
            raise ValueError(f"{directory}: {module} has an odd rank, so it holds no A_0 and B_0")
        if found["own_pair"] and [getattr(extras.get(f"{module}.{k}_q"), "shape", 0) for k in "AB"
                                  ] != [(A.shape[0], r), (r, B.shape[1])]:
            raise ValueError(f"{directory}: A_q and B_q of {module} are missing, or have another "
                             "shape")
    check_finite(extras.items(), directory)
    if "extras" in found and sha256(file := file_of(directory, name)) != found["extras"]:
        raise ValueError(f"{file}: damaged, its checksum is not that in {FACTS}: copy it again")


def sha256(path):
    """The SHA-256 of a file, in hex. Reading it again takes no time, if it has not changed."""
    info = os.stat(path)
    return _sha256(str(path), info.st_mtime_ns, info.st_size, info.st_ino)


@functools.cache
def _sha256(path, *version):
    h = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            h.update(block)
    return h.hexdigest()


# -------------------------------------------------------------------------------------- the tensors

def find_pairs(directory, config):
    """({module: (lora_A (r, in), lora_B (out, r))} as they are in the file, {name: parameter of the
    base} of those that are there, too). No number is read. Raises as read_config, naming the file.

    PEFT copies lm_head if it is adapted, embeddings if their size has changed, biases on demand.
    """
    pairs, bases = {}, {}
    for key, M in read_tensors(directory, WEIGHTS).items():
        key = plain(key)                                     # as from a network that was compiled
        key = key.removeprefix("base_model.model.").replace(".default.", ".")
        name, _, kind = key.rpartition(".lora_")
        if not name and key.endswith(("lm_head.weight", "embed_tokens.weight", ".bias",
                                      "lm_head.base_layer.weight")):
            bases[key.replace(".base_layer.", ".")] = M
        elif kind not in ("A.weight", "B.weight"):
            raise ValueError(f"{directory}: {key} is not a LoRA matrix of a linear layer")
        elif pairs.setdefault(name, {}).setdefault(kind[0], M) is not M:
            raise ValueError(f"{directory}: {key} is there twice")
    if not pairs:
        raise ValueError(f"{directory}: there is no LoRA matrix in it")
    for name, p in pairs.items():
        if len(p) < 2 or not (p["A"].ndim == p["B"].ndim == 2 and p["A"].shape[0]
                              == p["B"].shape[1] > 0 < p["A"].numel() * p["B"].numel()):
            raise ValueError(f"{directory}: lora_A and lora_B of {name} do not belong together")
        if not is_adapted(config, name):
            raise ValueError(f"{directory}: {name} has a LoRA, but adapter_config.json "
                             "(target_modules and the like) does not name it, so that PEFT would "
                             "leave it out")
        if (r := rank_and_scale(config, name)[0]) != p["A"].shape[0]:
            raise ValueError(f"{directory}: {name} has rank {p['A'].shape[0]}, but rank {r} in "
                             "adapter_config.json")
    return {n: (p["A"], p["B"]) for n, p in pairs.items()}, bases


def read_pairs(directory, config):
    """({module: (A (in, r), B (r, out))} float32, the scaling folded into B; the parameters of the
    base that are in the file). Raises as `find_pairs`, and for NaN or Inf."""
    found, bases = find_pairs(directory, config)
    pairs = {n: (A.float().T, B.float().T * rank_and_scale(config, n)[1])
             for n, (A, B) in found.items()}
    check_finite(((n, M) for n, pair in pairs.items() for M in pair), directory)
    return pairs, bases


def parameters(net, read):
    """A function from a parameter's plain name to it, or None. read(module, leaf): one that `net`
    has on the meta device."""
    params = {plain(n): p for n, p in net.named_parameters(remove_duplicate=False)}
    return lambda name: (read(*name.rsplit(".", 1)) if read and name in params
                         and params[name].is_meta else params.get(name))


def same_base(a, b):
    """True if all entries are equal up to the rounding of another dtype."""
    a, b = a.float(), b.to(a.device).float()
    return bool(((a - b).abs() <= a.abs() * 2**-8 + 2**-24).all())


def check_bases(directory, bases, read):
    """ValueError if one of `bases`, {name: parameter}, is not the base's: read(name), or None."""
    for name, theirs in bases.items():
        if (ours := read(name)) is None:
            raise ValueError(f"{directory}: the model has no {name}")
        if ours.shape != theirs.shape:                                  # tokens have been added
            raise ValueError(f"{directory}: {name} has {len(theirs)} rows, the model's has "
                             f"{len(ours)}; {MERGE}")
        if not all(map(same_base, ours.split(4096), theirs.split(4096))):
            raise ValueError(f"{directory}: {name} is not the model's: it was trained, too, or on "
                             f"another base; {MERGE}")


def check_finite(tensors, where):
    """ValueError that names the first of [(name, tensor)] that holds NaN or Inf."""
    for name, M in tensors:
        if not (M.sum().isfinite() or M.isfinite().all()):          # a sum is ten times cheaper
            raise ValueError(f"{where}: {name} holds NaN or Inf")


def tensors_of(pairs):
    """The tensors of adapter_model.safetensors for {module: (A, B)}."""
    return {f"base_model.model.{n}.lora_{k}.weight": M.T.contiguous()
            for n, pair in pairs.items() for k, M in zip("AB", pair, strict=True)}


def file_of(directory, name):
    """The path of NAME.safetensors, or of NAME.bin if the former is not there."""
    path = Path(directory) / f"{name}.safetensors"
    return path if path.exists() else path.with_suffix(".bin")


def read_tensors(directory, name):
    """The tensors of NAME.safetensors or NAME.bin. They are mapped into memory: what is not used
    takes none. ValueError for anything but tensors of floats."""
    path = file_of(directory, name)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True,
                               mmap=zipfile.is_zipfile(path))      # files of old cannot be mapped
    except ImportError:
        raise ValueError(f"{path} needs the safetensors package: pip install safetensors") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory}: {name}.safetensors is missing") from None
    except Exception as e:        # both readers raise many kinds for a damaged file
        reason = str(e).strip().partition("\n")[0][:100]
        raise ValueError(f"{path}: not readable, perhaps truncated ({reason})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path}: a dict of names and tensors is expected")
    for key, M in found.items():
        if not (type(M) in (torch.Tensor, torch.nn.Parameter) and M.layout == torch.strided
                and M.device.type == "cpu" and M.is_floating_point() and M.element_size() > 1):
            what = getattr(M, "dtype", type(M).__name__)
            raise ValueError(f"{path}: {key:.200} should be a matrix of floats of 16 bits or more, "
                             f"not {str(what).removeprefix('torch.')}")
    if sum(M.nbytes for M in found.values()) > path.stat().st_size:
        raise ValueError(f"{path}: its tensors are larger than the file")
    return found


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
        if (not is_unscaled(config, config["r"]) or not isinstance(info["rank"], int)
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
