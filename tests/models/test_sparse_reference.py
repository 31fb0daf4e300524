"""Whole models that skip work, on the reference table: prompts, steps and batches alike, and against dense models."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.errors import OptionError
from ondevice.sparsity.d2dmoe import D2dmoe
from ondevice.sparsity.lte import Lte
from ondevice.sparsity.polar import Polar, PolarHeads, PolarNeurons
from ondevice.sparsity.settings import SparsitySettings
from ondevice.sparsity.threshold import Cats, Teal
from tests.models.running import decode_logits, prefill_logits
from tests.models.sparse_cases import D_FF, METHODS, N_LAYERS, PER_TOKEN, sparse_spec
from tests.models.sparse_running import (
    EXACT,
    IDS,
    LENGTHS,
    batch_logits,
    decoder_of,
    dense_twin,
    density,
    has_dense_twin,
)
from tests.tiny import tiny_spec


@pytest.mark.parametrize("name", PER_TOKEN)
def test_prompts_equal_steps(name: str) -> None:
    decoder = decoder_of(name)
    at_once, by_step = prefill_logits(decoder, IDS), decode_logits(decoder, IDS)
    assert np.abs(at_once - by_step).max() < EXACT
    assert any(0.02 < density(decoder, kind) < 0.98 for kind in decoder.spec.sparsity.skips)
    if has_dense_twin(name):
        assert np.abs(at_once - prefill_logits(dense_twin(decoder), IDS)).max() > 0.01


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_row_of_a_batch_equals_its_single_run(name: str) -> None:
    decoder = decoder_of(name)
    together = batch_logits(decoder, LENGTHS)
    for slot, length in enumerate(LENGTHS):
        alone = batch_logits(decoder, [length], first=slot)
        assert np.abs(together[:, slot] - alone[:, 0]).max() < EXACT


EVERYTHING = {
    "lte": Lte(threshold=1e-300),
    "d2dmoe": D2dmoe(8, 12, 0.0),
    "teal": Teal(tuple((name, (0.0,) * N_LAYERS) for name in ("q", "k", "v", "o", "gate", "up", "down"))),
    "teal_each": Teal((("q", (0.0,) * N_LAYERS), ("down", (0.0,) * N_LAYERS))),
    "cats": Cats((0.0,) * N_LAYERS),
    "cats_relu": Cats((0.0,) * N_LAYERS),
    "polar_heads": Polar(heads=PolarHeads(4, dense_layers=())),
    "polar_groups": Polar(heads=PolarHeads(2, "kv_group", ())),
    "polar": Polar(PolarNeurons(8, ((8, (D_FF,) * N_LAYERS),)), PolarHeads(4)),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_everything_selected_equals_dense(name: str) -> None:
    decoder = decoder_of(name, sparsity=EVERYTHING[name])
    twin = dense_twin(decoder)
    assert np.abs(decode_logits(decoder, IDS) - decode_logits(twin, IDS)).max() < EXACT
    assert np.abs(batch_logits(decoder, LENGTHS) - batch_logits(twin, LENGTHS)).max() < EXACT


@pytest.mark.parametrize("name", [name for name in METHODS if has_dense_twin(name)])
def test_dense_on_request(name: str) -> None:
    decoder = decoder_of(name, SparsitySettings(dense=True))
    assert np.array_equal(decode_logits(decoder, IDS), decode_logits(dense_twin(decoder_of(name)), IDS))
    assert decoder.spec.sparsity is None


def test_tau_is_refused_where_there_is_none() -> None:
    for spec in (tiny_spec(), sparse_spec("lte"), sparse_spec("polar")):
        with pytest.raises(OptionError, match=r"tau is 0\.5"):
            SparsitySettings(tau=0.5).apply(spec)
    with pytest.raises(OptionError, match="dense is set"):
        SparsitySettings(tau=0.5, dense=True).apply(sparse_spec("d2dmoe"))
    for tau in (-0.1, 1.1, float("nan")):
        with pytest.raises(OptionError, match="between 0"):
            SparsitySettings(tau=tau).apply(sparse_spec("d2dmoe"))


def test_tau_is_the_callers() -> None:
    few, many = (decoder_of("d2dmoe", SparsitySettings(tau=tau)) for tau in (1.0, 0.3))
    for decoder in (few, many):
        prefill_logits(decoder, IDS)
    assert density(few, "ffn") == pytest.approx(1 / 3) and density(many, "ffn") > 0.5


def test_spark_has_no_dense_form() -> None:
    with pytest.raises(OptionError, match="no dense form"):
        SparsitySettings(dense=True).apply(sparse_spec("spark"))


def test_dense_expert_projections_run_all_their_experts() -> None:
    decoder = decoder_of("d2dmoe_attention", SparsitySettings(dense=True))
    prefill_logits(decoder, IDS)
    assert density(decoder, "ffn") == 1.0
