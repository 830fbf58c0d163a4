"""The same steps on GSM8K packed, padded, and by PEFT with the collator of the authors' scripts.

    python -m bench.bench_packing --ckpt smollm2 --data gsm8k/train.jsonl --batch 16 --out ...
    python -m bench.bench_packing --random-7b --tokenizer llama2 --data gsm8k/train.jsonl \
        --device cuda --steps 59 --repeat 1 --out bench/results/packing_7b_h200.json

Every side trains the same A and B, on the same tensors W_res, over the same batches from the same
start; sides take turns, --repeat times, and the fastest of a step's times counts. Ours is the loop
of train.py, with and without packing. PEFT's is transformers' Trainer by hand: --peft-micro-batch
examples in the order of the batch, padded to the longest, with an attention mask, and the network's
own loss divided by the learnt tokens of the batch. On a GPU PEFT also runs under autocast, as by
Trainer(bf16=True), and in the end ours is compiled, too. A step like the others warms each side up.
"""
import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

import data
import model
import pissa
import train
from bench import NO_STATES, program, report
from bench.bench_generate import twin
from bench.steps import with_lora


def peft_twin(net, theirs, rank):
    """PEFT's model of `theirs`, whose frozen weights are those of the injected `net`."""
    rotary = theirs.model.rotary_emb                            # its table should stay in float32
    theirs.model.rotary_emb = type(rotary)(theirs.config).to(net.lm_head.weight.device)
    theirs = with_lora(theirs, rank)
    for name, m in pissa.layers(net):
        theirs.base_model.model.get_submodule(name).base_layer.weight = m.weight
    return theirs.train()


@torch.no_grad()
def start_again(net, theirs):
    """A and B at their initial values on both sides."""
    for name, m in pissa.layers(net):
        m.A.copy_(m.A0), m.B.copy_(m.B0)
        lora = theirs.base_model.model.get_submodule(name)
        lora.lora_A["default"].weight.copy_(m.A0.T), lora.lora_B["default"].weight.copy_(m.B0.T)


def collate(group):
    """Examples in a rectangle: ids, labels (-100: no loss) and attention mask, each (b, T)."""
    T = max(len(ids) for ids, _ in group)
    ids, labels, mask = (torch.full((len(group), T), value) for value in (0, -100, 0))
    for row, (example, n_prompt) in enumerate(group):
        n = len(example)
        ids[row, :n], labels[row, n_prompt:n] = torch.tensor(example), torch.tensor(
            example[n_prompt:])
        mask[row, :n] = 1
    return ids, labels, mask


def peft_train(theirs, examples, args, autocast):
    """train.train for PEFT's model: losses and seconds of every step."""
    params = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0, fused=True)
    device, rows = params[0].device, []
    for step, batch in enumerate(data.batches(examples, args.batch, args.seed, 0)[:args.steps]):
        start, total = time.perf_counter(), 0.0
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, args.steps, args)
        learnt = sum(len(ids) - n_prompt for ids, n_prompt in batch)
        for i in range(0, len(batch), args.peft_micro_batch):
            ids, labels, mask = (t.to(device) for t in collate(batch[i:i + args.peft_micro_batch]))
            with autocast:
                loss = theirs(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False,
                              num_items_in_batch=learnt).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(params, args.clip)
        rows.append({"loss": total.item()})
        optimizer.step()
        optimizer.zero_grad()
        rows[-1]["seconds"] = time.perf_counter() - start
    return rows


def sides(net, theirs, examples, args):
    """{name: function of (examples, steps) that trains and returns rows of loss and seconds}."""
    def ours(padded):
        def run(examples, steps):
            args.no_packing, args.steps = padded, steps
            return train.train(net, examples, args, nullcontext())[0]
        return run

    def peft(autocast):
        def run(examples, steps):
            args.steps = steps
            return peft_train(theirs, examples, args, autocast)
        return run

    found = {"packed": ours(False), "padded": ours(True), "PEFT": peft(nullcontext())}
    if net.lm_head.weight.is_cuda:
        found["PEFT, autocast"] = peft(torch.autocast("cuda", torch.bfloat16))
    return found


