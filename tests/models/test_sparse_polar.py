"""Polar sparsity on the reference table."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest

from ondevice.decoder import Decoder
from ondevice.errors import SparsityError
from ondevice.sparsity.polar import Polar, PolarHeads, PolarNeurons
from ondevice.sparsity.settings import SparsitySettings
from tests.models.running import decode_logits, make_decoder, prefill_into, prefill_logits
from tests.models.sparse_cases import D_FF, METHODS, N_LAYERS, POLAR, POLAR_TABLE, sparse_spec, sparse_tensors
from tests.models.sparse_running import (
    EXACT,
    IDS,
    LENGTHS,
    Float64Ops,
    batch_logits,
    decoder_of,
    dense_twin,
    density,
    inputs,
)
from tests.models.test_sparse_formulas import neuron, weights


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_polar_union(batch: int) -> None:
    decoder = decoder_of("polar")
    w = weights(decoder)
    x, ffn_x = inputs(decoder, batch), inputs(decoder, batch, seed=2)
    early = decoder.layers[1].router(x, batch)
    first, second = (w[f"ffn_router.{i}.weight"] for i in (0, 1))
    votes = np.zeros(D_FF)
    for row in x:
        votes += np.maximum(second @ (first @ row), 0)
    kept = {1: 96, 2: 40, 3: 60, 5: 60}[batch]
    if kept == D_FF:
        assert early.neurons is None
    else:
        chosen = sorted(range(D_FF), key=lambda n: -votes[n])[:kept]
        assert early.neurons.shared and np.flatnonzero(early.neurons.mask[0]).tolist() == sorted(chosen)
        wanted = sum(neuron(w, decoder.spec, n, ffn_x[0]) for n in chosen) + w["down.bias"]
        assert np.abs(decoder.layers[1].ffn(ffn_x, None, early)[0] - wanted).max() < EXACT
    heads = x @ w["head_router.weight"].T + w["head_router.bias"]
    for token in range(batch):
        assert set(early.heads.index[token]) == set(np.argsort(heads[token])[-2:])


def test_routers_read_what_the_attention_reads() -> None:
    decoder = decoder_of("polar")
    layer, seen = decoder.layers[1], []

    def router(x: Any, batch: int) -> Any:
        seen.append((x, batch))
        return layer.router(x, batch)

    def qkv(x: Any) -> Any:
        seen.append(x)
        return layer.qkv(x)

    decoder.layers[1] = dataclasses.replace(layer, router=router, qkv=qkv)
    batch_logits(decoder, (1, 2, 3), steps=1)
    prompts, ((x, batch), normed) = seen[:-2], seen[-2:]
    assert batch == 3 and np.array_equal(x, normed) and x.shape == (3, 64)
    assert [entry[1] for entry in prompts[::2]] == [0, 0, 0]


def test_polar_groups_take_the_largest_of_their_heads() -> None:
    decoder = decoder_of("polar_groups")
    ops = decoder.ops
    scores = np.array([[0.0, 5, 4, 4], [1, 1, 0, 2], [-1, -9, -2, -3]])
    assert [list(row) for row in ops.select_heads(scores, 1, 2).index] == [[0], [1], [0]]


@pytest.mark.parametrize("name", POLAR)
def test_polar_prompts_are_dense_and_steps_are_not(name: str) -> None:
    decoder = decoder_of(name)
    twin = dense_twin(decoder)
    assert np.array_equal(prefill_logits(decoder, IDS), prefill_logits(twin, IDS))
    assert np.array_equal(prefill_logits(decoder, IDS[:3], (1, 1)), prefill_logits(twin, IDS[:3], (1, 1)))
    assert all(tally.sparse == 0 for tally in decoder.ops.counts().values())
    assert np.abs(decode_logits(decoder, IDS) - decode_logits(twin, IDS)).max() > 0.01
    assert all(density(decoder, kind) < 0.98 for kind in decoder.spec.sparsity.skips)


@pytest.mark.parametrize("name", ["polar_heads", "polar_groups", "polar_windows"])
def test_polar_heads_in_a_batch_are_each_sequences_own(name: str) -> None:
    decoder = decoder_of(name)
    together = batch_logits(decoder, LENGTHS)
    for slot, length in enumerate(LENGTHS):
        assert np.abs(together[:, slot] - batch_logits(decoder, [length], slot)[:, 0]).max() < EXACT


def test_skipped_heads_are_exactly_zero() -> None:
    decoder = decoder_of("polar_heads")
    seen = []
    real = decoder.ops.attention

    def attention(*args: Any) -> Any:
        out = real(*args)
        seen.append((args[2], out))
        return out

    decoder.ops.attention = attention  # type: ignore[method-assign]
    decode_logits(decoder, IDS[:6])
    for layer, out in seen:
        zero = [not head.any() for head in out.reshape(4, -1)]
        assert sum(zero) == (0 if layer == 0 else 1)


def test_polar_cache_has_no_holes() -> None:
    """Of the first layer, whose input skipping cannot change, the cache equals the dense run's."""
    decoder = decoder_of("polar", sparsity=Polar(METHODS["polar"][1].neurons, PolarHeads(1, "head", ())))
    caches = [cache_after(d) for d in (decoder, dense_twin(decoder))]
    for sparse, dense in zip(*caches):
        assert np.array_equal(sparse[0], dense[0])
        assert np.abs(sparse[1] - dense[1]).max() > 1e-3


