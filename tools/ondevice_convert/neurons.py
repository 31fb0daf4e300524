"""FFNs of a model in floats: what their neurons give on samples, and what is lost where some are left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special
from numpy.typing import NDArray

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import dequantize
from ondevice.ops.reference_activation import activate

Floats = NDArray[np.float32]
CHUNK_BYTES = 64 << 20
"""Of a matrix of all neurons on some samples; more samples are taken in turn."""


@dataclass(frozen=True, slots=True)
class Neurons:
    """The FFN of a layer.

    Args:
        gate, up: [D, d] with biases [D]; no gate where there is none.
        down: [d, D].
        activation: of the gate, or of up without one.
    """

    gate: Floats | None
    up: Floats
    down: Floats
    gate_bias: Floats | float
    up_bias: Floats | float
    activation: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: int) -> Neurons:
        """Reads a layer; its memory is given back."""
        spec, names = checkpoint.spec, checkpoint.spec.tensors()

        def read(name: str) -> Floats | None:
            full = f"layers.{layer}.{name}"
            if full not in names:
                return None
            values: Floats = dequantize(checkpoint.tensor(full))
            checkpoint.release(full)
            return values

        up, down = read("up.weight"), read("down.weight")
        assert up is not None and down is not None
        gate_bias, up_bias = read("gate.bias"), read("up.bias")
        biases = (0.0 if gate_bias is None else gate_bias, 0.0 if up_bias is None else up_bias)
        return cls(read("gate.weight"), up, down, *biases, spec.activation)

    def factors(self, x: Floats) -> tuple[Floats, Floats]:
        """Activated gate and up [n, D] of inputs [n, d]; without a gate ones, and the activated up."""
        up = x @ self.up.T + self.up_bias
        if self.gate is None:
            return np.ones_like(up), _activated(up, self.activation)
        return _activated(x @ self.gate.T + self.gate_bias, self.activation), up

    def chunks(self, x: Floats) -> Iterator[tuple[slice, Floats]]:
        """Values of all neurons [some, D] of inputs [n, d], in turn, each with the samples that they are of."""
        some = max(1, CHUNK_BYTES // (4 * len(self.up)))
        for start in range(0, len(x), some):
            part = slice(start, min(start + some, len(x)))
            gate, up = self.factors(x[part])
            yield part, gate * up

    @property
    def reach(self) -> Floats:
        """Length of each neuron's column of down [D]."""
        lengths: Floats = np.linalg.norm(self.down, axis=0)
        return lengths

    def lost(self, h: Floats, scores: Floats, densities: Sequence[float]) -> list[float]:
        """Part of the output's square [n, D] that is lost where only the neurons of the largest scores run.

        Args:
            h: [n, D] of all neurons.
            scores: [n, D]; the threshold is one for all samples.
            densities: parts of all scores that are kept.
        """
        whole, ordered = float(((h @ self.down.T) ** 2).sum()), np.sort(scores, axis=None)
        parts = []
        for density in densities:
            left = round((1 - density) * ordered.size)
            if not left:
                parts.append(0.0)
                continue
            missing = np.where(scores > ordered[left - 1], 0, h) @ self.down.T
            parts.append(float((missing**2).sum()) / whole if whole else 0.0)
        return parts


def _activated(x: Floats, kind: str) -> Floats:
    """As the reference's, quicker for gelu, and silent about exp of large values, whose reciprocal is 0."""
    if kind == "gelu":
        return 0.5 * x * (1 + scipy.special.erf(x / np.float32(np.sqrt(2))))
    with np.errstate(over="ignore"):
        return activate(x, kind)
