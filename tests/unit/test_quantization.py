from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ondevice.checkpoint.quantization import BITS, GROUP_SIZES, Quantized, dequantize, pack, quantize, unpack
from ondevice.errors import OptionError


@pytest.mark.parametrize("bits", BITS)
def test_unpack_is_the_inverse_of_pack(bits):
    q = np.random.RandomState(0).randint(0, 2**bits, (5, 64)).astype(np.uint8)
    packed = pack(q, bits)
    assert packed.dtype == np.uint32 and packed.shape == (5, 64 * bits // 32)
    assert np.array_equal(unpack(packed, bits), q)


def test_first_value_is_in_the_lowest_bits():
    assert pack(np.arange(8, dtype=np.uint8)[None], 4)[0, 0] == 0x76543210
    assert pack(np.arange(4, dtype=np.uint8)[None], 8)[0, 0] == 0x03020100


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_error_is_at_most_half_a_step(bits, group_size, dtype):
    w = np.random.RandomState(1).standard_normal((7, 256)).astype(np.float32)
    quantized = quantize(w, bits, group_size, dtype)
    assert quantized.shape == w.shape and quantized.scales.shape == (7, 256 // group_size)
    step = quantized.scales.astype(np.float32).repeat(group_size, axis=1)
    slack = 0.51 + (2**bits) * float(ml_dtypes.finfo(dtype).eps)  # the rounding of scale and bias
    assert (np.abs(dequantize(quantized) - w) <= slack * step).all()


def test_constant_and_zero_groups_are_exact():
    w = np.zeros((2, 64), np.float32)
    w[1] = -3.5
    assert np.array_equal(dequantize(quantize(w, 4, 32)), w)


def test_rows_select_and_reorder():
    quantized = quantize(np.random.RandomState(2).standard_normal((6, 64)).astype(np.float32))
    index = np.array([5, 0, 3])
    assert np.array_equal(dequantize(quantized.rows(index)), dequantize(quantized)[index])
    assert quantized.rows(slice(1, 3)).shape == (2, 64)
    assert quantized.nbytes == 6 * 32 + 2 * 6 * 2


@pytest.mark.parametrize(("bits", "group"), [(3, 64), (4, 16), (4, 48)])
def test_unsupported_settings_are_refused(bits, group):
    with pytest.raises(OptionError, match="choose"):
        quantize(np.zeros((2, 192), np.float32), bits, group)


def test_group_must_divide_the_width():
    with pytest.raises(OptionError, match="96"):
        quantize(np.zeros((2, 96), np.float32), 4, 64)


def test_dequantize_passes_float_arrays_on():
    assert dequantize(np.ones(3, ml_dtypes.bfloat16)).dtype == np.float32
    assert isinstance(quantize(np.ones((1, 64), np.float32)), Quantized)