def compare(net, theirs, examples, args):
    """What every side takes and what its losses are."""
    rows, gpu, peak, steps = {}, net.lm_head.weight.is_cuda, {}, args.steps
    batches = data.batches(examples, args.batch, args.seed, 0)[:steps]

    def by_turns(found):
        for name, run in found.items():            # of two lengths at least: sizes become variable
            start = time.perf_counter()
            run(batches[0], 1)
            print(f"{name}: warm-up {time.perf_counter() - start:.1f} s", flush=True)
        for _ in range(args.repeat):
            for name, run in found.items():
                start_again(net, theirs)
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                rows.setdefault(name, []).append(run(examples, steps))
                peak[name] = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
                print(f"{name}: {[round(r['seconds'], 2) for r in rows[name][-1]]}", flush=True)

    found = sides(net, theirs, examples, args)
    by_turns(found)
    if gpu:
        train.compile_layers(net)
        by_turns({"packed, compiled": found["packed"]})
    tokens, reference = sum(len(ids) for b in batches for ids, _ in b), rows["packed"][0]
    result = {}
    for name, rounds in rows.items():
        seconds = sum(min(step) for step in zip(*([r["seconds"] for r in rs] for rs in rounds)))
        losses = [r["loss"] for r in rounds[0]]
        result[name] = {"seconds": seconds, "tokens_per_second": tokens / seconds,
                        "peak_gib": peak[name], "losses": losses, "loss_difference": max(
                            abs(a / b["loss"] - 1) for a, b in zip(losses, reference))}
    fastest = min(r["seconds"] for name, r in result.items() if "PEFT" in name)
    for name, r in result.items():
        r["times_as_fast_as_peft"] = fastest / r["seconds"]
        print(name, {k: v for k, v in r.items() if k != "losses"})
    return {"tokens": tokens, "examples": sum(map(len, batches)), "sides": result}


def main():
    """One model, every side."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", help="a checkpoint")
    p.add_argument("--random-7b", action="store_true", help="Llama-2-7B's shape, random weights")
    p.add_argument("--tokenizer", help="with --random-7b: the directory of Llama 2's")
    p.add_argument("--layers", type=int, default=32, help="with --random-7b: fewer, for a trial")
    p.add_argument("--data", required=True)
    p.add_argument("--max-length", type=int, default=512)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--micro-batch", type=int, default=8, help="of train.py")
    p.add_argument("--peft-micro-batch", type=int, default=4)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--repeat", type=int, default=3)
    p.add_argument("--cpu-seconds", action="store_true", help="count seconds of this process, "
                   "not those of others on the same cores; with OMP_NUM_THREADS=1")
    p.add_argument("--device")
    p.add_argument("--dtype", choices=["float32", "bfloat16"])
    p.add_argument("--out")
    args = p.parse_args()
    device, kept = model.default_device(args.device), args.out
    if args.cpu_seconds:
        time.perf_counter = time.process_time                             # train.train's clock, too
    if args.ckpt:
        net = model.load(args.ckpt, device, args.dtype and getattr(torch, args.dtype))
    else:
        with torch.device(device):
            net = model.Llama(model.Config(n_layers=args.layers)).to(torch.bfloat16)
        model.init_weights(net)
    theirs = twin(net)
    pissa.inject(net, args.rank, keep_base=False)
    theirs = peft_twin(net, theirs, args.rank)
    tok = data.Tokenizer(model.find(args.ckpt) if args.ckpt else Path(args.tokenizer))
    examples = data.encode(data.read(args.data), tok, args.max_length)[0]
    vars(args).update(lr=2e-5, weight_decay=0.0, warmup=0.03, clip=1.0, seed=0, epochs=1,
                      method="pissa", **NO_STATES)
    with tempfile.TemporaryDirectory() as scratch:
        args.out = Path(scratch)                                            # of train.train's log
        found = compare(net, theirs, examples, args)
    import peft
    import transformers
    name = model.find(args.ckpt).name if args.ckpt else f"Llama-2-7B shape, {args.layers} layers"
    dtype = str(net.lm_head.weight.dtype).removeprefix("torch.")
    report({"bench": "packing", "model": name, "dtype": dtype, "batch": args.batch,
            "micro_batch": args.micro_batch, "peft_micro_batch": args.peft_micro_batch,
            "rank": args.rank, **found, "peft": peft.__version__,
            "transformers": transformers.__version__}, kept)


if __name__ == "__main__":
    program(main)
