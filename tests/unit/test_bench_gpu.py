"""`python -m ondevice_bench.gpu`: it runs at toy sizes without a GPU, and says what went wrong where something did."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from ondevice_bench.gpu import Run, _finite, main
from ondevice_bench.gpu_picture import svg
from ondevice_bench.gpu_report import table
from tests.kernels.triton_home import MISSING

needs_triton = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {' and '.join(MISSING)}: pip install 'ondevice[triton]'"
)
MACHINE = {"device": "a <GPU>", "torch": "2", "triton": "3"}


def results(**more: Any) -> dict[str, Any]:
    empty = {"parity": [], "layers": [], "decode": [], "seconds": {}, "wrong": {}}
    return {"machine": MACHINE, "seed": 1, "smoke": True, **empty, **more}


def layer(what: str = "attention", density: float = 0.5) -> dict[str, Any]:
    more = {"bytes": 10, "floor_ms": 0.5, "of_copy": 0.25, "error": None}
    return {
        "what": what,
        "density": density,
        "ms": 2.0,
        "low": 1.9,
        "high": 2.1,
        "dense_ms": 4.0,
        "speedup": 2.0,
        **more,
    }


def decoded(batch: int) -> dict[str, Any]:
    speeds = {name: {"tokens_per_s": 10.0 * batch, "of_copy": 0.5} for name in ("dense_torch", "dense_ours", "polar")}
    own = {"layers_with_own_cache": 3, "layers": 4}
    return {"batch": batch, "heads": 0.5, "rows": 0.1, "error": 0.01, "speedup": 1.5, **own, **speeds}


@pytest.mark.triton
@needs_triton
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU; this is the way without one")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    output, picture = tmp_path / "gpu.json", tmp_path / "gpu.svg"
    done = CliRunner().invoke(main, ["-o", str(output), "--picture", str(picture), "--smoke", "--seed", "3"])
    assert done.exit_code == 0, done.output
    found = json.loads(output.read_text())
    assert found["seed"] == 3 and not found["wrong"]
    assert len({record["kernel"] for record in found["parity"]}) == 9
    assert all(record["passed"] for record in found["parity"] + found["models"]) and len(found["models"]) == 2
    errors = [record["error"] for record in found["layers"] + found["decode"] if record.get("error") is not None]
    assert len(errors) >= 8 and max(errors) < 0.02
    assert {record["what"] for record in found["layers"]} >= {"copy", "attention", "rows of a batch", "topk of heads"}
    assert [record["batch"] for record in found["decode"]] == [1, 2]
    assert "| sparse_ffn_rows | 2 of 2 |" in done.output
    ElementTree.parse(picture)


@needs_triton
def test_without_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = CliRunner().invoke(main, ["-o", str(tmp_path / "gpu.json")])
    assert done.exit_code == 1 and "there is no NVIDIA GPU that torch can use; --smoke" in done.output


def test_stages_that_fail_or_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process wrote before it was stopped is kept, but for half a line, and the reason is told."""
    import time

    program = tmp_path / "stage.py"
    program.write_text(
        "import sys, time\npath = sys.argv[sys.argv.index('-o') + 1]\n"
        'with open(path, "a") as file:\n    file.write(\'{"a": 1}\\n{"b": \')\n'
        "if 'layers' in sys.argv: sys.exit('no such luck')\ntime.sleep(60)\n"
    )
    executable = tmp_path / "python"
    executable.write_text(f'#!/bin/sh\nshift 2\nexec {__import__("sys").executable} {program} "$@"\n')
    executable.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(executable))
    monkeypatch.setattr("ondevice_bench.gpu.STAGES", {"layers": 30.0, "decode": 6.0})
    run = Run(tmp_path / "out.json", 1, True, time.monotonic() + 100)
    records, wrong = run.stage("layers")
    assert records == [{"a": 1}] and "exit code 1: no such luck" in wrong
    records, wrong = run.stage("decode")
    assert records == [{"a": 1}] and wrong == "stopped after 6 s"
    run.until = time.monotonic() + 3
    assert run.stage("decode") == ([], "not run: no time was left")


def test_table() -> None:
    parity = [
        {"kernel": "k", "case": "one", "error": 0.1, "tolerance": 0.2, "passed": True, "raised": ""},
        {"kernel": "k", "case": "two", "error": None, "tolerance": 0.2, "passed": False, "raised": "ValueError: no"},
    ]
    layers = [
        {"what": "copy", "bytes_per_s": 3e12}, layer(), {"what": "attention", "failed": "not 0"},
        {"what": "rows, torch", "ms": 1.0, "low": 0.5, "high": 2.0, "first_product_ms": 0.25},
    ]  # fmt: skip
    text = table(
        results(parity=parity, layers=layers, decode=[decoded(4)], wrong={"decode": "stopped"}, seconds={"decode": 5})
    )
    for expected in (
        "## a <GPU>, torch 2", "| k | 1 of 2 | 0.50 |", "failed: k, two: error -, allowed 0.2 ValueError: no",
        "| attention | 0.50 | 2.0000 | 4.0000 | 2.00 | 0.5000 | 0.25 | - |", "failed: attention: not 0", "3000 GB/s",
        "| 4 | 0.50 | 0.100 | 40.0 | 40.0 | 40.0 | 1.50 | 0.50, 0.50 | 3 of 4 | 1.0e-02 |",
        "**decode went wrong**: stopped", "first_product_ms 0.25", "decode took 5 s",
    ):  # fmt: skip
        assert expected in text, expected


def test_picture() -> None:
    layers = [layer(density=d) for d in (0.1, 1.0)] + [
        layer("rows of a batch", 0.4),
        {"what": "copy", "bytes_per_s": 1.0},
    ]
    for found in (results(), results(layers=layers, decode=[decoded(1), decoded(2)])):
        root = ElementTree.fromstring(svg(found))
        lines = [e for e in root.iter() if e.tag.endswith("polyline")]
        assert len(lines) == 7
        points = [len(line.get("points", "").split()) for line in lines]
        assert points == ([2, 2, 2, 1, 1, 1, 2] if found["layers"] else [0] * 7)


def test_numbers_that_json_lacks() -> None:
    assert _finite({"a": math.inf, "b": math.nan, "c": 1.5, "d": "x"}) == {"a": None, "b": None, "c": 1.5, "d": "x"}
