"""`ondevice doctor --report FILE`: one JSON with machine, agreement and speed, also where parts of it fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from ondevice.cli import cli
from ondevice.commands import doctor
from ondevice_bench import health
from ondevice_parity import parity
from ondevice_parity.cases import CASES


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "num_hidden_layers": 2}
    monkeypatch.setattr(health, "SMALL", {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2})
    monkeypatch.setattr(health, "TESTS", "pp4, tg3")
    monkeypatch.setattr(health, "KERNEL_HOMES", ("reference", "metal"))
    monkeypatch.setattr(parity, "CASES", {"select_threshold": CASES["select_threshold"]})
    monkeypatch.setattr("ondevice.machine.BANDWIDTH_BYTES", 1 << 22)


def test_a_report_of_mlx(small: None, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")
    monkeypatch.setattr(doctor, "MEASURED", ("mlx",))
    file = tmp_path / "report.json"
    result = CliRunner().invoke(cli, ["doctor", "--report", str(file), "--model", str(tiny_path)])
    assert result.exit_code == 0 and result.stderr.endswith(f"wrote {file}\n"), result.stderr
    report = json.loads(file.read_text())
    assert report["machine"]["architecture"] and report["backends"]["mlx"].startswith("ready on the")
    assert [row["sparsity"] for row in report["agreement"]] == [method or "dense" for _, method in health.AGREEMENT]
    for row in report["agreement"]:
        assert row["median_rms"] < 1e-3 and row["top1"] > 0.9, row
        assert row["sparsity"] == "dense" or row["counts"], row
    assert report["parity"]["homes"]["reference"]["select_threshold"]["cases"] > 5
    assert "no Apple GPU" in report["parity"]["not_run"]["metal"] or "metal" in report["parity"]["homes"]
    assert report["kernels"]["instruction_set"]
    assert [row["test"] for row in report["bench"]] == ["pp4", "tg3"]
    assert all(row["avg_ts"] > 0 and row["device"] for row in report["bench"])


def test_what_fails_is_told_in_its_place(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "AGREEMENT", (("smollm2-135m", None), ("smollm2-135m", "polar:heads=2,nonsense=1")))
    monkeypatch.setattr(parity, "run", lambda homes: 1 / 0)
    found = health.health(["reference"], str(tmp_path / "none"), lambda text: None)
    assert "ZeroDivisionError" in found["parity"]["error"]
    fine, wrong = found["agreement"]
    assert fine["rms"] == 0 and "error" not in fine
    assert "nonsense" in wrong["error"] and any("parse" in line for line in wrong["traceback"])
    assert [row["backend"] for row in found["bench"]] == ["reference"] and "none" in found["bench"][0]["error"]


def test_a_gpu_measures_models_of_a_size_where_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac; which device a table has is replaced. What only a Mac can show is how fast it is."""
    asked = []
    monkeypatch.setattr(health, "AGREEMENT", ())
    monkeypatch.setattr(health, "_parity", dict)
    monkeypatch.setattr(health, "_where", lambda backend: "GPU (Apple M2, Metal)")
    monkeypatch.setattr(health, "_measured", lambda sources, backend: asked.append(sources) or {"rows": []})
    health.health(["mlx"], "smollm2", lambda text: None)
    assert [source.name for source in asked[0]] == ["smollm2"]
    assert [source.name for source in asked[1]] == ["llama-3.2-1b"] * 3
    assert [source.sparsity.method if source.sparsity else "dense" for source in asked[1]] == ["dense", "lte", "polar"]
