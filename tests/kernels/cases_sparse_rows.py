"""Lists of FFN neurons, and what gate and up of them give in float64. Any home's kernel is tested with these."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor, dequantize
from ondevice.ops.reference import ReferenceOps

_SOME = np.random.RandomState(3)
LISTS: dict[str, tuple[int, list[int]]] = {
    "none": (96, []),
    "first": (96, [0]),
    "last of a broken group": (70, [69]),
    "seven": (70, [3, 31, 32, 33, 40, 64, 69]),
    "three in a row, twice": (96, [33, 34, 35, 80, 81, 82]),
    "unsorted, repeated": (65, [64, 2, 2, 40, 1, 40, 0]),
    "one of each group": (320, list(range(5, 320, 32))),
    "a third": (320, _SOME.permutation(320)[:107].tolist()),
    "all but one": (96, [i for i in range(96) if i != 47]),
    "all, whole groups": (1600, list(range(1600))),
    "all, a broken group": (33, list(range(33))),
    "a single neuron": (1, [0]),
}
"""Neurons of the FFN, and a list as a caller may pass it."""


def dense_ffn(
    x: NDArray[Any],
    gate: Tensor | None,
    up: Tensor,
    activation: str,
    gate_bias: NDArray[Any] | None = None,
    up_bias: NDArray[Any] | None = None,
    values: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """act(gate x) * up x, act(up x), or values * act(up x), of every neuron.

    Args:
        x: [N, inputs].
        gate, up: [neurons, inputs].
        gate_bias, up_bias: [neurons] or None.
        values: [N, neurons], in place of the gate.
    """
    ops = ReferenceOps()

    def product(w: Tensor, bias: NDArray[Any] | None) -> NDArray[np.float64]:
        return x.astype(np.float64) @ dequantize(w, np.float64).T + (0 if bias is None else bias.astype(np.float64))

    y = product(up, up_bias)
    if gate is None:
        return ops.activation(y, activation, False) * (1 if values is None else values.astype(np.float64))
    return ops.activation(product(gate, gate_bias), activation, False) * y
