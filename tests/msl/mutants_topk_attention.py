"""Mutants of `topk_attention`: of its scores, and of what chosen keys weigh."""

# ruff: noqa: E501
# Texts of kernels are as long as they are.

from __future__ import annotations

from dataclasses import replace

from ondevice_parity.cases_attention import SparkCase
from tests.kernels.metal_home import checks
from tests.msl.findings import Kind
from tests.msl.mutants import Mutant, Subject
from tests.msl.mutants_attention import KEYS, SLOTS

BARRIER = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
MANY = SparkCase((6, 2, 40), (65, 300, 0, 1, 8), page=16, r=12, k=10, drifting=True)
EQUAL = SparkCase((6, 2, 40), (7, 33), page=16, r=12, k=10, equal=True)
WINDOW = SparkCase((6, 2, 40), (300, 40), page=16, r=12, k=10, window=60)

ELSE = {"position beyond the page": Kind.OUT_OF_BOUNDS, "every simdgroup all keys": Kind.RACE}
"""Kinds that are others than in `selective_attention`."""


def _here(mutant: Mutant) -> Mutant:
    return replace(mutant, caught=ELSE.get(mutant.name, mutant.caught))


SUBJECTS = (
    Subject(
        "topk_scores",
        checks("topk_attention", MANY, WINDOW, EQUAL),
        (
            *(_here(m) for m in KEYS if m.name != "parts not added"),
            Mutant("no barrier", BARRIER, "", Kind.RACE),
            Mutant("barrier of the wrong memory", BARRIER, BARRIER.replace("_threadgroup)", "_device)"), Kind.RACE),
            Mutant("barrier of one simdgroup", BARRIER, "  if (sg == 0)\n  " + BARRIER, Kind.DIVERGENT_BARRIER),
            Mutant("first simdgroup's alone", "s < SIMDGROUPS; ++s", "s < 1; ++s", Kind.WRONG),
            Mutant("every lane stores", "if (lane == 0) {", "if (true) {", Kind.RACE),
            Mutant("means not merged", "mean[g] += apart * (now / (before + now));", "mean[g] = average;", Kind.WRONG),
            Mutant("means apart forgotten", "simd_sum(away * away) + apart * apart * (before * now / (before + now))", "simd_sum(away * away)", Kind.WRONG),
            Mutant("scale forgotten", "score[g] * scale", "score[g]", Kind.WRONG),
            Mutant("heads beyond the group", "if (g >= here) return;", "if (g >= HT + 1) return;", Kind.OUT_OF_BOUNDS),
        ),
    ),
    Subject(
        "topk_chosen",
        checks("topk_attention", MANY, WINDOW, EQUAL),
        (
            *(m for m in SLOTS if m.name != "barrier of the simdgroup"),
            *(_here(m) for m in KEYS if "page" in m.name or m.name in ("parts not added", "half of a key's lanes")),
            Mutant("largest not always kept", " || s == largest[g]", "", Kind.WRONG),
            Mutant("few keys not all kept", " || n <= kept_keys", "", Kind.WRONG),
            Mutant("window ignored in n", "const int n = length - first;", "const int n = length;", Kind.WRONG),
            Mutant("means of chunks apart forgotten", "squares[slot + c] + apart * apart * has", "squares[slot + c]", Kind.WRONG),
            Mutant("chunks weigh alike", "sum += means[slot + c] * has;", "sum += means[slot + c] * float(CHUNK);", Kind.WRONG),
            Mutant("a chunk too many", "(length + CHUNK - 1) / CHUNK", "length / CHUNK + 2", Kind.WRONG),
            Mutant("keys taken twice", "bits &= bits - 1u;", "if (p == 0) bits &= bits - 1u;", Kind.WRONG),
            Mutant("key of the first part", "if (p == part && bits != 0)", "if (p == 0 && bits != 0)", Kind.WRONG),
            Mutant("softplus forgotten", "mine * softplus", "mine", Kind.WRONG),
            Mutant("first dimensions weigh", "(R + begin + i) * q_strides[2]", "(begin + i) * q_strides[2]", Kind.WRONG),
            Mutant("lanes choose for themselves", "simd_or(some ? 1u << lane : 0u)", "(some ? 1u << lane : 0u)", Kind.DIVERGENT_SIMD),
            Mutant("totals forgotten", "total[g] += totals[slot];", "", Kind.WRONG),
        ),
    ),
)  # fmt: skip
