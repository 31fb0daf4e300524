"""Plans: how they are decided, written and read, and what is measured for them."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import ondevice
from ondevice.cli import cli
from ondevice.errors import CheckpointError, OptionError
from ondevice.ops.cpu import CpuOps
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity import break_even, measurements
from ondevice.sparsity.break_even import BreakEvens, crossing, unbiased
from ondevice.sparsity.lte import Lte
from ondevice.sparsity.plan import Plan, make_plan
from ondevice.sparsity.settings import SparsitySettings
from tests.conftest import TEXT, VOCAB, write_tokenizer
from tests.models.sparse_cases import METHODS, sparse_spec, sparse_tensors
from tests.tiny import tiny_checkpoint, tiny_spec

THREE = (0.3, 0.5, 0.7)


def refuse(layer: int) -> float:
    raise AssertionError(f"layer {layer} was measured")


def lte(densities: Any = THREE) -> Any:
    return sparse_spec("lte", sparsity=Lte(densities=densities))


def test_auto_compares_each_layers_density_with_its_break_even() -> None:
    plan = make_plan("auto", lte(), [0.3, 0.49, 0.9].__getitem__)
    assert plan.limits == (0.3, 0.49, 0.9) and plan.dense_layers(lte()) == (1,)


def test_auto_measures_only_where_a_density_is_known_and_below_1() -> None:
    assert make_plan("auto", lte(None), refuse).limits == (1.0, 1.0, 1.0)
    assert make_plan("auto", lte((1.0, 1.0, 1.0)), refuse).limits == (0.0, 0.0, 0.0)
    assert make_plan("auto", tiny_spec(), refuse).dense_layers(tiny_spec()) == ()


def test_forced_plans_measure_nothing() -> None:
    sparse, dense = (make_plan(choice, lte((1.0, 1.0, 1.0)), refuse) for choice in ("sparse", "dense"))
    assert sparse.dense_layers(lte()) == () and dense.dense_layers(lte()) == (0, 1, 2)
    assert not dense.sparse(0, None) and sparse.sparse(0, None) and Plan((0.4,)).sparse(0, None)


def test_densities_of_the_methods() -> None:
    found = {name: sparse_spec(name).sparsity.density(sparse_spec(name), 0) for name in METHODS}
    assert found["polar"] == 20 / 96 and found["spark"] == 12 / 96 and found["polar_heads"] is None
    assert found["teal"] is found["cats"] is found["lte"] is found["spark_attention"] is None
    assert Lte(densities=THREE).density(lte(), 2) == 0.7


def test_another_tau_has_no_known_density() -> None:
    method = dataclasses.replace(METHODS["d2dmoe"][1], densities=THREE)
    assert method.with_tau(0.2).densities is None


def test_files_are_read_back(tmp_path: Any) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(Plan(THREE).document(lte())))
    assert make_plan(path, lte(), refuse) == make_plan(str(path), lte(), refuse) == Plan(THREE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "spark"}, "method is 'spark', the model's is 'lte': it is another model's"),
        ({"d_ff": 128}, "d_ff is 128, the model's is 96"),
        ({"n_layers": 4}, "n_layers is 4, the model's is 3"),
        ({"d_model": None}, "d_model: is missing"),
        ({"sparse_up_to": [0.1, 0.2]}, "sparse_up_to: must be a list of 3 numbers"),
        ({"sparse_up_to": [0.1, -0.2, 1]}, "sparse_up_to: must hold positive finite numbers or 0"),
        ({"sparse_up_to": [0.1, 7, 1]}, "sparse_up_to: 7 is no density; give numbers from 0, dense, to 1"),
        ({"sparse_upto": [1, 1, 1]}, "sparse_upto: is unknown here"),
    ],
)
def test_files_of_other_models_and_damaged_ones_are_refused(tmp_path: Any, change: Any, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**Plan(THREE).document(lte()), **change}))
    with pytest.raises((OptionError, CheckpointError), match=rf"plan\.json: {message}"):
        make_plan(path, lte(), refuse)


@pytest.mark.parametrize("text", ["", "[1]", "{", "3"])
def test_files_that_are_no_plans_are_refused(tmp_path: Any, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(OptionError, match=r"plan\.json': no JSON"):
        make_plan(path, lte(), refuse)
    with pytest.raises(OptionError, match=r"plan 'spars': No such file.*; give auto, sparse, dense or a file"):
        make_plan("spars", lte(), refuse)
    with pytest.raises(OptionError, match=f"plan '{tmp_path}': Is a directory"):
        make_plan(tmp_path, lte(), refuse)


def test_where_ratios_cross_the_margin() -> None:
    assert crossing({0.1: 0.5, 0.5: 0.9, 1.0: 0.97}, 0.97) == 1.0
    assert crossing({0.1: 0.98, 0.5: 0.5, 1.0: 0.5}, 0.97) == 0.0
    assert crossing({0.1: 0.47, 0.6: 1.47, 1.0: 0.9}, 0.97) == pytest.approx(0.35)


def test_keeping_everything_is_no_faster_than_dense() -> None:
    assert unbiased({0.5: 0.72, 1.0: 0.9}) == pytest.approx({0.5: 0.8, 1.0: 1.0})
    assert unbiased({0.5: 0.72, 1.0: 1.2}) == {0.5: 0.72, 1.0: 1.2}


def test_what_loses_its_selection_must_be_worth_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """4 % are enough where both forms give the same result, but not where the dense one is more exact."""
    monkeypatch.setattr(measurements, "folder", lambda: tmp_path)
    monkeypatch.setitem(RATIOS, 0.5, 0.96)
    found, _ = break_evens(monkeypatch)
    assert found.of_layer(0) == pytest.approx(0.625)
    cats = dataclasses.replace(METHODS["cats"][1], densities=THREE)
    found, _ = break_evens(monkeypatch, spec=sparse_spec("cats", sparsity=cats))
    assert found.of_layer(0) == pytest.approx(0.4913, abs=1e-3)


RATIOS = {0.1: 0.5, 0.5: 0.94, 1.0: 1.0}


def break_evens(monkeypatch: pytest.MonkeyPatch, threads: int = 2, spec: Any = None, ops: Any = None) -> Any:
    """BreakEvens of a model whose layer 2 has another format, and what was measured: a list that grows."""
    spec, calls = spec or lte(), []
    monkeypatch.setattr(BreakEvens, "_measure", lambda self, table, layers: calls.append(layers) or dict(RATIOS))
    checkpoint: Any = SimpleNamespace(spec=spec, stored=lambda name: ("F16" if "layers.2.up" in name else "F32", 100))
    return BreakEvens(checkpoint, ops or CpuOps(threads), spec, SparsitySettings(), None), calls


def test_layers_alike_are_measured_once_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(measurements, "folder", lambda: tmp_path / "cache")
    first, calls = break_evens(monkeypatch)
    assert [first.of_layer(i) for i in range(3)] == [pytest.approx(0.75)] * 3 and calls == [[0, 1], [2]]
    assert measurements.count() == 2 and not list((tmp_path / "cache").glob(".tmp-*"))
    again, calls = break_evens(monkeypatch, spec=lte((0.9, 0.9, 0.9)))
    assert again.of_layer(1) == pytest.approx(0.75) and calls == []
    for other in ({"threads": 1}, {"spec": sparse_spec("lte", sparsity=Lte(8, densities=THREE))}):
        fresh, calls = break_evens(monkeypatch, **other)
        assert fresh.of_layer(0) == pytest.approx(0.75) and calls == [[0, 1]]
    measurements.clear()
    assert measurements.count() == 0


@pytest.mark.parametrize("text", ["", "{}", '{"ratios": {}}', '{"ratios": {"0.1": NaN}}', '{"ratios": [3]}', "[]"])
def test_damaged_measurements_are_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, text: str) -> None:
    monkeypatch.setattr(measurements, "folder", lambda: tmp_path)
    break_evens(monkeypatch)[0].of_layer(0)
    (path,) = tmp_path.glob("*.json")
    path.write_text(text)
    again, calls = break_evens(monkeypatch)
    assert again.of_layer(0) == pytest.approx(0.75) and calls == [[0, 1]] and json.loads(path.read_text())["ratios"]


def test_a_cache_that_cannot_be_written_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measurements, "folder", lambda: tmp_path / "file" / "cache")
    assert break_evens(monkeypatch)[0].of_layer(0) == pytest.approx(0.75)
    assert "cannot be written" in caplog.text and "XDG_CACHE_HOME" in caplog.text


def test_the_reference_always_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    found, calls = break_evens(monkeypatch, ops=ReferenceOps())
    assert found.of_layer(0) == 1.0 and calls == []


@pytest.mark.parametrize("name", ["spark", "polar", "lte", "teal", "d2dmoe_attention"])
def test_what_is_measured_runs_and_leaves_the_table_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "ROUNDS", (1, 1))
    spec = sparse_spec(name)
    if spec.sparsity.density(spec, 0) is None:
        spec = dataclasses.replace(spec, sparsity=dataclasses.replace(spec.sparsity, densities=THREE))
    tensors, told, table = sparse_tensors(spec), [], CpuOps(2)
    checkpoint: Any = SimpleNamespace(
        spec=spec, tensor=tensors.__getitem__, release=lambda name: None, stored=lambda name: ("F32", 100)
    )
    trials = BreakEvens(checkpoint, table, spec, SparsitySettings(), lambda *report: told.append(report[2]))
    ratios = trials._measure(CpuOps(2), [0, 2])
    assert list(ratios) == list(break_even.DENSITIES) and all(ratio > 0 for ratio in ratios.values())
    assert "measuring where skipping is faster, once for this machine" in told
    assert all(tally.calls == 0 for tally in table.counts().values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    made = tiny_checkpoint(tmp_path_factory.mktemp("plan") / "lte", sparse_spec("lte", vocab_size=VOCAB))
    write_tokenizer(made)
    return made


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli, [*map(str, args), "--backend", "reference"])


def test_generate_tells_the_plan_in_the_form_that_it_takes(folder: Any, tmp_path: Any) -> None:
    args = ("generate", folder, "-p", "Hi", "-n", 4, "--temp", 0, "--json")
    (own,), (dense,) = (json.loads(run(*args, *more).stdout) for more in ((), ("--plan", "dense")))
    assert own["tokens"] == dense["tokens"]
    assert own["stats"]["sparsity"]["dense_layers"] == [] and own["stats"]["sparsity"]["sparse_calls"] == 1.0
    told = dense["stats"]["sparsity"]
    assert told["dense_layers"] == [0, 1, 2] and told["sparse_calls"] == told["bytes_skipped"] == 0
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**told["plan"], "sparse_up_to": [1, 0, 1]}))
    (mixed,) = json.loads(run(*args, "--plan", path).stdout)
    assert mixed["stats"]["sparsity"]["dense_layers"] == [1] and mixed["tokens"] == own["tokens"]
    assert mixed["stats"]["sparsity"]["sparse_calls"] == pytest.approx(2 / 3)


def test_eval_is_equal_under_both_plans(folder: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text(TEXT)
    args = ("eval", folder, "--text", tmp_path / "text", "--tokens", 60, "--window", 20, "--json")
    sparse = json.loads(run(*args, "--plan", "sparse").stdout)
    monkeypatch.setenv("ONDEVICE_PLAN", "dense")
    dense = json.loads(run(*args).stdout)
    assert dense["nll"] == pytest.approx(sparse["nll"], abs=1e-6) and sparse["ffn_density"] < dense["ffn_density"] == 1


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_an_unknown_plan_is_refused(command: str, folder: Any, tmp_path: Any) -> None:
    (tmp_path / "text").write_text(TEXT)
    rest = ["--text", tmp_path / "text", "--tokens", 20] if command == "eval" else ["-p", "Hi", "-n", 2]
    result = run(command, folder, *rest, "--plan", "best")
    assert result.exit_code == 1 and "plan 'best': No such file" in result.stderr


def test_load_takes_plans(folder: Any) -> None:
    assert ondevice.load(folder, backend="reference", plan="dense").decoder.plan.limits == (0.0, 0.0, 0.0)
