"""Cases of linears: `quantized_linear` and `sparse_inputs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor, dequantize, quantize
from ondevice_parity.check import F64, Home, Outcome, Table, close, lists, mask_of, numbers, row_list

SOME = (0, 1, 7, 33, -1, -2)


@dataclass(frozen=True)
class LinearCase:
    """A linear with random weights.

    Args:
        shape: inputs, outputs.
        bits, group: of the weights; 0 bits for floats.
        strided: inputs with other numbers between them.
    """

    tokens: int
    shape: tuple[int, int]
    bits: int = 4
    group: int = 32
    dtype: str = "float32"
    biased: bool = False
    strided: bool = False

    def weight(self, rng: np.random.Generator) -> Tensor:
        array = numbers(rng, "float32", self.shape[1], self.shape[0], scale=self.shape[0] ** -0.5)
        return quantize(array, self.bits, self.group) if self.bits else array.astype(numbers(rng, self.dtype, 1).dtype)

    def inputs(self, rng: np.random.Generator, home: Home, mask: NDArray[np.bool_] | None = None) -> tuple[F64, Any]:
        """In float64, and as kernels get them: those outside of a mask are huge."""
        x = numbers(rng, self.dtype, self.tokens, self.shape[0])
        if mask is not None:
            x = np.where(mask, x, 1e4).astype(x.dtype)
        if not self.strided:
            return x.astype(np.float64), home.array(x)
        wide = np.full((2 * self.tokens, self.shape[0] + 5), np.nan, x.dtype)
        wide[::2, 2:-3] = x
        return x.astype(np.float64), home.array(wide)[::2, 2:-3]

    def bias(self, rng: np.random.Generator) -> Any:
        return numbers(rng, "float32", self.shape[1]) if self.biased else None

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        weight, bias = self.weight(rng), self.bias(rng)
        x, given = self.inputs(rng, home)
        got = fn(given, home.pack_linear(weight, bias))
        expected = x @ dequantize(weight, np.float64).T + (0 if bias is None else bias)
        return close(home.numpy(got), expected, self.dtype, more=home.quantized_error)


@dataclass(frozen=True)
class InputsCase(LinearCase):
    """Linears that read some of their inputs; those that a token did not list are huge.

    Args:
        counts: inputs of each list, in turn; as of `lists`.
        shared: one list for all tokens.
    """

    bits: int = 0
    counts: tuple[int, ...] = SOME
    shared: bool = False

    def __call__(self, fn: Callable[..., Any], rng: np.random.Generator, home: Home) -> Outcome:
        weight, bias, inputs = self.weight(rng), self.bias(rng), self.shape[0]
        several = 1 if self.shared else self.tokens
        chosen = lists(rng, [self.counts[i % len(self.counts)] for i in range(several)], inputs)
        mask = np.broadcast_to(mask_of(chosen, inputs), (self.tokens, inputs))
        x, given = self.inputs(rng, home, mask)
        rows = row_list(chosen, max([1, *map(len, chosen)]) + 3, home)
        got = fn(given, home.pack_inputs(weight, bias), rows)
        expected = np.where(mask, x, 0) @ dequantize(weight, np.float64).T + (0 if bias is None else bias)
        return close(home.numpy(got), expected, self.dtype, more=home.quantized_error if self.bits else 0.0)


CASES: Table = {
    "quantized_linear": {
        "one token": LinearCase(1, (32, 7)),
        "one token, biased": LinearCase(1, (160, 33), biased=True),
        "one token, 8 bits": LinearCase(1, (1088, 70), bits=8, group=64, biased=True, strided=True),
        "one token, groups of 128": LinearCase(1, (1152, 65), group=128, dtype="float16"),
        "7 tokens": LinearCase(7, (96, 65), strided=True, biased=True),
        "33 tokens, 8 bits": LinearCase(33, (192, 130), bits=8, group=64),
        "70 tokens, float16": LinearCase(70, (256, 64), group=128, dtype="float16", biased=True),
        "bfloat16": LinearCase(5, (64, 40), bits=8, dtype="bfloat16"),
        "no token": LinearCase(0, (64, 40)),
    },
    "sparse_inputs": {
        "one token": InputsCase(1, (33, 7), counts=(7,)),
        "no input": InputsCase(2, (33, 7), counts=(0,), biased=True),
        "7 tokens": InputsCase(7, (65, 130), biased=True, strided=True),
        "several chunks": InputsCase(3, (700, 37), counts=(600, -2, 257)),
        "float16": InputsCase(3, (64, 96), counts=(33,), dtype="float16"),
        "bfloat16": InputsCase(3, (64, 96), counts=(33,), dtype="bfloat16"),
        "4 bits": InputsCase(3, (160, 37), counts=(77, -1, -2), bits=4, biased=True),
        "8 bits": InputsCase(2, (256, 70), counts=(100,), bits=8, group=128, dtype="float16"),
        "shared": InputsCase(5, (65, 37), counts=(40,), shared=True, biased=True),
        "shared, none": InputsCase(5, (65, 37), counts=(0,), shared=True, biased=True),
        "shared, all, strided": InputsCase(18, (300, 130), counts=(-2,), shared=True, strided=True),
        "shared, 4 bits": InputsCase(9, (192, 37), counts=(77,), shared=True, bits=4),
        "no token": InputsCase(0, (64, 40)),
    },
}
