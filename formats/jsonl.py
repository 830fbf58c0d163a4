"""The records of a jsonl file. A file or a line that is none is refused with what it is, and with
what makes jsonl of it."""
import json
import re

# How other kinds of files begin, what they are, and what makes jsonl of FILE.
TABLE = ("python -c \"import pandas; pandas.read_KIND('FILE').to_json('FILE.jsonl', "
         "orient='records', lines=True)\"")
KINDS = {b"PAR1": ("a Parquet file", TABLE.replace("KIND", "parquet")),
         b"ARROW1": ("an Arrow file", TABLE.replace("KIND", "feather")),
         b"\x1f\x8b": ("compressed by gzip", "gzip -dc FILE > FILE.jsonl"),
         b"BZh": ("compressed by bzip2", "bzip2 -dc FILE > FILE.jsonl"),
         b"\xfd7zXZ": ("compressed by xz", "xz -dc FILE > FILE.jsonl"),
         b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -dc FILE > FILE.jsonl"),
         b"PK\x03\x04": ("a zip archive", "unzip FILE"),
         b"\xff\xfe\x00\x00": ("UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > FILE.jsonl"),
         b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
         b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > FILE.jsonl"),
         b"version https://git-lfs": ("Git LFS's pointer to the file", "git lfs pull"),
         b"<": ("a web page", "download the file itself")}
EMPTY = (None, "", [], {})


def records(path):
    """Yield ("file:line", record as a dict) of every line that is not blank."""
    with open(path, "rb") as file:  # bytes: an error in the encoding then has a line number too
        refuse_other_kinds(path, file.read(1000))
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):  # neither blank nor a byte order mark alone
                yield f"{path}:{number}", record(line, f"{path}:{number}")


def refuse_other_kinds(path, head):
    """ValueError if a file begins as another kind of file does."""
    kind = next((kind for start, kind in KINDS.items() if head.startswith(start)), None)
    if str(path).endswith((".csv", ".tsv")) and not head.lstrip().startswith((b"{", b"[")):
        kind = "a table", TABLE.replace("KIND", "csv")
    if not kind and b"\0" in head:                   # UTF-16 without a byte order mark has many
        kind = "UTF-16 or no text at all", "iconv -f UTF-16LE -t UTF-8 FILE > FILE.jsonl"
    if kind:
        raise ValueError(f"{path}: {kind[0]}, not jsonl: {kind[1].replace('FILE', str(path))}")


def record(line, where):
    """The object in a line of bytes."""
    remedy = "give one object per line (one over several lines: jq -c . file.json > file.jsonl)"
    try:
        content = json.loads(line.decode("utf-8-sig").rstrip())  # -sig: less the byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8; convert the file (iconv -f LATIN1 -t UTF-8, or "
                         "what it is in)") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON nested too deeply; remove the record") from None
    except ValueError as e:
        if line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            raise ValueError(f"{where}: not JSON by lines, but an array over several lines; jq -c "
                             "'.[]' file.json > file.jsonl") from None
        reason = str(e).replace("line 1 ", "")  # json counts lines, too; we name the file's
        raise ValueError(f"{where}: not JSON ({reason}); {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{where}: a JSON {type(content).__name__}, not an object; give one "
                         "object per line (a JSON array: jq -c '.[]' file.json > file.jsonl)")
    return content


def string(content, name, where, optional=False):
    """The string under a name. If it is optional, "" for one that is null or blank."""
    if name not in content:
        raise ValueError(f"{where}: no field '{name}' among {columns(content)}; add it, or say "
                         'which to use with fields="prompt,response"')
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
    text = ", ".join(names)
    return text if len(text) <= 200 else text[:200] + " ..."
