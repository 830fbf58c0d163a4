"""examples/landscape.py: the plane holds base and both ends, and the losses are theirs."""

import json

import pytest
import torch

import pissa
from conftest import quiet, small_net
from examples import landscape


def test_coordinates_against_float64():
    """Of long vectors, by QR."""
    torch.manual_seed(0)
    paths, vectors = {}, {}
    for method in landscape.METHODS:
        net = quiet(small_net(), 2, method)
        points = [(0, landscape.factors(net))]
        for step in 1, 2:
            for _, m in pissa.layers(net):
                for M in m.A, m.B:
                    M.data += torch.randn_like(M) * 0.05
            points.append((step, landscape.factors(net)))
        paths[method] = points
        vectors[method] = [
            torch.cat([landscape.change(p, points[0][1], n).double().flatten() for n in p])
            for _, p in points
        ]
    path, Q = landscape.coordinates(paths)
    e1 = vectors["lora"][2] / vectors["lora"][2].norm()
    e2 = vectors["pissa"][2] - (vectors["pissa"][2] @ e1) * e1
    e2 /= e2.norm()
    for method in landscape.METHODS:
        assert path[method][0][1:] == [0, 0, 0]
        for (_, x, y, outside), v in zip(path[method][1:], vectors[method][1:]):
            assert [x, y] == pytest.approx([float(v @ e1), float(v @ e2)], rel=1e-3, abs=1e-4)
            rest = (v - (v @ e1) * e1 - (v @ e2) * e2).norm() / v.norm()
            assert outside == pytest.approx(float(rest), abs=5e-3)
        assert path[method][2][3] < 5e-3 < path[method][1][3]  # the end, half-way
    assert Q[0].tolist() == pytest.approx(path["lora"][2][1:3], abs=1e-3)


def test_one_line_is_no_plane():
    points = [
        (0, {"a": (torch.zeros(3, 1), torch.zeros(1, 3))}),
        (1, {"a": (torch.ones(3, 1), torch.ones(1, 3))}),
    ]
    with pytest.raises(ValueError, match="no plane"):
        landscape.coordinates({"lora": points, "pissa": points})


def test_toy(tmp_path):
    """A few steps: both ends are below the base, the picture and the file are there."""
    out = tmp_path / "l.json"
    found = landscape.main(
        [
            "--tiny",
            "--steps",
            "6",
            "--grid",
            "2",
            "--examples",
            "8",
            "--rank",
            "4",
            "--out",
            str(out),
            "--device",
            "cpu",
        ]
    )
    assert json.loads(out.read_text()) == found and out.with_suffix(".png").stat().st_size > 5000
    ends = found["ends"]
    assert ends["pissa"] < ends["base"] and ends["lora"] < ends["base"]
    assert len(found["loss"]) == 2 and len(found["path"]["lora"]) == 7
