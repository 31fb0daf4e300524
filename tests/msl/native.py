"""The structs of `runtime/base.h`, and findings as they come from there."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Sequence

from tests.msl.compile import Library
from tests.msl.findings import Finding, Kind

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
WRITABLE, INITIALISED = 1, 2
UNKNOWN_REGION, FIRST_THREADGROUP_REGION = 9999, 1000
MAX_FINDINGS = 64

KINDS = {
    1: Kind.OUT_OF_BOUNDS,
    2: Kind.RACE,  # of two writes
    3: Kind.RACE,  # of a read and a write
    4: Kind.UNINITIALISED,
    5: Kind.WRITE_TO_INPUT,
    6: Kind.DIVERGENT_BARRIER,
    7: Kind.DIVERGENT_SIMD,
    8: Kind.FINISHED_LANES,
    9: Kind.INACTIVE_LANE,
    10: Kind.UNDEFINED,
    11: Kind.UNWRITTEN,
    12: Kind.ENDLESS,
}
OUTSIDE_OF_ARRAY = 1
UNDEFINED = {
    OUTSIDE_OF_ARRAY: "index outside of an array",
    2: "integer division by zero, or its overflow",
    3: "overflow of a signed integer",
    4: "an address that is not aligned for its type",
}


class Who(c.Structure):
    _fields_ = (("group", c.c_uint32), ("thread", c.c_uint32))

    def __str__(self) -> str:
        return f"thread {self.thread} (simdgroup {self.thread // 32} lane {self.thread % 32}) of group {self.group}"


class NativeFinding(c.Structure):
    _fields_ = (
        ("kind", c.c_uint32),
        ("region", c.c_uint32),
        ("offset", c.c_int64),
        ("size", c.c_uint32),
        ("write", c.c_uint32),
        ("a", Who),
        ("b", Who),
        ("site_a", c.c_uint32),
        ("site_b", c.c_uint32),
        ("count", c.c_uint64),
    )


class Buffer(c.Structure):
    _fields_ = (("base", c.c_void_p), ("size", c.c_uint64), ("element", c.c_uint32), ("flags", c.c_uint32))


class Launch(c.Structure):
    _fields_ = (
        ("grid", c.c_uint32 * 3),
        ("group", c.c_uint32 * 3),
        ("seed", c.c_uint64),
        ("order", c.c_uint32),
        ("preempt", c.c_uint32),
        ("n_buffers", c.c_uint32),
        ("n_findings", c.c_uint32),
        ("max_findings", c.c_uint32),
        ("failed", c.c_uint32),
        ("buffers", c.POINTER(Buffer)),
        ("findings", c.POINTER(NativeFinding)),
        ("accesses", c.c_uint64),
        ("simd_operations", c.c_uint64),
        ("barriers", c.c_uint64),
        ("groups", c.c_uint64),
        ("max_steps", c.c_uint64),
    )


def explained(found: NativeFinding, library: Library, buffers: Sequence[tuple[str, int, str]]) -> Finding:
    """A finding in words. `buffers`: name, bytes of an element, and shape of each."""
    kind = KINDS[found.kind]
    what = _MESSAGES.get(kind, _accessed)(found, library, buffers)
    if kind is Kind.UNDEFINED and found.region == OUTSIDE_OF_ARRAY:
        kind = Kind.OUT_OF_BOUNDS
    at, other = library.locations[found.site_a], library.locations[found.site_b]
    match kind:
        case Kind.UNWRITTEN:
            text = f"{found.count} elements of {what}"
        case Kind.DIVERGENT_BARRIER | Kind.DIVERGENT_SIMD | Kind.FINISHED_LANES:
            text = f"at {at}: {what}, one is {found.a}, while {found.b} is at {other}"
        case Kind.RACE:
            text = f"{what} at {at} by {found.a}, and at {other} by {found.b}, with no barrier between"
        case _:
            text = f"{what} at {at} by {found.a}"
    times = f" [{found.count} times]" if found.count > 1 and kind is not Kind.UNWRITTEN else ""
    return Finding(kind, text + times)


def _waiting(found: NativeFinding, library: Library, buffers: Sequence[tuple[str, int, str]]) -> str:
    return f"{found.offset} of {found.size} threads are there"


def _lane(found: NativeFinding, library: Library, buffers: Sequence[tuple[str, int, str]]) -> str:
    return f"lane {found.offset}"


def _steps(found: NativeFinding, library: Library, buffers: Sequence[tuple[str, int, str]]) -> str:
    return f"{found.offset} steps and no end"


def _undefined(found: NativeFinding, library: Library, buffers: Sequence[tuple[str, int, str]]) -> str:
    return UNDEFINED[found.region]


def _accessed(found: NativeFinding, library: Library, buffers: Sequence[tuple[str, int, str]]) -> str:
    """The element that was accessed."""
    if found.region == UNKNOWN_REGION:
        place = f"memory of no array ({found.offset:#x})"
    elif found.region >= FIRST_THREADGROUP_REGION:
        name, size = library.variables[found.region - FIRST_THREADGROUP_REGION]
        place = f"byte {found.offset} of threadgroup {name} ({size} bytes)"
    else:
        name, element, shape = buffers[found.region]
        place = f"{name}[{found.offset // element}] (shape {shape})"
    if KINDS[found.kind] is Kind.UNWRITTEN:
        return f"{place} and on" if found.count > 1 else place
    return f"{'write' if found.write else 'read'} of {found.size} bytes at {place}"


_MESSAGES: dict[Kind, Callable[[NativeFinding, Library, Sequence[tuple[str, int, str]]], str]] = {
    Kind.DIVERGENT_BARRIER: _waiting,
    Kind.DIVERGENT_SIMD: _waiting,
    Kind.FINISHED_LANES: _waiting,
    Kind.INACTIVE_LANE: _lane,
    Kind.UNDEFINED: _undefined,
    Kind.ENDLESS: _steps,
}
