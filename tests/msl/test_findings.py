"""Each kind of finding, made by a tiny kernel, with the place where it happened; and its neighbours that are right."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import pytest

from tests.msl.emulator import SCHEDULES, emulated
from tests.msl.findings import EmulatorError, KernelError, Kind

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"
ATOMIC = {"made": {"atomic_outputs": True}, "init_value": 0.0}


def written(body: str) -> str:
    """A body of these tests in full: line 1 declares `i`, and `s` where it is used; BARRIER is one."""
    share = "threadgroup float s[64];" if re.search(r"\bs\b", body) and "float s[" not in body else ""
    body = body.replace("DEVICE_BARRIER", DEVICE_BARRIER).replace("BARRIER", BARRIER)
    return f"uint i = thread_position_in_grid.x; {share}\n{body}"


def run(
    body: str, header: str = "", threads: int = 64, group: int = 64, schedule=("forward", 0), **more: Any
) -> mx.array:
    """Runs a body with inputs `x`, 64 floats, and `few`, 3 floats, and an output `out`, 64 floats."""
    with emulated() as metal:
        metal.schedule(*schedule)
        kernel = mx.fast.metal_kernel("k", ["x", "few"], ["out"], written(body), header, **more.pop("made", {}))
        given: dict[str, Any] = {
            "inputs": [mx.arange(64, dtype=mx.float32), mx.array([1.0, 2.0, 3.0])],
            "grid": (threads, 1, 1),
            "threadgroup": (group, 1, 1),
            "output_shapes": [(64,)],
            "output_dtypes": [mx.float32],
        }
        (out,) = kernel(**{**given, **more})
        return out


CASES: dict[Kind, dict[str, tuple[Any, ...]]] = {
    Kind.OUT_OF_BOUNDS: {
        "behind a device array": ("out[i] = x[i + 1];", "x[64] (shape (64,)) at k.metal:2"),
        "before a device array": ("out[i] = x[int(i) - 1];", "x[-1]"),
        "far away": ("out[i] = x[i * 100000000];", "x[100000000]"),
        "behind a constant array": ("out[i] = few[i];", "few[3] (shape (3,))"),
        "a write": ("out[i + 1] = 0;", "write of 4 bytes at out[64]"),
        "a vector over the end": ("out[i] = (*(const device float4*)(x + i / 4 * 4 + 4)).x;", "16 bytes at x[64]"),
        "behind a threadgroup array": ("threadgroup float* p = s; p[i + 1] = 0;", "byte 256 of threadgroup s (256"),
        "before a threadgroup array": ("threadgroup float* p = s; p[int(i) - 1] = 0;", "byte -4 of threadgroup s"),
        "an array of a thread": (
            "float p[4]; for (int j = 0; j <= int(few[2]); ++j) p[j + i / 63] = j;\nout[i] = p[0];",
            "index outside of an array at k.metal:2",
        ),
        "in a function of the header": (
            "out[i] = second(x, i);",
            "at k.header.metal:1:54 < k.metal:2:10",
            {"header": "float second(const device float* p, uint i) { return p[i + 2]; }\n"},
        ),
    },
    Kind.UNDEFINED: {
        "an address not aligned": ("out[i] = (*(const device float4*)(x + 1)).x;", "not aligned"),
        "division by zero": ("out[i] = 7 / int(x[0]);", "division by zero"),
        "signed overflow": ("int n = 2147483647; out[i] = n + int(x[i]);", "overflow"),
    },
    Kind.RACE: {
        "two threads write": ("out[i / 2] = i; out[i / 2 + 32] = 1;", "out[0]"),
        "two simdgroups write": ("out[i % 32] = 1; out[i % 32 + 32] = 1;", "simdgroup 1 lane 0"),
        "two groups write": ("out[i % 32] = 1; out[i % 32 + 32] = 1;", "of group 1", {"group": 32}),
        "a barrier between two groups": ("out[i] = i;\nDEVICE_BARRIER\nout[63 - i] = 1;", "of group 1", {"group": 32}),
        "no barrier": ("s[i] = 0;\nBARRIER\ns[i] = i;\nout[i] = s[63 - i];", "with no barrier between"),
        "a barrier of the simdgroup": (
            "s[i] = 0;\nBARRIER\ns[i] = i;\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[63 - i];",
            "at k.metal:6",
        ),
        "a barrier of device memory": ("s[i] = i;\nDEVICE_BARRIER\nout[i] = s[63 - i];", "at k.metal:4"),
        "a barrier of no memory": (
            "s[i] = i;\nthreadgroup_barrier(mem_flags::mem_none);\nout[i] = s[63 - i];",
            "at k.metal:4",
        ),
        "device memory without its barrier": (
            "out[i] = i;\nBARRIER\nfloat v = out[63 - i];\nDEVICE_BARRIER\nout[i] = v;",
            "out[",
        ),
        "scratch used again too early": (
            "s[i] = i;\nBARRIER\nfloat v = s[63 - i];\ns[i] = v;\nBARRIER\nout[i] = s[i];",
            "write of 4 bytes",
        ),
        "a function of lanes is no barrier": ("s[i] = i;\nfloat v = simd_sum(1.0f);\nout[i] = s[i ^ 1] + v;", "s ("),
        "not atomic": ("out[i] = 0; out[0] = out[0] + 1;", "out[0]", {"init_value": 0.0}),
        "atomic beside plain": (
            "atomic_fetch_add_explicit(&out[0], 1.0f, memory_order_relaxed);\n"
            "atomic_store_explicit(&out[1], *(device float*)out, memory_order_relaxed);",
            "at k.metal:3",
            ATOMIC,
        ),
    },
    Kind.UNINITIALISED: {
        "threadgroup memory": ("out[i] = s[i];", "threadgroup s"),
        "of the threadgroup before": ("if (i < 32) s[i] = 1;\nout[i] = s[i % 32];", "of group 1", {"group": 32}),
        "an output": ("out[i] = out[i] + 1;", "out[0]"),
    },
    Kind.UNWRITTEN: {"one element": ("if (i != 5) out[i] = 1;", "1 elements of out[5]")},
    Kind.WRITE_TO_INPUT: {"by a cast": ("((device float*)x)[i] = 1; out[i] = 1;", "x[0]")},
    Kind.DIVERGENT_BARRIER: {
        "some simdgroups": ("if (i < 32) BARRIER\nout[i] = 1;", "32 of 64 threads are there"),
        "some lanes": ("if (i != 40) BARRIER\nout[i] = 1;", "at k.metal:2"),
        "two barriers": ("if (i < 32) {\nBARRIER\n} else {\nBARRIER\n}\nout[i] = 1;", "is at k.metal:5"),
        "uneven loops": ("for (uint j = 0; j < 1 + i / 32; ++j) BARRIER\nout[i] = 1;", "k.metal:2"),
    },
    Kind.DIVERGENT_SIMD: {
        "some lanes": ("float v = 0; if (i % 32 < 31) v = simd_sum(1.0f);\nout[i] = simd_max(v);", "31 of 32 threads"),
        "uneven loops": (
            "float v = 0; for (uint j = 0; j <= i; ++j) v += simd_sum(1.0f);\nout[i] = simd_max(v);",
            "k.metal:2",
        ),
        "others at a barrier": ("float v = 0; if (i % 2) v = simd_sum(1.0f);\nBARRIER\nout[i] = v;", "is at k.metal:3"),
        "two functions": (
            "float v; if (i % 2) v = simd_sum(1.0f); else\nv = simd_max(1.0f);\nout[i] = v;",
            "16 of 32 threads",
        ),
    },
    Kind.FINISHED_LANES: {
        "a return": ("out[i] = 1; if (i > 60) return;\nout[i] = simd_sum(1.0f);", "is at the end of the kernel"),
    },
    Kind.INACTIVE_LANE: {
        "lane 32": ("out[i] = simd_shuffle(float(i), i % 32 + 1);", "lane 32"),
        "a short simdgroup": ("out[i] = simd_shuffle(float(i), 31);", "lane 31", {"threads": 20, "init_value": 0.0}),
    },
    Kind.ENDLESS: {
        "accesses": ("for (uint j = 0; j < 2; j += uint(x[0])) out[i] = j;", "steps and no end at k.metal:2"),
        "sums": ("float v = 1; while (v > 0) v = simd_max(v);\nout[i] = v;", "steps and no end at k.metal:2"),
    },
    Kind.LIMIT: {
        "threads": ("out[i] = 0;", "2048 threads", {"threads": 2048, "group": 2048}),
        "an empty grid": ("out[i] = 0;", "grid (0, 1, 1)", {"threads": 0}),
        "threadgroup memory": ("threadgroup float s[8193]; s[i] = 0; out[i] = 0;", "32772 bytes"),
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def soon_endless(monkeypatch):
    """What these kernels do takes few steps."""
    monkeypatch.setattr("tests.msl.kernel.MAX_STEPS", 100_000)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in CASES.items() for name in cases])
def test_finding(kind, name):
    body, says, *more = CASES[kind][name]
    with pytest.raises(KernelError) as caught:
        run(body, **(more[0] if more else {}))
    assert caught.value.kinds == {kind}, caught.value
    assert any(says in str(finding) for finding in caught.value.findings), caught.value


NOT_METAL = {
    "pointer without address space": ("", "const float* p = x; out[i] = p[i];", "k.metal:2"),
    "private pointer without address space": ("", "float v = x[i];\nfloat* p = &v; out[i] = *p;", "k.metal:3"),
    "reference without address space": (
        "inline void add(float& v) { v += 1; }\n",
        "float v = 1; add(v); out[i] = v;",
        "k.header.metal:1",
    ),
    "pointer of another address space": ("", "device float* p = s; out[i] = p[i];", "k.metal:2"),
    "constant input as a device pointer": ("", "const device float* p = few; out[i] = p[0];", "k.metal:2"),
    "write to a constant pointer": ("", "x[i] = 1; out[i] = 1;", "k.metal:2"),
    "double": ("", "double v = 1; out[i] = v;", "poisoned"),
    "variable of the program": ("int n = 3;\n", "out[i] = n;", "k.header.metal:1: error: 'n'"),
    "constexpr of the program": ("constexpr int n = 3;\n", "out[i] = n;", "k.header.metal:1: error: 'n'"),
    "threadgroup array with a value": ("", "threadgroup float s[2] = {0}; out[i] = s[0];", "k.metal:2"),
    "new": ("", "float* p = new float[3]; out[i] = p[0];", "k.metal:2"),
    "unknown function": ("", "out[i] = no_such_function(x[i]);", "no_such_function"),
    "template without typename": (
        "template <class A> struct P { using V = float; };\n",
        "P<T>::V v = x[i]; out[i] = v;",
        "typename",
    ),
    "variable without a value": ("", "float v; if (i < 9) v = 1;\nout[i] = v;", "uninitialized"),
}


@pytest.mark.parametrize("name", NOT_METAL)
def test_does_not_compile(name):
    header, body, says = NOT_METAL[name]
    with pytest.raises(KernelError, match=says) as caught:
        run(body, header, template=[("T", mx.float32)])
    assert caught.value.kinds == {Kind.COMPILE}


BOTH = "threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"
RIGHT = {
    "barrier of threadgroup memory": "s[i] = i;\nBARRIER\nout[i] = s[63 - i];",
    "barrier of both memories": f"s[i] = i;\n{BOTH}\nout[i] = s[63 - i];",
    "barrier of the simdgroup": "s[i] = i;\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[i ^ 7];",
    "scratch used again": "s[i] = i;\nBARRIER\nfloat v = s[63 - i];\nBARRIER\ns[i] = v;\nBARRIER\nout[i] = s[63 - i];",
    "device memory": "out[i] = i;\nDEVICE_BARRIER\nfloat v = out[63 - i];\nDEVICE_BARRIER\nout[i] = v;",
    "sums in even loops": "float v = 0; for (uint j = 0; j < 3 + i / 32; ++j) v += simd_sum(1.0f);\nout[i] = v;",
    "whole simdgroups return": "out[i] = 0; if (i >= 32) return;\nout[i] = simd_sum(1.0f);",
    "arrays of a thread": "float p[4]; for (int j = 0; j < 4; ++j) p[j] = j;\nout[i] = p[i % 4];",
    "loops around barriers": (
        "s[i] = i; for (uint n = 32; n > 0; n /= 2) {\nBARRIER\nif (i < n) s[i] += s[i + n];\n}\n"
        "BARRIER\nout[i] = s[0];"
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_no_finding_and_one_result(name):
    results = [run(RIGHT[name], schedule=schedule).tolist() for schedule in (*SCHEDULES, ("random", 17))]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_a_missing_barrier_is_found_in_every_order(order):
    for seed in range(4):
        with pytest.raises(KernelError) as caught:
            run("s[i] = i;\nout[i] = s[(i + 33) % 64];", schedule=(order, seed))
        assert Kind.RACE in caught.value.kinds


def test_random_order_changes_what_a_race_gives():
    """The detector is what finds races; but orders do differ, and a seed repeats its own."""

    def said(schedule: tuple[str, int]) -> str:
        with pytest.raises(KernelError) as caught:
            run("out[i] = i; out[i / 32] = i;", schedule=schedule)
        return str(caught.value)

    random = [said(("random", seed)) for seed in range(4)]
    assert len({said(("forward", 0)), said(("reverse", 0)), *random}) > 4
    assert random == [said(("random", seed)) for seed in range(4)]


def test_outputs_that_may_stay_unwritten():
    body = "if (i != 5) out[i] = 1;"
    with emulated() as metal:
        metal.may_leave_unwritten.add("k")
        (out,) = mx.fast.metal_kernel("k", [], ["out"], written(body))(
            inputs=[], grid=(64, 1, 1), threadgroup=(64, 1, 1), output_shapes=[(64,)], output_dtypes=[mx.float32]
        )
        assert mx.isnan(out).tolist() == [i == 5 for i in range(64)]
    assert run(body, init_value=2.0).tolist()[4:7] == [1, 2, 1]


def test_too_many_buffers():
    with emulated():
        kernel = mx.fast.metal_kernel("k", [f"a{i}" for i in range(31)], ["out"], "out[0] = 1;")
        with pytest.raises(KernelError, match="32 buffers, over 31"):
            kernel(
                inputs=[1.0] * 31,
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
                output_shapes=[(1,)],
                output_dtypes=[mx.float32],
            )


def test_a_kernel_without_accesses_is_the_emulators_error():
    with pytest.raises(EmulatorError, match="no access to memory"):
        run("int n = 3; (void)n;", init_value=0.0)
