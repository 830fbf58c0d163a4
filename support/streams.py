"""stdout and stderr that no reader can stop: closed, without a terminal, or of few characters.

Imports nothing that takes time: a program says that it loads torch before it does.
"""
import os
import sys
from contextlib import suppress


def guard():
    """Put such streams in the place of sys.stdout and sys.stderr, unless they are there."""
    if isinstance(sys.stderr, OpenEnded):
        return
    for stream in (sys.stdout, sys.stderr):           # a terminal of few characters: café, caf\xe9
        if hasattr(stream, "reconfigure"):                      # line by line: both in one file, in
            stream.reconfigure(errors="backslashreplace", line_buffering=True)       # their order
    Errors = OpenEnded if sys.stderr.isatty() else Lines
    sys.stdout, sys.stderr = OpenEnded(sys.stdout), Errors(sys.stderr)


class OpenEnded:
    """A stream whose reader may go away: a closed terminal, a full disk. Text is lost then."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except (OSError, ValueError):
            self.forget()
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self.forget()

    def forget(self):
        """Write to nowhere from now on, what is still in a buffer included."""
        nowhere = open(os.devnull, "w", errors="replace")
        with suppress(OSError, ValueError):
            os.dup2(nowhere.fileno(), self.stream.fileno())
        self.stream = nowhere


UP = "\x1b[A"                                         # what tqdm writes between nested bars


class Lines(OpenEnded):
    """A stderr that is no terminal: each state of a bar is a line of its own."""
    of_bar = False                                    # whether the last text was such a line

    def write(self, text):
        shown = text.replace(UP, "").strip("\r \n")
        bar = "\r" in text or UP in text
        if not shown and (bar or self.of_bar):                  # a bar removes itself, or ends
            return len(text)
        self.of_bar = bar
        return super().write(shown + "\n" if bar else text)
