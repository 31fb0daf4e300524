"""How fast models decode, beside the dense one in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ondevice.decoder import Decoder
from ondevice_bench.cases import Case
from ondevice_bench.measure import in_turn
from ondevice_bench.sweep import interval

TOKENS, TURNS = 32, 11


@dataclass(frozen=True, slots=True)
class Speed:
    """Decoding of one model.

    Args:
        tokens_per_second: median over turns.
        speedup: median over turns of the ratio to the dense model, which ran in the same turn.
        low, high: 95 % confidence interval of that median, by bootstrap over the turns.
        bytes_per_token: that must move through memory.
        dense_layers: that the plan of this machine runs dense.
    """

    tokens_per_second: float
    speedup: float
    low: float
    high: float
    bytes_per_token: float
    dense_layers: int


def in_turns(dense: Decoder, others: Sequence[Decoder], tokens: int = TOKENS, turns: int = TURNS) -> list[Speed]:
    """Speeds of the dense model and of the others, at an empty context.

    Args:
        tokens: of each turn.
        turns: of each model.
    """
    case = Case("tg", min(tokens, dense.spec.context_length))
    results = in_turn([dense, *others], case, turns)
    speeds = []
    for decoder, result in zip((dense, *others), results):
        ratios = [own / first for own, first in zip(result.samples, results[0].samples)]
        off = len(decoder.plan.dense_layers(decoder.spec))
        median, speed = statistics.median(ratios), statistics.median(result.samples)
        speeds.append(Speed(speed, median, *interval(ratios), result.bytes_per_token, off))
    return speeds
