"""The MLX table with our Metal kernels: what a token does not need is not read. For Apple's GPUs.

Kernels run steps of decoding. Prompts compute everything and mask, as without kernels: with hundreds of tokens most
neurons are somebody's, and MLX's own products are made for them. The borders between the two are estimates: nobody has
timed this on a Mac.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels import pack
from metal_kernels.cache import KvView
from metal_kernels.grouped_experts import grouped_experts
from metal_kernels.lists import RowList, lists_of_mask, mask_of_lists
from metal_kernels.select_threshold import select_threshold
from metal_kernels.select_topk import select_topk
from metal_kernels.selective_attention import selective_attention
from metal_kernels.sparse_ffn_rows import sparse_ffn_rows
from metal_kernels.statistical_topk import statistical_topk
from metal_kernels.topk_attention import topk_attention
from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.ops import mlx_selection
from ondevice.ops.masked_ffn import Ffn
from ondevice.ops.mlx import MlxOps
from ondevice.ops.mlx_ffn import whole_down, whole_hidden
from ondevice.ops.mlx_step import MlxStep
from ondevice.ops.mlx_units import Units
from ondevice.ops.mlx_weights import to_device
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.ops.base import Step

_LOG = logging.getLogger("ondevice")
FEW = 8
"""Tokens up to which each has its own list: a kernel reads a neuron once for each that lists it."""
TOGETHER = 32
"""Tokens up to which one list for all is run, since a neuron is read again for each four of them."""
GROUPED = 64
"""Tokens up to which experts run, each with its tokens."""
LEAST_EXPERT = 8
"""Neurons of an expert from which on that is worth lists of tokens."""


class MetalOps(MlxOps):
    """Selections hold Units in the place of masks; selections of heads hold lists."""

    def __init__(self, kv_bits: int = 0) -> None:
        super().__init__(kv_bits)
        self._everything: dict[int, RowList] = {}
        self._said = False
        self._units = 0

    # Selections

    def mask_of(self, selection: Selection) -> Any:
        return selection.mask.mask()

    def _wrapped(self, selection: Selection) -> Selection:
        return replace(selection, mask=Units(selection.units, mask=selection.mask))

    def select_topk(self, scores: Any, k: int, shared: bool) -> Selection:
        if not shared and len(scores) > FEW:
            return self._wrapped(super().select_topk(scores, k, shared))
        units = scores.shape[1]
        return Selection(Units(units, select_topk(scores, k, shared)), units, shared)

    def select_threshold(self, scores: Any, threshold: float, relative: bool = False) -> Selection:
        if len(scores) > FEW:
            return self._wrapped(super().select_threshold(scores, threshold, relative))
        units = scores.shape[1]
        return Selection(Units(units, select_threshold(scores, threshold, relative)), units, False)

    def select_magnitude(self, x: Any, threshold: float, factors: Any = None) -> Selection:
        # A list is made where one is wanted: inputs of a linear are masked.
        return self._wrapped(super().select_magnitude(x, threshold, factors))

    def statistical_topk(self, scores: Any, c: float) -> tuple[Any, Selection]:
        if len(scores) > FEW:
            values, selection = super().statistical_topk(scores, c)
            return values, self._wrapped(selection)
        units = scores.shape[1]
        values, rows = statistical_topk(scores, c)
        return values.astype(scores.dtype), Selection(Units(units, rows), units, False)

    def expand(self, selection: Selection, block: int) -> Selection:
        return replace(selection, mask=selection.mask.expanded(block), units=selection.units * block)

    def forced(self, selection: Any, density: float) -> Any:
        if isinstance(selection, HeadSelection):
            mask = mask_of_lists(selection.index, self._units)
            forced = super().forced(replace(selection, index=mask), density)
            return replace(forced, index=lists_of_mask(forced.index))
        made: Units = selection.mask
        mask = mlx_selection.random_mask(made.block_mask.shape, density, made.block_mask)
        return replace(selection, mask=Units(made.blocks, mask=mask, block=made.block))

    def random_selection(self, x: Any, units: int, density: float) -> Selection:
        return self._wrapped(super().random_selection(x, units, density))

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
    ) -> Any:
        tensors = (gate, up, down, gate_bias, up_bias, down_bias)
        with mx.stream(self.device.stream):
            try:
                packed = pack.pack_ffn(*map(self._own_floats, tensors), block, valued)
            except ValueError as e:
                if not self._said:
                    _LOG.warning("the FFN is computed whole and masked, for no Metal kernel takes its weights: %s", e)
                    self._said = True
                return super().pack_ffn(*tensors, block, valued)
            matrices = [m for m in (packed.gate, packed.up, packed.down) if m is not None]
            arrays = [a for m in matrices for a in (m.weight, m.scales, m.biases)]
            mx.eval([a for a in (*arrays, packed.gate_bias, packed.up_bias, packed.down_bias) if a is not None])
        return packed

    def _own_floats(self, tensor: Tensor | None) -> Any:
        """Floats in the table's type; codes and their scales as they are."""
        if tensor is None or isinstance(tensor, Quantized):
            return tensor
        return to_device(tensor, self.device.dtype)

    def sparse_ffn(self, x: Any, ffn: Any, selection: Selection | None, activation: str, residual: Any = None) -> Any:
        if isinstance(ffn, Ffn):
            return super().sparse_ffn(x, ffn, selection, activation, residual)
        y = self._ffn(x, ffn, selection, activation)
        # Kernels give x's type, and the hidden state has more digits.
        return y if residual is None else y + residual

    def _ffn(self, x: Any, ffn: pack.PackedFfn, selection: Selection | None, activation: str) -> Any:
        values = None if selection is None else selection.values
        alike = selection is None or len(selection.mask) == 1
        if len(x) <= (TOGETHER if alike else FEW):
            rows = self._all(ffn) if selection is None else selection.mask.lists(ffn.block)
            self._count_ffn(ffn, selection, len(x))
            return sparse_ffn_rows(x, ffn, rows, activation, values)
        if selection is not None and not ffn.valued and ffn.block >= LEAST_EXPERT and len(x) <= GROUPED:
            self._count_ffn(ffn, selection, len(x))
            return grouped_experts(x, ffn, selection.mask.lists(ffn.block), activation)
        self.count_masked("ffn", selection, len(x))
        h = whole_hidden(x, ffn, activation, values)
        return whole_down(h if selection is None else mx.where(self.mask_of(selection), h, 0), ffn)

    def _all(self, ffn: pack.PackedFfn) -> RowList:
        """The list of all blocks."""
        blocks = ffn.shape[1] // ffn.block
        if blocks not in self._everything:
            rows = RowList(mx.arange(blocks, dtype=mx.int32)[None], mx.array([blocks], mx.int32))
            mx.eval(*rows)
            self._everything[blocks] = rows
        return self._everything[blocks]

    def _count_ffn(self, ffn: pack.PackedFfn, selection: Selection | None, tokens: int) -> None:
        """Notes a call that reads the neurons which any of its tokens runs."""
        if selection is None:
            self.counted.dense("ffn")
            return
        mask, block = selection.mask.block_mask, selection.mask.block
        each = tokens if len(mask) == 1 else 1
        idle = (mask.shape[1] - mask.any(axis=0).sum()) * block
        matrices = [m for m in (ffn.gate, ffn.up, ffn.down) if m is not None]
        nbytes = sum(a.nbytes for m in matrices for a in (m.weight, m.scales, m.biases) if a is not None)
        kept = mask.sum() * (each * block)
        self.counted.sparse("ffn", kept, tokens * selection.units, idle.astype(mx.int64) * (nbytes // ffn.shape[1]))

    # Attention

    def select_heads(self, scores: Any, k: int, group: int) -> HeadSelection:
        self._units = scores.shape[1] // group
        return HeadSelection(select_topk(scores, k, False, group), k, group)

    def attention(
        self,
        q: Any,
        cache: KVCache,
        layer: int,
        step: Step,
        scale: float,
        window: int,
        softcap: float,
        heads: HeadSelection | None = None,
    ) -> Any:
        assert isinstance(step, MlxStep)
        segment = step.segments[0]
        beside = heads is None and not softcap and segment.visible(cache, layer, window).start is not None
        if not step.decoding or cache.pages.bits or beside:
            # Prompts; quantized pages, which kernels do not read; and one sequence whose pages lie side by side, which
            # MLX's own kernel reads where they are.
            if heads is not None:
                heads = replace(heads, index=mask_of_lists(heads.index, self._units))
            return super().attention(q, cache, layer, step, scale, window, softcap, heads)
        view = self._view(cache, layer, step)
        queries = q.reshape(len(q), -1, view.keys.shape[3])
        if heads is None:
            self.counted.dense("heads")
            return selective_attention(queries, view, None, scale, "head", window, softcap).reshape(q.shape)
        unit = "kv_group" if heads.group > 1 else "head"
        self._count_heads(heads, view, step, window)
        return selective_attention(queries, view, heads.index, scale, unit, window, softcap).reshape(q.shape)

    def _view(self, cache: KVCache, layer: int, step: MlxStep) -> KvView:
        """What a step of decoding may see: pages where they lie, none beyond the longest sequence."""
        keys, values = (store.transpose(1, 2, 0, 3) for store in cache.pages.layer(layer))
        return KvView(keys, values, *step.segments[0].paged(cache, layer))

    def _count_heads(self, heads: HeadSelection, view: KvView, step: MlxStep, window: int) -> None:
        """Notes heads that run, and keys and values of KV heads that no head of a token reads."""
        tokens, kv_heads = len(step.positions), view.keys.shape[2]
        run = mask_of_lists(heads.index, self._units).reshape(tokens, kv_heads, -1).any(axis=2)
        each = 2 * view.keys.shape[3] * view.keys.dtype.size * _seen(step, window)
        idle = (kv_heads - run.sum(axis=1)).astype(mx.int64) * mx.array(each)
        units = tokens * heads.group
        self.counted.sparse("heads", units * heads.kept, units * self._units, idle.sum())

    def topk_attention(
        self, q: Any, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Any:
        assert isinstance(step, MlxStep)
        if not step.decoding or cache.pages.bits:
            return super().topk_attention(q, cache, layer, step, scale, window, r, k)
        view, seen = self._view(cache, layer, step), _seen(step, window)
        queries = q.reshape(len(q), -1, view.keys.shape[3])
        # The kernel does not say how many it kept: about k, which its border is made for.
        kept = int(np.minimum(seen, k).sum())
        self.counted.sparse("keys", kept * queries.shape[1], int(seen.sum()) * queries.shape[1])
        return topk_attention(queries, view, scale, r, k, window).reshape(q.shape)


def _seen(step: MlxStep, window: int) -> NDArray[np.int64]:
    """Keys that each token sees."""
    number = step.positions.host.astype(np.int64) + 1
    return np.minimum(number, window) if window else number
