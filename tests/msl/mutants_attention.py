"""Mutants of `selective_attention` and of what merges its chunks."""

# ruff: noqa: E501
# Texts of kernels are as long as they are.

from __future__ import annotations

from ondevice_parity.cases_attention import AttentionCase
from tests.kernels.metal_home import checks
from tests.msl.findings import Kind
from tests.msl.mutants import Mutant, Subject

BARRIER = "    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
MERGE = "    if (sg < half_of) {"
MANY = AttentionCase((6, 2, 40), (65, 520, 0, 1, 33), page=16, growing=True)
WINDOW = AttentionCase((6, 2, 40), (40, 300), (3, -2), page=16, window=41)

KEYS = (
    Mutant("another page", "pages + key / PAGE]", "pages + key / (2 * PAGE)]", Kind.WRONG),
    Mutant("pages of the first sequence", "table[long(sequence) * pages + ", "table[", Kind.OUT_OF_BOUNDS),
    Mutant("position beyond the page", "PAGED ? key % PAGE : key", "key", Kind.WRONG),
    Mutant("half of a key's lanes", "m = LK / 2; m > 0", "m = LK / 4; m > 0", Kind.WRONG),
    Mutant("parts not added", "m >= LK; m /= 2", "m > LK; m /= 2", Kind.WRONG),
    Mutant("score of another key", "if (int(lane) % LK == t)", "if (int(lane) % LK <= t)", Kind.WRONG),
    Mutant("keys beyond the length", "min(length, (chunk + 1) * CHUNK)", "(chunk + 1) * CHUNK", Kind.OUT_OF_BOUNDS),
    Mutant("keys of the first KV head", "keys + kv * keys_strides[2]", "keys", Kind.WRONG),
    Mutant("lane that is not there", "simd_shuffle_xor(x, ushort(m));\n  return x;\n}\n\n// The sum over lanes",
           "simd_shuffle(x, ushort(32));\n  return x;\n}\n\n// The sum over lanes", Kind.INACTIVE_LANE),
    Mutant("every simdgroup all keys", "keys_at = chunk * CHUNK + sg * 32", "keys_at = chunk * CHUNK", Kind.WRONG),
)  # fmt: skip
SLOTS = (
    Mutant("no barrier before slots are read", BARRIER + MERGE, MERGE, Kind.RACE),
    Mutant("no barrier behind slots", BARRIER + "  }\n  if (sg != 0) return;", "  }\n  if (sg != 0) return;", Kind.RACE),
    Mutant("barrier of the simdgroup", BARRIER + MERGE, BARRIER.replace("threadgroup_b", "simdgroup_b", 1) + MERGE, Kind.RACE),
    Mutant("dimensions beyond the last", "if (part == 0 && begin + i < DH) slots", "if (part == 0) slots", Kind.OUT_OF_BOUNDS),
    Mutant("all parts write slots", "if (part == 0 && begin + i < DH) slots", "if (begin + i < DH) slots", Kind.RACE),
    Mutant("slots of half the size", "slots[SIMDGROUPS / 2 * HT * DH]", "slots[HT * DH]", Kind.OUT_OF_BOUNDS),
    Mutant("every simdgroup stores", "  if (sg != 0) return;\n", "", Kind.RACE),
)  # fmt: skip

SUBJECTS = (
    Subject(
        "selective_attention",
        checks("selective_attention", MANY, WINDOW),
        (
            *KEYS,
            *SLOTS,
            Mutant("a simdgroup leaves", "if (run == 0) return;", "if (run == 0 || sg == 3) return;", Kind.DIVERGENT_BARRIER),
            Mutant("heads by their place", "list[i] * PER_UNIT - head", "list[i] * PER_UNIT", Kind.WRONG),
            Mutant("list of the first sequence", "heads + sequence * units", "heads", Kind.WRONG),
            Mutant("sum does not shrink", "total[g] * shrink + simd_sum", "total[g] + simd_sum", Kind.WRONG),
            Mutant("values do not shrink", "acc[g][i] *= shrink;", "acc[g][i] *= 1.0f;", Kind.WRONG),
            Mutant("keys that are not seen", "seen ? s * M_LOG2E_F : -INFINITY", "s * M_LOG2E_F", Kind.WRONG),
            Mutant("window ignored", "window > 0 ? max(length - window, 0) : 0", "0", Kind.WRONG),
            Mutant("simdgroups without keys", "highs[slot] > -INFINITY ? exp2(highs[slot] - now) : 0.0f", "exp2(highs[slot] - now)", Kind.WRONG),
            Mutant("query of another head", "(head + g) * q_strides[1]", "g * q_strides[1]", Kind.WRONG),
            Mutant("weight of another key", "simd_shuffle(score[g], ushort(from))", "simd_shuffle(score[g], ushort(from ^ 1))", Kind.WRONG),
        ),
    ),
    Subject(
        "attention_merge",
        checks("selective_attention", MANY, WINDOW),
        (
            Mutant("list ignored", ") != 0 && run;", ") != 99 && run;", Kind.WRONG),
            Mutant("list read to its end", "min(counts[sequence], units)", "units", Kind.WRONG),
            Mutant("list of the first sequence", "heads + sequence * units", "heads", Kind.WRONG),
            Mutant("list of one lane", "i = int(lane); i < count", "i = 0; i + 1 < count", Kind.WRONG),
            Mutant("chunks before the window", "chunk = first / CHUNK", "chunk = 0", Kind.WRONG),
            Mutant("last chunk left out", "chunk * CHUNK < length", "(chunk + 1) * CHUNK < length", Kind.WRONG),
            Mutant("a chunk too many", "chunk * CHUNK < length", "chunk * CHUNK < length + CHUNK", Kind.WRONG),
            Mutant("sum does not shrink", "total = total * shrink + ", "total = total + ", Kind.WRONG),
            Mutant("values do not shrink", "acc = acc * shrink + ", "acc = acc + ", Kind.WRONG),
            Mutant("dimensions beyond the last read", "if (run && dim < DH)", "if (run)", Kind.OUT_OF_BOUNDS),
            Mutant("dimensions beyond the last stored", "if (dim < DH) out", "out", Kind.OUT_OF_BOUNDS),
            Mutant("lanes leave before the list", "  bool run = length > 0;", "  if (dim >= DH) return;\n  bool run = length > 0;", Kind.FINISHED_LANES),
            Mutant("length 0 not 0", "run ? acc / total : 0.0f", "acc / total", Kind.WRONG),
            Mutant("chunks of another head", "(long(sequence) * n_heads + head) * chunks", "(long(sequence) * n_heads) * chunks", Kind.WRONG),
        ),
    ),
)  # fmt: skip
