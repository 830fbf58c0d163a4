"""support/files.py: complete or absent, whatever happens and whenever."""
import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT
from support import files


def put(directory, text, name="a", **options):
    with files.replaced(directory, **options) as tmp:
        (tmp / name).write_text(text)


def contents(directory):
    return {p.name: p.read_text() for p in directory.iterdir()}


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    there = tmp_path / "d"
    put(there, "1")
    put(there, "2", "b")
    assert contents(there) == {"b": "2"} and os.listdir(tmp_path) == ["d"]


def test_files_of_others_stay(tmp_path):
    there = tmp_path / "d"
    put(there, "1")
    (there / "README.md").write_text("mine")
    (there / "notes").mkdir()
    put(there, "2", "b", patterns=("a", "b"))
    assert {p.name for p in there.iterdir()} == {"b", "README.md", "notes"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_leaves_what_was_there(tmp_path, error):
    there = tmp_path / "d"
    for before in ({}, {"a": "1"}):
        with pytest.raises(error), files.replaced(there) as tmp:
            (tmp / "a").write_text("half")
            raise error
        assert (contents(there) if before else there.exists() or {}) == before
        put(there, "1")
    assert os.listdir(tmp_path) == ["d"]


def test_file_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with files.replaced(tmp_path / "d") as tmp:
            (tmp / "a").touch(0o600)                           # as safetensors does
        files.write_text(tmp_path / "f", "1")
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (tmp_path / "d", tmp_path / "d" / "a",
                                               tmp_path / "f")] == [0o750, 0o640, 0o640]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    put(tmp_path / "link", "1")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"a": "1"}


KILLED = """
import os, signal, sys
from support import files
real, calls = os.rename, []
def rename(a, b):
    if len(calls) == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1); real(a, b)
os.rename = rename
with files.replaced(sys.argv[1]) as tmp:
    for name in "ab":
        (tmp / name).write_text("2")
        if sys.argv[2] == "-1": os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", [-1, 0, 1])
def test_killed_while_writing_and_between_the_renames(tmp_path, moment):
    """-1: half written; 0: before the first rename; 1: between the two. The old one is read."""
    there = tmp_path / "d"
    with files.replaced(there) as tmp:
        for name in "ab":
            (tmp / name).write_text("1")
    done = subprocess.run([sys.executable, "-c", KILLED, there, str(moment)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert there.exists() == (moment < 1)
    assert contents(files.restored(there)) == {"a": "1", "b": "1"}
    put(there, "3")
    assert contents(there) == {"a": "3"} and os.listdir(tmp_path) == ["d"]


def test_a_lock_is_held_and_freed_by_a_kill(tmp_path):
    code = ("import sys, time; from support import files; files.lock(sys.argv[1]); "
            "print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(OSError, match="another process is at work there"):
        files.lock(tmp_path)
    other.kill()
    other.wait()
    os.close(files.lock(tmp_path))


def test_two_writers_of_one_directory(tmp_path):
    with files.replaced(tmp_path / "d") as tmp:
        (tmp / "a").write_text("1")
        with pytest.raises(OSError, match="another process"):
            put(tmp_path / "d", "2")
    assert contents(tmp_path / "d") == {"a": "1"}
