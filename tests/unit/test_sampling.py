from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from ondevice.errors import OptionError
from ondevice.generation.sampling import Sampler, SamplingParams, token_logprob

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04], np.float32))
DRAWS = 2000


def sampler(prompt=(), vocab=5, **fields):
    return Sampler(SamplingParams(**{"temperature": 1.0, "seed": 1, **fields}), list(prompt), vocab)


def shares(logits=LOGITS, **fields):
    """Share of each token over many draws of one stream."""
    s = sampler(vocab=len(logits), **fields)
    counts = Counter(s.choose(logits) for _ in range(DRAWS))
    return {token: n / DRAWS for token, n in counts.items()}


def check(found, expected):
    """Exactly these tokens, each as often as it should be within four standard deviations."""
    assert set(found) == set(expected)
    for token, p in expected.items():
        assert abs(found[token] - p) < 4 * math.sqrt(p * (1 - p) / DRAWS) + 1e-9


def test_temperature_0_and_top_k_1_take_the_most_likely_and_of_equals_the_first():
    assert sampler(temperature=0).choose(LOGITS) == 0
    assert sampler(top_k=1).choose(LOGITS) == 0
    assert sampler(temperature=0).choose(np.array([1, 3, 3, 2], np.float32)) == 1


def test_plain_sampling_follows_the_model():
    check(shares(), dict(enumerate([0.4, 0.3, 0.2, 0.06, 0.04])))


def test_temperature_sharpens():
    p = np.array([0.4, 0.3, 0.2, 0.06, 0.04]) ** 2
    check(shares(temperature=0.5), dict(enumerate(p / p.sum())))


def test_top_k_keeps_the_k_most_likely():
    check(shares(top_k=2), {0: 4 / 7, 1: 3 / 7})


def test_top_p_keeps_the_fewest_that_reach_it():
    check(shares(top_p=0.69), {0: 4 / 7, 1: 3 / 7})
    check(shares(top_p=0.71), {0: 4 / 9, 1: 3 / 9, 2: 2 / 9})


def test_top_p_looks_at_what_top_k_left():
    # Of the three that are left, the first two hold 7/9 = 0.78.
    check(shares(top_k=3, top_p=0.75), {0: 4 / 7, 1: 3 / 7})


def test_min_p_is_relative_to_the_best():
    check(shares(min_p=0.45), {0: 4 / 9, 1: 3 / 9, 2: 2 / 9})
    check(shares(min_p=1.0), {0: 1.0})


def test_top_p_works_where_many_tokens_are_needed():
    logits = np.zeros(1000, np.float32)
    found = shares(logits, top_p=0.5)
    assert max(found) <= 500  # ties in the order of their ids
    assert len(found) > 470


def test_tiny_top_p_keeps_one_token():
    check(shares(top_p=1e-9), {0: 1.0})


def test_top_k_beyond_the_vocabulary_keeps_all():
    check(shares(top_k=1000), dict(enumerate([0.4, 0.3, 0.2, 0.06, 0.04])))


def test_a_seed_repeats_the_stream_and_another_differs():
    def draw(seed):
        s = sampler(seed=seed)
        return [s.choose(LOGITS) for _ in range(50)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_repetition_penalty_counts_prompt_and_answer():
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    s = sampler(prompt=[0], vocab=3, temperature=0, repetition_penalty=2.0)
    assert s.choose(logits) == 1  # token 0 went from 2 to 1
    assert s.choose(logits) == 0  # token 1 now stands at 0.75
    negative = np.array([-1.0, -1.5], np.float32)
    assert sampler(prompt=[0], vocab=2, temperature=0, repetition_penalty=2.0).choose(negative) == 1


def test_presence_and_frequency_count_the_answer_only():
    logits = np.array([1.0, 0.8], np.float32)
    s = sampler(prompt=[0, 0], vocab=2, temperature=0, presence_penalty=0.3)
    assert [s.choose(logits) for _ in range(3)] == [0, 1, 0]
    s = sampler(vocab=2, temperature=0, frequency_penalty=0.15)
    assert [s.choose(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_logits_are_left_alone():
    logits = LOGITS.copy()
    sampler(repetition_penalty=2.0, presence_penalty=1.0, prompt=[1]).choose(logits)
    assert np.array_equal(logits, LOGITS)


def test_huge_logits_do_not_overflow():
    logits = np.array([3e38, -3e38, 3e38], np.float32)
    assert set(shares(logits)) == {0, 2}


def test_logprobs_are_those_of_the_model():
    entry = token_logprob(LOGITS, 1, 2)
    assert entry.token == 1
    assert entry.logprob == pytest.approx(math.log(0.3), abs=1e-6)
    assert [token for token, _ in entry.top] == [0, 1]
    assert token_logprob(LOGITS, 1, 0).top == ()
    everything = token_logprob(LOGITS, 1, 99).top
    assert sum(math.exp(p) for _, p in everything) == pytest.approx(1)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": math.nan},
        {"temperature": -1},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"top_k": -1},
        {"max_tokens": -1},
        {"repetition_penalty": 0},
        {"presence_penalty": math.nan},
        {"frequency_penalty": "1"},
        {"seed": -1},
        {"stop": [""]},
        {"stop": [1]},
        {"logprobs": -1},
        {"max_tokens": True},
        {"max_tokens": 1.5},
        {"top_k": 2.5},
        {"seed": 0.5},
    ],
)
def test_impossible_values_are_refused_by_name(fields):
    with pytest.raises(OptionError, match=next(iter(fields))):
        SamplingParams(**fields)


def test_a_single_stop_string_is_one_string():
    assert SamplingParams(stop="END").stop == ("END",)
