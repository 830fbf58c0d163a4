"""Everything about text: prompt template, jsonl files, batches, final answers.

Fine-tuning on instructions sees one example as

    BOS  Below is an instruction … ### Instruction: {question} ### Response:  |  {answer}  EOS
    └──────────────────── prompt: read, no loss ───────────────────────────┘     └─ learnt ──┘

1. Prompt and response are tokenised apart and joined. Tokenised together, a token could straddle
   the border, and the mask would have to guess. Generation starts from the same `prompt_ids`, so
   the model is evaluated on the prompts it was trained on.
2. EOS is part of the response: a model that never learns it never stops.
3. The shuffle is a function of (seed, epoch) and nothing else: same seed, same batches.
4. Labels are shifted here, once. labels[t] is token t + 1, or -100 if there is nothing to learn:
   `cross_entropy` skips that.
5. Micro-batches are padded on the right. Attention is causal, so a token of text never sees the
   padding to its right. Each micro-batch says where its text is. model.py packs the text into one
   row, in which every example keeps its own positions and attends only to itself.
"""
import json
import re
from fractions import Fraction

import torch

from formats.tokenizer import Tokenizer  # noqa: F401 (as data.Tokenizer)

# The Alpaca template, in the words that the PiSSA paper's scripts use.
PROMPT = ("Below is an instruction that describes a task. "
          "Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:")

# What follows it in the test prompts of the paper's scripts (pissa-dataset), as in MetaMath's.
STEPS = " Let's think step by step."

FIELDS = [("instruction", "output"), ("query", "response"), ("question", "answer"), ("text",)]


# From a file to (prompt, response) ----------------------------------------------------------------

def read(path, fields=None):
    """Read a jsonl file into a list of (prompt, response), both str.

    fields="question,answer" names the fields to use. The last one is the response; those before it
    are joined by newlines. A single one is plain text: its prompt is "" and all of it is learnt.
    Without `fields` the keys of the first record choose among FIELDS, in that order. The optional
    "input" of Alpaca's records follows the instruction on a new line.
    """
    names = tuple(name.strip() for name in fields.split(",")) if fields else None
    examples = []
    with open(path, "rb") as file:  # bytes: an error in the encoding then has a line number too
        for number, line in enumerate(file, 1):
            if not line.strip(b"\xef\xbb\xbf \t\r\n"):  # blank, or a byte order mark alone
                continue
            where = f"{path}:{number}"
            record = _record(line, where)
            names = names or next((f for f in FIELDS if record.keys() >= set(f)), None)
            if names is None:
                raise ValueError(f"{where}: no known fields among {', '.join(record)}; say "
                                 'which to use with fields="prompt,response"')
            *prompt, response = [_string(record, name, where) for name in names]
            if names == FIELDS[0] and record.get("input"):
                prompt.append(_string(record, "input", where))
            examples.append(("\n".join(prompt), response))
    if not examples:
        raise ValueError(f"{path}: no records; give one JSON object per line")
    return examples


def _record(line, where):
    remedy = "give one object per line (a JSON array: jq -c '.[]' file.json > file.jsonl)"
    try:
        record = json.loads(line.decode("utf-8-sig").rstrip())  # -sig: less the byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not UTF-8; convert the file (see iconv)") from None
    except ValueError as e:
        reason = str(e).replace("line 1 ", "")  # json counts lines, too; we name the file's
        raise ValueError(f"{where}: not JSON ({reason}); {remedy}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a JSON {type(record).__name__}, not an object; {remedy}")
    return record


def _string(record, name, where):
    if name not in record:
        raise ValueError(f"{where}: no field '{name}' among {', '.join(record)}; add it, or say "
                         'which to use with fields="prompt,response"')
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field '{name}' is not a string; put it in quotes")
    if not value.strip():
        raise ValueError(f"{where}: field '{name}' is empty; fill it or remove the record")
    if re.search("[\ud800-\udfff]", value):  # JSON can spell them, UTF-8 and tokenizers cannot
        raise ValueError(f"{where}: field '{name}' holds half a surrogate pair; remove it")
    return value


# From (prompt, response) to batches ---------------------------------------------------------------

def prompt_ids(prompt, tok, begin=""):
    """The ids that the model reads before it answers; for plain text (prompt "") one id to start.

    begin: the first words of the answer, if they are given, such as STEPS.
    """
    if not prompt:
        return [tok.start] + tok.encode(begin)
    return tok.encode(PROMPT.format(instruction=prompt) + begin, bos=True)


