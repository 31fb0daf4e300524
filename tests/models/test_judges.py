"""The reference table against transformers itself, through a folder that transformers wrote.

Everyday runs without the extra `judges` leave this out and rely on the logits kept in tests/golden; where the
environment variable CI is set, it must run.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.decoder import Decoder
from ondevice.ops.reference import ReferenceOps
from tests.models.cases import CASES, POSITIONS, case_ids, case_spec, case_tensors
from tests.models.goldens import TRANSFORMERS, golden_logits
from tests.models.running import decode_logits, make_decoder, prefill_logits
from tests.models.test_goldens import REFERENCE_TOLERANCE
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_spec, tiny_tensors

pytestmark = pytest.mark.judge

FLOAT32 = 1e-4
"""Largest error of transformers in float32, as a part of the logits' standard deviation (measured: 4.6e-5).

It is the judge's own: the same library in float64 agrees with us to REFERENCE_TOLERANCE."""


@pytest.fixture(scope="module")
def judge() -> Any:
    if not os.environ.get("CI"):
        pytest.importorskip("transformers", reason="the extra `judges` is not installed")
    return importlib.import_module("tests.models.transformers_judge")


@pytest.mark.parametrize("name", CASES)
def test_reference_gives_transformers_logits(name: str, tmp_path: Path, judge: Any) -> None:
    tensors, ids = case_tensors(name), case_ids(name)
    model = judge.build(CASES[name], tensors)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.spec == case_spec(name)
        decoder = Decoder(checkpoint, ReferenceOps())
    with judge.float64_throughout():
        exact_model = judge.build(CASES[name], tensors)
        exact = judge.full_logits(exact_model, ids)
    assert exact.dtype == np.float64
    prefilled, decoded = prefill_logits(decoder, ids), decode_logits(decoder, ids)
    assert np.abs(prefilled - exact).max() < REFERENCE_TOLERANCE
    assert np.abs(decoded - exact).max() < REFERENCE_TOLERANCE
    assert np.abs(prefilled - judge.full_logits(model, ids)).max() < FLOAT32 * exact.std()
    assert np.abs(golden_logits(TRANSFORMERS)[name] - exact[POSITIONS]).max() < REFERENCE_TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("_longrope")])
def test_decode_gives_transformers_cached_logits(name: str, judge: Any) -> None:
    """Without longrope beyond its original context: transformers turns early keys by the short factors there, and
    leaves them so when the text grows; our cache knows its size from the start."""
    tensors, ids = case_tensors(name), case_ids(name)
    with judge.float64_throughout():
        theirs = judge.cached_logits(judge.build(CASES[name], tensors), ids)
    ours = decode_logits(make_decoder(case_spec(name), tensors), ids)
    assert np.abs(ours - theirs).max() < REFERENCE_TOLERANCE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_what_we_write(architecture: str, tmp_path: Path, judge: Any) -> None:
    spec = tiny_spec(architecture, context_length=256)
    tensors, ids = tiny_tensors(spec), case_ids("llama1")
    folder = tiny_checkpoint(tmp_path / "model", spec, tensors, config_extra={"pad_token_id": 0})
    ours = prefill_logits(make_decoder(spec, tensors), ids)
    assert np.abs(judge.full_logits(judge.load(folder), ids) - ours).max() < FLOAT32 * ours.std()


def test_the_text_model_inside_one_with_vision(tmp_path: Path, judge: Any) -> None:
    tensors, ids = case_tensors("gemma3"), case_ids("gemma3")
    model = judge.with_vision(CASES["gemma3"], tensors)
    model.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config["model_type"] == "gemma3" and checkpoint.spec == case_spec("gemma3")
        logits = prefill_logits(Decoder(checkpoint, ReferenceOps()), ids)
    assert np.abs(judge.full_logits(model, ids) - logits).max() < FLOAT32 * logits.std()
    assert np.abs(golden_logits(TRANSFORMERS)["gemma3"] - logits[POSITIONS]).max() < REFERENCE_TOLERANCE
