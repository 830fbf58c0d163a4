"""What train.py, eval.py and convert.py do and say about the form in which a model is asked."""
from datetime import date, datetime
from itertools import groupby

import data
import model
from formats import chat, hf, peft
from formats.jsonl import filled, printable
from formats.tokenizer import chat_template

WIDTH = 80


def tokenizer(args):
    """The tokenizer of args.ckpt. It asks in the chat template if args.chat says so, or if the
    adapter args.adapter was trained in one, and then in that one."""
    tok = data.Tokenizer(model.find(args.ckpt))
    tok.day = datetime.fromisoformat(args.date) if getattr(args, "date", None) else None
    stored = template_of(args.adapter) if args.adapter else None
    if args.chat or stored:
        chat.use(tok, stored)
        print(filled("asked in the chat template " + (
            f"that {args.adapter} was trained in" if stored else "of the model")))
    return tok


def template_of(adapter):
    """The chat template that an adapter was trained in; None if in none."""
    found = peft.read_facts(adapter).get("chat_template")
    if not isinstance(found, (str, type(None))):
        raise ValueError(f"{adapter}/{peft.FACTS}: chat_template is not a text")
    return found


def trained_in(adapter, run, checkpoint):
    """The chat template of an adapter's training. Or, if that is None, of a run of --method full
    that wrote the checkpoint: its args.json has a day only if it was asked in a template."""
    if adapter:
        return template_of(adapter)
    return chat_template(checkpoint) if hf.read_json(run / "args.json").get("date") else None


def note(net, tok):
    """Keep the template with an injected network, so that the adapter is saved with it."""
    if tok.in_chat and hasattr(net, "pissa"):
        net.pissa["chat_template"] = tok.template


def form(tok):
    """The text around a question."""
    if not tok.in_chat:
        return data.PROMPT
    text = chat.render([{"role": "user", "content": "{instruction}"}], tok, ask=True)
    return printable(text)


def choose(texts, tok, args):
    """If conversations are among the (prompt, response) of the data, `tok` asks in their template
    from now on, other questions, too: a model is trained in one form, and asked in it later."""
    if not tok.in_chat and any(isinstance(prompt, list) for prompt, _ in texts):
        chat.use(tok)
    if tok.in_chat:                                  # a run that goes on tomorrow has the same data
        args.date = args.date or date.today().isoformat()
        tok.day = datetime.fromisoformat(args.date)


def begin(examples, tok):
    """Show the first one of the encoded examples. ValueError if none of them teaches an end: the
    model would never stop."""
    def teaches(ids, n):
        return not tok.stops.isdisjoint([i for i, is_learnt in zip(ids, n, strict=True)
                                         if is_learnt] if isinstance(n, list) else ids[n:])

    if not any(teaches(*example) for example in examples):
        raise ValueError("no example teaches the model to stop: raise --max-length if all are cut"
                         + (", or see that the chat template ends a turn with a control token"
                            if tok.in_chat else ""))
    print("the first example; what is learnt stands behind >")
    print("\n".join(shown(*examples[0], tok)))


def shown(ids, n_prompt, tok):
    """Lines of one example, 80 columns at most, a part that is learnt or not in each."""
    learnt = n_prompt if isinstance(n_prompt, list) else [i >= n_prompt for i in range(len(ids))]
    names = {i: name for name, i in tok.named.items()}
    lines = []
    for is_learnt, run in groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1]):
        text = "".join(names.get(control) or tok.decode(part) for control, part in (
            (control, list(part)) for control, part in groupby(
                (i for i, _ in run), key=lambda i: i if i in names else None)))
        text, room = printable(text, keep=""), WIDTH - 4
        if len(text) > room:
            text = f"{text[:room // 2 - 3]} ... {text[len(text) - room // 2 + 2:]}"
        lines.append(f"  {'>' if is_learnt else '|'} {text}")
    return lines if len(lines) <= 6 else [*lines[:3], "    ...", *lines[-2:]]


def say_training(template, stored):
    """Print how to ask a merged model. template: its own; stored: that of its training, or None."""
    if stored:
        print(filled("note: its training used " + (
            "its chat template" if stored == template else "a chat template that is not the "
            "model's") + ": ask it in that one (eval.py --chat)"))
    elif template:
        print(filled("note: the model has a chat template, but its training used the paper's "
                     "prompt: ask it in that one, as eval.py does without --chat"))
