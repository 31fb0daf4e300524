"""tau, strict and dense from the caller down to the layers, and what is told of skipped work."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from click.testing import CliRunner

import ondevice
from ondevice.cli import cli
from ondevice.errors import OptionError, SparsityError
from ondevice.ops.base_skipping import Tally
from ondevice.sparsity.plan import Plan
from ondevice.sparsity.polar import Polar, PolarNeurons
from ondevice.sparsity.stats import sparsity_stats
from tests.conftest import TEXT, VOCAB, write_tokenizer
from tests.models.sparse_cases import sparse_spec
from tests.tiny import tiny_checkpoint, tiny_spec

ALL = Plan((1.0, 1.0, 1.0))
GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Any]:
    """Folders of sparse models that can chat, by the name of their case."""
    root, made = tmp_path_factory.mktemp("sparse"), {}
    small_table = Polar(PolarNeurons(8, ((1, (20, 30, 40)),)))
    for name, extra in (("d2dmoe", {}), ("lte", {}), ("polar", {}), ("polar_neurons", {"sparsity": small_table})):
        made[name] = tiny_checkpoint(root / name, sparse_spec(name, vocab_size=VOCAB, **extra))
        write_tokenizer(made[name])
    return made


def load(path: Any, **options: Any) -> Any:
    return ondevice.load(path, backend="reference", **options)


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli, [str(arg) for arg in args] + ["--backend", "reference"])


def test_tau_changes_how_much_runs(folders: dict[str, Any]) -> None:
    own = load(folders["d2dmoe"]).generate("Hi there", **GREEDY).stats.sparsity
    few = load(folders["d2dmoe"], tau=1.0).generate("Hi there", **GREEDY).stats.sparsity
    every = load(folders["d2dmoe"], tau=0.0).generate("Hi there", **GREEDY).stats.sparsity
    assert few.density["ffn"] == pytest.approx(1 / 3) and every.density["ffn"] == 1.0
    assert few.density["ffn"] < own.density["ffn"] < 1
    assert (own.method, own.kind, own.sparse_calls, own.router_seconds) == ("d2dmoe", "trained", 1.0, None)
    assert few.bytes_skipped > own.bytes_skipped > every.bytes_skipped == 0


def test_dense_runs_what_the_weights_alone_say(folders: dict[str, Any]) -> None:
    dense = load(folders["lte"], dense=True)
    answer = dense.generate("Hi there", **GREEDY)
    assert answer.stats.sparsity is None and dense.spec.sparsity is None
    assert answer.tokens != load(folders["lte"]).generate("Hi there", **GREEDY).tokens


def test_tau_of_models_without(folders: dict[str, Any], tiny_path: Any) -> None:
    with pytest.raises(OptionError, match=r"tau is 0\.3, but the model is dense"):
        load(tiny_path, tau=0.3)
    with pytest.raises(OptionError, match="method lte has no tau"):
        load(folders["lte"], tau=0.3)
    for tau in (-1.0, 2.0, float("nan")):
        with pytest.raises(OptionError, match="must lie between 0"):
            load(folders["d2dmoe"], tau=tau)


def test_strict_refuses_what_otherwise_falls_back_once(
    folders: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders["polar_neurons"])
    with caplog.at_level(logging.WARNING, "ondevice"):
        first, second = model.generate(["Hi there", "And you"], **GREEDY)
    assert len(caplog.records) == 1 and "batch of 2" in caplog.text
    assert first.stats.sparsity.sparse_calls == second.stats.sparsity.sparse_calls == 0.0
    strict = load(folders["polar_neurons"], strict=True)
    assert 0 < strict.generate("Hi there", **GREEDY).stats.sparsity.sparse_calls < 1
    with pytest.raises(SparsityError, match="ends at 1"):
        strict.generate(["Hi there", "And you"], **GREEDY)


def test_stats_of_a_second_answer_are_its_own(folders: dict[str, Any]) -> None:
    model = load(folders["d2dmoe"])
    first, second = (model.generate("Hi there", **GREEDY).stats.sparsity for _ in range(2))
    assert first == second


def test_generate_tells_in_json_and_on_stderr(folders: dict[str, Any]) -> None:
    args = ("generate", folders["polar"], "-p", "Hi there", "--temp", 0, "-n", 5)
    (document,) = json.loads(run(*args, "--json").stdout)
    told = document["stats"]["sparsity"]
    assert told["method"] == "polar" and told["kind"] == "approximate"
    assert 0 < told["density"]["ffn"] < 1 and told["density"]["heads"] == 0.5 and 0 < told["sparse_calls"] < 1
    assert "; polar ran " in run(*args).stderr and " % of ffn, 50 % of heads" in run(*args).stderr


def test_generate_of_a_dense_model_tells_nothing(tiny_path: Any) -> None:
    args = ("generate", tiny_path, "-p", "Hi", "-n", 2)
    (document,) = json.loads(run(*args, "--json").stdout)
    assert document["stats"]["sparsity"] is None
    assert " ran " not in run(*args).stderr


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_the_command_lines_options(
    command: str, folders: dict[str, Any], tiny_path: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(TEXT)
    rest = ["--text", tmp_path / "text", "--tokens", 20] if command == "eval" else ["-p", "Hi", "-n", 2]
    result = run(command, tiny_path, *rest, "--tau", 0.5)
    assert result.exit_code == 1 and "tau is 0.5, but the model is dense" in result.stderr
    assert run(command, folders["d2dmoe"], *rest, "--tau", 0.5, "--strict").exit_code == 0
    assert run(command, folders["lte"], *rest, "--dense").exit_code == 0
    monkeypatch.setenv("ONDEVICE_TAU", "7")
    assert "tau is 7.0" in run(command, folders["d2dmoe"], *rest).stderr


def test_eval_measures_what_decoding_computes(folders: dict[str, Any], tmp_path: Any) -> None:
    (tmp_path / "text").write_text(TEXT)
    args = ("eval", folders["polar"], "--text", tmp_path / "text", "--tokens", 30, "--json")
    result = run(*args)
    report, by_token = json.loads(result.stdout), json.loads(run(*args, "--by-token").stdout)
    assert report == by_token and "token by token" in result.stderr
    assert report["head_density"] == 0.5 and 0 < report["ffn_density"] < 1
    dense = json.loads(run(*args, "--dense").stdout)
    assert dense["nll"] != report["nll"] and dense["ffn_density"] == dense["head_density"] == 1.0
    lte = json.loads(run("eval", folders["lte"], *args[2:]).stdout)
    assert lte["nll"] == pytest.approx(json.loads(run("eval", folders["lte"], *args[2:], "--by-token").stdout)["nll"])


def test_stats_without_any_call() -> None:
    stats = sparsity_stats(sparse_spec("lte"), ALL, {}, {})
    assert stats is not None and stats.sparse_calls == 0.0 and stats.density == {}
    assert sparsity_stats(tiny_spec(), ALL, {}, {"ffn": Tally(3)}) is None


def test_stats_are_differences_of_the_methods_own_kinds() -> None:
    before = {"ffn": Tally(2, 1, 10, 100, 5), "heads": Tally(9, 9, 9, 9, 9)}
    after = {"ffn": Tally(6, 4, 40, 200, 11), "heads": Tally(99, 9, 9, 9, 9), "inputs": Tally(5, 5, 5, 5, 5)}
    stats = sparsity_stats(sparse_spec("lte"), ALL, before, after, 0.5)
    assert stats is not None and stats.router_seconds == 0.5
    assert (stats.sparse_calls, stats.density, stats.bytes_skipped) == (0.75, {"ffn": 0.3}, 6)
