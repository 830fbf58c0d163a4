"""Benchmarks: each ends in one JSON line, and `--out` keeps it (python -m bench.bench_svd)."""
import json
import platform
import shlex
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from support import streams

# For train.train by itself: a run that leaves no states.
NO_STATES = {"save_every": "never", "keep": 1, "resume": False, "max_hours": None,
             "val_every": None, "tensorboard": False}


def stamped(result, out=None):
    """The result and what is needed to repeat the measurement, as a JSON line; also in `out`."""
    import torch
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        f"{torch.get_num_threads()} threads of {platform.machine()}")
    words = [f"bench/results/{Path(w).name}" if w == out else w for w in sys.argv[1:]]
    command = f"python -m bench.{Path(sys.argv[0]).stem} {shlex.join(words)}"
    line = json.dumps({**result, "command": command, "commit": git.stdout.strip() or None,
                       "device": device, "torch": torch.__version__})
    if out:
        Path(out).write_text(line + "\n")
    return line


def report(result, out=None):
    """Print that line, and write it to `out`."""
    print(stamped(result, out))


def program(main, clock=True):
    """main(), as a command: a mistake ends it with one line, and a clock runs between results."""
    from support.report import run as as_program
    name = Path(sys.argv[0]).stem

    def timed():
        with ticking(name):
            main()

    as_program(timed if clock else main, f"bench.{name}")


class Above(streams.OpenEnded):
    """A stdout whose whole lines appear above the bars."""
    held = ""

    def write(self, text):
        from tqdm import tqdm
        self.held += text
        if text.endswith("\n"):
            line, self.held = self.held, ""
            with tqdm.external_write_mode(file=self.stream):
                super().write(line)
        return len(text)


@contextmanager
def ticking(name):
    """Show on stderr for how long the measurements have run: every second, in a log every 30."""
    from tqdm import tqdm
    ended, before = threading.Event(), sys.stdout
    sys.stdout = Above(before)
    every = 1 if sys.stderr.isatty() else 30
    with tqdm(desc=name, bar_format="{desc}: measuring for {elapsed}", leave=False,
              mininterval=every) as bar:
        def tick():
            while not ended.wait(1):
                with bar.get_lock():
                    bar.update()
        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            sys.stdout = before
