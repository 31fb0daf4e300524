"""GGUF files against the logits that llama.cpp gives for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.decoder import Decoder
from ondevice.ops.reference import ReferenceOps
from tests.models.cases import POSITIONS, case_ids
from tests.models.gguf_cases import GGUF_CASES, gguf_spec, write_case
from tests.models.goldens import LLAMA_CPP, TRANSFORMERS, golden_about, golden_logits
from tests.models.running import decode_logits, prefill_logits

TOLERANCE = 2e-4
"""llama.cpp computes in float32: at most 1.2e-4 from float64 here, at logits with a standard deviation of 2 to 4."""


GELU_TOLERANCE = 1e-2
"""llama.cpp looks this activation up in a table of float16: at most 7.3e-3 then, at standard deviations of 3 to 5."""


def _tolerance(name: str) -> float:
    return GELU_TOLERANCE if gguf_spec(name).activation == "gelu_tanh" else TOLERANCE


@pytest.mark.parametrize("name", GGUF_CASES)
def test_reference_gives_llama_cpps_logits(name: str, tmp_path: Path) -> None:
    golden, ids = golden_logits(LLAMA_CPP)[name], case_ids(name)
    assert golden.std() > 1
    with open_checkpoint(write_case(tmp_path / "model.gguf", name)) as checkpoint:
        decoder = Decoder(checkpoint, ReferenceOps())
    logits = prefill_logits(decoder, ids)
    assert np.abs(logits[POSITIONS] - golden).max() < _tolerance(name)
    assert np.abs(decode_logits(decoder, ids) - logits).max() < 1e-5


def test_goldens_are_of_these_cases() -> None:
    cases = golden_about(LLAMA_CPP)["cases"]
    assert cases.keys() == GGUF_CASES.keys() == golden_logits(LLAMA_CPP).keys()
    assert all(cases[name]["ids"] == case_ids(name).tolist() for name in GGUF_CASES)


@pytest.mark.parametrize("name", [name for name, changes in GGUF_CASES.items() if not changes])
def test_both_judges_agree(name: str) -> None:
    """The file stands for the same model as the Hub folder does."""
    difference = golden_logits(LLAMA_CPP)[name] - golden_logits(TRANSFORMERS)[name]
    assert np.abs(difference).max() < _tolerance(name)


@pytest.mark.parametrize("name", ["llama1", "llama_yarn", "qwen2", "qwen3"])
def test_the_spec_survives_the_file(name: str, tmp_path: Path) -> None:
    with open_checkpoint(write_case(tmp_path / "model.gguf", name)) as checkpoint:
        spec, expected = checkpoint.spec, gguf_spec(name)
    assert spec.rope is not None and expected.rope is not None
    assert np.isclose(spec.rope.attention_factor, expected.rope.attention_factor, rtol=1e-6)
    frequencies = [s.rope.inverse_frequencies(160) for s in (spec, expected) if s.rope]
    assert np.allclose(*frequencies, rtol=1e-6, atol=0)
    for field in ("norm_eps", "n_kv_heads", "head_dim", "qk_norm", "qkv_bias", "tied_head", "windows"):
        assert getattr(spec, field) == getattr(expected, field), field
