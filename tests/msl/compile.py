"""A kernel's text made into a library that runs, with every access to memory announced to the runtime.

clang has no front end for MSL, but one that is near: "C++ for OpenCL", where `device`, `constant`, `threadgroup` and
`thread` are real address spaces. The kernel's body and header are compiled as they are; only the template's arguments
become constants, as OpenCL's kernels are no templates. Three passes:

1. MLX's whole text, template and all, as C++14: is it a valid template?
2. As C++ for OpenCL: address spaces are checked, also that no pointer lacks one; then to LLVM's IR, where threadgroup
   variables get a red zone.
3. With ThreadSanitizer's instrumentation, but not its runtime, to assembly, where every call of the runtime is preceded
   by a store of its number; the number names the lines that it came from, through all inlined functions.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.msl import toolchain
from tests.msl.findings import EmulatorError, Finding, KernelError, Kind
from tests.msl.signature import Signature

RED_ZONE = 4096
"""Bytes behind every threadgroup variable; `runtime/memory.h` has the same."""

POSITION = """
struct MslPosition {
  uint in_grid[3], in_group[3], of_group[3], grid_size[3], groups[3], group_size[3], full_group_size[3];
  uint index, lane, simdgroup, simdgroups, full_simdgroups;
};
static inline uint3 msl_three(const thread uint *p) { uint3 r; r.x = p[0]; r.y = p[1]; r.z = p[2]; return r; }
"""
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "p->full_simdgroups * 8u",
    "dispatch_simdgroups_per_threadgroup": "p->full_simdgroups",
    "dispatch_threads_per_threadgroup": "msl_three(p->full_group_size)",
    "grid_origin": "(uint3)(0u)",
    "grid_size": "msl_three(p->grid_size)",
    "quadgroup_index_in_threadgroup": "p->index / 4u",
    "quadgroups_per_threadgroup": "(p->group_size[0] * p->group_size[1] * p->group_size[2] + 3u) / 4u",
    "simdgroup_index_in_threadgroup": "p->simdgroup",
    "simdgroups_per_threadgroup": "p->simdgroups",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "p->index & 3u",
    "thread_index_in_simdgroup": "p->lane",
    "thread_index_in_threadgroup": "p->index",
    "thread_position_in_grid": "msl_three(p->in_grid)",
    "thread_position_in_threadgroup": "msl_three(p->in_group)",
    "threadgroup_position_in_grid": "msl_three(p->of_group)",
    "threadgroups_per_grid": "msl_three(p->groups)",
    "threads_per_grid": "msl_three(p->grid_size)",
    "threads_per_simdgroup": "32u",
    "threads_per_threadgroup": "msl_three(p->group_size)",
}
COMMON = ("-Xclang", "-cl-single-precision-constant", "-I", str(toolchain.INCLUDE))  # 1.0 is a float
CODE = f"-O1 -g -fPIC {toolchain.MACHINE} -ffp-contract=on -ftrivial-auto-var-init=pattern".split()
TEMPLATE = ("-x", "c++", "-std=c++14", *COMMON)
OPENCL = (
    *("-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", *COMMON, *CODE),
    "-fsanitize=thread,bounds,integer-divide-by-zero,signed-integer-overflow",
)
STRICT = ("-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-Werror=conditional-uninitialized")
FLAGS_OF_UNNAMED = ("used", "referenced", "implicit", "invalid")
"""Where clang prints a declaration's name, if it has one."""


@dataclass(frozen=True)
class Library:
    """A compiled kernel."""

    code: ctypes.CDLL
    locations: tuple[str, ...]  # by number; 0 is the kernel's end
    variables: tuple[tuple[str, int], ...]  # threadgroup variables and their bytes


@functools.cache
def compiled(kernel: str, source: str, header: str, signature: Signature) -> Library:
    """The kernel's library, from this process, from the folder of compiled kernels, or made now.

    Raises:
        KernelError: the kernel's text does not compile as MSL.
        EmulatorError: something else went wrong.
    """
    parts = (toolchain.fingerprint(), kernel, source, header, repr(signature))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = toolchain.cache() / f"{kernel}-{key}.so"
    with toolchain.made_once(path) as folder:
        if folder:
            _check_template(folder, kernel, source, header, signature)
            text = folder / "kernel.clcpp"
            text.write_text(_opencl(kernel, source, header, signature))
            _check_address_spaces(kernel, text)
            assembly = _assembly(kernel, text)
            _clang(kernel, "-c", assembly, "-o", folder / "kernel.o")
            objects = folder / "kernel.o", toolchain.runtime_object()
            toolchain.run_or_fail("ld.lld", "-shared", "-Bsymbolic", "--strip-all", *objects, "-o", folder / path.name)
    return _load(path)


