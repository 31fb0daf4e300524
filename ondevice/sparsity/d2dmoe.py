"""D2DMoE: a router predicts how much each expert would give, and experts near the largest prediction run.

Source: D2DMoE (Szatkowski et al. 2024), section 3. An expert is a group of neurons; its output is added unweighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ondevice.errors import OptionError
from ondevice.layer import Linear, Qkv, SelectedFfn
from ondevice.ops.base import Array, Handle, Ops
from ondevice.sparsity.lte import BLOCK, read_block
from ondevice.sparsity.method import Method, Shapes
from ondevice.sparsity.selection import Selection
from ondevice.spec_hub_common import HUB_ACTIVATIONS, read_activation

if TYPE_CHECKING:
    from ondevice.packing import Packer
    from ondevice.spec import ModelSpec
    from ondevice.spec_fields import Fields

WIDTH = 128
TAU = 0.1


@dataclass(frozen=True, slots=True)
class ExpertProjections:
    """q, k, v and o as small FFNs of experts; each has `.up`, `.down`, `.router.0` and `.router.1` for its weight.

    Args:
        neurons: of each, in all its experts.
        block: neurons of an expert.
        width: of its router's hidden layer.
        activation: between up and down.
    """

    neurons: int
    block: int
    width: int = WIDTH
    activation: str = "relu"


@dataclass(frozen=True, slots=True)
class D2dmoe(Method):
    """Adds `layers.N.ffn_router.0.weight` [width, d_model] and `.1.weight` [experts, width].

    Args:
        block: neurons of an expert, which lie side by side.
        width: of the router's hidden layer.
        tau: experts run whose prediction is at least tau times the token's largest: 0 runs all, 1 the largest only.
        attention: None leaves the projections of the attention as they are.
    """

    block: int = BLOCK
    width: int = WIDTH
    tau: float = TAU
    attention: ExpertProjections | None = None

    name: ClassVar[str] = "d2dmoe"

    def kind(self, spec: ModelSpec) -> str:
        return "trained"

    @property
    def skips(self) -> tuple[str, ...]:
        return ("ffn",)

    @classmethod
    def read(cls, fields: Fields, spec: ModelSpec) -> D2dmoe:
        fields.known("method", "block", "router_width", "tau", "attention")
        attention = _read_attention(fields.sub("attention")) if fields.raw("attention", None) is not None else None
        width, tau = fields.integer("router_width", WIDTH), fields.number("tau", TAU, high=1.0)
        return cls(read_block(fields, spec.d_ff, BLOCK), width, tau, attention)

    def section(self) -> dict[str, Any]:
        section = {"method": self.name, "block": self.block, "router_width": self.width, "tau": self.tau}
        if self.attention is None:
            return section
        own, activation = self.attention, HUB_ACTIVATIONS[self.attention.activation]
        settings = {"neurons": own.neurons, "block": own.block, "router_width": own.width, "activation": activation}
        return {**section, "attention": settings}

    def with_tau(self, tau: float) -> Method:
        if not 0 <= tau <= 1:
            raise OptionError(f"tau is {tau}; it must lie between 0, which runs all, and 1, which runs one expert")
        return replace(self, tau=tau, densities=None)

    def dense(self) -> Method | None:
        return None if self.attention is None else replace(self, tau=0.0, densities=None)

    def change_tensors(self, spec: ModelSpec, layer: int, shapes: Shapes) -> None:
        p = f"layers.{layer}."
        shapes[p + "ffn_router.0.weight"] = (self.width, spec.d_model)
        shapes[p + "ffn_router.1.weight"] = (spec.d_ff // self.block, self.width)
        if self.attention is None:
            return
        own = self.attention
        for name in "qkvo":
            out, inputs = shapes.pop(f"{p}{name}.weight")
            biased = shapes.pop(f"{p}{name}.bias", None) is not None
            for part, shape in (("up", (own.neurons, inputs)), ("down", (out, own.neurons))):
                shapes[f"{p}{name}.{part}.weight"] = shape
                if biased:
                    shapes[f"{p}{name}.{part}.bias"] = shape[:1]
            shapes[f"{p}{name}.router.0.weight"] = (own.width, inputs)
            shapes[f"{p}{name}.router.1.weight"] = (own.neurons // own.block, own.width)

    def qkv(self, pack: Packer, i: int) -> Qkv:
        if self.attention is None:
            return super(D2dmoe, self).qkv(pack, i)
        return _ExpertQkv(tuple(self._projection(pack, i, name, "qkv", self.attention) for name in "qkv"))

    def o(self, pack: Packer, i: int) -> Linear:
        if self.attention is None:
            return super(D2dmoe, self).o(pack, i)
        return self._projection(pack, i, "o", "o", self.attention)

    def ffn(self, pack: Packer, i: int) -> SelectedFfn:
        p, spec = f"layers.{i}.", pack.spec
        selector = self._selector(pack, p + "ffn_router", self.block)
        gate = p + "gate" if spec.gated else None
        return SelectedFfn(pack.ops, selector, pack.neurons(i, gate, p + "up", p + "down", spec.activation, self.block))

    def _projection(self, pack: Packer, i: int, name: str, part: str, own: ExpertProjections) -> SelectedFfn:
        p = f"layers.{i}.{name}."
        selector = self._selector(pack, p + "router", own.block)
        neurons = pack.neurons(i, None, p + "up", p + "down", own.activation, own.block)
        return SelectedFfn(pack.ops, selector, neurons, part)

    def _selector(self, pack: Packer, name: str, block: int) -> _NormSelector:
        return _NormSelector(pack.ops, pack.linear(f"{name}.0"), pack.linear(f"{name}.1"), self.tau, block)


@dataclass(frozen=True, slots=True)
class _NormSelector:
    """Predicts the norm of each expert's output."""

    ops: Ops
    first: Handle
    second: Handle
    tau: float
    block: int

    def __call__(self, x: Array) -> Selection:
        ops = self.ops
        hidden = ops.activation(ops.linear(x, self.first), "relu", gated=False)
        norms = ops.activation(ops.linear(hidden, self.second), "abs", gated=False)
        return ops.expand(ops.select_threshold(norms, self.tau, relative=True), self.block)


@dataclass(frozen=True, slots=True)
class _ExpertQkv:
    projections: tuple[SelectedFfn, ...]

    def __call__(self, x: Array) -> Sequence[Array]:
        return [projection(x) for projection in self.projections]


def _read_attention(fields: Fields) -> ExpertProjections:
    fields.known("neurons", "block", "router_width", "activation")
    neurons = fields.integer("neurons")
    activation = read_activation(fields, "activation", "relu")
    return ExpertProjections(neurons, read_block(fields, neurons), fields.integer("router_width", WIDTH), activation)
