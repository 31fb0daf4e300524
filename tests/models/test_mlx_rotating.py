"""Rings of pages in layers with windows, on MLX: the same logits as with all positions kept, in less memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ondevice.decoder import Decoder
from ondevice.generation.kv_cache import KVCache
from ondevice.generation.sampling import SamplingParams
from ondevice.generation.session import Session
from tests.models.running import make_decoder, prefill_into
from tests.models.sparse_cases import sparse_spec, sparse_tensors
from tests.models.test_mlx_metal import ops as ops
from tests.tiny import tiny_spec, tiny_tensors

pytestmark = pytest.mark.judge

EXACT = 1e-3
CHUNK = 16
IDS = np.random.RandomState(4).randint(0, 96, 330)


@pytest.fixture
def mlx(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Helpers of MLX's tests, on a CPU and in float32; prompts are read in small chunks."""
    pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")
    monkeypatch.setenv("ONDEVICE_MLX_DTYPE", "float32")
    from tests.models import mlx_running

    # After the import, since other modules take the constant over when they are loaded.
    monkeypatch.setattr("ondevice.decoder.PREFILL_CHUNK", CHUNK)
    return mlx_running


def model(name: str) -> tuple[Any, Any]:
    """A spec with room for several turns of a ring, and its tensors."""
    if name.startswith("spark"):
        spec = dataclasses.replace(sparse_spec(name), context_length=512)
        return spec, sparse_tensors(spec)
    spec = tiny_spec(name, context_length=512)
    return spec, tiny_tensors(spec)


def caches(decoder: Decoder, slots: int = 1, chunk: int = CHUNK) -> KVCache:
    return decoder.new_cache(slots, len(IDS), chunk)


def read(decoder: Decoder, cache: KVCache, ids: NDArray[Any], slot: int = 0) -> NDArray[np.float32]:
    """Logits of all tokens of a prompt."""
    return np.concatenate(list(decoder.prefill(ids.tolist(), cache, slot, all_logits=True)))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "spark_attention"])
def test_prompts_and_steps_over_several_turns(mlx: Any, name: str) -> None:
    """Of one sequence, and of three of which one has not yet begun to overwrite."""
    spec, tensors = model(name)
    ours, judge = mlx.both(spec, tensors)
    one, other = caches(ours), caches(judge)
    assert [bool(ring) for ring in one.rings] == [window > 0 for window in spec.windows] and not any(other.rings)
    assert mlx.furthest(read(ours, one, IDS[:300]), read(judge, other, IDS[:300])) < EXACT
    for token in IDS[300:310]:
        assert mlx.furthest(*(d.decode([token], c, [0]) for d, c in ((ours, one), (judge, other)))) < EXACT
    both = [(decoder, caches(decoder, 3)) for decoder in (ours, judge)]
    for decoder, cache in both:
        for slot, length in enumerate((290, 40, 127)):
            prefill_into(cache, decoder, IDS[slot : slot + length], slot=slot, pieces=20)
    for token in IDS[:3]:
        assert mlx.furthest(*(d.decode([token] * 3, cache, [0, 1, 2]) for d, cache in both)) < EXACT


@pytest.mark.parametrize("name", ["gemma2", "spark_attention"])
def test_kernels_read_rings(ops: Any, mlx: Any, name: str) -> None:
    spec, tensors = model(name)
    ours, judge = make_decoder(spec, tensors, ops), make_decoder(spec, tensors)
    both = [(decoder, caches(decoder, 2)) for decoder in (ours, judge)]
    for decoder, cache in both:
        for slot, length in enumerate((210, 5)):
            prefill_into(cache, decoder, IDS[slot : slot + length], slot=slot, pieces=14)
    assert any(both[0][1].rings)
    assert mlx.furthest(*(d.decode([7, 8], cache, [0, 1]) for d, cache in both)) < EXACT


