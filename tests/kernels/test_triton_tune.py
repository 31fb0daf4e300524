"""Which tile is taken: the fastest that runs, once for each shape, and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton_home import MISSING, needs_triton

pytestmark = needs_triton
if not MISSING:
    import triton

    from cuda_kernels import tune
CHOICES = [{"a": 1}, {"a": 2}, {"a": 3}]


class Timer:
    """Stands for the GPU: each choice takes a time, or cannot run."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds, self.ran = seconds, 0

    def __call__(self, choice: dict[str, int], run: Callable[..., None]) -> float:
        self.ran += 1
        run(choice)
        return self.seconds[choice["a"]]


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Timer:
    timer = Timer({1: 3.0, 2: 1.0, 3: float("inf")})
    monkeypatch.setattr(tune, "_time", timer)
    monkeypatch.setattr(tune, "_known", {})
    monkeypatch.setattr(tune, "interpreted", lambda: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("ONDEVICE_TRITON_TUNING", str(tmp_path / "new" / "tiles.json"))
    return timer


def nothing(choice: Any) -> None:
    pass


def test_the_fastest_is_remembered(timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tune.pick("k", (1, "x"), CHOICES, nothing) == {"a": 2} and timer.ran == 3
    assert tune.pick("k", (1, "x"), CHOICES, nothing) == {"a": 2} and timer.ran == 3
    assert tune.pick("k", (2, "x"), CHOICES, nothing) == {"a": 2} and timer.ran == 6
    stored = json.loads((tmp_path / "new" / "tiles.json").read_text())
    assert stored == {f"a GPU triton {triton.__version__}": {"k (1, 'x')": {"a": 2}, "k (2, 'x')": {"a": 2}}}
    # Another process reads it, and other devices' choices stay.
    monkeypatch.setattr(tune, "_known", {})
    assert tune.pick("k", (1, "x"), CHOICES, nothing) == {"a": 2} and timer.ran == 6
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "another")
    tune.pick("k", (1, "x"), CHOICES, nothing)
    assert timer.ran == 9 and len(json.loads((tmp_path / "new" / "tiles.json").read_text())) == 2


def test_what_is_no_longer_offered_is_measured_again(timer: Timer) -> None:
    tune.pick("k", (1,), CHOICES, nothing)
    assert tune.pick("k", (1,), [{"a": 1}, {"a": 3}], nothing) == {"a": 1} and timer.ran == 5


def test_a_damaged_file_costs_a_measurement(timer: Timer, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "tiles.json").write_text("[3")
    assert tune.pick("k", (1,), CHOICES, nothing) == {"a": 2}


def test_nothing_is_timed_while_a_graph_is_recorded(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert tune.pick("k", (1,), CHOICES, nothing) == {"a": 1} and timer.ran == 0


def test_nothing_can_run(timer: Timer) -> None:
    timer.seconds = dict.fromkeys((1, 2, 3), float("inf"))
    with pytest.raises(RuntimeError, match=r"k: none of its 3 tiles can run for \(1,\) on a GPU"):
        tune.pick("k", (1,), CHOICES, nothing)


def test_a_tile_that_is_too_large_is_left_out() -> None:
    def run(choice: Any) -> None:
        raise triton.runtime.errors.OutOfResources(9, 3, "shared memory")

    assert tune._time(CHOICES[0], run) == float("inf")


@pytest.mark.parametrize("way", ["first", "interpreted"])
def test_without_measuring(timer: Timer, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("ONDEVICE_TRITON_TUNING", way)
    monkeypatch.setattr(tune, "interpreted", lambda: way == "interpreted")
    assert tune.pick("k", (1,), CHOICES, nothing) == {"a": 1} and timer.ran == 0
