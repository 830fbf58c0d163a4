"""Checkpoints on disk: where they are (here), and a file for each layout and kind of tokenizer."""
from pathlib import Path


def find(ckpt):
    """The directory of a checkpoint: `ckpt` itself, or checkpoints/ckpt in this repository."""
    here = Path(__file__).parent.parent
    for directory in (Path(ckpt), here / "checkpoints" / ckpt, here / ckpt):
        if directory.is_dir():
            return directory
    raise FileNotFoundError(
        f"no checkpoint {ckpt}: neither {ckpt} nor checkpoints/{ckpt} is a directory; it should "
        "hold params.json, consolidated.00.pth (.01 ... if there are more) and tokenizer.model, or "
        "config.json, model.safetensors and tokenizer.json")
