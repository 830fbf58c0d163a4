r"""MATH (Hendrycks et al. 2021, arXiv 2103.03874): competition problems; answers are LaTeX.
MATH-500: https://github.com/openai/prm800k, prm800k/math_splits/test.jsonl

    {"problem": "What is $\\frac12 + \\frac13$?", "solution": "... $\\boxed{\\frac{5}{6}}.$",
     "answer": "\\frac{5}{6}"}

strict: the answer is what the last \boxed{} holds, as in the solutions of MATH.
paper: it follows the last "The answer is: ", as in MetaMath's responses and the PiSSA authors'
test_acc.py. Both compare texts after Hendrycks' normalisation. No algebra is done: 2/4 is not 1/2.
"""
import re

import data
from formats.jsonl import string

PROMPT = {"strict": data.PROMPT, "paper": data.PROMPT + data.STEPS}
SHOWN = {"strict": "data.PROMPT", "paper": f"data.PROMPT + {data.STEPS!r}"}
RULE = {"strict": r"the content of the last \boxed{} must equal the reference, both normalised as "
                  "by Hendrycks et al.",
        "paper": "the text between the last 'The answer is: ' and the end of its sentence must "
                 "equal the reference, both normalised as by the authors"}


def problem(record, where, task, protocol):
    """{prompt, reference, protocol} of a record; ValueError if it is none. Without a field
    "answer" it is that of the solution."""
    question = string(record, "problem", where)
    if "answer" in record:
        reference = string(record, "answer", where)
    elif not (reference := boxed(string(record, "solution", where))):
        raise ValueError(f"{where}: field 'solution' has no answer in \\boxed{{}}")
    return {"prompt": PROMPT[protocol].format(instruction=question), "reference": reference,
            "protocol": protocol, **({"id": record["unique_id"]} if "unique_id" in record else {})}


def score(response, problem):
    """{answer, correct} of a response (str)."""
    paper = problem["protocol"] == "paper"
    answer = after_marker(response) if paper else (
        boxed(re.split("### instruction:", response, maxsplit=1, flags=re.I)[0]))
    correct = answer is not None and same(answer, problem["reference"], authors=paper)
    return {"answer": answer, "correct": correct}


def ended(text, problem):
    """True if what follows in the response cannot change its score."""
    return problem["protocol"] == "strict" and "### instruction:" in text.lower()


def boxed(text):
    r"""What the last \boxed{...} (or, without one, \fbox{...}) holds, braces paired; else None."""
    found = [*re.finditer(r"\\boxed *\{", text)] or [*re.finditer(r"\\fbox *\{", text)]
    if not found:
        return None
    begin, depth = found[-1].end(), 1
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[begin:i]
    return None


def after_marker(response):
    """The authors' answer: after the last "The answer is: ", up to a point that ends a line."""
    _, marker, tail = response.rpartition("The answer is: ")
    return tail.split(".\n")[0].strip().removesuffix(".").strip() if marker else None


def same(a, b, authors=False):
    """True if two answers are equal after `normal`, or, if one cannot be read, as they stand."""
    try:
        return normal(a, authors) == normal(b, authors)
    except (ValueError, IndexError):
        return a == b


def normal(text, authors=False):
    r"""An answer in Hendrycks' normal form. ValueError or IndexError if his rules do not apply.

    authors: as the copy in the PiSSA authors' scripts, which also gives up on a text with one slash
    that is no fraction of whole numbers.
    """
    for old, new in (("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"),
                     (r"\left", ""), (r"\right", ""), (r"^{\circ}", ""), (r"^\circ", ""),
                     (r"\$", "")):
        text = text.replace(old, new)
    text, *units = text.split(r"\text{ ")                  # in MATH it stands before units only
    if len(units) > 1:
        raise ValueError(r"more than one \text{ }")
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    left, *right = text.split("=")
    text = right[0] if len(right) == 1 and len(left) <= 2 else text           # "x = 5" is 5
    head, *parts = text.split(r"\sqrt")
    text = head + "".join(rf"\sqrt{p}" if p[0] == "{" else rf"\sqrt{{{p[0]}}}{p[1:]}"
                          for p in parts)                  # \sqrt3 is \sqrt{3}
    text = fractions(text.replace(" ", ""))
    return slash(r"\frac{1}{2}" if text == "0.5" else text, authors)


def fractions(text):
    r"""\frac12 and \frac1{2} as \frac{1}{2}. A last \frac1 leaves the text as it is."""
    head, *parts = text.split(r"\frac")
    for p in parts:
        if p[0] != "{":
            if len(p) < 2:
                return text
            p = f"{{{p[0]}}}{p[1:]}" if p[1] == "{" else f"{{{p[0]}}}{{{p[1]}}}{p[2:]}"
        head += r"\frac" + p
    return head


def slash(text, authors):
    r"""a/b as \frac{a}{b}, if both are whole numbers and nothing else stands there."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        above, below = map(int, parts)
    except ValueError:
        if authors:
            raise
        return text
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
