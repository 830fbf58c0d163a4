"""A training step in eight bits (fp8.py) beside sixteen, and beside the fastest peers.

    python -m bench.bench_eight --out bench/results/step_eight_h200.json      # on a GPU with float8
    python -m bench.bench_eight --tiny                                         # anywhere, a trial

Llama-2-7B's shape, rank 128, bfloat16: 8 x 512 tokens and one row of 8192, eager and compiled;
median seconds, tokens per second, peak memory, losses. Weights and tokens are those of steps.py.
Liger's kernels under PEFT, unsloth and torchtune are optional: each runs in a process of its own,
and one that is not installed is skipped with a line. torchtune trains A and B in bfloat16; the
others in float32. `kernels` says where a product in eight bits spends its time.
"""
import argparse
import copy
import importlib
import importlib.util
import statistics
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import nn

import fp8
import pissa
from bench import program
from bench.bench_generate import llama_config
from bench.steps import (
    CUDA,
    DEVICE,
    DTYPE,
    attempt,
    clock,
    fill,
    gib,
    injected,
    record,
    run_parts,
    sizes,
    trained,
    with_lora,
)
from train import compile_layers, loss_sum

# name: rows, tokens a row as a multiple of the default, checkpointing, compiled
SHAPES = {"8 x 512": (8, 1, False, False), "1 x 8192": (1, 16, False, False),
          "8 x 512, checkpointing": (8, 1, True, False),
          "8 x 512, compiled": (8, 1, False, True), "1 x 8192, compiled": (1, 16, False, True)}


def steps_of(args, part, net, loss, shapes, setup, dtypes=(torch.float32,)):
    """Time a network at each of these shapes. setup(checkpointing, compiled) prepares it."""
    base = args.before

    def one(rows, times, checkpointing, compiled):
        for name, p in net.named_parameters():
            if p.requires_grad and (name.endswith((".B", "lora_b.weight")) or "lora_B" in name):
                nn.init.zeros_(p)
        torch._dynamo.reset()                   # another shape shall not make the first one dynamic
        setup(checkpointing, compiled)
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        given = copy.copy(args)
        given.length = args.length * times
        return trained(given, args.seven, net, loss, rows, *((8, 3) if CUDA else (2, 1)), base,
                       dtypes)

    for name, (rows, times, checkpointing, compiled) in shapes.items():
        if not (compiled and not (CUDA or args.tiny)):
            attempt(args, part, name, one, rows, times, checkpointing, compiled)
    record(args, part, "held", {"gib": gib("memory_allocated", base)})


def ours(args, part, bits):
    """Our step with weights in 16, 8 or 4 bits."""
    args.before = gib("memory_allocated")
    net, _, seconds = injected(args.seven, "qlora" if bits < 16 else "lora", args.rank, bits)
    record(args, part, "made", {"seconds": seconds, "peak_gib": gib("max_memory_allocated")})

    def setup(checkpointing, compiled):
        net.checkpointing = checkpointing
        for layer in net.model.layers:
            layer.__dict__.pop("forward", None)                              # what was compiled
        if compiled:
            compile_layers(net)

    steps_of(args, part, fill(net), loss_sum, SHAPES, setup)


def kernels(args, part="kernels"):
    """Seconds of the parts of one product, 8 x 512 tokens by a square matrix and by an MLP's."""
    n, c = 8 * args.length, args.seven
    for k, m in ((c.dim, c.dim), (c.dim, c.ffn_dim), (c.ffn_dim, c.dim)):
        x, W = (torch.randn(s, k, device=DEVICE, dtype=DTYPE) for s in (n, m))
        g, Q = torch.randn(n, m, device=DEVICE, dtype=DTYPE), fp8.quantize(W)
        x8, a = fp8.by_rows(x)
        parts = {"bfloat16": lambda x=x, W=W: F.linear(x, W), "round x": lambda x=x: fp8.by_rows(x),
                 "round x, plain": lambda x=x: fp8.by_rows.plain(x),
                 "round g": lambda g=g, Q=Q: fp8.by_rows(g, Q.scale.T),
                 "multiply": lambda x8=x8, a=a, Q=Q: fp8.multiply(x8, a, Q.codes, Q.scale.T, DTYPE),
                 "product": lambda x=x, Q=Q: Q.product(x),
                 "product_T": lambda g=g, Q=Q: Q.product_T(g)}
        found = {}
        for name, f in parts.items():
            for _ in range(3):
                f()
            times = []
            for _ in range(5):
                start = clock()
                for _ in range(20 if CUDA else 1):
                    f()
                times.append((clock() - start) / (20 if CUDA else 1))
            found[name] = statistics.median(times)
        y, exact = Q.product(x).float(), F.linear(x, W).float()
        found["relative error"] = ((y - exact).norm() / exact.norm()).item()
        record(args, part, f"{n} x {k} x {m}", found)


# ------------------------------------------------------------------------------------------ peers

def skipped(args, part, *needed):
    """True if a package is missing; says so."""
    for name in needed:
        if importlib.util.find_spec(name) is None:
            record(args, part, "skipped", {"reason": f"{name} is not installed"})
            return True
    return False


def labelled_loss(net, tokens, labels):
    """The sum of the cross-entropies; the network is given labels, and never makes all logits."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        ids = torch.cat([tokens, labels[:, -1:]], 1).to(DEVICE)      # they shift labels by one
        return net(input_ids=ids, labels=ids, use_cache=False).loss * labels.numel()


def checkpointed(net, on):
    """transformers' switch."""
    if on:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        net.gradient_checkpointing_disable()


