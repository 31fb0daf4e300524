"""Quality with a sketched head, as decoding has it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

import ondevice
from ondevice.cli import cli
from ondevice.errors import OptionError
from ondevice_eval.evaluation import evaluate
from ondevice_eval.scores import Window
from tests.conftest import TEXT, VOCAB, write_tokenizer
from tests.tiny import tiny_checkpoint, tiny_spec

WINDOW, TOKENS = 50, 100


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Wide enough for a sketch, with words enough that some have no exact logits."""
    spec = tiny_spec("llama", d_model=128, vocab_size=4096)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("eval") / "model", spec, dtype=np.float16)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def wishing(path, tmp_path_factory):
    """The same model, which wants its head sketched."""
    folder = tmp_path_factory.mktemp("eval") / "wishing"
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sketch_head": True}))
    return folder


@pytest.fixture(scope="module")
def whole(path):
    return ondevice.load(path, backend="cpu", threads=2)


@pytest.fixture(scope="module")
def sketched(path):
    return ondevice.load(path, backend="cpu", threads=2, sketch_head=True)


@pytest.fixture(scope="module")
def ids(whole):
    return whole.tokenizer.encode(TEXT, add_special=False)[:TOKENS]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def decoded(model, ids, top):
    """Windows scored from what decoding gives, one token after the other."""
    windows = []
    for start in range(0, len(ids), WINDOW):
        part = ids[start : start + WINDOW]
        cache = model.decoder.new_cache(1, len(part))
        logits = np.concatenate([model.decoder.decode([token], cache, [0], top) for token in part])
        windows.append(Window())
        windows[-1].add(logits[:-1], np.array(part[1:]))
    return windows


@pytest.mark.parametrize("top", [1, 40])
@pytest.mark.parametrize("by_token", [False, True])
def test_scores_are_those_of_decoding(sketched, ids, top, by_token):
    scores = evaluate(sketched.decoder, ids, WINDOW, by_token=by_token, top=top)
    want = decoded(sketched, ids, top)
    assert [w.nll for w in scores.windows] == pytest.approx([w.nll for w in want], rel=1e-12)


def test_prompts_give_the_bits_of_decoding(sketched, ids):
    cache = sketched.decoder.new_cache(1, WINDOW)
    (at_once,) = sketched.decoder.prefill(ids[:WINDOW], cache, all_logits=True, top=40)
    cache.truncate(0, 0)
    assert np.array_equal(at_once, [sketched.decoder.decode([x], cache, [0], 40)[0] for x in ids[:WINDOW]])
    cache.truncate(0, 0)
    (exact,) = sketched.decoder.prefill(ids[:WINDOW], cache, all_logits=True)
    assert (at_once != exact).any(axis=1).all()


def test_top_words_have_exact_logits_and_the_others_cost_something(whole, sketched, ids):
    against = [evaluate(sketched.decoder, ids, WINDOW, whole.decoder, top=top) for top in (1, 40)]
    assert against[0].agreement == against[1].agreement == 1
    assert against[0].kl > against[1].kl > 0
    assert evaluate(sketched.decoder, ids, WINDOW, whole.decoder).kl == 0


def test_more_words_than_decoding_sketches_for_are_refused(whole, sketched, ids):
    with pytest.raises(OptionError, match="top is 65; what needs more than 64 exact logits"):
        evaluate(sketched.decoder, ids, WINDOW, top=65)
    assert evaluate(whole.decoder, ids, WINDOW, top=65).tokens == TOKENS - 2


def run(*args):
    return CliRunner().invoke(cli, ["eval", *map(str, args)])


def report_of(path, text, *args):
    common = ("--text", text, "--window", WINDOW, "--tokens", TOKENS, "-t", 2, "--json")
    result = run(path, *common, *args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_command(path, text, whole, sketched, ids):
    plain, report = report_of(path, text), report_of(path, text, "--sketch-head", "--against", path)
    assert plain["word_density"] == 1
    want = evaluate(sketched.decoder, ids, WINDOW, whole.decoder, top=40)
    assert (report["nll"], report["kl"]) == (pytest.approx(want.nll), pytest.approx(want.kl))
    assert report["perplexity_rise"] == pytest.approx(want.rise) and 0 < report["word_density"] < 1
    few = report_of(path, text, "--sketch-head", "--top", 1, "--against", path)
    assert few["kl"] > report["kl"] and few["word_density"] < report["word_density"]


def test_a_model_s_own_wish_is_followed_and_overridden(path, wishing, text):
    own = report_of(wishing, text)
    assert own == report_of(path, text, "--sketch-head") and own["word_density"] < 1
    assert report_of(wishing, text, "--no-sketch-head") == report_of(wishing, text, "--dense") == report_of(path, text)
    # What a model is compared with has the head that it asks for, another backend a whole one.
    assert report_of(wishing, text, "--against", wishing)["kl"] == 0
    assert report_of(path, text, "--against", wishing)["kl"] > 0
    assert 1e-3 > report_of(wishing, text, "--no-sketch-head", "--against-backend", "reference")["kl"] >= 0
    assert report_of(wishing, text, "--against-backend", "cpu")["kl"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--top", 5), "--top 5 is of a sketched head"),
        (("--sketch-head", "--top", 65), "top is 65"),
        (("--sketch-head", "--backend", "reference"), "reference backend has no sketch"),
    ],
)
def test_refused(path, text, args, message):
    result = run(path, "--text", text, "--tokens", 60, "--window", 50, *args)
    assert result.exit_code == 1 and message in result.stderr


def test_tiny_vocabularies_of_narrow_models_are_refused(tiny_path, text):
    result = run(tiny_path, "--text", text, "--sketch-head", "--window", 50)
    assert VOCAB == 320 and result.exit_code == 1 and "hidden states of a multiple of 64" in result.stderr
