"""For fuzz.py: inputs that are damaged, what comes of them in a process of its own, a GGUF."""
import contextlib
import copy
import io
import json
import os
import resource
import signal
import traceback
from pathlib import Path

import model
from formats import gguf
from support import report

HUGE = [0, 1, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [None, True, False, 0, -1, 7, 2**31, 10**30, 0.5, 1e308, float("nan"), float("inf"), "",
          "x", "48", "\n", "\ud800", [], [1], [[]], {}, {"a": 1}, "../../x", "DEEP", "q_proj" * 999]


class Wrong(Exception):
    """Something was accepted, and is not what the file says."""


# --------------------------------------------------------------------------------------- damage

def damaged(content, rng, suffix):
    """The bytes of a file with this suffix, damaged."""
    if suffix in (".json", ".jsonl", ".safetensors") and rng.random() < 0.7:
        if suffix == ".safetensors":
            size = int.from_bytes(content[:8], "little")
            header = damaged_json(content[8:8 + size], rng)
            return len(header).to_bytes(8, "little") + header + content[8 + size:]
        lines = content.splitlines(keepends=True) if suffix == ".jsonl" else [content]
        at = rng.randrange(len(lines))
        lines[at] = damaged_json(lines[at], rng) + b"\n"
        return b"".join(lines)
    content, kind = bytearray(content), rng.randrange(6)
    at = rng.randrange(min(len(content), rng.choice([64, 2000, len(content)])))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        del content[at:at + rng.randrange(1, 40)]
    elif kind == 2:
        content[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 3:                                        # a length, a count, an offset
        size = rng.choice([4, 8])
        content[at:at + size] = (rng.choice(HUGE) % 2**(8 * size)).to_bytes(size, "little")
    else:
        for i in range(at, min(len(content), at + rng.choice([1, 1, 8]))):
            content[i] = rng.randrange(256)
    return bytes(content)


def places(value):
    """(holder, key) of everything in a JSON value."""
    for key, inner in (value.items() if isinstance(value, dict) else enumerate(value)
                       if isinstance(value, list) else ()):
        yield value, key
        yield from places(inner)


def damaged_json(text, rng):
    """Other values, keys that are missing or misspelt, numbers that are huge, deep nesting."""
    value = json.loads(text)
    for _ in range(rng.choice([1, 1, 2])):
        holder, key = rng.choice([*places(value)] or [([0], 0)])
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * rng.choice([-1, 0, 2, 0.5, 10**12, 10**30])
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    return text.replace('"DEEP"', "[" * 100_000 + "]" * 100_000).encode(errors="surrogatepass")


# ---------------------------------------------------------------- one case, in a process of its own

def outcome(attempt, path, seconds=10, more=2**30):
    """(what came of attempt(), a line about it)."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)      # ends it wherever it hangs
        signal.alarm(seconds)
        os.write(write, json.dumps(tried(attempt, path)).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        found = pipe.read()
    number = os.waitpid(pid, 0)[1] & 127
    if number:
        return "hang" if number == signal.SIGALRM else "crash", signal.Signals(number).name
    return tuple(json.loads(found))


def tried(attempt, path):
    """`outcome`, in the process itself."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            attempt()
        return "accepted", ""
    except Wrong as e:
        return "wrong", str(e)[:300]
    except SystemExit:
        line, named = err.getvalue().strip().rpartition("\n")[2], True       # argparse's
    except BaseException as e:
        if isinstance(e, MemoryError) or "alloc" in str(e)[:300]:
            return "memory", f"{type(e).__name__}: {e}"[:300]
        line = report.one_line(e)
        if line is None:
            at = traceback.extract_tb(e.__traceback__)[-1]
            return "traceback", f"{type(e).__name__}: {e}"[:200] + f" at {at.filename}:{at.lineno}"
        named = str(path.parent) in line
    good = named and "\n" not in line and 10 < len(line) < 500
    return "refused" if good else "unclear", line[:300]


# ------------------------------------------------------------------------------------- a small GGUF

def write_gguf(path, net, sp):
    """The network as a GGUF with a sentencepiece vocabulary."""
    import gguf as package
    writer, c = package.GGUFWriter(path, "llama"), net.config
    for name, theirs in gguf.NUMBERS.items():
        if value := getattr(c, name):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"llama.{theirs}", value)
    n, kind = len(sp), {True: 3, False: 1}
    writer.add_tokenizer_model("llama")
    writer.add_token_list([sp.id_to_piece(i) for i in range(n)])
    writer.add_token_scores([sp.get_score(i) for i in range(n)])
    writer.add_token_types([2 if sp.is_unknown(i) else 6 if sp.is_byte(i) else
                            kind[sp.is_control(i)] for i in range(n)])
    for name, W in net.state_dict().items():
        writer.add_tensor(gguf.gguf_name(name), model.reorder(W, name, c, to_meta=True).numpy())
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file()
    writer.close()
