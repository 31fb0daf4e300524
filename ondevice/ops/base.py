"""The op table: every operation that the decoder calls, with its shapes. A platform is one table.

N counts tokens of one step, of any number of sequences. Each token carries its sequence's cache slot and its position,
so a prompt (many tokens, one slot), a batch of ragged prompts and a decode step (one token per slot) are the same call,
and no token's arithmetic depends on its neighbours. `Array` is a table's own array type; weights are handles that the
table's `pack_*` made from canonical tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor
from ondevice.ops.base_skipping import SkippingOps
from ondevice.sparsity.selection import HeadSelection

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.generation.kv_cache import KVCache
    from ondevice.spec import ModelSpec

Array = Any
Handle = Any


@dataclass(frozen=True, slots=True)
class Step:
    """What one pass of the decoder works on.

    Args:
        tokens: int32 [N], vocabulary ids.
        positions: int32 [N], position of each token in its sequence.
        slots: int32 [N], cache slot of each token's sequence.
        outputs: int32 [M], which of the N tokens get logits.
    """

    tokens: Array
    positions: Array
    slots: Array
    outputs: Array


Body = Callable[[Step], Array]


class Ops(SkippingOps, ABC):
    """Operations of one platform."""

    rotates: bool = False
    """Whether layers may differ in their pages, so that those whose tokens see a window need not keep the rest."""

    page_axis: int = 1
    """Of the arrays that a storage consists of, the axis along which its pages lie."""

    # Weights

    @abstractmethod
    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Handle:
        """Linears with a common input, joined along their outputs.

        Args:
            weights: each [out_i, in].
            biases: each [out_i] or None.
        """

    @property
    def where(self) -> str | None:
        """The device that runs it, for people; None where the backend's name says enough."""
        return None

    def admit(self, checkpoint: Checkpoint) -> None:
        """Refuses a model that would not fit, before any of it is packed.

        Raises:
            OptionError: naming what to change.
        """

    @abstractmethod
    def pack_embedding(self, table: Tensor) -> Handle:
        """A table [rows, d] to look rows up in."""

    def pack_tied(self, table: Tensor) -> tuple[Handle, Handle]:
        """(embedding, head) of one table [vocab, d] that serves as both."""
        return self.pack_embedding(table), self.pack_linear([table], [None])

    def keeping(
        self, checkpoint: Checkpoint, progress: Callable[[int, int, str], None] | None = None
    ) -> AbstractContextManager[None]:
        """Surrounds the packing of a checkpoint, for tables that keep what they made of it for later processes."""
        return nullcontext()

    def kept(self, name: str, shape: tuple[int, ...], pack: Callable[[], Handle]) -> Handle:
        """What `pack` makes, or the same from an earlier process, for tables that have it.

        Args:
            name: of the weights in their checkpoint.
            shape: [rows, inputs] of all of them joined.
            pack: reads tensors and gives them to one of `pack_linear`, `pack_embedding` and `pack_tied`.
        """
        return pack()

    @abstractmethod
    def pack_norm(self, weight: Tensor, bias: Tensor | None, kind: str, eps: float, offset: float) -> Handle:
        """A norm over d. kind: "rms" or "layer"; `offset` is added to the weight."""

    @abstractmethod
    def pack_rope(self, inverse_frequencies: NDArray[np.float64], attention_factor: float, context: int) -> Handle:
        """Rotation angles [dim/2] for positions below `context`."""

    # Cache

    @abstractmethod
    def new_pages(self, spec: ModelSpec, pages: Sequence[int], page: int) -> Any:
        """Storage for keys and values: for every KV head `pages` of each layer, a page being of `page` positions.

        All layers have the same number unless the table `rotates`.
        """

    # One step

    @abstractmethod
    def prepare(self, spec: ModelSpec, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Does ahead what the first steps of a model would have to wait for, such as compiling."""

    @abstractmethod
    def run(self, step: Step, cache: KVCache, body: Body, name: str = "logits") -> NDArray[np.float32]:
        """Runs `body` on a step given as NumPy arrays.

        The place where a table may record a step of a shape once and replay it: `name` tells bodies apart.

        Returns:
            float32 [rows, width] of the body's result, a copy that later steps leave alone.
        """

    def beside(self, x: Array) -> AbstractContextManager[None]:
        """Surrounds selecting, from x, what is needed later: a table may run it beside all that comes before that."""
        return nullcontext()

    def part(self, name: str) -> None:
        """Names the part of the model that the following operations belong to, for tables that keep a profile."""

    @abstractmethod
    def embed(self, table: Handle, rows: Array, scale: float = 1.0, offset: int = 0) -> Array:
        """Rows `rows + offset` of a table, times scale: [N] -> [N, d]."""

    @abstractmethod
    def norm(self, x: Array, weight: Handle, heads: int = 1) -> Array:
        """Norm over the last d of [N, heads * d]."""

    @abstractmethod
    def linear(self, x: Array, weight: Handle, residual: Array | None = None) -> Array:
        """x W^T + bias (+ residual): [N, in] -> [N, out]."""

    @abstractmethod
    def split(self, x: Array, widths: Sequence[int]) -> list[Array]:
        """Parts of the last axis."""

    @abstractmethod
    def rope(self, x: Array, heads: int, positions: Array, rope: Handle) -> Array:
        """Rotates each of the heads in [N, heads * dh] by its token's position."""

    @abstractmethod
    def append(self, cache: KVCache, layer: int, k: Array, v: Array, step: Step) -> None:
        """Writes keys and values [N, Hkv * dh] of a step to their slots and positions."""

    @abstractmethod
    def attention(
        self,
        q: Array,
        cache: KVCache,
        layer: int,
        step: Step,
        scale: float,
        window: int,
        softcap: float,
        heads: HeadSelection | None = None,
    ) -> Array:
        """Causal attention of each token over the keys of its slot up to its position.

        Args:
            q: [N, H * dh].
            window: keys seen, counting the token's own; 0 for all.
            softcap: c * tanh(score / c) before the softmax; 0 for none.
            heads: that are computed, the others being exactly 0; None for all.

        Returns:
            [N, H * dh].
        """

    @abstractmethod
    def activation(self, x: Array, kind: str, gated: bool) -> Array:
        """act(x) of [N, D]; gated: act(x[:, :D]) * x[:, D:] of [N, 2 D]. kind: an activation of ModelSpec, or "abs"."""

    @abstractmethod
    def add(self, a: Array, b: Array) -> Array:
        """a + b, both [N, d]."""

    @abstractmethod
    def take(self, x: Array, rows: Array) -> Array:
        """Rows [M] of [N, d]."""

    @abstractmethod
    def softcap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap)."""
