"""Where each tensor of a model lies among the stored ones: alone, in rows of a fused tensor, or transposed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ondevice.checkpoint.names import Layout
from ondevice.checkpoint.quantization import Quantized, Tensor, concatenate
from ondevice.errors import UnsupportedModelError
from ondevice.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies.

    Args:
        name: of the stored tensor.
        start, stop: rows of it (columns if it is transposed).
        shape: of the whole stored tensor.
        transposed: the stored matrix is [in, out].
    """

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def outputs(self) -> int:
        """Rows of the whole stored tensor, counted along the outputs."""
        return self.shape[-1 if self.transposed else 0]

    def take(self, stored: Tensor) -> Tensor:
        """This tensor out of the stored one: a view."""
        if self.transposed:
            assert not isinstance(stored, Quantized)
            stored = stored.T
        if self.stop - self.start == self.outputs:
            return stored
        rows = slice(self.start, self.stop)
        return stored.rows(rows) if isinstance(stored, Quantized) else stored[rows]

    def part(self, nbytes: int) -> int:
        """Bytes that this tensor has of the stored one's."""
        return nbytes // self.outputs * (self.stop - self.start)


def places(layout: Layout, spec: ModelSpec) -> dict[str, Place]:
    """Place of every tensor of a spec by canonical name."""
    groups: dict[str, list[str]] = defaultdict(list)
    shapes, found = spec.tensors(), {}
    for name in shapes:
        groups[layout.name(name)].append(name)
    for stored, names in groups.items():
        transposed = layout.is_transposed(stored)
        ends = np.cumsum([shapes[name][0] for name in names]).tolist()
        whole = (ends[-1], *shapes[names[0]][1:])
        for name, start, stop in zip(names, [0, *ends], ends):
            found[name] = Place(stored, start, stop, whole[::-1] if transposed else whole, transposed)
    return found


class Joiner:
    """Collects tensors until a stored one is whole.

    Args:
        places: of every tensor that will be given.
        path: of the checkpoint that is written, for messages.
    """

    def __init__(self, places: Mapping[str, Place], path: Path) -> None:
        self.places, self.path = places, path
        self.parts: dict[str, dict[int, Tensor]] = defaultdict(dict)
        self.needed = Counter(place.name for place in places.values())

    def add(self, name: str, tensor: Tensor) -> Tensor | None:
        """The stored tensor that `tensor` makes whole, if it does; `places[name].name` says its name."""
        place = self.places[name]
        if place.transposed and isinstance(tensor, Quantized):
            raise UnsupportedModelError(
                self.path, "is stored [in, out], which cannot be quantized in groups of inputs; dequantize it", name
            )
        parts = self.parts[place.name]
        parts[place.start] = tensor
        if len(parts) < self.needed[place.name]:
            return None
        del self.parts[place.name]
        ordered = [parts[start] for start in sorted(parts)]
        kinds = {(t.bits, t.group_size) if isinstance(t, Quantized) else None for t in ordered}
        if len(kinds) > 1:
            raise UnsupportedModelError(
                self.path, "joins tensors of different quantization; give them one kind", place.name
            )
        whole = ordered[0] if len(ordered) == 1 else concatenate(ordered)
        return np.ascontiguousarray(whole.T) if place.transposed and not isinstance(whole, Quantized) else whole
