from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.quantization import dequantize, quantize
from ondevice.decoder import Decoder
from ondevice.errors import OptionError
from ondevice.ops.reference import ReferenceOps
from ondevice_convert.changed import Changed
from ondevice_convert.forms import matrices, usual_group
from ondevice_convert.recipe import group_for, make_recipe
from ondevice_convert.requantized import Requantized
from ondevice_convert.samples import gather
from ondevice_convert.sensitivity import PLACES, Sensitivity, Unit, measure_sensitivity
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_gguf, tiny_spec, tiny_tensors

IDS = np.random.RandomState(5).randint(0, 96, 64).tolist()


def model(folder, architecture="llama", **sizes):
    spec = tiny_spec(architecture, **sizes)
    return open_checkpoint(tiny_checkpoint(folder / f"m-{architecture}", spec))


def sampled(source):
    return gather(Decoder(source, ReferenceOps()), IDS, PLACES, 1000)


def test_one_width_for_all(tmp_path):
    source = model(tmp_path)
    recipe = make_recipe(source, 4.0)
    assert recipe.forms == dict.fromkeys(matrices(source.spec), (4, 32)) and recipe.average_bits == 4
    weights = sum(prod(shape) for shape in source.spec.tensors().values() if len(shape) == 2)
    assert recipe.describe()["forms"] == {"4-bit g32": {"tensors": 3 * 7 + 2, "weights": weights}}
    assert len(Requantized(source, recipe.forms).measured()) == 23


def test_without_bits_everything_is_kept(tmp_path):
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", types={"layers.0.q.weight": "Q4_1"}))
    recipe = make_recipe(source, None)
    assert set(recipe.forms.values()) == {"keep"} and not Requantized(source, recipe.forms).measured()
    assert recipe.code_bits["layers.0.q.weight"] == 4 and recipe.code_bits["layers.0.k.weight"] == 32
    assert recipe.describe()["forms"].keys() == {"kept, 4-bit", "kept, 32-bit"}


def test_what_has_fewer_bits_is_kept_and_said(tmp_path):
    kinds = {"layers.0.q.weight": "Q4_1", "layers.1.q.weight": "Q8_0", "layers.2.q.weight": "Q5_0"}
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", types=kinds))
    recipe = make_recipe(source, 5)
    assert [recipe.forms[name] for name in kinds] == ["keep", (5, 32), "keep"]
    assert recipe.describe()["notes"] == ["1 matrices have fewer bits than were wanted already, and are kept"]


def test_the_group_size_is_the_sources_or_64_or_what_fits(tmp_path):
    wide = {"d_ff": 128}
    floats = model(tmp_path, **wide)
    assert usual_group(floats) is None and group_for(floats, 4) == 64 and group_for(floats, 4, 32) == 32
    gguf = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", tiny_spec(**wide), types="Q4_1"))
    assert usual_group(gguf) == 32 and group_for(gguf, 4) == 32 and group_for(gguf, 4, 64) == 64
    assert group_for(model(tmp_path, "qwen2"), 4) == 32


@pytest.mark.parametrize(
    ("bits", "group_size", "problem"),
    [
        (3, None, r"bits 3: choose from \(4, 5, 6, 8\)"),
        (8.5, None, "bits 8.5"),
        (float("nan"), None, "bits nan"),
        (float("inf"), None, "bits inf"),
        (4, 128, r"group size 128: this model can have 32, since it has d_model=64, .*d_ff=96"),
        (4, 64, "group size 64"),
        (4, 0, "group size 0"),
        (None, 32, "group size 32 without bits"),
        (4.5, None, "bits 4.5: needs a measurement"),
    ],
)
def test_what_cannot_be_had(tmp_path, bits, group_size, problem):
    with pytest.raises(OptionError, match=problem):
        make_recipe(model(tmp_path), bits, group_size)


def test_models_that_cannot_be_rounded(tmp_path):
    with pytest.raises(OptionError, match=r"gpt2 folders hold matrices as \[in, out\]"):
        make_recipe(model(tmp_path, "gpt2"), 4)
    with pytest.raises(OptionError, match=r"no group size .* divides .*d_ff=72"):
        make_recipe(model(tmp_path, d_ff=72), 4)


def unit(name, *costs, weights=100):
    bits = (4, 5, 6, 8)
    return Unit((name,), dict(zip(bits, costs)), {b: (b + 1) * weights for b in bits})


def test_bits_go_where_they_help_most():
    units = (unit("a", 8, 2, 1, 0), unit("b", 9, 8, 7, 0), unit("c", 1, 0, 0, 0), unit("d", 5, 0, 0, 0, weights=1000))
    costs = Sensitivity(units, 1300, 32)
    assert costs.choose(4) == {"a": 4, "b": 4, "c": 4, "d": 4}
    assert costs.choose(4 + 100 / 1300) == {"a": 5, "b": 4, "c": 4, "d": 4}
    assert costs.choose(4 + 500 / 1300) == {"a": 5, "b": 8, "c": 4, "d": 4}
    assert costs.choose(4 + 700 / 1300) == {"a": 6, "b": 8, "c": 5, "d": 4}
    assert costs.choose(8) == {"a": 8, "b": 8, "c": 5, "d": 5}  # more would take nothing away