def test_polar_equals_dense_where_only_idle_parts_are_skipped() -> None:
    """Logits and the whole cache, if heads and neurons that are never chosen have no effect."""
    kept = tuple(i // 2 + 40 for i in range(N_LAYERS))
    spec = sparse_spec("polar", sparsity=Polar(PolarNeurons(96, ((8, kept),)), PolarHeads(2, "head", ())))
    w = sparse_tensors(spec)
    for i, k in enumerate(kept):
        w[f"layers.{i}.head_router.weight"][:] = 0
        w[f"layers.{i}.head_router.bias"][:] = [5, 1, 7, 2]
        w[f"layers.{i}.o.weight"].reshape(64, 4, 16)[:, [1, 3]] = 0
        w[f"layers.{i}.ffn_router.0.weight"][:] = 0  # equal scores: the first neurons are chosen
        w[f"layers.{i}.down.weight"][:, k:] = 0
    decoder = make_decoder(spec, w, Float64Ops())
    twin = dense_twin(decoder, w)
    assert np.abs(decode_logits(decoder, IDS) - decode_logits(twin, IDS)).max() < EXACT
    for sparse, dense in zip(cache_after(decoder), cache_after(twin)):
        assert np.abs(sparse - dense).max() < EXACT
    assert density(decoder, "heads") == 0.5 and density(decoder, "ffn") < 0.5


def cache_after(decoder: Decoder) -> tuple[np.ndarray, ...]:
    """Keys and values after a prompt and 20 decoded tokens."""
    cache = decoder.new_cache(1, len(IDS))
    prefill_into(cache, decoder, IDS[:9])
    for token in IDS[9:29]:
        decoder.decode([int(token)], cache, [0])
    return tuple(store[:, cache.block_table[0]] for store in cache.pages)


def test_beyond_the_table_runs_dense_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    decoder = decoder_of("polar_neurons")
    twin = dense_twin(decoder)
    with caplog.at_level(logging.WARNING, "ondevice"):
        six = batch_logits(decoder, (1, 2, 3, 4, 5, 6))
    assert np.abs(six - batch_logits(twin, (1, 2, 3, 4, 5, 6))).max() < EXACT
    assert [r.getMessage() for r in caplog.records] == [
        "polar: the FFN of a batch of 6, where the model's table ends at 5; it runs dense"
    ]
    strict = decoder_of("polar_neurons", SparsitySettings(strict=True))
    batch_logits(strict, (1, 2, 3, 4, 5))
    with pytest.raises(SparsityError, match="batch of 6"):
        batch_logits(strict, (1, 2, 3, 4, 5, 6))


def test_tables_choose_the_smallest_size_that_fits() -> None:
    neurons = PolarNeurons(8, POLAR_TABLE)
    assert [neurons.kept(0, batch) for batch in range(1, 7)] == [20, 30, 96, 96, 96, None]
