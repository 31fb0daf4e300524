"""Samples that a method is fitted on, and those that it is judged on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ondevice.errors import OptionError
from ondevice_convert.samples import Samples

Floats = NDArray[np.float32]

FIFTH = 5
"""Of the samples the last fifth is held out: text that comes after all that was fitted on."""
FEWEST = 20
"""Samples without which nothing can be fitted."""
VALUES = 1 << 26
"""Values that are made of a layer's samples at most, in any one array: 256 MiB."""


def apart(samples: Samples, place: str, layer: int, width: int, most: int | None = None) -> tuple[Floats, Floats]:
    """Samples of a layer to fit on, and those held out. Two places of one width give the same positions.

    Args:
        samples: of the text.
        place, layer: of `Samples.of`.
        width: of the widest thing that the caller makes of each sample; wide layers get fewer samples.
        most: samples, of both together.

    Returns:
        float32 [n, d] and [m, d], in the text's order.

    Raises:
        OptionError: too few samples.
    """
    room = max(FEWEST, VALUES // width)
    x = samples.of(place, layer, room if most is None else min(most, room))
    if len(x) < FEWEST:
        raise OptionError(f"the text gives {len(x)} samples; a calibration needs at least {FEWEST}: give a longer text")
    held_out = len(x) // FIFTH
    return x[:-held_out], x[-held_out:]
