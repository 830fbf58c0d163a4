"""What the programs say to people: the lines they print, the picture of the loss, summary.json.

Nothing here changes a weight. train.py, eval.py and convert.py read better without it.
"""
import json
import shlex
import sys

import torch

import pissa
from support.files import written


def run(main, name):
    """main(); an error that is no bug of ours ends the program with one line and exit code 1."""
    try:
        main()
    except torch.OutOfMemoryError as e:
        sys.exit(f"{name}: {str(e).splitlines()[0]} Lower --batch or --micro-batch, use "
                 "--checkpointing, a smaller --rank or --max-length")
    except RuntimeError as e:
        if "can't allocate memory" not in str(e):
            raise
        sys.exit(f"{name}: out of memory: lower --batch, --micro-batch or --max-new-tokens")
    except OSError as e:
        sys.exit(f"{name}: {e.filename}: {e.strerror.lower()}" if e.filename else f"{name}: {e}")
    except ValueError as e:
        sys.exit(f"{name}: {e}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")


def write_json(path, content):
    """Write a dict to a file, which appears when it is complete."""
    with written(path) as tmp:
        tmp.write_text(json.dumps(content, indent=2, default=str) + "\n")


# ---------------------------------------------------------------------------- an injected network

def count(net):
    """(parameters that are trained, parameters); a weight in four bits counts once."""
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    total = sum(p.numel() for p in net.parameters())
    return trained, total + sum(Q.shape.numel() - sum(p.numel() for p in Q.parameters())
                                for Q in quantised(net))


def quantised(net):
    """The frozen weights of an injected network that are quantised modules, such as nf4.NF4."""
    return [m.frozen for _, m in pissa.layers(net) if isinstance(m.frozen, torch.nn.Module)]


