"""The generated half of the pretraining text: little stories with quantities, and arithmetic.

A story tells one of the situations of situations.txt as plain prose. The same events come with the
workings in between ("Nora had 14 shells. She found 8 more. Now she has 14 + 8 = 22 shells. ...") or
after them ("... In the end 14 + 8 = 22 and 22 - 5 = 17, so 17 shells are left.").

What the base model must not learn here is the task: no text holds a question, an instruction
or a "####", and no story the numbers of a test problem. It learns a language and how numbers behave
in it; that somebody asks, and which steps then answer, is left for fine-tuning.
"""
import random
import re

from problems import EQUATION, situation

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def words(n):
    """58 -> fifty-eight, for 0 <= n < 200."""
    if n >= 100:
        return "one hundred" + (f" and {words(n - 100)}" if n > 100 else "")
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


# ---------------------------------------------------------------------------------- arithmetic

FACTS = {
    "+": ["{x} plus {y} is {z}", "{x} and {y} make {z}", "{x} and {y} are {z} together",
          "{y} more than {x} is {z}", "adding {y} to {x} gives {z}",
          "the sum of {x} and {y} is {z}", "{x} plus {y} equals {z}"],
    "-": ["{x} minus {y} is {z}", "{x} less {y} leaves {z}", "{y} from {x} leaves {z}",
          "{y} fewer than {x} is {z}", "taking {y} from {x} leaves {z}",
          "the difference of {x} and {y} is {z}", "{x} is {z} more than {y}"],
    "*": ["{x} times {y} is {z}", "{x} groups of {y} are {z}", "{x} times {y} makes {z}",
          "the product of {x} and {y} is {z}", "{x} rows of {y} are {z}"],
    "/": ["{x} divided by {y} is {z}", "{x} shared among {y} gives {z} each",
          "{x} divided into {y} equal parts gives {z}", "{y} goes {z} times into {x}",
          "{x} makes {z} groups of {y}"],
}


def numbers(rng):
    """x, op, y, z of one exact fact: sums and differences below 200, tables to 12 x 12."""
    op = rng.choice("++--*/")
    if op == "+":
        z = rng.randint(0, 199)
        x = rng.randint(0, z)
        return x, op, z - x, z
    if op == "-":
        x = rng.randint(0, 199)
        y = rng.randint(0, x)
        return x, op, y, x - y
    x, y = rng.randint(1, 12), rng.randint(1, 12)
    return (x, op, y, x * y) if op == "*" else (x * y, op, y, x)


def fact(rng):
    """A line of plain arithmetic, in digits or in words."""
    x, op, y, z = numbers(rng)
    style = rng.random()
    if style < 0.5:
        return f"{x} {op} {y} = {z}"
    if style < 0.6 and op == "+" and min(x, y) > 9:        # tens first, then ones
        tens, ones = x // 10 * 10 + y // 10 * 10, x % 10 + y % 10
        return f"{x} + {y} is {tens} + {ones} = {z}"
    show = words if rng.random() < 0.4 else str
    return rng.choice(FACTS[op]).format(x=show(x), y=show(y), z=show(z))


def sentence(text):
    """With a capital and a full stop."""
    return text[0].upper() + text[1:] + "."


def facts(rng):
    """A paragraph of facts, a list of them, one row of a table, or some counting."""
    style = rng.random()
    if style < 0.05:
        k = rng.randint(2, 12)
        return "\n".join(rng.choice([f"{i} * {k} = {i * k}", f"{i * k} / {k} = {i}"])
                         for i in range(1, 13))
    if style < 0.10:
        start, step = rng.randint(0, 80), rng.choice([1, 1, 2, 3, 5, 10])
        return "Counting: " + ", ".join(str(start + i * step) for i in range(11)) + "."
    several = [fact(rng) for _ in range(rng.randint(3, 10))]
    return "\n".join(several) if style < 0.5 else " ".join(map(sentence, several))


# ------------------------------------------------------------------------------------- stories

OPENINGS = """It was a rainy morning.|The sun was shining.|This happened last week.|It was early.
The day was warm and quiet.|Here is a small story.|It was a busy day.|It was very cold.
The children were playing outside.|It was nearly evening.|Everybody was at home.|School was over.
The wind was strong that day.|Summer had come.|It was the first day of spring.|They were friends.
The garden was green.|There was much to do.|Nobody was in a hurry.|The shop had just opened."""
CLOSINGS = """That was all.|Everybody was happy.|It was a good day.|Then it was time for supper.
Then they all went home.|It was getting dark.|That was enough.|Nobody had expected it.|All was well.
So the day ended.|Then it began to rain.|It had been good work.|They talked about it for a while.
The next day was Sunday.|Then there was tea.|They laughed.|It was late."""
OPENINGS, CLOSINGS = (re.split(r"[|\n]", text) for text in (OPENINGS, CLOSINGS))

