"""tasks/: prompts, rules and scores against the authors' and against reference solutions; programs
that misbehave; the command, its predictions and how it goes on."""
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from contextlib import redirect_stderr
from functools import partial

import pytest

import data
import eval as evaluation
import model
import tasks
from bench import bench_tasks, plot
from bench.bench_tasks import FILES
from conftest import SHARED, TINY, joined
from conftest import command as run_command
from conftest import failure as run_failure
from support import options
from tasks import commonsense, gsm8k, humaneval, math, mbpp, programs

command = partial(run_command, evaluation.main)
failure = partial(run_failure, "eval.py")

# A record of each kind, made for these tests, with a right response by each protocol.
HEAD = 'from typing import List\n\n\ndef double(x: int) -> int:\n    """ Twice x.\n    """\n'
TICKS = "```"
RECORDS = {
    "gsm8k": {"question": "Tom has 2 pens and buys 3. How many?", "answer": "2 + 3 = 5\n#### 5"},
    "math": {"problem": "What is $\\frac12$ of 3?", "answer": "\\frac{3}{2}", "level": 1,
             "solution": "It is $\\boxed{\\frac{3}{2}}.$", "unique_id": "test/a/1.json"},
    "humaneval": {"task_id": "HumanEval/0", "prompt": HEAD, "entry_point": "double",
                  "test": "def check(candidate):\n    assert candidate(2) == 4\n"},
    "mbpp": {"task_id": 11, "text": "Write a function to double a number.", "test_setup_code": "",
             "test_list": ["assert double(2) == 4 ", "assert double(0) == 0"]},
    **{name: {"instruction": f"Please choose: {' or '.join(names)}", "input": "",
              "output": f"the correct answer is {names[1]}", "answer": names[1]}
       for name, names in commonsense.NAMES.items()}}
RIGHT = {"gsm8k strict": "2 + 3 = 5\n#### 5", "gsm8k paper": "It is 5. The answer is: 5",
         "math strict": "So it is \\boxed{\\frac32}.",
         "math paper": "Half.\nThe answer is: \\frac{3}{2}",
         "humaneval paper": "\n    return 2 * x\n",
         "mbpp paper": f"\nHere it is:\n{TICKS}python\ndef double(x):\n    return 2 * x\n{TICKS}\n",
         **{f"{name} paper": f"the correct answer is {names[1]}"
            for name, names in commonsense.NAMES.items()}}
CASES = [(task, protocol) for task, known in options.TASKS.items() for protocol in known]
ALPACA = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n")


def of(task, protocol="paper", record=None):
    """The problem that a record becomes."""
    return tasks.PAGES[task].problem(record or RECORDS[task], "x.jsonl:1", task, protocol)


def right(task, problem, response):
    """What a page says of a response."""
    return tasks.PAGES[task].score(response, problem)["correct"]


def lines(path):
    """The records of a jsonl file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def real(task, *path, protocol="paper"):
    """[(record, problem)] of a real set; skips the test if it is not here."""
    if not (file := SHARED.joinpath(*path)).is_file():
        pytest.skip(f"{file} is not here")
    pairs = [(r, of(task, protocol, r)) for r in lines(file)]
    return [(r, p) for r, p in pairs if p]


# --- the pages

def test_every_page_is_whole():
    assert options.TASKS.keys() == tasks.PAGES.keys() == RECORDS.keys()
    assert set(options.COMMONSENSE) == commonsense.NAMES.keys()
    for task, page in tasks.PAGES.items():
        assert page.RULE.keys() == page.SHOWN.keys() == options.TASKS[task].keys()
        assert hasattr(page, "run") == (task in options.RUN_CODE)


@pytest.mark.parametrize("task, protocol, expected", [
    ("gsm8k", "strict", ALPACA + "### Instruction:\nTom has 2 pens and buys 3. How many?\n\n"
                                 "### Response:"),
    ("gsm8k", "paper", ALPACA + "### Instruction:\nTom has 2 pens and buys 3. How many?\n\n"
                                "### Response: Let's think step by step."),
    ("math", "strict", ALPACA + "### Instruction:\nWhat is $\\frac12$ of 3?\n\n### Response:"),
    ("math", "paper", ALPACA + "### Instruction:\nWhat is $\\frac12$ of 3?\n\n"
                               "### Response: Let's think step by step."),
    ("humaneval", "paper", ALPACA + "\n### Instruction:\nCreate a Python script for this problem:\n"
     'from typing import List\n\n\ndef double(x: int) -> int:\n\t""" Twice x.\n\t"""\n\n\n'
     "### Response:"),
    ("mbpp", "paper", ALPACA + "\n### Instruction:\nWrite a function to double a number. Your code "
     f"should satisfy the following assertion:\n{TICKS}python\nassert double(2) == 4\n{TICKS}\n\n"
     "### Response:"),
    ("boolq", "paper", ALPACA + "### Instruction:\nPlease choose: true or false\n\n### Response:")])
def test_prompt(task, protocol, expected):
    """The exact text; those of the PiSSA authors' test data for protocol paper."""
    assert of(task, protocol)["prompt"] == expected
    assert [t for t, p in CASES if p == "strict"] == ["gsm8k", "math"]


