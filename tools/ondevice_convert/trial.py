"""Models that are tried before one of them is written: all packed by one table, from weights in memory."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ondevice.checkpoint.base import Checkpoint
from ondevice.decoder import Decoder
from ondevice.errors import OptionError
from ondevice.model import compiling_progress, op_table
from ondevice.ops.base import Ops
from ondevice.sparsity.break_even import BreakEvens
from ondevice.sparsity.head_sketch import add_sketch
from ondevice.sparsity.settings import SparsitySettings
from ondevice_convert.changed import Changed
from ondevice_convert.fitted import Fitted
from ondevice_convert.quality import Quality, compare
from ondevice_convert.speed import Speed, in_turns

Progress = Callable[[int, int, str], None]


@dataclass(slots=True)
class Trial:
    """A dense model, and others made of it.

    Args:
        base: the dense model.
        ops: packs and runs all of them.
        progress: hears of what takes long.
    """

    base: Checkpoint
    ops: Ops
    progress: Progress
    _dense: Decoder | None = field(default=None, init=False)

    @classmethod
    def of(cls, base: Checkpoint, backend: str, threads: int | None, progress: Progress) -> Trial:
        """With a new table. backend, threads: as of `ondevice.load`."""
        return cls(base, op_table(backend, threads, compiling_progress(progress)), progress)

    @property
    def dense(self) -> Decoder:
        """The model itself."""
        if self._dense is None:
            self._dense = self._packed(self.base, "sparse")
        return self._dense

    def changed(self, fitted: Fitted) -> Changed:
        """The checkpoint of a method that was fitted."""
        spec = dataclasses.replace(self.base.spec, sparsity=fitted.method)
        return Changed(self.base, spec, fitted.added, fitted.orders)

    def decoder(self, fitted: Fitted, plan: str = "sparse") -> Decoder:
        """A method's model. plan: as of `ondevice.load`."""
        return self._packed(self.changed(fitted), plan)

    def reordered(self, fitted: Fitted) -> Decoder:
        """The dense model with its neurons in a method's order."""
        return self._packed(Changed(self.base, self.base.spec, orders=fitted.orders), "sparse")

    def sketched(self, decoder: Decoder) -> Decoder | None:
        """The same with a sketch of its head; None where there is none for it."""
        made = copy.copy(decoder)
        try:
            add_sketch(made, self.base, self.progress)
        except OptionError:
            return None
        self.ops.prepare(made.spec, compiling_progress(self.progress))
        return made

    def ratios(self, fitted: Fitted) -> list[dict[float, float] | None]:
        """Of each layer its time sparse as a part of its time dense, by density; None where time does not decide.

        Args:
            fitted: has a density below 1 in each layer.
        """
        changed = self.changed(fitted)
        found = BreakEvens(changed, self.ops, changed.spec, SparsitySettings(), self.progress)
        return [found.ratios(i) for i in range(changed.spec.n_layers)]

    def quality(
        self, others: Sequence[Decoder], tokens: Sequence[int], window: int, what: str, confidence: float = 0.95
    ) -> list[Quality]:
        """Of models beside the dense one; see `compare`."""
        label = f"measuring quality {what}"
        return compare(self.dense, others, tokens, window, self.progress, label, confidence)

    def speeds(self, others: Sequence[Decoder]) -> list[Speed]:
        """Of the dense model and others; see `in_turns`."""
        self.progress(0, 0, "measuring speed")
        return in_turns(self.dense, others)

    def _packed(self, checkpoint: Checkpoint, plan: str) -> Decoder:
        decoder = Decoder(checkpoint, self.ops, self.progress, SparsitySettings(plan=plan))
        self.ops.prepare(decoder.spec, compiling_progress(self.progress))
        return decoder
