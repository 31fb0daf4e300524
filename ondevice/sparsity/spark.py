"""Spark: the gate reads a part of the input and keeps about k neurons; a part of each key keeps about k positions.

Source: Spark Transformer (You et al. 2025). A pretrained kind of model: of the FFN's input, the gate reads the first r
dimensions and `up` the others; of each head, the first r dimensions choose keys and the others weigh them.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar

from ondevice.errors import OptionError
from ondevice.layer import Attend, Early, Ffn, Neurons
from ondevice.ops.base import Array, Handle, Ops, Step
from ondevice.sparsity.method import Method, Shapes
from ondevice.sparsity.selection import HeadSelection

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache
    from ondevice.packing import Packer
    from ondevice.spec import ModelSpec
    from ondevice.spec_fields import Fields


@dataclass(frozen=True, slots=True)
class SparkPart:
    """How the FFN or the attention chooses.

    Args:
        r: first dimensions, of the FFN's input or of a head, which choose.
        k: neurons or keys to keep, about.
    """

    r: int
    k: int


@dataclass(frozen=True, slots=True)
class Spark(Method):
    """Makes `layers.N.gate.weight` [d_ff, r] and `layers.N.up.weight` [d_ff, d_model - r]; adds nothing.

    Args:
        neurons: None for a dense FFN.
        keys: None for full attention. r is half a head, and each half is rotated on its own.
    """

    neurons: SparkPart | None = None
    keys: SparkPart | None = None

    name: ClassVar[str] = "spark"

    def kind(self, spec: ModelSpec) -> str:
        return "trained"

    @property
    def skips(self) -> tuple[str, ...]:
        return (("ffn",) if self.neurons else ()) + (("keys",) if self.keys else ())

    @property
    def rope_parts(self) -> int:
        return 2 if self.keys else 1

    @classmethod
    def of_halves(cls, spec: ModelSpec, neurons: int, keys: int) -> Spark:
        """About so many neurons and keys, chosen by half of the input and half of each head."""
        return cls(SparkPart(spec.d_model // 2, neurons), SparkPart(spec.head_dim // 2, keys))

    @classmethod
    def read(cls, fields: Fields, spec: ModelSpec) -> Spark:
        fields.known("method", "ffn", "attention")
        neurons = _read_neurons(fields, spec) if fields.raw("ffn", None) is not None else None
        keys = _read_keys(fields, spec) if fields.raw("attention", None) is not None else None
        if neurons is None and keys is None:
            raise fields.error("method", "spark needs `ffn` or `attention` beside it; without both the model is dense")
        return cls(neurons, keys)

    def section(self) -> dict[str, Any]:
        parts = (("ffn", self.neurons), ("attention", self.keys))
        return {"method": self.name, **{key: {"r": part.r, "k": part.k} for key, part in parts if part is not None}}

    def change_tensors(self, spec: ModelSpec, layer: int, shapes: Shapes) -> None:
        if self.neurons is not None:
            shapes[f"layers.{layer}.gate.weight"] = (spec.d_ff, self.neurons.r)
            shapes[f"layers.{layer}.up.weight"] = (spec.d_ff, spec.d_model - self.neurons.r)

    def dense(self) -> Method | None:
        raise OptionError("spark is how the model computes, so it has no dense form; leave dense out")

    def ffn(self, pack: Packer, i: int) -> Ffn:
        if self.neurons is None:
            return super(Spark, self).ffn(pack, i)
        p, spec = f"layers.{i}.", pack.spec
        gate = pack.linear(p + "gate")
        neurons = pack.neurons(i, None, p + "up", p + "down", "none", block=1, valued=True)
        widths = (self.neurons.r, spec.d_model - self.neurons.r)
        return _SparkFfn(pack.ops, gate, neurons, widths, quantile(self.neurons.k, spec.d_ff), spec.activation)

    def density(self, spec: ModelSpec, layer: int) -> float | None:
        return None if self.neurons is None else self.neurons.k / spec.d_ff

    def attend(self, pack: Packer, i: int) -> Attend:
        if self.keys is None:
            return super(Spark, self).attend(pack, i)
        spec = pack.spec
        return _SparkAttention(pack.ops, i, spec.attention_scale, spec.windows[i], self.keys)


def quantile(k: int, n: int) -> float:
    """Deviations above the mean where a normal distribution has k of n values left."""
    return NormalDist().inv_cdf(1 - k / n)


@dataclass(frozen=True, slots=True)
class _SparkFfn:
    ops: Ops
    gate: Handle
    neurons: Neurons
    widths: tuple[int, int]
    c: float
    activation: str

    def __call__(self, x: Array, residual: Array | None, early: Early) -> Array:
        ops = self.ops
        ops.part("router")
        first, rest = ops.split(x, self.widths)
        values, selection = ops.statistical_topk(ops.linear(first, self.gate), self.c)
        selection = selection.with_values(ops.activation(values, self.activation, gated=False))
        ops.part("ffn")
        return self.neurons(rest, selection, residual)


@dataclass(frozen=True, slots=True)
class _SparkAttention:
    ops: Ops
    layer: int
    scale: float
    window: int
    keys: SparkPart

    def __call__(self, q: Array, cache: KVCache, step: Step, heads: HeadSelection | None) -> Array:
        return self.ops.topk_attention(q, cache, self.layer, step, self.scale, self.window, self.keys.r, self.keys.k)


def _read_neurons(fields: Fields, spec: ModelSpec) -> SparkPart:
    if not spec.gated:
        raise fields.error("ffn", "spark splits an FFN with a gate, which this model lacks; leave `ffn` out")
    if spec.architecture == "phi3":
        raise fields.unsupported(
            "ffn", "phi3 stores gate and up as one matrix, but spark's have different inputs; take model_type llama"
        )
    ffn = fields.sub("ffn")
    ffn.known("r", "k")
    return SparkPart(ffn.integer("r", high=spec.d_model - 1), ffn.integer("k", high=spec.d_ff - 1))


def _read_keys(fields: Fields, spec: ModelSpec) -> SparkPart:
    attention = fields.sub("attention")
    attention.known("r", "k")
    keys = SparkPart(attention.integer("r", high=spec.head_dim - 1), attention.integer("k"))
    if 2 * keys.r != spec.head_dim:
        raise attention.unsupported("r", f"{keys.r} is not half of a head of {spec.head_dim}; only that is supported")
    if spec.attention_softcap:
        raise attention.unsupported("r", "spark's attention has no softcap, and this model has one; leave it out")
    for rope in (spec.rope, spec.local_rope):
        if rope is not None and (rope.dim != spec.head_dim or rope.dim % 4 or rope.scaling == "longrope"):
            raise attention.unsupported("r", "rotates halves of whole heads, without longrope; this rope differs")
    return keys
