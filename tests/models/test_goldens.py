"""The reference table against the logits that transformers gives, and against its configuration files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.places import places
from ondevice.decoder import Decoder
from ondevice.ops.reference import ReferenceOps
from ondevice.spec_hub import spec_from_config
from tests.models.cases import CASES, POSITIONS, case_ids, case_spec, case_tensors
from tests.models.goldens import TRANSFORMERS, golden_about, golden_logits
from tests.models.running import decode_logits, make_decoder, prefill_logits
from tests.tiny import stored_tensors

REFERENCE_TOLERANCE = 1e-5
"""Both sides compute in float64 and round to float32: at logits up to 25 that is 1e-6, and equal here to the bit."""


@pytest.mark.parametrize("name", CASES)
def test_reference_gives_the_judges_logits(name: str) -> None:
    golden, ids = golden_logits(TRANSFORMERS)[name], case_ids(name)
    assert golden.std() > 1  # else the tolerance would say little
    decoder = make_decoder(case_spec(name), case_tensors(name))
    prefilled = prefill_logits(decoder, ids)
    assert np.abs(prefilled[POSITIONS] - golden).max() < REFERENCE_TOLERANCE
    assert np.abs(decode_logits(decoder, ids) - prefilled).max() < REFERENCE_TOLERANCE


def test_goldens_are_of_these_cases() -> None:
    cases = golden_about(TRANSFORMERS)["cases"]
    assert cases.keys() == CASES.keys() == golden_logits(TRANSFORMERS).keys()
    assert all(cases[name]["ids"] == case_ids(name).tolist() for name in CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_configuration_says_the_same(name: str) -> None:
    """What transformers 5 saves, with other keys in other places, is read as the published form is."""
    saved = golden_about(TRANSFORMERS)["cases"][name]
    spec = spec_from_config(saved["config"], Path("config.json"))
    assert spec == case_spec(name)
    stored = {place.name for place in places(hub_layout(spec.architecture), spec).values()}
    assert sorted(stored) == saved["tensors"]


@pytest.mark.parametrize("name", ["llama3", "qwen3_layer_types", "phi3_partial", "gemma3", "gpt2_variations", "opt"])
def test_a_hub_folder_gives_the_judges_logits(name: str, tmp_path: Path) -> None:
    saved = golden_about(TRANSFORMERS)["cases"][name]
    (tmp_path / "config.json").write_text(json.dumps(saved["config"]))
    tensors = stored_tensors(case_spec(name), case_tensors(name))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint:
        logits = prefill_logits(Decoder(checkpoint, ReferenceOps()), case_ids(name))
    assert np.abs(logits[POSITIONS] - golden_logits(TRANSFORMERS)[name]).max() < REFERENCE_TOLERANCE
