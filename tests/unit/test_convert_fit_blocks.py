"""LTE's and D2DMoE's routers fitted to finished tiny models, which then run on our op tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.decoder import Decoder
from ondevice.errors import OptionError
from ondevice.layer import Early
from ondevice.ops.cpu import CpuOps
from ondevice.ops.reference import ReferenceOps
from ondevice_convert import fit_d2dmoe, fit_lte
from ondevice_convert.blocks import block_norms
from ondevice_convert.changed import Changed
from ondevice_convert.fitted import Fitted
from ondevice_convert.neurons import Neurons
from ondevice_convert.samples import Samples
from tests.models.running import decode_logits, prefill_logits
from tests.unit.calibrated import calibrated, option, run

IDS = np.random.RandomState(9).randint(0, 96, 40)
ARCHITECTURES = ("llama", "gpt2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A gated model, and one without a gate and with biases."""
    return calibrated(tmp_path_factory.mktemp("calibrated") / "model", request.param)


def fit(model: Any, text: str) -> Fitted:
    name = text.partition(":")[0]
    fitting: Callable[..., Fitted] = {"lte": fit_lte.fit_lte, "d2dmoe": fit_d2dmoe.fit_d2dmoe}[name]
    return fitting(*model, option(text, {"lte": fit_lte.KEYS, "d2dmoe": fit_d2dmoe.KEYS}[name]))


@pytest.mark.parametrize("text", ["lte:density=1", "d2dmoe:tau=0", "d2dmoe:density=1"])
@pytest.mark.parametrize("order", ["model", "clustered"])
def test_all_selected_equals_dense(model: Any, text: str, order: str) -> None:
    fitted = fit(model, f"{text},block=16,steps=0,order={order}")
    dense = prefill_logits(Decoder(model[0], ReferenceOps()), IDS)
    exact = prefill_logits(run(model[0], fitted), IDS)
    assert np.abs(exact - dense).max() < 1e-5
    quick = decode_logits(run(model[0], fitted, CpuOps(1)), IDS)
    assert np.abs(quick - decode_logits(Decoder(model[0], CpuOps(1)), IDS)).max() < 1e-2
    assert fitted.method.densities == (1.0, 1.0, 1.0)
    assert all(layer.lost == 0 and layer.recall == 1 for layer in fitted.layers)
    assert bool(fitted.orders) == (order == "clustered")


@pytest.mark.parametrize("text", ["lte:density=0.5,steps=40", "d2dmoe:density=0.5,width=24,steps=40", "d2dmoe:tau=0.6"])
@pytest.mark.parametrize("order", ["model", "clustered", "cofiring"])
def test_what_a_fit_says_is_what_its_model_does(model: Any, text: str, order: str) -> None:
    fitted = fit(model, f"{text},block=16,order={order}")
    decoder, dense = run(model[0], fitted), Decoder(model[0], ReferenceOps())
    for i, told in enumerate(fitted.layers):
        x = model[1].of("ffn", i)[-200:].astype(np.float64)
        nothing = dense.layers[i].ffn(x, None, Early())
        if model[0].spec.ffn_bias:
            nothing = nothing - model[0].tensor(f"layers.{i}.down.bias")
        before = decoder.ops.counts()["ffn"]
        missing = decoder.layers[i].ffn(x, None, Early()) - dense.layers[i].ffn(x, None, Early())
        after = decoder.ops.counts()["ffn"]
        lost = (missing**2).sum() / (nothing**2).sum()
        assert abs(lost - told.lost) < 0.01
        assert abs((after.kept - before.kept) / (after.units - before.units) - told.density) < 0.01
        assert told.unit == 16 and fitted.method.densities[i] == told.density


@pytest.mark.parametrize("text", ["lte:density=0.5", "d2dmoe:density=0.5,width=32"])
def test_routers_choose_better_than_chance_at_the_wanted_density(model: Any, text: str) -> None:
    fitted = fit(model, f"{text},block=16,order=model")
    assert abs(np.mean(fitted.method.densities) - 0.5) < 0.1
    for layer in fitted.layers:
        assert layer.oracle_lost < layer.lost < layer.random_lost
        assert layer.oracle_share > 0.2 and layer.recall > 0.55
    assert all(weight.dtype == np.float16 for name, weight in fitted.added.items() if name.endswith("weight"))