def _load(path: Path) -> Library:
    toolchain.mathematics()
    code = ctypes.CDLL(str(path))
    count = ctypes.c_uint32.in_dll(code, "msl_location_count").value
    locations = (ctypes.c_char_p * count).in_dll(code, "msl_locations")
    code.msl_variable.restype = ctypes.c_char_p
    variables = []
    for i in range(code.msl_n_variables()):
        size = ctypes.c_uint64()
        variables.append((code.msl_variable(i, ctypes.byref(size)).decode(), size.value))
    return Library(code, tuple((text or b"").decode() for text in locations), tuple(variables))


def _clang(kernel: str, *arguments: str | Path) -> str:
    """Runs clang; an error in a `.metal` file is the kernel's, any other is ours."""
    result = toolchain.run("clang", "-fno-color-diagnostics", *arguments)
    if result.returncode == 0:
        return result.stdout
    missing = re.search(r"fatal error: '(.*)' file not found", result.stderr)
    if missing:
        raise EmulatorError(f"kernel {kernel}: there is no {missing[1]} in {toolchain.INCLUDE}")
    own = [line for line in result.stderr.splitlines() if re.match(r"\S*\.metal:\d+:\d+: error:", line)]
    if not own and not re.search(r"^\S*\.metal:\d+:\d+: note: in instantiation", result.stderr, re.M):
        raise EmulatorError(f"kernel {kernel}:\n{result.stderr[-6000:]}")
    lines = own or [line for line in result.stderr.splitlines() if "error:" in line or ".metal:" in line]
    raise KernelError(kernel, [Finding(Kind.COMPILE, line) for line in lines])


def _check_template(folder: Path, kernel: str, source: str, header: str, signature: Signature) -> None:
    body = signature.text.removeprefix(header)
    body = body.replace(f"{{\n{source}\n}}\n", f'{{\n#line 1 "{kernel}.metal"\n{source}\n}}\n')
    body = re.sub(r"^template \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype", "template decltype", body, flags=re.M)
    text = folder / "template.cpp"
    text.write_text(f'#line 1 "{kernel}.header.metal"\n{header}\n#line 1 "{kernel}.whole.metal"\n{body}')
    _clang(kernel, *toolchain.prelude(*TEMPLATE), *STRICT, "-fsyntax-only", text)


def _opencl(kernel: str, source: str, header: str, signature: Signature) -> str:
    parameters = [f"  {p.type} {p.name}" for p in signature.parameters]
    parameters += [f"  {type_} {name}" for type_, name in signature.attributes]
    arguments = [
        f"*({p.type[:-1]}*)buffers[{i}]" if p.type.endswith("&") else f"({p.type})buffers[{i}]"
        for i, p in enumerate(signature.parameters)
    ]
    arguments += [ATTRIBUTES[name] for _, name in signature.attributes]
    return (
        f'#line 1 "{kernel}.header.metal"\n{header}\n#line 1 "signature"\n'
        f"{signature.constants}__kernel void {signature.name}(\n" + ",\n".join(parameters) + ") {\n"
        f'#line 1 "{kernel}.metal"\n{source}\n}}\n#line 1 "entry"\n{POSITION}'
        'extern "C" void msl_entry(thread ulong *buffers, const thread MslPosition *p) {\n'
        f"  {signature.name}({', '.join(arguments)});\n}}\n"
    )


def _check_address_spaces(kernel: str, text: Path) -> None:
    """Finds what MSL refuses and C++ for OpenCL does not.

    Pointers and references without an address space, which are "generic" here, and variables of the program outside of
    the constant address space, which are "global" here.
    """
    tree = _clang(kernel, *toolchain.prelude(*OPENCL), "-fsyntax-only", "-Xclang", "-ast-dump", text)
    found, file, line = [], "", 0
    for node in tree.splitlines():
        for place in re.finditer(r"[<, ](?:line:(\d+):\d+|(?!col:)([^\s<>,:]+):(\d+):\d+)", node.split("'")[0]):
            file, line = (file, int(place[1])) if place[1] else (place[2], int(place[3]))
        declared = re.search(r"VarDecl .*? (\w+) '([^']*)'", node)
        if not declared or not file.endswith(".metal") or declared[1] in FLAGS_OF_UNNAMED:
            continue
        what = f"{file}:{line}: error: '{declared[1]}' ({declared[2]})"
        if "__generic" in declared[2]:
            found.append(f"{what}: a pointer or reference without an address space")
        elif "__global" in declared[2] and not re.search("[*&]", declared[2]):
            found.append(f"{what}: a variable of the program that is not `constant`")
    if found:
        raise KernelError(kernel, [Finding(Kind.COMPILE, each) for each in dict.fromkeys(found)])


