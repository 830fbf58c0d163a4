"""Checkpoints and adapters from one form into another; nothing is trained.

    python convert.py merge runs/demo runs/merged         # a whole checkpoint
    python convert.py merge runs/demo runs/demo.gguf      # for llama.cpp
    python convert.py compress runs/demo/adapter runs/small     # rank 2r -> r
    python convert.py hf checkpoints/tiny runs/tiny-hf    # for transformers
    python convert.py gguf SmolLM2-135M-Instruct.Q4_1.gguf checkpoints/smollm2
    python convert.py decompose llama2-7b runs/residual   # the authors' layout

merge writes the whole fine-tuned model, for programs that cannot read adapters. compress halves an
adapter. hf writes a base as PEFT and vLLM read it. gguf turns a file of llama.cpp into a checkpoint
that can be trained. decompose writes W_res, and A and B as its adapter. `python convert.py merge
--help` says more, and so do the others. The output appears when it is complete, or not at all.
"""
from support import options

if __name__ == "__main__":                                          # before torch is loaded
    options.begin(options.for_convert, __doc__)

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

import adapter
import data
import model
import pissa
from formats import CHECKPOINT_FILES, gguf, gguf_write, hf, meta_write, peft, tokenizer
from formats.jsonl import filled
from support import chats, decomposed
from support.files import check_room, replaced
from support.report import run

# The files of a checkpoint besides weights and numbers: how text becomes tokens, and when to stop.
COMPANIONS = ("tokenizer.model", *(f"tokenizer.model.v{n}" for n in range(1, 10)),
              "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
              "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
              "chat_template.json", "generation_config.json")


# ----------------------------------------------------------------------------- writing a checkpoint

def layout_of(directory):
    """"hf" or "meta": the layout in which `model.open_checkpoint` reads a directory."""
    return "hf" if (directory / "config.json").is_file() else "meta"


def check_layout(layout, config):
    """ValueError if a model cannot be written in a layout; called before it is trained."""
    if layout == "meta":
        meta_write.params_json(config)
    else:
        hf.writer()


def write_checkpoint(out, source, config, tensors, dtype, layout=None):
    """Write a whole checkpoint to `out`: weights, config, tokenizer. All of it appears, or nothing.

    source: the directory of the checkpoint it was made from, for the rest of the files.
    config: a model.Config. tensors: (name, tensor) pairs. dtype: the one that config.json names.
    layout: "hf", in shards of 5 GB, one in memory at a time; "meta", one file, which is in memory
    as a whole before it is written; None: the source's.
    """
    with replaced(out, (*CHECKPOINT_FILES, *COMPANIONS)) as tmp:
        if (layout or layout_of(source)) == "meta":
            meta_write.save_tensors(tmp, config, tensors)
        else:
            meta = layout_of(source) == "meta"      # whose tokenizer.model is not all they need
            files, ids = gguf_write.hf_files(source, config) if meta else ({}, {})
            hf.save_folder(tmp, {**hf_config(source, config, dtype), **ids}, tensors)
            for name, content in files.items():
                (tmp / name).write_bytes(content)
        for file in (source / name for name in COMPANIONS if (source / name).is_file()):
            shutil.copyfile(file, tmp / file.name)
        if layout_of(source) == "hf" and layout == "meta":
            # config.json is left behind, and it may name the tokens that end a text.
            generation, ids = tokenizer.optional_json(tmp / "generation_config.json"), set()
            for name in ("config.json", "generation_config.json"):
                with tokenizer.usable(source / name):
                    found = tokenizer.optional_json(source / name)
                    ids.update(tokenizer.eos_ids(found, config.vocab_size))
            if ids:
                text = json.dumps({**generation, "eos_token_id": sorted(ids)}, indent=2) + "\n"
                (tmp / "generation_config.json").write_text(text)


def hf_config(source, config, dtype):
    """The dict of a config.json: the source's own if it has one, or one made of `config`."""
    if layout_of(source) == "meta":
        return hf.config_json(vars(config), dtype)
    found = hf.read_json(source / "config.json")
    keys = [k for k in ("dtype", "torch_dtype") if k in found] or ["torch_dtype"]
    return {**found, **dict.fromkeys(keys, dtype_name(dtype)), "tie_word_embeddings": config.tied}