def test_an_input_follows_the_instruction():
    record = {**RECORDS["piqa"], "input": "Be brief."}
    assert "solution1 or solution2\nBe brief.\n\n### R" in of("piqa", record=record)["prompt"]


@pytest.mark.parametrize("task, protocol", CASES, ids=lambda x: x)
def test_score(task, protocol):
    """A right response counts, also if the model runs on; none, nonsense and another do not."""
    problem, good = of(task, protocol), RIGHT[f"{task} {protocol}"]
    assert right(task, problem, good)
    wrong = good.replace("5", "6").replace("3", "4").replace("2 *", "3 *")
    wrong = wrong.replace("2", "1").replace("false", "true")
    for response in ("", "I do not know.", wrong):
        assert not right(task, problem, response), response


@pytest.mark.parametrize("task, protocol", CASES, ids=lambda x: x)
def test_more_text_does_not_change_what_has_ended(task, protocol):
    """`ended` is right: whatever follows, the score stays."""
    page, problem = tasks.PAGES[task], of(task, protocol)
    pieces = [RIGHT[f"{task} {protocol}"], "\n", " ", "### Instruction:\n", "#### 7", "\\boxed{8}",
              f"{TICKS}\n", f"x\n{TICKS}\n", f"{TICKS}python\n", "answer1", "true", "assert ",
              "The answer is: 9", "def f(x):\n    return 3", "option2", "ending1", "solution1"]
    read = programs.clean if task in options.RUN_CODE else partial(page.score, problem=problem)
    rng, ended = random.Random(f"{task} {protocol}"), 0
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 6)))
        if page.ended(text, problem):
            ended += 1
            assert read(text) == read(text + "".join(rng.choices(pieces, k=3))), text
    assert ended > 20 or protocol == "paper" and task in ("gsm8k", "math")


# --- MATH

@pytest.mark.parametrize("a, b", [
    (r"\frac12", r"\frac{1}{2}"), (r"\dfrac{1}{2}", r"\tfrac12"), (r"\frac1{72}", r"\frac{1}{72}"),
    ("1/2", r"\frac{1}{2}"), ("-1/2", r"\frac{-1}{2}"), ("0.5", "1/2"), (".5", r"\frac12"),
    (r"\frac34i", r"\frac{3}{4}i"), (r"\frac ab", r"\frac{a}{b}"),
    (r"10\sqrt3", r"10 \sqrt{3}"), (r"\sqrt3 + \sqrt{4}", r"\sqrt{3}+\sqrt4"),
    (r"10\text{ units}", "10"), (r"5\text{ cm}^2", "5"), (r"\$10", "10"), (r"10\%", "10"),
    (r"90^\circ", "90"), (r"90^{\circ}", "90"), ("x = 5", "5"), ("k=7", "7"), ("x =5", "5"),
    (r"\left(x-2\right)\left(x+2\right)", "(x-2)(x+2)"), (r"\{1, 2\}", r"\{1,2\}"),
    (r"\left\{ 1,2 \right\}", r"\{1,2\}"), ("0.25", ".25"), ("(1, .5)", "(1,0.5)"),
    (r"x^{.5}", "x^{0.5}"), ("1,\\!000", "1,000"), ("a\nb", "ab"), (" 1  + 2 ", "1+2"),
    (r"\text{east}", r"\text{east}"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
                                       r"\begin{pmatrix}1\\2\end{pmatrix}")])
def test_answers_that_are_equal(a, b):
    """By Hendrycks' normalisation, each pair by its definition."""
    assert math.same(a, b) and math.same(b, a) and math.normal(a) == math.normal(b)


@pytest.mark.parametrize("a, b", [
    (r"\frac12", r"\frac{2}{1}"), ("2/4", "1/2"), ("0.50", "1/2"), ("0.5", "0.6"),
    (r"\frac{1}{2}x", r"\frac12"), (r"\sqrt3", "3"), (r"\sqrt{12}", r"\sqrt12"),
    (r"10\text{ units}", "100"), (r"10\text{cm}", "10"), ("10%", "10"), ("10, 4", "4, 10"),
    ("(1, 2)", "[1, 2]"), (r"\{1, 2\}", r"\{2, 1\}"), ("xy = 5", "5 "), ("long = 5", "5"),
    ("5x - 7y = 0", "0"), ("1000", "1,000"), (r"\text{east}", "east"), ("x+1", "1+x"),
    ("1e3", "1000"), ("", "0"), (r"90^\circ", "90."), ("x/2", r"\frac{x}{2}"), ("A", "a")])
def test_answers_that_differ(a, b):
    """The normalisation is of texts: no algebra, no order, no capitals."""
    assert not math.same(a, b) and not math.same(b, a)


@pytest.mark.parametrize("text", [r"\sqrt", r"1\frac", r"1\text{ a}\text{ b}", r"\frac1", "1/", "/",
                                  "=", "==", r"\frac{", "\\", "9" * 5000 + "/7", "²/3", "1/٣"])
def test_answers_that_cannot_be_read(text):
    """They equal themselves, and raise nothing."""
    for authors in True, False:
        assert math.same(text, text, authors) and not math.same(text, "1", authors)


def test_the_authors_equality():
    """Their copy compares a text with one slash as it stands, unless it is a fraction."""
    assert math.same("x/2 ", "x / 2") and not math.same("x/2 ", "x / 2", authors=True)
    assert math.same("1/2", r"\frac12", authors=True)


