"""Sketched heads in float64: what the logits of each word may be. Any home's result is judged by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.quantization import Tensor, dequantize, quantize
from ondevice.sparsity.head_sketch import FINE, MARGIN, SketchTensors

TILE = 16
"""Words whose logits are computed together."""
F64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeadCase:
    """One head and how it is asked.

    Args:
        words, width: its shape.
        kind: of its weights: "f32", "f16" or bits and group size.
        top: logits that must be exact.
        bias: whether it has one.
    """

    words: int
    width: int
    kind: str
    top: int
    bias: bool = False

    def head(self) -> tuple[Tensor, NDArray[np.float32] | None]:
        """Weights with a common part, as real ones have, and the bias."""
        random = np.random.RandomState(self.words)
        w = (random.standard_normal((self.words, self.width)) + 0.5 * random.standard_normal(self.width)) / 8
        bias = random.standard_normal(self.words).astype(np.float32) if self.bias else None
        if self.kind in ("f32", "f16"):
            return w.astype({"f32": np.float32, "f16": np.float16}[self.kind]), bias
        bits, group = map(int, self.kind.split("/"))
        return quantize(w, bits, group), bias

    def states(self, tokens: int, seed: int = 1) -> NDArray[np.float32]:
        """Hidden states that lie near few directions, and an outlier in each."""
        random = np.random.RandomState(seed)
        few = np.random.RandomState(7).standard_normal((12, self.width))
        x = random.standard_normal((tokens, 12)) @ few + random.standard_normal((tokens, self.width))
        x[:, 5] += 20
        return x.astype(np.float32)


CASES = [
    HeadCase(1000, 128, "8/32", 1),
    HeadCase(1000, 128, "8/32", 5),
    HeadCase(1024, 192, "4/64", 7, bias=True),
    HeadCase(33, 128, "4/32", 2),
    HeadCase(16, 128, "8/32", 64),
    HeadCase(7, 128, "f16", 3),
    HeadCase(2001, 256, "f16", 64, bias=True),
    HeadCase(500, 128, "f32", 1),
]


@dataclass(frozen=True, slots=True)
class Expected:
    """What holds for one head and its tokens.

    Args:
        exact: all logits [N, words].
        scores: the sketch's.
        deviations: of the scores' errors.
        must, may: words whose logits have to be, and can be, exact.
    """

    exact: F64
    scores: F64
    deviations: F64
    must: NDArray[np.bool_]
    may: NDArray[np.bool_]


def expected(
    head: Tensor,
    bias: NDArray[np.float32] | None,
    sketch: SketchTensors,
    x: NDArray[np.float32],
    top: int,
    rounded: Callable[[Any], F64],
    doubt: float = 1e-3,
) -> Expected:
    """The definition.

    Args:
        rounded: what the home does to inputs of quantized weights.
        doubt: difference between a word's bound and the border that rounding may make.
    """
    shift = 0.0 if bias is None else bias.astype(np.float64)
    quantized = not isinstance(head, np.ndarray)
    exact = (rounded(x) if quantized else x.astype(np.float64)) @ dequantize(head, np.float64).T + shift
    turned = x.astype(np.float64) @ sketch.rotation.astype(np.float64).T
    z, width = turned[:, :-1], x.shape[1]
    fine, coarse = (dequantize(part, np.float64) for part in (sketch.fine, sketch.coarse))
    scores = rounded(z[:, :FINE]) @ fine.T + rounded(z[:, FINE:width]) @ coarse.T + turned[:, -1:] + shift
    deviations = sketch.errors.astype(np.float64).T * np.sqrt((z * z).mean(axis=1, keepdims=True))
    bounds, must, may = scores + MARGIN * deviations, np.zeros(exact.shape, bool), np.zeros(exact.shape, bool)
    for token in range(len(x)):
        border = _border(scores[token], exact[token], top)
        must[token] = _tiles(bounds[token] > border + doubt)
        may[token] = _tiles(bounds[token] > border - doubt)
    return Expected(exact, scores, deviations, must, may)


def _border(scores: F64, exact: F64, top: int) -> float:
    """The k-th largest exact logit among the tiles with the k largest peaks."""
    starts = np.arange(0, len(scores), TILE)
    peaks = np.maximum.reduceat(scores, starts)
    leaders = starts[np.argsort(-peaks)[:top]]
    found = np.concatenate([exact[start : start + TILE] for start in leaders])
    k = min(top, len(starts))
    return float(np.sort(found)[-k]) if k <= len(found) else -np.inf


def _tiles(words: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Words whose tile has a marked one."""
    marked = np.logical_or.reduceat(words, np.arange(0, len(words), TILE))
    return np.repeat(marked, TILE)[: len(words)]