@torch.no_grad()
def relative_error(m):
    """|W - (W_res + A B)| / |W| of a PissaLinear, estimated from the entries of m.fingerprint."""
    n_out, n_in = m.B.shape[1], m.A.shape[0]
    step = max(1, n_out * n_in // 256) | 1                 # as in pissa.sampled
    where = torch.arange(0, n_out * n_in, step, device=m.A.device)
    AB = (m.A[where % n_in] * m.B.T[where // n_in]).sum(1).cpu()
    W, W_res = m.fingerprint.to(AB.dtype), pissa.sampled(pissa.as_tensor(m.frozen)).to(AB.dtype)
    return ((W - W_res - AB).norm() / W.norm().clamp(min=1e-30)).item()


def injected(net):
    """Print what is trained of an injected `net`, and how close W_res + A B is to W."""
    errors = [relative_error(m) for _, m in pissa.layers(net)]
    (trained, total), Qs = count(net), quantised(net)
    error = f"largest relative |W - (W_res + A B)| about {max(errors):.1e}"
    if Qs:
        bits = 8 * sum(Q.nbytes for Q in Qs) / sum(Q.shape.numel() for Q in Qs)
        error = (f"{bits:.2f} bits a frozen weight, relative |W - (Q + A B)| about "
                 f"{sum(errors) / len(errors):.4f} on average, at most {max(errors):.4f}")
    print(f"{trained:,} of {total:,} parameters trained ({trained / total:.2%}), {error}")


def starts_at_the_largest(m):
    """True if A B of a PissaLinear begins with the largest singular value of W, sigma_1.

    A column of A_0 = U S^1/2 has the squared norm sigma. With W (m, n) and s the root mean square
    of its entries, sigma_1 >= |W|_F / sqrt(min(m, n)) = s sqrt(max(m, n)). What rounding to four
    bits loses, with which LoftQ begins, is far below.
    """
    if m.A0 is None:
        return False
    s = m.fingerprint.float().square().mean().sqrt()
    largest = m.A0.square().sum(0).max()
    return (largest >= s * max(m.A0.shape[0], m.B0.shape[1]) ** 0.5).item()


def advise(net, examples, args):
    """Print notes on settings that are legal and probably unintended."""
    if args.lr > 1e-4 and net.config.dim >= 1024:
        largest = [starts_at_the_largest(m) for _, m in pissa.layers(net)]
        if sum(largest) > len(largest) / 2:
            print(f"note: --lr {args.lr:g} suits LoRA, whose B starts at 0; {args.method} starts "
                  "at the largest singular values and wants less: PiSSA's paper uses 2e-5, see "
                  "also arXiv 2602.04998")
    longest = max(len(ids) for ids, _ in examples)
    if 0 < net.config.max_seq_len < longest:
        print(f"note: the longest example has {longest} tokens, and the model was trained for "
              f"{net.config.max_seq_len} positions: see --max-length")


# ------------------------------------------------------------------------------- a run of train.py

def plot(rows, args):
    """Draw loss.png, if matplotlib is installed. rows: of log.jsonl."""
    try:
        import matplotlib
    except ImportError:
        return print("no loss.png: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.figure(figsize=(6, 3.5))
    plt.plot([r["step"] for r in rows], [r["loss"] for r in rows])
    plt.xlabel("step")
    plt.ylabel("training loss")
    plt.title(f"{args.ckpt}, {args.method}, learning rate {args.lr:g}", fontsize=10)
    plt.tight_layout()
    with written(args.out / "loss.png") as tmp:
        plt.savefig(tmp, dpi=120, format="png")
    plt.close()


def summarise(rows, before, after, args, seconds, device, accuracy_by):
    """Print the results and write them to summary.json.

    rows: of log.jsonl. before, after: of train.evaluate. seconds: a dict of load, init, all.
    accuracy_by: the line that says how the accuracy was measured.
    """
    trained, gpu = sum(r["seconds"] for r in rows), device.type == "cuda"
    summary = {"steps": len(rows), "seconds": {**seconds, "train": trained},
               "tokens_per_second": sum(r["tokens"] for r in rows) / trained,
               "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if gpu else 0,
               "before": before, "after": after}
    write_json(args.out / "summary.json", summary)
    for prompt, answer in before["answers"].items():
        print(f"\n--- {prompt}\nbefore: {answer[:200]}\nafter:  {after['answers'][prompt]}")
    print(f"\nvalidation loss {before['loss']:.4f} -> {after['loss']:.4f}")
    if args.test_data:
        print(f"accuracy on {args.test_data}: {before['accuracy']:.1%} -> {after['accuracy']:.1%}\n"
              + accuracy_by)
    print(f"{len(rows)} steps in {trained:.0f} s, {summary['tokens_per_second']:,.0f} tokens/s; "
          f"{seconds['all']:.0f} s in all")
    if gpu:
        print(f"peak GPU memory {summary['peak_gpu_bytes'] / 2**30:.1f} GiB")


def weights_written(directory, args, prompts):
    """Print where the weights are, and the command that uses them."""
    use = (f"--ckpt {directory}" if args.method == "full"
           else f"--ckpt {args.ckpt} --adapter {directory}")
    print(f"weights in {directory}; use them:\n  python eval.py {use} --prompt "
          + shlex.quote(next(iter(prompts), "your question")))


# ------------------------------------------------------------------------------------ train --plan

def plan(args, job, method, found, less):
    """Print a plan. job: a plan.Job. found: its plan.estimate. less: {change: bytes at most}."""
    size, numbers = found["peak"], found["numbers"]
    trained, total = found["trained"], sum(numbers.values())
    unit, unit_name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    rank = "" if job.full else f", rank {job.rank}"
    print(f"{args.ckpt}: {method}{rank}, products in {str(job.dtype).removeprefix('torch.')}, "
          f"{job.rows} x {job.length} tokens at a time, all of them learnt\n\n"
          f"{'':30}{'parameters':>16}{unit_name:>10}")
    for kind, held in found["held"].items():
        count = f"{numbers[kind]:,}" if kind in numbers else ""
        if held:
            print(f"{kind:30}{count:>16}{held / unit:10.2f}")
    print(f"\nparameters     {total:,}, {trained:,} of them trained ({trained / total:.2%})\n"
          f"expected peak  {size / unit:.1f} {unit_name}, at {found['when']} (loading: "
          f"{found['moments']['loading'] / unit:.1f}),\n"
          f"{'':15}and some 0.5 GiB that CUDA itself takes")
    for change, peak in less.items():
        print(f"  {change:29}{peak / unit:.1f} {unit_name}")
    if torch.cuda.is_available():
        free, there = (b / 2**30 for b in torch.cuda.mem_get_info())
        print(f"this GPU has {there:.1f} GiB, {free:.1f} of them free: it "
              + ("fits" if size / 2**30 < free else "does not fit"))
    forward, attention, backward, again = (found["flops"][k] / 1e9 for k in (
        "forward", "attention", "backward", "recomputation"))
    tflops = (forward + backward + again) * args.batch * job.length / 1e3
    print(f"\nGFLOPs a token  {forward:.3g} forward ({attention:.2g} of them attention), "
          f"{backward:.3g} backward" + (f", {again:.3g} forward again" if again else "")
          + f"\nTFLOPs a step   {tflops:,.1f} for {args.batch} x {job.length} tokens")
