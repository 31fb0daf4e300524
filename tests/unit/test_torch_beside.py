"""Selecting on a second stream: who waits for whom, told by streams that only keep a record."""

# ruff: noqa: E402
# What needs torch is imported after it is known to be there.

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra `triton` or `judges`)")

from ondevice.ops import torch_beside, torch_device
from ondevice.ops.torch_beside import Beside
from tests.kernels.triton_home import needs_triton
from tests.models.running import make_decoder
from tests.models.sparse_cases import sparse_spec, sparse_tensors

pytestmark = needs_triton


class Stream:
    """Notes what it is asked to do. An event is a number: how much its stream had been given when it was made."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        event = f"event {sum(entry.startswith('event') for entry in self.log)}"
        self.log.append(f"{event} on {self.name}")
        return event


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of two streams in the place of CUDA's."""
    found: list[str] = []
    current = [Stream(found, "main")]

    @contextmanager
    def using(stream: Stream) -> Any:
        current.append(stream)
        yield
        current.pop()

    cuda = SimpleNamespace(
        Stream=lambda device: Stream(found, "side"), current_stream=lambda: current[-1], stream=using
    )
    monkeypatch.setattr(torch_beside, "torch", SimpleNamespace(cuda=cuda, Tensor=torch.Tensor))
    return found


def test_forks_and_joins(log: list[str]) -> None:
    side, x = Beside(torch.device("cpu")), torch.zeros(1)
    side.heads_chosen()
    side.need_heads()
    side.join()
    assert not log, "nothing was selected there"
    with side.selecting(x):
        log.append("heads")
        side.heads_chosen()
        log.append("neurons")
    assert side._read is x
    side.need_heads()
    log.append("attention")
    side.join()
    assert side._read is None
    log.append("ffn")
    side.join()
    assert log == [
        *("side waits for main", "heads", "event 0 on side", "neurons", "event 1 on side"),
        *("main waits for event 0", "attention", "main waits for event 1", "ffn"),
    ]


def test_what_nobody_needed_is_joined_before_the_next(log: list[str]) -> None:
    side = Beside(torch.device("cpu"))
    for _ in range(2):
        with side.selecting(torch.zeros(1)):
            pass
    assert log[2:4] == ["main waits for event 0", "side waits for main"]


def test_a_step_that_failed_leaves_nothing_to_wait_for(log: list[str]) -> None:
    side = Beside(torch.device("cpu"))
    with side.selecting(torch.zeros(1)):
        side.heads_chosen()
    side.forget()
    side.need_heads()
    side.join()
    assert side._read is None and not any(entry.startswith("main waits") for entry in log)


@pytest.mark.parametrize("name", ["polar", "polar_groups", "polar_neurons", "lte"])
def test_a_model_waits_before_it_uses_what_was_selected(
    log: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step as it is recorded: kernels that take a selection run behind the wait for it, and nothing stays apart."""
    monkeypatch.setenv(torch_device.INTERPRET, "1")
    from ondevice.ops import torch_cuda, torch_cuda_skipping
    from ondevice.ops.torch_cuda import CudaOps

    for module, kernel in ((torch_cuda, "selective_attention"), (torch_cuda_skipping, "sparse_ffn_rows")):
        real = getattr(module, kernel)

        def noting(*args: Any, real: Any = real, kernel: str = kernel, **more: Any) -> Any:
            chosen = kernel == "sparse_ffn_rows" or args[2] is not None
            log.append(f"{kernel}{'' if chosen else ' of all heads'}")
            return real(*args, **more)

        monkeypatch.setattr(module, kernel, noting)
    spec = sparse_spec(name)
    decoder, judge = (make_decoder(spec, sparse_tensors(spec), *ops) for ops in ([CudaOps()], []))
    second = Beside(torch.device("cpu"))
    run = CudaOps.run

    def recorded(self: Any, step: Any, cache: Any, body: Any, name: str = "logits") -> Any:
        self.side = second
        try:
            return run(self, step, cache, lambda s: self._whole(body, s), name)
        finally:
            self.side = None

    monkeypatch.setattr(CudaOps, "run", recorded)
    rows = [d.decode([5, 6], d.new_cache(2, 64), [0, 1]) for d in (decoder, judge)]
    assert np.abs(rows[0] - rows[1]).max() < 1e-4
    pending: list[str] = []
    for entry in log:
        if entry.endswith("on side"):
            pending.append(entry.split(" on ")[0])
        elif entry.startswith("main waits for event"):
            # Events of a stream come in their order.
            del pending[: pending.index(entry.removeprefix("main waits for ")) + 1]
        elif entry == "sparse_ffn_rows":
            assert not pending, log
        elif entry == "selective_attention":
            assert len(pending) <= 1, log
    assert not pending and log.count("side waits for main") == (spec.n_layers if "polar" in name else 0)
