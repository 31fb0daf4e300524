"""Layers that are planned dense: the same results where a method promises them, the dense model's where it does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint.quantization import quantize
from ondevice.ops.cpu import CpuOps
from ondevice.sparsity.polar import Polar
from ondevice.sparsity.settings import SparsitySettings
from ondevice_eval.evaluation import evaluate
from tests.models.running import decode_logits, make_decoder, prefill_logits
from tests.models.sparse_cases import METHODS, sparse_spec, sparse_tensors
from tests.models.sparse_running import EXACT, IDS, LENGTHS, Float64Ops, batch_logits, decoder_of, dense_twin

RELU_CATS = "cats_exact"
KIND = {name: method.kind(sparse_spec(name)) for name, (_, method) in METHODS.items()}
SAME = [name for name in METHODS if KIND[name] != "approximate"]
OTHER = [name for name in METHODS if KIND[name] == "approximate"]
FLOAT_TOLERANCE, QUANTIZED_TOLERANCE = 1e-4, 1e-2
"""Median over tokens of the RMS difference, as a part of the logits' deviation. float32 sums in another order move a
logit by 1e-6 of that, and by more where they tip a selection. With quantized weights, activations are rounded to int8:
one that lies between two steps may be rounded the other way, which later tokens then see too."""
LOSS_TOLERANCE = 1e-3


def plans(name: str, bits: int, ops: Any) -> list[Any]:
    """The model with all its layers sparse, and with all of them dense."""
    spec = spec_of(name)
    tensors: dict[str, Any] = dict(sparse_tensors(spec))
    for key, w in tensors.items() if bits else ():
        if w.ndim == 2 and key != "position.weight" and w.shape[1] % 32 == 0:
            tensors[key] = quantize(w, bits, 32)
    return [make_decoder(spec, tensors, ops(), SparsitySettings(plan=plan)) for plan in ("sparse", "dense")]


def spec_of(name: str) -> Any:
    if name != RELU_CATS:
        return sparse_spec(name)
    method = dataclasses.replace(METHODS["cats_relu"][1], thresholds=(0.0, 0.0, 0.0))
    return sparse_spec("cats_relu", sparsity=method)


def furthest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.median(np.sqrt(((a - b) ** 2).mean(axis=-1))) / b.std())


def test_the_case_of_exact_zeros_is_exact() -> None:
    assert spec_of(RELU_CATS).sparsity.kind(spec_of(RELU_CATS)) == "exact" and set(OTHER) > {"teal", "cats", "polar"}


@pytest.mark.parametrize("name", [*SAME, RELU_CATS])
def test_masked_dense_equals_sparse(name: str) -> None:
    sparse, dense = plans(name, 0, Float64Ops)
    assert np.abs(prefill_logits(sparse, IDS) - prefill_logits(dense, IDS)).max() < EXACT
    assert np.abs(batch_logits(sparse, LENGTHS) - batch_logits(dense, LENGTHS)).max() < EXACT
    a, b = (evaluate(decoder, IDS.tolist(), 20) for decoder in (sparse, dense))
    assert a.nll == pytest.approx(b.nll, abs=EXACT)
    if sparse.spec.sparsity.density(sparse.spec, 0) is None and "ffn" not in sparse.spec.sparsity.skips:
        return
    before, after = sparse.ops.counts()["ffn"], dense.ops.counts()["ffn"]
    assert before.sparse == before.calls == after.calls and after.sparse == after.bytes_skipped == 0


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", [*SAME, RELU_CATS])
def test_masked_dense_equals_sparse_on_the_cpu(name: str, bits: int) -> None:
    sparse, dense = plans(name, bits, lambda: CpuOps(2))
    tolerance = QUANTIZED_TOLERANCE if bits else FLOAT_TOLERANCE
    assert furthest(decode_logits(sparse, IDS), decode_logits(dense, IDS)) < tolerance
    assert furthest(prefill_logits(sparse, IDS), prefill_logits(dense, IDS)) < tolerance
    assert furthest(batch_logits(sparse, LENGTHS), batch_logits(dense, LENGTHS)) < tolerance
    a, b = (evaluate(decoder, IDS.tolist(), 20) for decoder in (sparse, dense))
    assert a.nll == pytest.approx(b.nll, abs=LOSS_TOLERANCE if bits else FLOAT_TOLERANCE)


@pytest.mark.parametrize("name", OTHER)
def test_approximate_methods_lose_their_selection(name: str) -> None:
    """All but heads, of which no layer is planned."""
    overrides: dict[str, Any] = {}
    method = METHODS[name][1]
    if isinstance(method, Polar):
        if method.neurons is None:
            return
        overrides["sparsity"] = Polar(method.neurons)
    decoder = decoder_of(name, SparsitySettings(plan="dense"), **overrides)
    assert np.array_equal(decode_logits(decoder, IDS), decode_logits(dense_twin(decoder), IDS))
    (kind,) = decoder.spec.sparsity.skips
    tally = decoder.ops.counts()[kind]
    assert tally.calls >= len(IDS) and tally.sparse == tally.bytes_skipped == 0
    assert decoder.plan.dense_layers(decoder.spec) == (0, 1, 2)


def test_a_mixed_plan_skips_in_its_sparse_layers_only() -> None:
    decoder = decoder_of("lte")
    mixed = dataclasses.replace(decoder.plan, limits=(1.0, 0.0, 1.0))
    assert mixed.dense_layers(decoder.spec) == (1,)


def test_polar_batches_above_the_limit_run_all_neurons(tmp_path: Any) -> None:
    """The table has 20, 30 and 96 of 96 neurons in layer 0."""
    import json

    decoder = decoder_of("polar_neurons")
    document = {**decoder.plan.document(decoder.spec), "sparse_up_to": [0.25, 1.0, 1.0]}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    planned = decoder_of("polar_neurons", SparsitySettings(plan=path))
    x = np.random.RandomState(0).standard_normal((2, 64))
    assert planned.layers[0].router(x[:1], 1).neurons is not None
    assert planned.layers[0].router(x, 2).neurons is None and decoder.layers[0].router(x, 2).neurons is not None
    assert planned.layers[1].router(x, 2).neurons is not None
    assert planned.plan.dense_layers(planned.spec) == ()
