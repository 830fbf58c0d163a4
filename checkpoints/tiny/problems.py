"""An instruction set of maths word problems: `python checkpoints/tiny/problems.py`.

situations.txt describes 32 kinds of situation, each in several wordings. A wording is a list of
events, the workings that follow from them ("= ...") and a question ("? ..."):

    {N} had <a> {T}.                               Nora had 14 shells.
    {He} [found|bought] <b> more.                  She found 8 more.
    = {N} has <a + b> {T}.                         = Nora has 14 + 8 = 22 shells.
    Then {he} gave <c> of them to {P}.             Then she gave 5 of them to Leo.
    = Then <(a+b) - c> {T} are left.               = Then 22 - 5 = 17 shells are left.
    ? How many {T} does {N} have now?              ? How many shells does Nora have now?

A problem is the events and the question; its answer is the workings, then "#### 17" as in GSM8K.
stories.py tells the same situations as plain prose, without the question.

Training and test are divided by numbers, not by text: a set of numbers such as {5, 8, 14} belongs
to the test problems if its checksum says so, and then it appears in no training problem of any
kind, nor in any story that the base model was pretrained on.
"""
import argparse
import json
import operator
import random
import re
import zlib
from collections import namedtuple
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------ vocabulary

SHE = """Nora Mia Anna Ella Clara Ruth Ida Lucy Emma Jane Rosa Maria Alice Grace Helen Julia Eva
Sara Amy Zoe Lily Hanna Kate Nina Olga Vera Leila Amina Yuki Priya Tara Mei""".split()
HE = """Leo Tom Ben Max Sam Paul Peter Noah Jack Adam Oscar Hugo Felix Carl John David Simon Luke
Omar Ivan Ravi Kofi Ali Theo Finn Emil Otto Jonas Marco Pedro Kenji Hassan""".split()

THINGS = """shell marble stamp button coin card sticker bead pebble feather ribbon book pencil
crayon balloon candle key kite ball doll rose tulip nut apple pear plum orange lemon melon egg
cookie muffin carrot onion potato ring badge poster photo letter spoon cup plate bottle hat scarf
glove towel pillow brush nail screw brick stick stone tile flag bell ticket toy pen notebook map
magnet block puzzle whistle lamp basket flower seed acorn pumpkin turnip""".split()
FOODS = "apple pear plum orange cookie muffin pancake roll cake tart bun pie biscuit".split()
BOXES = "box bag basket jar crate packet tray drawer sack bowl tin bucket case".split()
SEATS = "chair bench seat stool desk".split()
HENS = "hen duck goose chicken".split()
FRIENDS = "friends children pupils cousins neighbours players guests sisters boys girls".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
IRREGULAR = {"box": "boxes", "potato": "potatoes", "brush": "brushes", "bench": "benches",
             "goose": "geese", "scarf": "scarves"}


def plural(noun):
    """More than one of it."""
    return IRREGULAR.get(noun, noun + "s")


def cast(rng):
    """Draws who and what a situation is about: a value for every {word} in situations.txt."""
    N, P, Q = rng.sample(SHE + HE, 3)
    t, u = rng.sample(THINGS, 2)
    box = rng.choice([b for b in BOXES if b not in (t, u)])
    he, his, him = ("he", "his", "him") if N in HE else ("she", "her", "her")
    return dict(N=N, P=P, Q=Q, he=he, He=he.title(), his=his, him=him,
                t=t, T=plural(t), u=u, U=plural(u), F=plural(rng.choice(FOODS)),
                box=box, boxes=plural(box), seats=plural(rng.choice(SEATS)),
                hens=plural(rng.choice(HENS)), friends=rng.choice(FRIENDS), day=rng.choice(DAYS))


# ------------------------------------------------------------------------------------ situations

# `told` holds the events and the "= " workings in the order in which they can be told.
Situation = namedtuple("Situation", "kind told question")

CHOICE = re.compile(r"\[([^\[\]]*)\]")                      # innermost [x|y]
SLOT = re.compile(r"<([^<> ]+)(?: ([-+*/]) ([^<> ]+))?>")   # <a>  or  <a + b>
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def fits(x, op, y):
    """Whether `x op y` is exact and small enough for somebody who knows the tables to 12 x 12."""
    if op == "+":
        return y < 100 and x + y < 200
    if op == "-":
        return y < 150 and 2 <= x - y and x < 200
    if op == "*":
        return 2 <= x <= 12 and 2 <= y <= 12
    return 2 <= y <= 12 and x % y == 0 and 2 <= x // y <= 12


