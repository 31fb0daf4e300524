"""The torch table: the decoder on torch tensors, on any of torch's devices, differentiable in its dense form.

The hidden state between layers is float32 (or the table's own type where that is wider); normed inputs, weights, keys
and values have the table's type. Quantized weights become floats here; `torch_cuda` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.errors import BackendError
from ondevice.ops.base import Body, Ops, Step
from ondevice.ops.torch_activation import activate
from ondevice.ops.torch_attention import by_segments, full_attention
from ondevice.ops.torch_device import TorchDevice, find_torch
from ondevice.ops.torch_pages import Pages
from ondevice.ops.torch_skipping import TorchSkipping
from ondevice.ops.torch_step import Segment, TorchStep
from ondevice.ops.torch_weights import FloatMatrix, Joined, Matrix, floats_of, pack_joined
from ondevice.sparsity.selection import HeadSelection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm over d: weight and bias in the wide type."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    kind: str
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Rope:
    """Cosines and sines [positions, dim / 2], made in float64: float32 angles have no digits left at late positions."""

    cos: torch.Tensor
    sin: torch.Tensor


class TorchOps(TorchSkipping, Ops):
    """One model's operations on a device of torch.

    Args:
        place: where and in which type; by default what `find_torch` finds.
        trainable: whether float weights ask for gradients.

    Attributes:
        parameters: of a trainable table, in the order of packing.
    """

    name = "torch"
    page_axis = 0

    def __init__(self, place: TorchDevice | None = None, trainable: bool = False) -> None:
        super().__init__()
        self.place = place or find_torch()
        self.dtype: torch.dtype = self.place.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self.trainable = trainable
        self.parameters: list[torch.Tensor] = []

    @property
    def where(self) -> str:
        return self.place.name

    # Weights

    def _float(self, tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
        made = floats_of(tensor, self.place.device, dtype)
        if self.trainable and not isinstance(tensor, Quantized):
            self.parameters.append(made.requires_grad_())
        return made

    def _matrix(self, tensor: Tensor) -> Matrix:
        return FloatMatrix(self._float(tensor, self.dtype))

    def _vector(self, tensor: Tensor) -> torch.Tensor:
        return self._float(tensor, self.dtype)

    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Joined:
        return pack_joined(weights, biases, self._matrix, self._vector)

    def pack_embedding(self, table: Tensor) -> Matrix:
        return self._matrix(table)

    def pack_tied(self, table: Tensor) -> tuple[Matrix, Joined]:
        matrix = self._matrix(table)
        return matrix, Joined((matrix,), (None,))

    def pack_norm(self, weight: Tensor, bias: Tensor | None, kind: str, eps: float, offset: float) -> Norm:
        # The offset is added to the weight as it is packed, so a trained weight is saved without it.
        scale = np.asarray(weight, np.float64) + offset if isinstance(weight, np.ndarray) else weight
        return Norm(self._float(scale, self.wide), None if bias is None else self._float(bias, self.wide), kind, eps)

    def pack_rope(self, inverse_frequencies: NDArray[np.float64], attention_factor: float, context: int) -> Rope:
        angle = np.arange(context)[:, None] * inverse_frequencies
        both = (torch.from_numpy(f(angle) * attention_factor) for f in (np.cos, np.sin))
        return Rope(*(values.to(device=self.place.device, dtype=self.wide) for values in both))

    # Cache

    def new_pages(self, spec: ModelSpec, pages: Sequence[int], page: int) -> Pages:
        shape = (max(pages), page, spec.n_kv_heads, spec.head_dim)
        try:
            return Pages.empty(spec.n_layers, shape, self.dtype, self.place.device)
        except torch.OutOfMemoryError as e:
            size = 2 * spec.n_layers * int(np.prod(shape)) * self.dtype.itemsize
            raise BackendError(
                f"a cache of {shape[0] * page} tokens takes {size / 1e9:.2f} GB, which the {self.where} does not have "
                "left: ask for a smaller context, or for fewer sequences at once"
            ) from e

    # One step

    def prepare(self, spec: ModelSpec, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Nothing to compile ahead."""

    def run(self, step: Step, cache: KVCache, body: Body, name: str = "logits") -> NDArray[np.float32]:
        with torch.no_grad():
            result: torch.Tensor = self.evaluate(step, cache, body)
        return result.float().cpu().numpy()

    def evaluate(self, step: Step, cache: KVCache, body: Body) -> torch.Tensor:
        """As `run`, with the result on the device, and differentiable where gradients are on."""
        pages: Pages = cache.pages
        pages.forget_gradients()
        try:
            result: torch.Tensor = body(TorchStep.of(step, cache, self.place.device))
        except BaseException:
            self.counted.drop_step()
            raise
        self.counted.replay(self.counted.end_step())
        return result

    def embed(self, table: Matrix, rows: Any, scale: float = 1.0, offset: int = 0) -> Any:
        values = table.rows(rows + offset if offset else rows).to(self.wide)
        return values if scale == 1.0 else values * scale

    def norm(self, x: Any, weight: Norm, heads: int = 1) -> Any:
        y = x.view(len(x), heads, x.shape[1] // heads).to(self.wide)
        if weight.kind == "rms":
            y = functional.rms_norm(y, y.shape[-1:], weight.weight, weight.eps)
            y = y if weight.bias is None else y + weight.bias
        else:
            y = functional.layer_norm(y, y.shape[-1:], weight.weight, weight.bias, weight.eps)
        return y.view(x.shape).to(self.dtype)

    def linear(self, x: Any, weight: Joined, residual: Any = None) -> Any:
        return weight.product(x, residual)

    def split(self, x: Any, widths: Sequence[int]) -> list[Any]:
        return [part.contiguous() for part in torch.split(x, list(widths), 1)]

    def rope(self, x: Any, heads: int, positions: Any, rope: Rope) -> Any:
        cos, sin = rope.cos[positions][:, None], rope.sin[positions][:, None]
        half = cos.shape[2]
        y = x.view(len(x), heads, x.shape[1] // heads)
        a, b, rest = torch.split(y, [half, half, y.shape[2] - 2 * half], 2)
        turned = (a * cos - b * sin, a * sin + b * cos)
        return torch.cat([*(part.to(x.dtype) for part in turned), rest], 2).view(x.shape)

    def append(self, cache: KVCache, layer: int, k: Any, v: Any, step: Step) -> None:
        assert isinstance(step, TorchStep)
        cache.pages.append(layer, k, v, step)

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
        return self.only_heads(self._full_attention(q, cache, layer, step, scale, window, softcap), heads)

    def _full_attention(
        self, q: Any, cache: KVCache, layer: int, step: Step, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        assert isinstance(step, TorchStep)
        pages: Pages = cache.pages

        def attend(queries: torch.Tensor, segment: Segment) -> torch.Tensor:
            seen = segment.visible(cache, window)
            keys, values = pages.read(layer, seen)
            return full_attention(queries, keys, values, seen, scale, softcap)

        return by_segments(q, step, attend)

    def activation(self, x: Any, kind: str, gated: bool) -> Any:
        if not gated:
            return activate(x, kind)
        half = x.shape[1] // 2
        return activate(x[:, :half], kind) * x[:, half:]

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def take(self, x: Any, rows: Any) -> Any:
        return x[rows]

    def softcap(self, x: Any, cap: float) -> Any:
        return cap * torch.tanh(x / cap)
