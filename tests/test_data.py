"""data.py against independent expectations: what a careful reader would work out by hand."""
import gzip
import json
import re
import sys
import time
import tracemalloc
import zlib
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import data
from conftest import joined, train_tokenizer
from formats import records

SHARED = Path(__file__).parents[2] / "shared" / "data"  # real material, where a checkout has it
GSM8K = SHARED / "gsm8k"


def needs(folder):
    return pytest.mark.skipif(not folder.exists(), reason=f"{folder.name} is not beside this repo")


@pytest.fixture(scope="session")
def tok(tmp_path_factory):
    return data.Tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path, *records):
    """A jsonl file of records, or of raw lines where a record is bytes."""
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


# read ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("record, expected", [
    ({"instruction": "i", "output": "o"}, ("i", "o")),
    ({"query": "q", "response": "r"}, ("q", "r")),
    ({"question": "q", "answer": "a"}, ("q", "a")),
    ({"text": "t"}, ("", "t")),
    ({"text": "t", "answer": "a", "question": "q"}, ("q", "a")),
    ({"question": "q", "answer": "a", "response": "r", "query": "s"}, ("s", "r")),
    ({"answer": "a", "output": "o", "instruction": "i"}, ("i", "o")),
    ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o")),
    ({"instruction": "i", "input": "", "output": "o"}, ("i", "o")),
    ({"instruction": "i", "input": None, "output": "o"}, ("i", "o")),
    ({"instruction": "i", "input": " ", "output": "o"}, ("i", "o")),
    ({"question": "q", "input": "x", "answer": "a"}, ("q", "a")),
])
def test_read_finds_the_fields(tmp_path, record, expected):
    assert data.read(write(tmp_path / "d.jsonl", record)) == [expected]


@pytest.mark.parametrize("fields, expected", [
    ("a,b", ("1", "2")), (" b , a ", ("2", "1")), ("b", ("", "2")), ("a,b,c", ("1\n2", "3")),
])
def test_read_takes_the_fields_named(tmp_path, fields, expected):
    path = write(tmp_path / "d.jsonl", {"a": "1", "b": "2", "c": "3", "text": "t"})
    assert data.read(path, fields) == [expected]


@pytest.mark.parametrize("blank", ["", " ", None])
def test_optional_columns_may_be_blank(tmp_path, blank):
    path = write(tmp_path / "d.jsonl", {"a": "1", "b": blank, "c": "3"}, {"a": "1", "b": "2",
                                                                        "c": "3"})
    assert data.read(path, "a,b,c") == [("1", "3"), ("1\n2", "3")]
    for fields in ("b,c", "b,b,c", "a,b"):          # the only prompt, all of it, the response
        with pytest.raises(ValueError, match="d.jsonl:1: field 'b' is (empty; fill it|not a str)"):
            data.read(path, fields)


def test_columns_that_are_not_used_are_named_once(tmp_path, capsys):
    """Those that hold something; a terminal obeys no name."""
    rows = [{"instruction": "i", "output": "o", "input": "", "tag": "s", "history": [],
             "id": None, "\x1b[2J": 1}, {"instruction": "i", "output": "o", "topics": ["x"]}] * 3
    data.read(write(tmp_path / "d.jsonl", *rows))
    assert re.search(r"^note: \S+d.jsonl: columns that are not used: tag, \\x1b\[2J, topics; "
                     "say which to use: --fields instruction,output$",
                     joined(capsys.readouterr().out))
    data.read(write(tmp_path / "d.jsonl", GOOD))
    assert capsys.readouterr().out == ""


