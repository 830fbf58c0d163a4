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
    studied = {name: part() for name, part in evidence.PARTS.items() if "study" in name and (
        name != "study-begun")}
    assert len(studied) > 5 and set(studied.values()) == {"Not measured yet."}


def test_full_before_tiny(keep):
    keep("rates_tiny", [row(val=9.0)])
    assert "9.0000" in evidence.rates_table() and "checkpoints/tiny" in evidence.rates_table()
    keep("rates", [row(val=0.5), row(lr=3e-3, failed="the loss is nan")])
    text = evidence.rates_table()
    assert "0.5000" in text and "9.0" not in text and "SmolLM2" in text and "1 runs" in text


def test_best_rate_and_seeds(keep):
    """The most seeds win over a lucky single run; a run in both files counts once."""
    runs = [row(lr=lr, val=val) for lr, val in ((1e-4, 3.0), (1e-3, 2.0), (1e-2, 1.9))]
    keep("rates", runs)
    assert "| 0.01 (the edge of the grid) | 1.9000 |" in evidence.rates_table()
    keep("seeds", [row(lr=1e-3, val=2.2, seed=1), runs[1]])
    assert "| 0.001 | 2.1000 (2.0000 to 2.2000, 2 seeds) |" in evidence.rates_table()


def test_curves(keep):
    keep("curves", [row(), row(seed=1, loss=[i + 1.0 for i in range(20)])])
    assert "| 0.001 | pissa | 2 | 2.500 | 17.500 |  |  | 2.00 |" in evidence.curves_table()


def test_svd(keep):
    keep("svd", [row(niter=0), row(niter="exact", val=0.9)])
    text = evidence.svd_table()
    assert "| 0 | 1.50 s | 1.0e-03 | 1.0000 |" in text and "| exact |" in text


def test_the_table_of_one_seed(tmp_path, monkeypatch):
    """The best rate of a method with its option; one that was not measured alone is left out."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)

    def line(method, lr, val, steps=100, **more):
        return json.dumps({"job": {"method": method, "lr": lr, "steps": steps, **more}, "val": val,
                           "trained": 1234, "init_seconds": 0.5, "peak_gib": 1.0,
                           "planned_gib": 1.1, "tokens_per_second": 99.0, "device": "a GPU",
                           "torch": "2"})

    (tmp_path / "family_h100.jsonl").write_text("\n".join([
        line("lora", 1e-3, 0.5), line("lora", 2e-3, 0.4), line("lora", 4e-3, 0.6),
        line("lora", 1e-3, 9.0, steps=12), line("milora", 1e-3, 0.3, option=["offset=0.5"]),
        line("milora", 1e-3, 9.0, steps=12, option=["offset=0.5"]), line("eva", 1e-3, 0.1)]))
    text = evidence.search_table()
    assert text.index("milora offset=0.5 | 0.001 (edge) | 0.3000") < text.index(
        "| lora | 0.002 | 0.4000 | 1,234 | 0.50 s | 1.0 GiB (1.1) | 99 |")
    assert "eva" not in text and "not finished" in text
