"""How this checkpoint was made, from nothing: `python checkpoints/tiny/make.py`.

    text       free English out of Debian packages (english.py)           -> build/text.txt
    stories    generated stories and arithmetic (stories.py)              -> build/stories.txt
    tokenizer  sentencepiece BPE, 2048 pieces                             -> build/tokenizer.model
    tokens     both texts as int16 ids, BOS and EOS around each document  -> build/*.bin
    train      a LLaMA of 4.9 M parameters on random windows of both      -> --out

A stage whose file is there is skipped, so `--until text` can run on a machine that has a network,
and the rest, with build/ copied, on one that has a GPU. Only `text` needs the network, Debian's
or Ubuntu's apt-get, and libreadline8. For a smoke test on a CPU:

    python checkpoints/tiny/make.py --steps 5 --batch 8 --stories-mb 1 --build /tmp/b --out /tmp/x
"""
import argparse
import array
import json
import math
import os
import sys
import time
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
import english  # noqa: E402
import stories  # noqa: E402

import data  # noqa: E402
import model  # noqa: E402
from formats import meta_write  # noqa: E402

CONFIG = model.Config(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, vocab_size=2048, ffn_dim=688,
                      tied=True, max_seq_len=256)
WINDOW = 256
NATURAL = 0.15              # share of the natural text in a batch; the rest is generated
BOS, EOS = 1, 2


# ---------------------------------------------------------------------------------- the texts

def make_stories(path, megabytes):
    """Writes `megabytes` chunks of generated text; chunk i depends on i alone."""
    with get_context("fork").Pool() as pool, open(path, "w") as file:
        for text in tqdm(pool.imap(stories.chunk, range(megabytes)), "stories", megabytes):
            file.write(text)


# ---------------------------------------------------------------------------------------- tokens

def make_tokenizer(path, texts):
    """Llama 2's kind of tokenizer: digits apart, bytes (the newline too) for what is unknown."""
    lines = [data.PROMPT] * 2000                            # so that the template costs few tokens
    for text in texts:                                       # every k-th part, 5 MB of each
        whole = text.read_text()
        every = 1 + len(whole) // 5_000_000
        for at in range(0, len(whole), 10_000 * every):
            lines += whole[at:at + 10_000].split("\n")[1:-1]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for prompt in lines for line in prompt.split("\n") if line),
        model_prefix=str(path.with_suffix("")), model_type="bpe", vocab_size=CONFIG.vocab_size,
        split_digits=True, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True, character_coverage=0.9999,
        unk_id=0, bos_id=BOS, eos_id=EOS, pad_id=-1, max_sentence_length=20_000, num_threads=1,
        minloglevel=1)
    path.with_suffix(".vocab").unlink()
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    sample = data.PROMPT + " 14 + 8 = 22\n\n### Ré: é~€\n"
    assert sp.decode(sp.encode(sample)) == sample, "a round trip loses something"
    assert sp.piece_to_id("<0x0A>") in sp.encode("a\nb")


@cache
def tokenizer_in(directory):
    """The sentencepiece processor of a directory, read once per process."""
    return data.Tokenizer(directory).lib.sp


def encode(directory, documents):
    """Documents as one row of int16 ids, in bytes: BOS document EOS BOS document EOS ..."""
    ids = array.array("h")
    for document in tokenizer_in(directory).encode(documents, num_threads=1):
        ids.extend([BOS, *document, EOS])
    return ids.tobytes()


def make_tokens(path, text):
    """One long row of int16 ids: BOS document EOS BOS document EOS ..."""
    documents = text.read_text().strip().split("\n\n")
    parts = [documents[i:i + 2000] for i in range(0, len(documents), 2000)]
    with get_context("fork").Pool() as pool, open(path, "wb") as file:
        for ids in tqdm(pool.imap(partial(encode, path.parent), parts), text.stem, len(parts)):
            file.write(ids)


# ----------------------------------------------------------------------------------------- train

def windows(row, count, generator):
    """Random windows of one row of ids: (count, WINDOW + 1) int64, drawn on the row's device."""
    starts = torch.randint(len(row) - WINDOW, (count, 1), device=row.device, generator=generator)
    return row[starts + torch.arange(WINDOW + 1, device=row.device)].long()


