"""Read the records of a data file, and make (prompt, response) of each.

A file is told by its content: JSON lines, one JSON array of objects, CSV (by its name), parquet; or
any of the first three compressed by gzip. A record is told by its keys: two strings, one text, or a
conversation. The prompt of a conversation is a list of {"role": ..., "content": ...}, the messages
before the last answer.
"""
import csv
import io
import json
import zlib

from formats import jsonl

FIELDS = [("instruction", "output"), ("query", "response"), ("question", "answer"),
          ("prompt", "completion"), ("text",)]
CHATS = ("messages", "conversations")            # fields that hold a list of messages
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant"}                     # OpenAI's names, ShareGPT's names
# Any .gz may unpack to so many bytes. Beyond that, at most to so many times what was read of it: a
# million equal chats have 294 times, with one long system message 316, and gzip's limit is 1032.
SMALL, RATIO = 2**29, 400


# From a record to (prompt, response) --------------------------------------------------------------

def examples(path, fields=None):
    """A list of (prompt, response) of a file. See data.read, whose arguments these are."""
    named = tuple(name.strip() for name in fields.split(",")) if fields else None
    names, found, unused = named, [], {}
    for where, record in rows(path):
        if not named and (chat := conversation(record, where)):
            example, used = chat
        else:
            names = names or next((f for f in FIELDS if record.keys() >= set(f)), None)
            example, used = pair(record, names, where)
        found.append(example)
        unused.update((name, None) for name, value in record.items()
                      if name not in used and value not in jsonl.EMPTY)
    if not found:
        raise ValueError(f"{path}: no records; give one JSON object per line")
    if unused:
        print(jsonl.filled(f"note: {path}: columns that are not used: {jsonl.columns(unused)}; say "
                           f"which to use: {jsonl.naming(record)}"))
    return found


def pair(record, names, where):
    """((prompt, response), names of the fields that were used) of a record without messages."""
    if names is None:
        raise ValueError(f"{where}: no known fields among {jsonl.columns(record)}; say which hold "
                         f"the prompt and the answer: {jsonl.naming(record)}")
    *asked, last = names
    asked += ["input"] * (names == FIELDS[0] and "input" in record)
    prompt = [jsonl.string(record, name, where, len(asked) > 1) for name in asked]
    if asked and not any(prompt):
        jsonl.string(record, asked[0], where)  # says that it is empty
    response = jsonl.string(record, last, where)
    return ("\n".join(filter(None, prompt)), response), (*asked, last)


def conversation(record, where):
    """((messages, response), names of the fields that were used); None if it is no conversation."""
    for name in CHATS:
        if name in record:
            return turns(messages(record[name], f"{where}: {name}"), where), (name,)
    if isinstance(record.get("prompt"), list) and "completion" in record:          # TRL's
        both = [message for name in ("prompt", "completion")
                for message in messages(record[name], f"{where}: {name}")]
        return turns(both, where), ("prompt", "completion")
    if record.keys() >= set(FIELDS[0]) and any(
            record.get(name) not in jsonl.EMPTY for name in ("system", "history")):
        return alpaca(record, where), (*FIELDS[0], "input", "system", "history")
    return None


def alpaca(record, where):
    """(messages, response) of a record with "system" or "history", pairs of earlier turns."""
    (prompt, response), _ = pair(record, FIELDS[0], where)
    before = record.get("history") or []
    if not isinstance(before, list) or not all(
            isinstance(turn, list) and len(turn) == 2 for turn in before):
        raise ValueError(f"{where}: field 'history' is not a list of [question, answer]")
    system = jsonl.string({"system": "", **record}, "system", where, True)
    found = [{"role": "system", "content": system}] * bool(system)
    found += messages([{"role": role, "content": text} for turn in before for role, text in
                       zip(("user", "assistant"), turn, strict=True)], f"{where}: history")
    return [*found, {"role": "user", "content": prompt}], response


def messages(value, where):
    """[{"role", "content"}] of a list of messages, under these names or ShareGPT's."""
    if not isinstance(value, list):
        raise ValueError(f"{where}: of type {type(value).__name__}, not a list of messages")
    found = []
    for n, message in enumerate(value, 1):
        at = f"{where}: message {n}"
        if not isinstance(message, dict):
            raise ValueError(f"{at}: of type {type(message).__name__}, not an object with role "
                             "and content")
        names = ("from", "value") if "from" in message else ("role", "content")
        role = jsonl.string(message, names[0], at)
        if role not in ROLES:
            raise ValueError(f"{at}: the role {jsonl.columns([role])!r} is not known; known are "
                             f"{', '.join(ROLES)}")
        empty = ROLES[role] == "system"                     # an empty system message is common
        found.append({"role": ROLES[role],
                      "content": jsonl.string(message, names[1], at, empty)})
    return found


