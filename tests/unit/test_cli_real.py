"""The commands on SmolLM2: what a user sees first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ondevice.generation.sampling import SamplingParams
from ondevice_chat.conversation import Conversation

pytestmark = pytest.mark.real_model


def run(*args, **extra):
    command = [sys.executable, "-m", "ondevice", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **extra)


def test_generate_answers_from_a_fresh_process(smollm2_path):
    args = ["generate", smollm2_path, "-p", "What is the capital of France?", "--temp", "0", "-n", "24", "--json"]
    done = run(*args)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert "Paris" in answer["text"] and answer["generation_tps"] > 1


def test_chat_answers_a_piped_prompt(smollm2_path):
    done = run("chat", smollm2_path, "--temp", "0", "-n", "24", input="What is the capital of France?\n")
    assert done.returncode == 0 and "Paris" in done.stdout and "tok/s" in done.stderr


def test_a_chat_remembers_and_computes_only_what_is_new(smollm2):
    conversation = Conversation(smollm2, SamplingParams(temperature=0, max_tokens=24))
    one = "".join(conversation.ask("My name is Ada. Please greet me."))
    first = conversation.stats
    assert one and first.reused_tokens == 0
    two = "".join(conversation.ask("What is my name?"))
    stats = conversation.stats
    # All but the tail of the first turn, where the template goes on after the answer, is found again.
    assert stats.reused_tokens >= first.prompt_tokens + first.generated_tokens - 3
    fresh = smollm2.generate(conversation.messages[:3], temperature=0, max_tokens=24)
    assert two == fresh.text


def test_perplexity_is_that_of_a_language_model(smollm2, smollm2_tokenizer):
    from ondevice_eval.evaluation import evaluate

    text = "The sun rises in the east and sets in the west. Water boils at one hundred degrees. " * 3
    scores = evaluate(smollm2.decoder, smollm2_tokenizer.encode(text, add_special=False), window=64)
    assert 0 < scores.nll < 3
