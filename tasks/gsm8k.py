"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems whose answer is one number.
https://github.com/openai/grade-school-math, grade_school_math/data/test.jsonl

    {"question": "Tom has 3 pens ...", "answer": "3 + 2 = 5\\n#### 5"}

strict: the template that train.py uses; the first number after a marker, equal as a fraction.
paper: the PiSSA authors' prompt, and their test_acc.py, which rounds the number that it finds.
"""
import data
from formats.jsonl import string

PROMPT = {"strict": data.PROMPT, "paper": data.PROMPT + data.STEPS}
SHOWN = {"strict": "data.PROMPT", "paper": f"data.PROMPT + {data.STEPS!r}"}
RULE = {"strict": f"{data.RULE} must equal the reference",
        "paper": "the rounded number after the last 'The answer is: ' must equal the reference"}


def problem(record, where, task, protocol):
    """{prompt, reference, protocol} of a record; ValueError if it is none."""
    question, answer = (string(record, name, where) for name in ("question", "answer"))
    try:
        reference, = data.references([("", answer)], where)
    except ValueError as e:                                # `where` names the record already
        raise ValueError(str(e).replace(": record 1:", ":", 1)) from None
    return {"prompt": PROMPT[protocol].format(instruction=question),
            "reference": reference, "protocol": protocol}


def score(response, problem):
    """{answer, correct} of a response (str)."""
    paper = problem["protocol"] == "paper"
    answer = data.paper_answer(response) if paper else data.final_answer(response)
    return {"answer": answer, "correct": data.same_answer(answer, problem["reference"])}


def ended(text, problem):
    """True if what follows in the response cannot change its score."""
    return problem["protocol"] == "strict" and "### instruction:" in text.lower()
