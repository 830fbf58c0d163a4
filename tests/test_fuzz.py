"""Damaged checkpoints load as they should or fail with one line: no traceback, no hang, no giant
allocation."""
import copy
import json
import os
import random
import resource
import signal
import struct
import time

import pytest
import torch

import model
from bench.damage import Wrong, damaged
from bench.damage import outcome as outcome_of
from conftest import assert_logits_equal, small_net
from formats import meta_write
from test_hf import twin, weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

pytestmark = pytest.mark.long       # only ./check leaves these out

VALUES = [None, True, False, 0, -1, 1, 3, 7, 2**31, 10**9, 10**30, 0.5, 1e308, float("nan"),
          float("inf"), "", "x", "48", [], [1], {}, {"a": 1}, "full_attention", "../../x"]

PLACES = [("whole", "config.json"), ("shards", "config.json"), ("meta", "params.json"),
          ("shards", "model.safetensors.index.json")]


def paths(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(
        value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*at, key))


def mutate_json(text, rng):
    """Another value, a missing, misspelt or moved key, anywhere in a JSON document."""
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
        if not (places := [p for p in paths(value) if p]):
            break
        *parents, last = rng.choice(places)
        holder = value
        for key in parents:
            holder = holder[key]
        kind = rng.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{last}_"] = holder.pop(last)
        elif kind == 2 and isinstance(holder[last], (int, float)):
            holder[last] = holder[last] * rng.choice([-1, 0, 2, 0.5, 1000, 10**12])
        else:
            holder[last] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value)


def mutate_bytes(data, rng, where=None):
    """Some bytes changed, cut out, put in, or the end cut off, within the first `where`."""
    data, end = bytearray(data), min(len(data), where or len(data))
    at, kind = rng.randrange(end), rng.randrange(5)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        del data[at:at + rng.randrange(1, 40)]
    elif kind == 2:
        data[at:at] = rng.randbytes(rng.randrange(1, 40))
    else:
        for i in range(at, min(end, at + rng.choice([1, 1, 8]))):
            data[i] = rng.randrange(256)
    return bytes(data)


def mutate_header(data, rng):
    """The header of a safetensors file: other names, dtypes, shapes, offsets, or its length."""
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.2:
        return struct.pack("<Q", rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63])) + data[8:]
    header = json.loads(data[8:8 + size])
    name = rng.choice([n for n in header if n != "__metadata__"])
    field = rng.choice(["dtype", "shape", "data_offsets", "name"])
    if field == "name":
        header[rng.choice(["x", name + "_", name.upper()])] = header.pop(name)
    else:
        header[name][field] = {"dtype": lambda: rng.choice(["F16", "I32", "F8_E4M3", "X", 3]),
                               "shape": lambda: rng.choice([[], [0], [2**40, 2**20], [-1], "a"]),
                               "data_offsets": lambda: rng.choice([[0, 0], [0, 2**50], [9, 3], []]),
                               }[field]()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size:]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """{layout: folder}: Hugging Face's whole and in shards, Meta's; and the memory at the start."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("whole", "shards", "meta")}
    twin("llama3.1").save_pretrained(folders["whole"])
    theirs = twin("qwen2-tied")
    theirs.save_pretrained(folders["shards"])
    weights(folders["shards"], theirs, "safetensors", 3)
    meta_write.save(small_net(), folders["meta"])
    return {**folders, "memory": memory()}


# (layout, file, how it is damaged, how many cases)
DAMAGES = [*((*place, "json", 50) for place in PLACES),
           *((*place, "bytes", 10) for place in PLACES),
           ("whole", "model.safetensors", "header", 60),
           ("whole", "model.safetensors", "start", 20),
           ("meta", "consolidated.00.pth", "bytes", 20)]
CASES = [(layout, file, how, i) for layout, file, how, n in DAMAGES for i in range(n)]


def damage(data, how, rng):
    """The bytes of a file, damaged in one of four ways."""
    return {"json": lambda: mutate_json(data, rng).encode(),
            "bytes": lambda: mutate_bytes(data, rng),
            "start": lambda: mutate_bytes(data, rng, 2000),
            "header": lambda: mutate_header(data, rng)}[how]()


def agrees(folder, tokens, logits):
    """True if transformers computes the same from a changed config; False if it refuses it."""
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception:
        return False
    assert_logits_equal(logits, theirs(tokens).logits)
    return True


@pytest.fixture
def alarm():
    """A function that makes this test fail after so many seconds; the handler is restored."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    yield signal.alarm
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def outcomes():
    """{case: what came of it}, for `outcome`."""
    return {}


