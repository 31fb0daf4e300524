"""What the judges said of the cases: files in tests/golden that `models_generate.py` made."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parents[1] / "golden"
TRANSFORMERS = FOLDER / "models_transformers.npz"
LLAMA_CPP = FOLDER / "models_llama_cpp.npz"


@functools.cache
def golden_logits(file: Path) -> dict[str, NDArray[np.float32]]:
    """Logits by case, float32 [len(POSITIONS), vocab]."""
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "about"}


@functools.cache
def golden_about(file: Path) -> dict[str, Any]:
    """What else was kept: `made_by`, and per case `ids`, and from transformers `config` and `tensors` (names)."""
    with np.load(file) as arrays:
        return json.loads(str(arrays["about"]))


def save_goldens(file: Path, logits: dict[str, NDArray[np.float32]], about: dict[str, Any]) -> None:
    """Writes a golden file."""
    np.savez_compressed(file, about=np.array(json.dumps(about)), **logits)  # type: ignore[arg-type]
