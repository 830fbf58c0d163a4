"""Benchmarks: each ends in one JSON line, and `--out` keeps it (python -m bench.bench_svd)."""
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

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
