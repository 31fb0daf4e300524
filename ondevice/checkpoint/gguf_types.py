"""Tensor types of GGUF files, and their exact conversion to float arrays or to affine groups of 32.

A block of 32 weights holds a float16 scale d, for Q4_1 a float16 minimum m, and the integers. In 4-bit blocks
byte j holds element j in its low half and element j + 16 in its high half; our order is consecutive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Quantized, Tensor

GROUP = 32
CHUNK = 1 << 15  # blocks converted at once: temporaries stay in the cache and small


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A tensor type: elements and bytes of one block, and the dtype of plain floats."""

    name: str
    block: int
    block_bytes: int
    dtype: Any = None


F32 = GgmlType("F32", 1, 4, np.dtype("<f4"))
F16 = GgmlType("F16", 1, 2, np.dtype("<f2"))
BF16 = GgmlType("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16))
Q4_0, Q4_1, Q8_0 = GgmlType("Q4_0", 32, 18), GgmlType("Q4_1", 32, 20), GgmlType("Q8_0", 32, 34)
READABLE = (F32, F16, BF16, Q4_0, Q4_1, Q8_0)

TYPES: dict[int, GgmlType] = {
    0: F32,
    1: F16,
    2: Q4_0,
    3: Q4_1,
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: Q8_0,
    9: GgmlType("Q8_1", 32, 36),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    15: GgmlType("Q8_K", 256, 292),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    24: GgmlType("I8", 1, 1),
    25: GgmlType("I16", 1, 2),
    26: GgmlType("I32", 1, 4),
    27: GgmlType("I64", 1, 8),
    28: GgmlType("F64", 1, 8),
    29: GgmlType("IQ1_M", 256, 56),
    30: BF16,
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
}


def decode(raw: NDArray[np.uint8], type_id: int, shape: tuple[int, ...]) -> Tensor:
    """Contents of one tensor.

    Args:
        raw: uint8, the tensor's bytes.
        type_id: key of TYPES, of a type in READABLE.
        shape: slowest dimension first.

    Returns:
        Float array of `shape` (a view of `raw`), or for a matrix of blocks Quantized with group size 32.

    Raises:
        ValueError: blocks of a tensor that is no matrix, or scales that are not finite.
    """
    kind = TYPES[type_id]
    if kind.dtype is not None:
        floats = raw.view(kind.dtype).reshape(shape)
        return floats if floats.flags.aligned else floats.copy()
    if len(shape) != 2:
        raise ValueError(f"{kind.name} blocks are only read in matrices, not in the shape {shape}")
    blocks = raw.reshape(-1, kind.block_bytes)
    header = 4 if kind is Q4_1 else 2
    numbers = np.ascontiguousarray(blocks[:, :header]).view("<f2")
    if not np.isfinite(numbers).all():
        raise ValueError("a scale is infinite or not a number: the file is damaged, download it again")
    if kind is Q4_1:
        scales, biases = np.ascontiguousarray(numbers[:, 0]), np.ascontiguousarray(numbers[:, 1])
    else:
        scales, biases = _symmetric(numbers, 8 if kind is Q4_0 else 128)
    packed = np.empty((len(blocks), kind.block_bytes - header), np.uint8)
    convert = _flip_sign if kind is Q8_0 else _interleave
    for first in range(0, len(blocks), CHUNK):
        convert(blocks[first : first + CHUNK, header:], packed[first : first + CHUNK])
    rows, groups = shape[0], (shape[0], shape[1] // GROUP)
    bits = 8 if kind is Q8_0 else 4
    words = packed.reshape(rows, -1).view("<u4")
    return Quantized(words, scales.reshape(groups), biases.reshape(groups), bits, GROUP)


def _symmetric(scales: NDArray[Any], offset: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Scale and bias of values d * (q - offset); float32 where -offset * d does not fit float16."""
    biases = scales.astype(np.float32) * np.float32(-offset)
    if (np.abs(biases) <= np.finfo(np.float16).max).all():
        return scales, biases.astype(np.float16)
    return scales.astype(np.float32), biases


def _flip_sign(stored: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """int8 -> unsigned with 128 added, which in two's complement flips the highest bit."""
    np.bitwise_xor(stored, np.uint8(128), out=out)


def _interleave(stored: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Halves-of-a-block order [blocks, 16] -> consecutive order; eight bytes are handled as one word."""
    words = stored.copy().view("<u8")
    for half, wanted in ((words, out[:, :8]), (words >> np.uint64(4), out[:, 8:])):
        half &= np.uint64(0x0F0F0F0F0F0F0F0F)
        half |= half >> np.uint64(4)  # the lower byte of each pair now holds both elements
        wanted[...] = half.view("<u2")
