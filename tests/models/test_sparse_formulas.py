"""Parts of sparse layers on the reference table, against each method's formula, neuron by neuron and key by key."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from ondevice.decoder import Decoder
from ondevice.layer import Early
from ondevice.ops.base import Step
from ondevice.spec import ModelSpec
from tests.models.sparse_cases import sparse_tensors
from tests.models.sparse_running import EXACT, decoder_of, inputs

Weights = dict[str, np.ndarray]


def weights(decoder: Decoder, layer: int = 1) -> Weights:
    """Tensors of a layer in float64, by what follows the layer's number."""
    p = f"layers.{layer}."
    tensors = sparse_tensors(decoder.spec)
    return {name.removeprefix(p): w.astype(float) for name, w in tensors.items() if name.startswith(p)}


def act(x: float, kind: str) -> float:
    match kind:
        case "silu":
            return x / (1 + math.exp(-x))
        case "gelu":
            return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
        case "gelu_tanh":
            return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    return max(x, 0.0)


def output(w: Weights, name: str, n: int, x: np.ndarray) -> float:
    """One output of a linear."""
    bias = w.get(f"{name}.bias")
    return float(w[f"{name}.weight"][n] @ x) + (0.0 if bias is None else float(bias[n]))


def neuron(w: Weights, spec: ModelSpec, n: int, x: np.ndarray) -> np.ndarray:
    """What one neuron adds to the residual stream."""
    up = output(w, "up", n, x)
    h = act(output(w, "gate", n, x), spec.activation) * up if spec.gated else act(up, spec.activation)
    return h * w["down.weight"][:, n]


