"""MBPP (Austin et al. 2021, arXiv 2108.07732): a function of a few lines; three asserts decide.
https://github.com/google-research/google-research/tree/master/mbpp, mbpp.jsonl

    {"task_id": 11, "text": "Write a function to ...", "test_setup_code": "",
     "test_list": ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]}

The test set is the ids 11 to 510; others are left out. The prompt shows the first assert, since the
name of the function stands only there. It has the form of the PiSSA authors' test data. Those were
made from MBPP+, which words some tasks better and tests more.
"""
from formats.jsonl import columns, string
from tasks.programs import SECONDS, clean, complete, run

PROMPT = ("Below is an instruction that describes a task. Write a response that appropriately "
          "completes the request.\n\n\n### Instruction:\n{} Your code should satisfy the following "
          "assertion:\n```python\n{}\n```\n\n### Response:")
SHOWN = {"paper": "mbpp.PROMPT"}
RULE = {"paper": "the response, cleaned as by the PiSSA authors, must pass all asserts within "
                 f"{SECONDS} s"}
IDS = range(11, 511)


def problem(record, where, task, protocol):
    """{id, prompt, tests} of a record, None if it is not of the test set; ValueError if it is no
    record of MBPP."""
    number, text = record.get("task_id"), string(record, "text", where)
    if type(number) is not int:
        raise ValueError(f"{where}: field 'task_id' is not a whole number")
    setup = string({"test_setup_code": "", **record}, "test_setup_code", where, optional=True)
    tests = record.get("test_list")
    if type(tests) is not list or not tests:
        raise ValueError(f"{where}: field 'test_list' is not a list of asserts among "
                         f"{columns(record)}")
    tests = [string({"test_list": t}, "test_list", where) for t in tests]
    return {"id": number, "prompt": PROMPT.format(text, tests[0].strip()),
            "tests": "\n".join([setup, *tests])} if number in IDS else None


def score(response, problem):
    """{answer, correct, why}: the program, and why it is wrong."""
    answer = clean(response)
    why = run(answer, problem["tests"])
    return {"answer": answer, "correct": why is None, "why": why}


def ended(text, problem):
    """True if what follows in the response cannot change its score."""
    return complete(text)
