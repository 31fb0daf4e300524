"""Tiny random models of every method that skips work, and the tensors that they need."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.sparsity.d2dmoe import D2dmoe, ExpertProjections
from ondevice.sparsity.lte import Lte
from ondevice.sparsity.method import Method
from ondevice.sparsity.polar import Polar, PolarHeads, PolarNeurons
from ondevice.sparsity.spark import Spark, SparkPart
from ondevice.sparsity.threshold import Cats, Teal
from ondevice.spec import ModelSpec
from tests.tiny import tiny_spec, tiny_tensors

N_LAYERS, D_FF = 3, 96
POLAR_TABLE = ((1, (20, 96, 7)), (2, (30, 40, 96)), (5, (96, 60, 1)))

METHODS: dict[str, tuple[str, Method]] = {
    "lte": ("llama", Lte()),
    "lte_single_neurons": ("gpt2", Lte(block=1, threshold=0.7)),
    "lte_post_norms": ("gemma2", Lte(block=8, threshold=0.4)),
    "lte_bias": ("qwen2", Lte(block=16, threshold=0.6, bias=True)),
    "d2dmoe": ("llama", D2dmoe(block=32, width=12, tau=0.6)),
    "d2dmoe_attention": ("qwen2", D2dmoe(8, 12, 0.4, ExpertProjections(48, 16, 10, "gelu"))),
    "d2dmoe_fused": ("phi3", D2dmoe(4, 12, 0.5, ExpertProjections(24, 4, 10))),
    "spark": ("llama", Spark(SparkPart(24, 12), SparkPart(8, 6))),
    "spark_ffn": ("gemma2", Spark(SparkPart(32, 30))),
    "spark_attention": ("gemma3_text", Spark(keys=SparkPart(8, 3))),
    "teal": ("llama", Teal(tuple((name, (0.5, 0.3, 0.7)) for name in ("q", "k", "v", "o", "gate", "up", "down")))),
    "teal_each": ("opt", Teal((("q", (0.1, 0.2, 0.3)), ("v", (0.4, 0.4, 0.4)), ("down", (0.2, 0.0, 0.1))))),
    "teal_gate": ("qwen2", Teal((("gate", (0.3, 0.3, 0.3)), ("up", (0.3, 0.5, 0.3))))),
    "cats": ("llama", Cats((0.1, 0.2, 0.3))),
    "cats_up": ("qwen2", Cats((0.01, 0.02, 0.03), ("gate", "up", "up"))),
    "cats_gate": ("llama", Cats((0.01, 0.003, 0.003), ("up", "gate", "gate"))),
    "cats_relu": ("gemma2", Cats((0.0, 0.0, 0.1))),
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
    extra = {"cats_relu": {"activation": "relu"}, "spark_attention": {"windows": (5, 5, 0)}}.get(name, {})
    return tiny_spec(architecture, **{"sparsity": method, **extra, **overrides})


def sparse_tensors(spec: ModelSpec, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Random tensors; those of a dense model of the same sizes have the same values where the shapes agree."""
    return tiny_tensors(spec, seed)
