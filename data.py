"""Everything about text: prompt template, data files, batches; final answers in formats/answers.py.

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
import torch
from tqdm import tqdm

from formats import chat, records
from formats.answers import (  # noqa: F401 (as data.final_answer ...)
    RULE,
    final_answer,
    paper_answer,
    references,
    same_answer,
)
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

    prompt: a str, or the messages of a conversation. begin: the first words of the answer, if they
    are given, such as STEPS.
    """
    if not prompt:
        return [tok.start] + tok.encode(begin)
    if in_chat(prompt, tok):
        return tok.encode_chat(chat.render(messages(prompt), tok, ask=True) + begin)[0]
    return tok.encode(PROMPT.format(instruction=prompt) + begin, bos=True)


def in_chat(prompt, tok):
    """Whether a prompt is asked in the chat template: a conversation, or any after chat.use."""
    return isinstance(prompt, list) or tok.in_chat and bool(prompt)


def as_text(prompt):
    """A prompt as one str."""
    return "\n".join(m["content"] for m in prompt) if isinstance(prompt, list) else prompt


def messages(prompt):
    """A prompt as a list of {"role": ..., "content": ...}."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def encode_chat(messages, tok):
    """(ids, learnt) of a list of {"role": ..., "content": ...}, in the model's chat template.

    ids: as transformers' apply_chat_template, except that no message makes control tokens. learnt:
    a list of booleans, one an id: the turns of the assistant, with the token that ends them. If the
    template rewrites earlier turns, only the last is learnt, with a warning. ValueError if there is
    no template, or if it refuses the messages.
    """
    return chat.encode(messages, tok)


def encode(examples, tok, max_length):
    """List of (prompt, response) -> (encoded, truncated, dropped).

    encoded: list of (ids, n_prompt); the loss sees ids[n_prompt:], the response and EOS. Of a
    conversation, n_prompt is the list of booleans that encode_chat gives.
    truncated: how many lost their end (and EOS: a cut answer must not teach the model to stop).
    dropped: how many are left out, because nothing that is learnt begins within max_length.
    """
    bar = tqdm(examples, "encode", unit="example", delay=1, leave=False)
    made = [one for prompt, text in bar for one in encode_one(prompt, text, tok, max_length)]
    cut = [(ids[:max_length], n[:max_length] if isinstance(n, list) else n) for ids, n in made]
    kept = [example for example in cut if n_learnt(example) > 0]
    truncated = sum(len(ids) > max_length and n_learnt(example) > 0
                    for (ids, _), example in zip(made, cut, strict=True))
    return kept, truncated, len(made) - len(kept)


def encode_one(prompt, text, tok, max_length):
    """[(ids, n_prompt)] of (prompt, response). Plain text: windows with every token once."""
    if in_chat(prompt, tok):
        return [encode_chat([*messages(prompt), {"role": "assistant", "content": text}], tok)]
    head, tail = prompt_ids(prompt, tok), tok.encode(text, eos=True)
    size = len(tail) if prompt else max_length - 1
    return [(head + tail[i:i + size], len(head)) for i in range(0, len(tail), size)]


def n_learnt(example):
    """How many ids of (ids, n_prompt) are learnt."""
    ids, n_prompt = example
    return sum(n_prompt) if isinstance(n_prompt, list) else len(ids) - n_prompt


def split(examples, fraction, seed):
    """Set a random fraction aside -> (train, val); of two or more, neither side is left empty."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction to set aside must be in [0, 1), not {fraction}")
    n = min(max(round(fraction * len(examples)), fraction > 0), len(examples) - 1)
    shuffled = _shuffle(examples, seed)
    return shuffled[n:], shuffled[:n]


def count_steps(examples, args):
    """How many steps a training makes: args.steps, or those of args.epochs."""
    return args.steps or args.epochs * -(-len(examples) // args.batch)


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
            if isinstance(n_prompt, list):
                ids = [i if is_learnt else -100 for i, is_learnt in zip(ids, n_prompt, strict=True)]
                n_prompt = 1
            labels[row, n_prompt - 1:len(ids) - 1] = torch.tensor(ids[n_prompt:])
        lengths = torch.tensor([len(ids) - 1 for ids, _ in group])
        where_text = (torch.arange(T) < lengths[:, None]).flatten().nonzero()[:, 0]
        made.append((tokens, labels, where_text))
        i += len(group)
    return made
