"""What README says of files is so: they exist, are as long as it says, and can be copied alone."""
import os
import re
import shutil
import subprocess
import sys

import pytest

from bench import pictures, plot
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
    modules, six = sources(), []
    for what, cell in rows("Copy it"):
        names = re.findall(r"[\w/]+\.py|\w+/(?!\w)", cell.partition(":")[0])
        names += six if "these six" in cell else []
        six = names if len(names) == 6 else six
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
    text = re.sub(r"```sh\npip|--(ckpt tiny --)?out\s+runs/look|--max-lora-rank"
                  r"|--(nproc-per-node|max-restarts|nnodes|signal|local-dir|include|create-dirs)",
                  "", README, flags=re.S)
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


def test_only_what_is_asked_is_written(tmp_path, monkeypatch, capsys):
    """`bench.plot` writes with --text or --all; --help, --check, nothing or a typo do not."""
    page, drawn = tmp_path / "page.md", []
    page.write_text(old := "# A page\n<!-- headline -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    monkeypatch.setattr(plot, "PAGES", [page])
    monkeypatch.setattr(pictures, "PICTURES", [lambda: drawn.append(1)])

    def plotted(*argv):
        monkeypatch.setattr(sys, "argv", ["plot", *argv])
        with pytest.raises(SystemExit) as stopped:
            sys.exit(plot.main(plot.arguments()))
        return stopped.value.code

    for argv in ["--help"], [], ["--chek"], ["README.md"], ["--text", "--check"]:
        assert plotted(*argv) == (0 if argv == ["--help"] else 2)
    assert "page.md" in plotted("--check") and page.read_text() == old and not drawn
    assert plotted("--text") is None and not drawn
    assert "| --- | --- | --- |" in page.read_text() and "old" not in page.read_text()
    assert plotted("--check") == 0
    assert plotted("--all") is None and drawn == [1]


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--typo"], 2)])
def test_plot_answers_without_torch(argv, code, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was loaded')")
    done = subprocess.run([sys.executable, "-m", "bench.plot", *argv], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == code and "--check" in done.stdout + done.stderr


# --- pictures

def contrast(a, b):
    """The ratio that WCAG defines, 1 to 21, of two colours like #d1495b."""
    def light(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), parts))

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_on_a_white_and_on_a_dark_page():
    """WCAG asks for 3 of graphics. GitHub's dark page is #0d1117."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colours = {pictures.INK, pictures.OCHRE, *pictures.COLOURS.values()}
    assert len(colours) == 6
    for colour in colours:
        assert min(contrast(colour, page) for page in ("#ffffff", "#0d1117")) > 3, colour


def test_every_picture_is_drawn_shown_and_described():
    """One of each function, on some page, with an alt text that says what is seen."""
    names = {picture.__name__ for picture in pictures.PICTURES}
    assert {path.stem for path in pictures.FIGURES.glob("*")} == names
    shown = [found for page in PAGES
             for found in re.findall(r"!\[([^]]*)\]\(\S*figures/(\w+)\.png\)", page.read_text())]
    assert {name for _, name in shown} == names
    assert [name for alt, name in shown if len(alt.split()) < 15] == []
    assert [alt for alt, _ in shown if re.search(r"\d[.\d]* ?(%|x\b|s\b)", alt)] == []      # stale


@pytest.mark.parametrize("name", [picture.__name__ for picture in pictures.PICTURES])
def test_pictures_are_transparent(name):
    image = pytest.importorskip("matplotlib.image").imread(pictures.FIGURES / f"{name}.png")
    assert (image[0, :, 3] == 0).all() and (image[:, 0, 3] == 0).all()
    assert 0.01 < (image[..., 3] > 0.5).mean() < 0.6


@pytest.mark.long
def test_pictures_are_what_is_drawn(tmp_path, monkeypatch):
    """Two of them, made anew, have the size and nearly all pixels of those that are here."""
    imread = pytest.importorskip("matplotlib.image").imread
    monkeypatch.setattr(pictures, "FIGURES", tmp_path)
    for picture in pictures.speed, pictures.same_rate:
        picture()
        new, old = (imread(folder / f"{picture.__name__}.png") for folder in (
            tmp_path, ROOT / "bench" / "figures"))
        assert abs(new[..., 3].mean() - old[..., 3].mean()) < 0.02


def test_lengths_of_files():
    """README's table of files says how long they are, to a few lines."""
    rows = re.findall(r"^\| (\[.*?\)) \| ([\d, ]+) \|", README, re.M)
    found = [(name, int(n)) for names, numbers in rows for name, n in zip(
        re.findall(r"\((.*?)\)", names), numbers.split(","), strict=True)]
    assert len(found) > 6
    for name, n in found:
        assert abs(len((ROOT / name).read_text().splitlines()) - n) <= 5, name


def test_speeds_are_those_of_the_tables():
    ratios = [f"{ratio:.2f}x" for _, peer, ratio in pictures.speeds() if "SVD" not in peer]
    results = (ROOT / "bench" / "RESULTS.md").read_text()
    assert len(ratios) == 12 and [r for r in ratios if f"**{r}**" not in results] == []
    svd = {what: ratio for what, peer, ratio in pictures.speeds() if "SVD" in peer}
    assert svd["A and B, 7B, rank 128"] > 5 and min(svd.values()) < 1            # losses, too


@pytest.mark.slow
def test_demo_and_the_answer_to_a_prompt(tmp_path):
    """The quick start ends as README shows, and its prompt is answered as README says."""
    shutil.copytree(ROOT, tree := tmp_path / "tree", ignore=shutil.ignore_patterns(
        ".git", "runs", ".venv*", "__pycache__"))
    prompt = re.search(r"--prompt (\"Tom .*?\")", README)[1]
    answer = re.search(r"<!-- demo-answer -->\n```\n(.*?)```\n<!-- end -->", README, re.S)[1]
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
    assert out.endswith("\n" + answer) and "#### 7" in answer


def test_a_bench_says_how_long_it_runs_and_what_is_missing(capsys, monkeypatch, tmp_path):
    """A mistake is one line; results appear whole above a clock, and stdout has only them."""
    import bench
    monkeypatch.setenv("TQDM_DISABLE", "")
    with bench.ticking("bench_x"):
        print("one", {"row": 1})
    out, err = capsys.readouterr()
    assert out == "one {'row': 1}\n" and "bench_x: measuring for 00:0" in err
    assert sys.stdout.write("") == 0 and not isinstance(sys.stdout, bench.Above)
    done = subprocess.run([sys.executable, "-m", "bench.bench_svd", "--smollm2", tmp_path / "x"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        f"bench.bench_svd: No such file or directory: {tmp_path / 'x'}")
