"""The torch table against the reference, through whole models: prompts, steps, ragged batches, and gradients."""

# ruff: noqa: E402
# What needs torch is imported after it is known to be there.

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra `triton` or `judges`)")

from ondevice.checkpoint.quantization import quantize
from ondevice.ops.base import Step
from ondevice.ops.reference import ReferenceOps
from ondevice.ops.torch import TorchOps
from ondevice.ops.torch_device import TorchDevice
from tests.models.cases import CASES, case_ids, case_spec, case_tensors
from tests.models.running import decode_logits, make_decoder, prefill_into, prefill_logits
from tests.models.sparse_cases import METHODS, sparse_spec, sparse_tensors
from tests.models.sparse_running import LENGTHS, batch_logits
from tests.tiny import ARCHITECTURES, tiny_spec, tiny_tensors

EXACT = 1e-4
"""Largest difference of logits whose standard deviation is 1 to 8, in float32."""
EXACT_PLACE = TorchDevice(torch.device("cpu"), "CPU", torch.float64, False)


def both(spec: Any, tensors: Any) -> tuple[Any, Any]:
    return make_decoder(spec, tensors, TorchOps()), make_decoder(spec, tensors)


def furthest(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("name", CASES)
def test_prompts_and_steps(name: str) -> None:
    ours, judge = both(case_spec(name), case_tensors(name))
    ids = case_ids(name)[:70]
    right = prefill_logits(judge, ids)
    assert furthest(prefill_logits(ours, ids), right) < EXACT
    assert furthest(prefill_logits(ours, ids, (1, 30)), right) < EXACT
    cache = ours.new_cache(1, len(ids))
    prefill_into(cache, ours, ids[:60])
    steps = np.concatenate([ours.decode([token], cache, [0]) for token in ids[60:]])
    assert furthest(steps, right[60:]) < EXACT


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_batches(architecture: str) -> None:
    spec = tiny_spec(architecture)
    ours, judge = both(spec, tiny_tensors(spec))
    for lengths in (LENGTHS, (9,)):
        assert furthest(batch_logits(ours, lengths), batch_logits(judge, lengths)) < EXACT


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_skip(name: str) -> None:
    """Batches of 5 and of 1, and what is counted of them."""
    spec = sparse_spec(name)
    ours, judge = both(spec, sparse_tensors(spec))
    for lengths in (LENGTHS, (9,)):
        assert furthest(batch_logits(ours, lengths), batch_logits(judge, lengths)) < EXACT
    assert furthest(decode_logits(ours, case_ids("llama1")[:12]), decode_logits(judge, case_ids("llama1")[:12])) < EXACT
    counts, right = ours.ops.counts(), judge.ops.counts()
    for kind in spec.sparsity.skips:
        mine, others = counts[kind], right[kind]
        assert (mine.calls, mine.sparse, mine.units) == (others.calls, others.sparse, others.units)
        # A score at a border may fall on either side of it.
        assert abs(mine.kept - others.kept) <= 0.002 * mine.units
        assert mine.bytes_skipped == 0  # all of it is computed


def test_several_prompts_in_one_step() -> None:
    spec = tiny_spec("mistral")
    logits = []
    for ops in (TorchOps(), ReferenceOps()):
        decoder = make_decoder(spec, tiny_tensors(spec), ops)
        cache = decoder.new_cache(3, 64)
        tokens = []
        for slot, length in enumerate((3, 1, 40)):
            cache.reserve(slot, length)
            tokens += [(position, slot, 7 * slot + position) for position in range(length)]
        positions, slots, words = (np.array(column, np.int32) for column in zip(*sorted(tokens)))
        logits.append(decoder._step(Step(words, positions, slots, np.arange(len(tokens), dtype=np.int32)), cache))
    assert furthest(*logits) < EXACT


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (5, 32), (6, 64), (8, 32)])
def test_quantized_weights(bits: int, group: int) -> None:
    spec = tiny_spec("qwen2", d_ff=128)
    tensors = {k: quantize(w, bits, group) if w.ndim == 2 else w for k, w in tiny_tensors(spec).items()}
    ours, judge = both(spec, tensors)
    ids = case_ids("llama1")[:40]
    assert furthest(prefill_logits(ours, ids), prefill_logits(judge, ids)) < EXACT


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt"])
def test_gradients_equal_finite_differences(architecture: str) -> None:
    spec = tiny_spec(architecture, n_layers=2, windows=())
    tensors = {name: w.astype(np.float64) for name, w in tiny_tensors(spec).items()}
    ops = TorchOps(EXACT_PLACE, trainable=True)
    decoder = make_decoder(spec, tensors, ops)
    n = 9
    index = np.arange(n, dtype=np.int32)
    step = Step(np.array([3, 14, 15, 92, 6, 53, 58, 9, 7], np.int32), index, np.zeros_like(index), index)
    weights = torch.from_numpy(np.random.RandomState(0).standard_normal((n, spec.vocab_size)))

    def loss() -> Any:
        cache = decoder.new_cache(1, n)
        cache.reserve(0, n)
        logits = ops.evaluate(step, cache, lambda s: decoder._forward(s, cache, 0, 0))
        return (torch.log_softmax(logits, 1) * weights).sum()

    loss().backward()
    assert len(ops.parameters) >= 2 + 5 * spec.n_layers
    random, checked = np.random.RandomState(1), 0
    for parameter in ops.parameters:
        assert parameter.grad is not None
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        # Entries that matter: many rows of an embedding are of words that do not occur.
        for i in random.choice(np.flatnonzero(gradient.numpy()), 3):
            ends = []
            for way in (1, -1):
                flat[i] += way * 1e-5
                with torch.no_grad():
                    ends.append(float(loss()))
                flat[i] -= way * 1e-5
            expected = (ends[0] - ends[1]) / 2e-5
            assert abs(float(gradient[i]) - expected) < 1e-6 * max(1.0, abs(expected))
            checked += 1
    assert checked == 3 * len(ops.parameters)


def test_a_second_step_does_not_differentiate_the_first_again() -> None:
    spec = tiny_spec("llama")
    ops = TorchOps(trainable=True)
    decoder = make_decoder(spec, tiny_tensors(spec), ops)
    cache = decoder.new_cache(1, 8)
    for position in range(3):
        cache.reserve(0, 1)
        step = Step(*(np.array([x], np.int32) for x in (5, position, 0, 0)))
        ops.evaluate(step, cache, lambda s: decoder._forward(s, cache, 0, 0)).sum().backward()
        cache.lengths[0] += 1
