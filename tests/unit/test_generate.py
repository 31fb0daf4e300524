"""Generation through the Python API, on a tiny random model."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import ondevice
from ondevice.errors import ContextLengthError, ModelNotFoundError, OptionError
from ondevice.generation.sampling import SamplingParams
from ondevice.spec import RopeSpec
from tests.conftest import VOCAB, write_tokenizer
from tests.tiny import tiny_checkpoint, tiny_spec

PROMPTS = ["Why is the sky blue?", "Hi", "The quick brown fox jumps over the lazy dog. Hello there! " * 2]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(params=["reference", "cpu"])
def model(request, tiny, tiny_cpu):
    return tiny if request.param == "reference" else tiny_cpu


def test_rows_of_a_ragged_batch_equal_their_single_runs(model):
    for fields in (GREEDY, {"seed": 3, "temperature": 1.5}):
        batch = model.generate(PROMPTS, max_tokens=12, **fields)
        for prompt, answer in zip(PROMPTS, batch):
            alone = model.generate(prompt, max_tokens=12, **fields)
            assert (answer.tokens, answer.text) == (alone.tokens, alone.text)


def test_stream_equals_generate_and_ends_with_stats(tiny):
    pieces = list(tiny.stream(PROMPTS[0], max_tokens=20, **GREEDY))
    answer = tiny.generate(PROMPTS[0], max_tokens=20, **GREEDY)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.token for piece in pieces] == answer.tokens
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * 19
    assert pieces[-1].finish_reason == answer.finish_reason == "length"
    stats = pieces[-1].stats
    assert stats.generated_tokens == 20 and stats.prompt_tokens == len(tiny.encode(PROMPTS[0]))
    assert all(piece.stats is None for piece in pieces[:-1])


def test_text_is_the_tokens_decoded(tiny):
    answer = tiny.generate(PROMPTS[0], max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)
    assert answer.text == tiny.tokenizer.decode(answer.tokens)


def test_a_stop_string_across_tokens_ends_the_answer(tiny):
    whole = tiny.generate(PROMPTS[0], max_tokens=30, temperature=1.0, seed=11, ignore_eos=True).text
    stop = whole[5:12]
    assert len(stop) == 7
    answer = tiny.generate(PROMPTS[0], max_tokens=30, temperature=1.0, seed=11, ignore_eos=True, stop=[stop])
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.stop) == ("stop", stop)


def test_text_held_back_for_a_stop_string_is_let_go(tiny):
    plain = tiny.generate(PROMPTS[0], max_tokens=8, **GREEDY).text
    held = tiny.generate(PROMPTS[0], max_tokens=8, stop=[plain[-2:] + "never"], **GREEDY)
    assert held.text == plain and held.finish_reason == "length"


def test_the_models_own_end_stops(tiny):
    end = min(tiny.tokenizer.stop_ids)
    for seed in range(200):
        answer = tiny.generate("Hi", max_tokens=60, temperature=2.0, seed=seed)
        if answer.finish_reason == "stop":
            assert answer.tokens[-1] in tiny.tokenizer.stop_ids
            assert answer.tokens.index(end) == len(answer.tokens) - 1
            assert answer.text == tiny.tokenizer.decode(answer.tokens[:-1])
            return
    raise AssertionError("no seed led to an end token")


def test_max_tokens_0_and_1(tiny):
    none = tiny.generate("Hi", max_tokens=0)
    assert (none.text, none.tokens, none.finish_reason) == ("", [], "length")
    one = tiny.generate("Hi", max_tokens=1, **GREEDY)
    assert len(one.tokens) == 1 and one.finish_reason == "length"
    mixed = tiny.generate(["Hi", "Ho"], max_tokens=0)
    assert [answer.tokens for answer in mixed] == [[], []]


def test_a_full_context_ends_the_answer(model):
    used = len(model.encode("Hi"))
    answer = model.generate("Hi", context=used + 5, max_tokens=50, **GREEDY)
    # Five tokens fit behind the prompt; the sixth is chosen but has no place to go on from.
    assert len(answer.tokens) == 6 and answer.finish_reason == "length"
    longest = model.generate("Hi", max_tokens=10_000, **GREEDY)
    assert used + len(longest.tokens) == model.spec.context_length + 1
    assert answer.tokens == longest.tokens[:6]


def test_prompts_that_do_not_fit_are_refused(tiny):
    with pytest.raises(ContextLengthError, match="context 128"):
        tiny.generate("word " * 400, raw=True)
    with pytest.raises(ContextLengthError, match="context 4"):
        tiny.generate(["Hi", PROMPTS[2]], context=4)
    with pytest.raises(ContextLengthError, match="lower context"):
        tiny.generate("Hi", context=1000)


def test_logprobs_are_reported_per_token(tiny):
    answer = tiny.generate("Hi", max_tokens=5, logprobs=3, **GREEDY)
    assert [entry.token for entry in answer.logprobs] == answer.tokens
    for entry in answer.logprobs:
        assert entry.top[0] == (entry.token, entry.logprob)
        assert [p for _, p in entry.top] == sorted((p for _, p in entry.top), reverse=True)
    everything = tiny.generate("Hi", max_tokens=1, logprobs=1000, **GREEDY).logprobs[0].top
    assert np.exp([p for _, p in everything]).sum() == pytest.approx(1)
    assert tiny.generate("Hi", max_tokens=1).logprobs is None


def test_penalties_keep_greedy_from_repeating(tiny):
    free = tiny.generate("Hi", max_tokens=40, **GREEDY).tokens
    penalized = tiny.generate("Hi", max_tokens=40, presence_penalty=100, **GREEDY).tokens
    assert len(set(free)) < len(free) and len(set(penalized)) == 40


def test_a_cancelled_stream_leaves_the_model_usable(model):
    expected = model.generate("Hi", max_tokens=10, **GREEDY).tokens
    stream = model.stream("Hi", max_tokens=100, **GREEDY)
    next(stream)
    stream.close()
    assert model.generate("Hi", max_tokens=10, **GREEDY).tokens == expected


def test_two_threads_share_a_model(tiny_cpu):
    expected = [tiny_cpu.generate(prompt, max_tokens=20, **GREEDY).tokens for prompt in PROMPTS[:2]]
    found = [[], []]

    def work(i):
        for _ in range(5):
            found[i].append(tiny_cpu.generate(PROMPTS[i], max_tokens=20, **GREEDY).tokens)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [[expected[0]] * 5, [expected[1]] * 5]


def test_what_cannot_be_is_refused(tiny, tiny_path, tmp_path):
    with pytest.raises(OptionError, match=r"unknown option heat; known are .*temperature"):
        tiny.generate("Hi", heat=1)
    with pytest.raises(OptionError, match="empty prompt"):
        tiny.generate("", raw=True)
    with pytest.raises(OptionError, match="raw takes text"):
        tiny.generate([{"role": "user", "content": "Hi"}], raw=True)
    with pytest.raises(OptionError, match="system message"):
        tiny.generate("Hi", raw=True, system="Be brief.")
    with pytest.raises(OptionError, match="backend 'tpu'"):
        ondevice.load(tiny_path, backend="tpu")
    with pytest.raises(OptionError, match="threads is 0"):
        ondevice.load(tiny_path, threads=0)
    with pytest.raises(ModelNotFoundError):
        ondevice.load(tmp_path / "nothing.gguf")
    assert tiny.generate([], max_tokens=3) == []


def test_messages_and_text_are_the_same_prompt(tiny):
    assert tiny.encode("Hi") == tiny.encode([{"role": "user", "content": "Hi"}])
    with_system = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    assert tiny.encode("Hi", system="S") == tiny.encode(with_system) != tiny.encode("Hi")


# Sessions


def say(session, ids, n=8):
    pieces = list(session.stream(ids, SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)))
    return [piece.token for piece in pieces]


def test_a_session_computes_only_what_is_new_and_answers_as_a_fresh_one(model):
    session = model.session()
    first = model.encode("Why is the sky blue?", raw=True)
    answer = say(session, first)
    assert session.stats.reused_tokens == 0
    second = [*first, *answer, *model.encode("And at night?", raw=True)]
    reply = say(session, second)
    # The last token of the answer was chosen but not fed back yet.
    assert session.stats.reused_tokens == len(first) + len(answer) - 1
    assert reply == say(model.session(), second)


def test_a_session_whose_past_was_changed_recomputes_from_there(model):
    session = model.session()
    ids = model.encode(PROMPTS[2], raw=True)
    say(session, ids)
    changed = [*ids[:10], *ids[11:]]
    assert say(session, changed) == say(model.session(), changed)
    assert session.stats.reused_tokens == 10
    # The same prompt again: the last token is computed once more, for its logits.
    assert say(session, changed) == say(model.session(), changed)
    assert session.stats.reused_tokens == len(changed) - 1


def test_a_session_that_was_stopped_goes_on(model):
    session = model.session()
    ids = model.encode("Why is the sky blue?", raw=True)
    stream = session.stream(ids, SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
    kept = [next(stream).token for _ in range(4)]
    stream.close()
    follow = [*ids, *kept, *model.encode(" Go on.", raw=True)]
    assert say(session, follow) == say(model.session(), follow)
    assert session.stats.reused_tokens == len(ids) + 3


def test_a_session_says_when_it_is_full(tiny):
    session = tiny.session(context=24)
    ids = tiny.encode("Hello there", raw=True)
    tokens = say(session, ids, n=100)
    assert len(ids) + len(tokens) == 25 and session.used == 24
    with pytest.raises(ContextLengthError, match="context holds 24"):
        say(session, [*ids, *tokens])
    assert say(session, ids, n=3) == tokens[:3]
    with pytest.raises(ContextLengthError):
        tiny.session(context=1000)


def test_rows_on_both_sides_of_longropes_border_equal_their_single_runs(tmp_path_factory):
    """Factors for long sequences must not reach a short row because a long one shares its batch."""
    factors = {"short_factors": (1.0,) * 8, "long_factors": tuple(1.5 + i for i in range(8))}
    rope = RopeSpec(dim=16, scaling="longrope", original_context=50, attention_factor=1.1, **factors)
    folder = tiny_checkpoint(tmp_path_factory.mktemp("long") / "m", tiny_spec(vocab_size=VOCAB, rope=rope))
    write_tokenizer(folder)
    model = ondevice.load(folder, backend="reference")
    prompts = ["Hi", "The quick brown fox jumps over the lazy dog. " * 6, "Why?"]
    lengths = [len(model.encode(p, raw=True)) for p in prompts]
    assert max(lengths[0], lengths[2]) + 12 <= 50 < lengths[1] + 12
    batch = model.generate(prompts, raw=True, max_tokens=12, **GREEDY)
    alone = [model.generate(p, raw=True, max_tokens=12, **GREEDY) for p in prompts]
    assert [a.tokens for a in batch] == [a.tokens for a in alone]
