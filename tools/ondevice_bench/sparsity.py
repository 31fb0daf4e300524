"""`--sparsity METHOD:key=value,...`: a known shape made sparse with random routers, at densities that are forced.

The method's own selector runs and is measured; then a fresh random list of the wanted length takes its result's place
(on a GPU, unless it has that length already), at every token and in every layer. `lists` has no selector at all: what
the kernels alone could give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ondevice.commands.method_option import MethodOption, read_method
from ondevice.layer import Early, EarlySelectedFfn, Ffn, PlannedDense, Router, SelectedFfn
from ondevice.sparsity.d2dmoe import D2dmoe
from ondevice.sparsity.lte import Lte
from ondevice.sparsity.method import Method
from ondevice.sparsity.polar import Polar, PolarHeads, PolarNeurons
from ondevice.sparsity.selection import Selection
from ondevice.sparsity.spark import Spark

if TYPE_CHECKING:
    from ondevice.decoder import Decoder
    from ondevice.ops.base import Array, Ops
    from ondevice.packing import Packer
    from ondevice.spec import ModelSpec

PUBLISHED = "published"
PUBLISHED_ROWS = {1: 0.095, 2: 0.153, 4: 0.206, 8: 0.29, 16: 0.398, 32: 0.517, 64: 0.623, 128: 0.707, 256: 0.772}
"""Mean part of OPT-6.7B's neurons that batches run, by their size. Source: Polar Sparsity, the calibration results that
were published with its code."""
KEYS: dict[str, dict[str, str]] = {
    "lists": {"rows": "0.5", "block": "32"},
    "lte": {"rows": "0.5", "block": "32"},
    "d2dmoe": {"rows": "0.4", "block": "128", "width": "128"},
    "polar": {"rows": PUBLISHED, "heads": "0.5", "rank": "1024"},
    "spark": {"rows": "0.08", "tokens": "256"},
}
"""Keys of each method and what they are if not given."""


@dataclass(frozen=True, slots=True)
class Lists(Method):
    """Random lists without a selector."""

    block: int = 32
    rows: float = 0.5

    name: ClassVar[str] = "lists"

    def kind(self, spec: ModelSpec) -> str:
        return "approximate"

    @property
    def skips(self) -> tuple[str, ...]:
        return ("ffn",)

    def section(self) -> dict[str, Any]:
        return {"method": self.name, "block": self.block}

    def density(self, spec: ModelSpec, layer: int) -> float | None:
        return self.rows

    def ffn(self, pack: Packer, i: int) -> Ffn:
        """As a method's, with no router."""
        p, spec = f"layers.{i}.", pack.spec
        if not pack.sparse(i):
            return PlannedDense(pack.ops, "ffn", super(Lists, self).ffn(pack, i))
        gate = p + "gate" if spec.gated else None
        neurons = pack.neurons(i, gate, p + "up", p + "down", spec.activation, self.block)
        units, ops = spec.d_ff // self.block, pack.ops
        return SelectedFfn(ops, lambda x: ops.expand(ops.random_selection(x, units, self.rows), self.block), neurons)


@dataclass(frozen=True, slots=True)
class Sparsity(MethodOption):
    """What an option asks of a shape."""

    def at(self, rows: float) -> Sparsity:
        """The same with another part of the neurons."""
        return dataclasses.replace(self, values={**self.values, "rows": f"{rows:g}"})

    def rows(self, batch: int) -> float:
        """Part of the neurons that a batch runs."""
        if self.values["rows"] == PUBLISHED and self.method == "polar":
            return PUBLISHED_ROWS[next((size for size in PUBLISHED_ROWS if size >= batch), 256)]
        return self.number("rows")

    def spec_for(self, spec: ModelSpec, batches: Sequence[int]) -> ModelSpec:
        """A dense model's spec with the method's settings.

        Raises:
            OptionError: the shape lacks what the method needs.
        """
        if self.method == "spark":
            # Two matrices where a gated layer has three: as many weights, as in the published model. Scores that choose
            # keys are not capped.
            spec = dataclasses.replace(spec, d_ff=spec.d_ff * 3 // 2, attention_softcap=0.0)
        return dataclasses.replace(spec, sparsity=self._method_for(spec, batches))

    def _method_for(self, spec: ModelSpec, batches: Sequence[int]) -> Method:
        match self.method:
            case "lists":
                return Lists(self._block(spec), self.number("rows"))
            case "lte":
                return Lte(self._block(spec), densities=(self.number("rows"),) * spec.n_layers)
            case "d2dmoe":
                densities = (self.number("rows"),) * spec.n_layers
                return D2dmoe(block=self._block(spec), width=self.whole("width"), densities=densities)
            case "spark":
                neurons = min(round(self.number("rows") * spec.d_ff), spec.d_ff - 1)
                return Spark.of_halves(spec, neurons, self.whole("tokens"))
        return self._polar(spec, batches)

    def _block(self, spec: ModelSpec) -> int:
        return self.divisor("block", spec.d_ff, "a layer's neurons")

    def _polar(self, spec: ModelSpec, batches: Sequence[int]) -> Method:
        heads = max(1, int(self.number("heads") * spec.n_heads))
        unit = "head" if spec.group == 1 else "kv_group"
        if spec.group > 1:
            heads = max(1, int(self.number("heads") * spec.n_kv_heads))
        neurons = None
        if spec.activation == "relu":
            table = tuple((b, (max(1, round(self.rows(b) * spec.d_ff)),) * spec.n_layers) for b in sorted(set(batches)))
            neurons = PolarNeurons(min(self.whole("rank"), spec.d_model), table)
        return Polar(neurons, PolarHeads(heads, unit))


def parse(text: str) -> Sparsity:
    """What `METHOD[:key=value,...]` asks for.

    Raises:
        OptionError: an unknown method, key, or no value.
    """
    return Sparsity(text, *read_method(text, KEYS))


def force(decoder: Decoder, sparsity: Sparsity) -> None:
    """Puts random lists of the wanted lengths in the place of what a decoder's selectors give."""
    if sparsity.method in ("lists", "spark"):
        return
    ops = decoder.ops
    for i, layer in enumerate(decoder.layers):
        ffn = layer.ffn
        if isinstance(ffn, SelectedFfn):
            ffn = dataclasses.replace(ffn, selector=_Forced(ops, ffn.selector, sparsity.number("rows")))
        router = layer.router
        if isinstance(ffn, EarlySelectedFfn) or sparsity.method == "polar":
            router = _ForcedRouter(ops, router, sparsity)
        decoder.layers[i] = dataclasses.replace(layer, ffn=ffn, router=router)


@dataclass(frozen=True, slots=True)
class _Forced:
    ops: Ops
    selector: Callable[[Array], Selection]
    rows: float

    def __call__(self, x: Array) -> Selection:
        return self.ops.forced(self.selector(x), self.rows)


@dataclass(frozen=True, slots=True)
class _ForcedRouter:
    ops: Ops
    router: Router
    sparsity: Sparsity

    def __call__(self, x: Array, batch: int) -> Early:
        early: Any = self.router(x, batch)
        heads, neurons = early.heads, early.neurons
        if heads is not None:
            heads = self.ops.forced(heads, self.sparsity.number("heads"))
        if neurons is not None:
            neurons = self.ops.forced(neurons, self.sparsity.rows(batch))
        return Early(heads, neurons)
