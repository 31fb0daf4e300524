"""Methods that skip work, on the CPU table against the reference, through tiny models."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint.quantization import Quantized, quantize
from ondevice.errors import NumericalError
from ondevice.ops.cpu import CpuOps
from tests.kernels.rounding import rounded
from tests.models.running import HalfCacheOps, decode_logits, make_decoder
from tests.models.sparse_cases import METHODS, PER_TOKEN, sparse_spec, sparse_tensors
from tests.models.sparse_running import LENGTHS, batch_logits

IDS = np.random.RandomState(7).randint(0, 96, 24)
TOLERANCE = 2e-2
"""RMS difference as a part of the logits' deviation, over a reference that rounds as the table does. Where a float32
error tips a selection or a code, single tokens differ by more, so it is the median token that counts."""


class RoundingOps(HalfCacheOps):
    """float64, but for keys and values in float16 and int8 codes of what quantized weights are multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self._coded: dict[int, Any] = {}

    def _note(self, handle: Any, matrix: Any, tensor: Any) -> Any:
        if isinstance(tensor, Quantized):
            self._coded[id(matrix)] = matrix
        return handle

    def _codes(self, x: Any, matrix: Any) -> Any:
        return rounded(x) if id(matrix) in self._coded else x

    def pack_linear(self, weights: Any, biases: Any) -> Any:
        handle = super().pack_linear(weights, biases)
        return self._note(handle, handle[0], weights[0])

    def pack_tied(self, table: Any) -> Any:
        handle = super().pack_tied(table)
        return self._note(handle, handle[1][0], table)

    def pack_ffn(self, gate: Any, up: Any, down: Any, *rest: Any) -> Any:
        handle = super().pack_ffn(gate, up, down, *rest)
        self._note(handle, handle.up, up)
        return self._note(handle, handle.down, down)

    def linear(self, x: Any, weight: Any, residual: Any = None) -> Any:
        return super().linear(self._codes(x, weight[0]), weight, residual)

    def sparse_ffn(self, x: Any, ffn: Any, selection: Any, activation: str, residual: Any = None) -> Any:
        identity = dataclasses.replace(ffn, down=np.eye(len(ffn.up)), down_bias=0.0)
        h = super().sparse_ffn(self._codes(x, ffn.up), identity, selection, activation)
        y = self._codes(h, ffn.down) @ ffn.down.T + ffn.down_bias
        return y if residual is None else y + residual


def _model(name: str, bits: int) -> tuple[Any, dict[str, Any]]:
    spec = sparse_spec(name)
    tensors: dict[str, Any] = dict(sparse_tensors(spec))
    for key, w in tensors.items() if bits else ():
        if w.ndim == 2 and key != "position.weight" and w.shape[1] % 32 == 0:
            tensors[key] = quantize(w, bits, 32)
    return spec, tensors


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("name", METHODS)
def test_decoding_equals_the_reference(name: str, bits: int) -> None:
    spec, tensors = _model(name, bits)
    ours, judge = (make_decoder(spec, tensors, ops) for ops in (CpuOps(2), RoundingOps()))
    a, b = decode_logits(ours, IDS), decode_logits(judge, IDS)
    rms = np.sqrt(((a - b) ** 2).mean(axis=1)) / b.std()
    assert np.median(rms) < TOLERANCE, rms


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", METHODS)
def test_prompts_and_ragged_batches_equal_the_reference(name: str, bits: int) -> None:
    spec, tensors = _model(name, bits)
    ours, judge = (make_decoder(spec, tensors, ops) for ops in (CpuOps(2), RoundingOps()))
    a, b = (batch_logits(decoder, LENGTHS) for decoder in (ours, judge))
    rms = np.sqrt(((a - b) ** 2).mean(axis=-1)) / b.std()
    assert np.median(rms) < TOLERANCE, rms


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_batch_equals_its_rows_to_the_bit(name: str) -> None:
    spec, tensors = _model(name, 4)
    decoder = make_decoder(spec, tensors, CpuOps(2))
    together = batch_logits(decoder, LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert np.array_equal(together[:, row : row + 1], batch_logits(decoder, [length], first=row)), row


@pytest.mark.parametrize("name", ["cats", "lte", "lte_single_neurons", "teal_gate", "d2dmoe"])
def test_each_token_counts_what_it_keeps_itself(name: str) -> None:
    spec = sparse_spec(name)
    tensors = sparse_tensors(spec)
    kept = []
    for ops in (CpuOps(2), HalfCacheOps()):
        decoder = make_decoder(spec, tensors, ops)
        cache = decoder.new_cache(1, len(IDS))
        for _ in decoder.prefill(IDS.tolist(), cache, all_logits=True):  # all in one step
            pass
        counts = decoder.ops.counts()
        kept.append({kind: (counts[kind].kept, counts[kind].units) for kind in spec.sparsity.skips})
    for kind, (mine, units) in kept[0].items():
        assert units == kept[1][kind][1] and 0 < mine < units
        assert abs(mine - kept[1][kind][0]) <= 0.01 * units


def test_a_damaged_layer_is_named() -> None:
    """By steps that run the first layers only, which must not be taken for those that decode."""
    spec = sparse_spec("polar")
    tensors = dict(sparse_tensors(spec))
    last = f"layers.{spec.n_layers - 1}.o.weight"
    tensors[last] = np.full_like(tensors[last], np.nan)
    decoder = make_decoder(spec, tensors, CpuOps(2))
    cache = decoder.new_cache(1, 64)
    with pytest.raises(NumericalError, match=f"after layer {spec.n_layers - 1}:"):
        decoder.decode([5], cache, [0])