@pytest.mark.parametrize("text, expected", [
    (r"so $\boxed{5}$.", "5"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{1} \boxed{2}", "2"),
    (r"\boxed{\left\{1, \frac{a}{b}\right\}} }", r"\left\{1, \frac{a}{b}\right\}"),
    (r"\fbox{7}", "7"), (r"\boxed{1} \fbox{7}", "1"), (r"\boxed {3}", "3"), (r"\boxed{3", None),
    (r"\boxed3", None), ("3", None), ("", None), (r"\boxed{}", ""), (r"\boxed{1} \boxed{2", None)])
def test_boxed(text, expected):
    assert math.boxed(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("The answer is: 5", "5"), ("The answer is: 5.", "5"), ("The answer is: 5.\nMore.", "5"),
    ("The answer is: 5\nMore", "5\nMore"), ("The answer is: 1 The answer is: 2 .", "2"),
    ("The answer is 5", None), ("the answer is: 5", None), ("The answer is: .5.", ".5"),
    ("", None)])
def test_the_authors_answer(text, expected):
    """Between the last marker and a point that ends a line."""
    assert math.after_marker(text) == expected


def test_math_ends_at_another_instruction():
    """A model that misses its EOS asks and answers another question."""
    problem = of("math", "strict")
    assert right("math", problem, r"\boxed{3/2} ### Instruction: ? ### Response: \boxed{7}")
    assert not right("math", problem, r"? ### Instruction: ? ### Response: \boxed{3/2}")


def test_a_solution_has_the_answer():
    record = {k: v for k, v in RECORDS["math"].items() if k != "answer"}
    assert of("math", record=record)["reference"] == r"\frac{3}{2}"


def test_math_500():
    """Its answers are those of its solutions, which score 100 % by strict, by paper with their
    marker. The answers of other problems score 0, unless they are the same."""
    pairs = real("math", "math", "test.jsonl", protocol="strict")
    assert len(pairs) == 500
    paper = [{**p, "protocol": "paper"} for _, p in pairs]
    for i, (record, problem) in enumerate(pairs):
        where, answer = record["unique_id"], record["answer"]
        assert math.boxed(record["solution"]) == answer == problem["reference"], where
        assert right("math", problem, record["solution"]), where
        assert right("math", paper[i], f"So.\nThe answer is: {answer}"), where
        assert not right("math", paper[i], record["solution"]), where
        other = pairs[i - 1][1]["reference"]
        assert right("math", problem, rf"\boxed{{{other}}}") == (math.normal(other) ==
                                                                 math.normal(answer)), where


# --- GSM8K and common sense

@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_gsm8k(protocol):
    """The set's own answers score 100 %, others 0."""
    for record, problem in real("gsm8k", "gsm8k", "test.jsonl", protocol=protocol):
        answer = record["answer"].rpartition("#### ")[2]
        good = record["answer"] if protocol == "strict" else f"The answer is: {answer}"
        exact = protocol == "strict" or "," not in answer.partition(",")[2]
        assert right("gsm8k", problem, good) == exact, record
        assert not right("gsm8k", problem, good + "1"), record
        assert not right("gsm8k", problem, answer), record


@pytest.mark.parametrize("task", [name for name in commonsense.NAMES if name != "hellaswag"])
def test_common_sense(task):
    """Every output is right, and every other name is wrong; the first name counts."""
    pairs = real(task, "commonsense", f"{task}.jsonl")
    assert len(pairs) == 500
    for record, problem in pairs:
        assert right(task, problem, record["output"]), record
        others = [n for n in commonsense.NAMES[task] if n != record["answer"]]
        for name in others:
            assert not right(task, problem, f"the correct answer is {name}, {record['answer']}")
        assert right(task, problem, f"{record['answer']}, or {others[0]}")
        assert not right(task, problem, record["output"].upper())


# --- programs

@pytest.mark.parametrize("response, expected", [
    ("def f():\n    return 1", "def f():\n    return 1"), ("    return 1\n", "    return 1\n"),
    (f"Here:\n{TICKS}python\ndef f(): pass\n{TICKS}\nSo.", "def f(): pass"),
    (f"{TICKS}python\ndef f(): pass", "\ndef f(): pass"),
    (f"{TICKS}python\na = 1\n{TICKS}\n{TICKS}python\nb = 2\n{TICKS}", "a = 1"),
    (f"{TICKS}\ndef f(): pass\n{TICKS}", f"{TICKS}\ndef f(): pass\n{TICKS}"),
    ('a = 1\nif __name__ == "__main__":\n    b', "a = 1"), ("a = 1\n# Example usage:\nb", "a = 1"),
    ("a = 1\nassert a\n", "a = 1"), ("a = 1\r\nb = 2", "a = 1\nb = 2"),
    ('a = __name__ == "__main__"', 'a = __name__ == "__main__"')])
def test_cleaning(response, expected):
    """As the authors' code_process.py; of the last case theirs fails."""
    assert programs.clean(response) == expected


GOOD = "def f(x):\n    return x\n"
TEST = "assert f(1) == 1"
FORKS = "multiprocessing.get_context('spawn').Process(target=print).start()"


