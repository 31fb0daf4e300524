"""FFNs that are computed whole and then masked, for tables whose selections are masks of the device's own arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ondevice.checkpoint.quantization import Tensor
from ondevice.sparsity.selection import Selection


@dataclass(frozen=True, slots=True)
class Ffn:
    """An FFN of which each token may run a part: handles of gate and up joined, and of down."""

    up: Any
    down: Any
    gated: bool
    valued: bool


class MaskedFfn(ABC):
    """The part of `SkippingOps` that is about FFNs."""

    @abstractmethod
    def pack_linear(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Any:
        """As in `Ops`, with a method `product(x, residual)`."""

    @abstractmethod
    def activation(self, x: Any, kind: str, gated: bool) -> Any:
        """As in `Ops`."""

    @abstractmethod
    def ran_dense(self, kind: str) -> None:
        """As in `SkippingOps`."""

    @abstractmethod
    def count_masked(self, kind: str, selection: Selection | None, tokens: int) -> None:
        """Notes a call for so many tokens, which computes everything."""

    @abstractmethod
    def masked(self, h: Any, selection: Selection) -> Any:
        """h [N, units] where units are selected, else 0."""

    @abstractmethod
    def alike(self, h: Any, x: Any) -> Any:
        """h in the type of x."""

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
        first = [(up, up_bias)] if gate is None else [(gate, gate_bias), (up, up_bias)]
        joined = self.pack_linear([w for w, _ in first], [bias for _, bias in first])
        return Ffn(joined, self.pack_linear([down], [down_bias]), gate is not None, valued)

    def sparse_ffn(self, x: Any, ffn: Any, selection: Selection | None, activation: str, residual: Any = None) -> Any:
        h = self.activation(ffn.up.product(x), activation, ffn.gated)
        if ffn.valued:
            assert selection is not None and selection.values is not None
            h = h * selection.values
        self.count_masked("ffn", selection, len(x))
        if selection is not None:
            h = self.masked(h, selection)
        return ffn.down.product(self.alike(h, x), residual)

    def mask(self, h: Any, selection: Selection) -> Any:
        self.ran_dense("ffn")
        values = h if selection.values is None else h * selection.values
        return self.alike(self.masked(values, selection), h)
