"""Models of folders in the library `mlx-lm`. Needs the extra `judges`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from numpy.typing import NDArray

mx.set_default_device(mx.cpu)
mx.disable_compile()  # which starts a compiler for each new kernel


def logits(folder: Path, ids: Any, in_float32: bool = False) -> NDArray[np.float32]:
    """Logits of every position in one pass: [N, vocab].

    Args:
        folder: of the model.
        ids: int [N].
        in_float32: computed in float32 throughout; else in what the folder's floats are.
    """
    model, _ = load_model(folder)
    if in_float32:
        model.set_dtype(mx.float32)
    return np.array(model(mx.array(ids)[None]).astype(mx.float32)[0])
