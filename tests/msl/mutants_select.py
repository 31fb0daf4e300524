"""Mutants of the selectors, and of what they share: places in a list, sums over a threadgroup."""

# ruff: noqa: E501
# Texts of kernels are as long as they are.

from __future__ import annotations

from dataclasses import replace

from ondevice_parity.cases_select import StatisticalCase, ThresholdCase, TopkCase
from tests.kernels.metal_home import checks
from tests.msl.findings import Kind
from tests.msl.mutants import Mutant, Subject

BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
TOTAL = "before[simdgroup_index] = total;\n"
THEIRS = "const uint all = simd_sum(theirs);\n"
FOUND = "    if (lane == 0) found[sg] = largest;\n"
COUNTED = "1u, memory_order_relaxed);\n      }\n    }\n"
ALL = "const float all = simd_sum(lane < simdgroups ? found[lane] : 0.0f);\n"

PLACES = (
    Mutant("no barrier before places", TOTAL + BARRIER, TOTAL, Kind.RACE),
    Mutant("no barrier behind places", THEIRS + BARRIER, THEIRS, Kind.RACE),
    Mutant("one simdgroup too many before", "lane < simdgroup_index ?", "lane <= simdgroup_index ?", Kind.RACE),
    Mutant("own place counted", "inside = simd_prefix_exclusive_sum", "inside = simd_prefix_inclusive_sum", Kind.WRONG),
    Mutant("what was listed forgotten", "listed += all;", "listed = all;", Kind.WRONG),
    Mutant("scratch of simdgroups that are not there", "lane < simdgroups ? before[lane] : 0u", "before[lane]", Kind.UNINITIALISED),
    Mutant("every lane stores the total", "if (lane == 0) before", "before", Kind.RACE),
)  # fmt: skip

SUBJECTS = (
    Subject(
        "select_threshold",
        checks("select_threshold", ThresholdCase(3, 33, 0.5, relative=True), ThresholdCase(3, 1100, 1.0)),
        (
            *PLACES,
            Mutant("no barrier before the largest", FOUND + "  " + BARRIER, FOUND, Kind.RACE),
            Mutant("largest of simdgroups that are not there", "lane < simdgroups_per_threadgroup ? found[lane] : -INFINITY", "found[lane]", Kind.UNINITIALISED),
            Mutant("a unit too many", "if (at < units) {", "if (at <= units) {", Kind.OUT_OF_BOUNDS),
            Mutant("largest not always listed", " || score == largest", "", Kind.WRONG),
            Mutant("on the threshold", "score > threshold;", "score >= threshold;", Kind.WRONG),
            Mutant("every thread stores the count", "if (thread_index_in_threadgroup == 0) counts", "counts", Kind.RACE),
            Mutant("threads leave", "    bool take = false;", "    if (at >= units) break;\n    bool take = false;", Kind.FINISHED_LANES),
            Mutant("list of the first row", "indices[row * units + place]", "indices[place]", Kind.RACE),
            Mutant("every thread the same units", "at = start + int(thread_index_in_threadgroup)", "at = start + int(lane)", Kind.RACE),
        ),
    ),
    Subject(
        "statistical_topk",
        checks("statistical_topk", StatisticalCase(3, 1100, 0.2, mean=5.0), StatisticalCase(2, 33, 0.3)),
        (
            *PLACES,
            Mutant("no barrier before the sum", "found[simdgroup_index] = total;\n" + BARRIER, "found[simdgroup_index] = total;\n", Kind.RACE),
            Mutant("no barrier behind the sum", ALL + BARRIER, ALL, Kind.RACE),
            Mutant("sums of simdgroups that are not there", "lane < simdgroups ? found[lane] : 0.0f", "found[lane]", Kind.UNINITIALISED),
            Mutant("sum of one simdgroup", "const float total = simd_sum(x);", "const float total = x;", Kind.WRONG),
            Mutant("deviation from 0", "float(mine[at]) - mean;", "float(mine[at]);", Kind.WRONG),
            Mutant("variance as deviation", "c * sqrt(variance)", "c * variance", Kind.WRONG),
            Mutant("scores beyond the end", "    if (at < units) {", "    if (at <= units) {", Kind.OUT_OF_BOUNDS),
            Mutant("values not above 0", "max(score - border, 0.0f)", "score - border", Kind.WRONG),
            Mutant("values only of listed units", "      values[row", "      if (take) values[row", Kind.WRONG),
            Mutant("double", "float squares = 0.0f;", "double squares = 0.0f;", Kind.COMPILE),
        ),
    ),
    Subject(
        "select_topk",
        checks(
            "select_topk", TopkCase(3, 1100, 300, group=2, span=3), TopkCase(3, 40, 9, group=2, zeros=True),
            TopkCase(2, 99, 40, group=2, odd=True),
        ),
        (
            *(replace(m, caught=Kind.UNWRITTEN) if m.name == "own place counted" else m for m in PLACES),
            Mutant("bins not emptied", "bin < 256; bin += threads", "bin < 128; bin += threads", Kind.UNINITIALISED),
            Mutant("no barrier before counting", "0u, memory_order_relaxed);\n  " + BARRIER, "0u, memory_order_relaxed);\n", Kind.RACE),
            Mutant("no barrier behind counting", COUNTED + "  " + BARRIER, COUNTED, Kind.UNINITIALISED),
            Mutant("no barrier behind the choice", BARRIER + "    known = ", "    known = ", Kind.RACE),
            Mutant("all keys counted in each digit", "digit == 0 || (key >> (shift + 8)) == known", "true", Kind.UNWRITTEN),
            Mutant("rank not lowered", "choice[1] = rank - above;", "choice[1] = rank;", Kind.RACE),
            Mutant("last of a bin left out", "rank <= above + counted[i]", "rank < above + counted[i]", Kind.OUT_OF_BOUNDS),
            Mutant("one equal key too few", "equal && order < rank", "equal && order + 1 < rank", Kind.UNWRITTEN),
            Mutant("all equal keys", "equal && order < rank", "equal", Kind.RACE),
            Mutant("zeros by their sign", "x == 0.0f ? 0.0f : x", "x", Kind.WRONG),
            Mutant("NaN as a number", "return x == x ? key : 0u;", "return key;", Kind.WRONG),
            Mutant("first score of a unit", "scores[unit * GROUP + g]", "scores[unit * GROUP]", Kind.WRONG),
            Mutant("bins from the small end", "choice[0] = 255u - (lane * 8u + uint(i));", "choice[0] = lane * 8u + uint(i);", Kind.OUT_OF_BOUNDS),
        ),
    ),
)  # fmt: skip
