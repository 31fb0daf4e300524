"""Mutants of the kernels that compute an FFN's listed neurons."""

# ruff: noqa: E501
# Texts of kernels are as long as they are.

from __future__ import annotations

from ondevice_parity.cases_ffn import FfnCase
from tests.kernels.metal_home import checks
from tests.msl.findings import Kind
from tests.msl.mutants import Mutant, Subject

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FOUND = "sums.done[t][i];\n    "
ADDED = "    }\n    "
LANES = "  add_products<BITS, GROUP, GATED, N>("
BITS4 = FfnCase(3, (1088, 96, 40), (7, 1, -2), bits=4, block=4, biased=True)
UNION = FfnCase(5, (33, 70, 37), (7,), shared=True, activation="gelu", residual=True)
UNION_ALL = FfnCase(5, (33, 7, 37), (-2,), shared=True, activation="gelu", residual=True)
CHUNKS = FfnCase(2, (32, 320, 300), (-2, 7), bits=4, gated=False, activation="relu")
EIGHT = FfnCase(2, (64, 64, 33), (9, -1), bits=8, gated=False, activation="abs")
EXPERTS = FfnCase(9, (64, 192, 300), (1, 2, 0, -1), block=96, bits=4, biased=True, residual=True)
ODD_EXPERTS = FfnCase(6, (33, 45, 37), (0, -2, 1), block=15, dtype="float16", gated=False, activation="relu")

PRODUCTS = (
    Mutant("sum over lanes forgotten", "      u[t][r] = simd_sum(u[t][r]);\n", "", Kind.WRONG),
    Mutant("lane 31 leaves", LANES, "  if (lane > 30) return;\n" + LANES, Kind.FINISHED_LANES),
    Mutant("lane 31 left out", "u[t][r] = simd_sum(", "if (lane < 31) u[t][r] = simd_sum(", Kind.DIVERGENT_SIMD),
    Mutant("lower nibbles twice", "float(halves[1] &", "float(halves[0] &", Kind.WRONG),
    Mutant("nibbles not made up for", "0.0625f, 0.00390625f", "0.00390625f, 0.0625f", Kind.WRONG),
    Mutant("scale of another group", "(width / GROUP) + k / GROUP", "(width / GROUP) + k / (2 * GROUP)", Kind.WRONG),
    Mutant("bias forgotten", "* dot + float(biases[at]) * sum", "* dot", Kind.WRONG),
    Mutant("every second piece of a row", "k += 32 * N", "k += 64 * N", Kind.WRONG),
    Mutant("end of a row not kept", "k + i < width ? float(at[i]) : 0.0f", "float(at[i])", Kind.OUT_OF_BOUNDS),
    Mutant("inputs beyond the end", "BITS != 0 || at < width ?", "true ?", Kind.OUT_OF_BOUNDS),
    Mutant("pointer without address space", "const device uint* weight", "const uint* weight", Kind.COMPILE),
    Mutant("every lane finishes the same", "if (lane == t * ROWS + r)", "if (lane >= 0)", Kind.WRONG),
)

