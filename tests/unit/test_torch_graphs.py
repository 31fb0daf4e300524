"""Recording and replaying steps, with a graph that runs its work again in the place of CUDA's, which needs a GPU."""

# ruff: noqa: E402
# What needs torch is imported after it is known to be there.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra `triton` or `judges`)")

from ondevice.ops import torch_graphs
from ondevice.ops.base import Step
from ondevice.ops.torch import TorchOps
from ondevice.ops.torch_counts import Counts, Unit
from ondevice.ops.torch_graphs import Graphs
from tests.models.running import make_decoder
from tests.models.sparse_running import LENGTHS
from tests.tiny import tiny_spec, tiny_tensors


class Again:
    """A graph: the work, into the same memory each time."""

    def __init__(self, work: Callable[[], Any], counts: Counts) -> None:
        self.work, self.counts, self.result = work, counts, work()

    def replay(self) -> None:
        self.result.copy_(self.work())
        # The device adds up; what the host counts is its own.
        self.counts.end_step()


class CpuGraphs(Graphs):
    """Graphs on a CPU."""

    captured = 0

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return torch.empty(shape, dtype=dtype)

    def capture(self, work: Callable[[], Any], counts: Counts) -> tuple[Any, Any, Any]:
        self.captured += 1
        graph = Again(work, counts)
        # A recording computes nothing, so that nothing is added up.
        counts._lists.clear()
        deed = counts.end_step()
        return graph, graph.result, deed

    def warm_up(self, work: Callable[[], Any], counts: Counts) -> None:
        work()
        counts.make_sums()
        counts.drop_step()

    def wait(self) -> None:
        pass


class GraphOps(TorchOps):
    """The torch table, decoding by graphs. Its attention reads the pages through the step's own table."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = CpuGraphs(self.place.device)

    def run(self, step: Any, cache: Any, body: Any, name: str = "logits") -> Any:
        if self.graphs.takes(step):
            with torch.no_grad():
                return self.graphs.run(step, cache, body, name, self.counted)
        return super().run(step, cache, body, name)

    def _full_attention(self, q: Any, cache: Any, layer: int, step: Any, scale: float, window: int, cap: float) -> Any:
        if step.segments:
            return super()._full_attention(q, cache, layer, step, scale, window, cap)
        keys, values = (x[layer][step.table.long()].flatten(1, 2) for x in (cache.pages.keys, cache.pages.values))
        at = torch.arange(keys.shape[1])[None]
        queries = q.view(len(q), -1, 1, keys.shape[3])
        group = queries.shape[1] // keys.shape[2]
        k, v = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (keys, values))
        mask = (at < step.lengths[:, None])[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(queries, k, v, mask, scale=scale).flatten(1)


def test_replays_equal_plain_steps() -> None:
    """Batches of several sizes in turn, and slots in another order."""
    spec = tiny_spec("llama")
    results = []
    for ops in (GraphOps(), TorchOps()):
        decoder = make_decoder(spec, tiny_tensors(spec), ops)
        cache = decoder.new_cache(len(LENGTHS), 100)
        for slot, length in enumerate(LENGTHS):
            list(decoder.prefill(range(1, length + 1), cache, slot))
        rows = [
            decoder.decode([7 + i, 3, 9], cache, slots) for i, slots in enumerate([[0, 1, 2], [3, 1, 4], [4, 0, 3]])
        ]
        rows += [decoder.decode([5 + i], cache, [i]) for i in range(4)]
        results.append(np.concatenate(rows))
        if isinstance(ops, GraphOps):
            # One token of a prompt is a step of one token; three at once are another.
            assert ops.graphs.captured == 2 and len(cache.pages.recorded) == 2
    assert np.abs(results[0] - results[1]).max() < 1e-5


def test_what_a_graph_does_is_counted_each_time() -> None:
    ops = GraphOps()
    cache = make_decoder(tiny_spec("llama"), tiny_tensors(tiny_spec("llama")), ops).new_cache(1, 64)
    cache.reserve(0, 1)
    unit = Unit("ffn", size=2, nbytes=10.0)

    def body(step: Any) -> Any:
        ops.counted.dense("heads")
        ops.counted.sparse(unit, step.tokens + 1, 40)
        return step.tokens[:, None].float()

    for token in (3, 5):
        zero = np.zeros(1, np.int32)
        assert ops.run(Step(np.array([token], np.int32), zero, zero, zero), cache, body, "b")[0, 0] == token
    tally = ops.counts()["ffn"]
    assert (tally.calls, tally.sparse, tally.units, tally.kept) == (2, 2, 160, 2 * (4 + 6))
    assert tally.bytes_skipped == (160 - 20) * 10 and ops.counts()["heads"].calls == 2


def test_the_oldest_graph_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_graphs, "MOST", 2)
    ops = GraphOps()
    spec = tiny_spec("llama")
    decoder = make_decoder(spec, tiny_tensors(spec), ops)
    cache = decoder.new_cache(4, 64)
    for slots in ([0], [0, 1], [0, 1, 2], [0]):
        decoder.decode([1] * len(slots), cache, slots)
    assert ops.graphs.captured == 4 and [n for _, n in cache.pages.recorded] == [3, 1]


def test_prompts_are_not_recorded() -> None:
    graphs = CpuGraphs(torch.device("cpu"))

    def step(slots: list[int], outputs: list[int]) -> Step:
        return Step(*(np.array(x, np.int32) for x in (slots, slots, slots, outputs)))

    assert graphs.takes(step([0, 1], [0, 1])) and graphs.takes(step([4], [0]))
    assert not graphs.takes(step([0, 0], [0, 1])) and not graphs.takes(step([0, 1], [1]))
    assert not graphs.takes(step([0, 1], [1, 0])) and not graphs.takes(step(list(range(257)), list(range(257))))
