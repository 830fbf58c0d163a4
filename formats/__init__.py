"""Checkpoints on disk: where they are (here), and a file for each layout and kind of tokenizer."""
from pathlib import Path

from support.files import restored

# What the weights and numbers of a checkpoint may be called, in Meta's and Hugging Face's layout.
CHECKPOINT_FILES = ("params.json", "consolidated.[0-9][0-9].pth", "config.json",
                    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
                    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


def find(ckpt):
    """The directory of a checkpoint: `ckpt` itself, or checkpoints/ckpt in this repository."""
    here = Path(__file__).parent.parent
    for directory in (Path(ckpt), here / "checkpoints" / ckpt, here / ckpt):
        if restored(directory).is_dir():
            return directory
    raise FileNotFoundError(
        f"no checkpoint {ckpt}: neither {ckpt} nor checkpoints/{ckpt} is a directory; it should "
        "hold params.json, consolidated.00.pth (.01 ... if there are more) and tokenizer.model, or "
        "config.json, model.safetensors and tokenizer.json")
