"""Files that are complete or absent: an interruption leaves what was there before."""
import functools
import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

# What the weights and numbers of a checkpoint may be called, in Meta's and Hugging Face's layout.
CHECKPOINT_FILES = ("params.json", "consolidated.[0-9][0-9].pth", "config.json",
                    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
                    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")


@contextmanager
def written(path):
    """`with written(path) as tmp:` write to tmp. It becomes `path` only if nothing went wrong."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextmanager
def replaced(directory, patterns=CHECKPOINT_FILES):
    """`with replaced(directory) as tmp:` write files to tmp. They move to `directory` in the end.

    If writing is interrupted, `directory` is as it was before. Otherwise, the files there that are
    not among the new ones and whose names match `patterns` are deleted: they belong to another
    checkpoint. Files that match nothing stay.
    """
    directory = Path(directory)
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
    try:
        yield tmp
        names = {file.name for file in tmp.iterdir()}
        stale = {file for pattern in patterns for file in directory.glob(pattern)}
        for name in names:
            os.replace(tmp / name, directory / name)
        for file in stale:
            if file.name not in names and file.is_file():
                file.unlink()
        new = False
    finally:
        shutil.rmtree(tmp)
        if new and not any(directory.iterdir()):          # nothing was written: leave no directory
            directory.rmdir()


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
