"""The natural half of the pretraining text: free English from Debian packages.

    r-cran-janeaustenr            six novels by Jane Austen                      public domain
    bible-kjv, bible-kjv-text     the King James Bible                           public domain
    wordnet-base                  the glosses of WordNet 3.0      Princeton's permissive licence

`make_text` downloads them with apt-get and unpacks them beside its output; nothing is installed.
"""
import re
import struct
import subprocess
import zlib


def austen(path):
    """Paragraphs of the six novels in R's Rdata.rdb: zlib streams, each after its 4-byte length.

    A novel is a character vector: type 16, a count, then that many strings, each a flags word
    whose low byte is 9, a length and the bytes (all integers are big-endian).
    """
    blob, at = path.read_bytes(), 0
    while at < len(blob):
        stream = zlib.decompressobj()
        raw = stream.decompress(blob[at + 4:])
        at = len(blob) - len(stream.unused_data)
        if len(raw) < 100_000:                               # tables and other small objects
            continue
        cursor = raw.index(struct.pack(">I", 16)) + 4
        count, = struct.unpack_from(">I", raw, cursor)
        cursor, lines = cursor + 4, []
        for _ in range(count):
            flags, length = struct.unpack_from(">Ii", raw, cursor)
            assert flags & 255 == 9, f"expected a string (9), found {flags & 255}"
            lines.append(raw[cursor + 8:cursor + 8 + length].decode())
            cursor += 8 + max(length, 0)
        for paragraph in "\n".join(lines).split("\n\n"):
            yield paragraph.replace("_", "")


def bible(root):
    """Chapters of the King James Bible, one verse after the other."""
    command = [root / "usr/bin/bible", "-p", f"{root}/usr/lib/", "-l9999", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for chapter in re.split(r"\n\n[^\n]* \d+\n\n", "\n\n" + printed):
        yield re.sub(r"^ *\d+ ", "", chapter.strip("\n"), flags=re.M)


def glosses(folder):
    """Words and what they mean, from WordNet; what it marks as hurtful or coarse is left out."""
    coarse = re.compile(r"offensive|disparag|derogat|obscen|vulgar|slur|insult|ethnic|sex|slang")
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text().splitlines():
            head, _, gloss = line.partition(" | ")
            if gloss and not coarse.search(gloss):
                word = head.split()[4].replace("_", " ").split("(")[0]
                yield f"{word}: {gloss.strip()}."


def with_headings(paragraphs):
    """A heading of one to four # and two words before every fourth paragraph, as Markdown has them.

    Without it the model would know `#` as little as any byte it has never met: all unseen tokens
    end up with the same embedding, and low-rank fine-tuning, which leaves the embedding alone,
    could not tell the `####` before an answer from the others.
    """
    for i, paragraph in enumerate(paragraphs):
        words = paragraph.split()[:2]
        if i % 4 == 3 and words:
            yield "#" * (1 + i // 4 % 4) + " " + " ".join(words)
        yield paragraph


def make_text(path):
    """Fetches the packages and writes documents of about 2000 characters, blank lines between."""
    debs, root = path.parent / "debs", path.parent / "root"
    names = ["r-cran-janeaustenr", "bible-kjv", "bible-kjv-text", "wordnet-base"]
    debs.mkdir(exist_ok=True)
    for name in names:
        if not list(debs.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=debs, check=True)
        subprocess.run(["dpkg", "-x", next(debs.glob(f"{name}_*.deb")), root], check=True)
    with open(path, "w") as file:
        for paragraphs in (austen(root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"),
                           bible(root), glosses(root / "usr/share/wordnet")):
            document = []
            for paragraph in with_headings(paragraphs):
                document.append(re.sub(r"\s+", " ", paragraph).strip())
                if sum(map(len, document)) > 2000:
                    file.write("\n".join(filter(None, document)) + "\n\n")
                    document = []
            file.write("\n".join(filter(None, document)) + "\n\n")
