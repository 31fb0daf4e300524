"""The step that MLX's table lays out ahead: used where it is the next one, and of no effect where it is not."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from ondevice.decoder import Decoder
from tests.models.running import prefill_into
from tests.models.sparse_cases import sparse_spec, sparse_tensors
from tests.models.test_mlx_rotating import EXACT
from tests.models.test_mlx_rotating import mlx as mlx
from tests.tiny import tiny_spec, tiny_tensors

pytestmark = pytest.mark.judge

IDS = np.random.RandomState(5).randint(0, 96, 60).tolist()


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass that is laid out."""
    found: list[int] = []
    forward = Decoder._forward

    def counting(self: Decoder, step: Any, *args: Any) -> Any:
        found.append(len(step.tokens))
        return forward(self, step, *args)

    monkeypatch.setattr(Decoder, "_forward", counting)
    return found


def test_each_step_is_laid_out_once(mlx: Any, laid_out: list[int]) -> None:
    spec = tiny_spec("gpt2")
    ours, _ = mlx.both(spec, tiny_tensors(spec))
    cache = ours.new_cache(2, 40)
    for slot in range(2):
        prefill_into(cache, ours, np.array(IDS[:5]), slot=slot)
    laid_out.clear()
    for token in IDS[:4]:
        ours.decode([token] * 2, cache, [0, 1])
    assert laid_out == [2] * 5


def test_the_last_place_of_a_cache_has_no_next_step(mlx: Any, laid_out: list[int]) -> None:
    spec = tiny_spec("llama")
    both = mlx.both(spec, tiny_tensors(spec))
    for decoder in both:
        cache = decoder.new_cache(1, 8)
        laid_out.clear()
        rows = [decoder.decode([token], cache, [0]) for token in IDS[:8]]
        assert len(laid_out) == 8
        if decoder is both[0]:
            mine = rows
    assert mlx.furthest(np.stack(mine), np.stack(rows)) < EXACT


@pytest.mark.parametrize("name", ["lte", "spark", "polar", "cats", "d2dmoe"])
def test_steps_that_are_not_the_next_one(mlx: Any, name: str) -> None:
    """Other sequences, another order, one step back, a prompt in between: always the reference's logits and counts."""
    spec = sparse_spec(name)
    rows, tallies = [], []
    for decoder in mlx.both(spec, sparse_tensors(spec)):
        cache = decoder.new_cache(3, 60)
        found = []
        for slot in range(3):
            prefill_into(cache, decoder, np.array(IDS[slot : slot + 7]), slot=slot)
        for i, slots in enumerate([[0, 1, 2], [0, 1, 2], [1, 0], [1, 0], [2], [2]]):
            found.append(decoder.decode(IDS[i : i + len(slots)], cache, slots))
        # As many sequences at the same positions, but others.
        cache.truncate(0, 5)
        cache.truncate(1, 6)
        for slot in (0, 1):
            found.append(decoder.decode([7], cache, [slot]))
        cache.truncate(2, 8)
        found.append(decoder.decode([3], cache, [2]))
        prefill_into(cache, decoder, np.array(IDS[20:24]), slot=2)
        found.append(decoder.decode([4], cache, [2]))
        rows.append(np.concatenate(found))
        tallies.append({k: (t.calls, t.sparse, t.kept, t.units) for k, t in decoder.ops.counts().items()})
    assert mlx.furthest(*rows) < EXACT
    assert tallies[0] == tallies[1]


def test_looking_at_the_pages_does_not_run_what_is_laid_out(mlx: Any) -> None:
    import mlx.core as mx

    spec = tiny_spec("llama")
    ours, judge = mlx.both(spec, tiny_tensors(spec))
    caches = [decoder.new_cache(1, 60) for decoder in (ours, judge)]
    for token in IDS[:4]:
        rows = [decoder.decode([token], cache, [0]) for decoder, cache in zip((ours, judge), caches)]
        mx.eval(caches[0].pages.arrays())
    assert mlx.furthest(*rows) < EXACT


