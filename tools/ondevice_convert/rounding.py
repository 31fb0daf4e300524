"""One tensor in another form, row by row so that it takes little memory, and what that changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Quantized, Tensor, concatenate, dequantize, quantize
from ondevice.errors import OptionError

CHUNK = 1 << 22
"""Weights that are in floats at once."""
_EXACT_ENOUGH = -22
"""Exponent: scales of codes up to 2**bits that are 2**(bits - 22) on average lose less than an eighth of a step in
float16, whose smallest numbers lie 2**-24 apart."""


def rows_of(tensor: Tensor, size: int = CHUNK) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Float32 values [rows, in] of a matrix, some rows at a time, and which they are.

    Args:
        tensor: [out, in].
        size: weights at a time, at least a row.
    """
    step = max(1, size // tensor.shape[1])
    for start in range(0, tensor.shape[0], step):
        rows = slice(start, start + step)
        yield rows, dequantize(tensor.rows(rows) if isinstance(tensor, Quantized) else tensor[rows])


def relative_error(before: Tensor, after: Tensor) -> float:
    """Root mean square of the difference of two matrices [out, in], relative to that of the first.

    NaN where a value is infinite or no number.
    """
    wrong = energy = 0.0
    with np.errstate(invalid="ignore"):  # where there are infinities: the error is NaN then
        for (_, a), (_, b) in zip(rows_of(before), rows_of(after)):
            wrong += float(np.square(a - b, dtype=np.float64).sum())
            energy += float(np.square(a, dtype=np.float64).sum())
    return float(np.sqrt(wrong / energy)) if energy else float(wrong > 0)


def rounded(tensor: Tensor, bits: int, group_size: int) -> Quantized:
    """A matrix in affine groups, with float16 scales; in float32 where they would be too large or small for that.

    Args:
        tensor: [out, in], floats or quantized otherwise.
        bits: 4, 5, 6 or 8.
        group_size: 32, 64 or 128; must divide `in`.

    Raises:
        OptionError: bits or group size cannot be had.
    """
    whole = _rounded(tensor, bits, group_size, np.float16)
    assert whole.biases is not None
    return whole if _fit(whole.scales, whole.biases, bits) else _rounded(tensor, bits, group_size, np.float32)


def _rounded(tensor: Tensor, bits: int, group_size: int, dtype: Any) -> Quantized:
    with np.errstate(over="ignore", invalid="ignore"):
        whole = concatenate([quantize(values, bits, group_size, dtype) for _, values in rows_of(tensor)])
    assert isinstance(whole, Quantized)
    return whole


def with_plain_scales(tensor: Quantized) -> Quantized:
    """The same codes with a float16 scale and bias for each group; in float32 where float16 is too coarse or small.

    Args:
        tensor: whose scales may be integers under a common factor.
    """
    scales, biases = tensor.affine()
    with np.errstate(over="ignore"):
        small = scales.astype(np.float16), biases.astype(np.float16)
    if _fit(*small, tensor.bits):
        scales, biases = small
    return Quantized(tensor.packed, scales, biases, tensor.bits, tensor.group_size)


def as_floats(tensor: Tensor, dtype: Any) -> NDArray[Any]:
    """A tensor of any shape in plain floats.

    Args:
        tensor: floats or quantized.
        dtype: float16, bfloat16 or float32.

    Raises:
        OptionError: values are too large for it.
    """
    with np.errstate(over="ignore"):
        if not isinstance(tensor, Quantized):
            values = tensor.astype(dtype)
        else:
            values = np.empty(tensor.shape, dtype)
            for rows, some in rows_of(tensor):
                values[rows] = some
    if not np.isfinite(values).all():
        raise OptionError(f"has values that {np.dtype(dtype).name} cannot hold; choose bfloat16 or float32")
    return values


def _fit(scales: NDArray[Any], biases: NDArray[Any], bits: int) -> bool:
    """Whether scales and biases in float16 are as good as any. Where all are 0, they may have become so."""
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        return False
    used = (scales != 0) | (biases != 0)
    return bool(used.any()) and float(np.abs(scales[used], dtype=np.float32).mean()) >= 2.0 ** (bits + _EXACT_ENOUGH)
