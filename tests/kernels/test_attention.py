"""Attention of the CPU table: odd shapes are right, and a token's bits are its own, whoever shares its step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cpu_kernels import attention, attention_rows
from ondevice.generation.kv_cache import KVCache
from ondevice.ops.base import Ops, Step
from ondevice.ops.cpu import CpuOps
from ondevice.ops.reference import ReferenceOps
from tests.tiny import tiny_spec

Pieces = list[tuple[int, int, int]]
"""Of a step: (slot, first position, tokens)."""


@dataclass
class Layer:
    """Random queries, keys and values of sequences of one length, and a layer that attends over them.

    Args:
        shape: query heads, KV heads, head dim.
    """

    shape: tuple[int, int, int]
    length: int
    slots: int = 1
    window: int = 0
    softcap: float = 0.0
    rotated: int = 0

    def rows(self, heads: int, seed: int) -> NDArray[np.float32]:
        random = np.random.RandomState(seed)
        return random.standard_normal((self.slots * self.length, heads * self.shape[2])).astype(np.float32)

    def run(self, ops: Ops, steps: list[Pieces]) -> NDArray[np.float32]:
        """Results [slots, length, heads * head dim] of tokens given in several steps."""
        heads, kv_heads, dh = self.shape
        spec = tiny_spec(n_layers=1, n_heads=heads, n_kv_heads=kv_heads, head_dim=dh, context_length=1 << 14)
        cache = KVCache(ops, spec, self.slots, self.length)
        if isinstance(ops, CpuOps):
            # What no token has written yet must not matter.
            cache.pages.keys[:] = cache.pages.values[:] = np.nan
        sources = (self.rows(heads, 1), self.rows(kv_heads, 2), self.rows(kv_heads, 3).astype(np.float16))
        tables = [ops.pack_embedding(x.astype(np.float32)) for x in sources]
        frequencies = 100.0 ** (-np.arange(0, self.rotated, 2) / max(1, self.rotated))
        rope = ops.pack_rope(frequencies, 1.0, self.length)
        out = np.full((self.slots, self.length, heads * dh), np.nan, np.float32)

        def body(s: Step) -> Any:
            q, k, v = (ops.embed(table, s.tokens) for table in tables)
            if self.rotated:
                q, k = ops.rope(q, heads, s.positions, rope), ops.rope(k, kv_heads, s.positions, rope)
            ops.append(cache, 0, k, v, s)
            return ops.attention(q, cache, 0, s, dh**-0.5, self.window, self.softcap)

        for pieces in steps:
            for slot, _, n in pieces:
                cache.reserve(slot, n)
            slots = np.concatenate([np.full(n, slot) for slot, _, n in pieces]).astype(np.int32)
            positions = np.concatenate([np.arange(first, first + n) for _, first, n in pieces]).astype(np.int32)
            tokens = slots * np.int32(self.length) + positions
            out[slots, positions] = ops.run(Step(tokens, positions, slots, np.arange(len(slots))), cache, body)
            np.maximum.at(cache.lengths, slots, positions + 1)
        return out

    def one_by_one(self) -> list[Pieces]:
        return [[(slot, position, 1) for slot in range(self.slots)] for position in range(self.length)]


SHAPES = [(9, 3, 64), (4, 4, 80), (8, 2, 96), (5, 1, 24), (7, 1, 128), (16, 1, 256)]
CPU = CpuOps(2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (100, 2.0)])
def test_odd_shapes_against_the_reference(shape: tuple[int, int, int], window: int, softcap: float) -> None:
    """Positions 0 to 257, as a prompt and token by token; keys come rotated, and so differ by their rounding."""
    layer = Layer(shape, 258, window=window, softcap=softcap, rotated=shape[2] // 4 * 2)
    whole = layer.run(CPU, [[(0, 0, 258)]])
    expected = layer.run(ReferenceOps(), [[(0, 0, 258)]])
    assert np.abs(whole - expected).max() < 3e-3
    assert np.sqrt(((whole - expected) ** 2).mean()) < 2e-4
    assert np.array_equal(layer.run(CPU, layer.one_by_one()), whole)


@pytest.mark.parametrize("window", [0, 1, 5, 33, 128, 150])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_pieces_of_a_prompt_change_no_bit(window: int, softcap: float) -> None:
    layer = Layer((9, 3, 64), 300, window=window, softcap=softcap, rotated=64)
    whole = layer.run(CPU, [[(0, 0, 300)]])
    for pieces in ([1, 7, 33, 120, 139], [17, 127, 130, 26], [256, 44]):
        starts = np.cumsum([0, *pieces])
        assert np.array_equal(layer.run(CPU, [[(0, int(s), n)] for s, n in zip(starts, pieces)]), whole), pieces
    assert np.array_equal(layer.run(CpuOps(1), [[(0, 0, 300)]]), whole)
    assert np.array_equal(layer.run(CPU, layer.one_by_one()), whole)


@pytest.mark.parametrize("window", [0, 20])
def test_prompts_of_several_slots_in_one_step_change_no_bit(window: int) -> None:
    """Blocks of tokens that straddle two slots, repeat one, or leave positions out must fall apart."""
    layer = Layer((6, 2, 32), 140, slots=4, window=window)
    alone = layer.run(CPU, layer.one_by_one())
    ragged: list[Pieces] = [
        [(2, 0, 1), (0, 0, 7), (1, 0, 33), (3, 0, 5)],
        [(0, 7, 120), (2, 1, 3), (3, 5, 1), (1, 33, 1)],
        [(3, 6, 130), (1, 34, 100), (2, 4, 130), (0, 127, 9)],
        [(slot, 134, 1) for slot in (1, 2)],
        [(1, 135, 5), (2, 135, 5), (0, 136, 4), (3, 136, 4)],
    ]
    assert np.array_equal(layer.run(CPU, ragged), alone)


def test_tokens_of_a_step_in_any_order_change_no_bit() -> None:
    """Mostly consecutive, so that blocks are looked for, but for some that changed places."""
    layer = Layer((6, 2, 32), 64)
    positions = np.arange(64)
    positions[[9, 10, 30, 41]] = positions[[10, 9, 41, 30]]
    shuffled = layer.run(CPU, [[(0, int(p), 1) for p in positions]])
    assert np.array_equal(shuffled, layer.run(CPU, layer.one_by_one()))


def test_a_long_context_dealt_to_tiles_changes_no_bit() -> None:
    """Decoding at a depth where a tile is several chunks, and a shorter sequence beside the long one."""
    length = 40 * attention.CHUNK
    assert attention.tile_positions(length) == 2 * attention.CHUNK
    layer = Layer((6, 2, 32), length, slots=2)
    short, last = attention.CHUNK + 3, length - 3
    together = layer.run(
        CPU, [[(0, 0, last)], [(1, 0, short)], *[[(0, last + i, 1), (1, short + i, 1)] for i in range(3)]]
    )
    alone = layer.run(CPU, [[(0, 0, length)], [(1, 0, short + 3)]])
    assert np.array_equal(together, alone, equal_nan=True)
    assert np.isfinite(together[0]).all()


@pytest.mark.parametrize(("seed", "bad"), [(2, np.nan), (3, np.inf)])
def test_nan_and_infinity_are_not_lost(seed: int, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad key or value spoils those that see it, and nobody else in their block."""
    rows = Layer.rows

    def spoiled(layer: Layer, heads: int, which: int) -> NDArray[np.float32]:
        x = rows(layer, heads, which)
        x[150, 3] = bad if which == seed else x[150, 3]
        return x

    monkeypatch.setattr(Layer, "rows", spoiled)
    got = Layer((6, 2, 32), 200).run(CPU, [[(0, 0, 200)]])[0]
    assert np.isfinite(got[:150]).all()
    assert not np.isfinite(got[150:, [3, 35, 67]]).any()
    assert np.isfinite(got[:, 96:]).all()


@pytest.mark.parametrize("registers", [4, 8, 32])
@pytest.mark.parametrize("rows", range(1, 26))
@pytest.mark.parametrize("across", [1, 4, 5, 6])
def test_every_row_has_registers(monkeypatch: pytest.MonkeyPatch, registers: int, rows: int, across: int) -> None:
    monkeypatch.setattr(attention_rows, "registers", lambda: registers)
    vectors = attention_rows.side_by_side(rows, across)
    slices = attention_rows._slices(rows, vectors)
    assert across % vectors == 0
    covered = [r for first, n, parts in slices for r in range(first, first + n * parts)]
    assert covered == list(range(rows))
    assert all(n * vectors + vectors + 1 <= registers for _, n, _ in slices)
