"""Which layers skip: up to which density each of them is run sparse.

A plan chooses kernels. Where a method promises the same result ("exact") or the model was trained for it, the dense
form masks what was not selected; only approximate methods lose their selection in layers that are planned dense.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ondevice.errors import OptionError
from ondevice.spec_fields import Fields

if TYPE_CHECKING:
    from ondevice.spec import ModelSpec

AUTO, SPARSE, DENSE = "auto", "sparse", "dense"
LIMITS = "sparse_up_to"


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of one model.

    Args:
        limits: of each layer, the largest density that it runs sparse: 0 is dense always, 1 sparse always.
    """

    limits: tuple[float, ...]

    def sparse(self, layer: int, density: float | None) -> bool:
        """Whether a layer skips at a density, which may be unknown."""
        limit = self.limits[layer]
        return limit >= 1 or (limit > 0 and (density is None or density <= limit))

    def dense_layers(self, spec: ModelSpec) -> tuple[int, ...]:
        """Layers that do not skip at the densities which the model's method expects."""
        method = spec.sparsity
        if method is None:
            return ()
        return tuple(i for i in range(spec.n_layers) if not self.sparse(i, method.density(spec, i)))

    def document(self, spec: ModelSpec) -> dict[str, Any]:
        """What a file holds that `make_plan` reads."""
        return {**_identity(spec), LIMITS: list(self.limits)}


def make_plan(choice: str | Path, spec: ModelSpec, break_even: Callable[[int], float]) -> Plan:
    """The plan of a model as it will run.

    Args:
        choice: "auto", "sparse", "dense", or a file.
        break_even: the density below which a layer is faster sparse; asked for layers of known densities below 1.

    Raises:
        OptionError: no such file, or one of another model.
        CheckpointError: what the file says is missing or impossible.
    """
    if choice not in (AUTO, SPARSE, DENSE):
        return _read(Path(choice), spec)
    if choice != AUTO or spec.sparsity is None:
        return Plan((0.0 if choice == DENSE else 1.0,) * spec.n_layers)
    limits = []
    for i in range(spec.n_layers):
        density = spec.sparsity.density(spec, i)
        limits.append(1.0 if density is None else 0.0 if density >= 1 else break_even(i))
    return Plan(tuple(limits))


def _identity(spec: ModelSpec) -> dict[str, Any]:
    """What must be equal for a plan to be a model's."""
    name = spec.sparsity.name if spec.sparsity else "dense"
    return {"method": name, "n_layers": spec.n_layers, "d_model": spec.d_model, "d_ff": spec.d_ff}


def _read(path: Path, spec: ModelSpec) -> Plan:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        problem = e.strerror if isinstance(e, OSError) else "no JSON"
        raise OptionError(f"plan {str(path)!r}: {problem}; give auto, sparse, dense or a file of a plan") from e
    if not isinstance(document, dict):
        raise OptionError(f"plan {str(path)!r}: no JSON object; give a file of a plan")
    fields = Fields(document, path)
    for key, own in _identity(spec).items():
        if fields.raw(key) != own:
            raise OptionError(f"plan {path}: {key} is {document[key]!r}, the model's is {own!r}: it is another model's")
    fields.known(*_identity(spec), LIMITS)
    limits = fields.numbers(LIMITS, spec.n_layers, zero=True)
    if max(limits) > 1:
        raise fields.error(LIMITS, f"{max(limits):g} is no density; give numbers from 0, dense, to 1, sparse")
    return Plan(limits)
