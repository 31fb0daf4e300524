"""What `ondevice doctor --report FILE` adds to a look at the machine: whether kernels and backends agree, and how fast
they are.

A part that fails is told in its place, with the error: a report of a machine where much fails is worth the most.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.decoder import Decoder
from ondevice.model import op_table
from ondevice.sparsity.settings import SparsitySettings
from ondevice_bench.cases import Case, parse
from ondevice_bench.command import run_tests
from ondevice_bench.loading import Source
from ondevice_bench.random_weights import RandomWeights
from ondevice_bench.shapes import shape_spec
from ondevice_bench.sparsity import parse as parse_sparsity
from ondevice_parity import parity

Say = Callable[[str], None]
AGREEMENT = (
    ("smollm2-135m", None),
    ("smollm2-135m", "lte:rows=0.5,block=32"),
    ("smollm2-135m", "d2dmoe:rows=0.5,block=32"),
    ("smollm2-135m", "spark:rows=0.1,tokens=16"),
    ("smollm2-135m", "polar:heads=0.5"),
    ("opt-125m", "polar:rows=0.5,heads=0.5,rank=32"),
)
"""Shapes, and what they skip: each as two layers with a small vocabulary."""
SMALL = {"num_hidden_layers": 2, "vocab_size": 512}
PROMPT, STEPS = 40, 8
LENGTHS = (40, 1, 17)
TESTS = "pp128, tg32, tg32 @ d512, tg32 b4"
KERNEL_HOMES = ("cpu", "metal", "mlx", "triton")
"""Homes of kernels that a report is about; why one does not run here is told too."""
GPU_SOURCES = (
    Source("llama-3.2-1b", 4, 64),
    Source("llama-3.2-1b", 4, 64, parse_sparsity("lte:rows=0.25,block=32"), plan="sparse"),
    Source("llama-3.2-1b", 4, 64, parse_sparsity("polar:heads=0.5"), plan="sparse"),
)
"""What a GPU also runs: random weights of a size where memory is what counts, dense and two methods in turn."""


def health(backends: Sequence[str], model: str, say: Say) -> dict[str, Any]:
    """Every kernel against float64 where it runs here; agreement with the reference, and speed, of some backends.

    Args:
        backends: that are ready here, besides the reference.
        model: to measure; a name in the store or a path.
        say: told what is being done.

    Returns:
        "parity": as `ondevice_parity.parity.Report.document` has them; "agreement" and "bench": lists of rows. Or
        {"error": ...} in the place of what failed.
    """
    say("kernels: each case of each against float64")
    report: dict[str, Any] = {"parity": _tried(_parity), "agreement": [], "bench": []}
    for backend in backends:
        for shape, method in AGREEMENT:
            say(f"{backend}: {shape}, {method or 'dense'}, against the reference")
            row = {"backend": backend, "shape": shape, "sparsity": method or "dense"}
            report["agreement"].append({**row, **_tried(agreement, backend, shape, method)})
        sources = [[Source(model)]]
        if (_where(backend) or "").startswith("GPU"):
            sources.append(list(GPU_SOURCES))
        for some in sources:
            say(f"{backend}: measuring {some[0].label}")
            found = _tried(_measured, some, backend)
            report["bench"] += found.get("rows", [{"backend": backend, **found}])
    return report


def agreement(backend: str, shape: str, method: str | None) -> dict[str, Any]:
    """Logits of a prompt, and of ragged steps of a batch, against the float64 reference on the same weights.

    Returns:
        "device", "rms" and "largest" error as parts of the logits' deviation, "top1" agreement, and "counts" of what
        was skipped. Of methods that round a score to the other side of a border, single tokens differ by much.
    """
    spec = shape_spec(shape, **SMALL)
    if method is not None:
        spec = parse_sparsity(method).spec_for(spec, [len(LENGTHS)])
    weights: Any = RandomWeights(spec, 4, 32)
    settings = SparsitySettings(plan="sparse")
    table = op_table(backend, None, None)
    ours, right = (_logits(Decoder(weights, ops, None, settings)) for ops in (table, op_table("reference", None, None)))
    off, deviation = ours - right, float(right.std())
    counts = {kind: [t.kept, t.units] for kind, t in table.counts().items() if t.units}
    return {
        "device": table.where,
        "rms": float(np.sqrt((off * off).mean())) / deviation,
        "median_rms": float(np.median(np.sqrt((off * off).mean(axis=1)))) / deviation,
        "largest": float(np.abs(off).max()) / deviation,
        "top1": float((ours.argmax(axis=1) == right.argmax(axis=1)).mean()),
        "counts": counts,
    }


def _logits(decoder: Decoder) -> NDArray[np.float64]:
    ids = np.random.default_rng(0).integers(0, decoder.spec.vocab_size, PROMPT + STEPS).tolist()
    cache = decoder.new_cache(len(LENGTHS), PROMPT + STEPS)
    rows = []
    for slot, length in enumerate(LENGTHS):
        rows += list(decoder.prefill(ids[:length], cache, slot, all_logits=True))
    for token in ids[-STEPS:]:
        rows.append(decoder.decode([token] * len(LENGTHS), cache, range(len(LENGTHS))))
    return np.concatenate(rows).astype(np.float64)


def _measured(sources: list[Source], backend: str) -> dict[str, Any]:
    cases: list[Case] = parse(TESTS)
    return {"rows": list(run_tests([replace(s) for s in sources], backend, None, cases, 3, False))}


def _parity() -> dict[str, Any]:
    return parity.run(KERNEL_HOMES).document()


def _where(backend: str) -> str | None:
    return op_table(backend, None, None).where


def _tried(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return function(*args)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}", "traceback": traceback.format_exc().splitlines()[-12:]}