def test_read_is_lenient_about_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"text": "one \xe2\x80\xa8 line"}\r\n\r\n  \n'
                     b'{"text": "\\u00e9\\ud83d\\ude42"}')  # no newline at the end
    assert data.read(str(path)) == [("", "one \u2028 line"), ("", "é🙂")]
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert data.read(path) == [("", "a")]


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize("line, message", [
    (b'{"question": "q", "answer": ', r"not JSON \(Expecting value: column 28 .*jq"),
    (b'{"question": "q",\r', r"not JSON \(.*one object per line"),
    (b"[", r"not JSON .*jq -c '\.\[\]'"),
    (b'{"question": ' + b"9" * 5000 + b"}", "not JSON"),
    ([GOOD], "a JSON list, not an object; .*jq"),
    ("text", "a JSON str, not an object"),
    (b"null", "a JSON NoneType, not an object"),
    ({"question": "q", "text": "t"},
     "no field 'answer' among question, text; .*: --fields question,text"),
    ({"question": "q", "anwser": "a"},
     r"no field 'answer' among question, anwser; did you mean 'anwser'\?"),
    ({"question": "q", "answer": 42}, "field 'answer' is not a string; put it in quotes"),
    ({"question": None, "answer": "a"}, "field 'question' is not a string; it is null: fill it"),
    ({"question": [{"role": "user"}], "answer": "a"}, "field 'question' is not a string; a list"),
    (b'{"question": "q", "answer": ' + b"[" * 99999 + b"]" * 99999 + b"}", "JSON nested too"),
    ({"question": "q", "answer": " \n"}, "field 'answer' is empty; fill it or remove the record"),
    ({"question": "", "answer": "a"}, "field 'question' is empty"),
    ({"question": "q", "answer": "\ud83d"}, "field 'answer' holds half a surrogate pair"),
    (b'{"question": "q", "answer": "caf\xe9"}', "not UTF-8; .*iconv"),
])
def test_read_errors_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", GOOD, b"", GOOD, line, GOOD)
    with pytest.raises(ValueError, match=rf"d\.jsonl:4: {message}") as e:
        data.read(path)
    assert "\n" not in str(e.value)


