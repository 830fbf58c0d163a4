"""The authors' published layout: "decomposed once, reused". Made by `convert.py decompose`.

    OUT/              W_res in place of W: a checkpoint in Hugging Face's layout
    OUT/pissa_init/   A and B as a LoRA of PEFT's, to be put on it: W_res + A B = W

PEFT, TRL and the authors' scripts load it, and so does this code, as a base and its adapter. What
is trained then is what `pissa.inject` with the same seed trains, to the last bit.

For QPiSSA, W_res is Q as plain numbers. Rounded to four bits again, without double quantisation,
they give the codes of Q, here and in bitsandbytes: the largest number of a block is +-1 times its
absmax, so absmax is found again, and every other number lies on its level.

The residual alone is a broken model. Our loader refuses the adapter on any other base, but no file
can tell PEFT which base is meant.
"""
import json
import math

import torch
from torch import nn
from tqdm import tqdm

import adapter
import model
import nf4
import pissa
from formats import hf, peft
from formats.jsonl import filled
from formats.meta import check_finite
from support import options
from support.files import check_room, replaced, write_text

INIT = "pissa_init"                                                # the authors' name


def write(check_out, write_checkpoint, args):
    """Decompose a base into a new directory, and print how to train it.

    check_out, write_checkpoint: convert's. args: base, out, method, rank, niter, seed, targets,
    dtype, device, as convert.py decompose has them. Weights are read one at a time, A and B are
    held. ValueError, before anything is written, for a rank or targets that `pissa.inject` refuses.
    """
    check_out(args.out)
    source, device = model.find(args.base), model.default_device(args.device)
    config, tensors = model.open_checkpoint(source)
    with torch.device("meta"):
        net = model.Llama(config)
    linears = pissa.find_linears(net, args.targets, args.rank)
    if config.tied and "lm_head" in linears:
        raise ValueError(f"{source}: lm_head is the embedding, which has no residual: leave it out")
    init, four = pissa.init_of(args.method), args.method == "qpissa"
    asked = args.dtype or ("float32" if four else "source")
    dtype = None if asked == "source" else getattr(torch, asked)
    pairs, extras, sums = {}, {}, {}

    def residual(name, W):
        options = pissa.Options(args.rank, args.niter, pissa.generator_of(name, args.seed, device),
                                double_quant=False)
        frozen, A, B, _ = init(W.to(device), options)
        pairs[name] = A.cpu(), B.cpu()
        if isinstance(frozen, nn.Module):
            frozen = frozen.dequantize(W.dtype)
            sums[name] = nf4.quantize(frozen, double=False).checksum()
        extras[f"{name}.fingerprint"] = pissa.sampled(frozen)
        return frozen.cpu()

    def residuals():
        for name, read in tqdm(tensors.items(), "decompose", unit="tensor", leave=False):
            W, module = read(), name.removesuffix(".weight")
            if not hf.is_shifted(name, vars(config)):
                W = check_finite(W.to(dtype or W.dtype), f"{source}: {name}")
            yield name, residual(module, W) if module in linears else W

    stated = dtype or tensors["model.embed_tokens.weight"]().dtype
    ranks = sum(args.rank * sum(m.weight.shape) for m in linears.values())
    check_room(args.out, 4 * ranks + stated.itemsize * sum(
        math.prod(p.shape) for p in net.parameters()), "the residual and its adapter")
    with replaced(args.out) as tmp:
        write_checkpoint(tmp, source, config, residuals(), stated, "hf")
        found = {**peft.LORA, "method": args.method, "rank": args.rank, "niter": args.niter,
                 "seed": args.seed}
        if four:
            found |= {"bits": 4, "double_quant": False, "codes": adapter.codes(sums)}
        adapter.write(tmp / INIT, pairs, found, extras, "CAUSAL_LM",
                      [n for n, _ in net.named_modules()])
        path = tmp / INIT / "adapter_config.json"      # they are in the file, not to be made again
        text = {**json.loads(path.read_text()), "init_lora_weights": True}
        write_text(path, json.dumps(text, indent=2) + "\n")
    print(filled(f"{len(pairs)} matrices at rank {args.rank} in {args.out / INIT}"))
    print("train them:")
    print(options.pasted(["python", "train.py", "--ckpt", args.out, "--adapter", args.out / INIT,
                          "--data", "FILE"]))
