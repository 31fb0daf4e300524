"""What a caller may say about skipping work when a model is loaded."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ondevice.errors import OptionError, SparsityError
from ondevice.sparsity.plan import SPARSE

if TYPE_CHECKING:
    from ondevice.spec import ModelSpec

_LOG = logging.getLogger("ondevice")


@dataclasses.dataclass(frozen=True, slots=True)
class SparsitySettings:
    """Options of `ondevice.load`.

    Args:
        tau: in the place of the checkpoint's, for methods that have one.
        strict: raise where a sparse path cannot run, instead of taking the dense one.
        dense: select everything.
        plan: "auto", "sparse", "dense" or a file: which layers skip.
    """

    tau: float | None = None
    strict: bool = False
    dense: bool = False
    plan: str | Path = SPARSE
    _said: set[str] = dataclasses.field(default_factory=set, init=False, repr=False, compare=False)

    def apply(self, spec: ModelSpec) -> ModelSpec:
        """The model as it will run.

        Raises:
            OptionError: tau for a model without, or out of range; a method that has no dense form.
        """
        method = spec.sparsity
        if self.tau is not None:
            if self.dense:
                raise OptionError(f"tau is {self.tau} and dense is set, which selects everything: leave one out")
            if method is None:
                raise OptionError(f"tau is {self.tau}, but the model is dense and selects nothing; leave tau out")
            method = method.with_tau(self.tau)
        if self.dense and method is not None:
            method = method.dense()
        return dataclasses.replace(spec, sparsity=method)

    def fall_back(self, reason: str) -> None:
        """Says once that a dense path runs in the place of a sparse one, and why.

        Raises:
            SparsityError: in strict settings.
        """
        if self.strict:
            raise SparsityError(f"{reason}; without strict it would run dense")
        if reason not in self._said:
            self._said.add(reason)
            _LOG.warning("%s; it runs dense", reason)
