"""Polar's routers: what they keep, how recall is found and told, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ondevice.checkpoint.quantization import Quantized, quantize
from ondevice.decoder import Decoder
from ondevice.errors import OndeviceError, OptionError
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity.polar import PolarHeads
from ondevice_convert.changed import Changed
from ondevice_convert.fit_polar import POLAR_KEYS, POLAR_PLACES, fit_polar
from ondevice_convert.fit_polar_heads import fit_heads, logistic
from ondevice_convert.fit_polar_neurons import recall_curve
from ondevice_convert.samples import Samples
from tests.converting import option, random_tokens, tiny_model, watched
from tests.tiny import tiny_spec, tiny_tensors


def polar(text):
    return option(text, "polar", POLAR_KEYS)


def fit(model, text):
    return fit_polar(*model, polar(text))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_model(tmp_path_factory.mktemp("convert"))
    return base, watched(base, POLAR_PLACES, 1000)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A relu model whose FFN reads nearly what its attention reads, and whose neurons are mostly off."""
    base = tiny_model(tmp_path_factory.mktemp("convert"), "opt")
    tensors = dict(tiny_tensors(base.spec))
    for i in range(base.spec.n_layers):
        tensors[f"layers.{i}.o.weight"] = 0.1 * tensors[f"layers.{i}.o.weight"]
        tensors[f"layers.{i}.up.bias"] -= 1.5
    changed = Changed(base, base.spec, tensors)
    return changed, watched(changed, POLAR_PLACES, 2000)


def decoded(base, fitted, batch, steps=6):
    """Counts of some steps that decode a batch."""
    changed = Changed(base, dataclasses.replace(base.spec, sparsity=fitted.method), fitted.added)
    for name, tensor in fitted.added.items():
        assert tensor.shape == changed.spec.tensors()[name]
    decoder = Decoder(changed, ReferenceOps())
    cache = decoder.new_cache(batch, steps)
    for step in range(steps):
        decoder.decode(random_tokens(base.spec, batch, step), cache, range(batch))
    return decoder.ops.counts()


def test_logistic_regression_finds_what_decides():
    random = np.random.default_rng(0)
    x = (random.standard_normal((600, 8)) * [1, 50, 1, 1, 1, 1, 1, 0] + 3).astype(np.float32)
    labels = np.stack([x[:, 1] > 3, x[:, 0] + x[:, 2] > 7], axis=1)
    weight, bias = logistic(x[:400], labels[:400])
    assert weight.dtype == bias.dtype == np.float32 and np.isfinite(weight).all()
    scores = x[400:] @ weight.T + bias
    for mine, truth in zip(scores.T, labels[400:].T):
        assert mine[truth].min() > np.quantile(mine[~truth], 0.9)
        assert np.median(mine[truth]) > 0 > np.median(mine[~truth])


def test_positives_weigh_more_where_they_are_rare():
    """Of noise, a positive counts 1 and a negative what part is positive: the bias is that of their ratio."""
    random = np.random.default_rng(0)
    x = random.standard_normal((4000, 2)).astype(np.float32)
    labels = random.random((4000, 1)) < 0.1
    _, bias = logistic(x, labels)
    part = labels.mean()
    assert bias[0] == pytest.approx(np.log(part / (part * (1 - part))), abs=0.05)


def test_heads_are_kept_and_judged(llama):
    base, _ = llama
    fitted = fit(llama, "polar:heads=0.5,unit=head,dense_layers=1")
    assert fitted.method.heads == PolarHeads(2, "head", (1,)) and fitted.method.neurons is None
    assert [(f.layer, f.what, f.unit, f.density) for f in fitted.layers] == [(0, "heads", 1, 0.5), (2, "heads", 1, 0.5)]
    assert all(0 < f.oracle_lost < f.lost < f.random_lost and 0.5 < f.recall < 1 for f in fitted.layers)
    assert "heads=0.5 of 4 heads: 2 run" in fitted.notes[0]
    tally = decoded(base, fitted, 1)["heads"]
    assert tally.kept / tally.units == 0.5 and tally.sparse == 2 * 6


