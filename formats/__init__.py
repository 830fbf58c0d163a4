"""Checkpoints on disk: where they are (here), and a file for each layout and kind of tokenizer."""
import shlex
from pathlib import Path

from support.files import restored

# What the weights and numbers of a checkpoint may be called, in Meta's and Hugging Face's layout.
CHECKPOINT_FILES = ("params.json", "consolidated.[0-9][0-9].pth", "config.json",
                    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
                    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


# What a directory that is no checkpoint may hold, and what to do then.
INSTEAD = {
    "original/consolidated.00.pth": "Meta's files are in {0}/original: name that directory",
    "checkpoint/config.json": "the run's checkpoint is {0}/checkpoint: name that directory",
    "checkpoint/params.json": "the run's checkpoint is {0}/checkpoint: name that directory",
    "adapter/adapter_config.json": "a run's adapter is {0}/adapter, and args.json names its base",
    "adapter_config.json": "this is an adapter: name its base as the checkpoint",
    "snapshots/*/*.json": "this is a cache of Hugging Face's: name the directory {1}",
    "consolidated.safetensors": "Mistral's own layout is not read: download config.json and "
                                "model*.safetensors, which stand beside it",
    "*.gguf": "make a checkpoint of it first: python convert.py gguf {1} OUT",
    "added_tokens.json": "these are a tokenizer's files: download the weights, too"}


def find(ckpt):
    """The directory of a checkpoint: `ckpt` itself, or checkpoints/ckpt in this repository."""
    here = Path(__file__).parent.parent
    found = [d for d in (Path(ckpt), here / "checkpoints" / ckpt, here / ckpt)
             if restored(d).is_dir()]
    for directory in found:
        if any(next(directory.glob(pattern), None) for pattern in CHECKPOINT_FILES):
            return directory
    holds = ("it should hold params.json, consolidated.00.pth (.01 ... if there are more) and "
             "tokenizer.model, or config.json, model.safetensors and tokenizer.json")
    if str(ckpt).endswith(".gguf") and Path(ckpt).is_file():
        holds = INSTEAD["*.gguf"].format("", shlex.quote(str(ckpt)))
    if not found:
        raise FileNotFoundError(f"no checkpoint {ckpt}: neither {ckpt} nor checkpoints/{ckpt} is a "
                                f"directory; {holds}")
    for pattern, hint in INSTEAD.items():
        if path := next(iter(sorted(found[0].glob(pattern))), None):
            name = path if pattern.endswith("gguf") else path.parent
            holds = hint.format(found[0], shlex.quote(str(name)))
            break
    raise FileNotFoundError(f"{found[0]} is no checkpoint: {holds}")