def test_steps_help_or_change_nothing_on_the_samples_that_choose(model: Any) -> None:
    for name in ("lte", "d2dmoe"):
        plain, stepped = (fit(model, f"{name}:density=0.4,block=32,order=model,steps={steps}") for steps in (0, 200))
        better = sum(layer.lost for layer in stepped.layers) / sum(layer.lost for layer in plain.layers)
        assert better < 1.05


def test_each_layer_may_have_its_own_density(model: Any) -> None:
    fitted = fit_lte.fit_lte_layers(*model, [0.25, 1.0, 0.75], 16, "model", 0)
    assert fitted.method.densities[1] == 1 and fitted.layers[1].lost == 0
    assert abs(fitted.method.densities[0] - 0.25) < 0.1 < 0.2 < abs(fitted.method.densities[2] - 0.25)


def test_a_written_model_is_the_fitted_one(model: Any, tmp_path: Any) -> None:
    base = model[0]
    fitted = fit(model, "lte:density=0.5,block=16,steps=0")
    spec = dataclasses.replace(base.spec, sparsity=fitted.method)
    changed = Changed(base, spec, fitted.added, fitted.orders)
    write_checkpoint(tmp_path / "sparse", spec, ((name, changed.tensor(name)) for name in spec.tensors()))
    with open_checkpoint(tmp_path / "sparse") as written:
        assert written.spec == spec
        ours = prefill_logits(Decoder(written, ReferenceOps()), IDS)
    assert np.array_equal(ours, prefill_logits(run(base, fitted), IDS))
    assert np.abs(ours - prefill_logits(Decoder(base, ReferenceOps()), IDS)).max() > 1e-3


def test_lte_wants_the_groups_with_the_longest_outputs(model: Any) -> None:
    fitted = fit(model, "lte:density=0.5,block=32,order=model,steps=0")
    x = model[1].of("ffn", 0)
    norms = block_norms(Neurons.of(model[0], 0), x, np.arange(96).reshape(-1, 32))
    scores = x @ fitted.added["layers.0.ffn_router.weight"].astype(np.float32).T
    scores += fitted.added["layers.0.ffn_router.bias"]
    assert norms[scores > 0].mean() > 1.1 * norms[scores <= 0].mean()
    assert abs((scores[:800] > 0).mean() - 0.5) < 0.01


REFUSED = {
    "lte:block=36": r"block is 36, which does not divide a layer's neurons \(96\)",
    "lte:density=0": "density is '0'; it must be a number above 0, at most 1",
    "lte:order=random": "order is 'random'; take one of clustered, cofiring, model",
    "lte:steps=-1": "steps is '-1'; it must be a number from 0 on",
    "lte:steps=1.5": "steps is '1.5'; it must be a whole number",
    "d2dmoe:tau=0.1,density=0.5": "tau and density are both given; leave one out",
    "d2dmoe:tau=2": "tau is '2'; it must be a number from 0 on, at most 1",
    "d2dmoe:block=8": "block is 8; experts have 16 to 128 neurons, so take a divisor of 96 between these",
    "d2dmoe:width=0": "width is '0'; it must be a number above 0",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(model: Any, text: str) -> None:
    with pytest.raises(OptionError, match=REFUSED[text]):
        fit(model, text)


@pytest.mark.parametrize("name", ["lte", "d2dmoe"])
def test_too_short_a_text_is_refused(model: Any, name: str) -> None:
    few = Samples({"ffn": model[1].places["ffn"][:39]})
    with pytest.raises(OptionError, match="the text gives 39 positions, and routers need 40 or more"):
        fit((model[0], few), name)


def test_progress_reaches_the_last_layer(model: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    fit_lte.fit_lte(*model, option("lte:steps=0,order=model", fit_lte.KEYS), lambda *said: seen.append(said))
    assert seen == [(i, 3, "fitting lte") for i in range(4)]
