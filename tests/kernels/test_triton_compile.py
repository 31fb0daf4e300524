"""The kernels compile for an H100 without one: nothing spills, and loads are as wide as their notes say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.triton_home import compiled_environment, needs_triton

pytestmark = needs_triton
ASYNC = {"up_union", "down_union", "attend_chunk", "grouped_hidden", "grouped_down", "topk_scores", "linear_many"}
"""Kernels whose weights, or keys and values, are copied ahead of their use."""
WIDE = {
    "hidden_one": 16,
    "linear_one": 16,
    "down_one": 16,
    "merge": 16,
    "topk_chosen": 16,
    "_topk": 4,
    "_threshold": 4,
    "_statistical": 16,
}
"""Bytes of the widest load of others, at least."""
QUANTIZED = {"hidden_one": 8, "linear_one": 8, "linear_many": 8, "up_union": 8, "grouped_hidden": 8}
"""Where words are loaded that turn into four, or eight, times as many floats, narrower pieces do."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    environment = {**compiled_environment(), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.kernels.triton_compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    return result


def test_compiles_without_spills(compiled: dict[str, list[dict[str, Any]]]) -> None:
    kernels = {found["kernel"] for call in compiled.values() for found in call}
    missing = {"add_chunks", "activate_union", "_votes", "_list_mask", "topk_merge"} | ASYNC | WIDE.keys()
    assert not missing - kernels
    for name, call in compiled.items():
        for found in call:
            assert found["spills"] == 0, (name, found)
            assert found["cubin"] > 0 and found["registers"] <= 255 and found["shared"] <= 227 * 1024, (name, found)


def test_wide_loads(compiled: dict[str, list[dict[str, Any]]]) -> None:
    for name, call in compiled.items():
        for found in call:
            kernel = found["kernel"]
            if kernel in ASYNC:
                least = QUANTIZED.get(kernel, 16) if "bits" in name else 16
                assert max(found["copies"], default=0) >= least, (name, found)
            elif kernel in WIDE:
                least = QUANTIZED.get(kernel, WIDE[kernel]) if "bits" in name else WIDE[kernel]
                assert max(found["loads"]) >= least, (name, found)


def test_a_masked_count_makes_loads_narrow(compiled: dict[str, list[dict[str, Any]]]) -> None:
    """h of a batch is copied ahead in whole pieces: no single values of it are loaded."""
    down = [found for found in compiled["rows of a batch"] if found["kernel"] == "down_union"]
    assert down and all(2 not in found["loads"] for found in down), down
