"""Bytes that tensors, keys and values take in the MLX table, from their formats alone. Needs no MLX."""

from __future__ import annotations

import math
import re

from ondevice.errors import OptionError

KV_BITS = (4, 8)
KV_GROUPS = (64, 32)
"""Dimensions of a head with one scale, the first that divides it."""
_AFFINE = re.compile(r"affine (\d+)-bit g(\d+)")
_GGUF = re.compile(r"Q([458])_[01K]")
GGUF_GROUP = 32


def groups_of(kind: str) -> tuple[int, int]:
    """(bits, group) of a type that MLX runs quantized, named as in `Checkpoint.stored`; (0, 0) for floats."""
    if affine := _AFFINE.fullmatch(kind):
        return int(affine[1]), int(affine[2])
    if gguf := _GGUF.fullmatch(kind):
        return int(gguf[1]), GGUF_GROUP
    return 0, 0


def device_bytes(kind: str, shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes of a tensor on the device.

    Args:
        kind: its type, as `Checkpoint.stored` names it.
        shape: of it.
        itemsize: of the table's numbers, which scales and floats become.
    """
    count, (bits, group) = math.prod(shape), groups_of(kind)
    return count * bits // 8 + 2 * itemsize * (count // group) if bits else count * itemsize


def kv_bytes(head_dim: int, itemsize: int, bits: int) -> int:
    """Bytes of a key or value. bits: 0 for floats."""
    if not bits:
        return head_dim * itemsize
    return head_dim * bits // 8 + 2 * itemsize * (head_dim // kv_group(head_dim, bits))


def kv_group(head_dim: int, bits: int) -> int:
    """Dimensions with one scale.

    Raises:
        OptionError: heads that make no whole groups.
    """
    for group in KV_GROUPS:
        if head_dim % group == 0:
            return group
    raise OptionError(
        f"--kv-bits {bits} (kv_bits): heads of {head_dim} dimensions make no groups of {KV_GROUPS[-1]}; leave it out"
    )
