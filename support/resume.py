"""What a run leaves so that it can go on, and how it ends.

    OUT/states/start/                the adapter at step 0: A_0, B_0 and all else that never changes
    OUT/states/00000120/state.pt     the rest after 120 steps: trained parameters, AdamW's moments,
                                     the rows of log.jsonl, arguments, a hash of the data

The order of the examples is a function of (seed, epoch), so no generator has a state. A state is
copied to host memory between two steps, and a thread writes the copy while training goes on.
"""
import hashlib
import json
import math
import os
import shutil
import signal
import threading
import time
import zipfile
from array import array
from contextlib import contextmanager
from typing import NamedTuple

import torch

import adapter
from formats.jsonl import filled, write_lines
from support import options, parallel, report
from support.files import check_room, empty, lock, named, replaced, restored

BEGIN = time.monotonic()
SIGNALS = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"           # Slurm sends the last before its limit
ASKED, LOCKS = [], []                     # numbers of the signals that came; locks that are held
# Arguments that change no result, or only by rounding. A run may go on with others.
FREE = {"out", "resume", "overwrite", "save_every", "keep", "max_hours", "device", "micro_batch",
        "no_packing", "checkpointing", "offload", "compile", "plain", "shard", "gpus", "plan",
        "steps", "epochs", "adapter", "max_new_tokens", "ckpt", "force_base", "torchrun",
        "val_every", "tensorboard", "config"}


class Stop(NamedTuple):
    """Why training ended early, and the exit code of the program."""
    reason: str
    code: int


@contextmanager
def signals_noted():
    """Inside, signals that ask the program to end are noted in ASKED, and the first is answered."""
    def noted(number, _):
        if not ASKED and not parallel.RANK:            # print() may be what the signal interrupted
            os.write(2, f"\n{signal.Signals(number).name}: after this step it saves, and ends\n"
                     .encode())
        ASKED.append(number)

    ASKED.clear()
    numbers = {getattr(signal, name) for name in SIGNALS if hasattr(signal, name)}
    numbers = {n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}       # nohup
    before = {n: signal.signal(n, noted) for n in numbers}
    try:
        yield
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def hash_of(examples):
    """A hash of encoded examples, as data.encode gives them."""
    h = hashlib.sha256()
    for ids, n_prompt in examples:
        mask = n_prompt if isinstance(n_prompt, list) else [n_prompt]
        h.update(array("q", [*mask, *ids]))
    return h.hexdigest()


def newest(out):
    """The directory of the newest state of a run, or None."""
    found = sorted((out / "states").glob("[0-9]*/state.pt"))
    return found[-1].parent if found else None


def read_state(path):
    """What `Run.write` wrote to a directory. ValueError if a bit of it has changed."""
    try:
        with zipfile.ZipFile(path / "state.pt") as file:
            if bad := file.testzip():
                raise ValueError(f"the checksum of {bad} differs")
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:                              # of many kinds
        reason = str(e).strip().partition("\n")[0][:100]
        raise ValueError(f"{path}/state.pt is damaged ({reason}): remove {path}, and the run goes "
                         "on with an earlier state, or begins") from None


def start_of(out):
    """The directory of a run's adapter at step 0; its A and B may be later ones."""
    return out / "states" / "start"


def measured(args):
    """What `train.evaluate` found before the first step of a run that goes on, or None."""
    if args.resume and newest(args.out) and (path := args.out / "val.jsonl").is_file():
        try:
            row = json.loads(path.read_text("utf-8").splitlines()[0])
            return {**{k: row[k] for k in ("loss", "answers", "accuracy")},
                    "problems": row.get("problems"), "cut": row.get("cut", 0)}
        except (ValueError, RecursionError, LookupError, TypeError) as e:
            raise ValueError(f"{path} is damaged ({e!r:.80}): remove it") from None
    return None


