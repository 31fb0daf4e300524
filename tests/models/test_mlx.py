"""The MLX table against the reference, through whole models of every case: prompts, steps and ragged batches.

Everyday runs without MLX leave this out (extra `mlx-cpu`); where the environment variable CI is set, it must run on
Linux, for which MLX has a CPU build.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import threading
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint.quantization import Quantized, dequantize, quantize
from ondevice.ops.base import Step
from ondevice.ops.reference import ReferenceOps
from tests.models.cases import CASES, case_ids, case_spec, case_tensors
from tests.models.running import decode_logits, make_decoder, prefill_into, prefill_logits
from tests.models.sparse_cases import METHODS, sparse_spec, sparse_tensors
from tests.models.sparse_running import LENGTHS, batch_logits
from tests.tiny import tiny_gguf, tiny_spec, tiny_tensors

pytestmark = pytest.mark.judge

EXACT = 2e-4
"""Largest difference of logits whose standard deviation is 2 to 8, in float32 (measured: 9e-5)."""
RAGGED = (1, 7, 33, 64, 65)


@pytest.fixture(scope="module")
def mlx() -> Any:
    """tests.models.mlx_running, which imports MLX."""
    if not os.environ.get("CI") or sys.platform != "linux":
        pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")
    return importlib.import_module("tests.models.mlx_running")


@pytest.mark.parametrize("name", CASES)
def test_prompts_and_steps(mlx: Any, name: str) -> None:
    ours, judge = mlx.both(case_spec(name), case_tensors(name))
    ids = case_ids(name)[:70]
    right = prefill_logits(judge, ids)
    assert mlx.furthest(prefill_logits(ours, ids), right) < EXACT
    assert mlx.furthest(prefill_logits(ours, ids, (1, 30)), right) < EXACT
    cache = ours.new_cache(1, len(ids))
    prefill_into(cache, ours, ids[:50])
    steps = np.concatenate([ours.decode([token], cache, [0]) for token in ids[50:]])
    assert mlx.furthest(steps, right[50:]) < EXACT


@pytest.mark.parametrize("name", CASES)
def test_ragged_batches(mlx: Any, name: str) -> None:
    ours, judge = mlx.both(case_spec(name), case_tensors(name))
    ids = case_ids(name)
    assert mlx.furthest(*(mlx.ragged_logits(d, ids, RAGGED, 2) for d in (ours, judge))) < EXACT
    assert mlx.furthest(*(mlx.ragged_logits(d, ids, (33,), 2) for d in (ours, judge))) < EXACT


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma2_low_caps", "opt"])
def test_several_prompts_in_one_step(mlx: Any, name: str) -> None:
    ours, judge = mlx.both(case_spec(name), case_tensors(name))
    assert mlx.furthest(*(mlx.mixed_logits(d, case_ids(name), (3, 1, 40, 7)) for d in (ours, judge))) < EXACT


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_skip(mlx: Any, name: str) -> None:
    """Prompts, steps and ragged batches, and what is counted of them."""
    spec = sparse_spec(name)
    ours, judge = mlx.both(spec, sparse_tensors(spec))
    ids = case_ids("llama1")[:30]
    for run in (lambda d: prefill_logits(d, ids), lambda d: decode_logits(d, ids[:12])):
        assert mlx.furthest(run(ours), run(judge)) < EXACT
    assert mlx.furthest(*(batch_logits(d, LENGTHS) for d in (ours, judge))) < EXACT
    assert mlx.furthest(*(batch_logits(d, (9,)) for d in (ours, judge))) < EXACT
    counts, right = ours.ops.counts(), judge.ops.counts()
    for kind in spec.sparsity.skips:
        mine, others = counts[kind], right[kind]
        assert (mine.calls, mine.sparse, mine.units) == (others.calls, others.sparse, others.units)
        # A score at a border may fall on either side of it.
        assert abs(mine.kept - others.kept) <= 0.002 * mine.units
        assert mine.bytes_skipped == 0  # all of it is computed


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (5, 32), (6, 64), (8, 32)])
def test_canonical_groups_run_as_they_are(mlx: Any, bits: int, group: int) -> None:
    spec = tiny_spec("qwen2", d_ff=128)
    tensors = {k: quantize(w, bits, group) if w.ndim == 2 else w for k, w in tiny_tensors(spec).items()}
    ours, judge = mlx.both(spec, tensors)
    ids = case_ids("llama1")[:40]
    assert mlx.furthest(prefill_logits(ours, ids), prefill_logits(judge, ids)) < EXACT
    part = ours.embed
    words = tensors["embed.weight"]
    assert (np.array(part.weight) == words.packed).all() and (part.bits, part.group) == (bits, group)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_files_in_gguf(mlx: Any, tmp_path: Any, kind: str) -> None:
    from ondevice.checkpoint import open_checkpoint
    from ondevice.decoder import Decoder

    path = tiny_gguf(tmp_path / "m.gguf", tiny_spec(d_ff=128), types=kind)
    ids = case_ids("llama1")[:20]
    with open_checkpoint(path) as checkpoint:
        ours, judge = Decoder(checkpoint, mlx.MlxOps()), Decoder(checkpoint, ReferenceOps())
        assert mlx.furthest(prefill_logits(ours, ids), prefill_logits(judge, ids)) < EXACT


def k_quants(w: Any, bits: int, group: int, seed: int) -> Quantized:
    """Groups as GGUF's K types have them: scales are integers under a float16 factor of 256 inputs."""
    random = np.random.RandomState(seed)
    plain = quantize(w, bits, 32)
    out, inputs = w.shape
    size = (out, inputs // group)
    factor = np.full((out, inputs // 256), 1 / 1024, np.float16)
    scales = random.randint(20, 40, size).astype(np.int8)
    biases = None if group == 16 else random.randint(-300, -200, size).astype(np.int16)
    return Quantized(plain.packed, scales, biases, bits, group, factor, None if biases is None else factor)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (5, 32), (6, 16)])
def test_k_quants_are_exact(mlx: Any, bits: int, group: int, caplog: Any) -> None:
    """Six bits in groups of 16 become floats, which is said once; q, k and v may be of several formats."""
    spec = tiny_spec("qwen2", d_model=256, d_ff=256)
    tensors: dict[str, Any] = dict(tiny_tensors(spec))
    for i, (name, w) in enumerate(tiny_tensors(spec).items()):
        if w.ndim == 2 and w.shape[1] == 256 and not name.endswith("k.weight"):
            tensors[name] = k_quants(w, bits, group, i)
    ours, judge = mlx.both(spec, tensors)
    ids = case_ids("llama1")[:20]
    right = prefill_logits(judge, ids)
    assert np.isfinite(right).all() and mlx.furthest(prefill_logits(ours, ids), right) < 1e-3 * right.std()
    ours.ops.prepare(spec)
    ours.ops.prepare(spec)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (group == 16) and all("6 bits in groups of 16" in text for text in said)
    if group == 16:
        assert np.array_equal(np.array(ours.embed.weight), dequantize(tensors["embed.weight"]))


@pytest.mark.parametrize(("bits", "largest"), [(8, 0.02), (4, 0.4)])
@pytest.mark.parametrize("name", ["qwen3_layer_types", "gemma2_low_caps", "opt"])
def test_quantized_keys_and_values(mlx: Any, name: str, bits: int, largest: float) -> None:
    """RMS errors as a part of the logits' deviation (measured: 0.006 and 0.12); prompts and steps read the same."""
    spec, tensors, ids = case_spec(name), case_tensors(name), case_ids(name)[:70]
    if spec.head_dim % 32:
        spec = dataclasses.replace(spec, head_dim=32, attention_scale=0.0)
        tensors = tiny_tensors(spec)
    ours, judge = make_decoder(spec, tensors, mlx.MlxOps(bits)), make_decoder(spec, tensors)
    right = prefill_logits(judge, ids)
    whole = prefill_logits(ours, ids)
    error = np.sqrt(((whole - right) ** 2).mean()) / right.std()
    assert largest / 50 < error < largest
    # A float32 error tips codes to their neighbours.
    again = decode_logits(ours, ids)
    assert np.sqrt(((again - whole) ** 2).mean()) / right.std() < largest / 2
    assert mlx.furthest(*(mlx.ragged_logits(decoder, ids, (3, 33), 1) for decoder in (ours, judge))) < 9 * largest
    cache = ours.new_cache(1, 128)
    floats = make_decoder(spec, tensors, mlx.MlxOps()).new_cache(1, 128)
    small, large = (sum(array.nbytes for array in c.pages.arrays()) for c in (cache, floats))
    assert small / large == pytest.approx((bits + 2 * 32 / 32) / 32)


def test_the_cache_is_changed_in_place(mlx: Any) -> None:
    """A step must not copy the pages: they are much larger than all else here."""
    import mlx.core as mx

    spec = tiny_spec(context_length=1 << 16)
    decoder = make_decoder(spec, tiny_tensors(spec), mlx.MlxOps())
    cache = decoder.new_cache(4, 1 << 14)
    held = sum(array.nbytes for array in cache.pages.arrays())
    ids = case_ids("llama1")
    for slots in ([0], [0, 1, 2, 3]):
        for _ in range(2):
            decoder.decode([5] * len(slots), cache, slots)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        decoder.decode([5] * len(slots), cache, slots)
        prefill_into(cache, decoder, ids[:20], slot=0)
        assert mx.get_peak_memory() - before < held / 12, slots  # less than a layer's keys


def test_a_prompt_that_is_left_half_way(mlx: Any, monkeypatch: Any) -> None:
    """Another thread may go on with the cache."""
    monkeypatch.setattr("ondevice.decoder.PREFILL_CHUNK", 16)
    spec, ids = case_spec("llama3"), case_ids("llama3")[:70]
    ours, judge = mlx.both(spec, case_tensors("llama3"))
    cache = ours.new_cache(1, 128)
    chunks = ours.prefill(ids[:60].tolist(), cache)
    assert [next(chunks).shape for _ in range(2)] == [(0, 96)] * 2
    chunks.close()
    found: list[Any] = []

    def go_on() -> None:
        try:
            *_, last = ours.prefill(ids[32:60].tolist(), cache)
            found.extend([last, ours.decode([ids[60]], cache, [0])])
        except BaseException as e:
            found.append(e)

    for slot_length in (32, 32):
        cache.truncate(0, slot_length)
        worker = threading.Thread(target=go_on)
        worker.start()
        worker.join()
    right = prefill_logits(judge, ids)
    assert len(found) == 4, found
    for last, step in (found[:2], found[2:]):
        assert mlx.furthest(last[0], right[59]) < EXACT and mlx.furthest(step[0], right[60]) < EXACT


def test_a_step_that_fails_leaves_the_table_usable(mlx: Any) -> None:
    """Also to another thread, which cannot evaluate what this one has left."""
    spec = sparse_spec("cats")
    ours, judge = mlx.both(spec, sparse_tensors(spec))
    ids = case_ids("llama1")[:9]
    cache = ours.new_cache(1, 64)
    cache.reserve(0, 9)

    def fails(step: Any) -> Any:
        ours._hidden(step, cache, 2, 0)
        raise KeyboardInterrupt

    everyone = np.arange(9, dtype=np.int32)
    with pytest.raises(KeyboardInterrupt):
        ours.ops.run(Step(ids, everyone, np.zeros(9, np.int32), everyone), cache, fails)
    found: list[Any] = []

    def go_on() -> None:
        try:
            found.append(prefill_into(cache, ours, ids))
        except BaseException as e:
            found.append(e)

    worker = threading.Thread(target=go_on)
    worker.start()
    worker.join()
    assert mlx.furthest(found[0], prefill_logits(judge, ids)) < EXACT
    tally = ours.ops.counts()["ffn"]
    assert 0 < tally.kept < tally.units


def test_what_is_damaged_in_one_sequence_stays_there(mlx: Any) -> None:
    """0 times NaN is NaN: what a mask hides must not be read from another's pages."""
    import mlx.core as mx

    spec, ids = case_spec("llama3"), case_ids("llama3")
    ours, judge = mlx.both(spec, case_tensors("llama3"))
    caches = [decoder.new_cache(2, 192) for decoder in (ours, judge)]
    for decoder, cache in zip((ours, judge), caches):
        for slot, length in enumerate((130, 3)):
            prefill_into(cache, decoder, ids[:length], slot=slot)
    for parts in (*caches[0].pages.keys, *caches[0].pages.values):
        parts[0][:, mx.array(caches[0].block_table[0])] = mx.nan
    step = Step(*(np.array(x, np.int32) for x in ([5, 5], [130, 3], [0, 1], [1])))
    for cache in caches:
        cache.reserve(0, 1)
        cache.reserve(1, 1)
    assert mlx.furthest(*(d._step(step, cache) for d, cache in zip((ours, judge), caches))) < EXACT


def test_of_equal_scores_the_first(mlx: Any) -> None:
    import mlx.core as mx

    from ondevice.ops.mlx_selection import largest

    scores = np.random.RandomState(0).randint(0, 3, (40, 7)).astype(np.float32)
    for k in (1, 2, 5, 6, 7, 9):
        right = np.zeros(scores.shape, bool)
        np.put_along_axis(right, np.argsort(-scores, axis=1, kind="stable")[:, :k], True, axis=1)
        assert np.array_equal(np.array(largest(mx.array(scores), k)), right)