@pytest.mark.parametrize("program", [
    GOOD, GOOD + "print('x' * 10**6)", "import math, collections, itertools, re\n" + GOOD,
    "open('a', 'w').write('x')\nimport os\nos.mkdir('d')\nos.rename('a', 'd/a')\n" + GOOD,
    "import tempfile\ntempfile.TemporaryFile().write(b'x')\n" + GOOD,
    "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n" + GOOD,
    "import atexit, time\natexit.register(time.sleep, 60)\n" + GOOD,
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    a: int = 1\n" + GOOD,
    GOOD + 'if __name__ == "__main__":\n    raise SystemExit', "import ctypes, asyncio\n" + GOOD],
    ids=lambda p: p[:24])
def test_programs_that_are_right(program):
    begin = time.monotonic()
    assert programs.run(program, TEST) is None
    assert time.monotonic() - begin < 3 * programs.SECONDS / 2


@pytest.mark.parametrize("program, why", [
    ("def f(x):\n    return 2", "AssertionError"), ("def f(x)", "SyntaxError"), ("", "NameError"),
    ("while True: pass", "out of time"), ("import time\ntime.sleep(60)", "out of time"),
    ("while True: print('x' * 1000)", "out of time"),
    ("import signal\nsignal.signal(signal.SIGXCPU, lambda *_: 1 / 0)\nwhile True:\n    try:\n"
     "        while True: pass\n    except BaseException: pass", "out of time"),
    ("x = bytearray(2**32)\n" + GOOD, "MemoryError"), ("x = 'x' * 2**33\n" + GOOD, "MemoryError"),
    ("x = []\nwhile True: x.append(bytearray(2**26))", "MemoryError"),
    ("f = open('a', 'wb')\nwhile True: f.write(bytes(2**20))", "OSError"),
    ("def f(x): return f(x)", "RecursionError"),
    ("import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return max([x], key=f)", "exit status"),
    ("import sys\nsys.exit(0)", "SystemExit"), ("raise SystemExit(0)\n" + GOOD, "SystemExit"),
    ("import os\nos._exit(0)", "before its tests"), ("exit()", "SystemExit"),
    ("def f(x):\n    import os\n    os._exit(0)", "before its tests"), ("input()", "EOFError"),
    ('x = """', "SyntaxError"), ("x = (", "SyntaxError"),
    ("import os\nos.fork()\n" + GOOD, "refused: os.fork"),
    ("import os\nwhile True:\n    try: os.fork()\n    except BaseException: pass", "refused"),
    ("import os\ntry: os.fork()\nexcept BaseException: pass\n" + GOOD, "refused: os.fork"),
    ("import os\nos.system('true')\n" + GOOD, "refused: os.system"),
    ("import os\nos.execv('/bin/true', ['true'])\n" + GOOD, "refused: os.exec"),
    ("import os\nos.posix_spawn('/bin/true', ['true'], {})\n" + GOOD, "refused: os.posix_spawn"),
    ("import subprocess\ntry: subprocess.run('true')\nexcept BaseException: pass\n" + GOOD,
     "refused: subprocess"),
    (f"import multiprocessing\ntry: {FORKS}\nexcept BaseException: pass\n{GOOD}", "refused"),
    ("import os\nos.kill(os.getppid(), 9)", "refused: os.kill"),
    ("import socket\nsocket.socket()\n" + GOOD, "refused: socket"),
    ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "refused: socket"),
    ("import ctypes\nctypes.CDLL('libc.so.6')\n" + GOOD, "refused: ctypes"),
    ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "refused: resource"),
    ("import _io\n_io.open('OUTSIDE', 'w')\n" + GOOD, "refused: open"),
    ("try: open('OUTSIDE', 'a')\nexcept BaseException: pass\n" + GOOD, "refused: open"),
    ("import os\nos.chdir('/')\nos.chdir(os.path.dirname('OUTSIDE'))\nopen('kept', 'r+')",
     "refused: open"),
    ("import os\nos.open('OUTSIDE', os.O_CREAT | os.O_WRONLY)\n" + GOOD, "refused: open"),
    ("import os\nos.symlink(os.path.dirname('OUTSIDE'), 'd')\n" + GOOD, "refused: os.symlink"),
    *((f"import os, shutil, pathlib\n{call}\n{GOOD}", "refused") for call in (
        "os.remove('KEPT')", "os.unlink('KEPT')", "os.rename('KEPT', 'a')", "os.mkdir('OUTSIDE')",
        "os.truncate('KEPT', 0)", "os.chmod('KEPT', 0)", "os.replace('KEPT', 'a')",
        "os.link('KEPT', 'a')", "os.utime('KEPT')", "shutil.rmtree(os.path.dirname('KEPT'))",
        "shutil.move('KEPT', 'a')", "shutil.copyfile('KEPT', 'OUTSIDE')",
        "pathlib.Path('OUTSIDE').write_text('x')", "pathlib.Path('KEPT').unlink()",
        "import sqlite3; sqlite3.connect('OUTSIDE')"))], ids=lambda p: p[-44:].replace("\n", " "))
def test_programs_that_are_wrong(program, why, tmp_path, monkeypatch):
    """They are stopped, counted as wrong, and leave everything outside as it was."""
    (tmp_path / "kept").write_text("kept")
    program = program.replace("OUTSIDE", str(tmp_path / "new")).replace(
        "KEPT", str(tmp_path / "kept"))
    monkeypatch.setattr(programs, "MEMORY", 2**28)
    begin = time.monotonic()
    assert why in programs.run(program, TEST, seconds=0.4 if "time" in why else programs.SECONDS)
    assert time.monotonic() - begin < 3 * programs.SECONDS
    assert os.listdir(tmp_path) == ["kept"] and (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "kept").stat().st_mode & 0o600 == 0o600


