"""Affine quantization in MLX's layout, the canonical form of every quantized weight.

value = scale * q + bias, one scale and bias per row and group of `group_size` inputs; q is an unsigned
integer of `bits` bits, packed little-endian along the input into uint32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import OptionError

BITS = (4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SUPER_BLOCK = 256
"""Inputs whose group scales share one float, where scales are themselves integers."""
_TOGETHER = {2: 4, 4: 2, 5: 8, 6: 4}
"""Values that fill whole bytes together, by their bits."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight matrix [out, in] in affine groups.

    GGUF's K types keep scales as integers under a float16 scale per 256 inputs; both parts are kept, since their
    product needs more bits than either.

    Args:
        packed: uint32 [out, in * bits / 32].
        scales: float16, bfloat16 or float32 [out, in / group_size]; integers where there are super_scales.
        biases: as scales; None means -scale * 2**(bits - 1), codes relative to the middle of their range.
        bits: 4, 5, 6 or 8; 2 in sketches.
        group_size: 32, 64 or 128; also 16 where there are super_scales, and larger powers of two in sketches.
        super_scales: float16 [out, in / 256], factors of the scales.
        super_biases: float16 [out, in / 256], factors of the biases.
    """

    packed: NDArray[np.uint32]
    scales: NDArray[Any]
    biases: NDArray[Any] | None
    bits: int
    group_size: int
    super_scales: NDArray[np.float16] | None = None
    super_biases: NDArray[np.float16] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that this stands for."""
        return self.packed.shape[0], self.packed.shape[1] * 32 // self.bits

    @property
    def _parts(self) -> tuple[NDArray[Any] | None, ...]:
        return self.packed, self.scales, self.biases, self.super_scales, self.super_biases

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, scales and biases."""
        return sum(int(part.nbytes) for part in self._parts if part is not None)

    def rows(self, index: NDArray[Any] | slice) -> Quantized:
        """The same weights with rows selected or reordered; nothing is requantized."""
        packed, scales, biases, *supers = (None if part is None else part[index] for part in self._parts)
        assert packed is not None and scales is not None
        return Quantized(packed, scales, biases, self.bits, self.group_size, *supers)

    def affine(self, dtype: Any = np.float32) -> tuple[NDArray[Any], NDArray[Any]]:
        """Scales and biases as plain floats [out, in / group_size]; exact in float32."""
        scales = self.scales.astype(dtype)
        if self.super_scales is not None:
            scales *= self._spread(self.super_scales, dtype)
        if self.biases is None:
            return scales, scales * dtype(-(2 ** (self.bits - 1)))
        biases = self.biases.astype(dtype)
        if self.super_biases is not None:
            biases *= self._spread(self.super_biases, dtype)
        return scales, biases

    def _spread(self, factors: NDArray[Any], dtype: Any) -> NDArray[Any]:
        return np.repeat(factors.astype(dtype), SUPER_BLOCK // self.group_size, axis=1)


Tensor = NDArray[Any] | Quantized
"""A tensor of a checkpoint: a float array (float32, float16, bfloat16) or affine-quantized groups."""


def pack(q: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Packs unsigned integers along the last axis into a stream of bits.

    Args:
        q: uint8 [..., in], each below 2**bits; `in` a multiple of 32.
        bits: 2, 4, 5, 6 or 8.

    Returns:
        uint32 [..., in * bits / 32], the first value in the lowest bits.
    """
    if bits == 8:
        return np.ascontiguousarray(q).view(np.dtype("<u4"))
    count = _TOGETHER[bits]
    nbytes = count * bits // 8
    word = np.uint8 if nbytes == 1 else np.dtype("<u8")
    joined: NDArray[Any] = np.zeros((*q.shape[:-1], q.shape[-1] // count), word)
    for i in range(count):
        joined |= np.left_shift(q[..., i::count].astype(word), i * bits, dtype=word)
    octets = joined[..., None].view(np.uint8)[..., :nbytes]
    return np.ascontiguousarray(octets.reshape(*q.shape[:-1], -1)).view(np.dtype("<u4"))


def unpack(packed: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The inverse of `pack`: uint32 [..., words] -> uint8 [..., words * 32 / bits]."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return octets
    out = np.empty((*octets.shape[:-1], octets.shape[-1] * 8 // bits), np.uint8)
    count = _TOGETHER[bits]
    nbytes = count * bits // 8
    joined = np.zeros((*octets.shape[:-1], octets.shape[-1] // nbytes), np.dtype("<u8"))
    for i in range(nbytes):
        joined |= octets[..., i::nbytes].astype(np.uint64) << np.uint64(8 * i)
    for i in range(count):
        out[..., i::count] = (joined >> np.uint64(i * bits)) & np.uint64(2**bits - 1)
    return out


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined along their rows; quantized ones must share bits and group size.

    Args:
        parts: all quantized or all floats.
    """
    floats = [part for part in parts if not isinstance(part, Quantized)]
    if floats:
        return np.concatenate(floats)
    quantized = [part for part in parts if isinstance(part, Quantized)]
    plain = all(part.super_scales is None and part.biases is not None for part in quantized)
    pairs = [(part.scales, part.biases) if plain else part.affine() for part in quantized]
    scales, biases = (np.concatenate(arrays) for arrays in zip(*pairs))
    packed = np.concatenate([part.packed for part in quantized])
    return Quantized(packed, scales, biases, quantized[0].bits, quantized[0].group_size)


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
    scales, biases = w.affine(np.dtype(dtype).type)
    return (q * scales[..., None] + biases[..., None]).reshape(out, inputs)


def quantize(w: NDArray[Any], bits: int = 4, group_size: int = 64, dtype: Any = np.float16) -> Quantized:
    """Rounds a float matrix to affine groups between each group's minimum and maximum.

    Args:
        w: float [out, in].
        bits: 4, 5, 6 or 8.
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
