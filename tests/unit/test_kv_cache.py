"""Pages of the cache: never overrun, never lost, never shared by two sequences."""

from __future__ import annotations

import random

import pytest

from ondevice.errors import ContextLengthError
from ondevice.generation.kv_cache import PAGE, KVCache
from ondevice.ops.reference import ReferenceOps
from tests.tiny import tiny_spec


def cache(slots: int, capacity: int) -> KVCache:
    return KVCache(ReferenceOps(), tiny_spec(n_layers=1, context_length=1024), slots, capacity)


def test_capacity_is_exact() -> None:
    made = cache(1, 100)
    made.reserve(0, 100)
    made.lengths[0] = 100
    before = made.block_table.copy()
    with pytest.raises(ContextLengthError, match="101 tokens do not fit the cache of 100"):
        made.reserve(0, 1)
    assert (made.block_table == before).all()


def test_more_than_the_models_context_is_refused() -> None:
    with pytest.raises(ContextLengthError, match="1025"):
        cache(1, 1025)


def test_random_growing_and_truncating_keeps_pages_apart() -> None:
    rng, slots, capacity = random.Random(0), 3, 300
    made = cache(slots, capacity)
    lengths = [0] * slots
    for _ in range(500):
        slot = rng.randrange(slots)
        if rng.random() < 0.5:
            more = rng.randrange(capacity - lengths[slot] + 1)
            made.reserve(slot, more)
            lengths[slot] += more
            made.lengths[slot] = lengths[slot]
        else:
            lengths[slot] = rng.randrange(lengths[slot] + 1)
            made.truncate(slot, lengths[slot])
        assert made.lengths.tolist() == lengths
        held = [int(p) for s in range(slots) for p in made.block_table[s, : -(-lengths[s] // PAGE)]]
        assert len(set(held)) == len(held)
    # Nothing leaked: every slot can still be filled.
    for slot in range(slots):
        made.truncate(slot, 0)
    for slot in range(slots):
        made.reserve(slot, capacity)
    assert len(set(made.block_table.reshape(-1).tolist())) == made.block_table.size
