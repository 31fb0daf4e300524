from __future__ import annotations

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.quantization import Quantized, dequantize, quantize
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.errors import CheckpointError, OptionError
from ondevice_convert.changed import Changed
from ondevice_convert.recipe import make_recipe
from ondevice_convert.requantized import Requantized
from ondevice_convert.rounding import relative_error, rounded, rows_of, with_plain_scales
from tests.tiny import tiny_checkpoint, tiny_gguf, tiny_spec, tiny_tensors


def same(ours, theirs):
    if not isinstance(theirs, Quantized):
        return ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
    return (ours.bits, ours.group_size) == (theirs.bits, theirs.group_size) and all(
        getattr(ours, part).tobytes() == getattr(theirs, part).tobytes() for part in ("packed", "scales", "biases")
    )


def write(folder, checkpoint):
    write_checkpoint(folder, checkpoint.spec, ((name, checkpoint.tensor(name)) for name in checkpoint.spec.tensors()))
    return open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_floats_are_rounded_by_name_or_module(tmp_path, dtype):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "a", dtype=dtype))
    recipe = {"layers.0.q.weight": (4, 64), "layers.0.q": (8, 32), "layers.1.down": (5, 32), "embed": "keep"}
    rounded_model = Requantized(source, recipe)
    copy = write(tmp_path / "b", rounded_model)
    assert copy.stored("layers.0.q.weight")[0] == "affine 4-bit g64"
    assert copy.stored("layers.1.down.weight")[0] == "affine 5-bit g32"
    assert rounded_model.errors.keys() == {"layers.0.q.weight", "layers.1.down.weight"}
    for name in source.spec.tensors():
        tensor = source.tensor(name)
        assert copy.stored(name) == rounded_model.stored(name)
        if name in rounded_model.errors:
            made = copy.tensor(name)
            expected = quantize(dequantize(tensor), made.bits, made.group_size, np.float16)
            assert same(made, expected)
            a, b = dequantize(tensor, np.float64), dequantize(made, np.float64)
            error = np.sqrt(np.square(a - b).sum() / np.square(a).sum())
            assert np.isclose(rounded_model.errors[name], error, rtol=1e-4) and 0.001 < error < 0.1
        else:
            assert same(copy.tensor(name), tensor)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_what_has_its_form_already_is_kept_bit_for_bit(tmp_path, kind):
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", types=kind))
    made = Requantized(source, make_recipe(source, int(kind[1])).forms)
    copy = write(tmp_path / "m", made)
    assert not made.errors and not made.measured() and made.describe()["types"].keys() == {kind, "F32"}
    assert all(same(copy.tensor(name), source.tensor(name)) for name in source.spec.tensors())


WIDE = {"d_model": 256, "head_dim": 64, "d_ff": 512, "n_layers": 1}


def gguf_of_k_types(path):
    """With the gguf package, which cannot write K types, blocks are random bytes with sensible factors."""
    import gguf

    random = np.random.RandomState(0)
    spec = tiny_spec(**WIDE)
    kinds = {"q": "Q4_K", "k": "Q5_K", "v": "Q6_K", "down": "Q6_K", "embed": "Q4_K", "up": "Q8_0"}
    tensors, types = tiny_tensors(spec), {f"layers.0.{name}.weight": kind for name, kind in kinds.items()}
    types["embed.weight"] = "Q4_K"

    def blocks(w, kind):
        bytes_of = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}[kind.name]
        made = random.randint(0, 256, (w.size // 256, bytes_of)).astype(np.uint8)
        factors = np.full((len(made), 2), 0.0005, np.float16).view(np.uint8)
        if kind.name == "Q6_K":
            made[:, 208:] = factors[:, :2]
        else:
            made[:, :4] = factors
        return made.reshape(w.shape[0], -1)

    plain = gguf.quants.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.quants, "quantize", lambda w, k: blocks(w, k) if k.name.endswith("_K") else plain(w, k))
        return tiny_gguf(path, spec, tensors, types)


def test_forms_that_no_folder_holds_get_the_nearest(tmp_path):
    source = open_checkpoint(gguf_of_k_types(tmp_path / "m.gguf"))
    made = Requantized(source, {})
    copy = write(tmp_path / "m", made)
    wanted = {"q": "affine 4-bit g32", "k": "affine 5-bit g32", "v": "affine 8-bit g32", "up": "affine 8-bit g32"}
    assert {name: copy.stored(f"layers.0.{name}.weight")[0] for name in wanted} == wanted
    assert made.errors.keys() == {"embed.weight", *(f"layers.0.{name}.weight" for name in ("q", "k", "v", "down"))}
    assert all(0 < made.errors[name] < 1e-3 for name in ("layers.0.q.weight", "layers.0.k.weight"))
    assert all(1e-3 < made.errors[name] < 5e-3 for name in ("layers.0.v.weight", "layers.0.down.weight"))
    assert np.array_equal(copy.tensor("layers.0.q.weight").packed, source.tensor("layers.0.q.weight").packed)
    assert made.measured() == made.errors and Requantized(source, {}).measured() == made.errors
    for name, error in made.errors.items():
        assert np.isclose(relative_error(source.tensor(name), copy.tensor(name)), error)
        assert copy.stored(name) == made.stored(name)


def test_quantized_gpt2_files_become_floats(tmp_path):
    spec = tiny_spec("gpt2", n_layers=1)
    types = {name: "Q8_0" for name, shape in spec.tensors().items() if len(shape) == 2}
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", spec, types=types))
    made = Requantized(source, {})
    copy = write(tmp_path / "m", made)
    for name in ("q", "o", "up", "down"):
        name = f"layers.0.{name}.weight"
        assert copy.stored(name)[0] == "F16" and made.stored(name) == ("float16", copy.stored(name)[1])
        assert 0 < made.errors[name] < 1e-3
        assert np.array_equal(copy.tensor(name), dequantize(source.tensor(name)).astype(np.float16))
    assert copy.stored("embed.weight")[0] == "affine 8-bit g32"
    with pytest.raises(OptionError, match=r"stored \[in, out\]"):
        Requantized(source, {"layers.0.q": (4, 32)})


def test_floats_in_another_dtype(tmp_path):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "a"))
    made = Requantized(source, {"layers.0.q": (4, 64)}, "bfloat16")
    copy = write(tmp_path / "b", made)
    kinds = {copy.stored(name)[0] for name in source.spec.tensors()}
    assert kinds == {"BF16", "affine 4-bit g64"} and made.errors["layers.0.k.weight"] < 3e-3
    assert copy.tensor("final_norm.weight").tobytes() == (
        source.tensor("final_norm.weight").astype(ml_dtypes.bfloat16).tobytes()
    )
    with pytest.raises(OptionError, match="float8"):
        Requantized(source, {}, "float8")


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        ({"layers.9.q": (4, 32)}, r"layers\.9\.q"),
        ({"layers.0.q": (3, 32)}, "3 bits in groups of 32"),
        ({"layers.0.q": (4, 128)}, "groups of 128 cannot be had of 64 inputs"),
        ({"layers.0.q": (4, 16)}, "groups of 16"),
        ({"layers.0.down": (4, 64)}, "96 inputs"),
        ({"layers.0.attn_norm.weight": (4, 32)}, "is no matrix"),
        ({"layers.0.q": "most"}, "'most' is no form"),
    ],
)
def test_recipes_that_cannot_be_had(tmp_path, recipe, problem):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "a"))
    with pytest.raises(OptionError, match=problem):
        Requantized(source, recipe)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    tensors = tiny_tensors(tiny_spec())
    tensors["layers.1.up.weight"][3, 4] = value
    source = open_checkpoint(tiny_checkpoint(tmp_path / "a", tensors=tensors))
    with pytest.raises(CheckpointError, match=r"layers\.1\.up\.weight.*NaN or infinite"):
        Requantized(source, {"layers.1.up": (4, 32)}).tensor("layers.1.up.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.up\.weight.*cannot hold"):
        Requantized(source, {}, "float16").tensor("layers.1.up.weight")


