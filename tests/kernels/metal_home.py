"""The kernels of `metal_kernels` as the parity cases call them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from metal_kernels import launch
from metal_kernels.cache import KvView
from metal_kernels.lists import RowList
from metal_kernels.pack import PackedFfn, pack_ffn, to_mlx
from tests.kernels.home_check import Case
from tests.msl.emulator import is_kernel


class MetalHome:
    """Wrappers run on what `mx.fast.metal_kernel` is: a GPU, or the emulator; twins on MLX's default device."""

    def array(self, array: NDArray[Any]) -> mx.array:
        return to_mlx(array)

    def numpy(self, array: mx.array) -> NDArray[Any]:
        floats = mx.issubdtype(array.dtype, mx.floating)
        return np.array(array.astype(mx.float32)).astype(np.float64) if floats else np.array(array)

    def rows(self, indices: NDArray[np.int32], count: NDArray[np.int32]) -> RowList:
        return RowList(mx.array(indices), mx.array(count))

    def view(self, keys: mx.array, values: mx.array, lengths: mx.array, block_table: mx.array | None) -> KvView:
        return KvView(keys, values, lengths, block_table)

    def pack_ffn(self, *args: Any, **options: Any) -> PackedFfn:
        return pack_ffn(*args, **options)

    def kernel(self, name: str, twin: bool = False) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(f"metal_kernels.{name}"), name + "_mlx" * twin)
        return function


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
    with mock.patch.object(launch, "runs_here", lambda: True):
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
