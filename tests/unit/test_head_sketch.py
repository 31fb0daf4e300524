"""Sketches of the vocabulary head: what they are made of, and models that use them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from click.testing import CliRunner

import ondevice
from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.quantization import dequantize
from ondevice.cli import cli
from ondevice.errors import NumericalError, OptionError
from ondevice.generation.sampling import SamplingParams
from ondevice.sparsity import head_sketch
from ondevice.sparsity.head_sketch import FINE, add_sketch, sketch_tensors
from tests.conftest import VOCAB, write_tokenizer
from tests.kernels.cases_head import CASES
from tests.packed import decoder_of
from tests.tiny import tiny_checkpoint, tiny_spec

GREEDY = {"temperature": 0, "ignore_eos": True}
PROMPTS = ["Why is the sky blue?", "Hi", "The quick brown fox"]
CASE = CASES[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Wide enough for a sketch."""
    spec = tiny_spec("llama", d_model=128, vocab_size=VOCAB)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("sketched") / "model", spec, dtype=np.float16)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(path):
    return ondevice.load(path, backend="cpu", threads=2)


@pytest.fixture(scope="module")
def sketched(path):
    return ondevice.load(path, backend="cpu", threads=2, sketch_head=True)


@pytest.fixture(scope="module")
def sketch():
    return sketch_tensors(*CASE.head(), CASE.states(300, seed=2))


def test_errors_are_as_large_as_the_sketch_says(sketch):
    """And normally distributed, on other hidden states than it was made from."""
    head, x = dequantize(CASE.head()[0]), CASE.states(200)
    turned = x @ sketch.rotation.astype(np.float32).T
    z = turned[:, :-1]
    scores = z @ np.concatenate([dequantize(sketch.fine), dequantize(sketch.coarse)], axis=1).T + turned[:, -1:]
    size = sketch.errors.astype(np.float32).T * np.sqrt((z * z).mean(axis=1, keepdims=True))
    off = (scores - x @ head.T) / size
    assert 0.8 < off.std() < 1.1
    assert abs(off.mean()) < 0.02
    assert (np.abs(off) > 3).mean() < 0.006
    assert (x @ head.T - (x @ head.T).mean(axis=1, keepdims=True)).std() > 5 * (off * size).std()


def test_size_of_a_sketch(sketch):
    parts = (sketch.fine, sketch.coarse, sketch.errors)
    assert sum(part.nbytes for part in parts) < CASE.words * (FINE // 2 + (CASE.width - FINE) // 4 + 10)
    assert sketch.rotation.dtype == np.float16 and sketch.rotation.shape == (CASE.width + 1, CASE.width)


def test_states_too_small_for_float16_get_a_rotation_in_float32():
    made = sketch_tensors(*CASE.head(), CASE.states(300) * np.float32(1e-6))
    assert made.rotation.dtype == np.float32
    assert all(np.isfinite(dequantize(part)).all() for part in (made.fine, made.coarse))


@pytest.mark.parametrize("rows", [np.zeros((50, 128), np.float32), np.ones((50, 128), np.float32)])
def test_words_that_are_all_alike(rows):
    made = sketch_tensors(rows, None, np.zeros((4, 128), np.float32))
    assert not made.errors.any()
    assert all(np.isfinite(dequantize(part)).all() for part in (made.fine, made.coarse, made.rotation))


def test_greedy_answers_are_those_of_the_whole_head(whole, sketched):
    for prompt in PROMPTS:
        want = whole.generate(prompt, max_tokens=24, **GREEDY)
        got = sketched.generate(prompt, max_tokens=24, **GREEDY)
        assert got.tokens == want.tokens
        assert (got.stats.sketched_tokens, want.stats.sketched_tokens) == (23, None)


def test_top_k_draws_are_those_of_the_whole_head(whole, sketched):
    fields = {"max_tokens": 24, "temperature": 1.0, "top_k": 3, "seed": 5, "ignore_eos": True}
    assert sketched.generate(PROMPTS, **fields)[1].tokens == whole.generate(PROMPTS, **fields)[1].tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 3},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.5},
        {"frequency_penalty": -0.5},
        {"top_k": 65},
    ],
)
def test_some_requests_get_all_logits(whole, sketched, fields):
    want = whole.generate("Hi", max_tokens=12, seed=1, ignore_eos=True, **fields)
    got = sketched.generate("Hi", max_tokens=12, seed=1, ignore_eos=True, **fields)
    assert (got.tokens, got.logprobs) == (want.tokens, want.logprobs)
    assert got.stats.sketched_tokens == 0


