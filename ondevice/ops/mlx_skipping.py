"""Skipping work in the MLX table, in MLX's own operations: everything is computed, then masked.

The results are those of skipping, and no time is saved. What saves it is our Metal kernels, which take the same
arguments (`metal_kernels`); MLX has no operation whose work depends on what is in an array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.ops import mlx_selection
from ondevice.ops.base_skipping import SkippingOps, Tally
from ondevice.ops.mlx_attention import by_segments, chosen_keys_attention
from ondevice.ops.mlx_counts import Counts
from ondevice.ops.mlx_step import MlxStep, Segment
from ondevice.ops.mlx_weights import Joined, to_device
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.ops.base import Step
    from ondevice.ops.mlx_device import MlxDevice


@dataclass(frozen=True, slots=True)
class Ffn:
    """An FFN of which each token may run a part: gate and up joined, and down."""

    up: Joined
    down: Joined
    gated: bool
    valued: bool


class MlxSkipping(SkippingOps, ABC):
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
        """Notes a call for so many tokens, which computes everything."""
        if selection is None:
            self.counted.dense(kind)
            return
        mask = self.mask_of(selection)
        each = tokens if len(mask) == 1 else 1
        self.counted.sparse(kind, mask.sum() * each, tokens * selection.units)

    # FFN

    def pack_ffn(
        self,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        block: int,
        valued: bool,
    ) -> Ffn:
        first = [(up, up_bias)] if gate is None else [(gate, gate_bias), (up, up_bias)]
        joined = self.pack_linear([w for w, _ in first], [bias for _, bias in first])
        return Ffn(joined, self.pack_linear([down], [down_bias]), gate is not None, valued)

    @abstractmethod
    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Joined:
        """As in `Ops`: what FFNs are packed by here."""

    @abstractmethod
    def activation(self, x: Any, kind: str, gated: bool) -> Any:
        """As in `Ops`."""

    def sparse_ffn(self, x: Any, ffn: Ffn, selection: Selection | None, activation: str, residual: Any = None) -> Any:
        h = self.activation(ffn.up.product(x), activation, ffn.gated)
        if ffn.valued:
            assert selection is not None and selection.values is not None
            h = h * selection.values
        self.count_masked("ffn", selection, len(x))
        if selection is not None:
            h = mx.where(self.mask_of(selection), h, 0)
        return ffn.down.product(h.astype(x.dtype), residual)

    def mask(self, h: Any, selection: Selection) -> Any:
        self.ran_dense("ffn")
        values = h if selection.values is None else h * selection.values
        return mx.where(self.mask_of(selection), values, 0).astype(h.dtype)

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
