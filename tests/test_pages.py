"""What README says of files is so: they exist, are as long as it says, and can be copied alone."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from bench import plot
from conftest import ROOT
from support import options
from test_house import imports, sources

README = (ROOT / "README.md").read_text()
PAGES = [*plot.PAGES, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "NOTES.md"]


def rows(section):
    """[[cell, ...]] of the table in this section of README, without its head."""
    lines = re.search(rf"^## {section}\n(.*?)^## ", README, re.M | re.S)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in lines if line.startswith("|")][2:]


def test_length():
    """At most 300 lines, of at most 100 columns, except for tables, links and commands."""
    lines = README.splitlines()
    assert len(lines) <= 300
    fenced = re.sub(r"^```.*?^```|^    .*?$", "", README, flags=re.M | re.S)
    assert [line for line in fenced.splitlines() if len(line) > 100
            and not line.startswith(("|", "!"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    assert [t for t in targets if ":" not in t and not (page.parent / t).exists()] == []


def test_named_files():
    """Every Python file, folder of ours and requirements file that the text names."""
    named = set(re.findall(r"(?<![\w./-])[\w/]+\.py\b|\brequirements[\w-]*\.txt", README))
    assert {"svd.py", "formats/peft.py", "requirements-lock.txt"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_read_it():
    """Line counts within a tenth, the method files first, and minutes for every row."""
    order = []
    for files, counts, minutes, learnt in rows("Read it"):
        files, counts = re.findall(r"\]\(([^)]+)\)", files), re.findall(r"\d+", counts)
        assert learnt and int(minutes) > 0
        for name, count in zip(files, counts):
            there = len((ROOT / name).read_text("utf-8").splitlines())
            assert int(count) == pytest.approx(there, rel=0.1), name
        order += files
    assert order[:3] == ["svd.py", "pissa.py", "model.py"]
    assert "examples/walkthrough.ipynb" in order


def test_copy_it():
    """The files of each row import nothing of ours that is not among them."""
    modules, five = sources(), []
    for what, cell in rows("Copy it"):
        names = re.findall(r"[\w/]+\.py|\w+/(?!\w)", cell.partition(":")[0])
        names += five if "these five" in cell else []
        five = names if len(names) == 5 else five
        here = {module for module, path in modules.items() if any(
            path.relative_to(ROOT).as_posix().startswith(name) for name in names)}
        assert here, what
        needed = {m for name in here for m in imports(modules[name], modules)}
        allowed = here | {"formats", "support"} | ({"fast"} if "without" in what else set())
        assert needed <= allowed, f"{what}: {needed - allowed} are missing"


def test_flags():
    """Every option in a command for train.py, eval.py or convert.py, and in the text."""
    helps = [options.train_parser("").format_help()]
    for program in ("eval.py", "convert.py", "convert.py merge", "convert.py compress"):
        helps.append(subprocess.run([sys.executable, *program.split(), "--help"], cwd=ROOT,
                                    capture_output=True, text=True, check=True).stdout)
    text = re.sub(r"```sh\npip.*?```|--(ckpt tiny --)?out\s+runs/look|--max-lora-rank"
                  r"|--(nproc-per-node|max-restarts|nnodes|signal)", "", README, flags=re.S)
    flags = set(re.findall(r"(?<=[\s`])--[a-z][a-z0-9-]*", text))
    assert {"--plain", "--plan", "--protocol"} <= flags
    assert [f for f in sorted(flags) if not any(f in known for known in helps)] == []


@pytest.mark.parametrize("word", ["train.py", "pytest"])
def test_quick_start(word):
    """One fenced command for each of both; its requirements file exists and pins what it names."""
    section = re.search(r"^## Quick start\n(.*?)^## ", README, re.M | re.S)[1]
    block = next(b for b in re.findall(r"```sh\n(.*?)```", section, re.S) if word in b)
    assert block.count("\n") == 1
    names, found = [re.search(r"-r (\S+)", block)[1]], []
    for name in names:                                          # grows: one file includes another
        for line in (ROOT / name).read_text().splitlines():
            if line.startswith("-r "):
                names.append(line.removeprefix("-r "))
            elif not line.startswith("#"):
                found.append(line)
    assert {"torch", "sentencepiece", "tqdm"} <= {line.partition("==")[0] for line in found}
    assert all("==" in line for line in found)


def test_check_and_help_write_nothing(tmp_path, monkeypatch):
    """`bench.plot --help` and `--check` leave pages alone. The latter names a stale one."""
    page = tmp_path / "page.md"
    page.write_text("# A page\n<!-- headline -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "PAGES", [page])
    for flag in ("--help", "--check"):
        before = page.read_text()
        monkeypatch.setattr(sys, "argv", ["plot", flag])
        with pytest.raises(SystemExit) as stopped:
            plot.main()
        assert page.read_text() == before
    assert "page.md" in stopped.value.code
    monkeypatch.setattr(sys, "argv", ["plot", "--text"])
    plot.main()
    assert "| --- | --- | --- |" in page.read_text() and "old" not in page.read_text()
    monkeypatch.setattr(sys, "argv", ["plot", "--check"])
    with pytest.raises(SystemExit) as stopped:
        plot.main()
    assert stopped.value.code == 0


@pytest.mark.slow
def test_demo_and_the_answer_to_a_prompt(tmp_path):
    """The quick start ends as README shows, and its prompt is answered as README says."""
    shutil.copytree(ROOT, tree := tmp_path / "tree", ignore=shutil.ignore_patterns(
        ".git", "runs", ".venv*", "__pycache__"))
    prompt = re.search(r"--prompt (\"Tom .*?\")", README)[1]
    first, last = re.search(r'the answer to the first one is "(.*)" and "(.*)"\.', README).groups()
    env = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}

    def printed(command):
        return subprocess.run(command, cwd=tree, shell=True, env=env, capture_output=True,
                              text=True, check=True).stdout

    def ends(text):            # numbers of two lines of the table at the end
        return [float(re.search(rf"^{name}.*?([\d.]+)%?(?: +of .*)?$", text, re.M)[1])
                for name in ("validation loss", "accuracy")]

    out = printed(f"{sys.executable} train.py")
    loss, accuracy = ends(out)
    shown = re.search(r"<!-- demo-output -->(.*?)<!-- end -->", README, re.S)[1]
    assert loss == pytest.approx(ends(shown)[0], rel=0.2)
    assert accuracy == pytest.approx(ends(shown)[1], abs=2)
    out = printed(f"{sys.executable} eval.py --ckpt tiny --adapter runs/demo/adapter --device cpu "
                  f"--prompt {prompt}")
    assert out.endswith(f"{first}\n{last}\n")
