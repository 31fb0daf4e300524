"""Tiny random models with samples of what their layers see, for tests of calibrations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.base import Checkpoint
from ondevice.commands.method_option import MethodOption, read_method
from ondevice.decoder import Decoder
from ondevice.ops.base import Ops
from ondevice.ops.reference import ReferenceOps
from ondevice_convert.changed import Changed
from ondevice_convert.fitted import Fitted
from ondevice_convert.samples import Samples, gather
from tests.tiny import tiny_checkpoint, tiny_spec

POSITIONS = 1000


def calibrated(folder: Path, architecture: str = "llama", **overrides: Any) -> tuple[Checkpoint, Samples]:
    """An open model, and samples of a random text."""
    base = open_checkpoint(tiny_checkpoint(folder, tiny_spec(architecture, **{"context_length": 512, **overrides})))
    ids = np.random.RandomState(3).randint(0, base.spec.vocab_size, POSITIONS).tolist()
    return base, gather(Decoder(base, ReferenceOps()), ids, ["ffn"], POSITIONS)


def option(text: str, keys: dict[str, str]) -> MethodOption:
    """`METHOD:key=value,...` of a method with these keys."""
    return MethodOption(text, *read_method(text, {text.partition(":")[0]: keys}))


def run(base: Checkpoint, fitted: Fitted, ops: Ops | None = None) -> Decoder:
    """A decoder of the model that a calibration made."""
    spec = dataclasses.replace(base.spec, sparsity=fitted.method)
    return Decoder(Changed(base, spec, fitted.added, fitted.orders), ops or ReferenceOps())
