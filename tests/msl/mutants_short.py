"""Mutants of the short kernels: sums of what others left in parts, votes, and lists of a mask."""

# ruff: noqa: E501
# Texts of kernels are as long as they are.

from __future__ import annotations

import mlx.core as mx
import numpy as np

from metal_kernels.lists import lists_of_mask
from ondevice_parity.cases_attention import SparkCase
from ondevice_parity.cases_ffn import FfnCase
from ondevice_parity.cases_select import TopkCase
from tests.kernels.metal_home import checks, running
from tests.msl.findings import Kind
from tests.msl.mutants import Mutant, Subject
from tests.msl.mutants_select import PLACES

PARTS = FfnCase(3, (33, 700, 37), (-2, 1, 300), biased=True, residual=True)
SHARED = FfnCase(3, (33, 700, 70), (-2,), shared=True)
BLOCKS = FfnCase(2, (64, 640, 40), (-2, 3), block=4, bits=4, gated=False, activation="relu", residual=True)
MANY = SparkCase((6, 2, 40), (65, 300, 0, 1, 520), page=16, r=12, k=10, drifting=True)
WINDOW = SparkCase((6, 2, 40), (600, 40), page=16, r=12, k=10, window=60)


def check_lists() -> None:
    """Of masks with rows of none, all and some units, longer than a threadgroup, and shorter than the largest one."""
    rng = np.random.default_rng(0)
    for units in (1100, 33):
        mask = rng.random((4, units)) < 0.3
        mask[1], mask[2] = False, True
        with running() as home:
            rows = lists_of_mask(mx.array(mask))
            indices, count = home.numpy(rows.indices), home.numpy(rows.count)
        for i, row in enumerate(mask):
            assert count[i] == row.sum() and np.array_equal(indices[i, : count[i]], np.flatnonzero(row)), f"row {i}"