def liger(args, part):
    """PEFT on transformers with Liger's kernels, under autocast."""
    if skipped(args, part, "liger_kernel", "transformers", "peft"):
        return
    import transformers
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    apply_liger_kernel_to_llama(rope=True, swiglu=True, rms_norm=True,
                                fused_linear_cross_entropy=True)
    args.before = gib("memory_allocated")
    c = llama_config(args.seven, DTYPE, use_cache=False, attn_implementation="sdpa",
                     max_position_embeddings=16384)
    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(c).to(DTYPE)
    net.model.rotary_emb = type(net.model.rotary_emb)(c).to(DEVICE)
    net = with_lora(fill(net.requires_grad_(False)), args.rank).train()

    def setup(checkpointing, compiled):
        checkpointed(net.get_base_model(), checkpointing)
        if compiled:
            net.compile()

    steps_of(args, part, net, labelled_loss, SHAPES, setup)


def unsloth(args, part, checkpointing=False, four=False):
    """unsloth's FastLanguageModel, which reads a checkpoint from a disk. Its checkpointing, through
    host memory, is chosen when A and B are made: in a process of its own."""
    if skipped(args, part, "unsloth", "unsloth_zoo", "transformers", "peft", "trl"):
        return
    theirs = importlib.import_module("unsloth")          # before transformers, which it changes
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    c = llama_config(args.seven, DTYPE, max_position_embeddings=16384)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            net = transformers.LlamaForCausalLM(c).to(DTYPE)
        net.model.rotary_emb = type(net.model.rotary_emb)(c).to(DEVICE)
        fill(net).save_pretrained(folder)
        words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
            pad_token="<unk>").save_pretrained(folder)            # it asks for one, unused here
        del net
        torch.cuda.empty_cache()
        args.before = gib("memory_allocated")
        net, _ = theirs.FastLanguageModel.from_pretrained(
            folder, max_seq_length=16384, dtype=DTYPE, load_in_4bit=four,
            tokenizer_name=None, local_files_only=True, fix_tokenizer=False)
    net = theirs.FastLanguageModel.get_peft_model(
        net, r=args.rank, lora_alpha=args.rank, lora_dropout=0, bias="none",
        target_modules=list(pissa.TARGETS),
        use_gradient_checkpointing="unsloth" if checkpointing else False)
    for p in net.parameters():
        if p.requires_grad:
            p.data = p.data.float()

    shapes = {name: shape for name, shape in SHAPES.items()
              if shape[2] == checkpointing and not shape[3]}
    steps_of(args, part, net.train(), labelled_loss, shapes, lambda *_: None)


def torchtune(args, part):
    """torchtune's lora_llama2_7b, A and B in bfloat16, chunked loss."""
    if skipped(args, part, "torchtune", "torchao"):
        return
    from torchtune.models.llama2 import lora_llama2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import compile_loss, compile_model, set_activation_checkpointing
    c, standard = args.seven, torch.get_default_dtype()
    args.before = gib("memory_allocated")
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        net = lora_llama2(["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True,
                          vocab_size=c.vocab_size, num_layers=c.n_layers, num_heads=c.n_heads,
                          num_kv_heads=c.n_kv_heads, embed_dim=c.dim, max_seq_len=16384,
                          intermediate_dim=c.ffn_dim, lora_rank=args.rank, lora_alpha=args.rank)
    torch.set_default_dtype(standard)
    set_trainable_params(net, get_adapter_params(net))
    chunks = CEWithChunkedOutputLoss()
    net.set_num_output_chunks(chunks.num_output_chunks)

    def loss(net, tokens, labels):
        return chunks(net(tokens.to(DEVICE)), labels.to(DEVICE)) * labels.numel()

    def setup(checkpointing, compiled):
        if compiled:
            compile_model(net, verbose=False)
            compile_loss(chunks, verbose=False)
        if checkpointing:
            from torchtune.modules import TransformerSelfAttentionLayer
            set_activation_checkpointing(net, {TransformerSelfAttentionLayer})

    # Their checkpointing cannot be undone, so it comes last.
    shapes = dict(sorted(SHAPES.items(), key=lambda item: item[1][2]))
    steps_of(args, part, net.train(), loss, shapes, setup, (DTYPE,))


PARTS = {"kernels": kernels, "16 bits": lambda args: ours(args, "16 bits", 16),
         "8 bits": lambda args: ours(args, "8 bits", 8),
         "PEFT, Liger": lambda args: liger(args, "PEFT, Liger"),
         "unsloth": lambda args: unsloth(args, "unsloth"),
         "unsloth, checkpointing": lambda args: unsloth(args, "unsloth", True),
         "4 bits": lambda args: ours(args, "4 bits", 4),
         "unsloth, 4 bits": lambda args: unsloth(args, "unsloth, 4 bits", four=True),
         "unsloth, 4 bits, checkpointing":
             lambda args: unsloth(args, "unsloth, 4 bits", True, True),
         "torchtune": lambda args: torchtune(args, "torchtune")}


def main():
    """Each part in a process of its own."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    args = sizes(p, PARTS)
    args.rank, args.bits = 8 if args.tiny else 128 if CUDA else 16, 8
    run_parts(args, PARTS, "bench.bench_eight",
              {"bench": "step_eight", "rank": args.rank, "length": args.length})


if __name__ == "__main__":
    program(main, clock="--file" in sys.argv)