def dtype_name(dtype):
    """torch.bfloat16 -> bfloat16"""
    return str(dtype).removeprefix("torch.")


def check_out(out, layout=None):
    """ValueError unless `out` is a new or an empty directory, or for "gguf" a new file."""
    if layout == "gguf":
        if out.suffix != ".gguf" or out.exists() or out.is_symlink():
            raise ValueError(f"{out}{' is there already' if out.suffix == '.gguf' else ''}: name "
                             "a new file that ends in .gguf")
        return gguf_write.package()
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise ValueError(f"{out} is a file; name a directory")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; name a new directory")


def converted(name, W, dtype):
    """W in another dtype; ValueError if some numbers are too large for it."""
    W = W.to(dtype)
    if not W.isfinite().all():
        raise ValueError(f"{name} holds NaN or Inf in {dtype_name(dtype)}")
    return W


def say_template(out, config, stored):
    """Print what llama.cpp and Ollama have to be told about a GGUF."""
    length = gguf_write.context_length(config)
    if length != config.max_seq_len:
        print(f"note: a context of {length} tokens is stated, " + (
            "the sliding window" if config.sliding_window else "since the base states none"))
    if stored:
        return
    template = data.PROMPT.format(instruction="{{ .Prompt }}")
    print("ask it in the template of its training; for Ollama this is a Modelfile:\n\n"
          f'FROM ./{out.name}\nTEMPLATE """{template}"""\n')


def say_written(out, what):
    """Print what was written, its size, and the command that uses it."""
    files = [out] if out.is_file() else [f for p in CHECKPOINT_FILES for f in out.glob(p)]
    size = sum(f.stat().st_size for f in files) / 1e9
    print(filled(f"{what}, {size:,.2f} GB in {out}"))
    if out.is_dir():
        print(options.use_it("--ckpt", out))


# ---------------------------------------------------------------------------------------- commands

def open_gguf(path):
    """(config, {parameter name: function that reads it}, all keys) of a GGUF."""
    numbers, found, info = gguf.open_gguf(path)
    config = model.Config(**numbers)
    found = gguf.checked(found, model.parameter_shapes(config, len(found), path), path)
    if info["general.architecture"] in gguf.INTERLEAVED:           # q and k are in Meta's order
        found = {n: partial(lambda n, read: model.reorder(read(), n, config), n, read)
                 for n, read in found.items()}
    return config, found, info


def from_gguf(args):
    """A GGUF to Hugging Face's layout."""
    check_out(args.out)
    config, tensors, info = open_gguf(args.model)
    files, ids = gguf.tokenizer_files(info, config.vocab_size, args.model)
    dtype = getattr(torch, args.dtype)
    bar = tqdm(tensors.items(), desc="convert", unit="tensor", leave=False)
    written = ((name, read() if hf.is_shifted(name, vars(config)) else
                converted(name, read(), dtype)) for name, read in bar)
    with replaced(args.out, (*CHECKPOINT_FILES, *COMPANIONS)) as tmp:
        hf.save_folder(tmp, hf.config_json(vars(config), dtype, **ids), written)
        for name, content in files.items():
            (tmp / name).write_bytes(content)
    say_written(args.out, f"{len(tensors)} tensors, layout hf, {args.dtype}")


