"""Damaged checkpoints load rightly or fail with one line: no traceback, hang, giant allocation."""
import copy
import json
import random
import resource
import signal
import struct

import pytest
import torch
from conftest import assert_logits_equal, small_net
from test_hf import twin, weights

import model

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

VALUES = [None, True, False, 0, -1, 1, 3, 7, 2**31, 10**9, 10**30, 0.5, 1e308, float("nan"),
          float("inf"), "", "x", "48", [], [1], {}, {"a": 1}, "full_attention", "../../x"]


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
    """{layout: folder}: Hugging Face's whole and in shards, Meta's."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("whole", "shards", "meta")}
    twin("llama3.1").save_pretrained(folders["whole"])
    theirs = twin("qwen2-tied")
    theirs.save_pretrained(folders["shards"])
    weights(folders["shards"], theirs, "safetensors", 3)
    model.save(small_net(), folders["meta"])
    return folders


def cases(rng):
    """(layout, file, how it is damaged)."""
    json_files = [("whole", "config.json"), ("shards", "config.json"), ("meta", "params.json"),
                  ("shards", "model.safetensors.index.json")]
    for layout, file in json_files:
        for _ in range(50):
            yield layout, file, lambda d: mutate_json(d, rng).encode()
        for _ in range(10):
            yield layout, file, lambda d: mutate_bytes(d, rng)
    for _ in range(60):
        yield "whole", "model.safetensors", lambda d: mutate_header(d, rng)
    for _ in range(20):
        yield "whole", "model.safetensors", lambda d: mutate_bytes(d, rng, 2000)
    for _ in range(20):
        yield "meta", "consolidated.00.pth", lambda d: mutate_bytes(d, rng)


def agrees(folder, tokens, logits):
    """Whatever the changed config says, transformers takes it to say the same, or refuses it."""
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except Exception:
        return False
    assert_logits_equal(logits, theirs(tokens).logits)
    return True


def test_damaged_checkpoints(originals):
    rng, tokens = random.Random(7), torch.arange(3, 40)[None]
    loaded = refused = compared = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    for layout, file, damage in cases(rng):
        path = originals[layout] / file
        whole = path.read_bytes()
        try:
            path.write_bytes(damage(whole))
            signal.alarm(10)
            net = model.load(originals[layout], "cpu", torch.float32)
            logits = net(tokens)
            assert logits.shape == (1, 37, net.config.vocab_size)
            loaded += 1
            if file == "config.json":
                compared += agrees(originals[layout], tokens, logits)
        except (ValueError, FileNotFoundError) as e:
            assert "\n" not in str(e) and 10 < len(str(e)) < 400, str(e)
            assert str(originals[layout]) in str(e), f"{e} does not name the file"
            refused += 1
        finally:
            signal.alarm(0)
            path.write_bytes(whole)
    assert loaded + refused == 340 and loaded > 20 and refused > 200, (loaded, refused)
    assert compared > 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KiB more memory"
