"""Chat templates: a conversation as the text that a model was trained on, and what is learnt of it.

A template is a program in Jinja, in chat_template.jinja or tokenizer_config.json. It is run in
jinja2's sandbox, with the settings and functions that it has in transformers.

What is learnt are the turns of the assistant, each from where generation would begin to the token
that ends it. Where they are is not searched for in the text. The template is run on the messages
before a turn, and on those with it. Both texts must be beginnings of the whole text, and the turn
is the difference.
"""
import json
import os
import warnings
from bisect import bisect_right
from datetime import datetime
from functools import lru_cache

from formats.tokenizer import MARK

NONE = ("has no chat template: put the chat_template.jinja of its instructed version into {}, or "
        "give records with a question and an answer")
LAST_ONLY = ("the chat template writes earlier turns differently from the last one, so only the "
             "last answer of such a conversation is learnt")


@lru_cache
def compiled(template):
    """The function {name: value} -> text of a template. ValueError for one that is damaged."""
    try:
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ValueError("a chat template needs the jinja2 package: pip install jinja2") from None

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    class Generation(jinja2.ext.Extension):          # {% generation %} marks turns; we need no mark
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render
    except Exception as e:                   # jinja2's own, or Python's if the program is strange
        raise ValueError(f"the chat template is damaged: {str(e)[:200]!r}") from None


def render(messages, tok, ask=False):
    """The text of messages; if `ask`, with the beginning of the assistant's next turn.

    In a message, the name of a control token gets a mark, by which tok.encode_chat knows that it
    stays text. ValueError if the template refuses the messages.
    """
    if tok.template is None:
        raise ValueError(f"the model {NONE.format(tok.folder)}")
    run = compiled(tok.template)
    marked = [{**m, "content": tok.control.sub(lambda name: name[0][0] + MARK + name[0][1:],
                                               m["content"])} for m in messages]
    try:
        return run(messages=marked, tools=None, documents=None, add_generation_prompt=ask,
                   strftime_now=(tok.day or datetime.now()).strftime, **tok.names)
    except Exception as e:                   # a program of others: it may fail in any way
        first = next((m["content"] for m in messages if m["role"] != "system"), "")[:40]
        raise ValueError(f"the chat template refuses the conversation that begins with {first!r}: "
                         f"{str(e)[:100]!r}") from None


def encode(messages, tok):
    """(ids, learnt) of a conversation: lists of int and of bool. See data.encode_chat."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    text = render(messages, tok)
    turns = spans(messages, answers, text, tok)
    if turns is None:
        if answers[1:]:
            warnings.warn(LAST_ONLY, stacklevel=2)
        text, turns = last_turn(messages[:answers[-1] + 1], tok)
    ids, ends = tok.encode_chat(text)
    learnt = [False] * len(ids)
    for before, after in turns:
        start, end = (tokens_within(part, ids, ends, tok) for part in (before, after))
        stops = [i + 1 for i in range(start, end) if ids[i] in tok.stops]
        others = [i + 1 for i in range(start, end) if ids[i] in tok.controls]
        end = stops[0] if stops else others[-1] if others else end    # nothing behind it is learnt
        learnt[start:end] = [True] * (end - start)
    return ids, learnt


def spans(messages, answers, text, tok):
    """[(text before a turn, text with it)] of the assistant's turns; None if one is no beginning
    of the whole text."""
    found = []
    try:
        for i in answers:
            before, after = render(messages[:i], tok, ask=True), render(messages[:i + 1], tok)
            if not text.startswith(after):           # some end every text with EOS
                after = after.removesuffix(tok.names.get("eos_token", ""))
            if not (text.startswith(before) and text.startswith(after) and
                    len(before) < len(after)):
                return None
            found.append((before, after))
    except ValueError:
        return None
    return found


def last_turn(messages, tok):
    """(text, [(text before the last message, text)]), if the template begins an answer differently
    from how it writes it: what is learnt begins at the first difference. ValueError if that stands
    in the messages before the answer."""
    text, asked = render(messages, tok), render(messages[:-1], tok)
    if not text.startswith(asked):
        asked = asked.removesuffix(tok.names.get("eos_token", ""))
    before = os.path.commonprefix([render(messages[:-1], tok, ask=True), text])
    if not text.startswith(asked) or len(before) < len(asked):
        raise ValueError("the chat template writes a question differently if an answer follows: "
                         "where the answer begins cannot be told")
    return text, [(before, text)]


def tokens_within(part, ids, ends, tok):
    """How many of the ids lie within `part`, a beginning of their text; one on its end does not."""
    if ends is not None:
        return bisect_right(ends, len(part.replace(MARK, "")))
    begin = tok.encode_chat(part)[0]                 # as many as the two have in common
    return next((n for n, (a, b) in enumerate(zip(ids, begin, strict=False)) if a != b),
                min(len(ids), len(begin)))


def use(tok, template=None):
    """From now on `tok` asks in its chat template, or in this one, and stops at the end of a turn.

    ValueError if there is no template, or if it cannot be used.
    """
    tok.template = template or tok.template
    talk = [{"role": role, "content": "1"} for role in ("user", "assistant")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                # it is said of the data, not of this
        ids, learnt = encode(talk * 2, tok)            # Phi-3's last answer ends in its own way
    ends = {i for i, now, then in zip(ids, learnt, [*learnt[1:], False], strict=True)
            if now and not then}
    tok.stops |= ends & tok.controls
    tok.in_chat = True
