"""Checkpoints on disk: where they are (here), and a file for each layout and kind of tokenizer."""
import difflib
import os
import re
import shlex
from pathlib import Path

from support.files import read_json, restored

# What the weights and numbers of a checkpoint may be called, in Meta's and Hugging Face's layout.
CHECKPOINT_FILES = ("params.json", "consolidated.[0-9][0-9].pth", "consolidated.safetensors",
                    "config.json", "model.safetensors", "model-*-of-*.safetensors",
                    "model.safetensors.index.json",
                    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


# What a directory that is no checkpoint may hold, and what to do then.
INSTEAD = {
    "checkpoint/config.json": "the run's checkpoint is {0}/checkpoint: name that directory",
    "checkpoint/params.json": "the run's checkpoint is {0}/checkpoint: name that directory",
    "adapter/adapter_config.json": "a run's adapter is {0}/adapter, and args.json names its base",
    "adapter_config.json": "this is an adapter: name its base as the checkpoint",
    "snapshots/*/*.json": "this is a cache of Hugging Face's: name the directory {1}",
    "*.gguf": "make a checkpoint of it first: python convert.py gguf {1} OUT",
    "added_tokens.json": "these are a tokenizer's files: download the weights, too"}


def find(ckpt):
    """The directory of a checkpoint: `ckpt` itself, or checkpoints/ckpt in this repository, or, of
    owner/name, the snapshot in Hugging Face's cache. Meta's files of a download from there may be
    in `original/` alone."""
    here = Path(__file__).parent.parent
    found = [d for d in (Path(ckpt), here / "checkpoints" / ckpt, here / ckpt)
             if restored(d).is_dir()]
    for directory in (d for folder in found for d in (folder, folder / "original")):
        if any(next(directory.glob(pattern), None) for pattern in CHECKPOINT_FILES):
            return directory
    holds = ("it should hold params.json, consolidated.00.pth (.01 ... if there are more) and "
             "tokenizer.model, or config.json, model.safetensors and tokenizer.json")
    if Path(ckpt).is_file():
        raise FileNotFoundError(f"no checkpoint {ckpt}: it is a file; " + (
            INSTEAD["*.gguf"].format("", shlex.quote(str(ckpt))) if str(ckpt).endswith(".gguf") else
            "name the directory that it is in"))
    if not found:
        if cached := snapshot(str(ckpt)):
            return cached
        there = [d.name for d in (here / "checkpoints").glob("*")]
        close = difflib.get_close_matches(str(ckpt), there, 1) or [
            name for name in there if sorted(name) == sorted(str(ckpt))]
        raise FileNotFoundError(f"no checkpoint {ckpt}: neither {ckpt} nor checkpoints/{ckpt} is a "
                                f"directory; {f'perhaps {close[0]} is meant' if close else holds}")
    for pattern, hint in INSTEAD.items():
        if path := next(iter(sorted(found[0].glob(pattern))), None):
            name = path if pattern.endswith("gguf") else path.parent
            holds = hint.format(found[0], shlex.quote(str(name)))
            break
    raise FileNotFoundError(f"{found[0]} is no checkpoint: {holds}")


def adapter_config(directory):
    """The path of an adapter's adapter_config.json. FileNotFoundError if there is none."""
    path = restored(directory) / "adapter_config.json"
    if not path.is_file():
        inner = Path(directory) / "adapter"
        hint = f"; perhaps {inner} is meant" if (inner / path.name).is_file() else ""
        raise FileNotFoundError(f"{path} is missing: {directory} is not an adapter{hint}")
    return path


# ----------------------------------------------------------------------------- Hugging Face's cache

def cache():
    """Where Hugging Face's programs keep what they download."""
    env = os.environ
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
                ).expanduser()


def snapshot(name):
    """The directory of owner/name in Hugging Face's cache. None if the name is more like a path.
    FileNotFoundError with the command that downloads it, if it is not there as a whole."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return None
    folder, short = cache() / f"models--{name.replace('/', '--')}", name.rpartition("/")[2]
    main = folder / "refs" / "main"
    found = folder / "snapshots" / (main.read_text().strip() if main.is_file() else "none")
    if not found.is_dir():
        if any((d / name).parent.is_dir() for d in (Path(), Path(__file__).parent.parent)):
            return None
        raise FileNotFoundError(
            f"no checkpoint {name}: not here, nor in Hugging Face's cache ({cache()}); to download"
            f" it: hf download {name} --local-dir checkpoints/{short} (and then --ckpt {short})")
    if (found / "original" / "params.json").is_file() and not (found / "config.json").is_file():
        return found / "original"
    if missing := incomplete(found):
        raise FileNotFoundError(f"no checkpoint {name}: {found} is not complete, {missing} is "
                                f"missing; to complete it: hf download {name}")
    return found


def incomplete(directory):
    """The name of a file without which a snapshot is of no use; None if all are there."""
    if not (directory / "config.json").is_file():
        return "config.json"
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if (directory / single).is_file():
            break
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            files = weight_map.values() if isinstance(weight_map, dict) else ()
            missing = sorted(f for f in map(str, files) if not (directory / f).is_file())
            if missing:
                return missing[0]
            break
    else:
        return "model.safetensors"
    known = ("tokenizer.json", "tokenizer.model")
    return None if any((directory / n).is_file() for n in known) else "tokenizer.json"
