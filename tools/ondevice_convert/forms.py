"""How the tensors of a checkpoint are stored, as its headers tell."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.quantization import GROUP_SIZES, Quantized
from ondevice.spec import ModelSpec

LINEARS = ("embed", "head", "q", "k", "v", "o", "gate", "up", "down")
"""Modules whose matrices are rounded. Norms, biases, routers and tables of positions stay."""
FINEST = (8, 32)
"""Bits and group size that groups of 16 get where they are kept, since folders cannot hold them."""
_AFFINE = re.compile(r"affine (\d)-bit g(\d+)")
_GGUF = re.compile(r"Q(\d)_([01K])")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Stored:
    """The form of a tensor.

    Args:
        bits: of its codes; 0 where it is floats.
        group_size: of its groups.
        plain: its scales are floats, one for each group.
        dtype: of floats.
    """

    bits: int = 0
    group_size: int = 0
    plain: bool = True
    dtype: str = ""

    @property
    def kept_bits(self) -> int:
        """Bits of a weight in a folder where nothing else is asked for."""
        if self.bits:
            return self.bits if self.group_size in GROUP_SIZES else FINEST[0]
        return 32 if self.dtype == "float32" else 16

    @property
    def kept_group(self) -> int:
        """Its group size then."""
        return self.group_size if self.group_size in GROUP_SIZES else FINEST[1]


def matrices(spec: ModelSpec) -> dict[str, int]:
    """Weights of each matrix that can be rounded, by canonical name."""
    shapes = spec.tensors().items()
    return {name: prod(shape) for name, shape in shapes if len(shape) == 2 and name.split(".")[-2] in LINEARS}


def stored_form(checkpoint: Checkpoint, name: str) -> Stored:
    """The form of a tensor, by its canonical name; only what is in memory anyway is looked into."""
    kind, _ = checkpoint.stored(name)
    if found := _AFFINE.fullmatch(kind):
        return Stored(int(found[1]), int(found[2]))
    if found := _GGUF.fullmatch(kind):
        group_size = 32 if kind != "Q6_K" else 16
        return Stored(int(found[1]), group_size, plain=found[2] != "K")
    if kind in _FLOATS:
        return Stored(dtype=_FLOATS[kind])
    tensor = checkpoint.tensor(name)  # one that was added to a model
    if not isinstance(tensor, Quantized):
        return Stored(dtype=str(tensor.dtype))
    return Stored(tensor.bits, tensor.group_size, tensor.super_scales is None and tensor.biases is not None)


def usual_group(checkpoint: Checkpoint) -> int | None:
    """The group size of most quantized weights, if there are any in groups that a folder can hold."""
    weights: Counter[int] = Counter()
    for name, count in matrices(checkpoint.spec).items():
        weights[stored_form(checkpoint, name).group_size] += count
    found = [size for size, _ in weights.most_common() if size in GROUP_SIZES]
    return found[0] if found else None
