"""`ondevice bench --predict`: bytes are those that the tables move, and every row says that it is a prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ondevice.checkpoint import open_checkpoint
from ondevice.cli import cli
from ondevice.decoder import Decoder
from ondevice_bench.cases import parse
from ondevice_bench.chips import CHIPS
from ondevice_bench.predict import predict, traffic_of
from ondevice_bench.traffic import bytes_per_token
from tests.tiny import tiny_checkpoint, tiny_spec


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, ["bench", *args])


@pytest.mark.parametrize(("bits", "shape"), [("4", "smollm2-135m"), ("8", "opt-125m"), ("16", "smollm2-135m")])
def test_bytes_are_those_of_the_mlx_table(bits: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")
    import dataclasses

    import mlx.core as mx

    from ondevice.ops.mlx import MlxOps
    from ondevice_bench.random_weights import RandomWeights
    from ondevice_bench.shapes import shape_spec

    spec = shape_spec(shape, num_hidden_layers=2)
    weights: Any = RandomWeights(spec, int(bits), 32)
    table = MlxOps()
    table.device = dataclasses.replace(table.device, dtype=mx.bfloat16)
    decoder = Decoder(weights, table)
    (case,) = parse("tg20 @ d30 b3")
    counted = bytes_per_token(decoder, decoder.new_cache(3, 64), case)
    (row,) = predict(weights, "x", "m2", [case])
    # Norms are float32 in the table, two numbers of which a prediction knows nothing.
    assert row["bytes_per_token"] == pytest.approx(counted, rel=1e-3)
    assert row["predicted_ts"] == pytest.approx(100e9 / row["bytes_per_token"], rel=1e-4)


def test_bytes_here_are_those_of_the_cpu_table(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ondevice.model import op_table

    monkeypatch.setattr("ondevice.machine.read_bandwidth", lambda threads: 10e9)
    (case,) = parse("tg20 @ d30")
    with open_checkpoint(tiny_path) as checkpoint:
        decoder = Decoder(checkpoint, op_table("cpu", None, None))
        counted = bytes_per_token(decoder, decoder.new_cache(1, 64), case)
        (row,) = predict(checkpoint, "tiny", "here", [case])
    assert row["bytes_per_token"] == pytest.approx(counted, rel=0.05)  # tiles are padded
    assert row["bandwidth_gbs"] == 10 and row["prediction"] is True


def test_windows_end_what_is_seen(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", tiny_spec("mistral"))
    with open_checkpoint(folder) as checkpoint:
        traffic = traffic_of(checkpoint, checkpoint.spec, "m1", None)
        position = 2 * 3 * 2 * 16 * 2
        assert traffic.step(1, 24) - traffic.step(1, 23) == position
        assert traffic.step(1, 25) == traffic.step(1, 24)
        assert traffic.step(2, 24) - traffic.step(1, 24) == 24 * position + 64 * 2  # and a row of the embedding


def test_rows_that_are_skipped_are_not_counted() -> None:
    shape = ("--shape", "llama-3.2-1b", "--only", "tg", "-n", "9", "-d", "4091", "--predict", "m4", "--json")
    rows = json.loads(run(*shape, "--sparsity", "lte:rows=0.25,block=32", "--sparsity", "polar:heads=0.5").output)
    dense, lte, polar = (row["bytes_per_token"] for row in rows)
    ffn = 16 * 3 * 2048 * 8192 * (0.5 + 2 * 2 / 32)
    assert dense - lte == pytest.approx(0.75 * ffn, rel=0.02)  # less its routers
    # 4096 keys and values of half of 8 heads, in all layers but the first.
    assert dense - polar == pytest.approx(15 * 4096 * 2 * 4 * 64 * 2, rel=0.02)
    assert [row["sparsity"] for row in rows] == ["dense", "lte", "polar"]


def test_scales_of_down_are_read_for_whole_groups() -> None:
    """Of neurons chosen one by one, nearly every group of 32 has one; of blocks of 32, as many groups as blocks."""
    shape = ("--shape", "llama-3.2-1b", "--only", "tg", "-n", "8", "--predict", "m4", "--json")
    one, block = (
        json.loads(run(*shape, "--sparsity", f"lists:rows=0.25,block={n}").output)[1]["bytes_per_token"]
        for n in (1, 32)
    )
    assert one - block == pytest.approx(16 * 2048 * 8192 * (2 * 2 / 32) * (1 - 0.75**32 - 0.25), rel=1e-3)


def test_every_row_says_that_it_is_a_prediction(tiny_path: Path) -> None:
    for chip, configurations in CHIPS.items():
        rows = json.loads(run(str(tiny_path), "--predict", chip, "-n", "4", "--only", "tg", "--json").output)
        assert [row["chip"] for row in rows] == [name for name, _ in configurations]
        assert all(row["prediction"] is True for row in rows)
    text = run(str(tiny_path), "--predict", "m4-max", "-n", "4").output
    assert text.startswith("PREDICTED") and "not measured" in text and "546" in text and "410" in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--predict", "m4-ultra"), "'m4-ultra' is not one of"),
        (("--predict", "m1", "--profile"), "--profile measures"),
        (("--predict", "m1", "--backend", "reference"), "not of backend reference"),
        (("--predict", "m1", "-o", "csv"), "no CSV"),
        (("--predict", "m1", "--only", "pp", "-p", "8"), "prompts are bound by arithmetic"),
        (("--predict", "m1", "-n", "9999"), "lower -n 9999"),
    ],
)
def test_what_cannot_be_predicted_is_refused(tiny_path: Path, args: tuple[str, ...], says: str) -> None:
    result = run(str(tiny_path), *args)
    assert result.exit_code and says in f"{result.output}{result.exception}"
    shape = run("--shape", "opt-125m", "--sparsity", "polar", "-b", "2", "-n", "4", "--predict", "m1")
    assert shape.exit_code and "take -b 1" in shape.output
