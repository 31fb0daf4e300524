"""Models that ask for a sketch of their head: `sketch_head` in config.json."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from click.testing import CliRunner

import ondevice
from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.hub import read_spec
from ondevice.cli import cli
from ondevice.errors import CheckpointError, OptionError, SparsityError
from ondevice_convert.changed import Changed
from tests.conftest import VOCAB, write_tokenizer
from tests.tiny import tiny_checkpoint, tiny_spec


def model(folder, wish, d_model=128, **extra):
    spec = tiny_spec("llama", d_model=d_model, vocab_size=VOCAB, activation="relu")
    config = {**({} if wish is None else {"sketch_head": wish}), **extra}
    tiny_checkpoint(folder, spec, dtype=np.float16, config_extra=config)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return model(tmp_path_factory.mktemp("wish") / "wishing", True)


def has_sketch(path, **options):
    return ondevice.load(path, **{"backend": "cpu", "threads": 1, **options}).decoder.sketch is not None


@pytest.mark.parametrize(
    ("options", "sketched"),
    [
        ({}, True),
        ({"sketch_head": True}, True),
        ({"sketch_head": False}, False),
        ({"dense": True}, False),
        ({"dense": True, "sketch_head": True}, True),
        ({"strict": True}, True),
    ],
)
def test_load_goes_by_the_model_unless_it_is_told(path, options, sketched):
    assert has_sketch(path, **options) is sketched


@pytest.mark.parametrize("wish", [None, False])
def test_models_that_do_not_ask_get_none(tmp_path, wish):
    folder = model(tmp_path / "model", wish)
    assert not has_sketch(folder) and has_sketch(folder, sketch_head=True)


def test_a_backend_without_sketches_says_so_in_one_line(path, caplog):
    with caplog.at_level(logging.WARNING, "ondevice"):
        assert not has_sketch(path, backend="reference")
    (record,) = caplog.records
    assert "reference backend has no sketch of the head, which this model asks for" in record.message
    caplog.clear()
    assert not has_sketch(path, backend="reference", sketch_head=False, strict=True)
    assert not has_sketch(path, backend="reference", dense=True, strict=True)
    assert not caplog.records


def test_strict_settings_and_users_insist(path):
    with pytest.raises(SparsityError, match="without strict"):
        ondevice.load(path, backend="reference", strict=True)
    with pytest.raises(OptionError, match="reference backend has no sketch"):
        ondevice.load(path, backend="reference", sketch_head=True)


@pytest.mark.parametrize(
    ("wish", "width", "message"),
    [
        ("yes", 128, "sketch_head: 'yes' is neither true nor false"),
        (1, 128, "sketch_head: 1 is neither"),
        (True, 96, "sketch_head: a sketch of the head needs hidden states .* have 96; take the key out"),
        (True, 64, "have 64; take the key out"),
    ],
)
def test_impossible_wishes_are_refused_before_weights_are_read(tmp_path, wish, width, message):
    folder = model(tmp_path / "model", wish, width)
    for open_it in (
        lambda: open_checkpoint(folder),
        lambda: read_spec(json.loads((folder / "config.json").read_text()), folder),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_it()


def test_it_is_told_and_carried(path, tmp_path):
    with open_checkpoint(path) as checkpoint, open_checkpoint(model(tmp_path / "plain", None)) as plain:
        assert checkpoint.prefers_sketch and checkpoint.describe()["sketch_head"] is True
        assert Changed(checkpoint, checkpoint.spec).prefers_sketch
        assert not plain.prefers_sketch and plain.describe()["sketch_head"] is False
    shown = CliRunner().invoke(cli, ["show", str(path), "--json"])
    assert json.loads(shown.stdout)["sketch_head"] is True


def generate(path, *args, **extra):
    common = ["generate", str(path), "-p", "Hi", "--temp", "0", "-n", "5", "-t", "1"]
    return CliRunner().invoke(cli, [*common, *args], **extra)


def test_generate(path):
    assert "4 by a sketched head" in generate(path).stderr
    assert "sketched" not in generate(path, "--no-sketch-head").stderr
    assert "sketched" not in generate(path, env={"ONDEVICE_SKETCH_HEAD": "0"}).stderr
    assert "sketched" not in generate(path, "--dense").stderr
    # Log-probabilities need all logits: such a request goes without, as a wish is no demand.
    (answer,) = json.loads(generate(path, "--logprobs", "2", "--json").stdout)
    assert answer["stats"]["sketched_tokens"] == 0 and len(answer["logprobs"]) == 5


def labels(path, *args):
    common = ["bench", str(path), "--only", "tg", "-n", "2", "-r", "1", "-t", "1", "--json"]
    result = CliRunner().invoke(cli, [*common, *args])
    assert result.exit_code == 0, result.output
    return [row["sparsity"] for row in json.loads(result.stdout)]


def test_bench(path, tmp_path, monkeypatch):
    monkeypatch.setattr("ondevice.machine.read_bandwidth", lambda threads: 10e9)
    assert labels(path) == ["sketch-head"]
    assert labels(path, "--no-sketch-head") == ["dense"]
    assert labels(path, "--sketch-head") == ["dense", "sketch-head"]
    assert labels(path, "--backend", "reference") == ["dense"]
    section = {"method": "cats", "thresholds": [0.0, 0.0, 0.0]}
    cats = model(tmp_path / "cats", True, sparsity=section)
    assert labels(cats, "--plan", "sparse") == ["cats+sketch-head"]
    assert labels(cats, "--plan", "sparse", "--no-sketch-head") == ["cats"]
