"""What the tests of the MLX table share. Imports MLX: only after a test has made sure that it is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.decoder import Decoder
from ondevice.ops.base import Step
from ondevice.ops.mlx import MlxOps
from ondevice.spec import ModelSpec
from tests.models.running import make_decoder, prefill_into


def both(spec: ModelSpec, tensors: Mapping[str, Any]) -> tuple[Decoder, Decoder]:
    """The same model on MLX and on the reference."""
    return make_decoder(spec, tensors, MlxOps()), make_decoder(spec, tensors)


def furthest(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.abs(a - b).max())


def ragged_logits(decoder: Decoder, ids: NDArray[Any], lengths: tuple[int, ...], steps: int) -> NDArray[np.float32]:
    """Logits [steps, sequences, vocab] of sequences decoded together, whose pages lie between those of the others."""
    cache, slots = decoder.new_cache(len(lengths), 128), list(range(len(lengths)))
    for slot in reversed(slots):
        prefill_into(cache, decoder, ids[slot : slot + lengths[slot]], slot=slot)
    return np.stack([decoder.decode(ids[i] + np.zeros(len(slots), int), cache, slots) for i in range(steps)])


def mixed_logits(decoder: Decoder, ids: NDArray[Any], lengths: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits of all tokens of one step that holds several prompts, their tokens in turn."""
    cache = decoder.new_cache(len(lengths), 128)
    tokens = []
    for slot, length in enumerate(lengths):
        cache.reserve(slot, length)
        tokens += [(position, slot, int(ids[slot + position])) for position in range(length)]
    positions, slots, words = (np.array(column, np.int32) for column in zip(*sorted(tokens)))
    step = Step(words, positions, slots, np.arange(len(tokens), dtype=np.int32))
    return decoder._step(step, cache)


def dense_spec(spec: ModelSpec) -> ModelSpec:
    return dataclasses.replace(spec, sparsity=None)