def test_a_program_has_a_directory_of_its_own(tmp_path):
    """It is empty, and is removed, as are processes that a hook did not see."""
    say = f"raise Exception(repr((os.getcwd(), os.listdir())))\n{GOOD}"
    said = programs.run(f"import os\n{say}", TEST)
    cwd, there = re.search(r"\('(.+)', (\[.*\])\)", said).groups()
    assert there == "[]" and not os.path.exists(cwd) and cwd != os.getcwd()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups")
def test_what_a_program_has_started_ends_with_it():
    """Its group is killed: no process is left that could hold the pipe open."""
    read, write = os.pipe()
    starts = "import subprocess, sys; subprocess.Popen(['sleep', '99']); print(flush=True)"
    child = subprocess.Popen([sys.executable, "-c", f"{starts}; sys.stdin.read()"],
                             stdin=subprocess.PIPE, stdout=write, start_new_session=True)
    os.close(write)
    assert os.read(read, 9) == b"\n"                            # now both of them are there
    begin = time.monotonic()
    programs.end(child)
    assert os.read(read, 9) == b"" and time.monotonic() - begin < 9
    os.close(read), child.stdin.close()


def test_tests_cannot_be_hidden():
    """A program cannot swallow its tests, define check or leave early in another thread."""
    problem = of("humaneval")
    for response in ("    return 2 * x\ndef check(f): pass\ndef double(x): return 0",
                     "    return 0\n'''", "    return 0\nif False:", "    return 0\n\\"):
        assert not right("humaneval", problem, response), response


def all_pass(task, pairs, solution, but=()):
    """Reference solutions score 100 %, less `but`; those of the problem before 0 %."""
    for turn, expected in (0, True), (-1, False):
        found = {}
        for i, (_, problem) in enumerate(pairs):
            found[problem["id"]] = tasks.PAGES[task].score(solution(pairs[i + turn][0]), problem)
        other = {i: f["why"] for i, f in found.items() if f["correct"] != expected}
        assert set(other) == set(but if expected else ()), f"{len(other)} of {len(found)}: {other}"


def body(record):
    """A solution of HumanEval's that needs no head of its own."""
    return record["prompt"] + record["canonical_solution"]


def test_some_of_humaneval():
    pairs = real("humaneval", "humaneval", "HumanEval.jsonl")
    assert len(pairs) == 164
    all_pass("humaneval", pairs[::16], lambda r: r["canonical_solution"])


def test_some_of_mbpp():
    pairs = real("mbpp", "mbpp", "mbpp.jsonl")
    assert [p["id"] for _, p in pairs] == [*range(11, 511)]
    all_pass("mbpp", pairs[::50], lambda r: r["code"])


@pytest.mark.slow
def test_all_of_humaneval():
    """All 164, as the rest of the function and as a block with the whole of it. Of the latter, the
    authors' cleaning cuts one at the word "assert" in its docstring."""
    pairs = real("humaneval", "humaneval", "HumanEval.jsonl")
    all_pass("humaneval", pairs, lambda r: r["canonical_solution"])
    all_pass("humaneval", pairs, lambda r: f"So:\n{TICKS}python\n{body(r)}{TICKS}\nprint(1)",
             but=["HumanEval/149"])


@pytest.mark.slow
def test_all_of_mbpp():
    """All 500 of the test set."""
    all_pass("mbpp", real("mbpp", "mbpp", "mbpp.jsonl"), lambda r: r["code"])


# --- files of problems

def written(folder, *records):
    """A jsonl file; a str is a line as it is."""
    path = folder / "p.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.mark.parametrize("task", RECORDS)
def test_read(task, tmp_path):
    path = written(tmp_path, RECORDS[task], "", RECORDS[task])
    one, two = tasks.read(task, path, next(iter(options.TASKS[task])))
    assert one["prompt"] == two["prompt"] and {"id", "prompt"} <= one.keys()


@pytest.mark.parametrize("task", RECORDS)
def test_read_what_is_published(task, tmp_path):
    """HumanEval is a .gz, the sets of LLM-Adapters are JSON arrays, the hub has parquet."""
    expected = tasks.read(task, written(tmp_path, *[RECORDS[task]] * 3), "paper")
    (tmp_path / "p.json").write_text(json.dumps([RECORDS[task]] * 3, indent=1))
    for name in "p.json", "p.jsonl":
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert tasks.read(task, packed, "paper") == expected
    assert tasks.read(task, tmp_path / "p.json", "paper") == expected
    (tmp_path / "p.json").write_text(json.dumps([RECORDS[task], {"a": 1}]))
    with pytest.raises(ValueError, match="p.json: record 2: no field "):
        tasks.read(task, tmp_path / "p.json", "paper")


