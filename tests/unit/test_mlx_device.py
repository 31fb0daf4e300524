"""Where the MLX table runs and what it may use, the branches of a Mac among them: its platform's calls are replaced.

What only a Mac can show stands in comments of the code: what Metal calls its device and recommends, and whether macOS
lets memory be wired.
"""

from __future__ import annotations

import builtins
import json
import logging
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import ondevice
from ondevice.cli import cli
from ondevice.commands import doctor
from ondevice.errors import BackendError, OptionError
from ondevice.ops import mlx_device
from tests.tiny import tiny_spec

RECOMMENDED = 12_000_000_000
"""Of a Mac with 16 GB."""


@pytest.fixture
def without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mlx"]:
        monkeypatch.delitem(sys.modules, name)
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "mlx":
            raise ImportError("libmlx.so: cannot open shared object file")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.fixture
def ondevice_cli() -> Any:
    """Runs `ondevice`."""
    return lambda *args: CliRunner().invoke(cli, list(args))


@pytest.fixture
def mx() -> Any:
    return pytest.importorskip("mlx.core", reason="MLX is not installed (extra `mlx-cpu`)")


@pytest.fixture
def mac(mx: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLX as on a Mac; its limits are noted, and arrays stay on the CPU."""
    said: dict[str, int] = {}
    gpu = SimpleNamespace(type=mx.gpu)
    info = {"device_name": "Apple M2", "memory_size": 16 << 30, "max_recommended_working_set_size": RECOMMENDED}
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device=None: info)
    own_stream = mx.new_thread_local_stream(mx.cpu)
    monkeypatch.setattr(mx, "new_thread_local_stream", lambda device: own_stream)
    for name in ("memory", "cache", "wired"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda limit, name=name: said.__setitem__(name, limit))
    return SimpleNamespace(said=said, info=info)


@pytest.mark.parametrize(
    ("system", "processor", "way"),
    [
        ("linux", "x86_64", "pip install 'ondevice[mlx-cpu]'"),
        ("darwin", "arm64", "pip install mlx"),
        ("darwin", "x86_64", "no build for darwin on x86_64; take --backend cpu"),
        ("win32", "AMD64", "no build for win32 on AMD64"),
    ],
)
def test_a_machine_without_mlx_is_told_how_to_get_it(
    without_mlx: None, monkeypatch: pytest.MonkeyPatch, tiny_path: Any, system: str, processor: str, way: str
) -> None:
    monkeypatch.setattr(mlx_device.sys, "platform", system)
    monkeypatch.setattr(mlx_device.platform, "machine", lambda: processor)
    with pytest.raises(BackendError) as e:
        mlx_device.require()
    assert way in str(e.value) and "libmlx.so" in str(e.value)


def test_the_command_line_says_so_too(without_mlx: None, tiny_path: Any, ondevice_cli: Any) -> None:
    result = ondevice_cli("generate", str(tiny_path), "-p", "x", "--backend", "mlx")
    assert result.exit_code == 1 and "ondevice[mlx-cpu]" in result.stderr and "Traceback" not in result.stderr
    assert "ondevice[mlx-cpu]" in doctor._backends()["mlx"]


def test_generate_says_on_what(mx: Any, tiny_path: Any, ondevice_cli: Any) -> None:
    run = ("generate", str(tiny_path), "-p", "Hello", "--backend", "mlx", "--temp", "0", "-n", "3")
    result = ondevice_cli(*run)
    assert result.exit_code == 0 and re.search(r"mlx on the [CG]PU \(", result.stderr)
    as_json = ondevice_cli(*run, "--json")
    assert re.search(r"mlx on the [CG]PU \(", as_json.stderr)
    reference = ondevice.load(tiny_path, backend="reference").generate("Hello", temperature=0, max_tokens=3)
    assert json.loads(as_json.stdout)[0]["tokens"] == reference.tokens
    assert re.match(r"ready on the [CG]PU \(", doctor._backends()["mlx"])


def test_bits_of_keys_and_values(mx: Any, tiny_path: Any, ondevice_cli: Any) -> None:
    for backend in ("cpu", "auto", "reference"):
        with pytest.raises(OptionError, match=f"kv_bits is 8: backend {backend} keeps .* floats; take backend mlx"):
            ondevice.load(tiny_path, backend=backend, kv_bits=8)
    with pytest.raises(OptionError, match="kv_bits is 5; the mlx backend keeps keys and values in 4 or 8 bits"):
        ondevice.load(tiny_path, backend="mlx", kv_bits=5)
    result = ondevice_cli("generate", str(tiny_path), "-p", "x", "--backend", "mlx", "--kv-bits", "8", "-n", "2")
    assert result.exit_code == 1
    assert "--kv-bits 8 (kv_bits): heads of 16 dimensions make no groups of 32" in result.stderr


def test_number_types(mx: Any, mac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(mlx_device.DTYPE_VARIABLE, raising=False)
    assert mlx_device.find_device().dtype == mx.bfloat16
    monkeypatch.setenv(mlx_device.DTYPE_VARIABLE, "float32")
    assert mlx_device.find_device().dtype == mx.float32
    monkeypatch.setenv(mlx_device.DTYPE_VARIABLE, "float16")
    with pytest.raises(OptionError, match="'float16'; the mlx backend computes in bfloat16 or float32"):
        mlx_device.find_device()


def test_a_mac(mac: Any) -> None:
    from ondevice.ops.mlx_memory import MemoryGuard

    device = mlx_device.find_device()
    assert (device.name, device.gpu, device.metal) == ("GPU (Apple M2, Metal)", True, True)
    guard = MemoryGuard.of(device)
    assert guard.limit == RECOMMENDED
    assert mac.said == {"memory": RECOMMENDED, "cache": RECOMMENDED // 8, "wired": RECOMMENDED}


def test_memory_that_macos_does_not_wire(
    mx: Any, mac: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ondevice.ops.mlx_memory import MemoryGuard

    def refuse(limit: int) -> int:
        raise ValueError("[set_wired_limit] not on macOS 14")

    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with caplog.at_level(logging.WARNING, "ondevice"):
        MemoryGuard.of(mlx_device.find_device())
    assert "not kept wired" in caplog.text and "macOS 14" in caplog.text


def test_a_limit_of_the_users(mac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ondevice.ops.mlx_memory import LIMIT_VARIABLE, MemoryGuard

    for text, wired in (("8", 8_000_000_000), ("14.5", RECOMMENDED)):
        monkeypatch.setenv(LIMIT_VARIABLE, text)
        guard = MemoryGuard.of(mlx_device.find_device())
        assert guard.limit == mac.said["memory"] == int(float(text) * 1e9)
        assert mac.said["wired"] == wired  # never more than Metal recommends: MLX refuses that
    for text in ("much", "-1", "nan"):
        monkeypatch.setenv(LIMIT_VARIABLE, text)
        with pytest.raises(OptionError, match="ONDEVICE_MLX_MEMORY_GB is"):
            MemoryGuard.of(mlx_device.find_device())


def test_what_does_not_fit_is_refused_by_name(mx: Any, tiny_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ondevice.ops.mlx_memory import LIMIT_VARIABLE

    monkeypatch.setattr(mx, "get_active_memory", lambda: 40_000_000)
    monkeypatch.setenv(LIMIT_VARIABLE, "0.0401")
    needed = r"weights would take 0\.00 GB on MLX's [CG]PU .* beside 0\.04 GB that are in use"
    with pytest.raises(OptionError, match=rf"{needed}.*--bits 4.*ONDEVICE_MLX_MEMORY_GB"):
        ondevice.load(tiny_path, backend="mlx")
    monkeypatch.setenv(LIMIT_VARIABLE, "0.0425")
    model = ondevice.load(tiny_path, backend="mlx")
    assert model.generate("Hello", max_tokens=2, raw=True).tokens
    way = "--context or --max-tokens.*fewer prompts, take --kv-bits 8"
    with pytest.raises(OptionError, match=rf"cache of 12\d\d positions.*{way}"):
        model.generate(["Hello"] * 10, max_tokens=120, raw=True)


def test_bytes_on_the_device(mx: Any) -> None:
    from ondevice.checkpoint.quantization import quantize
    from ondevice.ops.mlx_bytes import device_bytes
    from ondevice.ops.mlx_weights import pack_matrix

    w = np.zeros((64, 256), np.float32)
    for bits, group, kind in ((4, 32, "Q4_K"), (5, 32, "Q5_1"), (8, 32, "Q8_0"), (6, 64, "affine 6-bit g64")):
        for dtype in (mx.float32, mx.bfloat16):
            packed = pack_matrix(quantize(w, bits, group), dtype)
            assert device_bytes(kind, w.shape, dtype.size) == sum(array.nbytes for array in packed.arrays)
    for kind in ("F16", "Q6_K", "BF16", "F32"):
        assert device_bytes(kind, w.shape, 2) == w.size * 2


def test_a_model_on_a_machine_that_says_nothing_of_its_memory(mx: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ondevice.ops.mlx import MlxOps

    monkeypatch.setattr("ondevice.machine.memory_bytes", lambda: (0, None))
    table = MlxOps()
    assert table.memory.limit is None
    assert table.new_pages(tiny_spec(), [2, 2, 2], 64).layer(0)[0].shape == (2, 2, 64, 16)


def test_answers_from_a_worker_thread(mx: Any, tiny_path: Any) -> None:
    """A model that one thread has loaded answers in others, as in a menu bar or a server; a session moves between."""
    import threading

    model = ondevice.load(tiny_path, backend="mlx")
    session = model.session(context=64)
    from ondevice.generation.sampling import SamplingParams

    params, ids = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), model.encode("Hello", raw=True)
    here = [piece.token for piece in session.stream(ids, params)]
    found: list[Any] = []

    def work() -> None:
        try:
            answer = model.generate("Hello", raw=True, temperature=0, max_tokens=4, ignore_eos=True)
            longer = [*ids, *here]
            found.append((answer.tokens, [piece.token for piece in session.stream(longer, params)]))
        except BaseException as e:
            found.append(e)

    for _ in range(2):
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
    answers = [piece for piece in here if piece is not None]
    assert found[0] == found[1] and found[0][0] == answers, found
    assert model.generate("Hello", raw=True, temperature=0, max_tokens=4, ignore_eos=True).tokens == answers