@pytest.mark.parametrize(
    ("size", "dtype"), [(1.0, np.float16), (1e6, np.float32), (1e-7, np.float32), (1e-12, np.float32)]
)
def test_scales_have_the_range_that_they_need(size, dtype):
    w = (size * np.random.RandomState(0).standard_normal((32, 64))).astype(np.float32)
    for bits in (4, 8):
        made = rounded(w, bits, 32)
        assert made.scales.dtype == made.biases.dtype == dtype
        assert relative_error(w, made) < {4: 0.1, 8: 0.006}[bits]
    assert not dequantize(rounded(0 * w, 8, 32)).any()
    scales = (size * np.ones((32, 2))).astype(np.float32)
    assert with_plain_scales(Quantized(made.packed, scales, -scales, 8, 32)).scales.dtype == dtype


def test_rounding_goes_by_rows(monkeypatch):
    w = np.random.RandomState(0).standard_normal((2048, 1024)).astype(np.float32)
    whole = quantize(w, 4, 64)
    monkeypatch.setattr("ondevice_convert.rounding.CHUNK", 1 << 16)
    monkeypatch.setattr(rows_of, "__defaults__", (1 << 16,))
    tracemalloc.start()
    made = rounded(w, 4, 64)
    error = relative_error(w, made)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert same(made, whole) and 0.01 < error < 0.2
    assert peak < 3 * made.nbytes + (4 << 20) < w.nbytes


def test_what_is_added_to_a_model_is_kept(tmp_path):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "a"))
    added = {"layers.0.up.weight": quantize(np.eye(96, 64, dtype=np.float32), 8, 32)}
    made = Requantized(Changed(source, source.spec, added), {"layers.0.up": (8, 32), "layers.1.up": (8, 32)})
    assert made.tensor("layers.0.up.weight") is added["layers.0.up.weight"] and not made.errors
    made.tensor("layers.1.up.weight")
    assert made.errors.keys() == {"layers.1.up.weight"}


@pytest.mark.parametrize(("kind", "bits"), [("Q4_1", 6), ("Q5_0", 8), ("Q8_0", 8)])
def test_columns_in_another_order_get_finer_codes(tmp_path, kind, bits):
    source = open_checkpoint(tiny_gguf(tmp_path / "m.gguf", types=kind))
    order = np.random.default_rng(0).permutation(source.spec.d_ff)
    made = Changed(source, source.spec, orders={0: order})
    copy = write(tmp_path / "m", made)
    for name in ("layers.0.down.weight", "layers.1.down.weight", "layers.0.up.weight"):
        assert copy.stored(name)[0] == f"affine {bits if name == 'layers.0.down.weight' else int(kind[1])}-bit g32"
    assert made.stored("layers.0.down.weight") == copy.stored("layers.0.down.weight")
    down, before = (dequantize(c.tensor("layers.0.down.weight"), np.float64) for c in (copy, source))
    error = np.linalg.norm(down - before[:, order]) / np.linalg.norm(before)
    assert error < {4: 0.03, 5: 0.01, 8: 0.01}[int(kind[1])]
    assert same(copy.tensor("layers.0.up.weight"), source.tensor("layers.0.up.weight").rows(order))
