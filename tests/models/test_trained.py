"""Models that the tests train themselves: good enough on unseen text, most of their neurons zero, and skipped so.

One file, since tests of a file share a process: the model is trained once.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from ondevice.checkpoint import open_checkpoint
from ondevice.cli import cli
from ondevice.decoder import Decoder
from ondevice.model import load, op_table
from ondevice.sparsity.settings import SparsitySettings
from ondevice.sparsity.threshold import Cats
from ondevice_convert.changed import Changed
from ondevice_convert.neurons import Neurons
from ondevice_eval.evaluation import evaluate
from tests.trained import CONTEXT, VOCAB

pytestmark = pytest.mark.judge
TOKENS = 2 * CONTEXT


def unigram_perplexity(model, given) -> float:
    """Of the held-out text, by how often tokens are in the text that was trained on."""
    seen, held_out = (model.tokenizer.encode(text, add_special=False) for text in (given.seen, given.held_out))
    counts = np.bincount(seen, minlength=VOCAB) + 1
    return float(np.exp(-np.log(counts / counts.sum())[held_out[:TOKENS]].mean()))


def test_perplexity_of_unseen_text(trained_relu):
    given = trained_relu
    assert len(given.held_out) > 20_000 and given.held_out not in given.seen
    models = [load(given.folder, backend=backend) for backend in ("reference", "cpu")]
    ids = models[0].tokenizer.encode(given.held_out, add_special=False)[:TOKENS]
    reference, cpu = (evaluate(model.decoder, ids, CONTEXT) for model in models)
    assert 5 < np.exp(reference.nll) < unigram_perplexity(models[0], given) / 3
    assert cpu.nll == pytest.approx(reference.nll, abs=2e-3)


def test_most_neurons_are_zero(trained_relu):
    given = trained_relu
    with open_checkpoint(given.folder) as checkpoint:
        decoder, layers = Decoder(checkpoint, op_table("cpu", None, None)), range(checkpoint.spec.n_layers)
        ids = checkpoint.tokenizer().encode(given.held_out, add_special=False)[:CONTEXT]
        (inputs,) = decoder.watch(ids, ["ffn"], layers)
        zeros = []
        for i in layers:
            factors = Neurons.of(checkpoint, i).factors(inputs[:, i])
            zeros.append(float(np.mean(np.prod(factors, axis=0) == 0)))
    assert min(zeros) > 0.6 and np.mean(zeros) > 0.85


def test_skipping_the_zeros_changes_nothing(trained_relu):
    """And the engine counts as many as there are."""
    given = trained_relu
    with open_checkpoint(given.folder) as checkpoint:
        dense = Decoder(checkpoint, op_table("cpu", None, None))
        cats = Cats((0.0,) * checkpoint.spec.n_layers)
        changed = Changed(checkpoint, dataclasses.replace(checkpoint.spec, sparsity=cats))
        sparse = Decoder(changed, op_table("cpu", None, None), settings=SparsitySettings(plan="sparse"))
        ids = checkpoint.tokenizer().encode(given.held_out, add_special=False)[:CONTEXT]
    assert cats.kind(sparse.spec) == "exact"
    scores = evaluate(sparse, ids, CONTEXT, dense, by_token=True)
    assert abs(scores.kl) < 1e-6 and abs(scores.rise) < 1e-4
    tally = sparse.ops.counts()["ffn"]
    assert 0 < tally.kept < 0.2 * tally.units


def test_the_converter_finds_the_zeros(trained_relu, tmp_path, monkeypatch):
    given = trained_relu
    # What is fastest differs from moment to moment, and is no matter of tests.
    monkeypatch.setattr("ondevice_convert.budget.WORTH", 0.0)
    monkeypatch.setattr("ondevice_convert.trial.Trial.sketched", lambda self, decoder: None)
    text, made = tmp_path / "text.txt", tmp_path / "made"
    text.write_text(given.seen[-400_000:] + given.held_out)
    args = ["convert", str(given.folder), "-o", str(made), "--budget", "2%", "--text", str(text), "--tokens", "20000"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    report = json.loads((made / "report.json").read_text())
    section = json.loads((made / "config.json").read_text())["sparsity"]
    assert section["method"] == "cats" and report["made"]["chosen"].startswith("cats")
    assert not any(section["thresholds"])
    quality = report["quality"]["unseen text"]
    assert abs(quality["rise"]) < 1e-4 and quality["kl"] < 1e-5
    assert quality["density"]["ffn"] < 0.25 and report["speed"]["converted"]["speedup"] > 0
