"""Eight tests of common sense in the form of LLM-Adapters (Hu et al. 2023, arXiv 2304.01933).
https://github.com/AGI-Edgerunners/LLM-Adapters, dataset/NAME/test.json

    {"instruction": "Please answer ... with true or false, question: ...", "answer": "true",
     "output": "the correct answer is true"}

A model that was trained on them answers "the correct answer is X". The rule of LLM-Adapters, and of
the PiSSA authors' test_acc.py, is the first name of an answer anywhere in the response. So a model
that repeats the list of names has chosen the first one.
"""
import re

import data
from formats.jsonl import string

FIVE = ["answer1", "answer2", "answer3", "answer4", "answer5"]
NAMES = {"boolq": ["true", "false"], "piqa": ["solution1", "solution2"],
         "social_i_qa": FIVE, "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
         "winogrande": ["option1", "option2"], "ARC-Easy": FIVE, "ARC-Challenge": FIVE,
         "openbookqa": FIVE}
SHOWN = {"paper": "data.PROMPT"}
RULE = {"paper": "the first name of an answer in the response (true, solution1, answer1 ...) must "
                 "be the reference"}


def problem(record, where, task, protocol):
    """{prompt, reference, names} of a record; ValueError if it is none."""
    question, answer = (string(record, name, where) for name in ("instruction", "answer"))
    more = string(record, "input", where, optional=True) if "input" in record else ""
    if answer not in NAMES[task]:
        raise ValueError(f"{where}: field 'answer' is {answer[:40]!r}, none of {task}'s answers: "
                         f"{', '.join(NAMES[task])}")
    return {"prompt": data.PROMPT.format(instruction=f"{question}\n{more}" if more else question),
            "reference": answer, "names": NAMES[task]}


def score(response, problem):
    """{answer, correct} of a response (str)."""
    found = re.search("|".join(problem["names"]), response)
    return {"answer": found and found[0], "correct": bool(found) and (
        found[0] == problem["reference"])}


def ended(text, problem):
    """True if what follows in the response cannot change its score."""
    return any(name in text for name in problem["names"])
