"""What a calibration finds: a method with its settings, the tensors that it adds, and how good its choices are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor
from ondevice.sparsity.method import Method


@dataclass(frozen=True, slots=True)
class LayerFit:
    """One layer on samples that nothing was fitted on.

    Args:
        layer: its number.
        density: part of its units (neurons, inputs, heads) that the fitted selector keeps.
        recall: part of the wanted units that are kept; wanted are as many of the largest contributions as are kept.
        lost: part of the output's square that is lost by what is left out.
        oracle_lost: the same where the largest contributions are kept, as many, in units of the same size.
        random_lost: the same where random units are kept, as many.
        unit: neurons, inputs or heads of a unit.
        what: is left out, in the words of `Ops.counts`: "ffn" (neurons), "inputs" or "heads".
    """

    layer: int
    density: float
    recall: float
    lost: float
    oracle_lost: float
    random_lost: float
    unit: int = 1
    what: str = "ffn"

    @property
    def oracle_share(self) -> float:
        """Part of the oracle's benefit over random choices that is kept: 1 is the oracle, 0 is chance."""
        most = self.random_lost - self.oracle_lost
        return (self.random_lost - self.lost) / most if most > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A method made for a model.

    Args:
        method: with its settings and densities.
        added: its tensors by canonical name, floats or Quantized.
        orders: of a layer's neurons, int [d_ff]: which neuron comes where; layers that are left out keep theirs.
        layers: what each layer came to.
        notes: sentences for the report: what was refused, what a cap stopped.
    """

    method: Method
    added: Mapping[str, Tensor] = field(default_factory=dict)
    orders: Mapping[int, NDArray[np.int64]] = field(default_factory=dict)
    layers: tuple[LayerFit, ...] = ()
    notes: tuple[str, ...] = ()
