"""A relu model that was trained on text: the converter finds its zeros, and skips them at no loss."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ondevice.cli import cli

pytestmark = pytest.mark.judge


def test_zeros_are_found_and_skipped(trained_relu, tmp_path, monkeypatch):
    given = trained_relu
    # What is fastest differs from moment to moment, and is no matter of tests.
    monkeypatch.setattr("ondevice_convert.budget.WORTH", 0.0)
    monkeypatch.setattr("ondevice_convert.trial.Trial.sketched", lambda self, decoder: None)
    text, made = tmp_path / "text.txt", tmp_path / "made"
    text.write_text(given.seen[-400_000:] + given.held_out)
    args = ["convert", str(given.folder), "-o", str(made), "--budget", "2%", "--text", str(text), "--tokens", "20000"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    report = json.loads((made / "report.json").read_text())
    section = json.loads((made / "config.json").read_text())["sparsity"]
    assert section["method"] == "cats" and report["made"]["chosen"].startswith("cats")
    assert not any(section["thresholds"])
    quality = report["quality"]["unseen text"]
    assert abs(quality["rise"]) < 1e-4 and quality["kl"] < 1e-5
    assert quality["density"]["ffn"] < 0.25 and report["speed"]["converted"]["speedup"] > 0
