"""Skipping work on an NVIDIA GPU by Triton's kernels: selections are lists, and what no list names is not read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cuda_kernels.grouped_experts import grouped_experts
from cuda_kernels.pack import PackedFfn, format_of, pack_ffn
from cuda_kernels.select_threshold import select_threshold
from cuda_kernels.select_topk import select_topk
from cuda_kernels.sparse_ffn_rows import sparse_ffn_rows
from cuda_kernels.sparse_inputs import InputMajor, pack_inputs, sparse_inputs
from cuda_kernels.statistical_topk import statistical_topk
from ondevice.checkpoint.quantization import Tensor
from ondevice.ops import torch_selection
from ondevice.ops.torch_beside import Beside
from ondevice.ops.torch_counts import Unit
from ondevice.ops.torch_lists import Lists, everything, of_mask
from ondevice.ops.torch_skipping import TorchSkipping
from ondevice.ops.torch_weights import floats_of
from ondevice.sparsity.selection import HeadSelection, Selection

ONE_BY_ONE = 8
"""Tokens of a step up to which each reads its own rows: so few hardly meet in the same ones."""
EXPERT = 16
"""Neurons from which on a block is worth a product of its own: a tile of the tensor cores."""


@dataclass(frozen=True, slots=True)
class Ffn:
    """An FFN of which each token may run a part.

    Args:
        packed: its weights.
        all: the list of all units.
        nbytes: of the weights of a neuron.
    """

    packed: PackedFfn
    all: Lists
    nbytes: float


@dataclass(frozen=True, slots=True)
class Inputs:
    """Linears with a common input, of which each token may take a part. nbytes: of the weights of an input."""

    parts: tuple[InputMajor, ...]
    nbytes: float


class CudaSkipping(TorchSkipping):
    """`Selection.mask` is Lists, `HeadSelection.index` a RowList of units of heads."""

    dtype: torch.dtype
    side: Beside | None = None
    """Where a step is recorded that selects beside its attention."""

    def arrived(self) -> None:
        """Makes what follows wait for all selections."""
        if self.side is not None:
            self.side.join()

    @abstractmethod
    def kernel_form(self, tensor: Tensor) -> Any:
        """A tensor in a form that the kernels multiply with."""

    # Weights

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
        device = self.place.device
        forms = [None if w is None else self.kernel_form(w) for w in (gate, up, down)]
        if len({format_of(form) for form in forms if form is not None}) > 1:
            # Kernels take one format for all three.
            forms = [None if w is None else floats_of(w, device, self.dtype) for w in (gate, up, down)]
        biases = [None if b is None else floats_of(b, device, self.dtype) for b in (gate_bias, up_bias, down_bias)]
        packed = pack_ffn(*forms, *biases, block=block, valued=valued, device=device)
        neurons, matrices = packed.shape[1], (packed.gate, packed.up, packed.down)
        parts = (part for m in matrices if m is not None for part in (m.weight, m.scales, m.biases))
        nbytes = sum(part.nbytes for part in parts if part is not None) / neurons
        return Ffn(packed, everything(neurons // block, block, device), nbytes)

    def pack_input_major(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Inputs:
        device = self.place.device
        parts = tuple(
            pack_inputs(self.kernel_form(w), None if b is None else floats_of(b, device, self.dtype), device)
            for w, b in zip(weights, biases)
        )
        tensors = (t for part in parts for t in (part.rows.weight, part.rows.scales, part.rows.biases))
        return Inputs(parts, sum(t.nbytes for t in tensors if t is not None) / parts[0].shape[0])

    # Selections

    def _lists(self, lists: Lists, shared: bool = False) -> Selection:
        return Selection(lists, lists.units * lists.block, shared)

    def select_topk(self, scores: Any, k: int, shared: bool) -> Selection:
        return self._lists(Lists(select_topk(scores, k, shared), scores.shape[1], kept=k), shared)

    def select_threshold(self, scores: Any, threshold: float, relative: bool = False) -> Selection:
        return self._lists(Lists(select_threshold(scores, threshold, relative), scores.shape[1]))

    def select_magnitude(self, x: Any, threshold: float, factors: Any = None) -> Selection:
        return self.select_threshold(torch_selection.sizes(x, factors), threshold)

    def statistical_topk(self, scores: Any, c: float) -> tuple[Any, Selection]:
        values, rows = statistical_topk(scores, c)
        return values.to(scores.dtype), self._lists(Lists(rows, scores.shape[1]))

    def expand(self, selection: Selection, block: int) -> Selection:
        lists: Lists = selection.mask
        return replace(selection, mask=lists.expanded(block), units=selection.units * block)

    def forced(self, selection: Any, density: float) -> Any:
        if isinstance(selection, HeadSelection):
            units = self.head_units(selection.group)
            if selection.kept == round(density * units):
                return selection
            heads = self._random(len(selection.index.count), units, density)
            return self._chosen(HeadSelection(heads.rows, round(density * heads.units), selection.group))
        lists: Lists = selection.mask
        if lists.kept == round(density * lists.units):
            return selection  # top-k keeps as many already, and drawing lists anew takes time that is nobody's
        return replace(selection, mask=self._random(len(lists.rows.count), lists.units, density).expanded(lists.block))

    def random_selection(self, x: Any, units: int, density: float) -> Selection:
        return self._lists(self._random(len(x), units, density))

    def _random(self, rows: int, units: int, density: float) -> Lists:
        kept = round(density * units)
        lists = of_mask(torch_selection.random_mask(rows, units, density, self.place.device))
        return replace(lists, kept=kept)

    def select_heads(self, scores: Any, k: int, group: int) -> HeadSelection:
        return self._chosen(HeadSelection(select_topk(scores, k, False, group), k, group))

    def _chosen(self, heads: HeadSelection) -> HeadSelection:
        if self.side is not None:
            self.side.heads_chosen()
        return heads

    @abstractmethod
    def head_units(self, group: int) -> int:
        """Units of a layer that are chosen among, each of `group` query heads."""

    def mask(self, h: Any, selection: Selection) -> Any:
        self.arrived()
        self.ran_dense("ffn")
        lists: Lists = selection.mask
        values = h if selection.values is None else h * selection.values
        return torch.where(lists.mask(), values, 0).to(h.dtype)

    def _count_lists(self, kind: str, lists: Lists, tokens: int, nbytes: float) -> None:
        shared = len(lists.rows.count) == 1
        # What no token needs is known where they share a list, and then it is left out once for all of them.
        unit = Unit(kind, lists.block, nbytes / tokens if shared else 0.0)
        each = tokens if shared else 1
        kept = lists.rows.count * each if lists.kept is None else lists.kept * tokens
        self.counted.sparse(unit, kept, lists.units * tokens)

    # Products

    def sparse_ffn(self, x: Any, ffn: Ffn, selection: Selection | None, activation: str, residual: Any = None) -> Any:
        self.arrived()
        lists: Lists = ffn.all if selection is None else selection.mask
        values = None if selection is None else selection.values
        if selection is None:
            self.counted.dense("ffn")
        else:
            self._count_lists("ffn", lists, len(x), ffn.nbytes)
        y = self._ffn(x.to(self.dtype), ffn.packed, lists, activation, values)
        return y if residual is None else residual + y

    def _ffn(
        self, x: torch.Tensor, packed: PackedFfn, lists: Lists, activation: str, values: torch.Tensor | None
    ) -> torch.Tensor:
        """The product, by the kernel that suits the number of tokens and their lists."""
        if packed.block != lists.block:
            lists = of_mask(lists.mask().unflatten(1, (-1, packed.block)).any(2), packed.block)
        shared = len(lists.rows.count) == 1
        if shared or len(x) <= ONE_BY_ONE:
            return sparse_ffn_rows(x, packed, lists.rows, activation, values)
        if packed.block >= EXPERT and values is None:
            return grouped_experts(x, packed, lists.rows, activation)
        # Many tokens meet in most rows: those of all, where each token's values are 0 for what it did not choose.
        own = lists.mask().to(x.dtype)
        chosen = own if values is None else torch.where(own > 0, values, 0)
        return sparse_ffn_rows(x, replace(packed, valued=True), lists.union().rows, activation, chosen)

    def sparse_linear(self, x: Any, weight: Inputs, selection: Selection, residual: Any = None) -> Any:
        self.arrived()
        lists: Lists = selection.mask
        self._count_lists("inputs", lists, len(x), weight.nbytes)
        rows = lists.rows
        if len(x) > ONE_BY_ONE and len(rows.count) > 1:
            x, rows = torch.where(lists.mask(), x, 0), lists.union().rows
        parts = [sparse_inputs(x.to(self.dtype), part, rows) for part in weight.parts]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return y if residual is None else residual + y
