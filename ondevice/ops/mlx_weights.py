"""Weights on MLX's device. Canonical groups are MLX's own layout, so codes, scales and biases go there as they are.

What MLX has no kernel for (groups of 16, as in GGUF's Q6_K) becomes floats: exact, and larger. Scales and float
matrices take the table's type, because MLX would convert all of them at every product with activations of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import BITS, GROUP_SIZES, Quantized, Tensor, dequantize

ROWS = 4096
"""Of a matrix that are dequantized at once: all of a vocabulary in float32 would take more memory than the model."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [out, in].

    Args:
        weight: floats [out, in], or uint32 [out, in * bits / 32].
        scales, biases: [out, in / group] of a quantized one.
        bits, group: of a quantized one; else 0.
    """

    weight: Any
    scales: Any = None
    biases: Any = None
    bits: int = 0
    group: int = 0

    def product(self, x: Any) -> Any:
        """x W^T: [N, in] -> [N, out]."""
        if not self.bits:
            return x @ self.weight.T
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases, True, self.group, self.bits)

    def rows(self, index: Any) -> Any:
        """Rows [N] as floats [N, in]."""
        if not self.bits:
            return self.weight[index]
        parts = (self.weight[index], self.scales[index], self.biases[index])
        return mx.dequantize(*parts, group_size=self.group, bits=self.bits)

    @property
    def arrays(self) -> list[Any]:
        """Those that there are."""
        return [array for array in (self.weight, self.scales, self.biases) if array is not None]


@dataclass(frozen=True, slots=True)
class Joined:
    """Linears with a common input: matrices one below the other, those of one format in one, and their biases."""

    parts: tuple[Matrix, ...]
    bias: Any

    def product(self, x: Any, residual: Any = None) -> Any:
        """x W^T + bias (+ residual)."""
        products = [part.product(x) for part in self.parts]
        y = products[0] if len(products) == 1 else mx.concatenate(products, axis=1)
        if self.bias is not None:
            y = y + self.bias
        return y if residual is None else y + residual


def expressible(tensor: Tensor) -> bool:
    """Whether MLX has kernels for a tensor's format."""
    return not isinstance(tensor, Quantized) or (tensor.bits in BITS and tensor.group_size in GROUP_SIZES)


def to_device(array: NDArray[Any], dtype: Any) -> Any:
    """An array of floats on the device, in this type."""
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        raise TypeError(f"{array.dtype} is no type of weights")
    return mx.array(np.ascontiguousarray(array)).astype(dtype)


def pack_matrix(tensor: Tensor, dtype: Any) -> Matrix:
    """One tensor [out, in]."""
    if not isinstance(tensor, Quantized):
        return _ready(Matrix(to_device(tensor, dtype)))
    if not expressible(tensor):
        return _ready(Matrix(mx.concatenate(list(_dequantized(tensor, dtype)))))
    plain = tensor.super_scales is None and tensor.biases is not None
    scales, biases = (tensor.scales, tensor.biases) if plain else tensor.affine()
    assert biases is not None
    words = mx.array(np.ascontiguousarray(tensor.packed))
    return _ready(Matrix(words, to_device(scales, dtype), to_device(biases, dtype), tensor.bits, tensor.group_size))


def pack_joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: Any) -> Joined:
    """Linears [out_i, in], joined where their formats are the same."""
    matrices = [pack_matrix(w, dtype) for w in weights]
    parts = tuple(_join(list(some)) for _, some in groupby(matrices, lambda m: (m.bits, m.group)))
    if all(bias is None for bias in biases):
        return Joined(parts, None)
    floats = [np.zeros(w.shape[0], np.float32) if b is None else dequantize(b) for w, b in zip(weights, biases)]
    bias = to_device(np.concatenate(floats), dtype)
    mx.eval(bias)
    return Joined(parts, bias)


def _join(matrices: list[Matrix]) -> Matrix:
    if len(matrices) == 1:
        return matrices[0]
    first = matrices[0]
    joined: list[Any] = [mx.concatenate(list(some)) for some in zip(*(m.arrays for m in matrices))]
    return _ready(replace(first, **dict(zip(("weight", "scales", "biases"), joined))))


def _ready(matrix: Matrix) -> Matrix:
    """Evaluated: what is not belongs to the thread that made it, and keeps what it is made from."""
    mx.eval(matrix.arrays)
    return matrix


def _dequantized(tensor: Quantized, dtype: Any) -> Iterator[Any]:
    for start in range(0, tensor.shape[0], ROWS):
        rows = mx.array(dequantize(tensor.rows(slice(start, start + ROWS)))).astype(dtype)
        mx.eval(rows)
        yield rows
