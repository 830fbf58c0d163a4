"""The child of programs.py: runs one program within limits, and says whether it came to its end.

It reads a JSON object from stdin: the program, its tests, and a word that it writes to stdout only
after the last test. A program that ends early, by sys.exit or os._exit too, leaves no such word.
It is started as `python -I -B child.py` and imports nothing of ours.

The kernel limits memory, seconds of computing and the size of a file. An audit hook ends the
program at once if it starts a process, opens a socket or writes outside its directory. The program
cannot catch that. This is a guard against accidents. It is no sandbox: a program that wants to get
out does. Windows has no `resource` module. There only the clock of programs.py and the hook remain.
"""
import json
import os
import sys
import types
from contextlib import suppress

try:
    import resource
except ImportError:                                        # Windows
    resource = None

NO = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.startfile", "os.kill",
      "subprocess.", "pty.", "socket.", "ctypes.", "_posixsubprocess.", "resource.", "winreg.",
      "signal.pthread_kill")
PATHS = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
         "os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "os.removexattr",
         "shutil.", "sqlite3.connect", "dbm.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(memory, seconds, size):
    """No more than `memory` bytes, `seconds` of computing, and `size` bytes a file."""
    for name, most in (("AS", memory), ("CPU", seconds), ("FSIZE", size), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{name}")
        most = min([most, *(x for x in resource.getrlimit(number) if x >= 0)])
        with suppress(ValueError, OSError):                # macOS has no limit of memory
            resource.setrlimit(number, (most, most))


def guard(refuse):
    """Call refuse(what) if the program does what it must not do. Its own directory is the cwd."""
    here, null = os.path.realpath(os.getcwd()) + os.sep, os.path.realpath(os.devnull)
    real, fspath, Path = os.path.realpath, os.fspath, (str, bytes, os.PathLike)

    def outside(path):
        if not isinstance(path, Path):
            return False                                   # a descriptor, a mode, None
        path = real(os.fsdecode(fspath(path)))
        return path != null and not (path + os.sep).startswith(here)

    def hook(event, args):
        if event.startswith(NO):
            if (event, args) != ("ctypes.dlopen", (None,)):        # `import ctypes`
                refuse(event)
        elif event == "open":
            path, mode, flags = args
            writes = flags & WRITES if isinstance(flags, int) else set(mode or "") & set("wax+")
            if writes and outside(path):
                refuse(f"open {str(path)[:80]!r} to write")
        elif event.startswith(PATHS) and any(map(outside, args)) and args != (":memory:",):
            refuse(f"{event} outside its directory")

    try:                                     # below subprocess and multiprocessing: it has no event
        import _posixsubprocess
        _posixsubprocess.fork_exec = lambda *_: refuse("fork_exec")
    except ImportError:
        pass
    sys.addaudithook(hook)


def main():
    """Run what stdin holds, and say in one line how it ended."""
    job = json.loads(sys.stdin.buffer.read())
    say, leave = os.dup(1), os._exit
    write = os.write
    os.set_inheritable(say, False)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in 0, 1, 2:
        os.dup2(nowhere, stream)
    sys.stdin = open(os.devnull)

    def end(line):
        write(say, line[:300].encode("utf-8", "replace"))
        leave(0)

    program = sys.modules["program"] = types.ModuleType("program")
    if resource:
        limit(**job["limits"])
    guard(lambda what: end(f"refused: {what}"))
    try:
        for part in "program", "tests":           # apart: a quote left open cannot hide the tests
            exec(compile(job[part], f"<{part}>", "exec"), program.__dict__)
        line = job["word"]
    except BaseException as e:
        line = f"{type(e).__name__}: {str(e)[:200]}"
    end(line)


main()
