"""Time on a GPU: calls recorded in a CUDA graph, so that launching them from Python costs nothing, between events."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

REPEATS = 9


@dataclass(frozen=True, slots=True)
class Time:
    """Milliseconds of a call: the median of some measurements, the least and the most."""

    ms: float
    low: float
    high: float


def timed(call: Callable[[], Any], device: torch.device, calls: int = 10, repeats: int = REPEATS) -> Time:
    """How long a call takes, on average over `calls` in a row; the first ones, which compile and tune, do not count.

    Args:
        call: always the same shapes; waits for nothing on the host.
        calls: in one graph. Choose so that they take some milliseconds, and touch more than the L2 cache holds.
    """
    if device.type != "cuda":
        call()
        samples = []
        for _ in range(2):
            start = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - start))
        return Time(median(samples), min(samples), max(samples))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    samples = []
    for _ in range(repeats):
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end_event.record()
        end_event.synchronize()
        samples.append(start_event.elapsed_time(end_event) / calls)
    del graph
    return Time(median(samples), min(samples), max(samples))


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes within the device."""
    source, target = (torch.ones(size // 2, dtype=torch.float16, device=device) for _ in range(2))
    return 2 * size / (timed(lambda: target.copy_(source), device, calls=2).low * 1e-3)
