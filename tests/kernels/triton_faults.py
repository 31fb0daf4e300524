"""Faults that are planted in the Triton kernels; `triton_mutants.py` says how."""

# ruff: noqa: E501
# Texts of the kernels are as long as they are.

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault of a kernel.

    Args:
        file: of `cuda_kernels`.
        old, new: texts; the old one must occur once.
    """

    kernel: str
    file: str
    old: str
    new: str


def _of(kernel: str, *faults: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(kernel, *fault) for fault in faults]


ONE, UNION, AFFINE, TOPK = "sparse_ffn_one", "sparse_ffn_union", "affine", "topk_attention_kernels"
SELECTIVE = "selective_attention"
MUTANTS = [
    *_of(
        "sparse_ffn_rows",
        (ONE, "live = entry < count\n        rows = neurons_at(indices + token", "live = entry <= count\n        rows = neurons_at(indices + token"),
        (ONE, "tl.cdiv(count, chunk)", "count // chunk"),
        (ONE, "y *= activate(g, KIND)", "y += activate(g, KIND)"),
        (ONE, "unit * BLOCK + entry % BLOCK", "unit * BLOCK"),
        (ONE, "unit = tl.load(indices + entry // BLOCK, mask=live, other=0).to(tl.int64)", "unit = tl.load(indices + entry // BLOCK, mask=live, other=0)"),
        (ONE, "residual + token * residual_stride + at", "residual + token * out + at"),
        (ONE, "values + token * value_stride + rows", "values + token * value_stride + entry"),
        (ONE, "parts + (chunk * tokens + token) * out + at, tl.sum(acc, 0)", "parts + (chunk * tokens + token) * out + at, tl.max(acc, 0)"),
        (AFFINE, "bias * tl.sum(v, 1)[None, :]", "bias * tl.max(v, 1)[None, :]"),
        (AFFINE, "(rows // GROUP)[:, None, None]", "(rows // GROUP // 2)[:, None, None]"),
        (AFFINE, "at = (column // BW) * words + tile * BW + column % BW", "at = (column % BW) * words + tile * BW + column // BW"),
        (UNION, "start = piece * cut\n", "start = 0\n"),
        (UNION, "for i in range(cuts)", "for i in range(1)"),
        (UNION, "tl.minimum(count, (piece + 1) * cut)", "count"),
        (UNION, "range(cuts, 2 * cuts)", "range(cuts)"),
    ),
    *_of(
        "grouped_experts",
        ("grouped_experts", "token = tl.load(lists + expert * tokens + entry", "token = tl.load(lists + entry"),
        ("grouped_experts", "mask=asked[:, None] & live[None, :]", "mask=there[:, None] & live[None, :]"),
        ("grouped_experts", "live = own < BLOCK\n        rows = expert * BLOCK + own\n        y", "live = own < BS\n        rows = expert * BLOCK + own\n        y"),
        ("grouped_experts", "own = step % steps * BR", "own = 0 * BR"),
        ("grouped_experts", "expert = tl.load(lists + tl.program_id(0) * experts + step // steps)", "expert = (step // steps + tl.zeros([], tl.int32))"),
        ("grouped_experts", "lists_of_mask(mask.view(tiles, bm, units).any(1))", "lists_of_mask(mask.view(tiles, bm, units).all(1))"),
        ("lists", "tl.store(out + base + rank - 1, at, mask=take)", "tl.store(out + base + rank, at, mask=take)"),
    ),
    *_of(
        "quantized_linear",
        ("quantized_linear", "acc += tl.load(bias + at, mask=live, other=0.0).to(tl.float32)\n    tl.store", "tl.store"),
        ("quantized_linear", "acc += tl.load(bias + at, mask=live, other=0.0).to(tl.float32)[None, :]", "acc += tl.load(bias, mask=True).to(tl.float32)"),
        ("quantized_linear", "wide * x_stride", "wide * width"),
        ("quantized_linear", "mask=there[:, None] & live[None, :]", "mask=live[None, :]"),
        ("quantized_linear", "live, width, 0, width", "live, width, 0, width // 2"),
        ("quantized_linear", "tl.store(y + at, acc.to(y.dtype.element_ty), mask=live)", "tl.store(y + at, acc.to(y.dtype.element_ty), mask=at < out - 1)"),
        ("affine", "w = fields(packed, lane, BITS) * scale + bias\n", "w = fields(packed, lane, BITS) * scale\n"),
        ("affine", "place = rows[None, :] * (width // GROUP) + (at * PER // GROUP)[:, None]", "place = rows[None, :] * (width // GROUP) + (at // GROUP)[:, None]"),
    ),
    *_of(
        "sparse_inputs",
        ("sparse_inputs", "indices + token * list_stride + entry", "indices + entry"),
        ("sparse_inputs", "x + token * x_stride + at", "x + token * x_stride + entry"),
        ("sparse_inputs", "tl.store(h + token * h_stride + entry, value)", "tl.store(h + token * h_stride + entry, value, mask=live)"),
        ("sparse_inputs", "counts + token * count_stride", "counts + token"),
        ("sparse_inputs", "chunk = triton.cdiv(length, 64) * 64", "chunk = 64"),
        (ONE, "tl.minimum(count, (chunk + 1) * CHUNK)", "count"),
    ),
    *_of(
        "select_topk",
        ("select_topk", "equal & (equal_order <= rank)", "equal & (equal_order < rank)"),
        ("select_topk", "& (reach > k)", "& (reach > k + 1)"),
        ("select_topk", "tl.where(digit == 1, second, tl.where(digit == 2", "tl.where(digit == 1, first, tl.where(digit == 2"),
        ("select_topk", "third, beyond)", "third, 0)"),
        ("select_topk", "found += _reaching", "found = _reaching"),
        ("select_topk", "((wide & 0xFFC00) << 11)", "((wide & 0xFFC00) << 10)"),
        ("select_topk", "key >= border + 3 * step", "key > border + 3 * step"),
        ("select_topk", "tl.where(inside, key, 0)", "key"),
        ("select_topk", "tl.where(x == 0.0, 0.0, x).to", "x.to"),
        ("select_topk", "tl.where(x == x, key, 0)", "key"),
        ("select_topk", "equals += block & 0xFFFF", "equals = block & 0xFFFF"),
        ("select_topk", "highers += block >> 16", "highers = block >> 16"),
        ("select_topk", "(at * GROUP + g) * unit_stride", "(at + g) * unit_stride"),
        ("select_topk", "tl.load(row + at * unit_stride, mask=mask, other=0.0).to(tl.float32), 0.0)", "tl.load(row + at * unit_stride, mask=mask, other=0.0).to(tl.float32), -99.0)"),
        ("select_topk", "mask = mask & (tl.load(active + n) != 0)", "mask = mask & (tl.load(active) != 0)"),
        ("select_topk", "_keys(row, at, at < units", "_keys(row, lane, at < units"),
        ("select_topk", "tl.store(counts + number, highers + tl.minimum(equals, rank))", "tl.store(counts + number, highers + equals)"),
    ),
    *_of(
        "select_threshold",
        ("select_threshold", "take = x > border\n", "take = x >= border\n"),
        ("select_threshold", "| (x == largest)\n        else", "\n        else"),
        ("select_threshold", "append(take & inside,", "append(take,"),
        ("select_threshold", "x >= border * largest", "x > border * largest"),
        ("select_threshold", "most = tl.maximum(most, x)", "most = x"),
        ("lists", "return base + tl.sum(take.to(tl.int32), 0)", "return tl.sum(take.to(tl.int32), 0)"),
    ),
    *_of(
        "statistical_topk",
        ("statistical_topk", "away = tl.where(at < units, x - mean, 0.0)", "away = x - mean"),
        ("statistical_topk", "tl.sqrt(tl.sum(squares, 0) / units)", "tl.sqrt(tl.sum(squares, 0) / (units - 0.5))"),
        ("statistical_topk", "tl.maximum(x - border, 0.0)", "tl.where(x > border, x, 0.0)"),
        ("statistical_topk", "inside & (x > border)", "x > border"),
        ("statistical_topk", "mean = tl.sum(lanes, 0) / units", "mean = tl.sum(lanes, 0) / BLOCK"),
        ("statistical_topk", "values + number * units + at", "values + number * BLOCK + at"),
    ),
    *_of(
        "selective_attention",
        (SELECTIVE, "(head // PER_UNIT)[:, None]", "head[:, None]"),
        (SELECTIVE, "live = (at < count) & (at < list_length)", "live = at < list_length"),
        (SELECTIVE, "seen = (at >= first) & (at < length)", "seen = at < length"),
        (SELECTIVE, "total = total * shrink + tl.sum(weight, 1)", "total = total + tl.sum(weight, 1)"),
        (SELECTIVE, "v, acc * shrink[:, None]", "v, acc"),
        (SELECTIVE, "score = softcap * tanh(score / softcap)", "score = tanh(score / softcap)"),
        (SELECTIVE, "acc = acc * shrink + tl.sum(weight[:, None] * part, 0)", "acc = acc + tl.sum(weight[:, None] * part, 0)"),
        (SELECTIVE, "if (run > 0) & (length > 0):", "if length > 0:"),
        (SELECTIVE, "range(first // CHUNK, tl.cdiv(length, CHUNK), BC)", "range(0, tl.cdiv(length, CHUNK), BC)"),
        ("cache", "inside = position % PAGE", "inside = position"),
        ("cache", "page = tl.load(table + sequence * table_stride + position // PAGE).to(tl.int64)", "page = tl.load(table + sequence * table_stride + position // PAGE)"),
    ),
    *_of(
        "topk_attention",
        (TOPK, "apart * apart * (before * now / (before + now))", "apart * apart * now"),
        (TOPK, "(score > border[:, None]) | (score == largest[:, None]) | (n <= k_kept)", "(score > border[:, None]) | (score == largest[:, None])"),
        (TOPK, "(score > border[:, None]) | (score == largest[:, None]) | (n <= k_kept)", "(score > border[:, None]) | (n <= k_kept)"),
        (TOPK, "n = length - first\n", "n = length\n"),
        (TOPK, "tl.maximum(other, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(other)))", "tl.maximum(other, 0.0)"),
        (TOPK, "weight = tl.where(kept, tl.exp(score - largest[:, None]), 0.0)", "weight = tl.where(mask, tl.exp(score - largest[:, None]), 0.0)"),
        (TOPK, "tl.where(mask, apart * apart * has[None, :], 0.0)", "0.0"),
        (TOPK, "rest = r + tl.arange(0, BREST)", "rest = tl.arange(0, BREST)"),
        (TOPK, "tl.where(seen[None, :], score - own[:, None], 0.0)", "score - own[:, None]"),
    ),
]  # fmt: skip