def test_a_thread_for_each_step(mlx: Any) -> None:
    """A thread that has ended gives its number to the next one, but not its streams."""
    spec = tiny_spec("llama")
    ours, judge = mlx.both(spec, tiny_tensors(spec))
    caches = [decoder.new_cache(1, 60) for decoder in (ours, judge)]
    found: list[Any] = []

    def step(token: int) -> None:
        found.append(ours.decode([token], caches[0], [0]))

    for i, token in enumerate(IDS[:4]):
        worker = threading.Thread(target=step, args=(token,))
        worker.start()
        worker.join()
        assert len(found) == i + 1 and mlx.furthest(found[-1], judge.decode([token], caches[1], [0])) < EXACT


def test_pages_that_change_hands(mlx: Any) -> None:
    """Both sequences get a page for what is laid out, give it back, and take it again in the other order."""
    spec = tiny_spec("llama", context_length=256)
    rows = []
    for decoder in mlx.both(spec, tiny_tensors(spec)):
        cache = decoder.new_cache(2, 200)
        for slot in (0, 1):
            prefill_into(cache, decoder, np.resize(np.array(IDS[slot:]), 63), slot=slot)
        decoder.decode([1, 2], cache, [0, 1])
        for slot in (0, 1):
            cache.truncate(slot, 64)
        rows.append(np.concatenate([decoder.decode([token, 5], cache, [0, 1]) for token in (3, 4)]))
    assert mlx.furthest(*rows) < EXACT


def test_chunks_without_logits_do_not_compute_any(mlx: Any) -> None:
    """Of all chunks of a prompt but the last, MLX is asked for keys and values alone."""
    import mlx.core as mx

    spec = tiny_spec("llama")
    ours, _ = mlx.both(spec, tiny_tensors(spec))
    asked: list[int] = []
    evaluate = mx.async_eval
    cache = ours.new_cache(1, 60)

    def noting(arrays: list[Any]) -> None:
        asked.append(len(arrays))
        evaluate(arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "async_eval", noting)
        list(ours.prefill(IDS[:40], cache))
    pages = len(cache.pages.arrays())
    assert asked == [pages, pages, pages + 1]


def test_another_sequence_takes_the_pages_of_one_that_ended(mlx: Any) -> None:
    spec = tiny_spec("llama")
    rows = []
    for decoder in mlx.both(spec, tiny_tensors(spec)):
        cache = decoder.new_cache(2, 60)
        prefill_into(cache, decoder, np.array(IDS[:9]), slot=0)
        decoder.decode([1], cache, [0])
        cache.truncate(0, 0)
        prefill_into(cache, decoder, np.array(IDS[9:20]), slot=1)
        rows.append(decoder.decode([2], cache, [1]))
    assert mlx.furthest(*rows) < EXACT


def test_a_fault_while_laying_out(mlx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec("llama")
    ours, judge = mlx.both(spec, tiny_tensors(spec))
    caches = [decoder.new_cache(1, 60) for decoder in (ours, judge)]
    for decoder, cache in zip((ours, judge), caches):
        decoder.decode([1], cache, [0])
    with monkeypatch.context() as patch:

        def fails(*args: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr("ondevice.ops.mlx.Index", fails)
        with pytest.raises(KeyboardInterrupt):
            ours.decode([2], caches[0], [0])
    assert caches[0].lengths[0] == 1
    judge.decode([2], caches[1], [0])
    for token in (2, 3):
        mine = ours.decode([token], caches[0], [0])
    assert mlx.furthest(mine, judge.decode([3], caches[1], [0])) < EXACT


def test_a_cache_that_nobody_needs_goes_with_its_step(mlx: Any) -> None:
    import mlx.core as mx

    spec = tiny_spec("llama", context_length=1 << 14)
    ours, _ = mlx.both(spec, tiny_tensors(spec))
    before = mx.get_active_memory()
    cache = ours.new_cache(1, 1 << 14)
    ours.decode([1], cache, [0])
    held, gone = mx.get_active_memory() - before, weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None and mx.get_active_memory() - before < held / 100


def test_long_prompts_are_written_in_place(mlx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    spec = tiny_spec("llama", context_length=1 << 16)
    ours, _ = mlx.both(spec, tiny_tensors(spec))
    cache = ours.new_cache(1, 1 << 16)
    held = sum(array.nbytes for array in cache.pages.arrays())
    prefill_into(cache, ours, np.array(IDS), slot=0)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in ours.prefill(IDS, cache):
        pass
    assert mx.get_peak_memory() - before < held / 12  # less than a layer's keys
