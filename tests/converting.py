"""Tiny models with samples of what they see, for tests of the converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.base import Checkpoint
from ondevice.commands.method_option import MethodOption, read_method
from ondevice.decoder import Decoder
from ondevice.ops.reference import ReferenceOps
from ondevice.spec import ModelSpec
from ondevice_convert.samples import Samples, gather
from tests.tiny import tiny_checkpoint, tiny_spec


def tiny_model(folder: Path, architecture: str = "llama", **overrides: Any) -> Checkpoint:
    """A random model in a folder, with a context of 512."""
    spec = tiny_spec(architecture, context_length=512, **overrides)
    return open_checkpoint(tiny_checkpoint(folder / "model", spec))


def random_tokens(spec: ModelSpec, count: int, seed: int = 0) -> list[int]:
    """A text without sense."""
    return np.random.default_rng(seed).integers(0, spec.vocab_size, count).tolist()


def watched(base: Checkpoint, places: tuple[str, ...], count: int = 400) -> Samples:
    """Samples of a model on a text without sense, all positions of it."""
    return gather(Decoder(base, ReferenceOps()), random_tokens(base.spec, count), places, count)


def option(text: str, method: str, keys: Mapping[str, str]) -> MethodOption:
    """As the command reads it."""
    return MethodOption(text, *read_method(text, {method: keys}))


def ffn_inputs(base: Checkpoint, layer: int, count: int = 400) -> NDArray[np.float32]:
    """The FFN's inputs [n, d] of the same text as `watched`, without the rounding of samples."""
    (x,) = Decoder(base, ReferenceOps()).watch(random_tokens(base.spec, count), ["ffn"], [layer])
    return x[:, 0]
