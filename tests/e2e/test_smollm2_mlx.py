"""The real model on the MLX table, against the CPU path and the reference. (MLX takes seconds a prompt on a CPU.)"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ondevice.model import Model, load

pytestmark = [pytest.mark.real_model, pytest.mark.judge]

GREEDY = json.loads((Path(__file__).parents[1] / "golden" / "smollm2_greedy.json").read_text())
ANSWER = 16


@pytest.fixture(scope="module")
def on_mlx(smollm2_path: Path) -> Model:
    if not os.environ.get("CI") or sys.platform != "linux":
        pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")
    return load(smollm2_path, backend="mlx")


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Model:
    return load(smollm2_path, backend="reference")


def greedy(model: Model, ids: list[int]) -> tuple[list[int], NDArray[np.float32]]:
    """Tokens, and the logits that each was chosen from."""
    cache = model.decoder.new_cache(1, 256)
    *_, last = model.decoder.prefill(ids, cache)
    tokens, seen = [], [last[-1]]
    while len(tokens) < ANSWER:
        tokens.append(int(seen[-1].argmax()))
        seen.append(model.decoder.decode(tokens[-1:], cache, [0])[0])
    return tokens, np.stack(seen[:ANSWER])


def following(model: Model, ids: list[int], tokens: list[int]) -> NDArray[np.float32]:
    """Logits at the places where `greedy` chose these tokens."""
    whole = [*ids, *tokens[:-1]]
    cache = model.decoder.new_cache(1, 256)
    return np.concatenate(list(model.decoder.prefill(whole, cache, all_logits=True)))[len(ids) - 1 :]


@pytest.mark.parametrize("row", GREEDY[:2], ids=[row["prompt"][:30] for row in GREEDY[:2]])
def test_greedy_words_are_the_cpu_paths(on_mlx: Model, smollm2: Model, reference: Model, row: dict[str, Any]) -> None:
    """Wherever the reference's margin is more than four times the logits' error of both."""
    tokens, cpu = greedy(smollm2, row["ids"])
    right, mlx = (following(model, row["ids"], tokens) for model in (reference, on_mlx))
    errors = [np.sqrt(((found - right) ** 2).mean(axis=1)) for found in (cpu, mlx)]
    best = np.sort(right, axis=1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 4 * np.maximum(*errors)
    assert clear.sum() >= 12
    assert (mlx.argmax(axis=1) == cpu.argmax(axis=1))[clear].all()
    if on_mlx.decoder.ops.device.dtype.size == 4:  # float32, as on a CPU (measured: 4.2e-5)
        assert errors[1].max() < 1e-3
        assert (mlx.argmax(axis=1) == right.argmax(axis=1)).all()
    of_cpu, of_mlx = (e.max() for e in errors)
    print(f"\n{row['prompt'][:30]}: error of cpu {of_cpu:.3f}, of mlx {of_mlx:.1e}, {clear.sum()} clear")


def test_its_own_greedy_answer(on_mlx: Model, smollm2: Model) -> None:
    ask = {"temperature": 0, "max_tokens": 8}
    answers = [model.generate("What is the capital of France?", **ask) for model in (on_mlx, smollm2)]
    assert answers[0].tokens == answers[1].tokens and "Paris" in answers[0].text
