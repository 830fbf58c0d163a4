"""The final answers of maths problems: the number that a response ends on."""
import re
import unicodedata
from fractions import Fraction

# What people write, and what it becomes before a number is read in it.
PLAIN = [(re.compile(pattern), new) for pattern, new in (
    ("[−–‒﹣－]", "-"), (r"\\?\$|\\[()\[\]!]|\\(?:left|right)(?![a-z])", ""), (r"\{,\}", ","),
    (r"[\u00a0\u2007\u2009\u202f]|\\[,;: ]|\^ ?\{? ?\\circ ?\}?|°|\\degree", " "),
    (r"\\(?:text|mathrm|mbox|textbf|mathbf) ?\{([^{}]*)\}", r" \1 "), (r"\\%", "%"),
    (r"\\[dtc]?frac ?(?:\{ ?(-?) ?([\d.,]+) ?\}|(\d)) ?(?:\{ ?([\d.,]+) ?\}|(\d))",
     lambda m: f" {m[1] or ''}{m[2] or m[3]}/{m[4] or m[5]} "),
    ("[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/")),
    (r"\\times(?![a-z])|\\cdot(?![a-z])|×", "*"), (r"\^ ?\{ ?(-?\d+) ?\}", r"^\1"),
    (r"(?<=[a-z]) ?(?:\^[23]|[²³])", ""))]                               # a unit, such as cm^2

# -3, 0.5, .5, 3/4, 2 1/2, 1234, 1,234,567.89, 1 234, 1e3, 1.5*10^6, 2^10, 3 million
DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d{1,3}(?: \d{3})+(?![\d/])|\d+)"
NUMBER = re.compile(
    r"(?:[\s:*_`\"'=—€£¥₹]|(?P<open>[(\[{])|\\boxed|[a-z] ?=){0,40}(?P<sign>[-+]?)[ (\[{€£¥₹]{0,9}"
    r"(?:(?P<whole>\d{1,9}) {1,3}(?:and )?(?=[1-9]\d* ?/ ?\d))?"
    rf"(?P<above>{DIGITS}(?:\.\d+)?|\.\d+)(?: ?/ ?(?P<below>{DIGITS}))?"
    r"(?:(?:e| ?[*x] ?10\^)(?P<ten>[-+]?\d{1,3})(?!\d)|\^(?P<power>-?\d{1,3})(?!\d)"
    r"| (?P<word>hundred|thousand|million|billion|trillion)(?![a-z]))?")
WORDS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

# What follows a number that is only a part of something else: 3\sqrt{13}, 2k, 3:30, 11_2, 5 * 4.
GOES_ON = re.compile(r" *(?:\.?\\(?!end|q?quad|\\)[a-z]|[\^²³√π]|_ *[\d{]|[x*]+ *\d|[*/] *[\d(]|"
                     r"sqrt|pi(?![a-z])|[xyz](?![a-z]))|[abeijknopqrtuvw](?![a-z])|[.:'’]\d|"
                     r"e[-+]?\d")
# The same for a reference, which must be the number and nothing but a unit, up to its sentence.
MORE = re.compile(r"[\d\\^√π=<>+∞]|\A *(?:-(?! ?[a-z]{2})|!|\.\.)")
AMONG_OTHERS = re.compile(" *[,;]")                       # behind a bracket: (2, 3), [2,5), {1; 2}
MARKERS = [re.compile(m) for m in (
    r"#{4,}(?! *\d{1,2}[.):] +[^\W\d])",             # no heading, such as "#### 1. Count the eggs"
    "the (?:final )?answer is:", "the (?:final )?answer is", r"\\boxed(?= *\{)")]
RULE = r"the first number right after '####', 'The answer is' or '\boxed{'"


def final_answer(text: str) -> str | None:
    """The number a response ends on, such as "-1234.5" or "1/2"; None if it names none.

    It is the first number that directly follows a "####" (GSM8K), else "The answer is:" (MetaMath),
    else "The answer is", each also with "final", else \\boxed{. Brackets, signs of currency and
    "x =" may stand between. First, not last: a model that misses its EOS runs on, invents more
    questions and answers those. The answer to ours stands before them.
    Units do not count: "$5", "5%" and "5 apples" are all 5.
    """
    return _marked(text)[0]


def _marked(text):
    """(final_answer, the text after it)."""
    text = _plain(text.lower().split("### instruction:")[0])
    for found in (m for marker in MARKERS for m in marker.finditer(text)):
        answer, _, rest = _number(text, found.end())
        if answer:
            return answer, rest
    return None, ""


def _plain(text):
    for pattern, new in PLAIN:
        text = pattern.sub(new, text)
    return text


def _number(text, start=0):
    """(the number at `start` as a str, as a Fraction, the text after it); or None, None, ""."""
    m = NUMBER.match(text, start)
    if not m or GOES_ON.match(text, m.end()) or m["open"] and AMONG_OTHERS.match(text, m.end()) or (
            m["power"] and len(m["above"]) > 9):
        return None, None, ""
    sign, above = m["sign"].strip("+"), re.sub("[, ]", "", m["above"])
    below, tens = re.sub("[, ]", "", m["below"] or ""), int(m["ten"] or WORDS.get(m["word"], 0))
    try:
        value = int(m["whole"] or 0) + Fraction(above) / Fraction(below or 1)
        value = value ** int(m["power"] or 1) * Fraction(10) ** tens
        plain = not (m["whole"] or m["power"] or tens)
        shown = sign + (above + f"/{below}" * bool(below) if plain else str(value))
    except (ValueError, ZeroDivisionError):  # ValueError: thousands of digits, beyond int()
        return None, None, ""
    return shown, -value if sign else value, text[m.end():]


def paper_answer(text):
    """The whole number (str) that the PiSSA authors' scripts read in a response; None if none.

    It is the first number after the last "The answer is: ", rounded by round(), halves to even.
    A fraction a/b is divided, except a/0, which reads as a. Such a number has at most one comma,
    point or slash, and the comma may be anywhere: "1,234,567" reads as 1234. That is a mistake of
    their script, kept here to compare with the paper.
    """
    _, marker, tail = text.rpartition("The answer is: ")
    found = re.search(r"[-+]?\d*[.,/]?\d+", tail) if marker else None
    if not found:
        return None
    above, slash, below = found[0].replace(",", "").partition("/")
    try:
        return str(round(int(above) / int(below) if slash and below != "0" else float(above)))
    except (ValueError, ArithmeticError):  # /4, 4/00, and numbers too large for a float
        return None


def references(examples, where):
    """The final answers of the responses of (prompt, response); ValueError for one without."""
    found = [_marked(response) for _, response in examples]
    for n, ((answer, rest), (_, response)) in enumerate(zip(found, examples, strict=True), 1):
        if answer is None or MORE.search(re.split(r"\.(?= |$)|\n", rest)[0]):
            raise ValueError(f"{where}: record {n}: the reference answer names no number after "
                             f"'####', 'The answer is' or in \\boxed{{}}: {response[-60:]!r}")
    return [answer for answer, _ in found]


def same_answer(a: str | None, b: str | None) -> bool:
    """Equal as rational numbers: "1,234" and "1234.0", "1/2" and "0.5". None equals nothing."""
    (_, a, more_a), (_, b, more_b) = (_number(_plain((x or "").lower())) for x in (a, b))
    return a is not None and a == b and not (more_a + more_b).strip()
