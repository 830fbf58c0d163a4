"""Programs that a model wrote: cleaning a response as the PiSSA authors do, and running it.

A program runs in a process of its own (child.py), in an empty directory that is removed after it,
with limits of time and memory. That guards against accidents: endless loops, a full disk, a removed
file. It is no sandbox. Run programs of a model that you do not trust in a container or a virtual
machine. On Windows only the time is limited, and files outside are refused.
"""
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SECONDS, MEMORY, FILE = 5, 2**30, 16 * 2**20       # of computing; bytes in all; bytes a file
FENCE = "```python"


def clean(response):
    """The program in a response (str), as utils/code_process.py of the PiSSA authors cuts it.

    What stands in the first block marked python, if there is one. Of this what precedes a line that
    runs the program: `if __name__ == "__main__":`, "# Example usage", and any "assert".
    """
    text = response.replace("\r", "")
    if FENCE in text:
        text = text[text.index(FENCE):].strip().replace(FENCE, "")
        text = text[:text.index("\n```")].strip() if "\n```" in text else text
    for mark in 'if __name__ == "__main__":', "# Example usage", "assert":
        text = text[:text.index(mark)].strip() if mark in text else text
    return text


def complete(response):
    """True if what follows in the response cannot change `clean`: the block has ended."""
    _, fence, program = response.replace("\r", "").partition(FENCE)
    return bool(fence) and "\n```\n" in program


def run(program, tests, seconds=SECONDS):
    """None if a program and then its tests (str, Python) run to the end, else why not (str).

    seconds: of computing, rounded up, and three times as many by the clock.
    """
    word = secrets.token_hex(16)
    job = {"program": program, "tests": tests, "word": word,
           "limits": {"memory": MEMORY, "seconds": math.ceil(seconds), "size": FILE}}
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as said, \
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as there:
        asked.write(json.dumps(job).encode())
        asked.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", str(Path(__file__).with_name("child.py"))], stdin=asked,
            stdout=said, stderr=subprocess.DEVNULL, cwd=there, start_new_session=True,
            env={**os.environ, "TMPDIR": there, "OPENBLAS_NUM_THREADS": "1"})
        try:
            code = child.wait(3 * seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(child)
        said.seek(0)
        line = said.read(1000).decode("utf-8", "replace")
    if line == word and code == 0:
        return None
    if code is None or code == -getattr(signal, "SIGKILL", 9) or code == -getattr(
            signal, "SIGXCPU", 24):
        return "out of time"
    return line or f"ended before its tests (exit status {code})"


def end(child):
    """Kill a child and whatever it has started."""
    with suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    child.wait()
