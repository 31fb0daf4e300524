"""A conversion that is killed at random moments goes on, and ends with the same model."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ondevice.checkpoint import open_checkpoint
from ondevice.errors import OndeviceError
from tests.conftest import TEXT, VOCAB, write_tokenizer
from tests.tiny import tiny_checkpoint, tiny_spec

KILLS = 3
TIMED = {"REPORT.md", "report.json"}
"""Speeds differ from run to run."""


def command(model: Path, text: Path, target: Path) -> subprocess.Popen[bytes]:
    args = ("--sparsity", "cats:density=0.6", "--text", text, "--bits", "8", "--group-size", "32", "-t", "1")
    line = [sys.executable, "-m", "ondevice", "convert", model, "-o", target, *args]
    return subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_killed_conversions_go_on(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", tiny_spec(vocab_size=VOCAB, d_model=128, d_ff=512))
    write_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    for name in ("warm", "whole"):  # the first one compiles kernels
        start = time.monotonic()
        process = command(model, text, tmp_path / name)
        assert process.wait() == 0, process.stdout and process.stdout.read().decode()
        seconds = time.monotonic() - start
    draw, killed = random.Random(1), 0
    target = tmp_path / "killed"
    for _ in range(KILLS):
        process = command(model, text, target)
        try:
            process.wait(timeout=draw.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.wait()
        for folder in tmp_path.glob(".killed*"):
            loads_nothing(folder)
        if target.exists():
            check_same(tmp_path / "whole", target)
            for path in sorted(target.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            target.rmdir()
    assert killed >= 1
    last = command(model, text, target)
    assert last.wait() == 0, last.stdout and last.stdout.read().decode()
    check_same(tmp_path / "whole", target)
    assert not list(tmp_path.glob(".*"))


def loads_nothing(folder: Path) -> None:
    try:
        open_checkpoint(folder)
    except OndeviceError:
        return
    raise AssertionError(f"{folder.name} loads")


def check_same(wanted: Path, got: Path) -> None:
    a, b = contents(wanted), contents(got)
    assert a.keys() == b.keys()
    different: list[Any] = [name for name in a if name not in TIMED and a[name] != b[name]]
    assert not different
