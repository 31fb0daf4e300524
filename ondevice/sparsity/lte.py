"""LTE: a linear router scores groups of neurons, and those with sigmoid(score) above a threshold run.

Source: Learn To be Efficient (Zheng et al. 2024), section 3. The scores only select: they do not weigh. The published
router has no bias. One that is fitted to a finished model needs it: its input is normed and has no constant part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ondevice.layer import SelectedFfn
from ondevice.ops.base import Array, Handle, Ops
from ondevice.sparsity.method import Method, Shapes
from ondevice.sparsity.selection import Selection

if TYPE_CHECKING:
    from ondevice.packing import Packer
    from ondevice.spec import ModelSpec
    from ondevice.spec_fields import Fields

BLOCK = 32


@dataclass(frozen=True, slots=True)
class Lte(Method):
    """Adds `layers.N.ffn_router.weight` [groups, d_model], and `.bias` [groups] where there is one.

    Args:
        block: neurons of a group, which lie side by side.
        threshold: on the sigmoid of a group's score.
        bias: whether the router has one.
    """

    block: int = BLOCK
    threshold: float = 0.5
    bias: bool = False

    name: ClassVar[str] = "lte"

    def kind(self, spec: ModelSpec) -> str:
        return "trained"

    @property
    def skips(self) -> tuple[str, ...]:
        return ("ffn",)

    @classmethod
    def read(cls, fields: Fields, spec: ModelSpec) -> Lte:
        fields.known("method", "block", "threshold", "bias")
        threshold = fields.number("threshold", 0.5, high=1.0)
        if not 0 < threshold < 1:
            raise fields.error("threshold", f"{threshold} is no sigmoid; it must lie between 0 and 1, as 0.5 does")
        return cls(read_block(fields, spec.d_ff, BLOCK), threshold, fields.flag("bias", False))

    def section(self) -> dict[str, Any]:
        stated = {"bias": True} if self.bias else {}
        return {"method": self.name, "block": self.block, "threshold": self.threshold, **stated}

    def change_tensors(self, spec: ModelSpec, layer: int, shapes: Shapes) -> None:
        groups = spec.d_ff // self.block
        shapes[f"layers.{layer}.ffn_router.weight"] = (groups, spec.d_model)
        if self.bias:
            shapes[f"layers.{layer}.ffn_router.bias"] = (groups,)

    def ffn(self, pack: Packer, i: int) -> SelectedFfn:
        p, spec = f"layers.{i}.", pack.spec
        border = math.log(self.threshold / (1 - self.threshold))
        selector = _LteSelector(pack.ops, pack.linear(p + "ffn_router"), border, self.block)
        gate = p + "gate" if spec.gated else None
        return SelectedFfn(pack.ops, selector, pack.neurons(i, gate, p + "up", p + "down", spec.activation, self.block))


@dataclass(frozen=True, slots=True)
class _LteSelector:
    ops: Ops
    router: Handle
    border: float
    block: int

    def __call__(self, x: Array) -> Selection:
        groups = self.ops.select_threshold(self.ops.linear(x, self.router), self.border)
        return self.ops.expand(groups, self.block)


def read_block(fields: Fields, neurons: int, default: int | None = None) -> int:
    """Neurons of a group, which must divide a layer's neurons."""
    block = fields.integer("block", default, high=neurons) if default else fields.integer("block", high=neurons)
    if neurons % block:
        raise fields.error(
            "block", f"groups of {block} do not divide {neurons} neurons; convert with a divisor of {neurons}"
        )
    return block
