"""What a torch table counts of the work that it skips, without waiting for the device before somebody asks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from ondevice.ops.base_skipping import Tally

KINDS = ("ffn", "inputs", "heads", "keys")


@dataclass(frozen=True, slots=True)
class Unit:
    """What is counted together.

    Args:
        kind: of the tally.
        size: neurons, inputs, heads or keys of a listed unit.
        nbytes: that one of them would have read, if nobody needed it; 0 where that is not known.
    """

    kind: str
    size: int = 1
    nbytes: float = 0.0


@dataclass(slots=True)
class Deed:
    """What the host knows of a step: calls by kind, those that were sparse, units, and kept ones of its own."""

    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    sparse: dict[Unit, tuple[int, int, int]] = field(default_factory=dict)


class Counts:
    """Tallies by kind. Kept units may be tensors, which are added up on the device and read when the tallies are.

    Bytes are counted where the host can know them: for a list that all tokens share, and for single tokens.
    """

    def __init__(self) -> None:
        self._done = Deed()
        self._now = Deed()
        self._lists: dict[Unit, list[torch.Tensor]] = defaultdict(list)
        self._sums: dict[Unit, torch.Tensor] = {}

    def dense(self, kind: str) -> None:
        """A call that ran everything."""
        self._now.calls[kind] += 1

    def sparse(self, unit: Unit, kept: int | torch.Tensor, units: int) -> None:
        """A call that kept some. kept: listed units, an integer or a tensor of them; units: of unit.size that are."""
        self._now.calls[unit.kind] += 1
        sparse, all_units, known = self._now.sparse.get(unit, (0, 0, 0))
        if isinstance(kept, int):
            known += kept
        else:
            self._lists[unit].append(kept.reshape(-1))
        self._now.sparse[unit] = (sparse + 1, all_units + units, known)

    def make_sums(self) -> None:
        """Makes room for the sums of the step that runs: where it is recorded, they must be there before."""
        for unit, some in self._lists.items():
            if unit not in self._sums:
                self._sums[unit] = torch.zeros((), dtype=torch.int64, device=some[0].device)

    def end_step(self) -> Deed:
        """Adds the device's numbers up, on the device, and returns what the host knows, which `replay` counts."""
        self.make_sums()
        for unit, some in self._lists.items():
            self._sums[unit].add_(torch.cat(some).sum())
        self._lists.clear()
        ended, self._now = self._now, Deed()
        return ended

    def replay(self, deed: Deed) -> None:
        """Counts what the host knows of a step that ran."""
        for kind, calls in deed.calls.items():
            self._done.calls[kind] += calls
        for unit, numbers in deed.sparse.items():
            before = self._done.sparse.get(unit, (0, 0, 0))
            self._done.sparse[unit] = tuple(a + b for a, b in zip(before, numbers))  # type: ignore[assignment]

    def drop_step(self) -> None:
        """Forgets a step that did not end."""
        self._lists.clear()
        self._now = Deed()

    def read(self) -> dict[str, Tally]:
        """The tallies."""
        tallies = {kind: Tally(calls=self._done.calls.get(kind, 0)) for kind in KINDS}
        for unit, (sparse, units, known) in self._done.sparse.items():
            tally = tallies[unit.kind]
            kept = known + (int(self._sums[unit]) if unit in self._sums else 0)
            tally.sparse += sparse
            tally.units += units * unit.size
            tally.kept += kept * unit.size
            tally.bytes_skipped += round((units - kept) * unit.size * unit.nbytes)
        return {kind: replace(tally) for kind, tally in tallies.items()}
