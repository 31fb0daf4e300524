"""Skipping work in the MLX table, in MLX's own operations: everything is computed, then masked.

The results are those of skipping, and no time is saved. What saves it is our Metal kernels, which take the same
arguments (`metal_kernels`); MLX has no operation whose work depends on what is in an array.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.ops import mlx_selection
from ondevice.ops.base_skipping import SkippingOps, Tally
from ondevice.ops.masked_ffn import MaskedFfn
from ondevice.ops.mlx_attention import by_segments, chosen_keys_attention
from ondevice.ops.mlx_counts import Counts
from ondevice.ops.mlx_step import MlxStep, Segment
from ondevice.ops.mlx_weights import Joined, to_device
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.ops.base import Step
    from ondevice.ops.mlx_device import MlxDevice


class MlxSkipping(MaskedFfn, SkippingOps, ABC):
    """Masks are bool [N or 1, units], head selections bool [N, units]."""

    device: MlxDevice

    def __init__(self) -> None:
        self.counted = Counts()

    def counts(self) -> dict[str, Tally]:
        return self.counted.read()

    def mask_of(self, selection: Selection) -> Any:
        """bool [N or 1, units] of a selection."""
        return selection.mask

    def count_masked(self, kind: str, selection: Selection | None, tokens: int) -> None:
        if selection is None:
            self.counted.dense(kind)
            return
        mask = self.mask_of(selection)
        each = tokens if len(mask) == 1 else 1
        self.counted.sparse(kind, mask.sum() * each, tokens * selection.units)

    # FFN

    def masked(self, h: Any, selection: Selection) -> Any:
        return mx.where(self.mask_of(selection), h, 0)

    def alike(self, h: Any, x: Any) -> Any:
        return h.astype(x.dtype)

    def ran_dense(self, kind: str) -> None:
        self.counted.dense(kind)

    # Selections

    def select_topk(self, scores: Any, k: int, shared: bool) -> Selection:
        return mlx_selection.select_topk(scores, k, shared)

    def select_threshold(self, scores: Any, threshold: float, relative: bool = False) -> Selection:
        return mlx_selection.select_threshold(scores, threshold, relative)

    def pack_factors(self, values: Tensor) -> Any:
        with mx.stream(self.device.stream):
            factors = to_device(dequantize(values), mx.float32)
            mx.eval(factors)
        return factors

    def select_magnitude(self, x: Any, threshold: float, factors: Any = None) -> Selection:
        return mlx_selection.select_magnitude(x, threshold, factors)

    def statistical_topk(self, scores: Any, c: float) -> tuple[Any, Selection]:
        return mlx_selection.statistical_topk(scores, c)

    def expand(self, selection: Selection, block: int) -> Selection:
        if block == 1:
            return selection
        return replace(selection, mask=mx.repeat(selection.mask, block, axis=1), units=selection.units * block)

    def forced(self, selection: Any, density: float) -> Any:
        if isinstance(selection, HeadSelection):
            mask = mlx_selection.random_mask(selection.index.shape, density, selection.index)
            return replace(selection, index=mask, kept=round(density * mask.shape[1]))
        mask = mlx_selection.random_mask(selection.mask.shape, density, selection.mask)
        return replace(selection, mask=mask)

    def random_selection(self, x: Any, units: int, density: float) -> Selection:
        return Selection(mlx_selection.random_mask((len(x), units), density), units, False)

    # Linears

    def join(self, parts: Sequence[Any]) -> Any:
        return mx.concatenate(list(parts), axis=1)

    def pack_input_major(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Joined:
        return self.pack_linear(weights, biases)

    def sparse_linear(self, x: Any, weight: Joined, selection: Selection, residual: Any = None) -> Any:
        self.count_masked("inputs", selection, len(x))
        return weight.product(mx.where(self.mask_of(selection), x, 0), residual)

    # Attention

    def select_heads(self, scores: Any, k: int, group: int) -> HeadSelection:
        return mlx_selection.select_heads(scores, k, group)

    def only_heads(self, out: Any, heads: HeadSelection | None) -> Any:
        """Attention's result [N, H * dh] with heads that were not selected set to 0."""
        if heads is None:
            self.counted.dense("heads")
            return out
        tokens, units = heads.index.shape
        self.counted.sparse("heads", tokens * heads.kept * heads.group, tokens * units * heads.group)
        return mlx_selection.only_heads(out, heads)

    def topk_attention(
        self, q: Any, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Any:
        assert isinstance(step, MlxStep)
        kept: list[Any] = []
        units = 0

        def attend(queries: Any, segment: Segment) -> Any:
            nonlocal units
            seen = segment.visible(cache, layer, window)
            keys, values = cache.pages.read(layer, seen)
            out, chosen = chosen_keys_attention(queries, keys, values, seen, scale, r, k)
            kept.append(chosen.sum())
            units += int(seen.counts.sum()) * (queries.shape[2] // keys.shape[3])
            return out

        result = by_segments(q, step, attend)
        self.counted.sparse("keys", mx.stack(kept).sum(), units)
        return result
