"""Backend cuda through tiny models with random weights against the float64 reference: dense and every method.

Prompts of different lengths, then steps of all sequences, of one, and of some in another order: on a GPU those are
CUDA graphs, recorded at the first step of a size and replayed at the others. In float32, so that no choice turns on
rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ondevice.decoder import Decoder
from ondevice.ops import torch_device
from ondevice.ops.base import Ops
from ondevice.ops.reference import ReferenceOps
from ondevice.sparsity.d2dmoe import D2dmoe
from ondevice.sparsity.lte import Lte
from ondevice.sparsity.polar import Polar, PolarHeads, PolarNeurons
from ondevice.sparsity.settings import SparsitySettings
from ondevice.sparsity.spark import Spark
from ondevice.sparsity.threshold import Cats, Teal
from ondevice.spec import ModelSpec, RopeSpec
from ondevice_bench.gpu_parity import Result
from ondevice_bench.random_weights import RandomWeights

LENGTHS = (3, 1, 40, 17, 70)
TOLERANCE = 1e-3
"""Of logits, relative to the largest: float32 through two layers, on tensor cores."""
LLAMA = ModelSpec(
    architecture="llama", n_layers=2, d_model=128, n_heads=8, n_kv_heads=4, head_dim=32, d_ff=256, vocab_size=256,
    context_length=256, rope=RopeSpec(dim=32),
)  # fmt: skip
OPT = replace(
    LLAMA, architecture="opt", norm="layer", rope=None, n_kv_heads=8, gated=False, activation="relu", qkv_bias=True,
    output_bias=True, ffn_bias=True, position_offset=2,
)  # fmt: skip
SPECS = {
    "dense": LLAMA,
    "dense, windows and caps": replace(LLAMA, windows=(16, 0), attention_softcap=20.0, logit_softcap=30.0),
    "dense, opt": OPT,
    "polar": replace(OPT, sparsity=Polar(PolarNeurons(32, ((1, (60, 30)), (8, (120, 90)))), PolarHeads(3))),
    "polar, KV groups": replace(LLAMA, sparsity=Polar(heads=PolarHeads(2, "kv_group", ()))),
    "lte": replace(LLAMA, sparsity=Lte()),
    "d2dmoe": replace(LLAMA, sparsity=D2dmoe(block=32, width=32, tau=0.5)),
    "spark": replace(LLAMA, sparsity=Spark.of_halves(LLAMA, 24, 8)),
    "teal": replace(LLAMA, sparsity=Teal(tuple((name, (0.5, 0.5)) for name in ("q", "o", "up", "down")))),
    "cats": replace(LLAMA, sparsity=Cats((0.1, 0.2))),
}


def _logits(spec: ModelSpec, ops: Ops, bits: int, lengths: tuple[int, ...]) -> NDArray[np.float32]:
    """Of all steps, one after the other."""
    decoder = Decoder(cast("Any", RandomWeights(spec, bits)), ops, settings=SparsitySettings(plan="sparse"))
    cache = decoder.new_cache(len(lengths), 128)
    found = []
    for slot, length in enumerate(lengths):
        found += list(decoder.prefill([(7 * slot + i) % 256 for i in range(length)], cache, slot))
    for step in range(3 if lengths == LENGTHS else 1):
        for slots in (list(range(len(lengths))), [1], [2, 0]):
            found.append(decoder.decode([(31 * step + 5 * slot) % 256 for slot in slots], cache, slots))
    return np.concatenate(found)


def models(few: bool = False) -> Iterator[Result]:
    """A result for each model, floats and 4 bits. One that raises has failed, and the others go on.

    Args:
        few: two of them, where kernels are interpreted.
    """
    before = os.environ.get(torch_device.DTYPE)
    os.environ[torch_device.DTYPE] = "float32"
    try:
        names = [(name, bits) for name in SPECS for bits in (16, 4)]
        for name, bits in names if not few else (("dense", 4), ("polar", 16)):
            yield _model(f"{name}, {bits} bits", SPECS[name], bits, few)
    finally:
        os.environ.pop(torch_device.DTYPE)
        if before is not None:
            os.environ[torch_device.DTYPE] = before


def _model(name: str, spec: ModelSpec, bits: int, few: bool) -> Result:
    from ondevice.ops.torch_cuda import CudaOps

    try:
        lengths = (*LENGTHS[:2], 4) if few else LENGTHS
        ops = CudaOps()
        if not few:
            # What a cache has recorded goes with it; the next one records anew.
            _logits(spec, ops, bits, lengths[:3])
        got, right = (_logits(spec, table, bits, lengths) for table in (ops, ReferenceOps()))
        error = float(np.abs(got - right).max() / np.abs(right).max())
    except Exception as e:
        return Result("backend cuda", name, float("inf"), 0.0, False, f"{type(e).__name__}: {e}"[:300])
    return Result("backend cuda", name, error, TOLERANCE, error <= TOLERANCE)
