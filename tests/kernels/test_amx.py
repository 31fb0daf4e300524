"""Products by tile instructions: emulated, bit for bit those of vectors; as machine code, the right instructions."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba.core.registry import cpu_target

from cpu_kernels import amx, codes
from cpu_kernels.gemm import gemm
from cpu_kernels.gemm_amx import ROWS, SUMS, TOKENS, build_product, shapes
from cpu_kernels.simd import I64
from cpu_kernels.tiles import Layout
from ondevice.checkpoint.quantization import Quantized
from ondevice.ops.base import Ops, Step
from ondevice.ops.cpu import CpuOps
from ondevice.ops.cpu_weights import format_of
from tests.kernels.emulated_tiles import EmulatedTiles
from tests.kernels.tables import run_rows

EMULATED = EmulatedTiles()
LAYOUTS = [
    Layout(4, 32, "f16", False),
    Layout(4, 128, "f32", True),
    Layout(5, 64, "f32", False),
    Layout(5, 32, "f16", True),
    Layout(6, 128, "f16", False),
    Layout(6, 64, "f32", True),
    Layout(8, 32, "f32", False),
    Layout(8, 64, "f16", True),
    Layout(4, 256, "k32", False),
    Layout(5, 256, "k32", False),
    Layout(6, 256, "k16", True),
]


def weight(layout: Layout, out: int, inputs: int) -> Quantized:
    """Random codes over their whole range."""
    random = np.random.RandomState(layout.bits)
    packed = random.randint(0, 2**32, (out, inputs * layout.bits // 32), np.uint64).astype(np.uint32)
    if layout.kind in ("k16", "k32"):
        group = 16 if layout.symmetric else 32
        low, dtype = (-128, np.int8) if layout.symmetric else (0, np.uint8)
        scales, biases = (random.randint(low, low + 256, (out, inputs // group)).astype(dtype) for _ in range(2))
        factors = [random.standard_normal((out, inputs // 256)).astype(np.float16) for _ in range(2)]
        if layout.symmetric:
            return Quantized(packed, scales, None, layout.bits, group, factors[0])
        return Quantized(packed, scales, biases, layout.bits, group, *factors)
    dtype = np.float16 if layout.kind == "f16" else np.float32
    scales, biases = (random.standard_normal((out, inputs // layout.group_size)).astype(dtype) for _ in range(2))
    if layout.symmetric:
        biases = scales * dtype(-(2 ** (layout.bits - 1)))
    return Quantized(packed, scales, biases, layout.bits, layout.group_size)


def product(w: Quantized, x: np.ndarray) -> np.ndarray:
    def body(table: Ops, y: Any, step: Step) -> Any:
        return table.linear(y, table.pack_linear([w], [None]))

    # One thread: see the emulated tiles.
    return run_rows(CpuOps(1), x, body).view(np.uint32)


def compare(monkeypatch: pytest.MonkeyPatch, layout: Layout, out: int, inputs: int, counts: range) -> None:
    """Asserts that tiles give the bits that vectors give, for batches of so many tokens. Emulated ones, and real ones
    where there are any.
    """
    w = weight(layout, out, inputs)
    assert format_of(w).layout == layout
    x = np.random.RandomState(0).standard_normal((max(counts), inputs)).astype(np.float32)
    x[::3, 5] *= 50
    real, results = amx.tiles(), {}
    for tiles in dict.fromkeys((None, EMULATED, real)):
        with monkeypatch.context() as patch:
            patch.setattr(amx, "tiles", lambda tiles=tiles: tiles)
            assert (codes.panel_widths()[0] == codes.TILE) == (tiles is not None)
            results[tiles] = [product(w, x[:n]) for n in counts]
    expected = results.pop(None)
    for tiles, made in results.items():
        for n, got, bits in zip(counts, made, expected):
            assert np.array_equal(got, bits), f"{tiles.name}, {n} tokens"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.label)
def test_tiles_give_the_bits_of_vectors(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    compare(monkeypatch, layout, 33, 256, range(1, 41))


@pytest.mark.parametrize("inputs", [32, 64, 96, 160])
@pytest.mark.parametrize("out", [1, 16, 100])
def test_few_and_odd_numbers_of_groups(monkeypatch: pytest.MonkeyPatch, inputs: int, out: int) -> None:
    compare(monkeypatch, Layout(8, 32, "f16", True), out, inputs, range(15, 34))


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=lambda layout: layout.label)
def test_shapes_fit_together(layout: Layout) -> None:
    """A processor refuses products of tiles that do not."""
    made = shapes(layout)
    for unit in range(2 * layout.parts):
        (rows, columns), (tokens, inputs), (quads, width) = (
            made[tile] for tile in (SUMS + unit, TOKENS + unit % 2, ROWS + unit % 2)
        )
        assert (rows, columns) == (tokens, width)
        assert inputs == 4 * quads
        assert max(rows, quads) <= 16
        assert max(columns, inputs) <= 64
    data = amx.configuration(made)
    assert len(data) == 64
    assert data[0] == 1
    assert {i: (data[48 + i], int.from_bytes(data[16 + 2 * i : 18 + 2 * i], "little")) for i in made} == made


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=lambda layout: layout.label)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="LLVM may lack x86-64")
def test_machine_code_has_the_tile_instructions(layout: Layout) -> None:
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [I64] * 4)
    function = ir.Function(module, kind, "product")
    b = ir.IRBuilder(function.append_basic_block())
    tiles = amx.Tiles()
    tiles.configure(b, shapes(layout))
    build_product(b, layout, tiles, *function.args)
    tiles.release(b)
    b.ret_void()
    triple = cpu_target.target_context.codegen()._llvm_module.triple
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu="sapphirerapids", features="+amx-tile,+amx-int8", opt=3
    )
    parsed = llvm.parse_assembly(str(module))
    llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3)).getModulePassManager().run(
        parsed, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    )
    lines = machine.emit_assembly(parsed).splitlines()
    found = [line.split()[0] for line in lines if line.startswith("\t")]
    # The first product, two in the loop.
    assert found.count("tdpbsud") == found.count("tilestored") == 3 * layout.parts
    assert found.count("tileloadd") == 2 * found.count("tdpbsud")
    # Operands in reverse: unsigned rows, signed tokens, sums.
    assert f"\ttdpbsud\t%tmm{ROWS}, %tmm{TOKENS}, %tmm{SUMS}" in lines
    first, last = found.index("ldtilecfg"), found.index("tilerelease")
    tile_ops = [i for i, name in enumerate(found) if name.startswith(("tdp", "tilestore", "tileload", "tilezero"))]
    assert first < min(tile_ops)
    assert max(tile_ops) < last


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that makes this process one whose CPU has tiles, and whose system answers with an error number."""

    def answer(number: int) -> None:
        monkeypatch.setattr(amx, "features", lambda: amx.NEEDED)
        monkeypatch.setattr(amx.sys, "platform", "linux")
        monkeypatch.setattr(amx, "_ask", lambda: number)
        amx.obstacle.cache_clear()

    yield answer
    monkeypatch.undo()
    amx.obstacle.cache_clear()


def test_a_refusal_takes_the_vectors(capable: Any) -> None:
    capable(errno.EPERM)
    assert "Linux refuses" in amx.obstacle()
    assert amx.tiles() is None
    assert codes.TILE not in codes.panel_widths()
    assert "amx" not in gemm(LAYOUTS[0]).label


def test_permission_takes_the_tiles(capable: Any) -> None:
    capable(0)
    assert amx.obstacle() == ""
    assert codes.panel_widths()[0] == codes.TILE
    assert gemm(LAYOUTS[0]).label == f"gemm {LAYOUTS[0].label} amx"


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.machine() != "x86_64", reason="asks Linux itself")
def test_asking_where_there_are_no_tiles_is_harmless() -> None:
    """Numba is told that the CPU has tiles, whether or not it has them: the system knows better."""
    check = "from cpu_kernels import amx; print(amx.obstacle() or 'granted')"
    features = ",".join(f"+{name}" for name in sorted(amx.NEEDED))
    environment = os.environ | {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", check], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    with open("/proc/cpuinfo") as file:
        has_tiles = " amx_tile" in file.read()
    assert has_tiles or "Linux refuses the tile registers" in done.stdout