def turns(found, where):
    """(messages, response): cut at the last answer, because nothing is learnt behind it."""
    while found and found[-1]["role"] != "assistant":
        found = found[:-1]
    if not found[1:]:
        raise ValueError(f"{where}: no question with an answer of the assistant; remove the record")
    return found[:-1], found[-1]["content"]


# From a file to records ---------------------------------------------------------------------------

def rows(path):
    """Yield ("file:line" or "file: record n", record as a dict)."""
    with open(path, "rb") as file:
        head = file.read(1000)
    name = str(path).lower().removesuffix(".gz")
    if head.startswith(b"PAR1"):
        return parquet(path)
    packed = head.startswith(b"\x1f\x8b")
    content = unpacked(path) if packed else b""
    start = (content or head)[:1000].lstrip(b"\xef\xbb\xbf \t\r\n")
    plain = not start.startswith(tuple(jsonl.KINDS)) and b"\0" not in start
    if plain and (name.endswith((".csv", ".tsv")) or start.startswith(b"[")):
        if not packed:
            with open(path, "rb") as file:
                content = file.read()
        text = decoded(content, path)
        return table(text, path, "\t" if name.endswith(".tsv") else ",") if name.endswith(
            (".csv", ".tsv")) else array(text, path)
    if packed and not plain:
        raise ValueError(f"{path}: unpacked it is neither JSON nor a table; gzip -dc shows it")
    return jsonl.records(path, io.BytesIO(content) if packed else None)


def unpacked(path):
    """The bytes in a .gz. ValueError if it is damaged, or unpacks to far more than its size."""
    found, used, stream = io.BytesIO(), 0, zlib.decompressobj(wbits=31)
    with open(path, "rb") as file:
        while piece := file.read(2**16):                 # at most 64 MiB unpacked
            used += len(piece)
            while piece := piece.lstrip(b"\0") if stream.eof else piece:
                if stream.eof:                           # a .gz may hold several parts
                    stream = zlib.decompressobj(wbits=31)
                try:
                    found.write(stream.decompress(piece))
                except zlib.error as e:
                    raise ValueError(f"{path}: damaged gzip ({e}); copy it again") from None
                piece = stream.unused_data
            if found.tell() > max(SMALL, RATIO * used):
                raise ValueError(f"{path}: its first {used:,} bytes unpack to {found.tell():,}; if "
                                 f"that is right: gzip -dc {path} > {path}.new")
    if not stream.eof:
        raise ValueError(f"{path}: a .gz that is cut short; copy it again")
    return found.getvalue()


def decoded(content, path):
    """UTF-8 bytes as a str, less the byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; if it is Latin-1: iconv -f LATIN1 -t UTF-8 {path} > "
                         f"{path}.new") from None


def array(text, path):
    """Yield the objects of one JSON array; or those of lines, if the first line is an array."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise ValueError(f"{path}: not a JSON array ({reason}); give an array of objects, or one "
                         "object per line") from None
    for n, record in enumerate(found, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {n}: a JSON {type(record).__name__}, not an object")
        yield f"{path}: record {n}", record


def table(text, path, delimiter):
    """Yield the rows of CSV or TSV as {name in the first row: str}."""
    csv.field_size_limit(2**31 - 1)                 # the default, 128 KiB, is less than a long text
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(lines, [])
        if len(set(names)) < len(names):
            raise ValueError(f"{path}:1: a name stands twice in the first row: "
                             f"{jsonl.columns(names)}")
        for row in lines:
            where = f"{path}:{lines.line_num}"
            if row and len(row) != len(names):
                raise ValueError(f"{where}: {len(row)} columns, but {len(names)} names in the "
                                 "first row; a text with commas or newlines needs double quotes")
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as e:
        raise ValueError(f"{path}:{lines.line_num}: not CSV ({e})") from None


def parquet(path):
    """Yield the rows of a parquet file, batch by batch."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: a Parquet file needs the pyarrow package: pip install pyarrow"
                         ) from None
    n = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1000):
            for record in batch.to_pylist():
                n += 1
                yield f"{path}: record {n}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        reason = str(e).partition("\n")[0][:100]
        raise ValueError(f"{path}: damaged Parquet ({reason}); copy it again") from None