def ffn_of(decoder: Decoder, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """What layer 1's FFN gives with a residual, and that residual."""
    residual = inputs(decoder, len(x), seed=2)
    return decoder.layers[1].ffn(x, residual, Early()), residual


@pytest.mark.parametrize("name", ["lte", "lte_single_neurons", "lte_post_norms", "lte_bias"])
def test_lte(name: str) -> None:
    decoder = decoder_of(name)
    spec, w, method, x = decoder.spec, weights(decoder), decoder.spec.sparsity, inputs(decoder)
    got, wanted = ffn_of(decoder, x)
    skipped = 0
    for token, row in enumerate(x):
        for n in range(spec.d_ff):
            if 1 / (1 + math.exp(-output(w, "ffn_router", n // method.block, row))) > method.threshold:
                wanted[token] += neuron(w, spec, n, row)
            else:
                skipped += 1
        wanted[token] += w.get("down.bias", 0.0)
    assert np.abs(got - wanted).max() < EXACT
    assert 0 < skipped < spec.d_ff * len(x)


def norms(w: Weights, router: str, x: np.ndarray) -> np.ndarray:
    """What a D2DMoE router predicts."""
    hidden = [max(output(w, f"{router}.0", n, x), 0.0) for n in range(len(w[f"{router}.0.weight"]))]
    return np.array([abs(float(row @ hidden)) for row in w[f"{router}.1.weight"]])


@pytest.mark.parametrize("name", ["d2dmoe", "d2dmoe_attention", "d2dmoe_fused"])
def test_d2dmoe(name: str) -> None:
    decoder = decoder_of(name)
    spec, w, method, x = decoder.spec, weights(decoder), decoder.spec.sparsity, inputs(decoder)
    got, wanted = ffn_of(decoder, x)
    counts = set()
    for token, row in enumerate(x):
        r = norms(w, "ffn_router", row)
        run = r >= method.tau * r.max()
        counts.add(int(run.sum()))
        wanted[token] += sum(neuron(w, spec, n, row) for n in range(spec.d_ff) if run[n // method.block])
    assert np.abs(got - wanted).max() < EXACT
    assert len(counts) > 1


@pytest.mark.parametrize("name", ["d2dmoe_attention", "d2dmoe_fused"])
def test_d2dmoe_projections(name: str) -> None:
    decoder = decoder_of(name)
    w, method, x = weights(decoder), decoder.spec.sparsity, inputs(decoder)
    own = method.attention
    got = [*decoder.layers[1].qkv(x), decoder.layers[1].o(x, x)]
    for letter, result in zip("qkvo", got):
        for token, row in enumerate(x):
            r = norms(w, f"{letter}.router", row)
            wanted = w.get(f"{letter}.down.bias", 0.0) + (row if letter == "o" else 0.0)
            for n in range(own.neurons):
                if r[n // own.block] >= method.tau * r.max():
                    h = act(output(w, f"{letter}.up", n, row), own.activation)
                    wanted = wanted + h * w[f"{letter}.down.weight"][:, n]
            assert np.abs(result[token] - wanted).max() < EXACT


@pytest.mark.parametrize("name", ["spark", "spark_ffn"])
def test_spark_ffn(name: str) -> None:
    decoder = decoder_of(name)
    spec, w, x = decoder.spec, weights(decoder), inputs(decoder)
    part = spec.sparsity.neurons
    got, wanted = ffn_of(decoder, x)
    for token, row in enumerate(x):
        scores = np.array([output(w, "gate", n, row[: part.r]) for n in range(spec.d_ff)])
        deviation = math.sqrt(((scores - scores.mean()) ** 2).mean())
        border = scores.mean() + deviation * NormalDist().inv_cdf(1 - part.k / spec.d_ff)
        kept = [n for n in range(spec.d_ff) if scores[n] > border]
        assert 0 < len(kept) < 3 * part.k
        for n in kept:
            h = act(scores[n] - border, spec.activation) * output(w, "up", n, row[part.r :])
            wanted[token] += h * w["down.weight"][:, n]
    assert np.abs(got - wanted).max() < EXACT


@pytest.mark.parametrize(("name", "layer"), [("spark", 1), ("spark_attention", 1), ("spark_attention", 2)])
def test_spark_attention(name: str, layer: int) -> None:
    decoder = decoder_of(name)
    spec, part, random = decoder.spec, decoder.spec.sparsity.keys, np.random.RandomState(5)
    lengths = (1, part.k, part.k + 1, 30)
    cache, keys, values = decoder.new_cache(len(lengths), 64), {}, {}
    for slot, length in enumerate(lengths):
        cache.reserve(slot, length)
        keys[slot], values[slot] = random.standard_normal((2, length, spec.n_kv_heads, spec.head_dim))
        step = Step(np.zeros(length, int), np.arange(length), np.full(length, slot), np.arange(1))
        decoder.ops.append(cache, layer, keys[slot], values[slot], step)
    slots, positions = np.array([0, 1, 2, 3, 3]), np.array([0, part.k - 1, part.k, 29, 11])
    q = random.standard_normal((5, spec.n_heads * spec.head_dim))
    got = decoder.layers[layer].attend(q, cache, Step(slots, positions, slots, slots), None)
    for token, (slot, position) in enumerate(zip(slots, positions)):
        first = max(0, position + 1 - spec.windows[layer]) if spec.windows[layer] else 0
        for head in range(spec.n_heads):
            own = q[token, head * spec.head_dim : (head + 1) * spec.head_dim]
            k = keys[slot][first : position + 1, head // spec.group]
            v = values[slot][first : position + 1, head // spec.group]
            wanted = spark_head(own, k, v, part.r, part.k, spec.attention_scale)
            assert np.abs(got[token].reshape(spec.n_heads, -1)[head] - wanted).max() < EXACT


def spark_head(q: np.ndarray, keys: np.ndarray, values: np.ndarray, r: int, k: int, scale: float) -> np.ndarray:
    """One query of Spark's attention over the keys it sees."""
    scores = [scale * float(key[:r] @ q[:r]) for key in keys]
    border = -math.inf
    if len(keys) > k:
        mean = sum(scores) / len(scores)
        deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / len(scores))
        border = min(mean + deviation * NormalDist().inv_cdf(1 - k / len(keys)), max(scores) - 1e-300)
    kept = [i for i, s in enumerate(scores) if s > border or s == max(scores)]
    assert len(kept) < len(keys) or len(keys) <= k
    total = sum(math.exp(scores[i]) for i in kept)
    second = [math.log1p(math.exp(scale * float(keys[i][r:] @ q[r:]))) for i in kept]
    return sum(math.exp(scores[i]) / total * weight * values[i] for i, weight in zip(kept, second))


def test_spark_rotates_each_half_of_a_head() -> None:
    decoder = decoder_of("spark")
    spec, seen, random = decoder.spec, [], np.random.RandomState(3)
    given = [random.standard_normal((1, heads * spec.head_dim)) for heads in (4, 2, 2)]

    def attend(q: np.ndarray, cache: Any, step: Any, heads: Any) -> np.ndarray:
        seen.append((q, cache.pages[0][0, cache.block_table[0, 0], 5]))
        return q

    decoder.layers[0] = dataclasses.replace(decoder.layers[0], qkv=lambda x: given, attend=attend)
    cache = decoder.new_cache(1, 64)
    for token in range(6):
        decoder.decode([token], cache, [0])
    for got, plain in zip((seen[-1][0].reshape(-1, 8), seen[-1][1].reshape(-1, 8)), given):
        for part, before in zip(got, plain.reshape(-1, 8)):
            for i in range(4):
                turn = np.exp(5j * 10000.0 ** (-2 * i / 8)) * complex(before[i], before[i + 4])
                assert abs(complex(part[i], part[i + 4]) - turn) < EXACT


def thresholded(w: Weights, name: str, x: np.ndarray, threshold: float) -> np.ndarray:
    """A linear on the inputs that are larger than a threshold."""
    large = np.array([value if abs(value) > threshold else 0.0 for value in x])
    return np.array([output(w, name, n, large) for n in range(len(w[f"{name}.weight"]))])


@pytest.mark.parametrize("name", ["teal", "teal_each", "teal_gate"])
def test_teal(name: str) -> None:
    decoder = decoder_of(name)
    spec, w, x = decoder.spec, weights(decoder), inputs(decoder)
    at = {linear: values[1] for linear, values in spec.sparsity.thresholds}
    got = [*decoder.layers[1].qkv(x), decoder.layers[1].o(x, None)]
    for letter, result in zip("qkvo", got):
        wanted = np.array([thresholded(w, letter, row, at.get(letter, -1.0)) for row in x])
        assert np.abs(result - wanted).max() < EXACT
    got_ffn, wanted_ffn = ffn_of(decoder, x)
    for token, row in enumerate(x):
        h = thresholded(w, "up", row, at.get("up", -1.0))
        if spec.gated:
            h = h * [act(value, spec.activation) for value in thresholded(w, "gate", row, at.get("gate", -1.0))]
        else:
            h = np.array([act(value, spec.activation) for value in h])
        wanted_ffn[token] += thresholded(w, "down", h, at.get("down", -1.0))
    assert np.abs(got_ffn - wanted_ffn).max() < EXACT


@pytest.mark.parametrize("name", ["cats", "cats_up", "cats_gate", "cats_relu"])
def test_cats(name: str) -> None:
    decoder = decoder_of(name)
    spec, w, x = decoder.spec, weights(decoder), inputs(decoder)
    got, wanted = ffn_of(decoder, x)
    for token, row in enumerate(x):
        for n in range(spec.d_ff):
            gate, up = act(output(w, "gate", n, row), spec.activation), output(w, "up", n, row)
            size = abs(up if name == "cats_up" else gate)
            if spec.sparsity.first is not None:
                size *= w["ffn_router.weight"][n]
            if size > spec.sparsity.thresholds[1]:
                wanted[token] += gate * up * w["down.weight"][:, n]
    assert np.abs(got - wanted).max() < EXACT
    tally = decoder.ops.counts()["ffn"]
    assert 0.2 < tally.kept / tally.units < 0.8
