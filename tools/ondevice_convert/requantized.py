"""A checkpoint whose matrices are rounded anew while they are read; nothing is written or kept."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ondevice.checkpoint.base import Checkpoint
from ondevice.checkpoint.names import hub_layout
from ondevice.checkpoint.places import places
from ondevice.checkpoint.quantization import BITS, GROUP_SIZES, Quantized, Tensor
from ondevice.errors import CheckpointError, OptionError
from ondevice.spec_hub import as_on_hub
from ondevice_convert.forms import FINEST, stored_form
from ondevice_convert.rounding import as_floats, relative_error, rounded, with_plain_scales

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer

Form = tuple[int, int]
"""Bits and group size."""
_DTYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class Requantized(Checkpoint):
    """A model with its matrices in the forms that a recipe gives them, all of which a folder can hold.

    What is in the wanted form already stays as it is, bit for bit. What stays but cannot be stored so gets the
    nearest form that can: integer scales become float16 ones under the same codes, groups of 16 become 8 bits in
    groups of 32, and matrices that are stored [in, out] become float16.

    Args:
        source: the model; stays open.
        recipe: bits and group size, or "keep", by canonical name of a tensor or of its module; others stay.
        floats: "float16", "bfloat16" or "float32", for all tensors that are not quantized; as they are stored if left
            out.

    Attributes:
        errors: of the tensors read so far whose values were changed: the root mean square of the change, relative
            to that of the values.

    Raises:
        OptionError: the recipe asks for a form that a tensor cannot have.
    """

    def __init__(self, source: Checkpoint, recipe: Mapping[str, Form | str], floats: str | None = None) -> None:
        if floats is not None and floats not in _DTYPES:
            raise OptionError(f"floats {floats!r}: choose from {', '.join(_DTYPES)}")
        self.source, self.floats = source, floats
        self.spec, self.path, self.format = source.spec, source.path, source.format
        self.generation_config = source.generation_config
        self.errors: dict[str, float] = {}
        stored = places(hub_layout(self.spec.architecture), as_on_hub(self.spec))
        self._transposed = {name for name, place in stored.items() if place.transposed}
        shapes = self.spec.tensors()
        known = set(shapes) | {name.rsplit(".", 1)[0] for name in shapes}
        unknown = sorted(recipe.keys() - known)
        if unknown:
            raise OptionError(f"a recipe for {unknown[0]!r}, which the model does not have")
        self._wanted: dict[str, Form] = {}
        for name, shape in shapes.items():
            module, kind = name.rsplit(".", 1)
            form = recipe.get(name, recipe.get(module, "keep") if kind == "weight" and len(shape) == 2 else "keep")
            if isinstance(form, str):
                if form != "keep":
                    raise OptionError(f"{name}: {form!r} is no form; give bits and a group size, or 'keep'")
                continue
            if len(shape) != 2 or name in self._transposed:
                why = "is stored [in, out]" if len(shape) == 2 else "is no matrix"
                raise OptionError(f"{name}: {why} in {self.spec.architecture} folders and cannot be quantized; keep it")
            if form[0] not in BITS or form[1] not in GROUP_SIZES or shape[1] % form[1]:
                raise OptionError(
                    f"{name}: {form[0]} bits in groups of {form[1]} cannot be had of {shape[1]} inputs; "
                    f"bits are {BITS}, groups are those of {GROUP_SIZES} that divide the inputs"
                )
            self._wanted[name] = form

    def tensor(self, name: str) -> Tensor:
        tensor, target = self.source.tensor(name), self._target(name)
        if target is None:
            return tensor
        changed: Tensor
        if isinstance(target, str):
            try:
                changed = as_floats(tensor, _DTYPES[target])
            except OptionError as e:
                raise CheckpointError(self.path, str(e), name) from e
        elif isinstance(tensor, Quantized) and (tensor.bits, tensor.group_size) == target:
            changed = with_plain_scales(tensor)
        else:
            changed = rounded(tensor, *target)
        if len(tensor.shape) == 2:
            self.errors[name] = error = relative_error(tensor, changed)
            if not np.isfinite(error):
                raise CheckpointError(self.path, "has NaN or infinite weights; download the model again", name)
        self.source.release(name)
        return changed

    @property
    def changes(self) -> bool:
        """Whether any tensor is changed at all."""
        return any(self._target(name) is not None for name in self.spec.tensors())

    def measured(self) -> dict[str, float]:
        """`errors` of all tensors that are changed; those that were not read yet are read."""
        names = [name for name, shape in self.spec.tensors().items() if len(shape) == 2 and self._target(name)]
        for name in names:
            if name not in self.errors:
                self.tensor(name)
        return {name: self.errors[name] for name in names}

    def _target(self, name: str) -> Form | str | None:
        """Form or dtype that a tensor is given; None if it stays as it is."""
        now, wanted = stored_form(self.source, name), self._wanted.get(name)
        if wanted is not None and wanted != (now.bits, now.group_size):
            return wanted
        if not now.bits:
            return self.floats if self.floats not in (None, now.dtype) else None
        if name in self._transposed:
            return self.floats or "float16"
        if now.group_size not in GROUP_SIZES:
            return FINEST
        return None if now.plain else (now.bits, now.group_size)

    def release(self, name: str) -> None:
        self.source.release(name)

    def stored(self, name: str) -> tuple[str, int]:
        target, shape = self._target(name), self.spec.tensors()[name]
        if target is None:
            return self.source.stored(name)
        if isinstance(target, str):
            return target, prod(shape) * np.dtype(_DTYPES[target]).itemsize
        bits, group_size = target
        return f"affine {bits}-bit g{group_size}", prod(shape) * bits // 8 + prod(shape) // group_size * 4

    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer()

    def about(self) -> dict[str, Any]:
        return self.source.about()

    def close(self) -> None:
        """The source stays open: it belongs to whoever opened it."""