def test_read_errors_of_whole_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        data.read(tmp_path / "nowhere.jsonl")
    for blank in (b"", b"\n \r\n", b"\xef\xbb\xbf\n"):
        with pytest.raises(ValueError, match=r"d\.jsonl: no records; give one JSON object"):
            data.read(write(tmp_path / "d.jsonl", blank))
    with pytest.raises(ValueError, match=r"d\.jsonl:1: no known fields among a, b; .*: "
                       "--fields a,b$"):
        data.read(write(tmp_path / "d.jsonl", {"a": "1", "b": "2"}))
    for content, message in [
            (b"PK\x03\x04", "zip"), (b"BZh91AY", "bzip2: bzip2 -dc"),
            (b"<!DOCTYPE html>", "a web page: download"),
            (b"version https://git-lfs.github.com/spec/v1", "Git LFS.*git lfs pull"),
            ('{"a": 1}'.encode("utf-16"), "UTF-16: iconv -f UTF-16 "),
            ('{"a": 1}'.encode("utf-16-le"), "UTF-16 or no text: iconv -f UTF-16LE"),
            (json.dumps(GOOD, indent=1).encode(), r"one is spread over several lines: jq -c \. ")]:
        (tmp_path / "d.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"d\.jsonl.*: .*{message}"):
            data.read(tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: no field '' among a"):
        data.read(write(tmp_path / "d.jsonl", {"a": "1"}), fields="a,")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: field 'input' is not a string"):
        data.read(write(tmp_path / "d.jsonl", {"instruction": "i", "input": [1], "output": "o"}))


# other files, other records -----------------------------------------------------------------------

ROWS = [{"question": "q", "answer": "a, \"b\"\nc"}, {"question": "é🙂", "answer": " 2 "}]


def csv_of(rows, delimiter=","):
    """CSV by hand: every text in double quotes, a double quote twice."""
    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "\r\n".join(delimiter.join('"%s"' % text.replace('"', '""') for text in line)
                       for line in lines).encode() + b"\r\n"


FILES = {"lines.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
         "array.json": json.dumps(ROWS).encode(),
         "indented.json": json.dumps(ROWS, indent=2).encode(),
         "mark.json": b"\xef\xbb\xbf\n [" + json.dumps(ROWS)[1:].encode(),
         "table.csv": csv_of(ROWS), "mark.csv": b"\xef\xbb\xbf" + csv_of(ROWS),
         "table.tsv": csv_of(ROWS, "\t")}


@pytest.mark.parametrize("packed", [False, True, "parts"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds(tmp_path, name, packed):
    """The same records, whatever holds them; a .gz may consist of several parts."""
    content, path = FILES[name], tmp_path / (name + ".gz" * bool(packed))
    half = len(content) // 2
    path.write_bytes(content if not packed else gzip.compress(content) if packed is True else
                     gzip.compress(content[:half]) + gzip.compress(content[half:]))
    assert data.read(path) == [tuple(row.values()) for row in ROWS]


PYARROW = "pyarrow is missing, so that no Parquet is read: pip install pyarrow"


def test_parquet(tmp_path):
    """As pyarrow writes it, in each of its compressions, in several groups and batches of rows."""
    parquet = pytest.importorskip("pyarrow.parquet", reason=PYARROW)
    from pyarrow import Table
    chat = {"messages": [turn("user", "q"), turn("assistant", "a")]}
    path = tmp_path / "d.parquet"
    for rows, expected in (ROWS, [tuple(row.values()) for row in ROWS]), (
            [chat], [(chat["messages"][:1], "a")]), (
            [{"instruction": "i", "input": None, "output": "o", "id": 7}], [("i", "o")]):
        for compression in "none", "snappy", "gzip", "zstd", "brotli", "lz4":
            parquet.write_table(Table.from_pylist(rows * 1500), path, row_group_size=700,
                                compression=compression)
            assert data.read(path) == expected * 1500
    path.rename(tmp_path / "of_any_name")
    assert data.read(tmp_path / "of_any_name") == [("i", "o")] * 1500


def test_parquet_errors_say_where(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason=PYARROW)
    from pyarrow import Table
    path, rows = tmp_path / "d.parquet", [{"question": "q", "answer": "a"}] * 1001
    parquet.write_table(Table.from_pylist([*rows, {"question": "q", "answer": ""}]), path)
    with pytest.raises(ValueError, match="d.parquet: record 1002: field 'answer' is empty"):
        data.read(path)
    parquet.write_table(Table.from_pylist([{"question": "q", "answer": 7}]), path)
    with pytest.raises(ValueError, match="d.parquet: record 1: field 'answer' is not a string"):
        data.read(path)
    parquet.write_table(Table.from_pylist(rows[:0], Table.from_pylist(rows).schema), path)
    with pytest.raises(ValueError, match="d.parquet: no records"):
        data.read(path)
    parquet.write_table(Table.from_pylist(rows), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="d.parquet: damaged Parquet.*copy it again$"):
        data.read(path)


def test_parquet_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and more")
    with pytest.raises(ValueError, match="d.parquet: .* needs the pyarrow .*: pip install pyarrow"):
        data.read(tmp_path / "d.parquet")


def packed(content):
    """A .gz that does not hold the time: the names of tests are the same in every process."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize("name, content, message", [
    ("d.csv", b"question,answer\na,b,c\n", r"d.csv:2: 3 columns, but 2 names"),
    ("d.csv", b"question,answer\na\n", r"d.csv:2: 1 columns, but 2 names"),
    ("d.csv", b'question,answer\n"a","b', "d.csv:2: not CSV .unexpected end"),
    ("d.csv", b"answer,answer\na,b\n", "d.csv:1: a name stands twice.*: answer, answer"),
    ("d.csv", b"question,answer\na,\n", "d.csv:2: field 'answer' is empty"),
    ("d.csv", b"question,answer\na,caf\xe9\n", "d.csv: not UTF-8; .*iconv"),
    ("d.csv", b"question,answer\n", "d.csv: no records"),
    ("d.json", b'[{"question": "q"', "d.json: not a JSON array .Expecting"),
    ("d.json", b"[" * 99999, "d.json: not a JSON array .nested too deeply"),
    ("d.json", b'[{"question": "q", "answer": "a"}, 3]', "d.json: record 2: a JSON int, not"),
    ("d.json", b"[]", "d.json: no records"),
    ("d.gz", packed(b'{"text": "a"}')[:-9], "d.gz: a .gz that is cut short"),
    ("d.gz", packed(b'{"text": "a"}')[:10] + b"\xff" * 99, "d.gz: damaged gzip"),
    ("d.gz", packed(b"PAR1" * 9), "d.gz: unpacked it is neither JSON nor"),
    ("d.gz", packed(b'{"text": "a"}\n{"text": 3}'), "d.gz:2: field 'text' is not a string"),
])
def test_errors_of_other_kinds(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        data.read(tmp_path / name)
    assert "\n" not in str(e.value)


def packed_often(content, times, path):
    """Write a .gz of `content`, repeated; returns how many bytes it has."""
    stream = zlib.compressobj(6, zlib.DEFLATED, 31)
    path.write_bytes(b"".join(stream.compress(content) for _ in range(times)) + stream.flush())
    return path.stat().st_size


def test_a_gzip_bomb_is_refused_early(tmp_path, monkeypatch):
    """Of spaces, 1029 times its size: little more than SMALL bytes of memory, however large."""
    monkeypatch.setattr(records, "SMALL", 2**24)
    size = packed_often(b" " * 2**20, 256, tmp_path / "d.jsonl.gz")
    assert 2**28 > 1000 * size
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"d.jsonl.gz: its first 65,536 .* unpack to .*gzip -dc"):
        data.read(tmp_path / "d.jsonl.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**26                                      # of 64 KiB: at most 2**26
    monkeypatch.undo()
    text = json.dumps({"text": "a" * 2**20})                     # 1000 times, but small
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert data.read(tmp_path / "d.jsonl.gz") == [("", "a" * 2**20)]


@pytest.mark.parametrize("lines, ratio", [(1, 290), (40, 290)])
def test_the_same_chat_again_and_again_is_no_bomb(tmp_path, monkeypatch, lines, ratio):
    """Equal records, the worst that honest data can be: more than 200 times its size is read."""
    monkeypatch.setattr(records, "SMALL", 0)
    chat = {"messages": [turn("user", "What is 2 + 3?"), turn("assistant", "2 + 3 = 5. #### 5")]}
    if lines > 1:
        chat["messages"].insert(0, turn("system", "You are a helpful assistant.\n" * lines))
    line, path = json.dumps(chat).encode() + b"\n", tmp_path / "d.jsonl.gz"
    times = 10**8 // len(line) // 1000
    size = packed_often(line * 1000, times, path)
    assert ratio * size < 1000 * times * len(line) < records.RATIO * size
    assert records.unpacked(path) == line * 1000 * times


def test_a_gzip_with_zeros_behind_it(tmp_path):
    """Tapes and some tools fill the last block; between the parts zeros may stand, too."""
    part = packed(b'{"text": "a"}\n')
    (tmp_path / "d.gz").write_bytes((part + bytes(70_000)) * 2)
    assert data.read(tmp_path / "d.gz") == [("", "a")] * 2


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, U1, A1, U2, A2 = (turn("system", "s"), turn("user", "1"), turn("assistant", "2"),
                          turn("user", "3"), turn("assistant", "4"))
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
             "value": m["content"]} for m in (SYSTEM, U1, A1, U2, A2)]


@pytest.mark.parametrize("record, expected", [
    ({"messages": [U1, A1]}, ([U1], "2")),
    ({"messages": [SYSTEM, U1, A1, U2, A2]}, ([SYSTEM, U1, A1, U2], "4")),
    ({"messages": [U1, A1, U2]}, ([U1], "2")),                             # nothing to learn behind
    ({"conversations": SHAREGPT}, ([SYSTEM, U1, A1, U2], "4")),
    ({"conversations": [SYSTEM, U1, A1]}, ([SYSTEM, U1], "2")),
    ({"messages": [{**U1, "name": "Tom"}, A1], "id": 3}, ([U1], "2")),
    ({"prompt": "1", "completion": "2"}, ("1", "2")),
    ({"prompt": [U1], "completion": [A1]}, ([U1], "2")),
    ({"instruction": "3", "input": "x", "output": "4", "system": "s", "history": [["1", "2"]]},
     ([SYSTEM, U1, A1, turn("user", "3\nx")], "4")),
    ({"instruction": "1", "output": "2", "system": "s"}, ([SYSTEM, U1], "2")),
    ({"instruction": "1", "output": "2", "system": "", "history": None}, ("1", "2")),
])
def test_read_conversations(tmp_path, record, expected):
    assert data.read(write(tmp_path / "d.jsonl", record)) == [expected]


def test_fields_win_over_conversations(tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": [U1, A1], "a": "x", "b": "y"})
    assert data.read(path, "a,b") == [("x", "y")]


@pytest.mark.parametrize("record, message", [
    ({"messages": "hello"}, "messages: of type str, not a list of messages"),
    ({"messages": []}, "no question with an answer of the assistant; remove the record"),
    ({"messages": [U1]}, "no question with an answer"), ({"messages": [A1]}, "no question with an"),
    ({"messages": [U1, 3]}, "messages: message 2: of type int, not an object with"),
    ({"messages": [U1, turn("tool", "x")]}, "messages: message 2: the role 'tool' is not known"),
    ({"messages": [U1, turn("assistant", None)]}, "message 2: field 'content' is not a string"),
    ({"messages": [U1, turn("assistant", [{}])]}, "message 2: field 'content' is not a string"),
    ({"messages": [U1, turn("assistant", " ")]}, "message 2: field 'content' is empty"),
    ({"messages": [{"content": "x"}, A1]}, "message 1: no field 'role' among content"),
    ({"conversations": [{"from": "human"}, A1]}, "message 1: no field 'value' among from"),
    ({"instruction": "1", "output": "2", "history": ["x"]}, "'history' is not a list of .ques"),
    ({"instruction": "1", "output": "2", "history": [["x", 3]]}, "history: message 2: field"),
])
def test_errors_of_conversations(tmp_path, record, message):
    path = write(tmp_path / "d.jsonl", {"messages": [U1, A1]}, record)
    with pytest.raises(ValueError, match=f"d.jsonl:2: .*{message}") as e:
        data.read(path)
    assert "\n" not in str(e.value)


# encode, split, batches ---------------------------------------------------------------------------

def test_encode_masks_exactly(tok):
    question, answer = "What {is} {0} {instruction}?", "17 {apples}\n#### 17"
    [(ids, n_prompt)], truncated, dropped = data.encode([(question, answer)], tok, 10_000)
    assert (truncated, dropped) == (0, 0)
    assert ids[0] == tok.bos and ids[-1] == tok.eos and ids.count(tok.eos) == 1
    assert tok.decode(ids[n_prompt:]) == answer
    assert tok.decode(ids[:n_prompt]) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhat {is} {0} {instruction}?\n\n### Response:")
    assert ids[:n_prompt] == data.prompt_ids(question, tok)
    # The mask depends on neither side's neighbour: same prompt and response, same tokens.
    [(other, n)], _, _ = data.encode([(question, "ab")], tok, 10_000)
    assert n == n_prompt and other[:n] == ids[:n]
    assert other[n:] == [*tok.encode("ab"), tok.eos]


def test_encode_plain_text(tok):
    encoded, *counts = data.encode([("", "Once upon a time")], tok, 100)
    assert encoded == [([tok.bos, *tok.encode("Once upon a time"), tok.eos], 1)]
    assert counts == [0, 0]


def test_encode_truncates_and_counts(tok):
    pair = ("q", "a long response " * 5)
    [(full, n_prompt)], _, _ = data.encode([pair], tok, 10_000)
    for limit, truncated, dropped in [(len(full), 0, 0), (len(full) - 1, 1, 0),
                                      (n_prompt + 1, 1, 0), (n_prompt, 0, 1), (1, 0, 1)]:
        encoded, *counts = data.encode([pair], tok, limit)
        assert counts == [truncated, dropped]
        assert encoded == ([] if dropped else [(full[:limit], n_prompt)])
    encoded, *counts = data.encode([("q" * 900, "a"), ("", "a"), pair], tok, n_prompt + 2)
    assert (len(encoded), counts) == (2, [1, 1])


def test_split():
    examples = list(range(100))
    train, val = data.split(examples, 0.1, seed=0)
    assert len(val) == 10 and sorted(train + val) == examples
    assert data.split(examples, 0.1, seed=0) == (train, val)
    assert data.split(examples, 0.1, seed=1) != (train, val)
    for n, fraction, expected in [(100, 0, 0), (100, 1e-6, 1), (3, .99, 2), (1, 0.5, 0), (0, 0, 0)]:
        train, val = data.split(examples[:n], fraction, seed=0)
        assert (len(train), len(val)) == (n - expected, expected)
    for fraction in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match=r"in \[0, 1\), not"):
            data.split(examples, fraction, seed=0)


def test_batches_are_a_function_of_seed_and_epoch():
    examples = list(range(103))
    global_state = torch.get_rng_state()
    epochs = {(s, e): data.batches(examples, 10, s, e) for s in range(4) for e in range(4)}
    assert torch.equal(torch.get_rng_state(), global_state)
    orders = set()
    for (seed, epoch), made in epochs.items():
        assert [len(b) for b in made] == [10] * 10 + [3]
        assert sorted(sum(made, [])) == examples
        assert made == data.batches(examples, 10, seed, epoch)
        orders.add(tuple(sum(made, [])))
    assert len(orders) == 16  # no two of them alike: not seed + epoch
    assert tuple(examples) not in orders


# micro_batches ------------------------------------------------------------------------------------

def test_micro_batch_by_hand():
    batch = [([1, 10, 2], 1), ([1, 20, 21, 30, 2], 3)]
    [(tokens, labels, where_text)] = data.micro_batches(batch, 8, pad=9)
    assert tokens.tolist() == [[1, 20, 21, 30], [1, 10, 9, 9]]
    assert labels.tolist() == [[-100, -100, 30, 2], [10, 2, -100, -100]]
    assert where_text.tolist() == [0, 1, 2, 3, 4, 5]
    assert tokens.dtype == labels.dtype == where_text.dtype == torch.int64
    assert [t.tolist() for t, *_ in data.micro_batches(batch, 7)] == [[[1, 20, 21, 30]], [[1, 10]]]


def random_batch(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 60, (n,), generator=g).tolist()
    return [(torch.randint(3, 50, (k,), generator=g).tolist(), 1 + i % (k - 1))
            for i, k in enumerate(lengths)]


@pytest.mark.parametrize("cells", [1, 60, 200, 10_000])
def test_micro_batches_hold_every_example_once(cells):
    batch, seen = random_batch(33), []
    untouched = [(list(ids), n) for ids, n in batch]
    for tokens, labels, where_text in data.micro_batches(batch, cells, pad=0):
        assert tokens.shape == labels.shape and (tokens.numel() <= cells or len(tokens) == 1)
        assert where_text.tolist() == [i for i, t in enumerate(tokens.flatten().tolist()) if t]
        for row, label in zip(tokens.tolist(), labels.tolist()):
            length = len(row) - row.count(0)
            assert row[length:] == [0] * (len(row) - length)
            learnt = [t for t in range(len(row)) if label[t] != -100]
            assert learnt == list(range(learnt[0], length))  # from the response to the end
            assert all(label[t] == row[t + 1] for t in learnt[:-1])
            seen.append((row[:length] + [label[length - 1]], learnt[0] + 1))
    assert sorted(seen) == sorted(batch)
    assert batch == untouched


def test_sorting_saves_padding():
    batch = random_batch(64)

    def padded(groups):
        return sum(len(g) * (max(len(ids) for ids, _ in g) - 1) for g in groups)

    made = data.micro_batches(batch, 8 * 58)
    real, ours = padded([[e] for e in batch]), sum(tokens.numel() for tokens, *_ in made)
    assert sum(len(where) for *_, where in made) == real
    unsorted = padded([batch[i:i + 8] for i in range(0, 64, 8)])
    assert ours < 1.2 * real < 1.5 * real < unsorted
    assert [t.shape[1] for t, *_ in made] == sorted((t.shape[1] for t, *_ in made), reverse=True)
    assert len(made) < 8                          # more than 8 of the shorter ones in one of them


def test_gradient_does_not_depend_on_the_cut():
    """A causal toy model (running mean of embeddings), its loss averaged over the whole batch."""
    batch, grads = random_batch(13), []
    table = torch.randn(50, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learnt = sum(len(ids) - n for ids, n in batch)
    for cells, pad in [(1, 0), (240, 0), (240, 7), (1000, 2)]:
        weight, count = table.clone().requires_grad_(), 0
        for tokens, labels, _ in data.micro_batches(batch, cells, pad):
            steps = torch.arange(1, tokens.shape[1] + 1)[:, None]
            logits = weight[tokens].cumsum(1) / steps                            # (b, T, V)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss / learnt).backward()
            count += (labels != -100).sum().item()
        assert count == learnt
        grads.append(weight.grad)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])


# Final answers ------------------------------------------------------------------------------------

@pytest.mark.parametrize("after, expected", [
    ("18", "18"), ("$1,234.50", "1234.50"), ("-3", "-3"), ("+7", "7"), ("1,234,567", "1234567"),
    ("3/4", "3/4"), ("0.5", "0.5"), (".5", ".5"), ("12 apples", "12"), (r"\boxed{7}", "7"),
    ("**42**", "42"), ("42.", "42"), ("50%", "50"), ("−3", "-3"), ("-$5", "-5"), ("$-5", "-5"),
    ("x = 9", "9"), ("3, 4 and 5", "3"), ("1,2,3", "1"), ("12,345 or so", "12345"), ("5/hour", "5"),
    ("\n\n 8 \n9", "8"), ("10 - 3 = 7", "10"), ("1,2345", "1"), ("none", None), ("", None),
])
@pytest.mark.parametrize("marker", ["so 2 + 2 = 4.\n#### ", "####", "The answer is: ",
                                    "Thus 99. the ANSWER is "])
def test_final_answer(marker, after, expected):
    assert data.final_answer(marker + after) == expected


@pytest.mark.parametrize("text, expected", [
    ("no marker but 17", None),
    ("", None),
    ("#### 17\n\n### Instruction:\nMore?\n\n### Response: #### 5", "17"),
    ("#### 17\n#### 18", "17"),
    ("The answer is: 17\n\nQuestion: and now? The answer is: 18", "17"),
    ("So the answer is not 3. The answer is: 4", "4"),
    ("The answer is 3, no.\n#### 4", "4"),
    ("The answer is 3\n\n### Instruction:\nNext\n\n### Response: #### 4", "3"),
    ("The answer is: 6 ####", "6"),
    ("I give up ####\n\n### Instruction: Tom has 5", None),
])
def test_final_answer_picks_the_right_marker(text, expected):
    assert data.final_answer(text) == expected


@pytest.mark.parametrize("after, expected", [
    ("18", "18"), ("18.", "18"), ("-3", "-3"), ("+7", "7"), ("$1,234 a year", "1234"),
    ("1,234,567", "1234"), ("1,2345", "12345"), (",5", "5"),
    ("7.5", "8"), ("8.5", "8"), ("0.5", "0"), (".7", "1"), ("-2.6", "-3"), ("1.2.3", "1"),
    ("1,,5", "1"), ("7/2", "4"), ("5/2", "2"), ("-9/4", "-2"), ("1,234/2", "1234"), ("7/0", "7"),
    ("7/00", None), ("/4", None), ("-/4", None), ("none", None), ("", None), ("-$5", "5"),
    ("9" * 400, None), ("-" + "9" * 400, None), ("9" * 400 + "/1", None), ("9" * 5000 + "/1", None),
])
def test_paper_answer(after, expected):
    assert data.paper_answer("So 3. The answer is: 4. No, The answer is: " + after) == expected


@pytest.mark.parametrize("text", ["18", "#### 18", "The answer is 18", "The answer is:18", "",
                                  "the answer is: 18", "The answer is: 18. The answer is: so"])
def test_no_paper_answer(text):
    assert data.paper_answer(text) is None


# Of each: what a person writes, the number that is meant (None: no number), and whether it can be
# a reference.
WRITTEN = [
    (r"$-\frac{1}{2}$", "-1/2", True), (r"\frac{3}{4}", "3/4", True), (r"\dfrac34", "3/4", True),
    (r"\tfrac{3}4", "3/4", True), (r"$2\frac{1}{2}$", "5/2", True), (r"\frac{-1}{2}", "-1/2", True),
    (r"\left(\frac{1}{2}\right)", "1/2", True), (r"\dfrac{1{,}000}{3}", "1000/3", True),
    ("9{,}500", "9500", True), ("$9{,}500.", "9500", True), (r"10,\!000", "10000", True),
    (r"10\,000", "10000", True), ("1 000", "1000", True), ("1\u00a0000\u00a0000", "1000000", True),
    ("1,00,000", "100000", True), ("2 1/2", "5/2", True), ("2 and 1/2 cups", "5/2", True),
    ("-2 1/2", "-5/2", True), ("2½", "5/2", True), ("-½", "-1/2", True), ("1 / 2", "1/2", True),
    ("1/1,000", "1/1000", True), ("- 5", "-5", True), ("\u20135", "-5", True),
    ("−5", "-5", True), ("-$5", "-5", True), ("-€5", "-5", True), ("-(5)", "-5", True),
    ("1e3", "1000", True), ("1.5E-3", "3/2000", True), ("2^{10}", "1024", True),
    (r"1.5 \times 10^{6}", "1500000", True), ("1.5 × 10^6", "1500000", True),
    ("1.5 million dollars", "1500000", True), (r"50\%", "50", True), (r"$\$5$", "5", True),
    (r"\(5\)", "5", True), (r"$\boxed{-\frac{7}{3}}$", "-7/3", True), ("**$5**", "5", True),
    (r"25 \text{ cm}^2", "25", True), (r"90^{\circ}", "90", True), (r"x=\frac{1}{3}", "1/3", True),
    (r"\[\textbf{5}\]", "5", True), ("5-inch", "5", True), ("72 clips in April.", "72", True),
    (r"3\sqrt{13}", None, False), ("[2,5)", None, False), ("(2, 3)", None, False),
    (r"2\pi", None, False), (r"\frac{\pi}{2}", None, False), ("11_{2}", None, False),
    (r"0.\overline{3}", None, False), ("2x+3", None, False), ("2 x 3", None, False),
    ("3i", None, False), ("2k", None, False), ("3R^2", None, False), ("5m", "5", True),
    ("3:30", None, False), ("6:1", None, False), ("1.2.3", None, False),
    ("1'000", None, False), (r"\text{Monday}", None, False), ("about 5", None, False),
    (r"\pm 5", None, False), ("2²", None, False), ("1234567890^9", None, False),
    ("9" * 5000, None, False), ("1e9999", None, False), ("5 or 6", "5", False),
    ("10 - 3 = 7", "10", False), ("5 hours and 30 minutes", "5", False), ("5!", "5", False),
    ("2+3i", "2", False), ("3,5", "3", False), ("0.333...", "0.333", False)]


@pytest.mark.parametrize("text, means, is_reference", WRITTEN, ids=[t[:20] for t, *_ in WRITTEN])
def test_numbers_as_people_write_them(text, means, is_reference):
    for marker in ("#### ", "So 99. The final answer is: ", "The final answer is "):
        answer = data.final_answer(marker + text)
        assert (answer is None) == (means is None)
        assert means is None or data.same_answer(answer, means) and "," not in answer
        if is_reference:
            assert data.references([("q", marker + text)], "f") == [answer]
        else:
            with pytest.raises(ValueError, match="^f: record 1: "):
                data.references([("q", marker + text)], "f")


@pytest.mark.parametrize("text, expected", [
    ("#### Step 1: Count\n3 + 4 = 7\n#### Step 2: Double\n7 * 2 = 14\n#### 14", "14"),
    ("#### 1. Count\n3 + 4 = 7\n#### 2) Double\n#### 14", "14"), ("##### 5", "5"),
    ("#### Solution\nShe buys 3 boxes of 4.\nThe answer is: 12", "12"),
    ("#### none\n\nQuestion: Tom has 12 apples", None), ("The final answer is 18", "18"),
    (r"So \boxed{\frac{3}{4}}, not \boxed{9}", "3/4"), (r"\boxed{x + 1} is \boxed{7}", "7"),
    (r"The final answer is: $\boxed{5}$. I hope it is correct 1.", "5"), (r"\boxed 5", None),
    ("**The answer is:** 5", "5"), ("The answer is\n\n$$5$$", "5"), ("The answer is — 5", "5")])
def test_only_a_number_makes_a_marker(text, expected):
    assert data.final_answer(text) == expected


@pytest.mark.parametrize("text", [
    "#### " * 20000, "#### " + " " * 10**5 + "x", r"\boxed{" * 15000, r"\frac{" * 15000,
    "#### " + "1," * 50000, "#### " + "123 " * 25000, "^" + " " * 10**5, "#### " + "a= " * 30000,
    "####(1,2 " * 10000, r"\frac{" + "9" * 10**5], ids=lambda text: text[:9])
def test_no_response_takes_long(text):
    """Linear in its length: a thousandth of a second here, some minutes if it were quadratic."""
    start = time.perf_counter()
    data.final_answer(text)
    assert time.perf_counter() - start < 1


@needs(GSM8K)
def test_openais_verdicts():
    """OpenAI graded 5,276 solutions of four models."""
    judged = different = 0
    for line in (GSM8K / "example_model_solutions.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line.replace("\\nA: ", "\\n#### "))
        [reference] = data.references([("", row.pop("ground_truth"))], "f")
        for solution in (value for value in row.values() if isinstance(value, dict)):
            right = data.same_answer(data.final_answer(solution["solution"]), reference)
            judged, different = judged + 1, different + (right != solution["is_correct"])
    assert (judged, different) == (5276, 0)


def test_references():
    assert data.references([("", "#### 1,000"), ("", "The answer is: 1/2")], "f") == ["1000", "1/2"]
    for bad in ("So it is blue.", "#### 1/0", "7"):
        with pytest.raises(ValueError, match="^f.jsonl: record 2: .* names no number .*" + bad):
            data.references([("a", "#### 1"), ("b", bad), ("c", "####")], "f.jsonl")


def test_prompt_ids_begin_the_answer(tok):
    ids = data.prompt_ids("1 + 1?", tok, data.STEPS)
    assert ids[0] == tok.bos and ids[1:] == tok.encode(
        data.PROMPT.format(instruction="1 + 1?") + " Let's think step by step.")
    assert data.prompt_ids("", tok) == [tok.bos]
    assert data.prompt_ids("", tok, data.STEPS) == [tok.bos, *tok.encode(data.STEPS)]


@pytest.mark.parametrize("a, b, same", [
    ("1,234", "1234.0", True), ("1/2", "0.5", True), (".5", "0.50", True), ("-3", "-3.0", True),
    ("1234567", "1,234,567", True), ("007", "7", True), ("10/2", "5", True), ("0.1", "1/10", True),
    ("1/3", "0.333333333333333333", False), ("3", "-3", False), ("1", "1.0000001", False),
    ("5/0", "5", False), ("5/0", "5/0", False), ("5", None, False), (None, None, False),
    ("", "", False), ("1e3", "1000", True), ("1e999999999", "1", False), ("9" * 9999, "9", False),
])
def test_same_answer(a, b, same):
    assert data.same_answer(a, b) is same
    assert data.same_answer(b, a) is same


@needs(GSM8K)
@pytest.mark.parametrize("name, count", [("train", 7473), ("test", 1319)])
def test_every_gsm8k_reference_parses(name, count):
    examples = data.read(GSM8K / f"{name}.jsonl")
    assert len(examples) == count == len(data.references(examples, name))
    for _, answer in examples:
        reference = answer.split("#### ")[1]
        found = data.final_answer(answer)
        assert found == reference.replace(",", "").strip()
        assert data.same_answer(found, reference.strip())
        assert Fraction(found).denominator == 1
