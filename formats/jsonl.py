"""Read and write jsonl. A file or a line that is none is refused with what it is, and with
what makes jsonl of it."""
import difflib
import json
import re
import textwrap

from support.files import written

# How other kinds of files begin, what they are, and what makes jsonl of FILE.
TABLE = ("python -c \"import pandas; pandas.read_KIND('FILE').to_json('FILE.jsonl', "
         "orient='records', lines=True)\"")
KINDS = {b"PAR1": ("a Parquet file", TABLE.replace("KIND", "parquet")),
         b"ARROW1": ("an Arrow file", TABLE.replace("KIND", "feather")),
         b"\x1f\x8b": ("compressed by gzip", "gzip -dc FILE > FILE.new"),
         b"BZh": ("compressed by bzip2", "bzip2 -dc FILE > FILE.new"),
         b"\xfd7zXZ": ("compressed by xz", "xz -dc FILE > FILE.new"),
         b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -dc FILE > FILE.new"),
         b"PK\x03\x04": ("a zip archive", "unzip FILE"),
         b"\xff\xfe\x00\x00": ("UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > FILE.new"),
         b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.new"),
         b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.new"),
         b"version https://git-lfs": ("Git LFS's pointer to the file", "git lfs pull"),
         b"<": ("a web page", "download the file itself")}
EMPTY = (None, "", [], {})
# A terminal obeys these: control characters, ends of lines, marks that turn a text around.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text, keep="\n\t"):
    """A text of others, harmless for a terminal: an escape is shown as \\x1b."""
    return CONTROL.sub(lambda m: m[0] if m[0] in keep else ascii(m[0])[1:-1], text)


def naming(record):
    """How to say which fields to use, by the names of this one."""
    return f"--fields {','.join([*(printable(name, '') for name in record), 'answer'][:2])}"


def counted(n, what):
    """1 example, 2 examples"""
    return f"{n:,} {what}{'s' * (n != 1)}"


def filled(text, indent="  ", width=79):
    """A text for people in lines of at most `width` columns. A longer line goes on after `indent`.
    It is broken at spaces only, so a long path stays whole."""
    return "\n".join(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False,
                                   break_on_hyphens=False) for line in text.splitlines())


def records(path, opened=None):
    """Yield ("file:line", record as a dict) of every line that is not blank.

    opened: the content of the file, as a binary file, if it is not what stands on the disk.
    """
    with opened or open(path, "rb") as file:  # bytes: bad encoding then has a line number, too
        if (head := file.read(1000)).startswith(tuple(KINDS)) or b"\0" in head:
            raise ValueError(f"{path}: {other_kind(path)}")
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):  # neither blank nor a byte order mark alone
                yield f"{path}:{number}", record(line, f"{path}:{number}")


def write_lines(path, rows):
    """Write a jsonl file; it appears when all rows are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as tmp, open(tmp, "w", encoding="utf-8") as file:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), file=file)


def other_kind(path):
    """What a file is that should be UTF-8, and what to do."""
    with open(path, "rb") as file:
        head = file.read(1000)
    kind, remedy = next((kind for start, kind in KINDS.items() if head.startswith(start)), (
        ("UTF-16 or no text", "iconv -f UTF-16LE -t UTF-8 FILE > FILE.new") if b"\0" in head else
        ("not UTF-8", "if it is Latin-1: iconv -f LATIN1 -t UTF-8 FILE > FILE.new")))
    return f"{kind}: {remedy.replace('FILE', str(path))}"


def record(line, where):
    """The object in a line of bytes."""
    path, start = where.rpartition(":")[0], line.lstrip(b"\xef\xbb\xbf \t")[:1]
    remedy = (f"of an array: jq -c '.[]' {path} > {path}.new" if start == b"[" else
              f"if one is spread over several lines: jq -c . {path} > {path}.new")
    if path.endswith((".csv", ".tsv")):
        remedy = f"of a table: {TABLE.replace('KIND', 'csv').replace('FILE', path)}"
    try:
        content = json.loads(line.decode("utf-8-sig").rstrip())  # -sig: less the byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8; of Latin-1: iconv -f LATIN1 -t UTF-8 {path} > "
                         f"{path}.new") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply; remove the record") from None
    except ValueError as e:
        reason = ("an array over several lines" if start == b"[" else
                  str(e).replace("line 1 ", ""))  # json counts lines, too; we name the file's
        raise ValueError(f"{where}: not JSON ({reason}); give one object per line ({remedy})"
                         ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: a JSON {type(content).__name__}, not an object; give one "
                         f"object per line ({remedy})")
    return content


def string(content, name, where, optional=False):
    """The string under a name. If it is optional, "" for one that is null or blank."""
    if name not in content:
        close = difflib.get_close_matches(name, map(str, content), 1)
        raise ValueError(f"{where}: no field '{name}' among {columns(content)}; " + (
            f"did you mean '{close[0]}'?" if close else
            "add it" + (f", or say which to use: {naming(content)}" if len(content) > 1 else "")))
    value = content[name]
    if optional and (value in EMPTY or isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, str):
        remedy = ("it is null: fill it or remove the record" if value is None else
                  f"a {type(value).__name__} has to become text (of a chat: a prompt and a "
                  "response)" if isinstance(value, (list, dict)) else "put it in quotes")
        raise ValueError(f"{where}: field '{name}' is not a string; {remedy}")
    if not value.strip():
        raise ValueError(f"{where}: field '{name}' is empty; fill it or remove the record")
    if re.search("[\ud800-\udfff]", value):  # JSON can spell them, UTF-8 and tokenizers cannot
        raise ValueError(f"{where}: field '{name}' holds half a surrogate pair; remove it")
    return value


def columns(names):
    """Names of columns between commas, not more than a line of them."""
    text = printable(", ".join(names), keep="")
    return text if len(text) <= 200 else text[:200] + " ..."
