"""Folders that we write, read by mlx-lm itself, which runs them on its CPU build.

Everyday runs without the extra `judges` leave this out; where the environment variable CI is set, it must run
on Linux, for which MLX has a CPU build.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.decoder import Decoder
from ondevice.ops.reference import ReferenceOps
from ondevice_convert.recipe import make_recipe
from ondevice_convert.requantized import Requantized
from tests.models.running import prefill_logits
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_gguf, tiny_spec

pytestmark = pytest.mark.judge

EXACT = 1e-4
"""Largest difference of float32 to us, as a part of the logits' standard deviation."""
HALF = 0.2
"""The same where mlx-lm computes in what the folder holds, float16 or bfloat16 (measured: 0.11)."""
IDS = np.random.RandomState(0).randint(0, 96, 40)
WIDE = {"d_ff": 128, "context_length": 64}


@pytest.fixture(scope="module")
def judge() -> Any:
    if not os.environ.get("CI") or sys.platform != "linux":
        pytest.importorskip("mlx_lm", reason="the extra `judges` is not installed")
        pytest.importorskip("mlx.core", reason="mlx has no build for this machine")
    return importlib.import_module("tests.models.mlx_judge")


def ours(folder: Path, ids: Any = IDS) -> NDArray[np.float32]:
    with open_checkpoint(folder) as checkpoint:
        return prefill_logits(Decoder(checkpoint, ReferenceOps()), ids)


def off(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max() / b.std())


def convert(folder: Path, source: Path, bits: int | None, group_size: int | None) -> Path:
    with open_checkpoint(source) as checkpoint:
        made = Requantized(checkpoint, make_recipe(checkpoint, bits, group_size).forms)
        tensors = ((name, made.tensor(name)) for name in made.spec.tensors())
        write_checkpoint(folder, made.spec, tensors, max_shard_bytes=60_000)
    return folder


@pytest.mark.parametrize(
    ("dtype", "bits", "group_size"),
    [
        *((dtype, *form) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16) for form in ((None, None), (4, 64))),
        *((np.float16, *form) for form in ((4, 32), (5, 64), (6, 32), (8, 64))),
    ],
)
def test_mlx_lm_reads_a_llama(tmp_path: Path, judge: Any, dtype: Any, bits: int | None, group_size: int | None) -> None:
    source = tiny_checkpoint(tmp_path / "source", tiny_spec(**WIDE), dtype=dtype)
    folder = convert(tmp_path / "m", source, bits, group_size)
    expected = ours(folder)
    assert expected.std() > 1 and len(list(folder.glob("model-*.safetensors"))) > 1
    assert off(judge.logits(folder, IDS, in_float32=True), expected) < EXACT
    assert off(judge.logits(folder, IDS), expected) < (EXACT if bits is None and dtype == np.float32 else HALF)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("llama", "opt", "gpt2")])
def test_mlx_lm_reads_families(tmp_path: Path, judge: Any, architecture: str, bits: int | None) -> None:
    """mlx-lm leaves the windows of Mistral and Gemma 2 out: no more tokens than one holds are given.

    It does not know OPT, and of GPT-2 only files that name their tensors without "transformer.".
    """
    source = tiny_checkpoint(tmp_path / "source", tiny_spec(architecture, **WIDE))
    folder, ids = convert(tmp_path / "m", source, bits, None), IDS[:24]
    assert off(judge.logits(folder, ids, in_float32=True), ours(folder, ids)) < EXACT


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_mlx_lm_reads_what_was_a_gguf_file(tmp_path: Path, judge: Any, kind: str) -> None:
    source = tiny_gguf(tmp_path / "m.gguf", tiny_spec(**WIDE), types=kind)
    folder = convert(tmp_path / "m", source, None, None)
    assert off(judge.logits(folder, IDS, in_float32=True), ours(folder)) < EXACT
