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
import re
import unicodedata
from fractions import Fraction

import torch
from tqdm import tqdm

from formats import records
from formats.tokenizer import Tokenizer  # noqa: F401 (as data.Tokenizer)

# The Alpaca template, in the words that the PiSSA paper's scripts use.
PROMPT = ("Below is an instruction that describes a task. "
          "Write a response that appropriately completes the request.\n\n"
          "### Instruction:\n{instruction}\n\n### Response:")

# What follows it in the test prompts of the paper's scripts (pissa-dataset), as in MetaMath's.
STEPS = " Let's think step by step."


# From a file to (prompt, response) ----------------------------------------------------------------

def read(path, fields=None):
    """Read a data file into a list of (prompt, response): JSON lines, a JSON array, CSV, each also
    as .gz, or parquet.

    The prompt is a str, or of a conversation the messages before the last answer, a list of
    {"role": "system", "user" or "assistant", "content": str}. The response is a str.
    fields="question,answer" names the fields to use. The last one is the response; those before it
    are joined by newlines, less those that are blank. A single one is plain text: its prompt is ""
    and all of it is learnt. Without `fields` a record with "messages" or "conversations" is a
    conversation, and so is one of Alpaca's with "system" or "history". Otherwise the keys of the
    first record choose among records.FIELDS, in that order. The optional "input" of Alpaca's
    records follows the instruction on a new line.
    Columns that hold something and are not used are named in one line. ValueError for what cannot
    be read.
    """
    return records.examples(path, fields)


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
    bar = tqdm(examples, "encode", unit="example", delay=1, leave=False)
    encoded = [(prompt_ids(prompt, tok), tok.encode(text, eos=True)) for prompt, text in bar]
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
