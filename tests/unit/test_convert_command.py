"""`ondevice convert` on tiny models: what it makes, what it says, what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import ondevice
from ondevice.checkpoint import open_checkpoint
from ondevice.cli import cli
from tests.conftest import TEXT, VOCAB, write_tokenizer
from tests.tiny import tiny_checkpoint, tiny_spec

WORDS = sorted(set(TEXT.split()))


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> Path:
    """Words in random order: some 5,000 tokens."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(4000)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """A llama with a tokenizer, in float32."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_spec(vocab_size=VOCAB))
    write_tokenizer(folder)
    return folder


def run(*args: Any) -> Any:
    return CliRunner().invoke(cli, ["convert", *map(str, args)])


def converted(tmp_path: Path, *args: Any) -> dict[str, Any]:
    result = run(*args, "-o", tmp_path / "made", "--json")
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads((tmp_path / "made" / "report.json").read_text())
    assert not list(tmp_path.glob(".*"))
    return report


def test_bits_alone_need_no_text(model: Path, tmp_path: Path) -> None:
    report = converted(tmp_path, model, "--bits", 4, "--group-size", 32)
    with open_checkpoint(tmp_path / "made") as made:
        assert made.spec.sparsity is None and made.stored("layers.0.up.weight")[0] == "affine 4-bit g32"
    assert report["weights"]["bits_per_weight_after"] < 7 < report["weights"]["bits_per_weight_before"]
    assert report["quality"] == {} and report["speed"] is None
    answer = ondevice.load(tmp_path / "made", backend="reference").generate("Hi", max_tokens=3)
    assert answer.tokens


def test_bits_with_a_text_have_their_cost_measured(model: Path, text: Path, tmp_path: Path) -> None:
    report = converted(tmp_path, model, "--bits", 4, "--group-size", 32, "--text", text)
    (quality,) = report["quality"].values()
    assert 0 < quality["kl"] < 1 and quality["tokens"] > 500


@pytest.mark.parametrize(
    "sparsity",
    [
        *("cats:density=0.5", "cats:density=0.4,first=published", "teal:density=0.6,linears=down+o"),
        *("lte:density=0.5,block=8,steps=20", "d2dmoe:density=0.6,block=16,width=16,steps=20,order=model"),
        "polar:heads=0.5",
    ],
)
def test_methods(sparsity: str, model: Path, text: Path, tmp_path: Path) -> None:
    report = converted(tmp_path, model, "--sparsity", sparsity, "--text", text, "--tokens", 3000)
    with open_checkpoint(tmp_path / "made") as made:
        method = made.spec.sparsity
        assert method is not None and method.name == sparsity.partition(":")[0]
    assert report["made"]["section"] == json.loads((tmp_path / "made" / "config.json").read_text())["sparsity"]
    assert len(report["layers"]) >= 2 and all(0 <= layer["recall"] <= 1 for layer in report["layers"])
    kept = report["quality"]["unseen text"]["density"]
    wanted = float(sparsity.partition("=")[2].partition(",")[0])
    assert all(abs(part - wanted) < 0.2 for part in kept.values()) and report["quality"]["fitted text"]["tokens"]
    assert report["speed"]["converted"]["speedup"] > 0
    text_of = (tmp_path / "made" / "REPORT.md").read_text()
    assert "share of the oracle's benefit" in text_of and (tmp_path / "made" / "report" / "layers.svg").exists()
    answer = ondevice.load(tmp_path / "made", backend="cpu", plan="sparse").generate("Hi", max_tokens=3)
    assert answer.stats.sparsity is not None and answer.stats.sparsity.method == method.name


