"""Perplexity, KL and agreement."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

import ondevice
from ondevice.cli import cli
from ondevice.errors import ContextLengthError, OptionError
from ondevice.ops.cpu import CpuOps
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity.settings import SparsitySettings
from ondevice_eval.evaluation import evaluate
from ondevice_eval.scores import Scores, Window, log_softmax
from tests.conftest import TEXT, VOCAB, write_tokenizer
from tests.models.running import make_decoder
from tests.models.sparse_cases import sparse_spec, sparse_tensors
from tests.tiny import tiny_checkpoint, tiny_spec, tiny_tensors


@pytest.fixture(scope="module")
def other_path(tmp_path_factory):
    """Another random model over the same vocabulary."""
    spec = tiny_spec(vocab_size=VOCAB)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("other") / "model", spec, tiny_tensors(spec, seed=1))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def naive(model, ids, window):
    """Sum of NLL and number of tokens, each window by one fresh prefill."""
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        cache = model.decoder.new_cache(1, window)
        logits = np.concatenate(list(model.decoder.prefill(part, cache, all_logits=True)))
        for row, target in zip(logits, part[1:]):
            total -= float(log_softmax(row[None])[0, target])
            count += 1
    return total, count


def test_windows_are_scored_alone_without_their_first_token(tiny):
    ids = tiny.tokenizer.encode(TEXT, add_special=False)[:90]
    scores = evaluate(tiny.decoder, ids, window=40)
    total, count = naive(tiny, ids, 40)
    assert scores.tokens == count == 90 - 3 and [w.tokens for w in scores.windows] == [39, 39, 9]
    assert scores.nll == pytest.approx(total / count, rel=1e-7)


def test_a_last_window_of_one_token_is_left_out(tiny):
    ids = tiny.tokenizer.encode(TEXT, add_special=False)[:41]
    assert evaluate(tiny.decoder, ids, window=40).tokens == 39


@pytest.mark.parametrize("backend", ["tiny", "tiny_cpu"])
def test_token_by_token_gives_the_same(request, backend):
    model = request.getfixturevalue(backend)
    ids = model.tokenizer.encode(TEXT, add_special=False)[:100]
    assert len(ids) == 100
    at_once = evaluate(model.decoder, ids, window=100)
    by_token = evaluate(model.decoder, ids, window=100, by_token=True)
    assert by_token.nll == pytest.approx(at_once.nll, rel=1e-5)


@pytest.mark.parametrize("table", [ReferenceOps, lambda: CpuOps(2)], ids=["reference", "cpu"])
@pytest.mark.parametrize("name", ["cats", "cats_gate", "lte", "lte_post_norms"])
def test_quality_of_skipping_is_the_same_token_by_token(name, table):
    """Prompts of these methods are masked as decoding skips, so that they may measure what decoding costs."""
    spec = sparse_spec(name)
    decoder, dense = (
        make_decoder(spec, sparse_tensors(spec), table(), SparsitySettings(dense=d)) for d in (False, True)
    )
    ids = np.random.RandomState(1).randint(0, spec.vocab_size, 60).tolist()
    at_once, by_token = (evaluate(decoder, ids, window=30, by_token=by) for by in (False, True))
    assert by_token.nll == pytest.approx(at_once.nll, rel=1e-5)
    assert abs(evaluate(dense, ids, window=30).nll - at_once.nll) > 1e-3


def test_a_model_against_itself_and_against_another(tiny, other_path):
    other = ondevice.load(other_path, backend="reference")
    ids = tiny.tokenizer.encode(TEXT, add_special=False)[:60]
    same = evaluate(tiny.decoder, ids, 30, tiny.decoder)
    assert same.kl == 0 and same.agreement == 1
    different = evaluate(tiny.decoder, ids, 30, other.decoder)
    assert different.kl > 0.1 and different.agreement < 0.5
    assert different.nll == same.nll


def test_kl_is_of_the_other_model_to_this_one():
    mine, theirs = np.log([[0.5, 0.5]]).astype(np.float32), np.log([[0.9, 0.1]]).astype(np.float32)
    window = Window()
    window.add(mine, np.array([0]), theirs)
    assert window.kl == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)
    assert window.nll == pytest.approx(math.log(2), rel=1e-6)


def test_log_softmax_takes_huge_logits():
    assert log_softmax(np.array([[3e38, 0, -3e38]], np.float32))[0, 0] == 0


def test_the_standard_error_is_over_windows():
    means = [2.0, 3.0, 4.0, 3.0]
    scores = Scores([Window(tokens=10, nll=10 * mean) for mean in means])
    assert scores.nll == 3.0
    assert scores.nll_stderr == pytest.approx(np.std(means, ddof=1) / 2)
    assert Scores([Window(tokens=10, nll=20.0)]).nll_stderr is None


def test_impossible_texts_and_windows_are_refused(tiny):
    with pytest.raises(OptionError, match="1 tokens"):
        evaluate(tiny.decoder, [5], 10)
    with pytest.raises(OptionError, match="window is 1"):
        evaluate(tiny.decoder, [5, 6, 7], 1)
    with pytest.raises(ContextLengthError, match="--window"):
        evaluate(tiny.decoder, [5] * 200, 129)


def run(*args):
    return CliRunner().invoke(cli, ["eval", *map(str, args)])


def test_the_command_prints_the_contracts_keys(tiny, tiny_path, text):
    result = run(tiny_path, "--text", text, "--tokens", 80, "--window", 40, "--backend", "reference", "--json")
    report = json.loads(result.stdout)
    ids = tiny.tokenizer.encode(TEXT, add_special=False)[:80]
    total, count = naive(tiny, ids, 40)
    assert report["tokens"] == count and report["nll"] == pytest.approx(total / count)
    assert report["perplexity"] == pytest.approx(math.exp(total / count))
    assert report["stderr"] == pytest.approx(report["perplexity"] * report["nll_stderr"])
    assert report["kl"] is report["top1_agreement"] is None
    assert report["ffn_density"] == report["head_density"] == 1


def test_cpu_is_judged_by_reference(tiny_path, text):
    args = [tiny_path, "--text", text, "--window", 64, "--backend", "cpu", "--against-backend", "reference", "--json"]
    report = json.loads(run(*args).stdout)
    assert 0 <= report["kl"] < 1e-3 and report["top1_agreement"] > 0.97


def test_the_command_for_people(tiny_path, other_path, text):
    args = ["--text", text, "--window", 64, "--backend", "reference"]
    shown = run(tiny_path, *args, "--against", other_path).stdout
    assert "± " in shown and "nats per token" in shown and "% agreement" in shown
    assert "one window" in run(tiny_path, *args, "--tokens", 20).stdout


def test_different_vocabularies_and_bad_texts_are_refused(tiny_path, tmp_path, text):
    folder = tiny_checkpoint(tmp_path / "wide", tiny_spec(vocab_size=VOCAB + 8))
    write_tokenizer(folder)
    refused = run(tiny_path, "--text", text, "--against", folder, "--backend", "reference")
    assert refused.exit_code == 1 and "different vocabularies" in refused.stderr
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    refused = run(tiny_path, "--text", tmp_path / "bad.txt", "--backend", "reference")
    assert refused.exit_code == 1 and "not UTF-8 at byte 3" in refused.stderr
    (tmp_path / "empty.txt").write_text("")
    refused = run(tiny_path, "--text", tmp_path / "empty.txt", "--backend", "reference")
    assert refused.exit_code == 1 and "0 tokens" in refused.stderr


def paired(differences, tokens=None, seed=0):
    """Scores of windows that differ by so much per token, on top of losses that differ far more between windows."""
    random = np.random.default_rng(seed)
    tokens = tokens or [100] * len(differences)
    losses = random.uniform(1, 5, len(tokens)) * tokens
    return Scores([Window(n, x + n * d, x) for n, x, d in zip(tokens, losses, differences)])


def test_the_rise_is_of_the_perplexity():
    scores = paired([0.01, 0.03, 0.02])
    mine, other = (sum(getattr(w, name) for w in scores.windows) / 300 for name in ("nll", "other_nll"))
    assert scores.rise == pytest.approx(math.exp(mine) / math.exp(other) - 1) == pytest.approx(math.exp(0.02) - 1)


def test_the_bound_is_student_s_of_paired_differences():
    differences = [0.01, 0.03, 0.02, 0.025]
    upper = np.mean(differences) + 2.3533634 * np.std(differences, ddof=1) / 2  # of 3 degrees, 95 %
    assert paired(differences).rise_upper() == pytest.approx(math.expm1(upper), rel=1e-6)
    assert paired(differences).rise_upper(0.5) == pytest.approx(paired(differences).rise)
    assert paired([0.02]).rise_upper() is None
    assert paired([0.02, 0.02]).rise_upper() == pytest.approx(math.expm1(0.02))


def test_long_windows_count_for_more_in_the_bound():
    scores = paired([0.01, 0.05, 0.02], [1000, 10, 500])
    mean = (10 + 0.5 + 10) / 1510
    squares = sum((n * d - n * mean) ** 2 for n, d in zip((1000, 10, 500), (0.01, 0.05, 0.02)))
    upper = mean + 2.9199856 * math.sqrt(1.5 * squares) / 1510
    assert scores.rise_upper() == pytest.approx(math.expm1(upper), rel=1e-6)


def test_the_bound_holds_as_often_as_it_says():
    """Of 2000 texts of 6 windows whose true rise is known."""
    random = np.random.default_rng(3)
    held = [paired(random.normal(0.02, 0.01, 6), seed=i).rise_upper() >= math.expm1(0.02) for i in range(2000)]
    assert 0.935 < np.mean(held) < 0.965


@pytest.mark.parametrize("confidence", [0, 1, -0.5, float("nan")])
def test_impossible_confidence_is_refused(confidence):
    with pytest.raises(OptionError, match="confidence is"):
        paired([0.01, 0.02]).rise_upper(confidence)


def test_the_command_tells_the_rise(tiny_path, other_path, text):
    args = [tiny_path, "--text", text, "--window", 40, "--tokens", 120, "--backend", "reference"]
    report = json.loads(run(*args, "--against", other_path, "--json").stdout)
    other = json.loads(run(other_path, *args[1:], "--json").stdout)
    assert report["perplexity_rise"] == pytest.approx(report["perplexity"] / other["perplexity"] - 1)
    assert report["perplexity_rise_upper95"] > report["perplexity_rise"]
    assert other["perplexity_rise"] is other["perplexity_rise_upper95"] is None
    assert report["ffn_density"] == report["head_density"] == report["input_density"] == report["word_density"] == 1
    shown = run(*args, "--against", other_path).stdout
    assert "% of perplexity (below " in shown and "with 95 % confidence" in shown and "kept" not in shown
    args[4], args[6] = 60, 50
    alone = json.loads(run(*args, "--against", tiny_path, "--json").stdout)
    assert alone["windows"] == 1 and alone["perplexity_rise"] == 0 and alone["perplexity_rise_upper95"] is None
    assert "(one window: no bound)" in run(*args, "--against", tiny_path).stdout


def test_the_command_tells_what_was_kept(tmp_path, text):
    spec = tiny_spec(vocab_size=VOCAB, activation="relu")
    folder = tiny_checkpoint(
        tmp_path / "cats", spec, config_extra={"sparsity": {"method": "cats", "thresholds": [0.0, 0.0, 0.0]}}
    )
    write_tokenizer(folder)
    args = [folder, "--text", text, "--window", 40, "--tokens", 80, "--backend", "reference"]
    report = json.loads(run(*args, "--json").stdout)
    assert 0.3 < report["ffn_density"] < 0.7 and report["input_density"] == 1
    assert f"kept        {100 * report['ffn_density']:.1f} % of ffn" in run(*args).stdout