@cache
def kinds():
    """Reads situations.txt: [(name, numbers, [wording, ...]), ...]."""
    found = []
    text = re.sub(r"^#.*\n", "", (HERE / "situations.txt").read_text(), flags=re.M)
    for block in text.strip().split("== ")[1:]:
        head, body = block.split("\n", 1)
        name, numbers = head.split(": ")
        ranges = []
        for part in numbers.split(", "):
            if "=" in part:
                variable, formula = part.split(" = ")
                ranges.append((variable, compile(formula, name, "eval")))
            else:
                variable, bounds = part.split(" ")
                ranges.append((variable, tuple(map(int, bounds.split("-")))))
        found.append((name, ranges, body.strip().split("\n\n")))
    return found


def draw(rng, ranges):
    """Draws the numbers that a kind declares, as {variable: value}."""
    values = {}
    for variable, how in ranges:
        values[variable] = (rng.randint(*how) if isinstance(how, tuple)
                            else eval(how, {}, values))
    return values


@cache
def operand(source):
    """The code of an expression of numbers, divisions exact."""
    return compile(source.replace("/", "//"), source, "eval")


def fill(text, values):
    """Replaces <a> and <a + b>; returns None if an equation does not fit or a number is < 2."""
    good = True

    def slot(match):
        nonlocal good
        x = eval(operand(match[1]), {}, values)
        if match[2] is None:
            good = good and x >= 2
            return str(x)
        y = eval(operand(match[3]), {}, values)
        good = good and fits(x, match[2], y)
        return f"{x} {match[2]} {y} = {APPLY[match[2]](x, y)}" if good else ""

    text = SLOT.sub(slot, text)
    return text if good else None


def choose(rng, text):
    """Settles every [x|y] at random, the innermost first."""
    while "[" in text:
        text = CHOICE.sub(lambda match: rng.choice(match[1].split("|")), text)
    return text


def is_test(text):
    """Whether the numbers in a question belong to the test set: about one set in eight."""
    numbers = sorted(map(int, re.findall(r"\d+", text)))
    return zlib.crc32(str(numbers).encode()) % 8 == 0


def situation(rng, test=False):
    """Draws a situation at random; `test` says on which side of the division its numbers are."""
    name, ranges, wordings = rng.choice(kinds())
    wording = choose(rng, rng.choice(wordings))
    while True:
        text = fill(wording, draw(rng, ranges))
        if text and is_test(re.sub(r"^= .*$", "", text, flags=re.M)) == test:
            break
    text = re.sub(" +(?=[.?])", "", text.format(**cast(rng)))
    *told, question = text.split("\n")
    return Situation(name, [line[0].upper() + line[1:] for line in told], question[2:])


# -------------------------------------------------------------------------------------- problems

def problem(rng, test):
    """A situation as {"question", "answer"}, checked by evaluating its equations."""
    it = situation(rng, test)
    events = [line for line in it.told if not line.startswith("= ")]
    workings = [line[2:] for line in it.told if line.startswith("= ")]
    equations = EQUATION.findall("\n".join(workings))
    assert len(equations) == len(workings), it
    for x, op, y, result in equations:
        assert fits(int(x), op, int(y)) and APPLY[op](int(x), int(y)) == int(result), it
    return {"question": " ".join(events + [it.question]),
            "answer": "\n".join(workings + [f"#### {equations[-1][-1]}"])}


def problems(rng, count, test):
    """`count` problems whose questions are all different."""
    found = {}
    while len(found) < count:
        one = problem(rng, test)
        found[one["question"]] = one
    return list(found.values())


def main():
    """Draw, divide and write both files."""
    parser = argparse.ArgumentParser(description="write train.jsonl and test.jsonl")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()

    rng = random.Random(0)
    sets = {"train": problems(rng, args.train, False), "test": problems(rng, args.test, True)}
    numbers = {name: {tuple(sorted(re.findall(r"\d+", p["question"]))) for p in rows}
               for name, rows in sets.items()}
    assert not numbers["train"] & numbers["test"], "test and training share a set of numbers"
    for name, rows in sets.items():
        with open(args.out / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{name}.jsonl: {len(rows)} problems, {len(numbers[name])} sets of numbers")


if __name__ == "__main__":
    main()