def test_groups_share_a_router(llama):
    base, _ = llama
    fitted = fit(llama, "polar:heads=0.5")
    assert fitted.method.heads == PolarHeads(1, "kv_group", (0,)) and "1 run in each layer (50%)" in fitted.notes[0]
    weight, bias = (fitted.added[f"layers.2.head_router.{name}"] for name in ("weight", "bias"))
    assert np.array_equal(weight[::2], weight[1::2]) and np.array_equal(bias[::2], bias[1::2])
    assert fitted.layers[0].unit == 2 and fitted.layers[0].lost < fitted.layers[0].random_lost
    tally = decoded(base, fitted, 3)["heads"]
    assert tally.kept / tally.units == 0.5


def test_what_heads_lose_goes_through_o(llama):
    base, samples = llama
    tensors, found = fit_heads(base, samples, 1, PolarHeads(3))
    x, a = samples.of("attention", 1)[800:], samples.of("o", 1)[800:]
    scores = x @ tensors["layers.1.head_router.weight"].T + tensors["layers.1.head_router.bias"]
    idle, o = scores.argmin(axis=1), base.tensor("layers.1.o.weight")
    missing = np.stack([o[:, h * 16 : h * 16 + 16] @ row[h * 16 : h * 16 + 16] for row, h in zip(a, idle)])
    assert found.lost == pytest.approx((missing**2).sum() / ((a @ o.T) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize(("share", "kept"), [("0.1", 1), ("0.3", 1), ("0.75", 3), ("0.99", 3)])
def test_kept_heads_are_rounded_down(llama, share, kept):
    assert fit(llama, f"polar:heads={share},unit=head").method.heads.kept == kept


def test_a_single_group_cannot_be_left_out(tmp_path):
    base = tiny_model(tmp_path, n_kv_heads=1)
    with pytest.raises(OptionError, match="1 of groups of heads in a layer, which cannot be left out"):
        fit_polar(base, Samples(), polar("polar"))


def test_the_recall_curve_counts_unions():
    logits = np.array([[3, 1, -9, 0], [0, 2, -9, 1]], np.float32)
    active = np.array([[1, 0, 1, 0], [0, 1, 0, 0]], bool)
    # Alone: order 0, 1, 2 (a tie with 3, as negatives count 0), 3 with 0 and 2 wanted; then 1 first.
    np.testing.assert_allclose(recall_curve(logits, active, 1), [0.75, 0.75, 1, 1])
    # Together 3, 3, 0, 1: order 0, 1, 3, 2 with 0, 1 and 2 wanted.
    np.testing.assert_allclose(recall_curve(logits, active, 2), [1 / 3, 2 / 3, 2 / 3, 1])
    assert recall_curve(logits, np.zeros_like(active), 2).tolist() == [1, 1, 1, 1]


def test_neurons_have_the_recall_that_was_asked_for(opt):
    base, _ = opt
    fitted = fit(opt, "polar:recall=0.95,rank=48,batches=4+1,heads=1")
    neurons = fitted.method.neurons
    assert fitted.method.heads is None and neurons.rank == 48 and [size for size, _ in neurons.table] == [1, 4]
    one, four = (kept for _, kept in neurons.table)
    assert all(kept % 16 == 0 for kept in one + four) and all(a <= b for a, b in zip(one, four)) and sum(one) < 3 * 96
    for found, kept in zip(fitted.layers, one):
        assert found.recall >= 0.95 and found.what == "ffn" and found.density == kept / 96
        assert found.oracle_lost <= found.lost < 0.1 and found.lost < found.random_lost
    assert "batch 1: a recall of 0.9" in fitted.notes[0] and "of the neurons" in fitted.notes[0]
    assert any(note.startswith("batch 4: a recall of 0.9") for note in fitted.notes)
    tally = decoded(base, fitted, 1)["ffn"]
    assert tally.kept / tally.units == pytest.approx(np.mean([kept for kept in one if kept < 96]) / 96)


def test_recall_is_of_the_router_as_it_is_stored(opt):
    """On samples that were held out, with what the file will have."""
    base, samples = opt
    fitted = fit(opt, "polar:recall=0.9,rank=48,heads=1")
    x, inputs = samples.of("attention", 2)[1600:], samples.of("ffn", 2)[1600:]
    first, second = (fitted.added[f"layers.2.ffn_router.{i}.weight"] for i in (0, 1))
    assert first.dtype == base.tensor("layers.2.up.weight").dtype == np.float32
    scores = np.maximum(x @ first.T @ second.T, 0)
    active = inputs @ base.tensor("layers.2.up.weight").T + base.tensor("layers.2.up.bias") > 0
    kept = fitted.method.neurons.table[0][1][2]
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    counts = np.take_along_axis(active, chosen, axis=1).sum(axis=1), active.sum(axis=1)
    recall = np.mean([part / whole if whole else 1 for part, whole in zip(*counts)])
    assert recall == pytest.approx(fitted.layers[2].recall, abs=1e-6) and recall >= 0.9
    fewer = np.take_along_axis(active, chosen[:, : kept - 16], axis=1).sum(axis=1)
    assert np.mean([part / whole if whole else 1 for part, whole in zip(fewer, counts[1])]) < 0.9


def test_routers_of_quantized_models_are_quantized(opt):
    base, samples = opt
    up = {f"layers.{i}.up.weight": quantize(base.tensor(f"layers.{i}.up.weight"), 4, 32) for i in range(3)}
    fitted = fit_polar(Changed(base, base.spec, up), samples, polar("polar:recall=0.9,rank=32,heads=1"))
    first, second = (fitted.added[f"layers.1.ffn_router.{i}.weight"] for i in (0, 1))
    assert isinstance(first, Quantized) and first.bits == 8 and isinstance(second, Quantized)
    assert all(found.recall >= 0.9 for found in fitted.layers)
    odd = fit_polar(Changed(base, base.spec, up), samples, polar("polar:recall=0.9,rank=24,heads=1"))
    assert odd.added["layers.1.ffn_router.1.weight"].dtype == np.float16


def test_a_recall_out_of_reach_is_an_error(tmp_path):
    base = tiny_model(tmp_path, "opt")
    with pytest.raises(OndeviceError, match=r"a recall of 0\.9999 at batch 1 takes all 96 neurons in every layer"):
        fit_polar(base, watched(base, POLAR_PLACES), polar("polar:recall=0.9999,rank=2"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polar:heads=1", "heads is 1, and polar skips neurons of relu models only"),
        ("polar:rank=8", "rank is of relu models' neurons, and this one has silu"),
        ("polar:batches=1+8", "batches is of relu models' neurons"),
        ("polar:unit=neuron", "unit is 'neuron'; take one of auto, head, kv_group"),
        ("polar:dense_layers=0+3", r"dense_layers is '0\+3'; give numbers from 0 to 2"),
        ("polar:dense_layers=x", "dense_layers is 'x'"),
        ("polar:heads=0", "heads is '0'"),
    ],
)
def test_refused_options(llama, text, message):
    with pytest.raises(OptionError, match=message):
        fit(llama, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polar:heads=1,dense_layers=1", "dense_layers is of routers of heads"),
        ("polar:batches=0", "batches is '0'"),
        ("polar:batches=1+257", "give sizes up to 256"),
        ("polar:rank=65", "rank is '65'"),
        ("polar:recall=1.5", "recall is '1.5'"),
    ],
)
def test_refused_options_of_relu_models(opt, text, message):
    with pytest.raises(OptionError, match=message):
        fit(opt, text)


def test_samples_of_o_are_what_norms_are_of(llama):
    base, samples = llama
    norms = watched(base, ("heads", "o"), 1000)
    assert np.array_equal(norms.places["o"], samples.places["o"])
    whole = samples.of("o", 1).reshape(1000, base.spec.n_heads, -1)
    np.testing.assert_allclose(np.linalg.norm(whole, axis=2), norms.of("heads", 1), rtol=3e-3)
    assert isinstance(norms, Samples) and tiny_spec().n_heads == norms.of("heads", 0).shape[1]
