"""Skipping work in torch's own operations: everything is computed, then masked.

The results are those of skipping, and no time is saved. What saves it is Triton's kernels (`torch_cuda`).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ondevice.checkpoint.quantization import Tensor
from ondevice.ops import torch_selection
from ondevice.ops.base_skipping import SkippingOps, Tally
from ondevice.ops.masked_ffn import MaskedFfn
from ondevice.ops.torch_attention import by_segments, chosen_keys_attention
from ondevice.ops.torch_counts import Counts, Unit
from ondevice.ops.torch_pages import Pages
from ondevice.ops.torch_step import Segment, TorchStep
from ondevice.ops.torch_weights import floats_of
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.ops.base import Step
    from ondevice.ops.torch_device import TorchDevice


class TorchSkipping(MaskedFfn, SkippingOps, ABC):
    """Masks are bool [N or 1, units], head selections bool [N, units]."""

    place: TorchDevice
    wide: torch.dtype

    def __init__(self) -> None:
        self.counted = Counts()

    def counts(self) -> dict[str, Tally]:
        return self.counted.read()

    def count_masked(self, kind: str, selection: Selection | None, tokens: int) -> None:
        if selection is None:
            self.counted.dense(kind)
            return
        each = tokens if len(selection.mask) == 1 else 1
        self.counted.sparse(Unit(kind), selection.mask.sum() * each, tokens * selection.units)

    # FFN

    def masked(self, h: Any, selection: Selection) -> Any:
        return torch.where(selection.mask, h, 0)

    def alike(self, h: Any, x: Any) -> Any:
        return h.to(x.dtype)

    def ran_dense(self, kind: str) -> None:
        self.counted.dense(kind)

    # Selections

    def select_topk(self, scores: Any, k: int, shared: bool) -> Selection:
        return torch_selection.select_topk(scores, k, shared)

    def select_threshold(self, scores: Any, threshold: float, relative: bool = False) -> Selection:
        return torch_selection.select_threshold(scores, threshold, relative)

    def pack_factors(self, values: Tensor) -> torch.Tensor:
        return floats_of(values, self.place.device, self.wide)

    def select_magnitude(self, x: Any, threshold: float, factors: Any = None) -> Selection:
        return Selection(torch_selection.sizes(x, factors) > threshold, x.shape[1], False)

    def statistical_topk(self, scores: Any, c: float) -> tuple[Any, Selection]:
        return torch_selection.statistical_topk(scores, c)

    def expand(self, selection: Selection, block: int) -> Selection:
        mask = selection.mask.repeat_interleave(block, 1)
        return replace(selection, mask=mask, units=selection.units * block)

    def forced(self, selection: Any, density: float) -> Any:
        if isinstance(selection, HeadSelection):
            tokens, units = selection.index.shape
            index = torch_selection.random_mask(tokens, units, density, self.place.device)
            return replace(selection, index=index, kept=round(density * units))
        mask = torch_selection.random_mask(len(selection.mask), selection.units, density, self.place.device)
        return replace(selection, mask=mask)

    def random_selection(self, x: Any, units: int, density: float) -> Selection:
        return Selection(torch_selection.random_mask(len(x), units, density, self.place.device), units, False)

    # Linears

    def join(self, parts: Sequence[Any]) -> Any:
        return torch.cat(list(parts), 1)

    def pack_input_major(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Any:
        return self.pack_linear(weights, biases)

    def sparse_linear(self, x: Any, weight: Any, selection: Selection, residual: Any = None) -> Any:
        self.count_masked("inputs", selection, len(x))
        return weight.product(torch.where(selection.mask, x, 0), residual)

    # Attention

    def select_heads(self, scores: Any, k: int, group: int) -> HeadSelection:
        return torch_selection.select_heads(scores, k, group)

    def only_heads(self, out: Any, heads: HeadSelection | None) -> Any:
        """Attention's result [N, H * dh] with heads that were not selected set to 0."""
        if heads is None:
            self.counted.dense("heads")
            return out
        self.counted.sparse(Unit("heads", heads.group), len(out) * heads.kept, heads.index.numel())
        return torch_selection.only_heads(out, heads.index)

    def topk_attention(
        self, q: Any, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Any:
        assert isinstance(step, TorchStep)
        pages: Pages = cache.pages
        kept: list[torch.Tensor] = []
        units = 0

        def attend(queries: torch.Tensor, segment: Segment) -> torch.Tensor:
            nonlocal units
            seen = segment.visible(cache, window)
            keys, values = pages.read(layer, seen)
            out, chosen = chosen_keys_attention(queries, keys, values, seen, scale, r, k)
            kept.append(chosen.sum())
            units += int(seen.counts.sum()) * (queries.shape[2] // keys.shape[3])
            return out

        result = by_segments(q, step, attend)
        self.counted.sparse(Unit("keys"), torch.stack(kept).sum(), units)
        return result
