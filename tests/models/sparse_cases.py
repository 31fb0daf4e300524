"""Tiny random models of every method that skips work, and the tensors that they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.sparsity.lte import Lte
from ondevice.sparsity.method import Method
from ondevice.sparsity.polar import Polar, PolarHeads, PolarNeurons
from ondevice.spec import ModelSpec
from tests.tiny import tiny_spec, tiny_tensors

N_LAYERS, D_FF = 3, 96
POLAR_TABLE = ((1, (20, 96, 7)), (2, (30, 40, 96)), (5, (96, 60, 1)))

METHODS: dict[str, tuple[str, Method]] = {
    "lte": ("llama", Lte()),
    "lte_single_neurons": ("gpt2", Lte(block=1, threshold=0.7)),
    "lte_post_norms": ("gemma2", Lte(block=8, threshold=0.4)),
    "polar": ("opt", Polar(PolarNeurons(8, POLAR_TABLE), PolarHeads(2))),
    "polar_neurons": ("opt", Polar(PolarNeurons(8, POLAR_TABLE))),
    "polar_heads": ("llama", Polar(heads=PolarHeads(3))),
    "polar_groups": ("qwen3", Polar(heads=PolarHeads(1, "kv_group", (0, 2)))),
    "polar_windows": ("gemma2", Polar(heads=PolarHeads(2, "head", ()))),
}
"""Name -> architecture and method."""
PER_TOKEN = [name for name, (_, method) in METHODS.items() if method.in_prompts]
POLAR = [name for name in METHODS if name.startswith("polar")]


def sparse_spec(name: str, **overrides: Any) -> ModelSpec:
    """The spec of a case, with other features where given."""
    architecture, method = METHODS[name]
    return tiny_spec(architecture, **{"sparsity": method, **overrides})


def sparse_tensors(spec: ModelSpec, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random tensors; those of a dense model of the same sizes have the same values where the shapes agree."""
    return tiny_tensors(spec, seed)


def dense_tensors(spec: ModelSpec, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Of a sparse model's tensors, those that a dense model has."""
    return {name: tensors[name] for name in spec.tensors()}
