"""A suite that lets a fault pass is worth nothing: each planted fault must be found by some case of its kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.kernels.triton_home import needs_triton

pytestmark = needs_triton
LEAST = 5
"""Faults of each kernel."""


@pytest.fixture(scope="module")
def faults() -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.triton_mutants"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Shown by pytest -s, and with a failure.
    print(done.stdout.rsplit("\n", 2)[0])
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_fault_is_found(faults: list[dict[str, Any]]) -> None:
    assert not [fault for fault in faults if not fault["found_by"]]


def test_every_kernel_has_some(faults: list[dict[str, Any]]) -> None:
    counts = Counter(fault["kernel"] for fault in faults)
    assert len(counts) == 9 and min(counts.values()) >= LEAST, counts