def exact_error(source, name, inputs, bits):
    w = dequantize(source.tensor(name), np.float64)
    off = dequantize(quantize(w, bits, 32), np.float64) - w
    return np.square(inputs @ off.T).sum() / np.square(inputs @ w.T).sum()


def test_costs_are_errors_of_outputs(tmp_path):
    """Against sums over the whole stream: with few rows and no post norms the estimate sees everything."""
    source = model(tmp_path, n_layers=1)
    samples = sampled(source)
    costs = {u.names: u for u in measure_sensitivity(source, samples, 32).units}
    attention, ffn, spec = samples.of("attention", 0), samples.of("ffn", 0), source.spec
    names = ["gate", "up", "down", "o", "embed"]
    read = {n: dequantize(source.tensor(("" if n == "embed" else "layers.0.") + n + ".weight")) for n in names}
    gate, h = ffn @ read["gate"].T, ffn @ read["up"].T
    h = gate / (1 + np.exp(-gate)) * h
    moments = np.repeat(np.square(samples.of("heads", 0)).mean(0) / spec.head_dim, spec.head_dim)
    stream = np.square(read["embed"]).sum() / 96
    for branch, inputs, names in (
        ((np.square(read["o"]) @ moments).sum(), attention, "qkv"),
        (np.square(h @ read["down"].T).sum() / len(h), ffn, ("gate", "up")),
        (np.square(h @ read["down"].T).sum() / len(h), h, ("down",)),
    ):
        names = tuple(f"layers.0.{name}.weight" for name in names)
        stream += branch if "down" not in names[0] else 0
        for bits in (4, 5, 6, 8):
            wanted = sum(exact_error(source, name, inputs, bits) for name in names) * branch / stream
            assert np.isclose(costs[names].costs[bits], wanted, rtol=0.02)
    off = dequantize(quantize(read["o"], 4, 32)) - read["o"]
    branch = (np.square(read["o"]) @ moments).sum()
    share = branch / (np.square(read["embed"]).sum() / 96 + branch)
    wanted = share * (np.square(off) @ moments).sum() / branch
    assert np.isclose(costs["layers.0.o.weight",].costs[4], wanted, rtol=1e-3)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "gpt2"])
def test_mixed_recipes(tmp_path, architecture):
    source = model(tmp_path, architecture)
    calls = []
    costs = measure_sensitivity(source, sampled(source), 32, lambda *call: calls.append(call[:2]))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert {name for u in costs.units for name in u.names} == matrices(source.spec).keys()
    for u in costs.units:
        assert u.costs[4] > 2 * u.costs[5] > 4 * u.costs[6] > 16 * u.costs[8] > 0
    for bits in (4.5, 5, 7):
        recipe = make_recipe(source, bits, 32, costs)
        assert bits - 0.5 < recipe.average_bits <= bits
        for layer in range(3):
            assert len({recipe.forms[f"layers.{layer}.{name}.weight"] for name in "qkv"}) == 1
        assert Requantized(source, recipe.forms).measured().keys() == matrices(source.spec).keys()
    mixed = make_recipe(source, 7, 32, costs)
    assert "7 bits on average were asked for" in mixed.notes[0]
    with pytest.raises(OptionError, match="measured for groups of 32"):
        measured = Sensitivity(costs.units, costs.weights, 32)
        make_recipe(model(tmp_path / "wide", d_ff=128), 4.5, 64, measured)


def test_rounded_sources_cost_nothing_where_they_are_kept(tmp_path):
    kinds = {name: "Q4_1" for name in matrices(tiny_spec()) if ".q." in name}
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", types={**kinds, "layers.0.v.weight": "Q5_1"}))
    costs = {u.names: u for u in measure_sensitivity(source, sampled(source), 32).units}
    qkv = costs[tuple(f"layers.0.{name}.weight" for name in "qkv")]
    weights = matrices(source.spec)
    assert qkv.sizes[8] == 5 * weights["layers.0.q.weight"] + (9 + 6) * weights["layers.0.k.weight"]
    assert qkv.costs[4] > 0 and qkv.costs[8] > 0


def test_a_larger_stream_makes_branches_cost_less(tmp_path):
    source, costs = model(tmp_path, "gemma2"), []
    samples = sampled(source)
    for scale in (2.0, 20.0):
        changed = Changed(source, replace(source.spec, embedding_scale=scale))
        units = measure_sensitivity(changed, samples, 32).units
        costs.append({u.names[0]: u.costs[4] for u in units})
    assert costs[0]["embed.weight"] == costs[1]["embed.weight"]
    assert costs[0]["layers.2.down.weight"] > 1.5 * costs[1]["layers.2.down.weight"]


def test_a_larger_branch_costs_more(tmp_path):
    tensors = tiny_tensors(tiny_spec())
    tensors["layers.1.down.weight"] *= 4
    source = open_checkpoint(tiny_checkpoint(tmp_path / "m", tensors=tensors))
    costs = {u.names[0]: u.costs[4] for u in measure_sensitivity(source, sampled(source), 32).units}
    assert costs["layers.1.down.weight"] > 2 * costs["layers.0.down.weight"]
    assert costs["layers.1.gate.weight"] > 2 * costs["layers.0.gate.weight"]