SUBJECTS = (
    Subject(
        "sparse_ffn_hidden",
        checks("sparse_ffn_rows", BITS4, UNION, UNION_ALL),
        (
            *PRODUCTS,
            Mutant("count in units", "min(counts[list], units) * BLOCK", "min(counts[list], units)", Kind.WRONG),
            Mutant("list read further", "min(first + r, count - 1)", "first + r", Kind.OUT_OF_BOUNDS),
            Mutant("list of the first token", "indices[long(list) * units + ", "indices[", Kind.OUT_OF_BOUNDS),
            Mutant("first neuron of a unit", "* BLOCK + entry % BLOCK", "* BLOCK", Kind.WRONG),
            Mutant("token that is not there", "min(tile * TOKENS + t, tokens - 1)", "(tile * TOKENS + t)", Kind.OUT_OF_BOUNDS),
            Mutant("stores tokens that are not there", "token >= tokens || ", "", Kind.OUT_OF_BOUNDS),
            Mutant("stores of all lanes", "lane >= TOKENS * ROWS || ", "", Kind.RACE),
            Mutant("bias by entry", "up_bias[row]", "up_bias[entry]", Kind.WRONG),
            Mutant("one activation for all", "activate<KIND>(mine_g)", "activate<0>(mine_g)", Kind.WRONG),
        ),
    ),
    Subject(
        "sparse_ffn_down",
        checks("sparse_ffn_rows", CHUNKS, UNION_ALL, EIGHT),
        (
            Mutant("no barrier before the sum", FOUND + BARRIER, FOUND, Kind.RACE),
            Mutant("no barrier behind the sum", ADDED + BARRIER, ADDED, Kind.RACE),
            Mutant("barrier of the wrong memory", FOUND + BARRIER, FOUND + BARRIER.replace("_threadgroup)", "_device)"), Kind.RACE),
            Mutant("barrier of the simdgroup", FOUND + BARRIER, FOUND + BARRIER.replace("threadgroup_b", "simdgroup_b", 1), Kind.RACE),
            Mutant("simdgroups leave", "if (chunk * CHUNK >= count) return;", "if (chunk * CHUNK + sg >= count) return;", Kind.DIVERGENT_BARRIER),
            Mutant("last simdgroup left out", "s < SIMDGROUPS; ++s", "s < SIMDGROUPS - 1; ++s", Kind.WRONG),
            Mutant("scratch too small", "found[SIMDGROUPS * 256];", "found[SIMDGROUPS * 256 - 32];", Kind.OUT_OF_BOUNDS),
            Mutant("scale of the first group", "rows[j] / GROUP != group", "group < 0", Kind.WRONG),
            Mutant("last group forgotten", "  if (BITS == 0 || group >= 0) finish_group<BITS>(sums, scales, biases, group, at, outputs);\n", "", Kind.WRONG),
            Mutant("group added twice", "      sums.dots[t][i] = 0.0f;\n", "", Kind.WRONG),
            Mutant("list read further", "min(entry + j, end - 1)", "entry + j", Kind.OUT_OF_BOUNDS),
            Mutant("rows added that are not there", "j < 4 && entry + j < end", "j < 4", Kind.WRONG),
            Mutant("rows not padded", "row * ((out + 7) / 8) + at / 8", "row * (out / 8) + at / 8", Kind.WRONG),
            Mutant("outputs beyond the last read", "at + i < out ? float(mine[i]) : 0.0f", "float(mine[i])", Kind.OUT_OF_BOUNDS),
            Mutant("outputs beyond the last stored", "if (output < outputs) parts", "parts", Kind.RACE),
            Mutant("factor of another entry", "h_shape[1] + entry + j]", "h_shape[1] + entry]", Kind.WRONG),
            Mutant("chunks begin alike", "chunk * CHUNK + sg * share", "sg * share", Kind.WRONG),
            Mutant("bytes in another order", "8 * (i % 4)", "8 * (3 - i % 4)", Kind.WRONG),
        ),
    ),
    Subject(
        "grouped_hidden",
        checks("grouped_experts", EXPERTS, ODD_EXPERTS),
        (
            *(m for m in PRODUCTS if m.name not in ("every second piece of a row", "every lane finishes the same")),
            Mutant("tokens of the first expert", "lists[long(expert) * tokens + ", "lists[", Kind.OUT_OF_BOUNDS),
            Mutant("list read further", "min(begin + t, count - 1)", "(begin + t)", Kind.OUT_OF_BOUNDS),
            Mutant("neurons of the next expert", "min(first + r, BLOCK - 1)", "(first + r)", Kind.OUT_OF_BOUNDS),
            Mutant("piece forgotten", "(piece * int(simdgroups_per_threadgroup) + ", "(", Kind.RACE),
            Mutant("first expert alone", "long(expert) * BLOCK", "0L", Kind.RACE),
            Mutant("stores entries beyond the list", "begin + lane / ROWS >= count || ", "", Kind.RACE),
            Mutant("stores of all lanes", "lane >= TOKENS * ROWS || ", "", Kind.RACE),
        ),
    ),
    Subject(
        "grouped_down",
        checks("grouped_experts", EXPERTS, ODD_EXPERTS),
        (
            Mutant("no barrier before the sum", FOUND + BARRIER, FOUND, Kind.RACE),
            Mutant("no barrier behind the sum", ADDED + BARRIER, ADDED, Kind.RACE),
            Mutant("barrier of some simdgroups", FOUND + BARRIER, FOUND + "if (sg < 4) " + BARRIER, Kind.DIVERGENT_BARRIER),
            Mutant("last simdgroup left out", "s < SIMDGROUPS; ++s", "s < SIMDGROUPS - 1; ++s", Kind.WRONG),
            Mutant("experts that nobody asked for", "token < tokens && mask[token * experts + rows[j] / BLOCK]", "token < tokens", Kind.WRONG),
            Mutant("tokens that are not there", "token < tokens && mask", "mask", Kind.OUT_OF_BOUNDS),
            Mutant("experts of the first tile", "lists[long(tile) * experts + ", "lists[", Kind.WRONG),
            Mutant("list read further", "min(entry + j, end - 1)", "(entry + j + 1)", Kind.OUT_OF_BOUNDS),
            Mutant("count in experts", "counts[tile] * BLOCK", "counts[tile]", Kind.WRONG),
            Mutant("scale of the first group", "rows[j] / GROUP != group", "group < 0", Kind.WRONG),
            Mutant("residual of the first token", "residual[place]", "residual[output]", Kind.WRONG),
            Mutant("outputs beyond the last stored", "if (output < outputs) {", "if (output >= 0) {", Kind.OUT_OF_BOUNDS),
            Mutant("threads store alike", "i = thread_index; i < 256", "i = lane; i < 256", Kind.RACE),
        ),
    ),
)  # fmt: skip
