"""Speed-up over density: the sweep, its intervals and its picture."""

from __future__ import annotations

import itertools
import json
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from ondevice.cli import cli
from ondevice_bench.curves import svg
from ondevice_bench.shapes import shape_spec
from ondevice_bench.sweep import DENSITIES, Point, interval

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
POINTS = [
    Point("lists:block=1", 0.1, 1.5, 1.4, 1.6, 2.0, 0),
    Point("lists:block=1", 1.0, 1.0, 0.97, 1.02, 1.0, 2),
    Point("a<b", 0.1, 0.5, 0.4, 0.6, 2.0, 0),
]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `ondevice bench --shape` of a tiny shape on the reference backend."""
    spec = shape_spec("smollm2-135m", **SMALL)
    monkeypatch.setattr("ondevice_bench.loading.shape_spec", lambda name: spec)
    args = ["bench", "--shape", "smollm2-135m", "--backend", "reference", "-n", "1"]
    return lambda *more: CliRunner().invoke(cli, [*args, *map(str, more)])


def test_a_sweep_measures_all_densities_of_all_methods(command: Any, tmp_path: Any) -> None:
    picture = tmp_path / "sweep.svg"
    args = ("--only", "tg", "--sparsity", "lte", "--sparsity", "spark", "--sweep", picture)
    rows = json.loads(command(*args, "--json").stdout)
    assert [row["rows"] for row in rows] == [*DENSITIES, *DENSITIES]
    assert {row["sparsity"] for row in rows} == {"lte", "spark"}
    for row in rows:
        assert 0 < row["low"] <= row["speedup"] <= row["high"] and row["floor"] >= 1
    lte, spark = rows[: len(DENSITIES)], rows[len(DENSITIES) :]
    assert all(a["floor"] > b["floor"] for a, b in itertools.pairwise(lte)) and lte[-1]["floor"] == 1
    assert spark[0]["floor"] < lte[0]["floor"]  # a quarter of its FFN chooses
    assert ElementTree.fromstring(picture.read_text()).tag.endswith("svg")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--only", "tg", "--sparsity", "lte", "-r", 19), "-r 19: a sweep needs 20 turns or more"),
        (("--sparsity", "lte",), "--sweep takes one test: --only tg"),
        (("--only", "tg", "--sparsity", "lte", "-b", "1,2"), "--sweep takes one test"),
        (("--only", "tg",), "--sweep needs a method that skips"),
        (("--only", "tg", "--sketch-head"), "--sweep needs a method that skips"),
        (("--only", "tg", "--sparsity", "lte", "-o", "csv"), "a sweep has no CSV"),
    ],
)  # fmt: skip
def test_sweeps_that_cannot_be_are_refused(command: Any, tmp_path: Any, args: Any, message: str) -> None:
    result = command(*args, "--sweep", tmp_path / "sweep.svg")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not (tmp_path / "sweep.svg").exists()


def test_intervals_hold_the_median_and_narrow_with_more_turns() -> None:
    random = np.random.default_rng(1)
    few, many = random.normal(1.2, 0.1, 20), random.normal(1.2, 0.1, 500)
    low, high = interval(few.tolist())
    assert low < np.median(few) < high and 0.03 < high - low < 0.2
    assert np.subtract(*interval(many.tolist())[::-1]) < 0.5 * (high - low)
    assert interval([1.0] * 20) == (1.0, 1.0)


def test_the_picture_has_lines_floors_and_intervals() -> None:
    root = ElementTree.fromstring(svg(POINTS, "a & b"))
    name = "{http://www.w3.org/2000/svg}"
    lines = root.findall(f"{name}polyline")
    assert [line.get("stroke-dasharray") is not None for line in lines] == [True, False, True, False]
    places = [tuple(map(float, place.split(","))) for place in lines[1].get("points", "").split()]
    assert places[0][0] < places[1][0] and places[0][1] < places[1][1]  # the first one is faster, so higher
    assert len([line for line in root.findall(f"{name}line") if line.get("class") == "interval"]) == 3
    texts = [text.text for text in root.findall(f"{name}text")]
    assert "a & b" in texts and "a<b (dashed: bytes alone)" in texts
