"""The family of PiSSA, a page each: relatives/NAME.py is what `--method NAME` means.

`find(name)` returns such a page, a module. README.md beside this file lists all of them.
CONTRIBUTING.md tells what a module may hold, and how to add one. pissa.py, model.py and adapter.py
have never heard of any.

    corda, own = relatives.find("corda"), {"mode": "knowledge"}
    found = calibrate.measure(net, corda, batches, loss, pissa.Options(16, own=own))
    pissa.inject(net, 16, relatives.told(corda, own, found.pop))
"""
import difflib
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

HELPERS = ("__init__", "calibrate")                           # and files that begin with _
EVALUATED = {"svdquant": "python -m bench.bench_svdquant"}    # not trained: what makes its table


def names():
    """The names of all relatives, in alphabetical order."""
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(s for s in stems if s not in (*HELPERS, *EVALUATED)
                  and not s.startswith("_"))


def find(name):
    """The module relatives/NAME.py. ValueError, one line with all names, if there is none."""
    if name not in names():
        raise ValueError(unknown(name, names()))
    return import_module(f"relatives.{name}")


def unknown(name, among):
    """The line that refuses a method's name, and tells those that there are."""
    if name in EVALUATED:
        return f"{name} is evaluated, not trained: {EVALUATED[name]}"
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), among, 1)
    meant = f": did you mean {near[0]}?" if near else "."
    return f"there is no method {name!r}{meant} There are {', '.join(among)}"


def known(name):
    """The module relatives/NAME.py, or the name unchanged if it is no relative's."""
    return find(name) if name in names() else name


def options(method, given):
    """The options of a method, a dict: OPTIONS, less what `given` replaces, a list of "name=value".

    The type of a default is the type of the option. CHOICES[name]: the values it may have, if they
    are few. ValueError for another name, type or value.
    """
    found = dict(getattr(method, "OPTIONS", {}))
    name = getattr(method, "__name__", method).rpartition(".")[2]
    for text in given:
        key, _, value = text.partition("=")
        if key not in found:
            raise ValueError(f"--option {text}: {name} has " + (
                f"the options {', '.join(found)}" if found else "no options"))
        kind, choices = type(found[key]), getattr(method, "CHOICES", {}).get(key)
        try:
            found[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ValueError(f"--option {text}: {key} should be "
                             + ("true or false" if kind is bool else f"{kind.__name__}, such as "
                                f"{found[key]}")) from None
        if choices and found[key] not in choices:
            raise ValueError(f"--option {text}: {key} is one of {', '.join(map(str, choices))}")
    return found


def told(method, own, statistic=None, trial=False):
    """A relative for `pissa.inject` that is told its options, and what was measured.

    statistic: a function from a module's name to what was measured of its matrix, such as the `pop`
    of what calibrate.measure returns. trial: `init` gets a stand-in instead, which is enough to
    learn what kind of layers it makes, for a plan.
    """
    def init(weight, options):
        measured = statistic(next(iter(options.remaining))) if statistic else None
        if trial and hasattr(method, "STATISTIC"):
            measured = weight.float() if method.STATISTIC == "gradients" else (
                weight.new_ones(weight.shape[1]).float().diag())
        return method.init(weight, replace(options, statistic=measured))

    layer = {"Layer": method.layer(own)} if hasattr(method, "layer") else {}
    return with_init(method, init, OPTIONS=own, **layer)


def given(options):
    """What was measured of the present matrix. ValueError if nothing was."""
    if options.statistic is None:
        raise ValueError("this method measures some examples first: see relatives/calibrate.py")
    return options.statistic


def with_init(method, init, **more):
    """`method`, anything that `pissa.inject` takes, with another function as its `init`."""
    return SimpleNamespace(**{**getattr(method, "__dict__", {}), "init": init,
                              "__name__": getattr(method, "__name__", method), **more})


def chosen(args, net=None, examples=(), loss=None):
    """args.method of train.py for `pissa.inject`: a name of pissa.py's, or a relative told its
    --option. net, examples, loss: what --calibrate measures; without a net, for a plan.
    """
    method = known(args.method)
    own = options(method, args.option or ())          # also refuses options of what has none
    if not isinstance(method, ModuleType):
        return method
    if net is None or not hasattr(method, "STATISTIC"):
        return told(method, own, trial=True)
    if net.lm_head.weight.is_meta:
        raise ValueError(f"--method {args.method} measures the {method.STATISTIC} of whole weights "
                         "first: no --shard")
    from relatives import calibrate
    return told(method, own, calibrate.for_train(net, method, own, examples, loss, args).pop)
