"""Decoders of the sparse cases on the reference table, their dense twins, and logits of ragged batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ondevice.decoder import Decoder
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity.settings import SparsitySettings
from tests.models.running import make_decoder, prefill_into
from tests.models.sparse_cases import sparse_spec, sparse_tensors

IDS = np.random.RandomState(7).randint(0, 96, 40)
LENGTHS = (3, 1, 9, 17, 30)
EXACT = 1e-10


class Float64Ops(ReferenceOps):
    """The reference, with logits that are not rounded to float32."""

    def run(self, step: Any, cache: Any, body: Any, name: str = "logits") -> Any:
        return np.asarray(body(step))


def decoder_of(name: str, settings: SparsitySettings | None = None, **overrides: Any) -> Decoder:
    spec = sparse_spec(name, **overrides)
    return make_decoder(spec, sparse_tensors(spec), Float64Ops(), settings)


def dense_twin(decoder: Decoder, tensors: dict[str, Any] | None = None) -> Decoder:
    """The dense model with the same weights."""
    spec = dataclasses.replace(decoder.spec, sparsity=None)
    return make_decoder(spec, tensors or sparse_tensors(decoder.spec), Float64Ops())


def has_dense_twin(name: str) -> bool:
    """Whether a dense model has the same weights."""
    return not name.startswith("spark") and "attention" not in name and "fused" not in name


def inputs(decoder: Decoder, rows: int = 5, seed: int = 1) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((rows, decoder.spec.d_model))


def density(decoder: Decoder, kind: str) -> float:
    tally = decoder.ops.counts()[kind]
    return tally.kept / tally.units if tally.units else 1.0


def batch_logits(decoder: Decoder, lengths: Any, first: int = 0, steps: int = 4) -> np.ndarray:
    """Logits [steps, sequences, vocab] of ragged sequences decoded together; `first`: number of the first of them."""
    cache = decoder.new_cache(len(lengths), 64)
    for slot, length in enumerate(lengths):
        prefill_into(cache, decoder, np.roll(IDS, slot + first)[:length], slot=slot)
    rows = []
    for step in range(steps):
        tokens = [int(IDS[(step + slot + first) % len(IDS)]) for slot in range(len(lengths))]
        rows.append(decoder.decode(tokens, cache, list(range(len(lengths)))))
    return np.stack(rows)
