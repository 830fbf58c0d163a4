"""The file of predictions that --accuracy and --task of eval.py write."""
from pathlib import Path

from formats.jsonl import filled, write_lines
from support import report


def places(args, *names):
    """(the file of predictions, the file that is written until all are there)."""
    folder = Path(args.adapter).parent if args.adapter else Path("runs")
    name = "-".join(["predictions", Path(args.adapter or args.ckpt).name, *names,
                     *([f"first{args.limit}"] if args.limit else [])])
    out = Path(args.out or folder / f"{name}.jsonl")
    return out, out.with_name(out.name + ".part")


def checked(pairs, count):
    """{index: prediction} of pairs that were read. An error if they are not of `count` ones."""
    done = dict(pairs)
    assert all(type(i) is int and 0 <= i < count and row["correct"] in (True, False)
               for i, row in done.items())
    return done


def finish(out, part, rows, by):
    """Write all predictions, and print the accuracy with its 95 % interval. by: its protocol."""
    write_lines(out, rows)
    part.unlink()
    n, right = len(rows), sum(row["correct"] for row in rows)
    low, high = report.wilson(right / n, n)
    print(filled(f"accuracy {right / n:.1%} ({low:.1%} to {high:.1%} with 95 % confidence) by "
                 f"protocol {by}: {right} of {n} problems; predictions in {out}"))
    if all(row.get("answer", "") is None for row in rows):
        print(filled(f"note: no answer holds what protocol {by} reads. Was the model trained to "
                     "answer otherwise? See --protocol"))
    report.say_cut(sum(row.get("cut", False) for row in rows))
