"""Logits of whole sequences through the decoder, and references that share the CPU table's float16 cache."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor
from ondevice.decoder import Decoder
from ondevice.generation.kv_cache import PAGE, KVCache
from ondevice.ops.base import Ops
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity.settings import SparsitySettings
from ondevice.spec import ModelSpec
from tests.kernels.rounding import rounded

HALF_STEP = 2.0**-11
"""Largest relative error of rounding to float16."""


class HalfCacheOps(ReferenceOps):
    """float64, but for keys and values that go through float16 as in the CPU table's cache."""

    def append(self, cache: Any, layer: int, k: Any, v: Any, step: Any) -> None:
        k, v = (x.astype(np.float16).astype(self.dtype) for x in (k, v))
        super().append(cache, layer, k, v, step)


class GivenCacheOps(ReferenceOps):
    """float64 that attends over given keys and values, those that another table has rounded.

    A float32 error can tip a key to the next float16, which moves logits by a hundred times that error. Sharing the
    other table's cache takes this out of a comparison; `furthest` says how far the cache is from our own values.

    Args:
        keys, values: [layers, positions, kv_heads * head_dim].
        rounds: rounds the inputs of linears as the CPU table does for quantized weights.
    """

    def __init__(self, keys: NDArray[Any], values: NDArray[Any], rounds: bool = False) -> None:
        super().__init__()
        self.given, self.rounds = (keys, values), rounds
        self.furthest = 0.0

    def linear(self, x: Any, weight: Any, residual: Any = None) -> Any:
        return super().linear(rounded(x) if self.rounds else x, weight, residual)

    def append(self, cache: Any, layer: int, k: Any, v: Any, step: Any) -> None:
        given = [stored[layer, step.positions].astype(self.dtype) for stored in self.given]
        for own, stored in zip((k, v), given):
            beyond_rounding = np.abs(own - stored) - HALF_STEP * np.abs(own)
            self.furthest = max(self.furthest, float(beyond_rounding.max()))
        super().append(cache, layer, *given, step)


def cpu_cache(cache: KVCache, spec: ModelSpec, length: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Keys and values of slot 0 in a CPU table's pages, each [layers, length, kv_heads * head_dim]."""
    pages = cache.block_table[0]
    shape = (spec.n_layers, -1, spec.n_kv_heads)
    keys = cache.pages.keys.reshape(*shape, PAGE // 16, cache.pages.keys.shape[-1] // PAGE, 16)
    keys = keys.swapaxes(-1, -2).reshape(*keys.shape[:3], PAGE, -1)
    values = cache.pages.values.reshape(keys.shape)
    both = (x[:, pages, :, :, : spec.head_dim].swapaxes(2, 3) for x in (keys, values))
    k, v = (x.reshape(spec.n_layers, len(pages) * PAGE, -1)[:, :length] for x in both)
    return k, v


def make_decoder(
    spec: ModelSpec, tensors: Mapping[str, Tensor], ops: Ops | None = None, settings: SparsitySettings | None = None
) -> Decoder:
    """A decoder of tensors in memory; on the reference table if no other is given."""
    checkpoint: Any = SimpleNamespace(spec=spec, tensor=tensors.__getitem__, release=lambda _: None)
    return Decoder(checkpoint, ops or ReferenceOps(), settings=settings)


def prefill_logits(decoder: Decoder, ids: Any, pieces: tuple[int, ...] = ()) -> NDArray[np.float32]:
    """Logits of every position, the sequence given as a prompt.

    Args:
        ids: int [N].
        pieces: lengths of prompts to give one after the other; what is left comes last.

    Returns:
        float32 [N, vocab].
    """
    return prefill_into(decoder.new_cache(1, len(ids)), decoder, ids, pieces)


def prefill_into(
    cache: KVCache, decoder: Decoder, ids: Any, pieces: tuple[int, ...] = (), slot: int = 0
) -> NDArray[np.float32]:
    """As `prefill_logits`, into a slot of a given cache."""
    parts = np.split(np.asarray(ids), np.cumsum(pieces))
    return np.concatenate([x for part in parts for x in decoder.prefill(part, cache, slot, all_logits=True)])


def decode_logits(decoder: Decoder, ids: Any) -> NDArray[np.float32]:
    """Logits of every position, the sequence given token by token: float32 [N, vocab]."""
    cache = decoder.new_cache(1, len(ids))
    return np.concatenate([decoder.decode([token], cache, [0]) for token in ids])