def is_same(args):
    """True. ValueError if the finished run in --out had other arguments."""
    path = args.out / "args.json"
    if not (args.out / "summary.json").is_file() or not path.is_file():
        return True
    theirs, ours = json.loads(path.read_text("utf-8")), binding(args)
    both = theirs.keys() & ours.keys()                       # an older run may not know them all
    if other := differing(*({k: a[k] for k in ours if k in both} for a in (theirs, ours))):
        raise ValueError(f"{args.out} is a finished run of its own: {other}; choose another --out")
    return True


def binding(args):
    """The arguments that a run cannot change when it goes on, as JSON holds them."""
    return json.loads(json.dumps({k: v for k, v in vars(args).items() if k not in FREE},
                                 default=str))


def differing(theirs, ours):
    """What is not the same in two dicts, in words; "" if nothing is."""
    return ", ".join(f"{k} was {theirs.get(k)}, now {ours.get(k)}" for k in {**theirs, **ours}
                     if theirs.get(k) != ours.get(k))


def claim(args, net, before):
    """Make --out ours before the first step: lock it, write args.json and val.jsonl, look for room.

    --overwrite puts a finished run aside first, as OUT.previous. OSError if another run works there
    or there is no room. The lock holds as long as the program runs.
    """
    if parallel.RANK:
        return parallel.agree(None)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    # float32: a parameter and two moments in a state; A, B, A_0, B_0 in an adapter; 16 bits in full
    states = 0 if args.save_every == "never" else args.keep + 1
    copies = 2 if args.val_every else 1
    size = trained * (12 * states + (2 if args.method == "full" else 16) * copies)
    check_room(args.out, size, f"a run with --keep {args.keep}")
    out = restored(args.out)
    out.mkdir(parents=True, exist_ok=True)
    release()
    LOCKS.append(lock(out))
    if args.overwrite and not args.resume:
        if (out / "summary.json").exists() or not previous(out).exists() and any(
                (out / name).exists() for name in ("adapter", "checkpoint")):
            shutil.rmtree(previous(out), ignore_errors=True)
            os.rename(out, previous(out))
            out.mkdir()
            LOCKS.append(lock(out))
        else:                                   # not finished: what is in OUT.previous stays there
            empty(out)
    report.write_json(out / "args.json", vars(args))
    if not newest(out):
        shutil.rmtree(start_of(out), ignore_errors=True)          # of a run that left no state
    if not measured(args):
        shutil.rmtree(out / "best", ignore_errors=True)                                # likewise
        write_lines(out / "val.jsonl", [{"step": 0, **before}])
    parallel.agree(None)


def finish(args):
    """After a finished run: only the newest state stays, and no earlier run."""
    if not parallel.RANK:
        keep(args.out, 1)
        shutil.rmtree(previous(args.out), ignore_errors=True)


@contextmanager
def told(args):
    """Ctrl-C outside of `signals_noted` is told whether anything was learnt, and where it is."""
    try:
        yield
    except KeyboardInterrupt as e:
        there = args.out / ("checkpoint" if args.method == "full" else "adapter")
        if LOCKS and there.exists():
            text = f"what was learnt is in {there}; the same command with --resume measures it"
        elif args.resume and (path := newest(args.out)):
            text = f"nothing was learnt since {path}, with which --resume goes on"
        else:
            text = options.NOTHING
        e.saved = getattr(e, "saved", f"; {text}")
        raise


def asked(reason):
    """A Stop if a signal came, or None."""
    return Stop(reason, 128 + ASKED[0]) if ASKED else None


def not_written(out):
    """What is left if the present weights are of no use."""
    there = [out / name for name in ("adapter", "checkpoint") if (out / name).exists()]
    there += [path for path in (previous(out),) if path.exists()]
    return "this result is not written" + "".join(f"; {path} stays as it was" for path in there)


def check_free(out):
    """OSError if another run works there: said before minutes are spent, and again by `claim`."""
    release()
    if out.is_dir() and not parallel.RANK:
        os.close(lock(out))


def release():
    """Give back the locks that this process holds."""
    while LOCKS:
        os.close(LOCKS.pop())


def previous(out):
    """Where a finished run goes when --overwrite begins another one."""
    return out.with_name(out.name + ".previous")