PAST = dict(pair.split(":") for pair in """has:had have:had is:was are:were keeps:kept keep:kept
get:got gets:got needs:needed cost:cost costs:cost hold:held holds:held fills:filled takes:took
lay:laid earns:earned goes:went reads:read leaves:left will:would""".split())
PRESENT = re.compile(rf"\b({'|'.join(PAST)})\b")
SMALL = re.compile(r"(Together|Each|The|That|There|They|He|She|It|In|All|After) ")
SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def clause(working):
    """'Then 22 - 5 = 17 shells are left.' -> ('22 - 5 = 17', '17 shells are left')"""
    equation = EQUATION.search(working)
    text = working.replace(equation[0], equation[4]).rstrip(".")
    text = re.sub(r"^(Then|Now) ", "", text)
    text = text[0].lower() + text[1:] if SMALL.match(text) or text.startswith("there") else text
    return equation[0], text


def reason(rng, working, style):
    """One working in one of several voices."""
    equation, text = clause(working)
    if style == 0:
        return working
    if style == 1:
        return f"{equation}, so {text}."
    if style == 2:
        return f"{rng.choice(['Now', 'So', 'This means that', 'That way'])} {text}: {equation}."
    if style == 3:
        x, op, y, z = EQUATION.match(equation).groups()
        return f"{x} {SPOKEN[op]} {y} is {z}, so {text}."
    return sentence(text)                                   # the result alone


def conclude(rng, workings):
    """All the workings at the end of the events."""
    equations, texts = zip(*map(clause, workings))
    style = rng.randrange(6)
    if style == 0:
        end = rng.choice(["In the end", "In all", "Taken together", "After all this"])
        return f"{end} {' and '.join(equations)}, so {texts[-1]}."
    if style == 1:
        return f"{' '.join(e + '.' for e in equations)} {rng.choice(['So', 'Now'])} {texts[-1]}."
    if style == 2:
        steps = [rng.choice([f"{e}, so {t}", f"{e} and {t}"]) for e, t in zip(equations, texts)]
        return f"{rng.choice(['First', 'Here', 'Step by step:'])} {'; then '.join(steps)}."
    if style == 3:
        return "\n" + "\n".join(equations) + f"\n{sentence(texts[-1])}"
    if style == 4:
        return " ".join(reason(rng, w, rng.choice([1, 2, 3])) for w in workings)
    return " ".join(workings)


def story(rng):
    """A situation told as prose: workings after each event, or all of them at the end."""
    it = situation(rng)
    past = rng.random() < 0.5
    told = [PRESENT.sub(lambda m: PAST[m[0]], line) if past and line.startswith("= ") else line
            for line in it.told]
    if rng.random() < 0.08:                                 # events in words, workings in digits
        told = [line if line.startswith("= ") else
                sentence(re.sub(r"\d+", lambda m: words(int(m[0])), line))[:-1] for line in told]
    if rng.random() < 0.5:
        style = rng.choice([0, 0, 0, 1, 1, 2, 3, 4])
        told = [reason(rng, line[2:], style) if line.startswith("= ") else line for line in told]
    else:
        workings = [line[2:] for line in told if line.startswith("= ")]
        told = [line for line in told if not line.startswith("= ")] + [conclude(rng, workings)]
    if rng.random() < 0.3:
        told.insert(0, rng.choice(OPENINGS))
    if rng.random() < 0.3:
        told.append(rng.choice(CLOSINGS))
    return " ".join(told).replace(" \n", "\n")


def chunk(seed, size=1_000_000):
    """About `size` bytes of documents, separated by blank lines; a function of the seed alone."""
    rng, documents, length = random.Random(seed), [], 0
    while length < size:
        documents.append(facts(rng) if rng.random() < 0.2 else story(rng))
        length += len(documents[-1]) + 2
    text = "\n\n".join(documents) + "\n\n"
    assert "?" not in text and "#" not in text
    return text


if __name__ == "__main__":
    print(chunk(0, 20_000))
