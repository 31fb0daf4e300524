"""What skipping work came to, from what an op table counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ondevice.ops.base_skipping import Tally

if TYPE_CHECKING:
    from ondevice.sparsity.plan import Plan
    from ondevice.spec import ModelSpec

Counts = Mapping[str, Tally]


@dataclass(frozen=True, slots=True)
class SparsityStats:
    """Of all steps between two moments, those of other rows of a batch included.

    Args:
        method: its name.
        kind: what it promises: "exact", "trained" or "approximate".
        sparse_calls: part of the calls that ran sparse, of operations that the method may skip in. The others are
            prompts and layers that the method leaves dense, and what fell back.
        density: mean part that the sparse calls kept, by what it is: "ffn" (neurons), "inputs" (of linears), "heads"
            and "keys" (of attention).
        bytes_skipped: of weights, keys and values that were not read.
        router_seconds: that selecting took, where the steps were profiled.
        dense_layers: that do not skip, by plan.
        plan: of the model, as a file holds it.
    """

    method: str
    kind: str
    sparse_calls: float
    density: dict[str, float]
    bytes_skipped: int
    router_seconds: float | None = None
    dense_layers: tuple[int, ...] = ()
    plan: dict[str, Any] = field(default_factory=dict)


def sparsity_stats(
    spec: ModelSpec, plan: Plan, before: Counts, after: Counts, router_seconds: float | None = None
) -> SparsityStats | None:
    """What happened between two looks at `Ops.counts`.

    Args:
        spec, plan: of the model as it ran.
        before, after: the counts.
        router_seconds: of the part "router" in a profile of these steps, if there is one.

    Returns:
        None for a dense model.
    """
    method = spec.sparsity
    if method is None:
        return None
    tallies = _between(method.skips, before, after)
    calls = sum(tally.calls for tally in tallies.values())
    return SparsityStats(
        method.name,
        method.kind(spec),
        sum(tally.sparse for tally in tallies.values()) / calls if calls else 0.0,
        _parts(tallies),
        sum(tally.bytes_skipped for tally in tallies.values()),
        router_seconds,
        plan.dense_layers(spec),
        plan.document(spec),
    )


def densities(spec: ModelSpec, before: Counts, after: Counts) -> dict[str, float]:
    """Mean part of what was kept between two looks at `Ops.counts`, by its name there, where something may skip.

    Args:
        spec: of the model as it ran; "words" of its head are counted too.
    """
    return _parts(_between((*(spec.sparsity.skips if spec.sparsity else ()), "words"), before, after))


def _between(kinds: tuple[str, ...], before: Counts, after: Counts) -> dict[str, Tally]:
    return {kind: _since(before.get(kind, Tally()), after.get(kind, Tally())) for kind in kinds}


def _parts(tallies: dict[str, Tally]) -> dict[str, float]:
    return {kind: tally.kept / tally.units for kind, tally in tallies.items() if tally.units}


def _since(before: Tally, after: Tally) -> Tally:
    return replace(after, **{name: getattr(after, name) - getattr(before, name) for name in Tally.__slots__})
