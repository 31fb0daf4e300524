"""Compiles the launches of a call for a GPU that is not there: `python -m tests.kernels.triton_compile SHAPE...`

A stand-in for Triton's driver names sm_90, and a launch stops once it is compiled, with the very arguments (types,
alignment, tiles) that a GPU would get. Prints JSON: for each kernel and tile registers, spilled bytes, and the widths
of its loads from global memory. Runs in a process of its own, since Triton decides at import whether to interpret.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from cuda_kernels import launch, pack, sparse_ffn_rows, tune
from cuda_kernels.cache import KvView
from cuda_kernels.grouped_experts import grouped_experts
from cuda_kernels.lists import RowList
from cuda_kernels.pack import Matrix, PackedFfn
from cuda_kernels.quantized_linear import quantized_linear
from cuda_kernels.select_threshold import select_threshold
from cuda_kernels.select_topk import select_topk
from cuda_kernels.selective_attention import selective_attention
from cuda_kernels.sparse_inputs import InputMajor, sparse_inputs
from cuda_kernels.statistical_topk import statistical_topk
from cuda_kernels.topk_attention import topk_attention

TARGET = GPUTarget("cuda", 90, 32)
HALF = torch.float16


class _Driver:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


@contextlib.contextmanager
def compiling(found: list[dict[str, Any]]) -> Any:
    """Within it launches are compiled and noted, and all tiles that a kernel may choose from are."""
    run, pick, runs_on = JITFunction.run, tune.pick, launch.runs_on
    seen: set[str] = set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            tile = {
                name: value for name, value in kwargs.items() if name in ("num_warps", "num_stages") or name[0] == "B"
            }
            found.append({"kernel": self.__name__, "tile": tile, "shared": kernel.metadata.shared, **_facts(kernel)})
        return kernel

    def pick_all(kernel: str, key: Any, choices: Sequence[Any], run: Callable[[Any], None]) -> Any:
        for choice in choices:
            run(choice)
        return choices[0]

    triton.runtime.driver.set_active(_Driver())
    JITFunction.run = compile_only
    modules = [m for name, m in sys.modules.items() if name.startswith("cuda_kernels")]
    saved = [(m, name, getattr(m, name)) for m in modules for name in ("pick", "runs_on") if hasattr(m, name)]
    for m, name, _ in saved:
        setattr(m, name, pick_all if name == "pick" else lambda device: True)
    try:
        yield
    finally:
        JITFunction.run = run
        for m, name, value in saved:
            setattr(m, name, value)
        assert tune.pick is pick and launch.runs_on is runs_on


def _facts(kernel: Any) -> dict[str, Any]:
    ptx = kernel.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = re.search(r"\.target (\w+)", ptx)
        assert arch
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch[1]}", str(path), "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    registers = re.search(r"Used (\d+) registers", log)
    assert registers, log
    copies = [int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+|\d+), ", ptx)]
    loads = [int(count or 1) * int(bits) // 8 for count, bits in
             re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfusd](\d+) ", ptx)]  # fmt: skip
    return {"registers": int(registers[1]), "spills": spills, "copies": copies, "loads": loads,
            "cubin": len(kernel.asm["cubin"])}  # fmt: skip


def _ffn(shape: tuple[int, int, int], gated: bool, bits: int = 0, block: int = 1, group: int = 32) -> PackedFfn:
    """An FFN of memory that was never written: only its addresses matter."""
    width, neurons, out = shape
    if bits:
        per = 32 // bits
        rows = Matrix(torch.empty(neurons, width // per, dtype=torch.int32),
                      *(torch.empty(neurons, width // group, dtype=HALF) for _ in range(2)))  # fmt: skip
        down = Matrix(torch.empty(neurons, out // per, dtype=torch.int32),
                      *(torch.empty(neurons // group, out, dtype=HALF) for _ in range(2)))  # fmt: skip
    else:
        rows, down = Matrix(torch.empty(neurons, width, dtype=HALF)), Matrix(torch.empty(neurons, out, dtype=HALF))
    return PackedFfn(rows if gated else None, rows, down, None, None, None, shape, bits, group, block, False)


def _lists(n: int, length: int) -> RowList:
    return RowList(torch.zeros(n, length, dtype=torch.int32), torch.zeros(n, dtype=torch.int32))


def _cache(batch: int, longest: int, kv_heads: int, dh: int, paged: bool) -> KvView:
    lengths = torch.empty(batch, dtype=torch.int32)
    if not paged:
        both = [torch.empty(batch, longest, kv_heads, dh, dtype=HALF) for _ in range(2)]
        return KvView(both[0], both[1], lengths)
    pages = longest // 64
    both = [torch.empty(batch * pages, 64, kv_heads, dh, dtype=HALF) for _ in range(2)]
    return KvView(both[0], both[1], lengths, torch.empty(batch, pages, dtype=torch.int32))


def _rows(n: int, shape: tuple[int, int, int], kept: int, lists: int, **more: Any) -> Callable[[], Any]:
    x = torch.empty(n, shape[0], dtype=HALF)
    kind = "silu" if more["gated"] else "relu"
    return lambda: sparse_ffn_rows.sparse_ffn_rows(x, _ffn(shape, **more), _lists(lists, kept), kind)


def _linear(n: int, bits: int) -> tuple[Any, ...]:
    return torch.empty(n, 4096, dtype=HALF), _ffn((4096, 11008, 4096), False, bits).up, bits, 32


def _inputs(bits: int) -> InputMajor:
    return InputMajor(_ffn((4096, 4096, 11008), False, bits).down, None, (4096, 11008), bits, 32)


OPT_66B, LLAMA_7B = (9216, 36864, 9216), (4096, 11008, 4096)
CALLS: dict[str, Callable[[], Any]] = {
    "rows of a token": _rows(4, LLAMA_7B, 5504, 4, gated=True),
    "rows of a token, 4 bits": _rows(1, LLAMA_7B, 5504, 1, gated=True, bits=4),
    "rows of a token, 8 bits": _rows(1, LLAMA_7B, 5504, 1, gated=True, bits=8),
    "rows of a batch": _rows(64, OPT_66B, 3686, 1, gated=False),
    "rows of a batch, 4 bits": _rows(64, LLAMA_7B, 5504, 1, gated=True, bits=4),
    "linear, 4 bits": lambda: [quantized_linear(*_linear(n, 4)) for n in (1, 64)],
    "linear, 8 bits": lambda: [quantized_linear(*_linear(n, 8)) for n in (1, 64)],
    "inputs of a token": lambda: sparse_inputs(torch.empty(4, 4096, dtype=HALF), _inputs(0), _lists(4, 2048)),
    "inputs of a batch": lambda: sparse_inputs(torch.empty(64, 4096, dtype=HALF), _inputs(0), _lists(1, 2048)),
    "inputs of a token, 4 bits": lambda: sparse_inputs(torch.empty(1, 4096, dtype=HALF), _inputs(4), _lists(1, 2048)),
    "experts": lambda: grouped_experts(
        torch.empty(512, 4096, dtype=HALF), _ffn(LLAMA_7B, True, block=128), _lists(512, 86), "silu"
    ),
    "experts, 4 bits": lambda: grouped_experts(
        torch.empty(512, 4096, dtype=HALF), _ffn(LLAMA_7B, True, 4, block=128), _lists(512, 86), "silu"
    ),
    "topk": lambda: (
        select_topk(torch.empty(64, 36864, dtype=HALF), 3686, True),
        select_topk(torch.empty(64, 11008, dtype=HALF), 1101, False),
        select_topk(torch.empty(64, 72), 21, False),
    ),
    "threshold": lambda: [
        select_threshold(torch.empty(8, n), 0.5, relative) for n in (344, 36864) for relative in (False, True)
    ],
    "statistical": lambda: statistical_topk(torch.empty(8, 13824), 1.4),
    "attention": lambda: selective_attention(
        torch.empty(64, 72, 128, dtype=HALF), _cache(64, 1920, 72, 128, False), _lists(64, 21), 0.1
    ),
    "attention of groups": lambda: selective_attention(
        torch.empty(8, 32, 128, dtype=HALF), _cache(8, 4096, 8, 128, True), _lists(8, 4), 0.1, "kv_group"
    ),
    "topk attention": lambda: topk_attention(
        torch.empty(4, 8, 256, dtype=HALF), _cache(4, 8192, 4, 256, True), 0.06, 128, 256
    ),
}


def main(names: Sequence[str]) -> None:
    """Compiles calls of CALLS and prints what came of them."""
    results = {}
    for name in names or CALLS:
        found: list[dict[str, Any]] = []
        with compiling(found):
            CALLS[name]()
        results[name] = found
    print(json.dumps(results))


if __name__ == "__main__":
    assert not launch.interpreted(), "TRITON_INTERPRET is set, and interpreted kernels are not compiled"
    assert pack.BITS
    main(sys.argv[1:])
