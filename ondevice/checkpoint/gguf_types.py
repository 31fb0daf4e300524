"""Tensor types of GGUF files, and their exact conversion to float arrays or to affine groups.

A block of 32 weights holds a float16 scale d, for Q4_1 and Q5_1 a float16 minimum m, and the integers. In 4-bit blocks
byte j holds element j in its low half and element j + 16 in its high half; our order is consecutive. The others are in
`gguf_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint import gguf_blocks
from ondevice.checkpoint.quantization import SUPER_BLOCK, Quantized, Tensor, pack

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
Q5_0, Q5_1 = GgmlType("Q5_0", 32, 22), GgmlType("Q5_1", 32, 24)
Q4_K, Q5_K, Q6_K = GgmlType("Q4_K", 256, 144), GgmlType("Q5_K", 256, 176), GgmlType("Q6_K", 256, 210)
READABLE = (F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K)
MIDDLE = {Q4_0: 8, Q5_0: 16, Q8_0: 128}
"""Codes that stand for zero in types without a minimum."""

TYPES: dict[int, GgmlType] = {
    0: F32,
    1: F16,
    2: Q4_0,
    3: Q4_1,
    6: Q5_0,
    7: Q5_1,
    8: Q8_0,
    9: GgmlType("Q8_1", 32, 36),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: Q4_K,
    13: Q5_K,
    14: Q6_K,
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
        Float array of `shape` (a view of `raw`), or for a matrix of blocks Quantized.

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
    return _k_blocks(blocks, kind, shape) if kind.block == SUPER_BLOCK else _simple_blocks(blocks, kind, shape)


def _check_finite(factors: NDArray[Any] | None) -> None:
    if factors is not None and not np.isfinite(factors).all():
        raise ValueError("a scale is infinite or not a number: the file is damaged, download it again")


def _simple_blocks(blocks: NDArray[np.uint8], kind: GgmlType, shape: tuple[int, ...]) -> Quantized:
    """Blocks of 32 with float16 scales."""
    header = 2 if kind in MIDDLE else 4
    numbers = np.ascontiguousarray(blocks[:, :header]).view("<f2")
    _check_finite(numbers)
    if kind in MIDDLE:
        scales, biases = _symmetric(numbers, MIDDLE[kind])
    else:
        scales, biases = np.ascontiguousarray(numbers[:, 0]), np.ascontiguousarray(numbers[:, 1])
    bits = {Q8_0: 8, Q5_0: 5, Q5_1: 5}.get(kind, 4)
    convert = {8: _flip_sign, 5: _pack_five, 4: _interleave}[bits]
    packed = np.empty((len(blocks), GROUP * bits // 8), np.uint8)
    for first in range(0, len(blocks), CHUNK):
        convert(blocks[first : first + CHUNK, header:], packed[first : first + CHUNK])
    groups = (shape[0], shape[1] // GROUP)
    words = packed.reshape(shape[0], -1).view("<u4")
    return Quantized(words, scales.reshape(groups), biases.reshape(groups), bits, GROUP)


def _k_blocks(blocks: NDArray[np.uint8], kind: GgmlType, shape: tuple[int, ...]) -> Quantized:
    """Blocks of 256 whose scales are integers under a common factor."""
    bits = int(kind.name[1])
    scales, biases, factor, bias_factor = gguf_blocks.k_scales(kind.name, blocks)
    _check_finite(factor)
    _check_finite(bias_factor)
    packed = np.empty((len(blocks), SUPER_BLOCK * bits // 32), np.uint32)
    step = CHUNK // 8
    codes = np.empty((step, SUPER_BLOCK), np.uint8)
    for first in range(0, len(blocks), step):
        some = blocks[first : first + step]
        gguf_blocks.CODES[kind.name](some, codes[: len(some)])
        packed[first : first + step] = pack(codes[: len(some)], bits)

    def rows(part: NDArray[Any] | None) -> Any:
        return None if part is None else np.ascontiguousarray(part).reshape(shape[0], -1)

    group = SUPER_BLOCK // scales.shape[1]
    return Quantized(rows(packed), rows(scales), rows(biases), bits, group, rows(factor), rows(bias_factor))


def _pack_five(stored: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    codes = np.empty((len(stored), GROUP), np.uint8)
    gguf_blocks.five_bits(stored, codes)
    out[...] = pack(codes, 5).view(np.uint8)


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