def outcome(case, originals, outcomes, alarm):
    """What comes of a damaged checkpoint: "loaded", "compared" with transformers, or the error."""
    layout, file, how, _ = case
    if case in outcomes:
        return outcomes[case]
    path, tokens = originals[layout] / file, torch.arange(3, 40)[None]
    whole = path.read_bytes()
    try:
        path.write_bytes(damage(whole, how, random.Random(repr(case))))
        alarm(10)
        net = model.load(originals[layout], "cpu", torch.float32)
        logits = net(tokens)
        assert logits.shape == (1, 37, net.config.vocab_size)
        compared = file == "config.json" and agrees(originals[layout], tokens, logits)
        found = "compared" if compared else "loaded"
    except (ValueError, FileNotFoundError) as e:
        found = e
    finally:
        alarm(0)
        path.write_bytes(whole)
    outcomes[case] = found
    return found


def memory():
    """The most memory that this process has had, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_damaged_checkpoint(case, originals, outcomes, alarm):
    before, found = memory(), outcome(case, originals, outcomes, alarm)
    if isinstance(found, Exception):
        assert "\n" not in str(found) and 10 < len(str(found)) < 400, str(found)
        assert str(originals[case[0]]) in str(found), f"{found} does not name the file"
    assert memory() - before < 300_000, "more than 300 MB"


def test_damage_is_of_every_kind(originals, outcomes, alarm):
    """The cases above mean something: many are refused, some load, and some can be compared."""
    found = [outcome(case, originals, outcomes, alarm) for case in CASES]
    loaded, compared = (found.count(kind) for kind in ("loaded", "compared"))
    refused = sum(isinstance(e, (ValueError, FileNotFoundError)) for e in found)
    assert len(CASES) == 340 and loaded + compared + refused == 340
    assert loaded + compared > 20 and refused > 200 and compared > 10, (loaded, compared, refused)
    grown = memory() - originals["memory"]
    assert grown < 300_000, f"{grown} KiB more memory"


def fails(error):
    """A function that raises an error, or, if it is a function, calls it."""
    def attempt():
        if callable(error):
            return error()
        raise error

    return attempt


@pytest.mark.parametrize("found, error", [
    ("accepted", lambda: print("to nowhere")), ("refused", ValueError("{path}: it is damaged")),
    ("unclear", ValueError("it is damaged")), ("unclear", ValueError("{path}: two\nlines")),
    ("traceback", KeyError("x")), ("wrong", Wrong("x")), ("hang", lambda: time.sleep(9)),
    ("memory", lambda: bytearray(2**33)), ("memory", lambda: torch.empty(2**33)),
    ("crash", lambda: os.kill(os.getpid(), signal.SIGKILL))], ids=lambda x: str(x)[:12])
def test_what_comes_of_an_attempt(found, error, tmp_path):
    """bench.fuzz can tell these apart."""
    path = tmp_path / "x.json"
    if isinstance(error, ValueError):
        error = ValueError(str(error).format(path=path))
    assert outcome_of(fails(error), path, seconds=1)[0] == found


@pytest.mark.parametrize("suffix, content", [
    (".json", b'{"a": [1, 2.5, {"b": null}]}'), (".jsonl", b'{"a": 1}\n{"b": "x"}\n'),
    (".safetensors", b"\x08" + bytes(7) + b'{"a": 1}' + bytes(99)), (".bin", bytes(range(200)))])
def test_damage_is_a_function_of_its_number(suffix, content):
    found = [damaged(content, random.Random(i), suffix) for i in range(300)]
    assert found == [damaged(content, random.Random(i), suffix) for i in range(300)]
    assert len(set(found)) > 100 and sum(f == content for f in found) < 30
