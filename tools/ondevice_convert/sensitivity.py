"""What rounding each linear of a model costs, measured on what its layers see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import BITS, Quantized, dequantize
from ondevice.errors import OptionError
from ondevice.ops.reference_activation import activate
from ondevice_convert.forms import matrices, stored_form
from ondevice_convert.rounding import rounded, rows_of
from ondevice_convert.samples import Samples

Floats = NDArray[np.float32]
PLACES = ("attention", "heads", "ffn")
"""Of `Decoder.watch`: what must be sampled."""
MOST = 128
"""Samples of a layer that are looked at."""
SCALE_BITS = 32
"""Of a group's scale and bias."""
ROWS = 512
"""Outputs of a matrix that are looked at, spread evenly."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Matrices with a common input, which get the same bits so that they stay one product.

    Args:
        names: canonical.
        costs: by bits: square of the error in the residual stream, relative to the stream's.
        sizes: by bits: bits that all of it takes, with scales.
    """

    names: tuple[str, ...]
    costs: Mapping[int, float]
    sizes: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Costs of all units of a model, for one group size."""

    units: tuple[Unit, ...]
    weights: int
    group_size: int

    def choose(self, average: float) -> dict[str, int]:
        """Bits of each matrix: as few as can be, then more where that takes away most error for each bit spent.

        Args:
            average: bits of a weight's code, on average, whose bytes, with scales of the measured group size, are not
                exceeded; unless the fewest possible do already.

        Returns:
            By canonical name.
        """
        at = [0] * len(self.units)
        left = (average + SCALE_BITS / self.group_size) * self.weights - sum(u.sizes[BITS[0]] for u in self.units)
        open_ones = set(range(len(self.units)))
        while open_ones:
            best, best_gain, best_price = -1, 0.0, 0
            for i in sorted(open_ones):
                unit, now = self.units[i], BITS[at[i]]
                for more in BITS[at[i] + 1 :]:
                    price = unit.sizes[more] - unit.sizes[now]
                    if 0 < price <= left and (gain := (unit.costs[now] - unit.costs[more]) / price) > best_gain:
                        best, best_gain, best_price = i, gain, price
                        target = more
            if best < 0:
                break
            at[best], left = BITS.index(target), left - best_price
            if at[best] == len(BITS) - 1:
                open_ones.remove(best)
        return {name: BITS[at[i]] for i, unit in enumerate(self.units) for name in unit.names}


def measure_sensitivity(
    source: Checkpoint,
    samples: Samples,
    group_size: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """Rounds rows of every linear to each number of bits and measures the error of its output.

    The cost of a unit is ||(W - Wq) x||^2 / ||W x||^2, summed over its matrices, times the part that its branch,
    attention or FFN, adds to the residual stream's square. Values of heads are known by their norms only, so the
    error of `o` is that of directions evenly spread within a head; the embedding table and the head count with inputs
    of equal size. Branches and stream are taken to be orthogonal.

    Args:
        source: the model as it will be rounded, of any format.
        samples: of `PLACES`.
        group_size: of the rounded matrices.
        progress: called with (layers done, layers in all, label).

    Raises:
        OptionError: a group of that size does not divide a matrix.
    """
    return Sensitivity(
        tuple(_units(source, samples, group_size, progress)),
        sum(matrices(source.spec).values()),
        group_size,
    )


def _units(
    source: Checkpoint, samples: Samples, group_size: int, progress: Callable[[int, int, str], None] | None
) -> Iterator[Unit]:
    spec = source.spec
    look = _Look(source, group_size)
    stream = look.energy("embed.weight", None) * spec.embedding_scale**2 / spec.vocab_size
    if spec.position_offset is not None:
        stream += look.energy("position.weight", None) / source.spec.tensors()["position.weight"][0]
    ends = 2.0 if spec.tied_head else 1.0
    yield look.unit(("embed",), None, ends)
    if not spec.tied_head:
        yield look.unit(("head",), None, 1.0)
    for layer in range(spec.n_layers):
        p = f"layers.{layer}."
        x = samples.of("attention", layer, MOST)
        heads = np.square(samples.of("heads", layer)).mean(axis=0) / spec.head_dim
        columns = np.repeat(heads, spec.head_dim)
        branch = look.branch(p + "o", p + "post_attn_norm", columns)
        stream += branch
        yield look.unit((p + "q", p + "k", p + "v"), x, branch / stream)
        yield look.unit((p + "o",), columns, branch / stream)
        x = samples.of("ffn", layer, MOST)
        h = _neurons(source, p, x)
        branch = look.branch(p + "down", p + "post_ffn_norm", h)
        stream += branch
        gate = (p + "gate",) if spec.gated else ()
        yield look.unit((*gate, p + "up"), x, branch / stream)
        yield look.unit((p + "down",), h, branch / stream)
        if progress:
            progress(layer + 1, spec.n_layers, "measuring what rounding costs")


class _Look:
    """Looks at some rows of matrices.

    Inputs of a matrix are float32 [n, in], or their mean squares [in] where they are independent, or None: all 1.
    """

    def __init__(self, source: Checkpoint, group_size: int) -> None:
        self.source, self.group_size = source, group_size

    def unit(self, modules: tuple[str, ...], inputs: Floats | None, share: float) -> Unit:
        costs, sizes = dict.fromkeys(BITS, 0.0), dict.fromkeys(BITS, 0)
        names = tuple(f"{module}.weight" for module in modules)
        for name in names:
            stored, weights = stored_form(self.source, name), matrices(self.source.spec)[name]
            rows, _ = self._rows(name)
            whole = _squares(rows, inputs)
            for bits in BITS:
                kept = 0 < stored.bits < bits or (stored.bits, stored.group_size) == (bits, self.group_size)
                form = (stored.kept_bits, stored.kept_group) if kept else (bits, self.group_size)
                sizes[bits] += weights * form[0] + weights // form[1] * SCALE_BITS
                if whole and not kept:
                    difference = rows - dequantize(rounded(rows, bits, self.group_size))
                    costs[bits] += share * _squares(difference, inputs) / whole
        return Unit(names, costs, sizes)

    def energy(self, name: str, inputs: Floats | None) -> float:
        """Mean square length of a matrix' output, estimated."""
        rows, part = self._rows(name)
        return _squares(rows, inputs) / part

    def branch(self, module: str, post_norm: str, inputs: Floats) -> float:
        """Mean square length of what a branch adds, whose last linear is `module`."""
        spec = self.source.spec
        if spec.post_norms:
            weight = dequantize(self.source.tensor(f"{post_norm}.weight")) + spec.norm_offset
            return float(np.square(weight).sum())
        return self.energy(f"{module}.weight", inputs)

    def _rows(self, name: str) -> tuple[Floats, float]:
        """Some rows of a matrix, and which part of all they are."""
        tensor = self.source.tensor(name)
        index = np.unique(np.linspace(0, tensor.shape[0] - 1, min(ROWS, tensor.shape[0])).astype(np.int64))
        rows: Floats = dequantize(tensor.rows(index) if isinstance(tensor, Quantized) else tensor[index])
        self.source.release(name)
        if rows.shape[1] % self.group_size:
            raise OptionError(f"group size {self.group_size} does not divide the {rows.shape[1]} inputs of {name}")
        return rows, len(index) / tensor.shape[0]


def _squares(rows: Floats, inputs: Floats | None) -> float:
    """Mean over the inputs of the output's square length."""
    if inputs is None:
        return float(np.square(rows, dtype=np.float64).sum())
    if inputs.ndim == 1:
        return float((np.square(rows) @ inputs).sum(dtype=np.float64))
    return float(np.square(inputs @ rows.T, dtype=np.float64).sum()) / len(inputs)


def _neurons(source: Checkpoint, p: str, x: Floats) -> Floats:
    """What `down` reads: [n, D] of the FFN's inputs [n, d], some neurons at a time."""
    spec, names = source.spec, source.spec.tensors()

    def product(module: str) -> Any:
        out = np.empty((len(x), names[f"{p}{module}.weight"][0]), np.float32)
        for rows, values in rows_of(source.tensor(f"{p}{module}.weight")):
            out[:, rows] = x @ values.T
        source.release(f"{p}{module}.weight")
        if f"{p}{module}.bias" in names:
            out += dequantize(source.tensor(f"{p}{module}.bias"))
        return out

    up = product("up")
    h: Floats = activate(product("gate"), spec.activation) * up if spec.gated else activate(up, spec.activation)
    return h