def encode(examples, tok, max_length):
    """List of (prompt, response) -> (encoded, truncated, dropped).

    encoded: list of (ids, n_prompt); the loss sees ids[n_prompt:], the response and EOS.
    truncated: how many lost their end (and EOS: a cut answer must not teach the model to stop).
    dropped: how many are left out, because the prompt alone fills max_length.
    """
    encoded = [(prompt_ids(prompt, tok), tok.encode(text, eos=True)) for prompt, text in examples]
    kept = [(head + tail, len(head)) for head, tail in encoded if len(head) < max_length]
    truncated = sum(len(ids) > max_length for ids, _ in kept)
    return [(ids[:max_length], n) for ids, n in kept], truncated, len(examples) - len(kept)


def split(examples, fraction, seed):
    """Set a random fraction aside -> (train, val); of two or more, neither side is left empty."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to set aside must be in [0, 1), not {fraction}")
    n = min(max(round(fraction * len(examples)), fraction > 0), len(examples) - 1)
    shuffled = _shuffle(examples, seed)
    return shuffled[n:], shuffled[:n]


def batches(examples, batch_size, seed, epoch):
    """One epoch as a list of batches (lists of examples); the last one may be short."""
    # Not seed + epoch: seed 0 in epoch 1 would then be seed 1 in epoch 0.
    shuffled = _shuffle(examples, seed * 1_000_003 + epoch)
    return [shuffled[i:i + batch_size] for i in range(0, len(shuffled), batch_size)]


def _shuffle(items, seed):
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed % 2**63))
    return [items[i] for i in order.tolist()]


def micro_batches(batch, cells, pad=0):
    """Cut a batch of (ids, n_prompt) into a list of (tokens, labels, where_text).

    tokens, labels: (b, T) int64, b T <= cells with padding (a longer example is alone in its own).
    where_text: (P,) int64, the positions of text among the b T, counted row by row.
    Examples of similar length share a micro-batch, so little is padding. The gradient does not
    depend on the cut, since the training loss is a mean over the learnt tokens of the whole batch.
    The longest come first: if memory does not suffice, it runs out early and not after an hour.
    """
    batch, made, i = sorted(batch, key=lambda example: -len(example[0])), [], 0
    while i < len(batch):
        T = len(batch[i][0]) - 1  # the last token is only ever a label
        group = batch[i:i + max(1, cells // T)]
        tokens, labels = torch.full((len(group), T), pad), torch.full((len(group), T), -100)
        for row, (ids, n_prompt) in enumerate(group):
            tokens[row, :len(ids) - 1] = torch.tensor(ids[:-1])
            labels[row, n_prompt - 1:len(ids) - 1] = torch.tensor(ids[n_prompt:])
        lengths = torch.tensor([len(ids) - 1 for ids, _ in group])
        where_text = (torch.arange(T) < lengths[:, None]).flatten().nonzero()[:, 0]
        made.append((tokens, labels, where_text))
        i += len(group)
    return made


# Final answers of maths problems ------------------------------------------------------------------

# -3, 0.5, .5, 3/4, 1234, 1,234,567.89: a comma only before a group of three.
NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")


def final_answer(text: str) -> str | None:
    """The number a response ends on, as a str without commas; None if it names none.

    It is the first number after the first "####" (GSM8K), else after the first "The answer is:"
    (MetaMath), else after the first "The answer is". First, not last: a model that misses its EOS
    runs on, invents more questions and answers those. The answer to ours stands before them.
    Units do not count: "$5", "5%" and "5 apples" are all 5.
    """
    text = text.lower().split("### instruction:")[0].replace("−", "-").replace("$", "")
    for marker in ("####", "the answer is:", "the answer is"):
        if found := NUMBER.search(text.partition(marker)[2]):
            return found[0].replace(",", "")
    return None


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
    answers = [final_answer(response) for _, response in examples]
    for n, (answer, (_, response)) in enumerate(zip(answers, examples, strict=True), 1):
        if not same_answer(answer, answer):  # None, or 1/0
            raise ValueError(f"{where}: record {n}: the reference answer names no number after "
                             f"'####' or 'The answer is': {response[:60]!r}")
    return answers


def same_answer(a: str | None, b: str | None) -> bool:
    """Equal as rational numbers: "1,234" and "1234.0", "1/2" and "0.5". None equals nothing."""
    a, b = _fraction(a), _fraction(b)
    return a is not None and a == b


def _fraction(text):
    if not NUMBER.fullmatch(text or ""):  # this also refuses 1e999999999, a number of 400 MB
        return None
    above, _, below = text.replace(",", "").partition("/")
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):  # ValueError: thousands of digits, beyond int()
        return None
