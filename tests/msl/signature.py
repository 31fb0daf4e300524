"""The text that MLX makes of a kernel's body: name, template, parameters, attributes.

It follows `mx.fast.metal_kernel` (MLX, mlx/backend/common/metal_kernel.cpp); a test compares it with what MLX prints.
The words `NAME_shape`, `NAME_strides`, `NAME_ndim` and attributes are found anywhere in the body, even in a comment,
but not in the header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "float32": "float",
    "bfloat16": "bfloat16_t",
}
"""MLX's names of dtypes, and Metal's."""

ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
"""What a kernel can ask for by naming it, in the order in which MLX passes them."""

SMALLEST_DEVICE_ARRAY = 8
"""Inputs with fewer elements are in the constant address space."""

Template = Sequence[tuple[str, Any]]


@dataclass(frozen=True)
class Array:
    """What of an input decides how it is passed."""

    dtype: str
    ndim: int
    size: int


@dataclass(frozen=True)
class Parameter:
    """One buffer: the type and name in the signature, and what is bound to it."""

    type: str
    name: str
    binds: str  # "input", "shape", "strides", "ndim" or "output"
    index: int  # of the input or output


@dataclass(frozen=True)
class Signature:
    """A kernel as MLX passes it to Metal."""

    name: str
    text: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[tuple[str, str], ...]  # type, name
    constants: str  # the template's arguments, as declarations


def dtype_name(dtype: Any) -> str:
    """MLX's name of one of its dtypes, without the module.

    Raises:
        TypeError: kernels cannot take it.
    """
    name = str(dtype).rsplit(".", 1)[-1]
    if name not in TYPES:
        raise TypeError(f"dtype {dtype}: kernels take {', '.join(TYPES)}")
    return name


def signature(
    name: str,
    source: str,
    header: str,
    input_names: Sequence[str],
    inputs: Sequence[Array],
    output_names: Sequence[str],
    output_dtypes: Sequence[str],
    template: Template,
    atomic_outputs: bool,
) -> Signature:
    """Writes the function around a kernel's body."""
    values = [_template_value(value) for _, value in template]
    arguments = f"<{', '.join(values)}>" if template else ""
    full_name = f"custom_kernel_{name}"
    if template:
        full_name += "__" + re.sub("[^A-Za-z0-9_]", "_", "_".join(values))
    for array in inputs:
        small = "s" if array.ndim == 0 else "c" if array.size < SMALLEST_DEVICE_ARRAY else ""
        full_name += f"_{TYPES[array.dtype]}{small}"
    for dtype in output_dtypes:
        full_name += f"_{TYPES[dtype]}"

    parameters = [
        parameter
        for index, (input_name, array) in enumerate(zip(input_names, inputs))
        for parameter in _input_parameters(input_name, array, index, source)
    ]
    for index, (output_name, dtype) in enumerate(zip(output_names, output_dtypes)):
        element = f"atomic<{TYPES[dtype]}>" if atomic_outputs else TYPES[dtype]
        parameters.append(Parameter(f"device {element}*", output_name, "output", index))
    attributes = tuple((type_, word) for word, type_ in ATTRIBUTES.items() if word in source)

    declared = [f"  {p.type} {p.name} [[buffer({i})]]" for i, p in enumerate(parameters)]
    declared += [f"  {type_} {word} [[{word}]]" for type_, word in attributes]
    text = header
    if template:
        text += f"template <{', '.join(f'{_template_type(value)} {word}' for word, value in template)}>\n"
    text += f"[[kernel]] void {full_name}(\n" + ",\n".join(declared) + f") {{\n{source}\n}}\n"
    if template:
        instance = full_name + arguments
        text += f'\ntemplate [[host_name("{full_name}")]] [[kernel]] decltype({instance}) {instance};\n'
    constants = "".join(
        f"constexpr constant {_template_type(value)} {word} = {text_};\n"
        if isinstance(value, int)
        else f"using {word} = {text_};\n"
        for (word, value), text_ in zip(template, values)
    )
    return Signature(full_name, text, tuple(parameters), attributes, constants)


def _template_type(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def _template_value(value: Any) -> str:
    return str(int(value)) if isinstance(value, int) else TYPES[dtype_name(value)]


def _input_parameters(name: str, array: Array, index: int, source: str) -> list[Parameter]:
    space = "constant" if array.size < SMALLEST_DEVICE_ARRAY else "device"
    by = "&" if array.ndim == 0 else "*"
    parameters = [Parameter(f"const {space} {TYPES[array.dtype]}{by}", name, "input", index)]
    if array.ndim:
        for binds, type_ in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            if f"{name}_{binds}" in source:
                parameters.append(Parameter(f"const constant {type_}", f"{name}_{binds}", binds, index))
    return parameters
