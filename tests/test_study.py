"""bench/study.py: jobs, rows and what goes on; bench/bench_family.py: its search for a rate."""
import json

import pytest

from bench import bench_family, study
from support.options import tiny

JOB = {"ckpt": "tiny", "data": f"{tiny()}/train.jsonl", "rank": 4, "batch": 4, "micro_batch": 4,
       "steps": 2, "max_length": 64, "val_fraction": 0.005, "method": "pissa", "lr": 1e-3}


def test_a_job_is_a_command_line():
    args = study.arguments({**JOB, "option": ["mode=knowledge"], "method": "corda",
                            "measure": ["x"], "no_packing": True, "compile": False, "niter": 0,
                            "val_data": None})
    assert (args.rank, args.lr, args.method, args.no_packing) == (4, 1e-3, "corda", True)
    assert args.option == {"mode": "knowledge"} or args.option == ["mode=knowledge"]
    assert args.niter == 0 and not args.compile and args.val_data is None


def test_rows_of_a_file_that_was_cut_off(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert study.rows_in(path) == []
    path.write_text(json.dumps({"job": JOB, "val": 1.0}) + "\n" + '{"job": {"ck')
    rows = study.rows_in(path)
    assert study.found(rows, dict(JOB))["val"] == 1.0 and "cut off" in capsys.readouterr().err
    assert study.found(rows, {**JOB, "seed": 1}) is None
    path.write_text("".join(json.dumps({"job": {**JOB, "seed": i}, "failed": why}) + "\n" for i, why
                            in enumerate(("ValueError: not finite", "OutOfMemoryError: CUDA"))))
    assert [r["job"]["seed"] for r in study.rows_in(path)] == [0]      # the other may fit next time


def test_alike_for_the_compiler():
    alike = {**JOB, "lr": 1.0, "steps": 9, "seed": 4, "measure": ["x"]}
    assert study.kind(JOB) == study.kind(alike)
    assert study.kind(JOB) != study.kind({**JOB, "rank": 8})


@pytest.mark.slow
def test_jobs_run_once(tmp_path):
    """Two processes; one job cannot succeed; a second call runs only what is new."""
    path = tmp_path / "rows.jsonl"
    jobs = [JOB, {**JOB, "rank": 10**6}, {**JOB, "seed": 1, "measure": ["learnt"]}]
    with study.workers(path, 2) as run:
        rows = run(jobs)
        assert [r["job"] for r in rows] == jobs and "rank" in rows[1]["failed"]
        assert run([JOB]) == rows[:1]
    first, _, last = rows
    assert len(first["loss"]) == 2 and first["val"] < first["val_before"] and first["trained"] > 0
    assert last["val_before"] == pytest.approx(first["val_before"], rel=1e-4)
    assert last["loss"] != first["loss"] and 0 < last["learnt_norm"] < 1
    assert len(path.read_text().splitlines()) == 3
    with study.workers(path, 2) as run:
        assert len(run([*jobs, {**JOB, "lr": 2e-3}])) == 4
    assert len(path.read_text().splitlines()) == 4
    examples = study.examples_of("tiny", JOB["data"], None, 0.005, 64)[0]
    assert 2**24 < study.planned_bytes(study.arguments(JOB), examples) < 2**28
    assert study.run_one(JOB)["loss"] == first["loss"]                  # as without a process


def searching(best):
    """A `run` whose loss is least at `best`, and the jobs that it was given."""
    asked = []

    def run(jobs):
        asked.extend(jobs)
        return [{"job": j, "val": abs(j["lr"] / best - 1)} if j["lr"] < 50 else
                {"job": j, "failed": "the loss is nan"} for j in jobs]
    return run, asked


@pytest.mark.parametrize("best, rates", [
    (2, [1, 2, 4, 8]), (8, [1, 2, 4, 8, 16]), (64, [1, 2, 4, 8, 16, 32, 64]),
    (0.5, [0.5, 1, 2, 4, 8, 0.25])])
def test_the_search_goes_on_at_an_edge(best, rates):
    run, _ = searching(best)
    found = bench_family.searched(run, {}, {"a": 1, "b c=1": 1})
    assert sorted(r["job"]["lr"] for r in found["a"]) == sorted(rates)
    assert found["b c=1"][0]["job"] == {"method": "b", "option": ["c=1"], "lr": min(rates)}


def test_the_table_is_by_loss():
    def row(val, **more):
        return {"job": {"lr": 1}, "val": val, "val_before": 3, "accuracy": 0.5, "problems": 2,
                "trained": 7, "init_seconds": 1, "tokens_per_second": 9, **more}
    found = {"x": [row(2.0), row(1.5)], "y": [row(1.0)], "z": [{"job": {"lr": 1}, "failed": "no"}]}
    seeds = {"x": [row(1.0), row(2.0)], "y": [row(1.0), row(1.2)], "z": [row(1), row(1)]}
    rows = bench_family.table(found, seeds, dict.fromkeys(found, row(1.0)))
    assert [r["method"] for r in rows] == ["y", "x", "z"] and rows[2]["failed"] == "no"
    assert rows[1]["loss"] == 1.5 and rows[1]["rates"] == [[1, 2.0], [1, 1.5]]