def loss_of(net, ids):
    """Mean cross-entropy of the next token, (B, T + 1) int64 -> scalar float32."""
    logits = net(ids[:, :-1])                                                     # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def rate(step, steps, peak):
    """Learning rate: linear warm-up over 2 % of the steps, then a cosine down to 0."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(args, rows, device):
    """Pretrains a network on `rows` {name: ids}; returns it and what build/pretrain.json says."""
    cuda = device == "cuda"
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator(device).manual_seed(args.seed)
    held_out = {name: windows(row[-len(row) // 100:], 256 if cuda else 8, generator)
                for name, row in rows.items()}
    rows = {name: row[:-len(row) // 100] for name, row in rows.items()}
    counts = {"text": round(NATURAL * args.batch)}
    counts["stories"] = args.batch - counts["text"]

    net = model.init_weights(model.Llama(CONFIG).to(device), args.seed)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(loss_of) if cuda else loss_of
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=cuda)

    def measure():
        with torch.no_grad(), autocast():
            return {name: round(loss_of(net, ids).item(), 4) for name, ids in held_out.items()}

    steps, clock, started = args.steps, 0.0, time.time()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step - 1, steps, args.lr)
        ids = torch.cat([windows(rows[name], n, generator) for name, n in counts.items()])
        with autocast():
            loss = compiled(net, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == max(1, min(20, steps - 1)):               # compiled and warm: the clock starts
            loss.item()
            clock, first = time.time(), step
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}  train {loss.item():.3f}  held out {measure()}  "
                  f"{time.time() - started:.0f} s", flush=True)
    if cuda:
        torch.cuda.synchronize()
    speed = (steps - first) * args.batch * WINDOW / (time.time() - clock)
    return net, {"parameters": sum(p.numel() for p in net.parameters()), "steps": steps,
                 "batch": args.batch, "tokens": steps * args.batch * WINDOW, "lr": args.lr,
                 "corpus_tokens": {name: len(row) for name, row in rows.items()},
                 "held_out_loss": measure(), "tokens_per_second": round(speed),
                 "seconds": round(time.time() - started),
                 "device": torch.cuda.get_device_name() if cuda else "CPU",
                 "torch": torch.__version__}


PROMPTS = ["Nora had 14 shells. She found 8 more and gave 5 to Leo. In the end",
           "Tom has 6 boxes with 7 pens in each. The boxes hold", "25 + 38 =",
           "nine times eight is", "The garden was", "And the LORD said unto Moses,",
           "Elizabeth was", "lamp:"]


def main():
    """Every stage whose file is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--batch", type=int, default=512, help="windows of 256 tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stories-mb", type=int, default=150)
    parser.add_argument("--until", choices=["text", "tokens"], help="stop after this stage")
    parser.add_argument("--build", type=Path, default=HERE / "build")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()

    build = args.build
    build.mkdir(parents=True, exist_ok=True)
    texts = [build / "text.txt", build / "stories.txt"]

    def stage(path, make, *inputs):
        """Makes a file unless it is there; under another name first, so never half of one."""
        if not path.exists():
            began = time.time()
            half = path.with_name("half-" + path.name)
            make(half, *inputs)
            os.replace(half, path)
            print(f"{path.name}: {path.stat().st_size:,} bytes, {time.time() - began:.0f} s")

    stage(texts[0], english.make_text)
    if args.until == "text":
        return
    stage(texts[1], make_stories, args.stories_mb)
    stage(build / "tokenizer.model", make_tokenizer, texts)
    for text in texts:
        stage(text.with_suffix(".bin"), make_tokens, text)
    if args.until == "tokens":
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = {text.stem: torch.frombuffer(bytearray(text.with_suffix(".bin").read_bytes()),
                                        dtype=torch.int16).to(device) for text in texts}
    net, report = train(args, rows, device)

    meta_write.save(net.to(torch.bfloat16), args.out)
    (args.out / "tokenizer.model").write_bytes((build / "tokenizer.model").read_bytes())
    net, tokenizer = model.load(args.out, device=device, dtype=torch.float32), data.Tokenizer(build)
    prompts = [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
    ids = model.generate(net, prompts, max_new_tokens=48, eos=EOS)
    report["completions"] = {p: tokenizer.decode(i) for p, i in zip(PROMPTS, ids)}
    (build / "pretrain.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
