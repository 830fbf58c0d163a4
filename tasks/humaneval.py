"""HumanEval (Chen et al. 2021, arXiv 2107.03374): complete a function; hidden tests decide.
https://github.com/openai/human-eval, data/HumanEval.jsonl.gz

    {"task_id": "HumanEval/0", "prompt": "def f(x):\\n    \\"\\"\\" ...", "entry_point": "f",
     "test": "def check(candidate):\\n    assert candidate(1) == 2"}

The prompt is WizardCoder's, with tabs for four spaces, as in the PiSSA authors' test data. The
response is cleaned as they do, and stands after the function's head, as evalplus has it. So it may
hold the rest of the function or all of it.
"""
from formats.jsonl import string
from tasks.programs import SECONDS, clean, complete, run

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n\n### Instruction:\nCreate a Python script for this problem:\n"
          "{}\n\n### Response:")
SHOWN = {"paper": "humaneval.PROMPT"}
RULE = {"paper": "the function's head and the response, cleaned as by the PiSSA authors, must pass "
                 f"the hidden tests within {SECONDS} s"}


def problem(record, where, task, protocol):
    """{id, prompt, ...} of a record; ValueError if it is none."""
    head, test, name, number = (string(record, field, where) for field in (
        "prompt", "test", "entry_point", "task_id"))
    if not name.isidentifier():
        raise ValueError(f"{where}: field 'entry_point' is not a name: {name[:40]!r}")
    return {"id": number, "prompt": PROMPT.format(head.replace("    ", "\t")), "head": head,
            "tests": f"{test}\n\ncheck({name})"}


def score(response, problem):
    """{answer, correct, why}: the program, and why it is wrong."""
    answer = clean(response)
    why = run(problem["head"] + answer, problem["tests"])
    return {"answer": answer, "correct": why is None, "why": why}


def ended(text, problem):
    """True if what follows in the response cannot change its score."""
    return complete(text)
