"""Metal's home as tests open it: on what stands in for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import launch
from ondevice.ops.mlx_ahead import Aheads
from ondevice_parity.check import Case
from ondevice_parity.metal_home import MetalHome
from tests.msl.emulator import is_kernel

HOME = MetalHome()

PARTIAL = frozenset(
    (
        "grouped_hidden",
        "list_mask",
        "select_threshold",
        "selective_attention",
        "sparse_ffn_down",
        "sparse_ffn_hidden",
        "statistical_topk",
        "topk_chosen",
        "topk_scores",
    )
)
"""Kernels that write what their lists and lengths ask for, and nothing else."""


class _Partial(set[str]):
    def __contains__(self, name: object) -> bool:
        return any(is_kernel(str(name), each) for each in self)


@contextmanager
def running() -> Iterator[MetalHome]:
    """Lets wrappers run their kernels on what stands in for `mx.fast.metal_kernel`, or on the GPU."""
    stand_in = mx.fast.metal_kernel.__self__
    stand_in.may_leave_unwritten = _Partial(PARTIAL)
    if stand_in.on_gpu:
        yield HOME
        return
    # The emulator runs a kernel when it is called, so a step that is laid out ahead would run without its tokens.
    with mock.patch.object(launch, "runs_here", lambda: True), mock.patch.object(Aheads, "lay_out"):
        yield HOME


@pytest.fixture
def home(metal: Any) -> Iterator[MetalHome]:
    """The kernels as they run on this machine: emulated, or on the GPU of a Mac."""
    with running() as found:
        yield found


def checks(kernel: str, *cases: Case) -> Callable[[], None]:
    """A check for mutants: raises AssertionError where one of some cases is wrong."""

    def check() -> None:
        with running() as home:
            for seed, case in enumerate(cases):
                outcome = case(home.kernel(kernel), np.random.default_rng(seed), home)
                assert outcome.passed, f"case {seed}: error {outcome.error:.2g}, allowed {outcome.tolerance:.2g}"

    return check