def test_tau_0_of_experts_is_the_dense_model(model: Path, text: Path, tmp_path: Path) -> None:
    converted(tmp_path, model, "--sparsity", "d2dmoe:tau=0.3,block=16,width=8,steps=0", "--text", text)
    result = CliRunner().invoke(
        cli,
        [
            *("eval", str(tmp_path / "made"), "--text", str(text), "--against", str(model), "--tau", "0"),
            *("--window", "64", "--tokens", "400", "--json"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["kl"] < 1e-6


def test_auto_holds_its_budget_or_stays_dense(model: Path, text: Path, tmp_path: Path) -> None:
    report = converted(tmp_path, model, "--budget", "1%", "--text", text, "--tokens", 3000)
    assert report["made"]["sparsity"] == "auto" and report["curve"] and report["notes"]
    if report["speed"]:
        assert report["quality"]["unseen text"]["rise_upper"] <= 0.01
    else:
        assert "dense" in report["made"]["chosen"]


def test_the_model_can_write_the_text(model: Path, tmp_path: Path) -> None:
    report = converted(tmp_path, model, "--sparsity", "cats:density=0.7", "--tokens", 3000)
    assert report["made"]["text"] == "written by the model itself"


def test_neurons_in_another_order_lose_only_rounding(model: Path, text: Path, tmp_path: Path) -> None:
    args = ("--sparsity", "lte:density=0.5,block=32,steps=0", "--bits", 8, "--group-size", 32, "--text", text)
    report = converted(tmp_path, model, *args)
    quality = report["quality"]
    assert 0 < quality["all neurons in the new order, unseen text"]["kl"] < 3e-3
    assert 0 < quality["rounded, over the source, unseen text"]["kl"] < 1e-2


def test_the_card_and_the_licence_come_along(model: Path, tmp_path: Path) -> None:
    converted(tmp_path, model, "--bits", 8)
    card = (tmp_path / "made" / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: ondevice" in card


BAD: dict[str, tuple[list[Any], str]] = {
    "unknown method": (["--sparsity", "magic"], "'magic' is not known; known are auto, cats"),
    "unknown key": (["--sparsity", "cats:rows=0.5"], "write key=value with keys of cats: density, first"),
    "density 0": (["--sparsity", "cats:density=0"], "density is '0'; it must be a number above 0"),
    "density 2": (["--sparsity", "lte:density=2"], "density is '2'; it must be a number above 0"),
    "block": (["--sparsity", "lte:block=7"], "block is 7, which does not divide"),
    "first": (["--sparsity", "cats:first=down"], "first is 'down'; take one of"),
    "linears": (["--sparsity", "teal:linears=up+head"], "linears has 'head'"),
    "tau": (["--sparsity", "d2dmoe:tau=3"], "tau is '3'"),
    "unit": (["--sparsity", "polar:unit=brain"], "unit is 'brain'; take one of"),
    "spark": (["--sparsity", "spark"], "spark is how a model is trained"),
    "budget of a method": (["--sparsity", "lte", "--budget", "1%"], "drop one of them"),
    "budget": (["--budget", "2"], "'2' is no percentage"),
    "group without bits": (["--group-size", "32"], "add --bits"),
    "bits": (["--bits", "3"], "3.0 is not in the range"),
    "group size": (["--bits", "4", "--group-size", "128"], "group size 128: this model can have 32"),
    "tokens": (["--sparsity", "cats", "--tokens", "7"], "7 is not in the range"),
    "keys of auto": (["--sparsity", "auto:density=1"], "auto has no keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_before_any_work(
    name: str, model: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def work(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("ondevice_convert.trial.op_table", work)
    args, message = BAD[name]
    result = run(model, "-o", tmp_path / "made", "--text", text, *args)
    assert result.exit_code in (1, 2) and message in result.output
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    result = run(model, "-o", tmp_path / "made", "--bits", "4")
    assert "exists already" in result.output and not list((tmp_path / "made").iterdir())


def test_a_model_that_skips_already_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    converted(tmp_path, model, "--sparsity", "cats:density=0.7", "--text", text, "--tokens", 3000)
    result = run(tmp_path / "made", "-o", tmp_path / "again", "--bits", "4", "--group-size", "32")
    assert "skips work already, by cats; convert the dense model" in result.output


def test_a_full_disk_leaves_nothing_behind(model: Path, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    result = run(model, "-o", tmp_path / "made", "--bits", "4", "--group-size", "32")
    assert "free some space" in result.output and not list(tmp_path.iterdir())


def test_bytes_of_the_same_job_are_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        converted(tmp_path / name, model, "--sparsity", "cats:density=0.6", "--text", text, "--tokens", 3000)
        with open_checkpoint(tmp_path / name / "made") as checkpoint:
            made.append({key: np.array(checkpoint.tensor(key)) for key in checkpoint.spec.tensors()})
    assert made[0].keys() == made[1].keys() and all(np.array_equal(made[0][k], made[1][k]) for k in made[0])
