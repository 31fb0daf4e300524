"""Every block type against the `gguf` package's own dequantization, on random bytes: all codes and scales occur."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from ondevice.checkpoint.gguf_types import TYPES, decode
from ondevice.checkpoint.quantization import Quantized, dequantize, pack, quantize, unpack

BLOCKS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
FACTORS = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}


def random_blocks(name: str, rows: int, inputs: int) -> np.ndarray:
    """uint8 [rows, bytes] with finite float16 factors."""
    kind, random = TYPES[BLOCKS[name]], np.random.RandomState(3)
    raw = random.randint(0, 256, (rows, inputs // kind.block, kind.block_bytes)).astype(np.uint8)
    for offset in FACTORS.get(name, (0,)):
        factor = random.uniform(-1, 1, raw.shape[:2]).astype(np.float16)
        raw[:, :, offset : offset + 2] = factor[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", BLOCKS)
def test_values_are_exact_and_stay_small(name: str) -> None:
    raw = random_blocks(name, 33, 768)
    tensor = decode(raw.reshape(-1), BLOCKS[name], (33, 768))
    assert isinstance(tensor, Quantized)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(BLOCKS[name]))
    assert np.array_equal(dequantize(tensor), expected)
    assert tensor.nbytes <= 1.12 * raw.nbytes


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_damaged_factors_are_refused(name: str, bad: float) -> None:
    raw = random_blocks(name, 2, 512).reshape(-1, TYPES[BLOCKS[name]].block_bytes)
    for offset in FACTORS[name]:
        damaged = raw.copy()
        damaged[3, offset : offset + 2] = np.array([bad], np.float16).view(np.uint8)
        with pytest.raises(ValueError, match="scale"):
            decode(damaged.reshape(-1), BLOCKS[name], (2, 512))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_packing_is_a_stream_of_bits(bits: int) -> None:
    q = np.random.RandomState(bits).randint(0, 2**bits, (7, 96)).astype(np.uint8)
    packed = pack(q, bits)
    assert packed.shape == (7, 96 * bits // 32)
    assert np.array_equal(unpack(packed, bits), q)
    stream = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little").reshape(7, 96, bits)
    assert np.array_equal((stream << np.arange(bits, dtype=np.uint8)).sum(axis=2), q)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_rounding_errs_by_half_a_step(bits: int) -> None:
    w = np.random.RandomState(bits).standard_normal((9, 128)).astype(np.float32)
    q = quantize(w, bits, 64, np.float32)
    step = np.repeat(q.scales, 64, axis=1)
    assert (np.abs(dequantize(q) - w) <= step * 0.5001).all()
