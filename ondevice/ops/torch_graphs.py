"""Steps of decoding as CUDA graphs: recorded once for each batch size of a cache, then replayed.

A graph reads its tokens, positions, places and tables from one piece of memory, which a single copy fills before each
replay. Everything else that a step's work depends on is on the device already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ondevice.ops.base import Body, Step
from ondevice.ops.paged_step import flat_places, is_single
from ondevice.ops.torch_counts import Counts, Deed
from ondevice.ops.torch_pages import Pages
from ondevice.ops.torch_step import TorchStep

if TYPE_CHECKING:
    from ondevice.generation.kv_cache import KVCache

LARGEST = 256
"""Tokens of a step that is recorded. Beyond, the host prepares a step faster than the GPU runs it."""
MOST = 64
"""Graphs of a cache; further sizes run without one."""
WARMUPS = 2
"""Runs before a recording: kernels are compiled and their tiles measured."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph, with the memory that it reads and writes.

    Args:
        graph: torch's.
        staging: int32 [N, 3 + pages], on the host, pinned: token, position, place, table.
        inputs: the same on the device.
        result: of the body, float32 on the device.
        answer: the same on the host, pinned.
        deed: what the host counts of each replay.
    """

    graph: Any
    staging: torch.Tensor
    inputs: torch.Tensor
    result: torch.Tensor
    answer: torch.Tensor
    deed: Deed


class Graphs:
    """Records and replays steps on a device. Graphs share their memory, as no two run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._anchor: Any = None

    def takes(self, step: Step) -> bool:
        """Whether a step, given in NumPy's arrays, is one of decoding: a token of each sequence, all with logits."""
        n = len(step.tokens)
        everyone = len(step.outputs) == n and bool((step.outputs == np.arange(n)).all())
        return 0 < n <= LARGEST and everyone and is_single(step)

    def run(self, step: Step, cache: KVCache, body: Body, name: str, counts: Counts) -> NDArray[np.float32]:
        """The body's result: from a graph, which is recorded if there is none yet."""
        pages: Pages = cache.pages
        key = (name, len(step.tokens))
        recorded = pages.recorded.get(key)
        if recorded is None:
            recorded = pages.recorded[key] = self._record(step, cache, body, counts)
        _fill(recorded.staging, step, cache)
        recorded.inputs.copy_(recorded.staging, non_blocking=True)
        recorded.graph.replay()
        counts.replay(recorded.deed)
        recorded.answer.copy_(recorded.result, non_blocking=True)
        self.wait()
        return recorded.answer.numpy().copy()

    def _record(self, step: Step, cache: KVCache, body: Body, counts: Counts) -> Recorded:
        pages: Pages = cache.pages
        if len(pages.recorded) >= MOST:
            # The oldest makes room, so that a server that sees all sizes keeps those of late.
            pages.recorded.pop(next(iter(pages.recorded)))
        shape = (len(step.tokens), 3 + cache.block_table.shape[1])
        staging = self.pinned(shape, torch.int32)
        _fill(staging, step, cache)
        inputs = staging.to(self.device)

        def work() -> torch.Tensor:
            result: torch.Tensor = body(_step_of(inputs))
            return result.float()

        try:
            self.warm_up(work, counts)
            graph, result, deed = self.capture(work, counts)
        except BaseException:
            counts.drop_step()
            raise
        answer = self.pinned(tuple(result.shape), result.dtype)
        return Recorded(graph, staging, inputs, result, answer, deed)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that copies to and from the device need not wait for."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def capture(self, work: Callable[[], torch.Tensor], counts: Counts) -> tuple[Any, torch.Tensor, Deed]:
        """A graph of the work and of counting it, its result, and what the host counts each time."""
        if self._anchor is None:
            # Graphs go with their caches, and torch cannot use a pool again whose last graph has gone: this one stays.
            anchor = torch.cuda.CUDAGraph()
            with torch.cuda.graph(anchor):
                torch.zeros(1, device=self.device)
            self._anchor = anchor
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._anchor.pool()):
            result = work()
            deed = counts.end_step()
        return graph, result, deed

    def wait(self) -> None:
        """Until the device has done what it was given."""
        torch.cuda.current_stream(self.device).synchronize()

    def warm_up(self, work: Callable[[], torch.Tensor], counts: Counts) -> None:
        """Runs the work outside of the stream that others use; a step may run twice, as it writes the same keys."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                work()
                counts.make_sums()
                counts.drop_step()
        torch.cuda.current_stream(self.device).wait_stream(stream)


def _fill(staging: torch.Tensor, step: Step, cache: KVCache) -> None:
    rows = staging.numpy()
    rows[:, 0], rows[:, 1] = step.tokens, step.positions
    rows[:, 2] = flat_places(cache.block_table, step.slots, step.positions, cache.page)
    rows[:, 3:] = cache.block_table[step.slots]


def _step_of(inputs: torch.Tensor) -> TorchStep:
    """The step that lies in a graph's memory. Its slots are rows of its own table."""
    everyone = torch.arange(len(inputs), device=inputs.device)
    tokens, positions, flat = (inputs[:, i].long() for i in range(3))
    lengths, table = inputs[:, 1] + 1, inputs[:, 3:].contiguous()
    return TorchStep(tokens, positions, everyone, everyone, flat, lengths, table, True, (), None)
