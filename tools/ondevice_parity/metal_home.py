"""The kernels of `metal_kernels`, and their twins in plain MLX, as the cases call them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels.cache import KvView
from metal_kernels.lists import RowList
from metal_kernels.pack import PackedFfn, pack_ffn, to_mlx
from ondevice_parity.check import Home, Unsupported


class MetalHome(Home):
    """Wrappers run on what `mx.fast.metal_kernel` is: a GPU, or an emulator; twins on MLX's default device."""

    def __init__(self, twin: bool = False) -> None:
        self.twin = twin

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
        if importlib.util.find_spec(f"metal_kernels.{name}") is None:
            raise Unsupported("it has no kernel of this name")
        module = importlib.import_module(f"metal_kernels.{name}")
        function: Callable[..., Any] = getattr(module, name + "_mlx" * (twin or self.twin))
        return function
