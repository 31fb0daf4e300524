"""What a model's layers see on a text, at positions spread evenly over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ondevice.decoder import Decoder

WINDOW = 512
"""Tokens that are read together, as a prompt: the context that samples have."""
MEMORY = 2 << 30
"""Bytes that samples may take; deep and wide models get fewer of them."""


@dataclass(frozen=True, slots=True)
class Samples:
    """By place (see `gather`) float16 [n, layers, width]; of "heads" the norms [n, layers, heads]."""

    places: dict[str, NDArray[np.float16]] = field(default_factory=dict)

    def of(self, place: str, layer: int, most: int | None = None) -> NDArray[np.float32]:
        """Samples of a layer, float32 [n, width]; at most so many, spread evenly."""
        all_of_them = self.places[place][:, layer]
        if most is None or most >= len(all_of_them):
            return all_of_them.astype(np.float32)
        return all_of_them[np.linspace(0, len(all_of_them) - 1, most).astype(int)].astype(np.float32)


def gather(
    decoder: Decoder,
    tokens: Sequence[int],
    places: Sequence[str],
    most: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Samples:
    """Reads a text and keeps what passes some places of every layer.

    Args:
        decoder: of the dense model.
        tokens: the text.
        places: of `Decoder.watch`; of "heads" norms are kept, and all values of "o", the input of that linear, which is
            the same place.
        most: positions to keep.
        progress: called with (tokens done, tokens in all, "reading the text").

    Returns:
        Fewer than `most` positions where the text, or `MEMORY`, is too small for so many.
    """
    spec, layers = decoder.spec, range(decoder.spec.n_layers)
    widths = {"heads": spec.n_heads, "o": spec.n_heads * spec.head_dim}
    each = sum(widths.get(place, spec.d_model) for place in places)
    most = max(1, min(most, MEMORY // (2 * spec.n_layers * each)))
    watched = list(dict.fromkeys("heads" if place == "o" else place for place in places))
    step = max(1, -(-len(tokens) // most))
    kept: dict[str, list[NDArray[np.float16]]] = {place: [] for place in places}
    together = min(WINDOW, spec.context_length)
    cache = decoder.new_cache(1, together, together)
    for start in range(0, len(tokens), together):
        window = tokens[start : start + together]
        mine = range(-start % step, len(window), step)
        if not mine:
            continue
        seen = dict(zip(watched, decoder.watch(window, watched, layers, cache)))
        for place in places:
            values = seen["heads" if place == "o" else place][mine.start :: step]
            if place == "heads":
                values = np.linalg.norm(values.reshape(*values.shape[:2], spec.n_heads, -1), axis=-1)
            kept[place].append(values.astype(np.float16))
        if progress:
            progress(start + len(window), len(tokens), "reading the text")
    return Samples({place: np.concatenate(parts) for place, parts in kept.items()})
