"""The table of backend cuda: torch for dense work in floats, Triton's kernels for what is skipped and for groups.

Quantized weights of 4 and 8 bits stay in their groups and are turned into floats inside kernels; others become floats.
A step of decoding is recorded once for each batch size as a CUDA graph, and replayed: selections are lists of fixed
length with their counts on the device, so nothing in it waits for the host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cuda_kernels.cache import KvView
from cuda_kernels.lists import RowList, mask_of_lists
from cuda_kernels.pack import Matrix as Packed
from cuda_kernels.pack import has_kernel, row_matrix
from cuda_kernels.quantized_linear import float_rows, quantized_linear
from cuda_kernels.selective_attention import selective_attention
from cuda_kernels.topk_attention import topk_attention
from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.ops import torch_selection
from ondevice.ops.base import Body, Step
from ondevice.ops.torch import TorchOps
from ondevice.ops.torch_beside import Beside
from ondevice.ops.torch_counts import Unit
from ondevice.ops.torch_cuda_skipping import CudaSkipping
from ondevice.ops.torch_device import find_cuda
from ondevice.ops.torch_graphs import Graphs
from ondevice.ops.torch_pages import Pages
from ondevice.ops.torch_step import TorchStep
from ondevice.ops.torch_weights import Matrix, floats_of
from ondevice.sparsity.selection import HeadSelection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

_LOG = logging.getLogger("ondevice")


@dataclass(frozen=True, slots=True)
class GroupMatrix:
    """A matrix [out, in] in its affine groups."""

    packed: Packed
    bits: int
    group: int
    wide: torch.dtype

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return quantized_linear(x, self.packed, self.bits, self.group, bias)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return float_rows(self.packed, self.bits, self.group, index).to(self.wide)

    @property
    def nbytes(self) -> int:
        parts = (self.packed.weight, self.packed.scales, self.packed.biases)
        return sum(part.nbytes for part in parts if part is not None)


class CudaOps(CudaSkipping, TorchOps):
    """One model's operations on an NVIDIA GPU, or on a CPU where Triton's kernels are interpreted."""

    name = "cuda"

    def __init__(self) -> None:
        super().__init__(find_cuda())
        self._graphs = Graphs(self.place.device) if self.place.graphs else None
        self._second = Beside(self.place.device) if self.place.graphs else None
        self._as_floats: list[Quantized] = []

    # Weights

    def kernel_form(self, tensor: Tensor) -> Any:
        """A tensor as kernels pack it: groups that they know as they are, anything else as floats of the table's type.

        Floats go to the device at once: torch converts them there.
        """
        if isinstance(tensor, Quantized):
            if has_kernel(tensor):
                return tensor
            self._as_floats.append(tensor)
        return floats_of(tensor, self.place.device, self.dtype)

    def _matrix(self, tensor: Tensor) -> Matrix:
        form = self.kernel_form(tensor)
        if isinstance(form, Quantized):
            packed, bits, group = row_matrix(form, self.place.device)
            return GroupMatrix(packed, bits, group, self.wide)
        return super()._matrix(tensor)

    def prepare(self, spec: ModelSpec, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Says what had to be made floats. Kernels are compiled at the first step, and kept by Triton."""
        if self._as_floats:
            more = sum(w.shape[0] * w.shape[1] * self.dtype.itemsize - w.nbytes for w in self._as_floats)
            formats = sorted({f"{w.bits} bits in groups of {w.group_size}" for w in self._as_floats})
            _LOG.warning(
                "Triton's kernels take 4 and 8 bits in groups of 32 to 128, not %s: %d matrices run as floats, which "
                "takes %.2f GB more; `ondevice convert --bits 8` makes a model without them",
                *(" and ".join(formats), len(self._as_floats), more / 1e9),
            )
            self._as_floats.clear()

    # One step

    def run(self, step: Step, cache: KVCache, body: Body, name: str = "logits") -> NDArray[np.float32]:
        if self._graphs is not None and self._graphs.takes(step):
            self.side = self._second
            try:
                with torch.no_grad():
                    return self._graphs.run(step, cache, lambda s: self._whole(body, s), name, self.counted)
            finally:
                if self.side is not None:
                    self.side.forget()
                self.side = None
        return super().run(step, cache, body, name)

    def _whole(self, body: Body, step: Step) -> Any:
        result = body(step)
        self.arrived()
        return result

    def beside(self, x: Any) -> AbstractContextManager[None]:
        return nullcontext() if self.side is None else self.side.selecting(x)

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
        assert isinstance(step, TorchStep)
        if not step.single:
            return self.only_heads(self._full_attention(q, cache, layer, step, scale, window, softcap), heads)
        view = _view(cache, layer, step)
        queries = q.view(len(q), -1, view.keys.shape[3]).to(view.keys.dtype)
        units = queries.shape[1]
        rows = None
        if heads is None:
            self.counted.dense("heads")
        else:
            self.counted.sparse(Unit("heads", heads.group), len(q) * heads.kept, len(q) * (units // heads.group))
            rows = heads.index
            if self.side is not None:
                self.side.need_heads()
        unit = "head" if heads is None or heads.group == 1 else "kv_group"
        return selective_attention(queries, view, rows, scale, unit, window, softcap).flatten(1)

    def only_heads(self, out: Any, heads: HeadSelection | None) -> Any:
        if heads is None:
            return super().only_heads(out, None)
        self.arrived()
        rows: RowList = heads.index
        units = self.head_units(heads.group)
        self.counted.sparse(Unit("heads", heads.group), len(out) * heads.kept, len(out) * units)
        return torch_selection.only_heads(out, mask_of_lists(rows, units))

    def head_units(self, group: int) -> int:
        return self._n_heads // group

    _n_heads: int

    def new_pages(self, spec: ModelSpec, pages: Sequence[int], page: int) -> Pages:
        self._n_heads = spec.n_heads
        return super().new_pages(spec, pages, page)

    def topk_attention(
        self, q: Any, cache: KVCache, layer: int, step: Step, scale: float, window: int, r: int, k: int
    ) -> Any:
        assert isinstance(step, TorchStep)
        if not step.single:
            return super().topk_attention(q, cache, layer, step, scale, window, r, k)
        # The kernel does not say how many keys it keeps.
        self.counted.sparse(Unit("keys"), 0, 0)
        view = _view(cache, layer, step)
        queries = q.view(len(q), -1, view.keys.shape[3]).to(view.keys.dtype)
        return topk_attention(queries, view, scale, r, k, window).flatten(1)


def _view(cache: KVCache, layer: int, step: TorchStep) -> KvView:
    pages: Pages = cache.pages
    return KvView(pages.keys[layer], pages.values[layer], step.lengths, step.table)
