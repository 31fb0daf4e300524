"""The kernels of `cuda_kernels`, and their twins in plain torch, as the cases call them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from cuda_kernels import memory
from cuda_kernels.cache import KvView
from cuda_kernels.lists import RowList
from cuda_kernels.pack import PackedFfn, pack_ffn, row_matrix
from cuda_kernels.sparse_inputs import InputMajor, pack_inputs
from ondevice.checkpoint.quantization import Tensor
from ondevice_parity.check import Home


class TorchHome(Home):
    """Kernels on a device. Memory that they write is NaN, or a far index, before each launch."""

    def __init__(self, device: torch.device, twin: bool = False) -> None:
        self.device, self.twin = device, twin

    def array(self, array: NDArray[Any]) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def numpy(self, array: torch.Tensor) -> NDArray[Any]:
        values = array.detach().double() if array.dtype.is_floating_point else array
        return values.cpu().numpy()

    def rows(self, indices: NDArray[np.int32], count: NDArray[np.int32]) -> RowList:
        return RowList(self.array(indices), self.array(count))

    def view(self, keys: Any, values: Any, lengths: Any, block_table: Any) -> KvView:
        return KvView(keys, values, lengths, block_table)

    def pack_ffn(self, *args: Any, **options: Any) -> PackedFfn:
        return pack_ffn(*args, **options, device=self.device)

    def pack_linear(self, weight: Tensor, bias: NDArray[Any] | None) -> tuple[Any, ...]:
        return *row_matrix(weight, self.device), None if bias is None else self.array(bias)

    def pack_inputs(self, weight: Tensor, bias: NDArray[Any] | None) -> InputMajor:
        return pack_inputs(weight, None if bias is None else self.array(bias), self.device)

    def kernel(self, name: str, twin: bool = False) -> Callable[..., Any]:
        module = importlib.import_module(f"cuda_kernels.{name}")

        def run(*args: Any, **more: Any) -> Any:
            # Looked up at each call, so that a test can exchange it.
            function = getattr(module, name + "_torch" * (twin or self.twin))
            if name == "quantized_linear":
                args = (args[0], *args[1])
            before, memory.POISON = memory.POISON, True
            try:
                return function(*args, **more)
            finally:
                memory.POISON = before

        return run