@pytest.mark.parametrize(
    ("fields", "count"),
    [({"temperature": 0}, 1), ({}, 16), ({"top_k": 1}, 1), ({"top_k": 40}, 40), ({"temperature": 0, "top_k": 40}, 1)],
)
def test_how_many_logits_a_request_needs(fields, count):
    assert SamplingParams(**fields).exact_logits == count


def test_rows_of_a_batch_with_different_needs_equal_their_single_runs(sketched):
    rows = sketched._rows(PROMPTS, False, None, SamplingParams(max_tokens=10, **GREEDY))
    needs = [{}, {"logprobs": 2}, {"temperature": 1.0, "seed": 3}]
    for row, fields in zip(rows, needs):
        row.params = dataclasses.replace(row.params, **fields)
        row.__post_init__()
    list(sketched._run(rows, None))
    for row, prompt, fields in zip(rows, PROMPTS, needs):
        alone = sketched.generate(prompt, **{"max_tokens": 10, **GREEDY, **fields})
        assert row.tokens == alone.tokens
        assert row.stats.sketched_tokens == alone.stats.sketched_tokens == (0 if "logprobs" in fields else 9)


def test_a_sketch_is_kept_with_the_packed_weights(path, tmp_path, monkeypatch):
    monkeypatch.delenv("ONDEVICE_NO_TILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("ondevice.ops.cpu_tile_cache.SMALLEST", 0)
    first = ondevice.load(path, backend="cpu", threads=1, sketch_head=True).generate("Hi", max_tokens=12, **GREEDY)
    monkeypatch.setattr(head_sketch, "sketch_tensors", lambda *_: pytest.fail("made again"))
    again = ondevice.load(path, backend="cpu", threads=1, sketch_head=True).generate("Hi", max_tokens=12, **GREEDY)
    assert again.tokens == first.tokens


@pytest.mark.parametrize(("width", "message"), [(64, "64"), (96, "96")])
def test_narrow_models_are_refused(tmp_path, width, message):
    spec = tiny_spec("llama", d_model=width, vocab_size=VOCAB)
    path = tiny_checkpoint(tmp_path / "model", spec)
    decoder = decoder_of(path)
    with (
        open_checkpoint(path) as checkpoint,
        pytest.raises(OptionError, match=f"have {message}: leave sketch_head out"),
    ):
        add_sketch(decoder, checkpoint)


def test_damaged_weights_are_said_to_be(path):
    decoder = decoder_of(path)
    decoder.final_norm.weight[3] = np.nan
    with open_checkpoint(path) as checkpoint, pytest.raises(NumericalError, match="damaged weights"):
        add_sketch(decoder, checkpoint)


def test_the_reference_refuses_it(path):
    with pytest.raises(OptionError, match="reference backend has no sketch"):
        ondevice.load(path, backend="reference", sketch_head=True)


def test_command_line(path, sketched):
    common = ["generate", str(path), "-p", "Hi", "--temp", "0", "-n", "5", "--sketch-head", "-t", "2"]
    done = CliRunner().invoke(cli, common)
    assert done.exit_code == 0, done.output
    assert "4 by a sketched head" in done.stderr
    refused = CliRunner().invoke(cli, [*common, "--logprobs", "2", "--json"])
    assert refused.exit_code == 2 and "drop one of them" in refused.stderr
