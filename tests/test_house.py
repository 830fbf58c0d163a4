"""The plan of the house: who imports whom, how long files and functions are."""
import ast
from pathlib import Path

import pytest

from conftest import ROOT

# A file or a folder: the files and folders of ours that it may import, at the top or inside a
# function. Those at the top of the house (train, eval, convert, plan ...) may import anything.
MAY_IMPORT = {
    "svd": (), "nf4": (), "fp8": ("nf4", "fast"), "fast": (), "support.files": (),
    "pissa": ("svd", "fast", "nf4", "fp8", "qpissa"), "qpissa": ("svd", "nf4", "fp8"),
    "model": ("fast", "formats"),
    "formats": ("support.files",), "formats.meta": (), "formats.peft": ("formats", "support.files"),
    "formats.answers": (), "formats.tokenizer": (), "formats.chat": ("formats.tokenizer",),
    "formats.records": ("formats.jsonl",),
    "formats.gguf": ("formats.meta",), "formats.hf": ("formats.meta", "formats.jsonl",
                                                      "support.files"),
    "formats.gguf_write": ("formats.gguf", "formats.hf", "formats.tokenizer", "model",
                           "support.files"),
    "formats.meta_write": ("formats.meta", "model", "support.files"),
    "adapter": ("pissa", "qpissa", "svd", "nf4", "fp8", "formats", "support.files"),
    "support.options": ("formats", "formats.jsonl", "relatives", "support.streams"),
    "support.streams": (), "tasks.child": (), "tasks.programs": (),
    "tasks.commonsense": ("data", "formats.jsonl"),
    "tasks.gsm8k": ("data", "formats.jsonl"), "tasks.math": ("data", "formats.jsonl"),
    "tasks.humaneval": ("formats.jsonl", "tasks.programs"),
    "tasks.mbpp": ("formats.jsonl", "tasks.programs"),
    "relatives": ("relatives.calibrate",)}

# Lines that are promised to a reader, comments included.
LINES = {"model.py": 430, "fast.py": 532, "support/files.py": 155, "svd.py": 200, "pissa.py": 288,
         "nf4.py": 285, "fp8.py": 150, "train.py": 400, "adapter.py": 300, "data.py": 260,
         "eval.py": 250, "convert.py": 300, "README.md": 300, "EVIDENCE.md": 150}


def sources():
    """{name of a module: its file}, without tests, benchmarks and examples."""
    found = [*ROOT.glob("*.py"), *(path for folder in ("formats", "support", "relatives", "tasks")
                                   for path in (ROOT / folder).glob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
            for p in found}


def imports(path, modules):
    """The modules of ours that a file imports, lazily or not, import_module("...") included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)               # from formats import hf: the folder and the file
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module")
              and isinstance(node.args[0], ast.Constant)):
            found.add(node.args[0].value)
    return found & modules.keys()


@pytest.fixture(scope="module")
def arrows():
    """{module: the modules of ours that it imports}."""
    modules = sources()
    return {name: imports(path, modules) - {name} for name, path in modules.items()}


def test_imports_are_found(tmp_path):
    """What the tests below rely on."""
    path = tmp_path / "x.py"
    path.write_text("import torch, svd\nfrom formats import hf, meta as m\n\ndef f():\n"
                    "    from support.files import written\n    import_module('nf4')\n")
    modules = dict.fromkeys(("svd", "formats", "formats.hf", "formats.meta", "formats.gguf",
                             "support.files", "nf4", "fast"))
    assert imports(path, modules) == {"svd", "formats", "formats.hf", "formats.meta",
                                      "support.files", "nf4"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_arrows(arrows, name):
    allowed = MAY_IMPORT[name]
    for other in arrows.get(name, ()):
        folder = other.rpartition(".")[0]
        holds = {k.rpartition(".")[0] for k in allowed}          # `from formats import meta`
        assert other in allowed or folder in allowed or other in holds, f"{name} imports {other}"


def test_what_must_not_be_known(arrows):
    """The network knows no PiSSA, PiSSA no relatives, and neither what stands on top of them."""
    def reached(name):
        found, todo = set(), [name]
        while todo:
            todo += arrows[(new := todo.pop())] - found
            found.add(new)
        return found - {name}

    on_top = {"train", "eval", "convert", "adapter", "plan", "support.plan", "support.report"}
    assert not reached("model") & ({"pissa", "qpissa", "svd", "nf4", "formats.peft"} | on_top)
    assert not reached("pissa") & ({"model", "data"} | on_top)
    assert not any(n.startswith(("formats", "relatives")) for n in reached("pissa"))
    assert not any(n.startswith("relatives") for n in reached("adapter"))


def test_no_circle(arrows):
    done = set()
    while rest := {name: to - done for name, to in arrows.items() if name not in done}:
        free = {name for name, to in rest.items() if not to}
        assert free, f"a circle among {', '.join(sorted(rest))}"
        done |= free


@pytest.mark.parametrize("name", LINES)
def test_promised_lines(name):
    path = ROOT / name
    count = len(path.read_text("utf-8").splitlines()) if path.exists() else 0
    assert count <= LINES[name]


def test_attention_comes_early():
    source = (ROOT / "model.py").read_text().splitlines()
    assert source.index("class Attention(nn.Module):") < 110


@pytest.mark.parametrize("folder", [".", "formats", "support", "relatives", "tasks", "bench",
                                    "examples", "checkpoints/tiny"])
def test_no_function_is_long(folder):
    for path in sorted((ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                long = node.end_lineno - node.lineno + 1
                assert long <= 60, f"{Path(path).name}: {node.name} has {long} lines"
