"""What `Decoder.watch` shows of a model's layers is what passes there."""

from __future__ import annotations

import numpy as np
import pytest

from ondevice.decoder import Decoder
from ondevice.ops.cpu import CpuOps
from ondevice.ops.reference import ReferenceOps
from tests.models.running import decode_logits, make_decoder, prefill_logits
from tests.tiny import tiny_spec, tiny_tensors

TOLERANCE = {"reference": 1e-5, "cpu": 5e-3}
"""Of the largest value at a place: the CPU table rounds inputs of products with floats, and its cache, to 16 bits."""
PLACES = ("attention", "heads", "ffn")
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 96, 21)]
SPEC = tiny_spec("llama")
TENSORS = {name: values.astype(np.float16) for name, values in tiny_tensors(SPEC).items()}


def by_numpy(ids: list[int]) -> dict[str, np.ndarray]:
    """The tiny llama written down once more, in float64: by place [N, layers, width]."""
    w = {name: values.astype(np.float64) for name, values in TENSORS.items()}
    seen: dict[str, list[np.ndarray]] = {place: [] for place in PLACES}
    x, n = w["embed.weight"][ids], len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + SPEC.norm_eps) * w[f"{name}.weight"]

    def turned(x: np.ndarray) -> np.ndarray:
        half = SPEC.head_dim // 2
        angle = np.arange(n)[:, None, None] * 10000.0 ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)

    for i in range(SPEC.n_layers):
        p = f"layers.{i}."
        y = norm(x, p + "attn_norm")
        q, k, v = ((y @ w[f"{p}{name}.weight"].T).reshape(n, -1, SPEC.head_dim) for name in "qkv")
        q, k, v = turned(q), turned(k).repeat(SPEC.group, axis=1), v.repeat(SPEC.group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * SPEC.head_dim**-0.5
        scores[:, ~np.tri(n, dtype=bool)] = -np.inf
        parts = np.exp(scores - scores.max(axis=2, keepdims=True))
        heads = np.einsum("hqk,khd->qhd", parts / parts.sum(axis=2, keepdims=True), v).reshape(n, -1)
        x = x + heads @ w[p + "o.weight"].T
        z = norm(x, p + "ffn_norm")
        gate = z @ w[p + "gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (z @ w[p + "up.weight"].T)) @ w[p + "down.weight"].T
        for place, values in zip(PLACES, (y, heads, z)):
            seen[place].append(values)
    return {place: np.stack(values, axis=1) for place, values in seen.items()}


@pytest.fixture(scope="module")
def truth() -> dict[str, np.ndarray]:
    return by_numpy(IDS)


@pytest.fixture(scope="module", params=["reference", "cpu"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return make_decoder(SPEC, TENSORS, ReferenceOps() if request.param == "reference" else CpuOps(2))


@pytest.mark.parametrize("layers", [[0, 1, 2], [0], [2], [0, 2], range(3)])
@pytest.mark.parametrize("places", [PLACES, ("ffn",), ("heads",), ("ffn", "attention")])
def test_places_and_layers(decoder, truth, places, layers):
    found = decoder.watch(IDS, places, layers)
    assert len(found) == len(places)
    for place, values in zip(places, found):
        want = truth[place][:, list(layers)]
        assert values.dtype == np.float32 and values.shape == want.shape
        assert np.abs(values - want).max() < TOLERANCE[decoder.ops.name] * np.abs(want).max()


def test_wide_heads_are_shown_whole():
    spec = tiny_spec("qwen3")
    heads, ffn = make_decoder(spec, tiny_tensors(spec)).watch(IDS, ("heads", "ffn"), [1])
    assert heads.shape == (len(IDS), 1, spec.n_heads * spec.head_dim) and ffn.shape == (len(IDS), 1, spec.d_model)


def test_one_token_and_many(decoder):
    long = (IDS * 6)[:120]
    (at_once,) = decoder.watch(long, ("ffn",), [1])
    (first,) = decoder.watch(long[:1], ("ffn",), [1])
    assert np.array_equal(at_once[:1], first)


def test_steps_after_it_and_what_it_saw_before_stay_as_they_are(decoder):
    before, steps = prefill_logits(decoder, IDS), decode_logits(decoder, IDS)
    (seen,) = decoder.watch(IDS, ("ffn",), [0, 1])
    kept = seen.copy()
    decoder.watch(IDS[::-1], PLACES, [2])
    assert np.array_equal(prefill_logits(decoder, IDS), before)
    assert np.array_equal(decode_logits(decoder, IDS), steps)
    assert np.array_equal(seen, kept)
    assert np.array_equal(decoder.watch(IDS, ("ffn",), [0, 1])[0], kept)


def test_a_sequence_under_way_is_not_touched(decoder):
    cache = decoder.new_cache(1, len(IDS))
    half = np.concatenate(list(decoder.prefill(IDS[:10], cache, all_logits=True)))
    decoder.watch(IDS[::-1], PLACES, [0, 1, 2])
    rest = np.concatenate(list(decoder.prefill(IDS[10:], cache, all_logits=True)))
    alone = decoder.new_cache(1, len(IDS))
    want = [np.concatenate(list(decoder.prefill(ids, alone, all_logits=True))) for ids in (IDS[:10], IDS[10:])]
    assert np.array_equal(half, want[0]) and np.array_equal(rest, want[1])


def test_a_cache_of_its_own_changes_nothing(decoder):
    cache = decoder.new_cache(1, 32)
    for ids in (IDS, IDS[:5], IDS[::-1], IDS):
        for places in (("ffn",), ("ffn", "heads")):
            kept = decoder.watch(ids, places, [0, 2], cache)
            fresh = decoder.watch(ids, places, [0, 2])
            assert all(np.array_equal(a, b) for a, b in zip(kept, fresh))
