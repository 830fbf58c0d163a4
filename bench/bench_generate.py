"""Tokens per second of greedy generation, beside transformers' `generate` with the same weights.

    python -m bench.bench_generate --ckpt smollm2 --out bench/results/generate_cpu.json
    python -m bench.bench_generate --ckpt smollm2 --random-7b --device cuda --out ...

Both get the same random prompts of 64 tokens and write 256 new ones (no EOS), with the prompt's
own pass counted. Runs alternate after one warm-up each; the median counts. transformers runs
eagerly with its defaults (SDPA attention, DynamicCache). `logits` is the largest difference of the
prompts' logits over their scale. `same` is the share of equal tokens: rounding may flip a near tie,
after which continuations differ, and random weights consist of near ties.
"""
import argparse
import statistics
import time

import torch

import model
from bench import program, report


def llama_config(c, dtype, **more):
    """transformers' LlamaConfig of a model.Config; more: further settings."""
    import transformers
    return transformers.LlamaConfig(
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size,
        rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, tie_word_embeddings=c.tied,
        **{"max_position_embeddings": 4096, "dtype": dtype, **more})


def twin(net):
    """transformers' LlamaForCausalLM on the very tensors of `net`."""
    import transformers
    config = llama_config(net.config, net.lm_head.weight.dtype)
    theirs = transformers.LlamaForCausalLM(config).to(net.lm_head.weight.dtype).eval()
    theirs.load_state_dict(net.state_dict(), assign=True)
    return theirs.to(net.lm_head.weight.device).requires_grad_(False)


def measure(net, theirs, batch, args):
    """{name: seconds}, medians of alternating runs; logits and same, as told above."""
    generator = torch.Generator().manual_seed(batch)
    shape = batch, args.prompt_tokens
    prompts = torch.randint(3, net.config.vocab_size, shape, generator=generator)
    there = prompts.to(net.lm_head.weight.device)

    def ours():
        return model.generate(net, prompts.tolist(), args.new_tokens)

    def transformers():
        out = theirs.generate(there, attention_mask=torch.ones_like(there), do_sample=False,
                              max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens,
                              eos_token_id=None, pad_token_id=0)
        return out[:, args.prompt_tokens:].tolist()

    seconds = {"ours": [], "transformers": []}
    for i in range(args.repeat + 1):
        for run in (ours, transformers):
            start = time.perf_counter()
            out = run()
            if i:                                                            # the first warms up
                seconds[run.__name__].append(time.perf_counter() - start)
            seconds.setdefault("out", {})[run.__name__] = out
    a, b = (torch.tensor(rows) for rows in seconds.pop("out").values())
    with torch.inference_mode():
        mine, reference = net(there), theirs(there).logits.float()
    difference = (mine - reference).abs().max() / reference.abs().max()
    return {name: statistics.median(s) for name, s in seconds.items()}, {
        "logits": difference.item(), "same": (a == b).float().mean().item()}


def main():
    """Every model at every batch size."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", nargs="*", default=[], help="checkpoints")
    p.add_argument("--random-7b", action="store_true", help="Llama-2-7B's shape, random weights")
    p.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--new-tokens", type=int, default=256)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--device")
    p.add_argument("--dtype", choices=["float32", "bfloat16"])
    p.add_argument("--out")
    args = p.parse_args()
    device = model.default_device(args.device)
    rows = []
    for ckpt in [*args.ckpt, *["Llama-2-7B shape"] * args.random_7b]:
        if ckpt in args.ckpt:
            net = model.load(ckpt, device, args.dtype and getattr(torch, args.dtype))
        else:
            with torch.device(device):
                net = model.init_weights(model.Llama(model.Config()).to(torch.bfloat16))
        net.requires_grad_(False)
        theirs, dtype = twin(net), str(net.lm_head.weight.dtype).removeprefix("torch.")
        for batch in args.batches:
            seconds, agreement = measure(net, theirs, batch, args)
            speed = {name: batch * args.new_tokens / s for name, s in seconds.items()}
            rows.append({"model": model.find(ckpt).name if ckpt in args.ckpt else ckpt,
                         "dtype": dtype, "batch": batch, "tokens_per_second": speed,
                         "ratio": speed["ours"] / speed["transformers"], **agreement})
            print(rows[-1], flush=True)
        del net, theirs
    import transformers
    report({"bench": "generate", "prompt_tokens": args.prompt_tokens, "rows": rows,
            "new_tokens": args.new_tokens, "transformers": transformers.__version__}, args.out)


if __name__ == "__main__":
    program(main)