class Run:
    """What a run of `train.train` has done. Goes on with the newest state if args.resume.

    `with Run(...) as run:` and after every step `run.done(...)`. An exception inside is told what
    could be saved, in its attribute `saved`.
    """

    def __init__(self, net, optimizer, args, examples, steps):
        self.net, self.optimizer, self.args, self.steps = net, optimizer, args, steps
        self.params = parallel.trained(net)
        self.others = {f"{name}.{key}": getattr(m, key) for name, m in adapter.layers(net)
                       for key in m.state if f"{name}.{key}" not in self.params}
        self.facts = {"data": hash_of(examples), "args": binding(args)}
        self.rows, self.at, self.buffers = [], 0, {}
        self.thread = self.error = self.failed = None
        self.epoch, self.saved = math.ceil(len(examples) / args.batch), time.monotonic()
        if args.resume and (path := newest(args.out)):
            self.put_back(path)
        if not parallel.RANK:                     # half a line may be its end, or rows too many
            write_lines(args.out / "log.jsonl", self.rows)

    def put_back(self, path):
        """Go on with a state. ValueError if it is of other data or arguments."""
        state = read_state(path)
        theirs, ours = ({**f["args"], "the data": f["data"][:8]} for f in (state, self.facts))
        if other := differing(theirs, ours):
            raise ValueError(f"{path} is of another run: {other}")
        if state["step"] > self.steps:
            raise ValueError(f"{path} has {state['step']} steps already, more than {self.steps}")
        self.rows = state["rows"]
        self.at = state["step"]
        with torch.no_grad():
            for name, p in self.params.items():
                parallel.put(p, state["parameters"][name])
            for name, t in self.others.items():
                t.copy_(state["others"][name])
        names, kept = {p: n for n, p in self.params.items()}, state["optimizer"]["state"]
        for p in self.optimizer.param_groups[0]["params"]:
            parts = parallel.parts(p)
            of_parts, shape = [kept[names[part]] for part in parts], parts[0].shape
            self.optimizer.state[p] = {
                key: value.to(p.device, copy=True) if value.shape != shape else parallel.put(
                    torch.empty_like(p), parallel.from_parts(p, [m[key] for m in of_parts]))
                for key, value in of_parts[0].items()}
        print(filled(f"going on with {path}, after step {self.at} of {self.steps}"))

    def wishes(self):
        """[1 if this process wants to stop, 1 if it wants a state to be written]."""
        hours, every = (time.monotonic() - BEGIN) / 3600, self.args.save_every
        late = self.args.max_hours is not None and hours >= self.args.max_hours
        step = len(self.rows) + 1
        if every == "never":
            due = False
        elif every.endswith("m"):
            due = time.monotonic() - self.saved >= 60 * float(every[:-1])
        else:
            due = step % int(every) == 0
        return [float(bool(ASKED) or late), float(due or self.error is not None)]

    def done(self, row, stop, due):
        """After a step: log it, write a state if it is time. Returns a Stop, or None to go on."""
        self.rows.append(row)
        if not parallel.RANK:
            path = self.args.out / "log.jsonl"
            with named(path), open(path, "a") as log:
                print(json.dumps(row), file=log)
        step = len(self.rows)
        regular = self.args.save_every != "never" and (
            step == self.steps or (due or step % self.epoch == 0) and not self.writing())
        if stop or regular:
            self.save()
        if not stop or step == self.steps and not ASKED:
            return None
        if not ASKED:
            return Stop(f"stopped by --max-hours after {step} of {self.steps} steps", 0)
        name = signal.Signals(ASKED[0]).name
        return Stop(f"interrupted after {step} of {self.steps} steps ({name})", 128 + ASKED[0])

    def writing(self):
        """True if the last state is still being written, in any process."""
        return any(parallel.everyone(bool(self.thread and self.thread.is_alive())))

    def save(self, wait=False):
        """Write a state: from now on in a thread, or until it is written if `wait`."""
        self.join()
        if self.at == len(self.rows) and self.at or not finite(self.net):
            return
        state = parallel.gathered({"step": len(self.rows), "rows": list(self.rows), **self.facts,
                                   "parameters": {n: p.detach() for n, p in self.params.items()},
                                   "others": {n: t.detach() for n, t in self.others.items()},
                                   "optimizer": {"state": self.moments()}})
        self.at, self.saved = len(self.rows), time.monotonic()
        if parallel.RANK:
            return
        if wait or self.args.method == "full":         # as large as the model: no second copy
            return self.write(state, None)
        state, copied = self.to_host(state), None
        if torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        self.thread = threading.Thread(target=self.attempt, args=(state, copied))
        self.thread.start()

    def moments(self):
        """{name of a parameter: AdamW's state of it}."""
        names, found = {p: n for n, p in self.params.items()}, {n: {} for n in self.params}
        for p, kept in self.optimizer.state.items():
            for key, value in kept.items():
                for part, v in zip(parallel.parts(p), parallel.by_part(p, value), strict=True):
                    found[names[part]][key] = v
        return found

    def to_host(self, value, path=()):
        """A copy in host memory of nested dicts. Its page-locked memory is kept for the next copy,
        so that the GPU copies without waiting for anyone."""
        if isinstance(value, dict):
            return {k: self.to_host(v, (*path, k)) for k, v in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if path not in self.buffers:
            self.buffers[path] = torch.empty(value.shape, dtype=value.dtype,
                                             pin_memory=value.is_cuda)
        return self.buffers[path].copy_(value, non_blocking=True)

    def attempt(self, state, copied):
        """`write` in a thread: the next step hears of an error."""
        try:
            self.write(state, copied)
        except Exception as e:
            self.error = e

    def write(self, state, copied):
        """Write a state, then remove the oldest."""
        states = self.args.out / "states"
        if copied:
            copied.synchronize()
        try:
            start = start_of(self.args.out)
            if self.args.method != "full" and not start.is_dir():
                adapter.save(self.net, start, state["parameters"])
            with replaced(states / f"{state['step']:08d}") as tmp:
                torch.save(state, tmp / "state.pt")
        except (OSError, RuntimeError) as e:                      # torch.save raises the latter
            free = shutil.disk_usage(self.args.out).free
            raise OSError(f"{states}: the state of step {state['step']} is not written, it needs "
                          f"{size_of(state) / 1e9:.2g} GB, {free / 1e9:.2g} GB are free "
                          f"({str(e).splitlines()[0][:80]})") from None
        keep(self.args.out, self.args.keep)

    def join(self):
        """Wait for the thread; its OSError is raised here."""
        if self.thread:
            self.thread.join()
        self.thread, self.failed, self.error = None, self.error, None
        if self.failed:
            raise self.failed

    def __enter__(self):
        return self

    def __exit__(self, kind, e, traceback):
        if e is None:
            return self.join()
        try:       # again, unless that failed; sharded weights would need all processes
            if self.rows and not parallel.MESH and e is not self.failed:
                self.save(wait=True)
        except Exception as again:
            e.saved = f"; {again}"
        path = newest(self.args.out)
        e.saved = getattr(e, "saved", "") + (
            f"; {path} has what was learnt in {int(path.name)} steps: the same command with "
            "--resume goes on" if path else "; nothing was learnt yet" if not self.rows else "")


def keep(out, count):
    """Remove all states but the newest `count`, and what a killed process was writing."""
    states = out / "states"
    for path in (*sorted(states.glob("[0-9]*"))[:-count], *states.glob(".writing-*")):
        shutil.rmtree(path)


def finite(net):
    """True if no trained parameter holds NaN or Inf. Asks the others only if they have parts: when
    one process fails, the others are not there."""
    sums = [parallel.local(p).detach().sum() for p in parallel.trained(net).values()]
    here = bool(torch.stack(sums).isfinite().all())
    return all(parallel.everyone(here)) if parallel.MESH else here


def size_of(value):
    """Bytes of the tensors in nested dicts."""
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    return value.nbytes if isinstance(value, torch.Tensor) else 0
