"""Weights of chosen neurons times many tokens.

The table of the neurons that any token needs says at run time which weights are multiplied. Where they lie, and in what
form, is known to a source (`chosen_sources`): it unpacks a tile of 16 rows, and the rest is the dense product's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numba

from cpu_kernels import amx
from cpu_kernels.chosen_sources import Source
from cpu_kernels.codes import panel_widths
from cpu_kernels.compile import Kernel, kernel, named, unpack
from cpu_kernels.finish import finish
from cpu_kernels.float_linear import block_tokens, float_product
from cpu_kernels.gemm import panels_product
from cpu_kernels.gemm_amx import tile_state
from cpu_kernels.simd import load_f32
from cpu_kernels.table import count_of, entry_count, first_entry


def sums_bytes(source: Source) -> int:
    """Scratch memory before the unpacked tile."""
    return 2 * 64 * panel_widths()[0] if source.layout else 64 * block_tokens()


def scratch_bytes(source: Source, inputs: int) -> int:
    """Memory that each thread needs: sums of some tokens, and an unpacked tile."""
    return sums_bytes(source) + -(-inputs // 32) * source.group_bytes


def gemm_up(source: Source, parts: int) -> Kernel:
    """Kernel: what chosen neurons have before activation, [N][entries][gate 32, up 32] floats.

    Args:
        source: of gate and up.
        parts: tiles of an entry: 4, or 2 without a gate.

    Its arguments: out and its stride, weight and numbers (see Source), table, its groups, pieces of work, tokens as
    panels or floats, number of tokens, width of the last panel or bytes between tokens, inputs, scratch memory and
    bytes of it for each thread.
    """
    return _gemm_up(source, parts, amx.tiles())


@functools.cache
def _gemm_up(source: Source, parts: int, tiles: amx.Tiles | None) -> Kernel:
    label = f"up {parts} {_labelled(source, tiles)}"
    unpack_row, multiply, unpacked_at = source.unpack, _multiply(source, tiles, label), sums_bytes(source)
    configure, release = _state(source, tiles)

    @kernel(f"gemm {label}")
    def gemm_up(arguments, tile, thread):
        (out, stride, weight, numbers, table, groups, pieces, x, n_tokens, shape, inputs, scratch,
         each) = unpack(arguments, "iiiiiiiiiiiii")  # fmt: skip
        memory, tokens = scratch + thread * each, (x, n_tokens, shape, inputs, 0, n_tokens)
        configure()
        for entry in range(first_entry(table, tile, pieces), first_entry(table, tile + 1, pieces)):
            halves = 2 if count_of(table, groups, entry) > 16 else 1
            for part in range(parts):
                if part % 2 < halves:
                    place = weight, numbers, table, groups
                    coming = unpack_row(memory + unpacked_at, place, entry, part, inputs)
                    multiply(out + (entry * parts + part) * 64, stride, tokens, memory, coming, (0, 0, 0))
        release()

    return gemm_up


def gemm_down(source: Source) -> Kernel:
    """Kernel: out = tokens x W^T (+ bias) (+ residual), of W the columns of chosen neurons.

    Its arguments: out and its stride, weight and numbers (see Source), number of tiles, tiles of one piece of work,
    table, its groups, tokens as panels or floats, number of tokens, panels (or tokens) of one piece of work, width of
    the last panel or bytes between tokens, bias, residual (0 for none) and its stride, scratch memory and bytes of it
    for each thread.
    """
    return _gemm_down(source, amx.tiles())


@functools.cache
def _gemm_down(source: Source, tiles: amx.Tiles | None) -> Kernel:
    label = f"down {_labelled(source, tiles)}"
    unpack_row, multiply, unpacked_at = source.unpack, _multiply(source, tiles, label), sums_bytes(source)
    configure, release = _state(source, tiles)

    @kernel(f"gemm {label}")
    def gemm_down(arguments, tile, thread):
        (out, out_stride, weight, numbers, n_tiles, each, table, groups, x, n_tokens, tokens_each, shape, bias,
         residual, residual_stride, scratch, scratch_each) = unpack(arguments, "iiiiiiiiiiiiiiiii")  # fmt: skip
        across = (n_tiles + each - 1) // each
        first, start = tile % across * each, tile // across * tokens_each
        memory, tokens = (
            scratch + thread * scratch_each,
            (x, n_tokens, shape, 32 * entry_count(table), start, tokens_each),
        )
        configure()
        for row in range(first, min(first + each, n_tiles)):
            coming = unpack_row(memory + unpacked_at, (weight, numbers, table, groups), row)
            extra = bias + row * 64 if bias != 0 else 0, residual + row * 64 if residual != 0 else 0, residual_stride
            multiply(out + row * 64, out_stride, tokens, memory, coming, extra)
        release()

    return gemm_down


def _labelled(source: Source, tiles: amx.Tiles | None) -> str:
    return f"{source.label} {tiles.name}" if tiles and source.layout else source.label


def _multiply(source: Source, tiles: amx.Tiles | None, label: str) -> Callable:
    return panels_product(source.layout, tiles, label) if source.layout else _floats_product(label)


def _state(source: Source, tiles: amx.Tiles | None):
    return tile_state(source.layout, tiles if source.layout else None)


@functools.cache
def _floats_product(label: str) -> Callable:
    """What `panels_product` is, for float weights: tokens are rows of floats; an unpacked tile [inputs][16 rows]."""
    block = block_tokens()
    one, many = float_product(1, "f32"), float_product(block, "f32")

    @numba.njit(error_model="numpy")
    @named(label)
    def multiply(out, stride, tokens, memory, coming, extra):
        x, n_tokens, x_stride, inputs, t, tokens_each = tokens
        bias, residual, residual_stride = extra
        end = min(t + tokens_each, n_tokens)
        while t < end:
            count = block if t + block <= end else 1
            if count == block:
                many(memory, memory + 64 * block, x + t * x_stride, x_stride, inputs)
            else:
                one(memory, memory + 64 * block, x + t * x_stride, x_stride, inputs)
            for i in range(count):
                r = residual + (t + i) * residual_stride if residual != 0 else 0
                finish(load_f32(memory + 64 * i), out + (t + i) * stride, bias, r)
            t += count

    return multiply