def base_and_adapter(path, ckpt):
    """(base, adapter): the two directories of a run, or of an adapter with its base `ckpt`. A run
    of --method full has no adapter: (its checkpoint, None)."""
    if (path / "adapter_config.json").is_file():
        if (ckpt := ckpt or options.base_of(path)) == "BASE":
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
    """Base and adapter to a checkpoint. Or, for `hf`, a base alone."""
    alone = args.command == "hf"
    source, where = ((model.find(args.base), None) if alone else
                     base_and_adapter(args.run, args.ckpt))
    layout = args.layout or ("gguf" if args.out.suffix == ".gguf" else layout_of(source))
    check_out(args.out, layout)
    config, tensors = model.open_checkpoint(source)
    saved = where and adapter.read_adapter(where, args.force_base)
    pairs, sums = saved.pairs if saved else {}, {}
    stored = None if alone else chats.trained_in(where, args.run, source)
    if config.tied and "lm_head" in pairs:        # one matrix with two uses; only one is changed
        config = replace(config, tied=False)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        print("the output projection was the embedding; changed, it is a matrix of its own")
    if saved:
        check_base(saved, tensors)
    dtype = None if args.dtype == "source" else getattr(torch, args.dtype)

    def merged():
        for name, read in tqdm(tensors.items(), desc=args.command, unit="tensor", leave=False):
            W, module = read(), name.removesuffix(".weight")
            target = W.dtype if hf.is_shifted(name, vars(config)) else dtype or W.dtype
            if module in pairs:
                W = add(saved, module, W.to(torch.promote_types(W.dtype, torch.float32)), sums)
            yield name, converted(name, W, target)

    stated = dtype or tensors["model.embed_tokens.weight"]().dtype
    shapes = model.parameter_shapes(config, len(tensors), source)
    check_room(args.out, stated.itemsize * sum(map(math.prod, shapes.values())), "the checkpoint")
    if layout == "gguf":
        dtype = stated                                    # one for all matrices of the file
        shapes = {name: shapes[name] for name in tensors}
        gguf_write.save(args.out, source, config, merged(), shapes, stated)
        say_template(args.out, config, stored)
    else:
        write_checkpoint(args.out, source, config, merged(), stated, layout)
    if sums and adapter.codes(sums) != saved.facts["codes"]:
        print(filled(f"note: {adapter.ROUNDED_ELSEWHERE.format(where)}"))
    changed = "" if alone else f"{len(pairs)} of "
    chats.say_training(None if alone else tokenizer.chat_template(source), stored)
    say_written(args.out, f"{changed}{len(tensors)} tensors{'' if alone else ' changed'}, layout "
                          f"{layout}, {dtype_name(stated)}")


def check_base(saved, tensors):
    """ValueError unless an adapter belongs to the checkpoint with these {name: read}."""
    entries = {}
    for name in saved.pairs:
        if name.rpartition(".")[2] not in (*pissa.TARGETS, "lm_head") or \
                f"{name}.weight" not in tensors:
            raise ValueError(f"{saved.directory}: the model has no linear layer {name}")
        W = saved.check(name, tensors[f"{name}.weight"]())
        entries[name] = W.shape, pissa.sampled(W)
    saved.check_old(entries)
    if "lm_head.weight" not in tensors:                                           # tied
        tensors = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    peft.check_bases(saved.directory, saved.bases, lambda name: tensors.get(name, lambda: None)())


def add(saved, name, W, sums):
    """W + Delta W of a module, (out, in) as W, in float32 or more.

    An adapter in few bits was trained as Q + A B, so that is returned. The checksum of Q goes into
    sums[name].
    """
    A, B = saved.pairs[name]
    if saved.facts["bits"] != 16:
        Q, A, B, *_ = saved.rebuild(name, W)
        W, sums[name] = Q.dequantize(W.dtype), Q.checksum()
    return pissa.residual(W, -A, B)                                               # W + (A B)^T


def compress(args):
    """An adapter to one of lower rank."""
    check_out(args.out)
    errors = adapter.compress(args.adapter, args.out, args.rank)
    ranks = {A.shape[1] for A, _ in adapter.read_adapter(args.out).pairs.values()}
    rank = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
    lost, whole = (math.hypot(*(e[i] for e in errors.values())) for i in (0, 1))
    worst = max(errors, key=lambda name: errors[name][0] / max(errors[name][1], 1e-30))
    if adapter.is_quantised(args.adapter):
        print(filled(f"note: {adapter.EXPORTED}"))
    print(filled(f"{len(errors)} matrices at rank {rank} in {args.out}; relative error of Delta W "
                 f"(Frobenius) {lost / max(whole, 1e-30):.2%}, worst {worst} "
                 f"{errors[worst][0] / max(errors[worst][1], 1e-30):.2%}. eval.py --accuracy tells "
                 "what that costs"))
    print(options.use_it("--ckpt", options.base_of(args.adapter), "--adapter", args.out))


def main():
    """Do what the command line asks for."""
    args = options.begun(options.for_convert, __doc__)
    {"merge": merge, "hf": merge, "compress": compress, "gguf": from_gguf,
     "decompose": partial(decomposed.write, check_out, write_checkpoint)}[args.command](args)


if __name__ == "__main__":
    run(main, "convert.py")
