"""Bytes: what a loaded model takes, and what a token must move through memory.

Counted for a token are the packed weights that a step reads, once for all tokens of the step (of the embedding their
rows only, the head whole), and the keys and values that are visible. Activations and writes are not.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ondevice.decoder import PREFILL_CHUNK

if TYPE_CHECKING:
    from ondevice.decoder import Decoder
    from ondevice.generation.kv_cache import KVCache
    from ondevice_bench.cases import Case


def held_arrays(*handles: Any) -> list[Any]:
    """All arrays in a table's handles, whatever they are made of, each once."""
    found: dict[int, Any] = {}
    waiting = list(handles)
    while waiting:
        value = waiting.pop()
        if isinstance(getattr(value, "nbytes", None), int):
            found[id(value)] = value
        elif is_dataclass(value):
            waiting += [getattr(value, field.name) for field in fields(value)]
        elif isinstance(value, (list, tuple)):
            waiting += value
    return list(found.values())


def held_bytes(*handles: Any) -> int:
    """Bytes of all arrays in a table's handles; an array met twice counts once."""
    return sum(array.nbytes for array in held_arrays(*handles))


def model_bytes(decoder: Decoder) -> int:
    """Bytes of the packed weights."""
    return held_bytes(decoder.embed, decoder.position, decoder.layers, decoder.final_norm, decoder.head)


def bits_per_weight(decoder: Decoder) -> float:
    """Bits of packed weights per parameter, embedding and head included; a tied table is one table."""
    parameters = sum(math.prod(shape) for shape in decoder.spec.tensors().values())
    return 8 * model_bytes(decoder) / parameters


def bytes_per_token(decoder: Decoder, cache: KVCache, case: Case) -> float:
    """Bytes that must move for one token of a test, in the mean.

    Args:
        cache: that the test runs in; says how the table keeps keys and values.
    """
    layers, head = held_bytes(decoder.layers), held_bytes(decoder.final_norm, decoder.head)
    kv = held_bytes(cache.pages) / cache.positions
    if case.kind == "tg":
        seen = sum(_seen(decoder, end, 1) for end in range(case.depth + 1, case.positions + 1))
        return (layers + head) / case.batch + _row_bytes(decoder) + kv * seen / case.tokens
    starts = range(case.depth, case.positions, PREFILL_CHUNK)
    chunks = [(min(start + PREFILL_CHUNK, case.positions), start) for start in starts]
    seen = sum(_seen(decoder, end, end - start) for end, start in chunks)
    return (layers * len(chunks) + head + kv * seen) / case.tokens + _row_bytes(decoder)


def _seen(decoder: Decoder, end: int, tokens: int) -> int:
    """Positions that any of the `tokens` before `end` sees, summed over the layers."""
    return sum(min(end, window + tokens - 1) if window else end for window in decoder.spec.windows)


def _row_bytes(decoder: Decoder) -> float:
    """Bytes of a token's rows of the embedding and position tables; part of the head where they are one table."""
    spec = decoder.spec
    rows = 0.0 if spec.tied_head else held_bytes(decoder.embed) / spec.vocab_size
    if decoder.position is not None:
        rows += held_bytes(decoder.position) / spec.tensors()["position.weight"][0]
    return rows
