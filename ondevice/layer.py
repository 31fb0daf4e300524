"""What a layer of the decoder is made of, and the forms of its parts that any model has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ondevice.ops.base import Array, Handle, Ops, Step
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class Early:
    """What a layer selects before its attention.

    Args:
        heads: of the attention; None for all.
        neurons: of the FFN; None for all.
    """

    heads: HeadSelection | None = None
    neurons: Selection | None = None


class Router(Protocol):
    """Selects early, from the normed input [N, d] of the attention.

    batch: sequences of a decode step; 0 if the step is a prompt's.
    """

    def __call__(self, x: Array, batch: int) -> Early: ...


class Linear(Protocol):
    """A product with a matrix, or what stands for one: [N, in] -> [N, out], plus a residual [N, out]."""

    def __call__(self, x: Array, residual: Array | None = None) -> Array: ...


class Qkv(Protocol):
    """Queries, keys and values of the normed input [N, d]."""

    def __call__(self, x: Array) -> Sequence[Array]: ...


class Attend(Protocol):
    """Attention of the queries [N, H * dh] over the cache, which has the step's own keys and values."""

    def __call__(self, q: Array, cache: KVCache, step: Step, heads: HeadSelection | None) -> Array: ...


class Ffn(Protocol):
    """The FFN on its normed input [N, d]; `early` is what was selected before the attention."""

    def __call__(self, x: Array, residual: Array | None, early: Early) -> Array: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: handles of its norms, and its parts."""

    attn_norm: Handle
    router: Router
    qkv: Qkv
    q_norm: Handle | None
    k_norm: Handle | None
    attend: Attend
    o: Linear
    post_attn_norm: Handle | None
    ffn_norm: Handle
    ffn: Ffn
    post_ffn_norm: Handle | None


def no_router(x: Array, batch: int) -> Early:
    """Selects nothing early."""
    return Early()


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A matrix, or several with a common input."""

    ops: Ops
    weight: Handle

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        return self.ops.linear(x, self.weight, residual)


@dataclass(frozen=True, slots=True)
class JoinedQkv:
    """q, k and v as one linear of these output widths."""

    ops: Ops
    linear: Linear
    widths: tuple[int, ...]

    def __call__(self, x: Array) -> Sequence[Array]:
        return self.ops.split(self.linear(x), self.widths)


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Attention over all keys that a layer's window shows."""

    ops: Ops
    layer: int
    scale: float
    window: int
    softcap: float

    def __call__(self, q: Array, cache: KVCache, step: Step, heads: HeadSelection | None) -> Array:
        return self.ops.attention(q, cache, self.layer, step, self.scale, self.window, self.softcap, heads)


@dataclass(frozen=True, slots=True)
class PlainFfn:
    """down(act(up(x))), where up may be the gate and up joined."""

    ops: Ops
    up: Linear
    down: Linear
    activation: str
    gated: bool

    def __call__(self, x: Array, residual: Array | None, early: Early) -> Array:
        return self.down(self.ops.activation(self.up(x), self.activation, self.gated), residual)


class Selector(Protocol):
    """Selects neurons from the normed input [N, d] of what has them."""

    def __call__(self, x: Array) -> Selection: ...


class Neurons(Protocol):
    """What a selection of neurons makes of x [N, in], plus a residual [N, out]; None selects all."""

    def __call__(self, x: Array, selection: Selection | None, residual: Array | None) -> Array: ...


@dataclass(frozen=True, slots=True)
class SkippingNeurons:
    """Computes those that are selected. weights: of `Ops.pack_ffn`."""

    ops: Ops
    weights: Handle
    activation: str

    def __call__(self, x: Array, selection: Selection | None, residual: Array | None) -> Array:
        return self.ops.sparse_ffn(x, self.weights, selection, self.activation, residual)


@dataclass(frozen=True, slots=True)
class MaskedNeurons:
    """Computes all, and takes those that are not selected as 0: the same result, by dense products.

    Args:
        up: may be the gate and up joined.
        activation: "none" for none.
    """

    ops: Ops
    up: Linear
    down: Linear
    activation: str
    gated: bool

    def __call__(self, x: Array, selection: Selection | None, residual: Array | None) -> Array:
        h = self.up(x)
        if self.activation != "none":
            h = self.ops.activation(h, self.activation, self.gated)
        return self.down(h if selection is None else self.ops.mask(h, selection), residual)


@dataclass(frozen=True, slots=True)
class SelectedFfn:
    """An FFN, or a linear made of neurons, that runs what its selector says.

    Args:
        part: of the model that the FFN belongs to; its selector is the part "router".
    """

    ops: Ops
    selector: Selector
    neurons: Neurons
    part: str = "ffn"

    def __call__(self, x: Array, residual: Array | None = None, early: Any = None) -> Array:
        self.ops.part("router")
        selection = self.selector(x)
        self.ops.part(self.part)
        return self.neurons(x, selection, residual)


@dataclass(frozen=True, slots=True)
class EarlySelectedFfn:
    """An FFN that runs what was selected before the attention."""

    neurons: Neurons

    def __call__(self, x: Array, residual: Array | None, early: Early) -> Array:
        return self.neurons(x, early.neurons, residual)


@dataclass(frozen=True, slots=True)
class PlannedDense:
    """A linear or an FFN that runs dense by plan, though the model's method could skip. kind: as of `Ops.counts`."""

    ops: Ops
    kind: str
    part: Callable[..., Array]

    def __call__(self, x: Array, residual: Array | None = None, early: Any = None) -> Array:
        self.ops.ran_dense(self.kind)
        return self.part(x, residual) if early is None else self.part(x, residual, early)