def test_a_ring_has_room_for_the_windows_of_a_whole_chunk(mlx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a chunk still sees its window when the last has been written."""
    monkeypatch.setattr("ondevice.decoder.PREFILL_CHUNK", 128)
    spec, tensors = model("mistral")
    ours, judge = mlx.both(spec, tensors)
    both = [(decoder, caches(decoder, chunk=128)) for decoder in (ours, judge)]
    assert max(both[0][1].rings) * 64 < 300
    assert mlx.furthest(*(read(decoder, cache, IDS) for decoder, cache in both)) < EXACT


def test_quantized_rings(mlx: Any) -> None:
    spec, _ = model("gemma2")
    spec = dataclasses.replace(spec, head_dim=32, attention_scale=0.0)
    tensors = tiny_tensors(spec)
    ring = make_decoder(spec, tensors, mlx.MlxOps(8))
    whole = make_decoder(spec, tensors, mlx.MlxOps(8))
    kept = KVCache(whole.ops, spec, 1, len(IDS))
    assert not any(kept.rings)
    assert mlx.furthest(read(ring, caches(ring), IDS[:250]), read(whole, kept, IDS[:250])) < 0.05


def test_a_ring_takes_less_memory_and_the_estimate_knows(mlx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ondevice.errors import OptionError

    spec = tiny_spec("mistral", context_length=1 << 20)
    decoder = make_decoder(spec, tiny_tensors(spec), mlx.MlxOps())
    monkeypatch.setattr(decoder.ops, "memory", dataclasses.replace(decoder.ops.memory, limit=1 << 26))
    cache = decoder.new_cache(1, 1 << 20, CHUNK)
    assert sum(array.nbytes for array in cache.pages.arrays()) == cache.positions * 2 * 4 * 2 * 16 < 1 << 18
    with pytest.raises(OptionError, match="a cache of 1048576 positions would take"):
        KVCache(decoder.ops, spec, 1, 1 << 20)


def test_going_back(mlx: Any) -> None:
    """A chunk back is always possible; further only to what is still there, else from the start."""
    spec, tensors = model("gemma3_text")
    ours, judge = mlx.both(spec, tensors)
    cache = caches(ours)
    right = read(judge, caches(judge), IDS[:320])
    read(ours, cache, IDS[:300])
    for length in (300 - CHUNK, 300 - CHUNK, 300 - 2 * CHUNK):
        assert cache.truncate(0, length) == length == cache.lengths[0]
        assert mlx.furthest(read(ours, cache, IDS[length : length + CHUNK]), right[length : length + CHUNK]) < EXACT
    # What was overwritten stays so, however little is written after going back.
    assert cache.truncate(0, 190) == 0 == cache.lengths[0]
    assert mlx.furthest(read(ours, cache, IDS[:60]), right[:60]) < EXACT
    assert cache.truncate(0, 10) == 10, "a ring that has not turned yet holds everything"
    assert mlx.furthest(read(ours, cache, IDS[10:40]), right[10:40]) < EXACT


def test_a_conversation_that_goes_back_further_is_read_again(mlx: Any, tiny: Any) -> None:
    spec, tensors = model("mistral")
    ours, judge = mlx.both(spec, tensors)
    answers, reused = [], []
    for decoder in (ours, judge):
        session = Session(decoder, tiny.tokenizer, 320)
        session._cache = caches(decoder)
        params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
        for prompt in (IDS[:300], np.concatenate([IDS[:150], IDS[:20]]), np.concatenate([IDS[:160], IDS[:7]])):
            answers.append([piece.token for piece in session.stream(prompt.tolist(), params)])
            reused.append(session.stats.reused_tokens)
    assert answers[:3] == answers[3:]
    assert reused == [0, 0, 150, 0, 150, 150]


def test_more_tokens_together_than_a_ring_has_room_for_are_refused(mlx: Any) -> None:
    spec, tensors = model("mistral")
    decoder = make_decoder(spec, tensors, mlx.MlxOps())
    cache = caches(decoder)
    with pytest.raises(ValueError, match="17 tokens of one sequence; this cache was made for 16"):
        decoder.watch(IDS[: CHUNK + 1].tolist(), ["ffn"], [0], cache)
    assert decoder.watch(IDS[:200].tolist(), ["ffn"], [2])[0].shape == (200, 1, spec.d_model)
    assert decoder.states(IDS[:200].tolist()).shape == (200, spec.d_model)
