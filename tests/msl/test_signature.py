"""The generated text is MLX's own, as MLX prints it while it records a call that it cannot run here."""

from __future__ import annotations

import itertools
import sys
import tempfile
from typing import Any

import mlx.core as mx
import pytest

from tests.msl.emulator import emulated
from tests.msl.signature import ATTRIBUTES, Array, dtype_name, signature

pytestmark = pytest.mark.skipif(mx.metal.is_available(), reason="MLX runs the call instead")


def printed(kernel: Any, capfd: Any, inputs: list[mx.array], **call: Any) -> str:
    """What MLX prints of the text that it generates."""
    capfd.readouterr()
    with tempfile.NamedTemporaryFile(suffix=".mlxfn") as file:
        mx.export_function(file.name, lambda *given: kernel(inputs=list(given), verbose=True, **call), *inputs)
    sys.stdout.flush()
    text = capfd.readouterr().out
    return text.partition("```\n")[2].rpartition("\n```")[0]


def both(
    capfd: Any, inputs: dict[str, mx.array], outputs: dict[str, Any], source: str, **given: Any
) -> tuple[str, str]:
    """MLX's text and the emulator's."""
    header, template = given.pop("header", ""), given.pop("template", [])
    atomic = given.pop("atomic_outputs", False)
    kernel = mx.fast.metal_kernel("k", list(inputs), list(outputs), source, header, atomic_outputs=atomic)
    sizes = {"grid": (32, 1, 1), "threadgroup": (32, 1, 1), "output_shapes": [(9,)] * len(outputs)}
    arrays = list(inputs.values())
    theirs = printed(kernel, capfd, arrays, template=template, output_dtypes=list(outputs.values()), **sizes)
    ours = signature(
        "k",
        source,
        header,
        list(inputs),
        [Array(dtype_name(a.dtype), a.ndim, a.size) for a in arrays],
        list(outputs),
        [dtype_name(d) for d in outputs.values()],
        template,
        atomic,
    )
    return theirs.strip(), ours.text.strip()


SHAPES = [(), (1,), (7,), (8,), (2, 3), (3, 5), (1, 2, 4), (0,)]
WORDS = (
    "uint i = thread_position_in_grid.x; simdgroup_index_in_threadgroup;"
    "o[i] = a[i] + b_shape[0] + b_strides[0] + b_ndim;"
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, capfd):
    theirs, ours = both(capfd, {"a": mx.zeros((9,)), "b": mx.zeros(shape)}, {"o": mx.float32}, WORDS)
    assert theirs and theirs == ours


def test_dtypes_templates_and_outputs(capfd):
    kinds = itertools.product(
        [mx.float32, mx.bfloat16, mx.int64, mx.bool_, mx.uint8, mx.float16, mx.int8],
        [mx.float32, mx.uint32],
        [False, True],
        [True, False],
    )
    for dtype, output, atomic, flag in kinds:
        template = [("T", dtype), ("F", flag), ("N", -3), ("M", 12)]
        inputs = {"a": mx.zeros((9,), dtype), "b": mx.zeros((4,), mx.uint16)}
        outputs = {"o": output, "p": mx.float16}
        theirs, ours = both(capfd, inputs, outputs, WORDS, template=template, atomic_outputs=atomic)
        assert theirs and theirs == ours


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes(attribute, capfd):
    """One contains another's name, so that both are passed; a comment counts."""
    theirs, ours = both(capfd, {"a": mx.zeros((9,))}, {"o": mx.float32}, f"o[0] = a[0]; // {attribute}")
    assert theirs == ours
    assert attribute in ours.partition("{")[0]


def test_no_attributes_no_template_and_a_header(capfd):
    header = "inline float f(float x) { return x; } // a_shape does not count here\n"
    theirs, ours = both(capfd, {"a": mx.zeros((9,))}, {"o": mx.float32}, "o[0] = f(a[0]);", header=header)
    assert theirs == ours
    assert "a_shape [[" not in ours


def test_text_that_ran(capfd):
    """It is in `runs`, and `verbose` prints it as MLX does."""
    with emulated() as metal:
        mx.fast.metal_kernel("k", ["a"], ["o"], "o[thread_position_in_grid.x] = T(a[0]);")(
            inputs=[mx.zeros((9,))],
            template=[("T", mx.float16)],
            grid=(9, 1, 1),
            threadgroup=(9, 1, 1),
            output_shapes=[(9,)],
            output_dtypes=[mx.float16],
            verbose=True,
        )
    ours = capfd.readouterr().out.partition("```\n")[2].rpartition("\n```")[0]
    assert ours.strip() == metal.runs[-1].text.strip()
