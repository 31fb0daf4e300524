"""Block types of GGUF whose codes are spread over several fields: 5 bits, and the K types of 4, 5 and 6 bits.

A K block of 256 weights has float16 factors and, per 16 or 32 weights, integer scales (and minima).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]


def five_bits(fields: U8, out: U8) -> None:
    """Q5_0 and Q5_1: [n, 4 bytes of high bits + 16 bytes of nibbles] -> codes [n, 32]."""
    high = np.unpackbits(fields[:, :4], axis=1, bitorder="little") << np.uint8(4)
    out[:, :16] = (fields[:, 4:] & 15) | high[:, :16]
    out[:, 16:] = (fields[:, 4:] >> 4) | high[:, 16:]


def q4_k(blocks: U8, out: U8) -> None:
    """Q4_K: blocks [n, 144] -> codes [n, 256]."""
    nibbles = blocks[:, 16:].reshape(-1, 4, 1, 32)
    wanted = out.reshape(-1, 4, 2, 32)
    wanted[:, :, :1] = nibbles & 15
    wanted[:, :, 1:] = nibbles >> 4


def q5_k(blocks: U8, out: U8) -> None:
    """Q5_K: blocks [n, 176] -> codes [n, 256]. Bit j of a high byte belongs to the j-th run of 32 elements."""
    nibbles = blocks[:, 48:].reshape(-1, 4, 1, 32)
    high = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    wanted = out.reshape(-1, 4, 2, 32)
    wanted[:, :, :1] = nibbles & 15
    wanted[:, :, 1:] = nibbles >> 4
    wanted |= (high << np.uint8(4)).reshape(wanted.shape)


def q6_k(blocks: U8, out: U8) -> None:
    """Q6_K: blocks [n, 210] -> codes [n, 256]. Each half of 128: two runs of low nibbles, two of high ones."""
    low = blocks[:, :128].reshape(-1, 2, 1, 2, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift) & 3
    wanted = out.reshape(-1, 2, 2, 2, 32)
    wanted[:, :, :1] = low & 15
    wanted[:, :, 1:] = low >> 4
    wanted |= (high << np.uint8(4)).reshape(wanted.shape)


CODES: dict[str, Callable[[U8, U8], None]] = {"Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def k_scales(name: str, blocks: U8) -> tuple[NDArray[Any], U8 | None, NDArray[Any], NDArray[Any] | None]:
    """Scales of K blocks.

    Args:
        name: "Q4_K", "Q5_K" or "Q6_K".
        blocks: uint8 [n, bytes].

    Returns:
        scales [n, groups] (uint8; int8 for Q6_K), biases [n, groups] uint8, their float16 factors [n]. The published
        minimum is subtracted, so its factor comes back negated. Q6_K has no biases.
    """
    if name == "Q6_K":
        factor = np.ascontiguousarray(blocks[:, 208:]).view("<f2")[:, 0]
        return blocks[:, 192:208].view(np.int8), None, factor, None
    factors = np.ascontiguousarray(blocks[:, :4]).view("<f2")
    # Twelve bytes hold eight 6-bit scales and eight minima: six bits each of the first four, then nibbles of the
    # others, whose upper two bits sit on top of the first ones.
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scales, minima, factors[:, 0], -factors[:, 1]
