"""Polar sparsity: routers that read the attention's input choose heads for each sequence and neurons for each batch.

Source: Polar Sparsity (Shrestha et al. 2025), section 4. Only decoding skips; prompts are dense. q, k and v, what is
appended to the cache, and the output projection are computed for all heads, so the cache has no holes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ondevice.layer import Early, EarlySelectedFfn, Ffn, PlannedDense, Router
from ondevice.ops.base import Array, Handle, Ops
from ondevice.sparsity.method import Method, Shapes
from ondevice.sparsity.selection import HeadSelection, Selection

if TYPE_CHECKING:
    from ondevice.packing import Packer
    from ondevice.sparsity.plan import Plan
    from ondevice.sparsity.settings import SparsitySettings
    from ondevice.spec import ModelSpec
    from ondevice.spec_fields import Fields

UNITS = ("head", "kv_group")


@dataclass(frozen=True, slots=True)
class PolarNeurons:
    """Neurons that a batch shares; adds `layers.N.ffn_router.0.weight` [rank, d] and `.1.weight` [d_ff, rank].

    Args:
        rank: of the router, a product of two matrices.
        table: (batch size, neurons of each layer), by ascending batch size. A batch takes the entry of the smallest
            size that is not below its own; beyond the last one it runs dense.
    """

    rank: int
    table: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def largest(self) -> int:
        """Largest batch size of the table."""
        return self.table[-1][0]

    def kept(self, layer: int, batch: int) -> int | None:
        """Neurons that a batch runs in a layer; None if it is beyond the table."""
        return next((kept[layer] for size, kept in self.table if size >= batch), None)


@dataclass(frozen=True, slots=True)
class PolarHeads:
    """Heads that each sequence chooses; adds `layers.N.head_router.weight` [n_heads, d] and `.bias` [n_heads].

    Args:
        kept: units that run.
        unit: "head", or "kv_group" for all heads of a KV head, chosen by the largest of their scores.
        dense_layers: that run all heads and have no router.
    """

    kept: int
    unit: str = "head"
    dense_layers: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Polar(Method):
    """Settings of neurons and of heads; at least one of the two."""

    neurons: PolarNeurons | None = None
    heads: PolarHeads | None = None

    name: ClassVar[str] = "polar"
    in_prompts: ClassVar[bool] = False

    def kind(self, spec: ModelSpec) -> str:
        return "approximate"

    @property
    def skips(self) -> tuple[str, ...]:
        return (("ffn",) if self.neurons else ()) + (("heads",) if self.heads else ())

    @classmethod
    def read(cls, fields: Fields, spec: ModelSpec) -> Polar:
        fields.known("method", "ffn", "heads")
        neurons = _read_neurons(fields.sub("ffn"), spec) if fields.raw("ffn", None) is not None else None
        heads = _read_heads(fields.sub("heads"), spec) if fields.raw("heads", None) is not None else None
        if neurons is None and heads is None:
            raise fields.error("method", "polar needs `ffn` or `heads` beside it; without both the model is dense")
        if neurons is not None and spec.activation != "relu":
            raise fields.error(
                "ffn",
                f"polar skips neurons of relu models, whose activations are zero; this one has {spec.activation}. "
                "Leave `ffn` out and keep `heads`, or convert with lte or cats",
            )
        return cls(neurons, heads)

    def section(self) -> dict[str, Any]:
        section: dict[str, Any] = {"method": self.name}
        if self.neurons is not None:
            table = {str(batch): list(kept) for batch, kept in self.neurons.table}
            section["ffn"] = {"rank": self.neurons.rank, "neurons": table}
        if self.heads is not None:
            layers = list(self.heads.dense_layers)
            section["heads"] = {"kept": self.heads.kept, "unit": self.heads.unit, "dense_layers": layers}
        return section

    def change_tensors(self, spec: ModelSpec, layer: int, shapes: Shapes) -> None:
        p = f"layers.{layer}."
        if self.neurons is not None:
            shapes[p + "ffn_router.0.weight"] = (self.neurons.rank, spec.d_model)
            shapes[p + "ffn_router.1.weight"] = (spec.d_ff, self.neurons.rank)
        if self.heads is not None and layer not in self.heads.dense_layers:
            shapes[p + "head_router.weight"] = (spec.n_heads, spec.d_model)
            shapes[p + "head_router.bias"] = (spec.n_heads,)

    def density(self, spec: ModelSpec, layer: int) -> float | None:
        return None if self.neurons is None else self.neurons.table[0][1][layer] / spec.d_ff

    def router(self, pack: Packer, i: int) -> Router:
        p, neurons, heads = f"layers.{i}.", None, None
        if self.neurons is not None and pack.sparse(i):
            matrices = (pack.linear(p + "ffn_router.0"), pack.linear(p + "ffn_router.1"))
            neurons = _NeuronRouter(pack.ops, *matrices, i, pack.spec.d_ff, self.neurons, pack.plan, pack.settings)
        if self.heads is not None and i not in self.heads.dense_layers:
            group = pack.spec.group if self.heads.unit == "kv_group" else 1
            heads = _HeadRouter(pack.ops, pack.linear(p + "head_router"), self.heads.kept, group)
        return _PolarRouter(pack.ops, neurons, heads)

    def ffn(self, pack: Packer, i: int) -> Ffn:
        if self.neurons is None:
            return super(Polar, self).ffn(pack, i)
        if not pack.sparse(i):
            return PlannedDense(pack.ops, "ffn", super(Polar, self).ffn(pack, i))
        p, spec = f"layers.{i}.", pack.spec
        gate = p + "gate" if spec.gated else None
        return EarlySelectedFfn(pack.neurons(i, gate, p + "up", p + "down", spec.activation, block=1))


@dataclass(frozen=True, slots=True)
class _NeuronRouter:
    ops: Ops
    first: Handle
    second: Handle
    layer: int
    d_ff: int
    neurons: PolarNeurons
    plan: Plan
    settings: SparsitySettings

    def __call__(self, x: Array, batch: int) -> Selection | None:
        kept = self.neurons.kept(self.layer, batch)
        if kept is None:
            self.settings.fall_back(
                f"polar: the FFN of a batch of {batch}, where the model's table ends at {self.neurons.largest}"
            )
        if kept is None or kept == self.d_ff or not self.plan.sparse(self.layer, kept / self.d_ff):
            return None
        scores = self.ops.linear(self.ops.linear(x, self.first), self.second)
        return self.ops.select_topk(scores, kept, shared=True)


@dataclass(frozen=True, slots=True)
class _HeadRouter:
    ops: Ops
    weight: Handle
    kept: int
    group: int

    def __call__(self, x: Array) -> HeadSelection:
        return self.ops.select_heads(self.ops.linear(x, self.weight), self.kept, self.group)


@dataclass(frozen=True, slots=True)
class _PolarRouter:
    ops: Ops
    neurons: _NeuronRouter | None
    heads: _HeadRouter | None

    def __call__(self, x: Array, batch: int) -> Early:
        if not batch:
            return Early()
        self.ops.part("router")
        heads = None if self.heads is None else self.heads(x)
        neurons = None if self.neurons is None else self.neurons(x, batch)
        self.ops.part("qkv")
        return Early(heads, neurons)


def _read_neurons(fields: Fields, spec: ModelSpec) -> PolarNeurons:
    fields.known("rank", "neurons")
    table = fields.sub("neurons")
    sizes = sorted(int(key) for key in table.values if re.fullmatch(r"[1-9]\d{0,6}", key))
    if not sizes or len(sizes) < len(table.values):
        raise fields.error("neurons", 'must map batch sizes such as "1" to the neurons that each layer runs')
    kept = [table.integers(str(size), spec.n_layers, low=1, high=spec.d_ff) for size in sizes]
    return PolarNeurons(fields.integer("rank"), tuple(zip(sizes, kept)))


def _read_heads(fields: Fields, spec: ModelSpec) -> PolarHeads:
    fields.known("kept", "unit", "dense_layers")
    unit = fields.text("unit", "head")
    if unit not in UNITS:
        raise fields.error("unit", f"{unit[:60]!r} is neither of {', '.join(UNITS)}; take one of them")
    dense = fields.raw("dense_layers", [0])
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < spec.n_layers for i in dense):
        raise fields.error("dense_layers", f"must list layers from 0 to {spec.n_layers - 1}")
    units = spec.n_heads if unit == "head" else spec.n_kv_heads
    return PolarHeads(fields.integer("kept", high=units), unit, tuple(dense))
