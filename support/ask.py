"""eval.py's conversation: questions from the keyboard, and answers that appear as they come."""
import math
import sys
from contextlib import nullcontext, suppress

import pissa
from formats.jsonl import filled, printable
from support import report


def answer(complete, net, tok, args, both, prompt):
    """Print the answer to a prompt as it comes; if `both`, the base model's above it.

    complete: eval.py's, for this network and tokenizer. args: eval.py's.
    """
    report.spelled("the prompt", [prompt], tok)
    how = {k: getattr(args, k) for k in ("max_new_tokens", "stop", "temperature", "top_k", "top_p",
                                         "seed")} | {"bar_after": math.inf}    # the text shows it
    cut = set()
    for adapted in (False, True) if both else (True,):
        if both:
            print(f"--- with {args.adapter}" if adapted else "--- base")
        with nullcontext() if adapted else pissa.disabled(net):
            streamed(lambda watch: complete([prompt], watch=watch, cut=cut, **how)[0], args.stop)
            if cut:
                cut.clear()
                print(f"(cut after {args.max_new_tokens} tokens; --max-new-tokens allows more)",
                      file=sys.stderr, flush=True)


def streamed(complete, stop=()):
    """Print the text that complete(watch) returns, while it grows.

    complete: calls watch(text so far) after every token. stop: texts that end an answer.
    """
    shown = 0

    def watch(text):
        nonlocal shown
        text = settled(text.lstrip(), stop)
        if len(text) > shown:
            print(printable(text[shown:]), end="", flush=True)
            shown = len(text)

    text = complete(watch)
    print(printable(text[shown:]), flush=True)


def settled(text, stop=()):
    """What is sure to stay of an unfinished text. Half a character, spaces at the end and the
    beginning of a stop text may still change or go."""
    text = text[:min((text.find(s) for s in stop if s in text), default=None)].rstrip("\ufffd")
    begun = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[:len(text) - begun].rstrip()


def session(answer, template):
    """Call answer(question) for every line that is typed. An empty line, Ctrl-D or Ctrl-C ends it.

    template: the text around every question, which is shown at the start.
    """
    print("every question stands alone, in this template; best is the one of training:\n\n"
          + filled(template, "") + "\n\nan empty line, Ctrl-D or Ctrl-C ends this")
    try:
        for question in questions():
            try:
                answer(question)
            except ValueError as e:                      # too long, for example: ask another one
                print(filled(printable(str(e), keep="")))
    except KeyboardInterrupt as e:
        if e.args:                                       # SIGTERM, for example
            raise
    print()


def questions():
    """Yield the lines that are typed, until an empty one or the end of the input."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys edit a line, and bring back the ones before)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    with suppress(EOFError):
        while line := input("\n> ").strip():
            yield line
