"""The CPU table against the reference, through whole models of every case, plain and quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import quantize
from ondevice.decoder import Decoder
from ondevice.ops.cpu import CpuOps
from ondevice.spec import ModelSpec
from tests.models.cases import CASES, POSITIONS, case_ids, case_spec, case_tensors
from tests.models.goldens import TRANSFORMERS, golden_logits
from tests.models.running import (
    GivenCacheOps,
    HalfCacheOps,
    cpu_cache,
    decode_logits,
    make_decoder,
    prefill_into,
    prefill_logits,
)

# Errors as a part of the logits' standard deviation, which is 2 to 8 here. Measured maxima stand beside each.
SHARED_CACHE = {0: (5e-5, 5e-6), 8: (0.2, 5e-3), 4: (0.2, 5e-3)}
"""By bits, 0 for float32: largest (1.1e-5) and RMS error (1e-6). A float32 error can tip an int8 code to its neighbour,
which moves single logits by much (0.1) and all of them by little (RMS 2.5e-3)."""
CACHE_VALUES = {0: 2e-5, 8: 0.2, 4: 0.2}
"""Keys and values of about 1 before rounding (4e-6; 0.1)."""
ROUNDED_CACHE = 1e-3
"""RMS error against a reference that rounds its own keys and values (4.3e-4): some tip to the neighbouring float16."""
EXACT_CACHE = 5e-3
"""RMS error against the judge (2e-3). All but a hundredth of it is float16 in the cache."""


VARIED = [
    "llama3",
    "mistral",
    "qwen2_windows",
    "qwen3_layer_types",
    "phi3_partial",
    "gemma2_low_caps",
    "gemma3",
    "gpt2",
    "opt",
]
"""Cases that together have every feature that may touch the order of work."""


def _model(name: str, bits: int = 0) -> tuple[ModelSpec, dict[str, Any]]:
    spec, tensors = case_spec(name), case_tensors(name)
    if not bits:
        return spec, dict(tensors)
    matrices = [key for key, w in tensors.items() if w.ndim == 2 and key != "position.weight"]
    return spec, {**tensors, **{key: quantize(tensors[key], bits, 32) for key in matrices}}


def _rms(a: NDArray[Any], b: NDArray[Any]) -> float:
    """RMS difference as a part of b's standard deviation."""
    return float(np.sqrt(((a - b) ** 2).mean()) / b.std())


@pytest.mark.parametrize("bits", SHARED_CACHE)
@pytest.mark.parametrize("name", CASES)
def test_logits_over_the_same_cache(name: str, bits: int) -> None:
    """Without the rounding of keys and values, which `GivenCacheOps` explains, little is left."""
    (spec, tensors), ids = _model(name, bits), case_ids("llama1")
    decoder = make_decoder(spec, tensors, CpuOps(2))
    cache = decoder.new_cache(1, len(ids))
    logits = prefill_into(cache, decoder, ids)
    table = GivenCacheOps(*cpu_cache(cache, spec, len(ids)), rounds=bool(bits))
    reference = prefill_logits(make_decoder(spec, tensors, table), ids)
    largest, rms = SHARED_CACHE[bits]
    assert np.abs(logits - reference).max() / reference.std() < largest
    assert _rms(logits, reference) < rms
    assert table.furthest < CACHE_VALUES[bits]


@pytest.mark.parametrize("name", CASES)
def test_logits_over_its_own_cache(name: str) -> None:
    spec, tensors = _model(name)
    ids = case_ids(name)
    logits = prefill_logits(make_decoder(spec, tensors, CpuOps(2)), ids)
    rounded = prefill_logits(make_decoder(spec, tensors, HalfCacheOps()), ids)
    assert _rms(logits, rounded) < ROUNDED_CACHE
    assert _rms(logits[POSITIONS], golden_logits(TRANSFORMERS)[name]) < EXACT_CACHE


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("name", VARIED)
def test_threads_and_pieces_change_no_bit(name: str, bits: int) -> None:
    (spec, tensors), ids = _model(name, bits), case_ids("llama1")
    one, two = (make_decoder(spec, tensors, CpuOps(threads)) for threads in (1, 2))
    whole = prefill_logits(one, ids)
    assert np.array_equal(prefill_logits(two, ids), whole)
    assert np.array_equal(prefill_logits(two, ids, (1, 16, 17, 50)), whole)
    assert np.array_equal(decode_logits(one, ids), whole)
    assert np.array_equal(decode_logits(two, ids), whole)


def test_chunks_of_a_prompt_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tensors = _model("qwen2_windows")
    ids = case_ids("qwen2_windows")
    decoder = make_decoder(spec, tensors, CpuOps(2))
    whole = prefill_logits(decoder, ids)
    monkeypatch.setattr("ondevice.decoder.PREFILL_CHUNK", 48)
    assert np.array_equal(prefill_logits(decoder, ids), whole)
    last_only = list(decoder.prefill(ids.tolist(), decoder.new_cache(1, len(ids))))
    assert [len(logits) for logits in last_only] == [0, 0, 0, 1]
    assert np.array_equal(last_only[-1][0], whole[-1])


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("name", ["llama3", "qwen2_windows", "qwen3_layer_types", "gemma3", "opt"])
def test_a_ragged_batch_changes_no_bit(name: str, bits: int) -> None:
    """Twenty sequences of 1 to 96 tokens decoded together, which also takes the way of many tokens."""
    spec, tensors = _model(name, bits)
    decoder = make_decoder(spec, tensors, CpuOps(2))
    ids, slots, more = case_ids(name), list(range(20)), 6
    prompts = [ids[slot : slot + 1 + 5 * slot] for slot in slots]
    cache = decoder.new_cache(len(slots), 128)
    for slot in reversed(slots):
        prefill_into(cache, decoder, prompts[slot], slot=slot)
    batch = np.stack([decoder.decode(ids[i] + np.zeros(20, int), cache, slots) for i in range(more)])
    for slot in slots:
        alone = decoder.new_cache(1, 128)
        prefill_into(alone, decoder, prompts[slot])
        single = np.concatenate([decoder.decode([ids[i]], alone, [0]) for i in range(more)])
        assert np.array_equal(batch[:, slot], single), slot


def test_capacity_chooses_longrope_factors_in_both_tables() -> None:
    """A cache beyond the original context takes the long factors, whatever is in it."""
    spec, tensors = _model("llama_longrope")
    ids = case_ids("llama_longrope")[:40]
    decoders: list[Decoder] = [make_decoder(spec, tensors, ops) for ops in (CpuOps(2), HalfCacheOps())]
    short, long = ([prefill_into(d.new_cache(1, n), d, ids) for d in decoders] for n in (64, 65))
    assert _rms(*short) < ROUNDED_CACHE
    assert _rms(*long) < ROUNDED_CACHE
    assert _rms(short[0], long[0]) > 100 * ROUNDED_CACHE
