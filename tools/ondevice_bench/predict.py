"""A roofline: tokens per second that a chip's memory allows, from the bytes that a token must move. Predictions only.

Generating a token reads weights, keys and values once; no machine does it faster than its memory gives them. How much
of that a machine reaches is another matter, which only running shows. Prompts are bound by arithmetic: not predicted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ondevice import machine
from ondevice.errors import OptionError
from ondevice.ops.mlx_bytes import device_bytes, groups_of, kv_bytes
from ondevice.sparsity.polar import Polar
from ondevice.sparsity.spark import Spark
from ondevice.sparsity.threshold import Cats
from ondevice_bench.chips import CHIPS, HERE
from ondevice_bench.report import markdown

if TYPE_CHECKING:
    from ondevice.checkpoint.base import Checkpoint
    from ondevice.sparsity.method import Method
    from ondevice.spec import ModelSpec
    from ondevice_bench.cases import Case

ITEM = 2
"""Bytes of scales, floats, keys and values: bfloat16 on a GPU, float16 in the CPU's cache."""
WARNING = (
    "PREDICTED from counted bytes and the memory's bandwidth, not measured: what the memory allows at most. "
    "Nobody has run this on an Apple GPU yet."
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one decode step.

    Args:
        size_of: of a tensor by its name, as it lies in the memory of what is predicted.
        spec: of the model as it runs.
        checkpoint: that says what its tensors are.
        kv: of a key or a value of one head.
    """

    size_of: Callable[[str], float]
    spec: ModelSpec
    checkpoint: Checkpoint
    kv: int

    def step(self, batch: int, length: int) -> float:
        """Weights once, rows of the embedding and what is seen of the cache for each of the sequences.

        Args:
            length: keys that a token sees in layers without a window, its own among them.
        """
        spec = self.spec
        names = [name for name in spec.tensors() if not name.startswith(("embed.", "position."))]
        weights = sum(self.size_of(name) * self._kept(name) for name in names)
        head = self.size_of("embed.weight") if spec.tied_head else 0.0
        rows = 0.0 if spec.tied_head else self.size_of("embed.weight") / spec.vocab_size
        if spec.position_offset is not None:
            rows += self.size_of("position.weight") / spec.tensors()["position.weight"][0]
        return weights + head + batch * (rows + sum(self._cache(i, length) for i in range(spec.n_layers)))

    def _kept(self, name: str) -> float:
        """Part of a tensor that a step of one token reads."""
        method = self.spec.sparsity
        if method is None or "ffn" not in method.skips or not name.startswith("layers."):
            return 1.0
        layer, _, module = name.removeprefix("layers.").partition(".")
        density = method.density(self.spec, int(layer))
        if density is None:
            raise OptionError(f"{method.name}: no density is known of layer {layer}, so its bytes cannot be counted")
        if module in ("up.weight", "gate.weight"):
            return 1.0 if module == _selecting(method, int(layer)) else density
        return self._kept_of_down(name, density) if module == "down.weight" else 1.0

    def _kept_of_down(self, name: str, density: float) -> float:
        """Codes of the neurons that run, and scales of all groups of neurons that hold one of them."""
        bits, group = groups_of(self.checkpoint.stored(name)[0])
        if not bits:
            return density
        block = getattr(self.spec.sparsity, "block", 1)
        touched = 1 - (1 - density) ** max(1, group // block)
        codes, scales = bits / 8, 2 * ITEM / group
        return (codes * density + scales * touched) / (codes + scales)

    def _cache(self, layer: int, length: int) -> float:
        spec = self.spec
        seen = min(length, spec.windows[layer] or length)
        whole = 2.0 * seen * spec.n_kv_heads * self.kv
        method = spec.sparsity
        if isinstance(method, Polar) and method.heads is not None and layer not in method.heads.dense_layers:
            units = spec.n_heads if method.heads.unit == "head" else spec.n_kv_heads
            part = method.heads.kept / units
            if method.heads.unit == "head":
                # A KV head is read if any of its query heads runs.
                part = 1 - math.comb(spec.n_heads - spec.group, method.heads.kept) / math.comb(units, method.heads.kept)
            return whole * part
        if isinstance(method, Spark) and method.keys is not None:
            kept = min(seen, method.keys.k)
            first = method.keys.r / spec.head_dim
            return spec.n_kv_heads * self.kv * (seen * first + kept * (2 - first))
        return whole


def _selecting(method: Method, layer: int) -> str | None:
    """The matrix that is computed whole, because it selects the neurons of the others."""
    if isinstance(method, Cats) and method.first is not None:
        return f"{method.first[layer]}.weight"
    return "gate.weight" if isinstance(method, (Cats, Spark)) else None


def traffic_of(checkpoint: Checkpoint, spec: ModelSpec, chip: str, kv_bits: int | None) -> Traffic:
    """What a step moves on a chip: in the MLX table's layout, or, here, as the CPU keeps what the file holds.

    Args:
        spec: of the checkpoint's model as it runs.
        chip: a name of CHIPS, or HERE.
    """
    shapes = spec.tensors()

    def on_gpu(name: str) -> float:
        return device_bytes(checkpoint.stored(name)[0], shapes[name], ITEM)

    def on_cpu(name: str) -> float:
        return checkpoint.stored(name)[1]

    return Traffic(on_cpu if chip == HERE else on_gpu, spec, checkpoint, kv_bytes(spec.head_dim, ITEM, kv_bits or 0))


def predict(
    checkpoint: Checkpoint, label: str, chip: str, cases: Sequence[Case], kv_bits: int | None = None
) -> list[dict[str, Any]]:
    """Predictions of all tests that generate.

    Args:
        checkpoint: only its header is read.
        label: of the model, for the rows.
        chip: a name of CHIPS, or HERE.
        cases: prompts among them are left out.

    Returns:
        For each configuration of the chip and test: keys "test", "chip", "model", "sparsity", "bandwidth_gbs",
        "bytes_per_token", "predicted_ts" and "prediction", which is True.

    Raises:
        OptionError: a batch of a model that skips, or no test that generates.
    """
    spec = checkpoint.spec
    wanted = [case for case in cases if case.kind == "tg"]
    if not wanted:
        raise OptionError("--predict is of generation, which --only pp leaves out; prompts are bound by arithmetic")
    skips = spec.sparsity is not None
    if skips and any(case.batch > 1 for case in wanted):
        raise OptionError(
            "--predict counts bytes of one sequence where a model skips, since rows are shared; take -b 1"
        )
    traffic = traffic_of(checkpoint, spec, chip, kv_bits)
    chips: Sequence[tuple[str, float]] = CHIPS.get(chip, ())
    if chip == HERE:
        chips = [(machine.cpu_name(), machine.read_bandwidth(machine.default_threads()) / 1e9)]
    rows = []
    for name, gbs in chips:
        for case in wanted:
            steps = [traffic.step(case.batch, end) for end in range(case.depth + 1, case.positions + 1)]
            each = math.fsum(steps) / len(steps) / case.batch
            rows.append(
                {
                    "test": case.name,
                    "chip": name,
                    "model": label,
                    "sparsity": spec.sparsity.name if spec.sparsity else "dense",
                    "bandwidth_gbs": round(gbs, 2),
                    "bytes_per_token": round(each),
                    "predicted_ts": gbs * 1e9 / each,
                    "prediction": True,
                }
            )
    return rows


def render(rows: Sequence[dict[str, Any]], output: str) -> str:
    """Predictions as text, each marked as such. output: "md" or "json"."""
    if output == "json":
        return json.dumps(list(rows), indent=1)
    shown = [
        {
            "chip": r["chip"],
            "model": r["model"],
            "sparsity": r["sparsity"],
            "test": r["test"],
            "GB/s": f"{r['bandwidth_gbs']:g}",
            "MB/token": f"{r['bytes_per_token'] / 1e6:.1f}",
            "tok/s, at most": f"{r['predicted_ts']:.1f}",
        }
        for r in rows
    ]
    return f"{WARNING}\n\n" + markdown(shown, left=("chip", "model", "sparsity", "test"))
