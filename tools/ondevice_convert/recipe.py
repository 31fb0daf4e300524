"""Which matrix is rounded to how many bits: one width for all, or more where it hurts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.places import places
from ondevice.checkpoint.quantization import BITS, GROUP_SIZES
from ondevice.errors import OptionError
from ondevice.spec import ModelSpec
from ondevice.spec_hub import as_on_hub
from ondevice_convert.forms import matrices, stored_form, usual_group
from ondevice_convert.sensitivity import Sensitivity

DEFAULT_GROUP = 64


@dataclass(frozen=True, slots=True)
class Recipe:
    """Forms of a model's matrices.

    Args:
        forms: bits and group size, or "keep", by canonical name of each matrix that could be rounded.
        weights: of each of them.
        code_bits: of each weight's code once it is written; 16 or 32 where it stays a float.
        notes: sentences for the report.
    """

    forms: Mapping[str, tuple[int, int] | str]
    weights: Mapping[str, int]
    code_bits: Mapping[str, int]
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As `of` takes it, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Recipe:
        """What `document` gave."""
        forms = {
            name: form if isinstance(form, str) else (form[0], form[1]) for name, form in document["forms"].items()
        }
        return cls(forms, document["weights"], document["code_bits"], tuple(document["notes"]))

    @property
    def average_bits(self) -> float:
        """Bits of a weight's code, without scales, on average."""
        return sum(self.code_bits[name] * n for name, n in self.weights.items()) / sum(self.weights.values())

    def describe(self) -> dict[str, Any]:
        """For a report: matrices and weights of each form, and bits on average. What all takes with its scales is
        said by `Checkpoint.describe` of the rounded model."""
        tensors: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for name, form in self.forms.items():
            kind = f"{form[0]}-bit g{form[1]}" if isinstance(form, tuple) else f"kept, {self.code_bits[name]}-bit"
            tensors[kind] += 1
            weights[kind] += self.weights[name]
        return {
            "forms": {kind: {"tensors": tensors[kind], "weights": weights[kind]} for kind in sorted(tensors)},
            "average_bits": round(self.average_bits, 3),
            "notes": list(self.notes),
        }


def make_recipe(
    source: Checkpoint, bits: float | None, group_size: int | None = None, sensitivity: Sensitivity | None = None
) -> Recipe:
    """What `--bits` and `--group-size` ask for, checked before any work is done.

    Matrices that have the wanted form, or fewer bits, already, are kept: more bits would give nothing back.

    Args:
        source: the model.
        bits: None: everything is kept. 4, 5, 6 or 8: for all matrices. Other numbers between 4 and 8: on average,
            more bits where the sensitivity says that it helps most.
        group_size: that of the source, where it is quantized, or 64, or what divides the model's sizes if left out.
        sensitivity: measured for the same group size; not needed where all matrices get the same bits.

    Raises:
        OptionError: bits or group size that this model cannot have.
    """
    if bits is None:
        if group_size is not None:
            raise OptionError(f"group size {group_size} without bits: give bits too, or leave both out")
        return _recipe(source, {}, 0)
    group_size = group_for(source, bits, group_size)
    if bits in BITS:
        return _recipe(source, dict.fromkeys(matrices(source.spec), int(bits)), group_size)
    if sensitivity is None:
        raise OptionError(f"bits {bits:g}: needs a measurement of what rounding costs; whole widths are {BITS}")
    if sensitivity.group_size != group_size:
        raise OptionError(f"group size {group_size}, but the cost was measured for groups of {sensitivity.group_size}")
    recipe = _recipe(source, sensitivity.choose(bits), group_size)
    note = f"{bits:g} bits on average were asked for, {recipe.average_bits:.2f} came of it"
    return replace(recipe, notes=(*recipe.notes, note))


def group_for(source: Checkpoint, bits: float, group_size: int | None = None) -> int:
    """The group size that a recipe has; see `make_recipe`.

    Raises:
        OptionError: bits or group size that this model cannot have.
    """
    if not (math.isfinite(bits) and min(BITS) <= bits <= max(BITS)):
        raise OptionError(f"bits {bits:g}: choose from {BITS}, or a number between 4 and 8 for a mix of them")
    spec = source.spec
    layout = places(hub_layout(spec.architecture), as_on_hub(spec))
    if any(place.transposed for place in layout.values()):
        raise OptionError(
            f"bits {bits:g}: {spec.architecture} folders hold matrices as [in, out], which cannot be quantized in "
            "groups of inputs; leave bits out"
        )
    widths = _widths(spec)
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths.values())]
    sizes = ", ".join(f"{name}={width}" for name, width in widths.items())
    if not fitting:
        raise OptionError(f"bits {bits:g}: no group size of {GROUP_SIZES} divides {sizes}; leave bits out")
    if group_size is None:
        usual = usual_group(source)
        return next(size for size in (usual, DEFAULT_GROUP, *fitting) if size in fitting)
    if group_size not in fitting:
        raise OptionError(f"group size {group_size}: this model can have {_either(fitting)}, since it has {sizes}")
    return group_size


def _either(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes)


def _widths(spec: ModelSpec) -> dict[str, int]:
    """Inputs that matrices of a model have."""
    return {"d_model": spec.d_model, "n_heads * head_dim": spec.n_heads * spec.head_dim, "d_ff": spec.d_ff}


def _recipe(source: Checkpoint, bits: Mapping[str, int], group_size: int) -> Recipe:
    """Of the wanted bits by name; what has none is kept."""
    weights, code_bits, fewer = matrices(source.spec), {}, 0
    forms: dict[str, tuple[int, int] | str] = {}
    for name in weights:
        now, wanted = stored_form(source, name), bits.get(name)
        less = wanted is not None and 0 < now.bits < wanted
        same = wanted is None or (now.bits, now.group_size) == (wanted, group_size)
        if wanted is None or less or same:
            forms[name], code_bits[name] = "keep", now.kept_bits
        else:
            forms[name], code_bits[name] = (wanted, group_size), wanted
        fewer += less
    notes = (f"{fewer} matrices have fewer bits than were wanted already, and are kept",) if fewer else ()
    return Recipe(forms, weights, code_bits, notes)