@pytest.mark.parametrize("task", RECORDS)
def test_read_parquet(task, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is missing")
    from pyarrow import Table
    parquet.write_table(Table.from_pylist([RECORDS[task]] * 3), tmp_path / "p.parquet")
    assert tasks.read(task, tmp_path / "p.parquet", "paper") == tasks.read(
        task, written(tmp_path, *[RECORDS[task]] * 3), "paper")


def test_mbpp_has_a_test_set(tmp_path, capsys):
    path = written(tmp_path, *({**RECORDS["mbpp"], "task_id": i} for i in (10, 11, 510, 511)))
    assert [p["id"] for p in tasks.read("mbpp", path, "paper")] == [11, 510]
    assert "2 problems outside the test set of mbpp are left out" in joined(capsys.readouterr().out)
    with pytest.raises(ValueError, match="no problems of mbpp"):
        tasks.read("mbpp", written(tmp_path, {**RECORDS["mbpp"], "task_id": 3}), "paper")


@pytest.mark.parametrize("task, change, expected", [
    ("gsm8k", {"answer": "blue"}, r"p.jsonl:1: the reference answer names no number"),
    ("gsm8k", {"question": None}, "p.jsonl:1: field 'question' is not a string"),
    ("math", {"answer": 5}, "p.jsonl:1: field 'answer' is not a string"),
    ("math", {"problem": ""}, "p.jsonl:1: field 'problem' is empty"),
    ("humaneval", {"entry_point": "f(1); import os"}, "'entry_point' is not a name"),
    ("humaneval", {"test": []}, "field 'test' is not a string"),
    ("mbpp", {"task_id": "11"}, "'task_id' is not a whole number"),
    ("mbpp", {"task_id": True}, "'task_id' is not a whole number"),
    ("mbpp", {"test_list": "assert"}, "'test_list' is not a list of asserts"),
    ("mbpp", {"test_list": []}, "'test_list' is not a list of asserts"),
    ("mbpp", {"test_list": [1]}, "field 'test_list' is not a string"),
    ("boolq", {"answer": "yes"}, "'answer' is 'yes', none of boolq's answers: true, false"),
    ("boolq", {"answer": ["true"]}, "field 'answer' is not a string"),
    *((task, {"instruction": 1, "question": 1, "problem": 1, "prompt": 1, "text": 1}, "p.jsonl:1: ")
      for task in RECORDS)])
def test_mistakes_in_a_file(task, change, expected, tmp_path):
    """One line that names the file and the line."""
    path = written(tmp_path, {**RECORDS[task], **change})
    with pytest.raises(ValueError, match=expected) as e:
        tasks.read(task, path, next(iter(options.TASKS[task])))
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    with pytest.raises(ValueError, match="no problems|no field"):
        tasks.read(task, written(tmp_path, *({} for _ in range(len(change) - 1))), "paper")


def test_a_solution_without_an_answer(tmp_path):
    with pytest.raises(ValueError, match=r"p.jsonl:1: field 'solution' has no answer in \\boxed"):
        tasks.read("math", written(tmp_path, {"problem": "?", "solution": "5"}), "strict")


# --- the model and the command

@pytest.fixture(scope="module")
def net():
    return model.load("tiny", "cpu").requires_grad_(False)


def test_answers_are_greedy_and_keep_their_spaces(net, tok, monkeypatch):
    """One by one as in a batch; a text that begins with an indentation keeps it."""
    prompts = [tok.encode(p, bos=True) for p in ("Nora had 4 shells.", "A line is")]
    texts = tasks.answers(net, tok, prompts, 12, lambda text: False)
    for prompt, text in zip(prompts, texts):
        new, = model.generate(net, [prompt], 12, eos=tok.stops)
        assert text.strip() == tok.decode(new).strip() != ""
    said = tok.encode("x    return 1")[1:]
    monkeypatch.setattr(model, "generate", lambda *_, **__: [said])
    text, = tasks.answers(net, tok, prompts[:1], 12, lambda text: False)
    assert text.endswith("    return 1") and tok.decode(prompts[0]) not in text


def test_an_answer_that_has_ended_is_not_continued(net, tok):
    asked = []

    def ended(text):
        asked.append(text)
        return len(asked) == 2

    prompt = tok.encode("Nora had 4 shells.", bos=True)
    text, = tasks.answers(net, tok, [prompt], 64, ended)
    assert len(tok.encode(text)) <= 34 and len(asked) == 2


def answer_with(monkeypatch, say):
    """A model that answers say(prompt); the prompts of each call."""
    calls = []

    def answers(net, tok, prompts, max_new_tokens, ended):
        calls.append([tok.decode(p) for p in prompts])
        return [say(text) for text in calls[-1]]

    monkeypatch.setattr(tasks, "answers", answers)
    return calls


SUMS = [{"question": f"What is {i} + {'0 + ' * i}1?", "answer": f"#### {i + 1}"} for i in range(6)]


def solve(prompt):
    """The answer to one of SUMS; that to 3 + 1 is wrong."""
    i = int(re.search(r"What is (\d)", prompt)[1])
    return f"It is.\u2028\n#### {99 if i == 3 else i + 1}"


def test_evaluate(net, tok, monkeypatch, tmp_path):
    """Short prompts first; rows in the order of the file; the bar counts problems."""
    calls = answer_with(monkeypatch, solve)
    problems = tasks.read("gsm8k", written(tmp_path, *SUMS[::-1]), "strict")
    monkeypatch.setattr(tasks, "tqdm", partial(tasks.tqdm, mininterval=0))
    with redirect_stderr(io.StringIO()) as err, open(tmp_path / "log", "w+") as log:
        rows = tasks.evaluate(net, tok, "gsm8k", problems, max_new_tokens=9, batch=4, log=log,
                              done={5: {"id": 5, "correct": True}})
        log.seek(0)
        logged = dict(map(json.loads, log.read().split("\n")[:-1]))
    assert [len(c) for c in calls] == [4, 1] and "What is 1 + 0 + 1?" in calls[0][0]
    assert [row["id"] for row in rows] == [*range(6)] and logged == dict(enumerate(rows[:5]))
    assert [row["correct"] for row in rows] == [True, True, False, True, True, True]
    assert rows[2] == {"id": 2, "prompt": problems[2]["prompt"], "reference": "4", "answer": "99",
                       "response": solve("What is 3"), "correct": False}
    assert re.search(r"1/6 .* 5/6 .*80.0% right", err.getvalue().replace("\r", " "))


def test_a_prompt_that_is_too_long(net, tok, tmp_path):
    long = {"question": "long " * 999, "answer": "#### 1"}
    problems = tasks.read("gsm8k", written(tmp_path, SUMS[0], long), "strict")
    with pytest.raises(ValueError, match=r"problem 1 has [\d,]+ tokens, more than the model's 256"):
        tasks.evaluate(net, tok, "gsm8k", problems, max_new_tokens=1)


def test_command(monkeypatch, tmp_path):
    """The protocol, the score with its interval, a row a problem, nothing else left behind."""
    answer_with(monkeypatch, solve)
    path, out = written(tmp_path, *SUMS), tmp_path / "new" / "out.jsonl"
    printed = command("--task", "gsm8k", "--data", path, "--out", out)
    assert joined(printed) == (
        f"protocol strict of gsm8k: data.PROMPT, greedy, at most 256 new tokens; {data.RULE} must "
        f"equal the reference; 6 problems of {path} accuracy 83.3% (43.6% to 97.0% with 95 % "
        f"confidence) by protocol strict of gsm8k: 5 of 6 problems; predictions in {out}")
    assert [json.loads(line)["correct"] for line in out.read_text().split("\n")[:-1]] == [
        True, True, True, False, True, True]
    assert os.listdir(out.parent) == ["out.jsonl"]


def test_command_names_its_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    answer_with(monkeypatch, lambda prompt: "The answer is: 5")
    path = written(tmp_path, RECORDS["math"], RECORDS["math"])
    said = joined(command("--ckpt", TINY, "--task", "math", "--data", path, "--limit", 1,
                          "--protocol", "paper"))
    name = "predictions-tiny-math-paper-first1.jsonl"
    assert f"0 of 1 problems; predictions in runs/{name}" in said and (
        "data.PROMPT + \" Let's think step by step.\", greedy, at most 1024" in said)
    assert os.listdir("runs") == [name]


@pytest.mark.parametrize("task", options.RUN_CODE)
def test_command_runs_programs(task, monkeypatch, tmp_path):
    """Only with --allow-code."""
    answer_with(monkeypatch, lambda prompt: RIGHT[f"{task} paper"])
    flags = "--task", task, "--data", written(tmp_path, RECORDS[task]), "--out", tmp_path / "out"
    assert "1 of 1 problems" in command(*flags, "--allow-code")
    assert lines(tmp_path / "out")[0]["why"] is None
    assert f"--task {task} runs programs that the model writes" in (said := failure(*flags))
    assert "--allow-code" in said and said.count("\n") == 1


def interrupted(monkeypatch, flags):
    """A run that dies while the third of three batches is answered."""
    calls = answer_with(monkeypatch, lambda prompt: 1 / 0 if len(calls) == 3 else solve(prompt))
    with pytest.raises(ZeroDivisionError):
        command(*flags)


def test_a_run_goes_on(monkeypatch, tmp_path):
    """With what it has, half a line less, to the same file."""
    flags = "--task", "gsm8k", "--data", written(tmp_path, *SUMS), "--batch", 2, "--out"
    part = tmp_path / "out.part"
    interrupted(monkeypatch, (*flags, tmp_path / "out"))
    assert len(whole := part.read_bytes().split(b"\n")) == 6 and not (tmp_path / "out").exists()
    part.write_bytes(b"\n".join([*whole[:4], whole[4][:40] + b"\xe2"]))
    calls = answer_with(monkeypatch, solve)
    assert "going on: 3 of 6 are done" in command(*flags, tmp_path / "out")
    assert sorted(map(len, calls)) == [1, 2] and not part.exists()
    command(*flags, tmp_path / "other")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("changed, expected", [
    (["--protocol", "paper"], "begun with other protocol, max_new_tokens, problems ('strict'"),
    (["--max-new-tokens", 7], "begun with other max_new_tokens (256, now 7)"),
    (["--limit", 5], "begun with other limit, problems (None, now 5)"),
    (["--ckpt", TINY], "begun with other ckpt ('tiny', now "),
    (None, "begun with other problems ("), ("broken", "damaged; remove it"),
    ("not", "damaged; remove it"), ("twice", "damaged; remove it")])
def test_another_run_does_not_go_on(changed, expected, monkeypatch, tmp_path):
    """It is refused with the difference, and what is there stays."""
    path, part = written(tmp_path, *SUMS), tmp_path / "out.part"
    flags = ["--task", "gsm8k", "--data", path, "--batch", 2, "--out", tmp_path / "out"]
    interrupted(monkeypatch, flags)
    if changed is None:
        written(tmp_path, *SUMS[:5], {**SUMS[5], "answer": "#### 7"})
    elif isinstance(changed, str):
        row = {"broken": b'[77, {"correct": true}]\n', "not": b"[1\n", "twice": b'{"a": 1}\n'}
        part.write_bytes(part.read_bytes() + row[changed])
    before, calls = part.read_bytes(), answer_with(monkeypatch, solve)
    with pytest.raises(ValueError, match=re.escape(expected)) as e:
        command(*flags, *(changed if isinstance(changed, list) else []))
    assert part.read_bytes() == before and not calls and "\n" not in str(e.value)


def test_a_run_without_an_answer_is_begun_anew(monkeypatch, tmp_path):
    flags = ["--task", "gsm8k", "--data", written(tmp_path, *SUMS), "--out", tmp_path / "out"]
    monkeypatch.setattr(tasks, "answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(*flags)
    answer_with(monkeypatch, solve)
    said = command(*flags, "--max-new-tokens", 7)
    assert "going on" not in said and "5 of 6 problems" in said


def test_two_runs_do_not_share_a_file(monkeypatch, tmp_path):
    flags = ["--task", "gsm8k", "--data", written(tmp_path, *SUMS), "--out", tmp_path / "out"]

    def say(prompt):
        with pytest.raises(OSError, match="another process is at work"):
            command(*flags)
        return solve(prompt)

    answer_with(monkeypatch, say)
    assert "5 of 6 problems" in command(*flags)


@pytest.mark.parametrize("flags, expected", [
    (["--task", "math"], "--task math needs --data"),
    (["--data", "x", "--prompt", "?"], "--data needs --task"),
    (["--task", "mth", "--data", "x"], "there is no 'mth': did you mean math?"),
    (["--task", "boolq", "--data", "x", "--protocol", "strict"], "has no protocol strict, only"),
    (["--task", "math", "--data", "x", "--accuracy", "y"], "--task stands without --accuracy"),
    (["--task", "math", "--data", "x", "--stop", "y"], "--task stands without --stop"),
    (["--task", "math", "--data", "x", "--interactive"], "--interactive stands alone"),
    (["--task", "math", "--data", "/no/such"], "/no/such: no such file"),
    (["--task", "math", "--data", __file__], "not JSON")])
def test_mistakes(flags, expected):
    assert expected in failure(*flags)


def test_out_is_not_the_file_of_problems(tmp_path):
    path = written(tmp_path, RECORDS["math"])
    assert "is the file of problems" in failure("--task", "math", "--data", path, "--out", path)


def test_a_real_model(tmp_path, net, tok):
    """The tiny model on its own problems: as --accuracy counts them."""
    out, flags = tmp_path / "out", ["--limit", 6, "--max-new-tokens", 8]
    said = command("--task", "gsm8k", "--data", TINY / "test.jsonl", "--out", out, *flags)
    other = command("--accuracy", TINY / "test.jsonl", "--out", tmp_path / "other", *flags)
    assert re.search("accuracy .* confidence", said)[0] == re.search("acc.* confidence", other)[0]
    mine, theirs = lines(out), lines(tmp_path / "other")
    assert [r["response"].strip() for r in mine] == [r["response"] for r in theirs]
    assert [r["reference"] for r in mine] == [r["reference"] for r in theirs]


def test_the_table_of_results(monkeypatch, tmp_path, capsys):
    """bench.bench_tasks measures what eval.py does, and bench.plot shows it."""
    for task in ("math", "boolq"):
        (tmp_path / f"{FILES[task]}.jsonl").parent.mkdir()
        (tmp_path / f"{FILES[task]}.jsonl").write_text(f"{json.dumps(RECORDS[task])}\n" * 4)
    answers = iter([RIGHT["math strict"], "?", "?", "?", *"????", *["true false"] * 3, "false"])
    answer_with(monkeypatch, lambda prompt: next(answers))
    out = tmp_path / "tasks_h100.json"
    run_command(bench_tasks.main, "--folder", tmp_path, "--device", "cpu", "--out", out)
    result = json.loads(out.read_text())
    assert [(r["task"], r["protocol"], r["accuracy"], r["answered"]) for r in result["rows"]] == [
        ("math", "strict", 0.25, 1), ("math", "paper", 0, 0), ("boolq", "paper", 0.25, 4)]
    assert result["rows"][0]["standard_error"] == pytest.approx((0.25 * 0.75 / 4)**0.5)
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    table = plot.tasks_table().splitlines()
    assert table[2] == "| math, strict | 4 | 25.0% ± 21.7%, 25% gave an answer |"
    assert any(line.startswith("- math, strict: data.PROMPT, greedy, at most 512 new tokens; the ")
               for line in table)
    (tmp_path / "tasks_h100.json").unlink()
    assert plot.tasks_table() == "Not measured yet."


def test_pages_are_short():
    """A page each."""
    for page in (commonsense, gsm8k, humaneval, math, mbpp, programs):
        with open(page.__file__, encoding="utf-8") as file:
            assert len(file.readlines()) <= 125
