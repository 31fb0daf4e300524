"""Each field of a spec matters: changing it alone moves the logits away from the judge's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ondevice.errors import ContextLengthError
from ondevice.spec import ModelSpec, RopeSpec
from tests.models.cases import CASES, LENGTH, POSITIONS, case_ids, case_spec, case_tensors
from tests.models.flips import MODEL_FLIPS, ROPE_FLIPS, UNSEEN, flips, refit
from tests.models.goldens import TRANSFORMERS, golden_logits
from tests.models.running import make_decoder, prefill_logits
from tests.models.test_goldens import REFERENCE_TOLERANCE
from tests.tiny import tiny_spec, tiny_tensors

NOTICED = 100 * REFERENCE_TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_a_changed_field_is_noticed(name: str) -> None:
    golden, ids, tensors = golden_logits(TRANSFORMERS)[name], case_ids(name), case_tensors(name)
    unnoticed = {}
    for label, spec in flips(case_spec(name)):
        logits = prefill_logits(make_decoder(spec, refit(tensors, spec)), ids)[POSITIONS]
        error = float(np.abs(logits - golden).max())
        if not error > NOTICED:
            unnoticed[label] = error
    assert not unnoticed


def test_refit_without_a_change_changes_nothing() -> None:
    spec, tensors = case_spec("llama_biases"), case_tensors("llama_biases")
    refitted = refit(tensors, spec)
    assert list(refitted) == list(tensors)
    assert all(np.array_equal(refitted[key], tensors[key]) for key in tensors)


def test_every_field_has_a_flip() -> None:
    assert {f.name for f in dataclasses.fields(ModelSpec)} == {*MODEL_FLIPS, *UNSEEN}
    assert not MODEL_FLIPS.keys() & UNSEEN.keys()
    assert {f.name for f in dataclasses.fields(RopeSpec)} == {*ROPE_FLIPS}


def test_every_flip_happens_in_some_case() -> None:
    happened = {label.split("=")[0] for name in CASES for label, _ in flips(case_spec(name))}
    assert happened == {*MODEL_FLIPS, *(f"rope.{field}" for field in ROPE_FLIPS)}


def test_architecture_is_a_label() -> None:
    spec, tensors, ids = case_spec("llama1"), case_tensors("llama1"), case_ids("llama1")
    other = dataclasses.replace(spec, architecture="qwen2")
    before, after = (prefill_logits(make_decoder(s, tensors), ids) for s in (spec, other))
    assert np.array_equal(before, after)


def test_vocab_size_is_the_width_of_the_logits() -> None:
    spec = dataclasses.replace(case_spec("llama1"), vocab_size=120)
    decoder = make_decoder(spec, refit(case_tensors("llama1"), spec))
    assert prefill_logits(decoder, case_ids("llama1")).shape == (LENGTH, 120)
    with pytest.raises(ValueError, match=r"0\.\.119"):
        prefill_logits(decoder, [0, 120])


def test_context_length_is_a_limit() -> None:
    spec = dataclasses.replace(case_spec("llama1"), context_length=LENGTH - 1)
    decoder = make_decoder(spec, case_tensors("llama1"))
    with pytest.raises(ContextLengthError, match=str(LENGTH - 1)):
        prefill_logits(decoder, case_ids("llama1"))


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_count_from_their_offset(offset: int) -> None:
    """Row p + offset of the table stands for position p: the same rows under another offset give the same logits."""
    spec = tiny_spec(rope=None, position_offset=offset, context_length=LENGTH)
    tensors, ids = tiny_tensors(spec), case_ids("llama1")
    logits = prefill_logits(make_decoder(spec, tensors), ids)
    moved = dataclasses.replace(spec, position_offset=offset + 3)
    shifted = {**tensors, "position.weight": np.pad(tensors["position.weight"], ((3, 0), (0, 0)))}
    assert np.array_equal(prefill_logits(make_decoder(moved, shifted), ids), logits)
    wrong = prefill_logits(make_decoder(moved, refit(tensors, moved)), ids)
    assert np.abs(wrong - logits).max() > 1
