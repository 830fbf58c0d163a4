"""Files and directories that are complete or absent, locks, JSON. Imports nothing of ours.

What is written stands aside as `.writing-NAME` until it is complete and on the disk. Then it takes
its place. A kill at any moment leaves the old or the new, never a mixture.
"""
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:                                            # Windows: it works without locks
    fcntl = None


def sync(*paths):
    """Return when files and directories are on the disk."""
    for path in paths if fcntl else ():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


@contextmanager
def named(path, tmp=None):
    """An OSError inside, such as a full disk, names `path`, instead of tmp or of no file."""
    tmp = tmp or path
    try:
        yield
    except OSError as e:
        if e.errno is None:
            raise OSError(str(e).replace(str(tmp), str(path))) from None
        e.filename = str(e.filename or path).replace(str(tmp), str(path))
        raise


@contextmanager
def written(path):
    """`with written(path) as tmp:` write to tmp. It becomes `path` only if nothing went wrong."""
    path = Path(os.path.realpath(path))
    tmp = path.with_name(f".writing-{path.name}")
    try:
        with named(path, tmp):
            yield tmp
            sync(tmp)
            os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, which appears when it is complete."""
    with written(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


@contextmanager
def replaced(directory, patterns=("*",)):
    """`with replaced(directory) as tmp:` write files to tmp, which then becomes `directory`.

    Files that were there and match none of `patterns` are copied over. The swap is two renames:
    directory -> .NAME.old, tmp -> directory. If a kill falls between them, `restored` undoes the
    first one. OSError if another process writes there. A directory that is aside is yielded itself.
    """
    directory = restored(os.path.realpath(directory))
    if directory.name.startswith(".writing-"):
        return (yield directory)
    tmp, old = directory.with_name(f".writing-{directory.name}"), aside(directory)
    tmp.mkdir(parents=True, exist_ok=True)
    mine = lock(tmp)
    try:
        empty(tmp)                                             # of what a killed process left
        with named(directory, tmp):
            yield tmp
        for file in (p for p in tmp.rglob("*") if p.is_file()):
            file.chmod(tmp.stat().st_mode & 0o666)             # some writers ignore the umask
        for file in directory.iterdir() if directory.is_dir() else ():
            if not any(map(file.match, patterns)) and not (tmp / file.name).exists():
                (shutil.copytree if file.is_dir() else shutil.copy2)(file, tmp / file.name)
        sync(*tmp.rglob("*"), tmp)
        shutil.rmtree(old, ignore_errors=True)
        while tmp.exists():
            if directory.exists():
                os.rename(directory, old)
            try:
                os.rename(tmp, directory)
            except OSError:
                if not directory.exists():                     # else a reader has just restored it
                    raise
        sync(directory.parent)
    finally:
        for path in (tmp, old) if directory.exists() else (tmp,):
            shutil.rmtree(path, ignore_errors=True)
        os.close(mine)


def aside(directory):
    """Where a directory is between the two renames of `replaced`."""
    return directory.with_name(f".{directory.name}.old")


def restored(directory):
    """The Path of a directory. If a kill fell between the two renames, it is put back first."""
    directory = Path(directory)
    if directory.name and not directory.exists():
        with suppress(OSError):
            os.rename(aside(directory), directory)
    return directory


def empty(directory):
    """Remove everything in a directory."""
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def lock(path):
    """Lock a file or directory until the number that this returns is given to os.close. OSError if
    another process holds it. The kernel frees the lock when a process ends, however it ends."""
    fd = os.open(path if fcntl else os.devnull, os.O_RDONLY)
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:                       # of another kind: the file system has no locks
        if isinstance(e, BlockingIOError):
            os.close(fd)
            raise OSError(f"{path}: another process is at work there: wait for it, or write "
                          "elsewhere") from None
    return fd


def check_room(directory, size, what):
    """OSError if `size` bytes have no room where `directory` is or will be."""
    there = next(d for d in (Path(directory), *Path(directory).absolute().parents) if d.exists())
    if (free := shutil.disk_usage(there).free) < size:
        raise OSError(f"{directory}: {what} takes {size / 1e9:.2g} GB, {free / 1e9:.2g} GB are "
                      "free")


def read_json(path):
    """The object in a JSON file. ValueError or FileNotFoundError names the file."""
    try:
        value = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (ValueError, RecursionError) as e:               # not JSON, not UTF-8, or nested deeply
        raise ValueError(f"{path}: not JSON ({str(e)[:100]})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value