def _assembly(kernel: str, text: Path) -> Path:
    ir, assembly = text.with_suffix(".ll"), text.with_suffix(".s")
    emit = ["-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm"]
    _clang(kernel, *toolchain.prelude(*OPENCL), *STRICT, *emit, text, "-o", ir)
    ir.write_text(_inline_all(_with_red_zones(ir.read_text())))
    passes = ["-tsan-instrument-func-entry-exit=0", "-tsan-instrument-read-before-write=1", "-enable-tail-merge=0"]
    flags = [flag for each in passes for flag in ("-mllvm", each)]
    flags += ["-fsanitize=thread", "-fno-optimize-sibling-calls", "-fverbose-asm", "-Wno-override-module"]
    _clang(kernel, *CODE, *flags, "-S", ir, "-o", assembly)
    assembly.write_bytes(_with_sites(kernel, assembly.read_bytes()))
    return assembly


def _inline_all(ir: str) -> str:
    """So that a place is told with all the calls that led to it."""
    return re.sub(
        r"^(attributes #\d+ = \{)(?!.*\b(?:noinline|optnone)\b)(.*\bsanitize_thread\b)",
        r"\1 alwaysinline\2",
        ir,
        flags=re.M,
    )


def _with_red_zones(ir: str) -> str:
    """Puts room behind every threadgroup variable, and adds a table of them for the runtime."""
    table: list[tuple[str, str, str]] = []

    def padded(match: re.Match[str]) -> str:
        symbol, type_, align, rest = match.groups()
        name = re.findall(r"([A-Za-z_]\w*?)(?:_\d+)?$", symbol.rsplit("E", 1)[-1].lstrip("0123456789"))
        table.append((symbol, type_, name[-1] if name else symbol))
        room = f"{{ {type_}, [{RED_ZONE} x i8] }}"
        return f"{symbol} = internal global {room} undef, align {max(64, int(align))}{rest}"

    ir = re.sub(r"^(@\S+) = internal global (.+) undef, align (\d+)(.*)$", padded, ir, flags=re.M)
    row = "{ ptr, i64, i32, i32, ptr }"
    rows = []
    for i, (symbol, type_, name) in enumerate(table):
        ir += f'@msl_name_{i} = private constant [{len(name) + 1} x i8] c"{name}\\00"\n'
        size = f"i64 ptrtoint (ptr getelementptr ({type_}, ptr null, i32 1) to i64)"
        rows.append(f"{row} {{ ptr {symbol}, {size}, i32 {_element(type_)}, i32 0, ptr @msl_name_{i} }}")
    values = f"[{', '.join(rows)}]" if rows else "zeroinitializer"
    return (
        f"{ir}@msl_variable_count = hidden constant i32 {len(rows)}\n"
        f"@msl_variables = hidden constant [{len(rows)} x {row}] {values}\n"
    )


def _element(ir_type: str) -> int:
    """Bytes of the smallest part of a threadgroup variable: races are looked for by such parts."""
    if re.search(r"\bi[18]\b", ir_type):
        return 1
    return 2 if re.search(r"\b(half|bfloat|i16)\b", ir_type) else 4


def _with_sites(kernel: str, assembly: bytes) -> bytes:
    """Numbers the calls of the runtime by the lines that they came from, as clang's comments tell."""
    numbers: dict[str, int] = {"the end of the kernel": 0}
    place, calls = "?", 0

    def numbered(line: re.Match[bytes]) -> bytes:
        nonlocal place, calls
        if line[1] is not None:  # a .loc, with a comment on it
            frames = re.findall(rb"([^\s@\[\]]+\.metal:\d+:\d+)", line[1])
            place = " < ".join(frame.decode().rsplit("/", 1)[-1] for frame in frames) or "?"
            return line[0]
        calls += 1
        return b"\tmovl\t$%d, msl_site(%%rip)\n" % numbers.setdefault(place, len(numbers)) + line[0]

    pattern = rb"^\t\.loc\t[^#\n]*(.*)$|^\tcallq\t\*?(?:__tsan_(?!init)|msl_rt_|__ubsan_).*$"
    text = re.sub(pattern, numbered, assembly, flags=re.M)
    if not calls:
        raise EmulatorError(f"kernel {kernel}: no access to memory was instrumented")
    return text + _table(list(numbers))


def _table(locations: Sequence[str]) -> bytes:
    strings = "".join(f'.Lmsl_location_{i}: .asciz "{text}"\n' for i, text in enumerate(locations))
    pointers = "".join(f"  .quad .Lmsl_location_{i}\n" for i in range(len(locations)))
    return (
        f"\n.hidden msl_site\n.section .rodata\n{strings}"
        f".globl msl_location_count\n.p2align 2\nmsl_location_count: .long {len(locations)}\n"
        f'.section .data.rel.ro,"aw"\n.globl msl_locations\n.p2align 3\nmsl_locations:\n{pointers}'
    ).encode()
