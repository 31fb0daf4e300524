"""What each layer's skipping costs the whole model: the KL divergence where one layer skips and the others do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ondevice.decoder import Decoder
from ondevice.layer import Layer
from ondevice_eval.scores import Window

Progress = Callable[[int, int, str], None]


def mixed(dense: Decoder, layers: Mapping[int, Layer]) -> Decoder:
    """A dense model with some layers in another form, packed by the same table."""
    made = copy.copy(dense)
    made.layers = list(dense.layers)
    for i, layer in layers.items():
        made.layers[i] = layer
    return made


def layer_costs(
    dense: Decoder, skipping: Decoder, tokens: Sequence[int], progress: Progress | None = None
) -> NDArray[np.float64]:
    """Mean KL(dense || one layer skips) of a token, nats, of each layer: float64 [layers].

    Args:
        dense: the model.
        skipping: the same with all layers skipping, packed by the same table.
        tokens: some hundred, read as one prompt.
    """
    wanted, costs = _logits(dense, tokens), np.zeros(len(dense.layers))
    for i in range(len(dense.layers)):
        scored = Window()
        scored.add(_logits(mixed(dense, {i: skipping.layers[i]}), tokens), np.asarray(tokens), wanted)
        costs[i] = scored.kl / len(tokens)
        if progress:
            progress(i + 1, len(dense.layers), "measuring what each layer's skipping costs")
    return costs


def _logits(decoder: Decoder, tokens: Sequence[int]) -> NDArray[np.float32]:
    cache = decoder.new_cache(1, len(tokens))
    return np.concatenate(list(decoder.prefill(tokens, cache, all_logits=True)))
