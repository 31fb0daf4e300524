"""Selectors on a second stream of a GPU: what the FFN will run is chosen while the attention runs.

Source: predicting ahead so that nobody waits for it, Liu et al. 2023, Deja Vu, section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Beside:
    """A stream that forks off the current one and is joined where its results are needed, as CUDA graphs want it."""

    def __init__(self, device: torch.device) -> None:
        self.stream: Any = torch.cuda.Stream(device)
        self._heads: Any = None
        self._end: Any = None
        self._read: Any = None

    @contextmanager
    def selecting(self, x: torch.Tensor) -> Iterator[None]:
        """Surrounds work that reads x."""
        self.join()
        # Its memory must not be given away while the other stream may read it.
        self._read = x
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
            self._end = self.stream.record_event()

    def heads_chosen(self) -> None:
        """Notes that heads have been selected, if that was here."""
        if torch.cuda.current_stream() == self.stream:
            self._heads = self.stream.record_event()

    def need_heads(self) -> None:
        """Makes what follows wait for them."""
        if self._heads is not None:
            torch.cuda.current_stream().wait_event(self._heads)
            self._heads = None

    def join(self) -> None:
        """Makes what follows wait for everything."""
        end, read = self._end, self._read
        self.forget()
        if end is not None:
            torch.cuda.current_stream().wait_event(end)
        del read  # not before the wait

    def forget(self) -> None:
        """Leaves what is pending: of a step that failed, no event can be waited for."""
        self._heads = self._end = self._read = None
