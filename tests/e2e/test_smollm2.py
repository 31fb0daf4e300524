"""The real model on the CPU path: against the float64 reference, and against llama.cpp's own words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ondevice.decoder import Decoder
from ondevice.model import Model, load

pytestmark = pytest.mark.real_model

GREEDY = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())
PROSE = Path(__file__).parents[3] / "shared" / "data" / "handbook.txt"
TOKENS = 2048


@pytest.fixture(scope="module")
def text_ids(smollm2: Model) -> list[int]:
    """Prose of 2,048 tokens: the handbook where it lies beside the project, else what the model itself writes."""
    if PROSE.exists():
        text = PROSE.read_text(encoding="utf-8")[: TOKENS * 8]
        return smollm2.tokenizer.encode(text, add_special=False)[:TOKENS]
    written = smollm2.generate("Once", raw=True, max_tokens=TOKENS, seed=1, ignore_eos=True)
    assert not isinstance(written, list)
    return written.tokens[:TOKENS]


def prefilled(decoder: Decoder, ids: list[int]) -> Iterator[NDArray[np.float32]]:
    yield from decoder.prefill(ids, decoder.new_cache(1, len(ids)), all_logits=True)


def stepped(decoder: Decoder, ids: list[int]) -> Iterator[NDArray[np.float32]]:
    cache = decoder.new_cache(1, len(ids))
    for token in ids:
        yield decoder.decode([token], cache, [0])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def test_cpu_agrees_with_the_reference(smollm2: Model, smollm2_path: Path, text_ids: list[int]) -> None:
    """KL at most 0.01, top-1 agreement at least 97 %, perplexity within 0.5 %; prefill and decode alike, to the bit."""
    reference = load(smollm2_path, backend="reference")
    next_ids, kl, agree, nll = text_ids[1:], [], [], []
    stream = zip(prefilled(reference.decoder, text_ids), prefilled(smollm2.decoder, text_ids))
    steps = stepped(smollm2.decoder, text_ids)
    for right, chunk in stream:
        assert all(np.array_equal(row, next(steps)[0]) for row in chunk)
        p, q = log_softmax(right), log_softmax(chunk)
        kl.append((np.exp(p) * (p - q)).sum(axis=-1))
        agree.append(p.argmax(axis=-1) == q.argmax(axis=-1))
        start = 512 * (len(kl) - 1)
        scored = np.arange(min(len(p), len(next_ids) - start))
        target = next_ids[start : start + len(scored)]
        nll.append(np.stack([-p[scored, target], -q[scored, target]]))
    means = np.concatenate(nll, axis=1).mean(axis=1)
    mean_kl, mean_agree = np.concatenate(kl).mean(), np.concatenate(agree).mean()
    print(f"\nKL {mean_kl:.2e}, top-1 {mean_agree:.4f}, perplexity {np.exp(means[1]):.4f} of {np.exp(means[0]):.4f}")
    assert mean_kl <= 0.01
    assert mean_agree >= 0.97
    assert abs(np.exp(means[1] - means[0]) - 1) <= 0.005


def greedy(model: Model, ids: list[int], length: int) -> tuple[list[int], list[NDArray[np.float32]]]:
    cache = model.decoder.new_cache(1, 512)
    *_, last = model.decoder.prefill(ids, cache)
    tokens: list[int] = []
    seen: list[NDArray[np.float32]] = []
    logits = last[-1]
    while len(tokens) < length:
        tokens.append(int(logits.argmax()))
        seen.append(logits)
        if tokens[-1] in model.tokenizer.stop_ids:
            break
        logits = model.decoder.decode([tokens[-1]], cache, [0])[0]
    return tokens, seen


@pytest.mark.parametrize("row", GREEDY, ids=[row["prompt"][:30] for row in GREEDY])
def test_greedy_text_is_llama_cpps(smollm2: Model, row: dict[str, list[int]]) -> None:
    """Up to the first choice that was nearly a tie: both round activations to 8 bits, llama.cpp all of them, and not at
    all on weights in float32. (Measured: at most 0.12 against its floats, 0.23 against its 8 bits, where logits have a
    standard deviation of about 3.)"""
    tokens, logits = greedy(smollm2, row["ids"], 64)
    for golden, margin in (("float32", 0.2), ("q4_1", 0.5)):
        for ours, theirs, scores in zip(tokens, row[golden], logits):
            if ours != theirs:
                assert scores[ours] - scores[theirs] < margin, golden
                break


def test_it_knows_the_capital_of_france(smollm2: Model) -> None:
    answer = smollm2.generate("What is the capital of France?", temperature=0, max_tokens=32)
    assert not isinstance(answer, list)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
