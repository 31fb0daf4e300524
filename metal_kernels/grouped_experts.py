"""An FFN of experts for many tokens, each of which asks for some: the tokens of an expert are multiplied together.

What it must move: each expert that anybody asked for, d * block * 2 bytes of float16 a matrix, once for every TOKENS
of its tokens, and all but the first time from the cache, since threadgroups of an expert run side by side. With
hundreds of tokens this is bound by arithmetic, which grouping leaves out in proportion for gate and up.

Grid: `lists_of_mask` makes each expert's list of tokens. `grouped_hidden` (an expert's neurons, TOKENS of its tokens)
gathers inputs by that list; threadgroups beyond its count end at once. `grouped_down` (256 outputs, TOKENS tokens)
goes over the experts that any token of its tile asked for, and takes h of the others as 0. So an output is one sum: no
atomics, which would add in any order, and no [experts, tokens, out] to merge, which moves 8 bytes for each 2 * block
operations. The price is that down is left out only where no token of a tile asked for an expert; tiles are small, so
that this is often so.
"""

from __future__ import annotations

import mlx.core as mx

from metal_kernels.launch import absent, launch, need_float, need_gpu, need_kind, tiles
from metal_kernels.lists import RowList, lists_of_mask, mask_of_lists
from metal_kernels.pack import PackedFfn
from metal_kernels.sparse_ffn_rows import (
    DOWN_SIMDGROUPS,
    OUTPUTS,
    TOKENS,
    hidden_inputs,
    hidden_template,
    matrix_inputs,
    rows_of,
    sparse_ffn_rows_mlx,
)

SIMDGROUPS = 4
"""Of a threadgroup of `grouped_hidden`: they read the same inputs."""


def grouped_experts(
    x: mx.array, ffn: PackedFfn, experts: RowList, activation: str, residual: mx.array | None = None
) -> mx.array:
    """down h (+ bias, + residual), where h is 0 for experts that a token did not ask for.

    h is kept in x's type, sums are taken in float32.

    Args:
        x: [N, in].
        ffn: of `pack_ffn`; an expert is its `block` neurons. Not valued.
        experts: N lists, each expert at most once in a list, or one for all.
        activation: "silu", "gelu", "gelu_tanh", "relu", "abs" or "none".
        residual: [N, out].

    Returns:
        [N, out] in x's type.

    Raises:
        ValueError: shapes or types that do not fit.
        RuntimeError: there is no Apple GPU.

    Source: D2DMoE (Szatkowski et al. 2024), section 3 and appendix on the implementation.
    """
    _need(x, ffn, experts, activation, residual)
    need_gpu()
    tokens, (_, neurons, out) = len(x), ffn.shape
    if not tokens:
        return mx.zeros((0, out), x.dtype)
    units, across = neurons // ffn.block, tiles(tokens, TOKENS)
    mask = mx.broadcast_to(mask_of_lists(experts, units), (tokens, units))
    by_expert = lists_of_mask(mask.T)
    whole = mx.concatenate([mask, mx.zeros((across * TOKENS - tokens, units), mx.bool_)])
    by_tile = lists_of_mask(whole.reshape(across, TOKENS, units).any(axis=1))
    per_simdgroup = rows_of(TOKENS)
    (h,) = launch(
        "grouped_hidden",
        {"x": x, **hidden_inputs(ffn, x), "lists": by_expert.indices, "counts": by_expert.count, "neurons": neurons},
        {"h": ((tokens, neurons), x.dtype)},
        (units * tiles(ffn.block, SIMDGROUPS * per_simdgroup), across, 1),
        32 * SIMDGROUPS,
        {**hidden_template(ffn, activation), "T": x.dtype, "TOKENS": TOKENS, "ROWS": per_simdgroup},
        ("activation", "rows"),
    )
    (y,) = launch(
        "grouped_down",
        {"h": h, **matrix_inputs("down", ffn.down, x), "bias": absent(ffn.down_bias, x),
         "residual": absent(residual, x), "mask": mask, "lists": by_tile.indices, "counts": by_tile.count,
         "outputs": out},
        {"y": ((tokens, out), x.dtype)},
        (tiles(out, OUTPUTS), across, 1),
        32 * DOWN_SIMDGROUPS,
        {"T": x.dtype, "BITS": ffn.bits, "GROUP": ffn.group, "BLOCK": ffn.block, "TOKENS": TOKENS,
         "SIMDGROUPS": DOWN_SIMDGROUPS, "BIAS": ffn.down_bias is not None, "RESIDUAL": residual is not None},
        ("outputs",),
    )  # fmt: skip
    return y


def _need(x: mx.array, ffn: PackedFfn, experts: RowList, activation: str, residual: mx.array | None) -> None:
    need_kind(activation)
    need_float("x", x)
    if ffn.valued:
        raise ValueError("grouped experts take no values: run a valued FFN by sparse_ffn_rows")
    if x.ndim != 2 or x.shape[1] != ffn.shape[0]:
        raise ValueError(f"x is {list(x.shape)}; this FFN takes [N, {ffn.shape[0]}]")
    if len(experts.indices) not in (1, len(x)) or len(experts.indices) != len(experts.count):
        raise ValueError(f"{len(experts.indices)} lists with {len(experts.count)} counts; there must be 1 or {len(x)}")
    if residual is not None and residual.shape != (len(x), ffn.shape[2]):
        raise ValueError(f"residual is {list(residual.shape)}; it must be [{len(x)}, {ffn.shape[2]}]")


def grouped_experts_mlx(
    x: mx.array, ffn: PackedFfn, experts: RowList, activation: str, residual: mx.array | None = None
) -> mx.array:
    """`grouped_experts` in plain MLX, on any device."""
    _need(x, ffn, experts, activation, residual)
    return sparse_ffn_rows_mlx(x, ffn, experts, activation, residual=residual)
