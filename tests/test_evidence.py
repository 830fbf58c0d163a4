"""bench/evidence.py: tables from rows that are known."""
import json

import pytest

from bench import evidence, studies


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """A function that writes rows as a study's file."""
    monkeypatch.setattr(studies, "RESULTS", tmp_path)

    def write(name, rows):
        (tmp_path / f"study_{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return write


def row(**values):
    """A row whose values stand in its job, too, which is where they are looked for."""
    values = {"method": "pissa", "rank": 4, "lr": 1e-3, "seed": 0, "steps": 20, "batch": 2,
            "val": 1.0, "loss": [float(i) for i in range(20)], "grad_norm": [2.0] * 20,
            "device": "none", "init_seconds": 1.5, "svd_worst": 1e-3, **values}
    return {"job": values, **{k: values[k] for k in values if k in (
        "val", "loss", "grad_norm", "device", "init_seconds", "svd_worst", "failed")}}


def test_nothing_measured(keep):
    studied = {name: part() for name, part in evidence.PARTS.items() if "study" in name}
    assert len(studied) > 5 and set(studied.values()) == {"Not measured yet."}


def test_full_before_tiny(keep):
    keep("rates_tiny", [row(val=9.0)])
    text = evidence.PARTS["study-rates"]()
    assert "9.0000" in text and "checkpoints/tiny" in text
    keep("rates", [row(val=0.5), row(lr=3e-3, failed="the loss is nan")])
    text = evidence.PARTS["study-rates"]()
    assert "0.5000" in text and "9.0" not in text and "SmolLM2" in text and "1 runs" in text


def test_best_rate_and_seeds(keep):
    """The most seeds win over a lucky single run; a run in both files counts once."""
    runs = [row(lr=lr, val=val) for lr, val in ((1e-4, 3.0), (1e-3, 2.0), (1e-2, 1.9))]
    keep("rates", runs)
    assert "| 4 | 1.9000 at 0.01, an edge |" in evidence.PARTS["study-rates"]()
    keep("seeds", [row(lr=1e-3, val=2.2, seed=1), runs[1]])
    assert "| 4 | 2.1000 (2.0000 to 2.2000, 2 seeds) at 0.001 |" in evidence.PARTS["study-rates"]()


def test_curves(keep):
    keep("curves", [row(), row(seed=1, loss=[i + 1.0 for i in range(20)])])
    assert "| 0.001 | 2 | 2.500 | 17.500 |  |  | 2.00 |" in evidence.curves_table()


def test_svd(keep):
    keep("svd", [row(niter=0), row(niter="exact", val=0.9)])
    text = evidence.svd_table()
    assert "| 0 | 1.50 s | 1.0e-03 | 1.0000 |" in text and "| exact |" in text


def test_methods_beside_each_other(keep):
    """A column for each method; the best of its rates; runs that are missing are said to be."""
    keep("length", [row(lr=1e-4, val=3.0), row(val=2.0), row(method="lora", val=1.5),
                    row(method="lora", val=1.0, batch=8)])
    text = evidence.PARTS["study-length"]()
    assert "| batch | steps | pissa | lora |" in text and "not finished" in text
    assert "| 2 | 20 | 2.0000 at 0.001, an edge | 1.5000 at 0.001, no other tried |" in text
    assert "| 8 | 20 |  | 1.0000 at 0.001, no other tried |" in text


def test_eight_bits_beside_sixteen(keep):
    """Their difference, seed by seed, also with x not rounded when the loss is taken."""
    keep("eight", [row(method=m, seed=s, val=v, val_unpacked=u) for m, s, v, u in (
        ("pissa", 0, 1.0, None), ("pissa", 1, 2.0, None), ("qpissa", 1, 2.5, 2.25),
        ("qpissa", 0, 0.9, 1.125))])
    assert "1.5000 (1.0000 to 2.0000, 2 seeds)" in evidence.eight_table()
    assert "| -0.1000, +0.5000 | +0.1250, +0.2500 |" in evidence.eight_table()


def test_what_is_learnt_counts_whole_seeds(keep):
    """A seed that was run at one rate only does not choose the best one."""
    names = ("norm", "stable_rank", *(f"{k}_{side}" for k in ("top", "bottom", "random", "angle")
                                      for side in ("left", "right")))
    more = {"perplexity": 5.0, "perplexity_before": 4.0, **{f"learnt_{k}": 0.5 for k in names}}
    keep("learnt", [{**row(lr=lr, val=val, seed=seed), **more} for lr, val, seed in (
        (1e-4, 3.0, 0), (1e-4, 3.0, 1), (1e-3, 2.0, 0))])
    assert "| PiSSA | 0.001, an edge | 2.0000 | 0.500 |" in evidence.learnt_table()
    text = evidence.learnt_table()
    assert "| 0.0001: 5.0, 0.001: 5.0 |" in text and "4.0 before" in text
