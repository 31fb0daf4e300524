"""Methods that skip work, on the CPU table against the reference, through tiny models."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint.quantization import quantize
from ondevice.decoder import Decoder
from ondevice.ops.cpu import CpuOps
from ondevice.ops.reference import ReferenceOps
from tests.kernels.rounding import rounded
from tests.models.running import decode_logits, make_decoder
from tests.models.sparse_cases import METHODS, sparse_spec, sparse_tensors

IDS = np.random.RandomState(7).randint(0, 96, 24)
FLOAT, CODES = 2e-2, 0.15
"""RMS difference as a part of the logits' deviation: float16 keys and values; int8 activations beside."""


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
    ours, judge = (make_decoder(spec, tensors, ops) for ops in (CpuOps(2), ReferenceOps()))
    a, b = decode_logits(ours, IDS), decode_logits(judge, IDS)
    rms = np.sqrt(((a - b) ** 2).mean(axis=1)) / b.std()
    assert np.median(rms) < (CODES if bits else FLOAT), rms