SUBJECTS = (
    Subject(
        "sparse_ffn_sum",
        checks("sparse_ffn_rows", PARTS, SHARED, BLOCKS),
        (
            Mutant("an output too many", "if (at >= out) return;", "if (at > out) return;", Kind.OUT_OF_BOUNDS),
            Mutant("outputs that are not there", "if (at >= out) return;", "", Kind.OUT_OF_BOUNDS),
            Mutant("count in units", "* BLOCK + CHUNK - 1) / CHUNK", "+ CHUNK - 1) / CHUNK", Kind.WRONG),
            Mutant("last chunk left out", "* BLOCK + CHUNK - 1) / CHUNK", "* BLOCK) / CHUNK", Kind.WRONG),
            Mutant("a chunk that nobody filled", "* BLOCK + CHUNK - 1) / CHUNK", "* BLOCK + 2 * CHUNK - 1) / CHUNK", Kind.WRONG),
            Mutant("list of the first token", "counts[SHARED ? 0 : token]", "counts[0]", Kind.WRONG),
            Mutant("list of each token where they share one", "counts[SHARED ? 0 : token]", "counts[token]", Kind.OUT_OF_BOUNDS),
            Mutant("first chunk left out", "int chunk = 0;", "int chunk = 1;", Kind.WRONG),
            Mutant("chunks not added", "total += parts[", "total = parts[", Kind.WRONG),
            Mutant("parts of the first token", "(long(chunk) * tokens + token) * out + at]", "long(chunk) * tokens * out + at]", Kind.WRONG),
            Mutant("bias forgotten", "if (BIAS) total += float(bias[at]);", "", Kind.WRONG),
            Mutant("residual of the first token", "residual[long(token) * out + at]", "residual[at]", Kind.WRONG),
            Mutant("all tokens in the place of the first", "  y[long(token) * out + at]", "  y[at]", Kind.RACE),
        ),
    ),
    Subject(
        "topk_merge",
        checks("topk_attention", MANY, WINDOW),
        (
            Mutant("dimensions that are not there", "if (dim >= DH) return;", "", Kind.RACE),
            Mutant("a dimension too many", "if (dim >= DH) return;", "if (dim > DH) return;", Kind.RACE),
            Mutant("window forgotten", "window > 0 ? max(length - window, 0) : 0", "0", Kind.WRONG),
            Mutant("window one chunk on", "int chunk = first / CHUNK;", "int chunk = first / CHUNK + 1;", Kind.WRONG),
            Mutant("last chunk left out", "chunk * CHUNK < length;", "(chunk + 1) * CHUNK < length;", Kind.WRONG),
            Mutant("a chunk that nobody filled", "chunk * CHUNK < length;", "chunk * CHUNK <= length + CHUNK;", Kind.OUT_OF_BOUNDS),
            Mutant("parts of the first head", "parts_shape[1] + head) * chunks", "parts_shape[1]) * chunks", Kind.WRONG),
            Mutant("parts not added", "acc += parts[", "acc = parts[", Kind.WRONG),
            Mutant("totals not added", "total += sums[", "total = sums[", Kind.WRONG),
            Mutant("totals not divided by", "acc / total", "acc", Kind.WRONG),
            Mutant("nothing by nothing", "T(length > 0 ? acc / total : 0.0f)", "T(acc / total)", Kind.WRONG),
            Mutant("first dimension of all", "(slot + chunk) * DH + dim]", "(slot + chunk) * DH]", Kind.WRONG),
            Mutant("heads in the place of the first", "parts_shape[1] + head) * DH + dim]", "parts_shape[1]) * DH + dim]", Kind.RACE),
        ),
    ),
    Subject(
        "select_votes",
        checks(
            "select_topk", TopkCase(5, 1100, 300, shared=True, span=3), TopkCase(5, 40, 9, shared=True, active=True),
            TopkCase(3, 99, 40, shared=True, odd=True), TopkCase(2, 33, 7, shared=True, below=True),
        ),
        (
            Mutant("a unit too many", "if (at >= units) return;", "if (at > units) return;", Kind.OUT_OF_BOUNDS),
            Mutant("units that are not there", "if (at >= units) return;", "", Kind.OUT_OF_BOUNDS),
            Mutant("first token left out", "int n = 0;", "int n = 1;", Kind.WRONG),
            Mutant("last token left out", "n < tokens;", "n < tokens - 1;", Kind.WRONG),
            Mutant("a token too many", "n < tokens;", "n <= tokens;", Kind.OUT_OF_BOUNDS),
            Mutant("everybody votes", "if (ACTIVE && !active[n]) continue;", "", Kind.WRONG),
            Mutant("those vote that should not", "!active[n]", "active[n]", Kind.WRONG),
            Mutant("scores of the first token", "scores[long(n) * units + at]", "scores[at]", Kind.WRONG),
            Mutant("negative scores count", "sum += score > 0.0f ? score : 0.0f;", "sum += score == score ? score : 0.0f;", Kind.WRONG),
            Mutant("votes not added", "sum += score", "sum = score", Kind.WRONG),
            Mutant("sums side by side", "sums[at] = sum;", "sums[at / 2] = sum;", Kind.RACE),
        ),
    ),
    Subject(
        "list_mask",
        check_lists,
        (
            *PLACES,
            Mutant("units that are not there", "at < units && mask", "mask", Kind.OUT_OF_BOUNDS),
            Mutant("mask of the first row", "mask[row * units + at]", "mask[at]", Kind.WRONG),
            Mutant("list of the first row", "indices[row * units + place]", "indices[place]", Kind.RACE),
            Mutant("every thread stores the count", "if (thread_index_in_threadgroup == 0) counts", "counts", Kind.RACE),
            Mutant("threads leave", "    const bool take", "    if (at >= units) break;\n    const bool take", Kind.FINISHED_LANES),
            Mutant("units of one threadgroup only", "start += threads", "start += 2 * threads", Kind.WRONG),
        ),
    ),
)  # fmt: skip
