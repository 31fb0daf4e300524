"""Shapes that `ondevice_bench.gpu` measures, and toy ones in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

DENSITIES = tuple(i / 10 for i in range(1, 11))
KEPT_HEADS = 0.5
"""Of OPT-6.7B. Source: Polar Sparsity (Shrestha et al. 2025), critical densities."""
KEPT_ROWS = {1: 0.095, 2: 0.153, 4: 0.206, 8: 0.29, 16: 0.398, 32: 0.517, 64: 0.623}
"""Mean part of OPT-6.7B's neurons that batches run, by their size. Source: the calibration results that were published
with the code of Polar Sparsity."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, or a layer of one.

    Args:
        d, ffn, heads, layers, vocab: of the model; heads have d / heads dimensions.
        batch: sequences that are decoded together.
        seen: keys of each.
        rank: of the router of neurons.
    """

    d: int
    ffn: int
    heads: int
    batch: int
    seen: int
    layers: int = 1
    vocab: int = 0
    rank: int = 1024

    @property
    def dh(self) -> int:
        return self.d // self.heads

    def with_batch(self, batch: int) -> Shape:
        return replace(self, batch=batch)


OPT_66B = Shape(9216, 36864, 72, 64, 1920)
LLAMA_7B = Shape(4096, 11008, 32, 1, 1920)
OPT_6_7B = Shape(4096, 16384, 32, 1, 1920, 32, 50272)
TOY_LAYER = Shape(64, 160, 4, 3, 70)
TOY_TOKEN = Shape(64, 96, 4, 1, 70)
TOY_MODEL = Shape(64, 128, 4, 1, 20, 2, 50, 16)
