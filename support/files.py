"""placeholder: MODEL's version replaces this."""
import os
from contextlib import contextmanager


@contextmanager
def written(path):
    """`with written(path) as tmp:` write to tmp; it becomes `path` only if nothing went wrong."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
