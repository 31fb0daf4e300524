"""Affine quantization in MLX's layout, the canonical form of every quantized weight.

value = scale * q + bias, one scale and bias per row and group of `group_size` inputs; q is an unsigned
integer of `bits` bits, packed little-endian along the input into uint32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import OptionError

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight matrix [out, in] in affine groups.

    Args:
        packed: uint32 [out, in * bits / 32].
        scales: float16, bfloat16 or float32 [out, in / group_size].
        biases: as scales.
        bits: 4 or 8.
        group_size: 32, 64 or 128.
    """

    packed: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any]
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that this stands for."""
        return self.packed.shape[0], self.packed.shape[1] * 32 // self.bits

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, scales and biases."""
        return int(self.packed.nbytes + self.scales.nbytes + self.biases.nbytes)

    def rows(self, index: NDArray[Any] | slice) -> Quantized:
        """The same weights with rows selected or reordered; nothing is requantized."""
        return Quantized(self.packed[index], self.scales[index], self.biases[index], self.bits, self.group_size)


Tensor = NDArray[Any] | Quantized
"""A tensor of a checkpoint: a float array (float32, float16, bfloat16) or affine-quantized groups."""


def pack(q: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Packs unsigned integers along the last axis.

    Args:
        q: uint8 [..., in], each below 2**bits.
        bits: 4 or 8.

    Returns:
        uint32 [..., in * bits / 32], the first value in the lowest bits.
    """
    if bits == 4:
        q = q[..., 0::2] | (q[..., 1::2] << np.uint8(4))
    return np.ascontiguousarray(q).view(np.dtype("<u4"))


def unpack(packed: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: uint32 [..., words] -> uint8 [..., words * 32 / bits]."""
    b = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return b
    out = np.empty((*b.shape[:-1], b.shape[-1] * 2), np.uint8)
    out[..., 0::2] = b & 15
    out[..., 1::2] = b >> 4
    return out


def dequantize(w: Tensor, dtype: Any = np.float32) -> NDArray[Any]:
    """Float values of a tensor.

    Args:
        w: quantized [out, in], or a float array of any shape (returned converted).
        dtype: of the result; the arithmetic is done in it.

    Returns:
        Array of `dtype` and of the tensor's shape.
    """
    if not isinstance(w, Quantized):
        return w.astype(dtype)
    out, inputs = w.shape
    q = unpack(w.packed, w.bits).reshape(out, -1, w.group_size).astype(dtype)
    return (q * w.scales.astype(dtype)[..., None] + w.biases.astype(dtype)[..., None]).reshape(out, inputs)


def quantize(w: NDArray[Any], bits: int = 4, group_size: int = 64, dtype: Any = np.float16) -> Quantized:
    """Rounds a float matrix to affine groups between each group's minimum and maximum.

    Args:
        w: float [out, in].
        bits: 4 or 8.
        group_size: 32, 64 or 128; must divide `in`.
        dtype: of scales and biases.

    Raises:
        OptionError: bits or group size not supported, or the group does not divide the input width.
    """
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise OptionError(f"bits {bits}, group size {group_size}: choose bits from {BITS}, groups from {GROUP_SIZES}")
    out, inputs = w.shape
    if inputs % group_size:
        raise OptionError(f"group size {group_size} does not divide the input width {inputs}")
    groups = w.astype(np.float32).reshape(out, -1, group_size)
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    scales = ((high - low) / (2**bits - 1)).astype(dtype)
    biases = low.astype(dtype)
    step = scales.astype(np.float32)[..., None]
    step = np.where(step == 0, 1, step)
    q = np.clip(np.rint((groups - biases.astype(np.float32)[..., None]) / step), 0, 2**bits - 1)
    return Quantized(pack(q.astype(np.uint8).reshape(out, inputs), bits), scales, biases, bits, group_size)
