"""Cases of FFNs with listed neurons: `sparse_ffn_rows` and `grouped_experts`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor, dequantize, quantize
from ondevice_parity.check import F64, Home, Outcome, Table, close, lists, mask_of, numbers, row_list

SOME = (0, 1, 7, 33, -1, -2)


def activate(x: F64, kind: str) -> F64:
    """An activation in float64, by its definition."""
    match kind:
        case "silu":
            return x / (1 + np.exp(-x))
        case "gelu":
            return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "relu":
            return np.maximum(x, 0)
        case "abs":
            return np.abs(x)
    return x


@dataclass(frozen=True)
class FfnCase:
    """An FFN with random weights and lists.

    Args:
        tokens: how many.
        shape: inputs, neurons, outputs.
        counts: units of each list, in turn; as of `lists`.
        shared: one list for all tokens.
        bits, group: of quantized weights; 0 bits for floats.
        strided: inputs, values and residual with other numbers between them.
    """

    tokens: int
    shape: tuple[int, int, int]
    counts: tuple[int, ...] = SOME
    shared: bool = False
    dtype: str = "float32"
    weights: str = ""
    bits: int = 0
    group: int = 32
    gated: bool = True
    valued: bool = False
    biased: bool = False
    residual: bool = False
    strided: bool = False
    block: int = 1
    activation: str = "silu"

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        width, neurons, out = self.shape
        gate, up = (self._weight(rng, neurons, width) for _ in range(2))
        down = self._weight(rng, out, neurons)
        biases = [numbers(rng, "float32", n) if self.biased else None for n in (neurons, neurons, out)]
        biases[0] = biases[0] if self.gated else None
        x = numbers(rng, self.dtype, self.tokens, width)
        values = numbers(rng, "float32", self.tokens, neurons) if self.valued else None
        residual = numbers(rng, self.dtype, self.tokens, out) if self.residual else None
        units = neurons // self.block
        chosen = lists(
            rng, [self.counts[i % len(self.counts)] for i in range(1 if self.shared else self.tokens)], units
        )
        ffn = home.pack_ffn(gate if self.gated else None, up, down, *biases, block=self.block, valued=self.valued)
        rows = row_list(chosen, max([1, *map(len, chosen)]) + 3, home)
        more: dict[str, Any] = {"residual": self._place(residual, home)}
        if self.valued:
            more["values"] = self._place(values, home)
        got = fn(self._place(x, home), ffn, rows, self.activation, **more)
        matrices = [dequantize(m, np.float64) for m in (gate, up, down)]
        h = x.astype(np.float64) @ matrices[1].T + (0 if biases[1] is None else biases[1])
        if self.gated:
            g = x.astype(np.float64) @ matrices[0].T + (0 if biases[0] is None else biases[0])
            h = activate(g, self.activation) * h
        else:
            h = activate(h, self.activation) * (1 if values is None else values)
        h = np.where(np.repeat(mask_of(chosen, units), self.block, axis=1), h, 0)
        expected = h @ matrices[2].T + (0 if biases[2] is None else biases[2])
        expected = expected + (0 if residual is None else residual.astype(np.float64))
        return close(home.numpy(got), expected, self.dtype, more=home.quantized_error if self.bits else 0.0)

    def _weight(self, rng: np.random.Generator, rows: int, columns: int) -> Tensor:
        array = numbers(rng, "float32", rows, columns, scale=columns**-0.5)
        if self.bits:
            return quantize(array, self.bits, self.group)
        return array.astype(numbers(rng, self.weights or self.dtype, 1).dtype)

    def _place(self, array: NDArray[Any] | None, home: Home) -> Any:
        if array is None or not self.strided:
            return None if array is None else home.array(array)
        wide = np.full((2 * array.shape[0], array.shape[1] + 5), np.nan, array.dtype)
        wide[::2, 2:-3] = array
        return home.array(wide)[::2, 2:-3]


def _without_lists(shape: tuple[int, int, int]) -> Callable[..., Outcome]:
    def run(fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        """Lists of length 0: bias and nothing else."""
        width, neurons, out = shape
        bias = numbers(rng, "float32", out)
        arrays = [numbers(rng, "float32", *s) for s in ((neurons, width), (neurons, width), (out, neurons))]
        ffn = home.pack_ffn(*arrays, down_bias=bias)
        rows = home.rows(np.zeros((2, 0), np.int32), np.zeros(2, np.int32))
        got = fn(home.array(numbers(rng, "float32", 2, width)), ffn, rows, "silu")
        return close(home.numpy(got), np.tile(bias.astype(np.float64), (2, 1)), "float32")

    return run


ODD = (33, 70, 37)
CASES: Table = {
    "sparse_ffn_rows": {
        "a token, no neuron": FfnCase(1, ODD, (0,), biased=True),
        "a token, one neuron": FfnCase(1, ODD, (1,)),
        "a token, the last neuron": FfnCase(1, ODD, (-1,), activation="gelu"),
        "a token, all neurons": FfnCase(1, (64, 300, 40), (-2,), residual=True),
        "7 tokens, 7 lists": FfnCase(7, ODD, biased=True, residual=True, strided=True, activation="gelu_tanh"),
        "valued": FfnCase(7, ODD, gated=False, valued=True, biased=True, activation="none", strided=True),
        "no gate, float16": FfnCase(6, (64, 70, 300), gated=False, dtype="float16", activation="relu", biased=True),
        "bfloat16": FfnCase(6, (64, 70, 48), dtype="bfloat16"),
        "bfloat16 weights, float32 inputs": FfnCase(6, (64, 70, 48), weights="bfloat16", activation="abs"),
        "blocks of 4": FfnCase(6, (33, 72, 37), (0, 1, 7, -1, -2, 3), block=4, biased=True),
        "4 bits": FfnCase(4, (96, 96, 37), (1, 7, -1, -2), bits=4, biased=True),
        "4 bits in groups of 64, float16": FfnCase(
            4, (128, 128, 64), (0, 33, -1, 7), bits=4, group=64, dtype="float16"
        ),
        "8 bits": FfnCase(6, (96, 64, 33), bits=8, gated=False, activation="relu"),
        "8 bits in groups of 128, valued": FfnCase(3, (128, 128, 20), bits=8, group=128, gated=False, valued=True),
        "no list entries": _without_lists((33, 20, 7)),
        "no token": FfnCase(0, ODD),
        "union of none": FfnCase(3, ODD, (0,), shared=True, biased=True),
        "union of one": FfnCase(2, ODD, (1,), shared=True),
        "union of the last": FfnCase(7, ODD, (-1,), shared=True, strided=True, residual=True),
        "union of all": FfnCase(33, (33, 130, 37), (-2,), shared=True, biased=True, residual=True, activation="gelu"),
        "union, inputs in several cuts": FfnCase(3, (1100, 40, 37), (-2,), shared=True, biased=True),
        "union, list in several cuts": FfnCase(3, (33, 1100, 37), (-2,), shared=True, gated=False, biased=True),
        "union, valued": FfnCase(5, ODD, (40,), shared=True, gated=False, valued=True, strided=True),
        "union, float16": FfnCase(
            17, (64, 96, 160), (50,), shared=True, dtype="float16", gated=False, activation="relu"
        ),
        "union, bfloat16": FfnCase(9, (64, 96, 64), (50,), shared=True, dtype="bfloat16"),
        "union, blocks of 32": FfnCase(9, (64, 96, 64), (2,), shared=True, block=32),
        "union, 4 bits": FfnCase(17, (160, 192, 70), (77,), shared=True, bits=4, dtype="float16", biased=True),
        "union, 8 bits": FfnCase(5, (96, 128, 33), (60,), shared=True, bits=8, gated=False, activation="relu"),
        "70 tokens": FfnCase(70, ODD, (20,), shared=True),
    },
    "grouped_experts": {
        "one token": FfnCase(1, (33, 64, 37), (1,), block=32),
        "no expert": FfnCase(3, (33, 64, 37), (0,), block=16, biased=True),
        "7 tokens": FfnCase(7, (33, 64, 37), (0, 1, -1, -2, 2, 3), block=8, biased=True, residual=True, strided=True),
        "33 tokens": FfnCase(33, (64, 160, 96), (0, 1, 2, -1, -2), block=32, activation="gelu_tanh"),
        "70 tokens, float16": FfnCase(
            70, (64, 144, 150), (1, 2), block=48, dtype="float16", gated=False, activation="relu", biased=True
        ),
        "bfloat16": FfnCase(20, (64, 128, 64), (1, 2), block=64, dtype="bfloat16"),
        "4 bits": FfnCase(20, (96, 192, 37), (1, 3, 0), block=32, bits=4, biased=True),
        "8 bits": FfnCase(9, (64, 128, 33), (1, -1), block=64, bits=8, group=64, dtype="float16"),
        "experts of 100": FfnCase(18, (33, 300, 37), (1, 2, 0), block=100),
        "one list for all": FfnCase(9, (33, 64, 37), (2,), shared=True, block=16),
        "no token": FfnCase(0, (33, 64, 37), block=16),
    },
}
