"""Thresholds of CATS and TEAL: they keep what was asked for, and what they lose is what is reported."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ondevice.decoder import Decoder
from ondevice.errors import OptionError
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity.threshold import Cats, Teal
from ondevice_convert.changed import Changed
from ondevice_convert.fit_threshold import (
    CATS_KEYS,
    CATS_PLACES,
    TEAL_KEYS,
    TEAL_PLACES,
    fit_cats,
    fit_cats_layers,
    fit_cats_plans,
    fit_exact,
    fit_teal,
)
from ondevice_convert.judged import judge
from ondevice_convert.neurons import Neurons
from ondevice_convert.samples import Samples
from tests.converting import ffn_inputs, option, random_tokens, tiny_model, watched


def cats_losses(base, samples, densities, first="best"):
    """Of each layer a number for each of the densities."""
    losses = {density: [] for density in densities}
    fit_cats_plans(base, samples, [], first, losses=losses)
    return [list(row) for row in zip(*losses.values())]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_model(tmp_path_factory.mktemp("convert"))
    return base, watched(base, TEAL_PLACES)


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    base = tiny_model(tmp_path_factory.mktemp("convert"), "opt")
    return base, watched(base, TEAL_PLACES)


def cats(text):
    return option(text, "cats", CATS_KEYS)


def teal(text):
    return option(text, "teal", TEAL_KEYS)


def ran(base, fitted, tokens):
    """A decoder of what was fitted, after a text."""
    changed = Changed(base, dataclasses.replace(base.spec, sparsity=fitted.method), fitted.added)
    assert changed.spec.tensors().keys() >= fitted.added.keys()
    for name, tensor in fitted.added.items():
        assert tensor.shape == changed.spec.tensors()[name]
    decoder = Decoder(changed, ReferenceOps())
    list(decoder.prefill(tokens, decoder.new_cache(1, len(tokens))))
    return decoder


@pytest.mark.parametrize("first", ["best", "gate", "up", "published"])
def test_cats_keeps_the_part_that_was_asked_for(llama, first):
    base, samples = llama
    fitted = fit_cats(base, samples, cats(f"cats:density=0.4,first={first}"))
    assert [fit.layer for fit in fitted.layers] == [0, 1, 2]
    assert fitted.method.densities == tuple(fit.density for fit in fitted.layers)
    assert fitted.method.densities == pytest.approx((0.4, 0.4, 0.4), abs=0.03)
    tally = ran(base, fitted, random_tokens(base.spec, 400)).ops.counts()["ffn"]
    assert tally.sparse == base.spec.n_layers and tally.kept / tally.units == pytest.approx(0.4, abs=0.02)


def test_cats_as_published_is_a_quantile_of_the_gate(llama):
    base, samples = llama
    fitted = fit_cats(base, samples, cats("cats:density=0.3,first=published"))
    assert fitted.method.first is None and not fitted.added
    x = samples.of("ffn", 1)
    gate, _ = Neurons.of(base, 1).factors(x[:320])
    assert fitted.method.thresholds[1] == pytest.approx(np.quantile(np.abs(gate), 0.7), rel=1e-3)


def test_cats_weighs_by_the_other_factor_and_down(llama):
    base, samples = llama
    fitted = fit_cats(base, samples, cats("cats:first=up"))
    neurons = Neurons.of(base, 2)
    gate, _ = neurons.factors(samples.of("ffn", 2)[:320])
    wanted = np.sqrt((gate**2).mean(axis=0)) * np.sqrt((neurons.down**2).sum(axis=0))
    np.testing.assert_allclose(fitted.added["layers.2.ffn_router.weight"], wanted, rtol=1e-5)


def test_best_takes_what_loses_less(llama):
    base, samples = llama
    gate, up = (fit_cats_layers(base, samples, (0.5,) * 3, first) for first in ("gate", "up"))
    best = fit_cats_layers(base, samples, (0.5,) * 3)
    losses = [cats_losses(base, samples, [0.5], first) for first in ("gate", "up")]
    for layer in range(3):
        first = "gate" if losses[0][layer] < losses[1][layer] else "up"
        assert best.method.first[layer] == first
        assert best.layers[layer] == (gate if first == "gate" else up).layers[layer]
    assert cats_losses(base, samples, [0.5]) == [list(map(min, *both)) for both in zip(*losses)]


def test_what_cats_loses_is_lost(llama):
    base, samples = llama
    fitted = fit_cats(base, samples, cats("cats:density=0.3,first=gate"))
    decoder = ran(base, fitted, random_tokens(base.spec, 8))
    x = ffn_inputs(base, 0)[320:]
    sparse, dense = (d.layers[0].ffn(x, None, None) for d in (decoder, Decoder(base, ReferenceOps())))
    fit = fitted.layers[0]
    assert fit.lost == pytest.approx(((dense - sparse) ** 2).sum() / (dense**2).sum(), rel=0.02)
    assert 0 < fit.oracle_lost < fit.lost < fit.random_lost < 1 and 0.3 < fit.recall < 1
    assert 0 < fit.oracle_share < 1


def test_cats_takes_a_density_for_each_layer(llama):
    base, samples = llama
    fitted = fit_cats_layers(base, samples, (0.2, 1, 0.7))
    assert fitted.method.thresholds[1] == 0 and fitted.method.densities[1] == 1 and fitted.layers[1].lost == 0
    assert fitted.method.densities[::2] == pytest.approx((0.2, 0.7), abs=0.04)
    curve = cats_losses(base, samples, [0.2, 0.5, 1.0])[0]
    assert curve[0] > curve[1] > curve[2] == 0


@pytest.mark.parametrize("densities", [(0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 1.1, 0.5)])
def test_cats_refuses_densities(llama, densities):
    with pytest.raises(OptionError, match="give 3 numbers above 0, up to 1"):
        fit_cats_layers(*llama, densities)


def test_refused_options(llama, opt):
    with pytest.raises(OptionError, match="first is 'down'"):
        fit_cats(*llama, cats("cats:first=down"))
    with pytest.raises(OptionError, match="density is '2'"):
        fit_teal(*llama, teal("teal:density=2"))
    with pytest.raises(OptionError, match="cats needs an FFN with a gate"):
        fit_cats(*opt, cats("cats"))
    with pytest.raises(OptionError, match=r"linears has 'gate'; this model has q\+k\+v\+o\+up\+down"):
        fit_teal(*opt, teal("teal:linears=q+gate"))
    few = Samples({"ffn": llama[1].places["ffn"][:19]})
    with pytest.raises(OptionError, match="gives 19 samples"):
        fit_cats(llama[0], few, cats("cats"))


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_teal_keeps_the_part_that_was_asked_for(request, model):
    base, samples = request.getfixturevalue(model)
    fitted = fit_teal(base, samples, teal("teal:density=0.6"))
    thresholds = dict(fitted.method.thresholds)
    assert set(thresholds) == {"q", "k", "v", "o", "up", "down"} | ({"gate"} if base.spec.gated else set())
    assert thresholds["q"] == thresholds["k"] == thresholds["v"] != thresholds["o"]
    # Half of relu's values are 0, so that of the inputs of down no more than that can lie above a threshold.
    most = 0.6 if model == "llama" else 0.55
    assert most - 0.05 < np.mean(fitted.method.densities) < 0.63
    tally = ran(base, fitted, random_tokens(base.spec, 400)).ops.counts()["inputs"]
    assert tally.kept / tally.units == pytest.approx(np.mean(fitted.method.densities), abs=0.03)


def test_teal_of_some_linears(llama):
    base, samples = llama
    fitted = fit_teal(base, samples, teal("teal:density=0.25,linears=down+o"))
    assert [name for name, _ in fitted.method.thresholds] == ["o", "down"]
    assert all(fit.what == "inputs" and fit.density == pytest.approx(0.25, abs=0.03) for fit in fitted.layers)
    only = fit_teal(base, samples, teal("teal:density=0.25,linears=o")).layers[1]
    x, weight = samples.of("o", 1)[320:], base.tensor("layers.1.o.weight")
    left = np.where(np.abs(x) > dict(fitted.method.thresholds)["o"][1], 0, x)
    assert only.lost == pytest.approx(((left @ weight.T) ** 2).sum() / ((x @ weight.T) ** 2).sum(), rel=1e-4)
    assert only.oracle_lost < only.lost < only.random_lost


def test_down_is_cut_where_gate_and_up_leave_it(llama):
    """Thresholds on gate's and up's inputs change what down reads."""
    base, samples = llama
    whole, alone = (fit_teal(base, samples, teal(f"teal:linears={names}")) for names in ("gate+up+down", "down"))
    thresholds = dict(whole.method.thresholds)
    x = samples.of("ffn", 0)[:320]
    gate, up = Neurons.of(base, 0).factors(np.where(np.abs(x) > thresholds["up"][0], x, 0))
    assert thresholds["down"][0] == pytest.approx(np.median(np.abs(gate * up)), rel=1e-3)
    assert thresholds["down"][0] != pytest.approx(dict(alone.method.thresholds)["down"][0], rel=0.01)


def test_everything_kept_loses_nothing(llama):
    fitted = fit_teal(*llama, teal("teal:density=1"))
    assert fitted.method.densities == (1, 1, 1) and not any(sum(fitted.method.thresholds[0][1:], ()))
    assert all(fit.lost == 0 and fit.recall == 1 for fit in fitted.layers)


def test_zeros_of_relu_are_exact(opt, tmp_path):
    gated = tiny_model(tmp_path, "gemma2", activation="relu")
    for base, samples, kind in ((*opt, Teal), (gated, watched(gated, CATS_PLACES), Cats)):
        fitted = fit_exact(base, samples)
        assert isinstance(fitted.method, kind) and fitted.method.kind(base.spec) == "exact" and not fitted.added
        assert fitted.method.densities == pytest.approx((0.5, 0.5, 0.5), abs=0.15)
        assert all(fit.lost == 0 and fit.recall == 1 and fit.random_lost > 0.1 for fit in fitted.layers)
        tokens = random_tokens(base.spec, 100)
        decoder, dense = ran(base, fitted, tokens), Decoder(base, ReferenceOps())
        sparse, whole = (next(d.prefill(tokens, d.new_cache(1, 100), all_logits=True)) for d in (decoder, dense))
        np.testing.assert_allclose(sparse, whole, atol=1e-9)
        name = "inputs" if kind is Teal else "ffn"
        assert all(fit.what == name for fit in fitted.layers)
        tally = decoder.ops.counts()[name]
        assert tally.kept / tally.units == pytest.approx(np.mean(fitted.method.densities), abs=0.05)


def test_models_without_zeros_have_no_exact_method(llama):
    assert fit_exact(*llama) is None


def test_kinds_of_teal(opt, llama):
    zeros = (0.0,) * 3
    assert Teal((("down", zeros),)).kind(opt[0].spec) == "exact"
    assert Teal((("down", zeros),)).kind(llama[0].spec) == "approximate"
    assert Teal((("down", (0.0, 0.1, 0.0)),)).kind(opt[0].spec) == "approximate"
    assert Teal((("up", zeros), ("down", zeros))).kind(opt[0].spec) == "approximate"


def test_a_judgement_counts_the_wanted():
    sizes = np.array([[4, 3, 2, 1], [0, 0, 5, 0]], np.float32)
    kept = np.array([[1, 0, 1, 0], [0, 0, 1, 1]], bool)
    masks = []
    fit = judge(3, kept, sizes, lambda mask: masks.append(mask) or float(mask.sum()), by_row=True)
    assert (fit.layer, fit.density, fit.recall, fit.lost, fit.oracle_lost, fit.random_lost) == (3, 0.5, 2 / 3, 4, 3, 4)
    assert masks[1].tolist() == [[True, True, False, False], [False, False, True, False]]
    assert masks[2].sum(axis=1).tolist() == [2, 2]
    assert judge(0, kept, sizes, lambda mask: float(mask.sum())).recall == 3 / 4
