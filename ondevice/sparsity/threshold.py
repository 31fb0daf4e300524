"""Magnitudes under a threshold count as zero: TEAL of the inputs of linears, CATS of one factor of each neuron.

Source: TEAL (Liu et al. 2024), section 4; CATS (Lee et al. 2024), section 3. Thresholds come from calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from ondevice.layer import DenseLinear, Early, Ffn, Linear, Neurons, PlannedDense
from ondevice.ops.base import Array, Handle, Ops
from ondevice.sparsity.method import Method, Shapes

if TYPE_CHECKING:
    from ondevice.packing import Packer
    from ondevice.spec import ModelSpec
    from ondevice.spec_fields import Fields

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
FACTORS = ("gate", "up")


@dataclass(frozen=True, slots=True)
class Teal(Method):
    """Adds no tensors.

    Args:
        thresholds: (linear, threshold on the magnitude of its inputs in each layer); linears that are not named are
            dense. Of "down" alone, all of them 0 skip the zeros of relu exactly.
    """

    thresholds: tuple[tuple[str, tuple[float, ...]], ...]

    name: ClassVar[str] = "teal"

    def kind(self, spec: ModelSpec) -> str:
        zeros = spec.activation == "relu" and all(
            name == "down" and not any(values) for name, values in self.thresholds
        )
        return "exact" if zeros else "approximate"

    @property
    def skips(self) -> tuple[str, ...]:
        return ("inputs",)

    @classmethod
    def read(cls, fields: Fields, spec: ModelSpec) -> Teal:
        fields.known("method", "thresholds")
        linears = [name for name in LINEARS if spec.gated or name != "gate"]
        stated = fields.sub("thresholds")
        stated.known(*linears)
        if not stated.values:
            raise fields.error("thresholds", f"must give some of {', '.join(linears)} a threshold for each layer")
        names = [name for name in linears if name in stated.values]
        return cls(tuple((name, stated.numbers(name, spec.n_layers, zero=True)) for name in names))

    def section(self) -> dict[str, Any]:
        return {"method": self.name, "thresholds": {name: list(values) for name, values in self.thresholds}}

    def linear(self, pack: Packer, i: int, *names: str) -> Linear:
        by_name = {name: values[i] for name, values in self.thresholds}
        if not pack.sparse(i) and not by_name.keys().isdisjoint(names):
            return PlannedDense(pack.ops, "inputs", super(Teal, self).linear(pack, i, *names))
        parts: list[Linear] = []
        # Neighbours with one threshold are one product.
        for threshold, members in groupby(names, by_name.get):
            full = [f"layers.{i}.{name}" for name in members]
            if threshold is None:
                parts.append(DenseLinear(pack.ops, pack.linear(*full)))
            else:
                parts.append(_ThresholdLinear(pack.ops, pack.input_major(*full), threshold))
        return parts[0] if len(parts) == 1 else _JoinedLinear(pack.ops, tuple(parts))


@dataclass(frozen=True, slots=True)
class _ThresholdLinear:
    ops: Ops
    weight: Handle
    threshold: float

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        return self.ops.sparse_linear(x, self.weight, self.ops.select_magnitude(x, self.threshold), residual)


@dataclass(frozen=True, slots=True)
class _JoinedLinear:
    ops: Ops
    parts: tuple[Linear, ...]

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        y = self.ops.join([part(x) for part in self.parts])
        return y if residual is None else self.ops.add(y, residual)


@dataclass(frozen=True, slots=True)
class Cats(Method):
    """One factor of the neurons is computed for all of them; the other one and down only for those that it leaves.

    Args:
        thresholds: of each layer, on the first factor's magnitude; all of them 0 skip the zeros of relu exactly.
        first: of each layer, "gate" or "up"; magnitudes are then weighed by what a neuron makes of them on average,
            `layers.N.ffn_router.weight` [d_ff]: the root mean square of the other factor, times the length of the
            neuron's column of down. None, as published, is the gate everywhere and no weighing.
    """

    thresholds: tuple[float, ...]
    first: tuple[str, ...] | None = None

    name: ClassVar[str] = "cats"

    def kind(self, spec: ModelSpec) -> str:
        zeros = spec.activation == "relu" and self.first is None and not any(self.thresholds)
        return "exact" if zeros else "approximate"

    @property
    def skips(self) -> tuple[str, ...]:
        return ("ffn",)

    @classmethod
    def read(cls, fields: Fields, spec: ModelSpec) -> Cats:
        fields.known("method", "thresholds", "first")
        if not spec.gated:
            raise fields.error("method", "cats needs an FFN with a gate, which this model lacks; take teal or lte")
        first = fields.raw("first", None)
        if first is not None and (
            not isinstance(first, list) or len(first) != spec.n_layers or not all(name in FACTORS for name in first)
        ):
            raise fields.error("first", f"must say {' or '.join(FACTORS)} for each of the {spec.n_layers} layers")
        thresholds = fields.numbers("thresholds", spec.n_layers, zero=True)
        return cls(thresholds, None if first is None else tuple(first))

    def section(self) -> dict[str, Any]:
        stated = {} if self.first is None else {"first": list(self.first)}
        return {"method": self.name, "thresholds": list(self.thresholds), **stated}

    def change_tensors(self, spec: ModelSpec, layer: int, shapes: Shapes) -> None:
        if self.first is not None:
            shapes[f"layers.{layer}.ffn_router.weight"] = (spec.d_ff,)

    def ffn(self, pack: Packer, i: int) -> Ffn:
        if self.kind(pack.spec) == "approximate" and not pack.sparse(i):
            return PlannedDense(pack.ops, "ffn", super(Cats, self).ffn(pack, i))
        p, names, activations, factors = f"layers.{i}.", FACTORS, (pack.spec.activation, "none"), None
        if self.first is not None:
            factors = pack.ops.pack_factors(pack.get(p + "ffn_router.weight"))
            if self.first[i] == "up":
                names, activations = names[::-1], activations[::-1]
        first = pack.linear(p + names[0])
        neurons = pack.neurons(i, None, p + names[1], p + "down", activations[1], block=1, valued=True)
        return _CatsFfn(pack.ops, first, activations[0], factors, self.thresholds[i], neurons)


@dataclass(frozen=True, slots=True)
class _CatsFfn:
    ops: Ops
    first: Handle
    activation: str
    factors: Handle | None
    threshold: float
    neurons: Neurons

    def __call__(self, x: Array, residual: Array | None, early: Early) -> Array:
        ops = self.ops
        ops.part("router")
        values = ops.linear(x, self.first)
        if self.activation != "none":
            values = ops.activation(values, self.activation, gated=False)
        selection = ops.select_magnitude(values, self.threshold, self.factors).with_values(values)
        ops.part("ffn")
        return self.neurons(x, selection, residual)
