"""What backends cuda and torch say where they cannot run."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import ondevice
from ondevice.cli import cli
from ondevice.errors import BackendError, OptionError
from ondevice.ops import torch_device


@pytest.fixture(autouse=True)
def not_interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (torch_device.INTERPRET, torch_device.DEVICE, torch_device.DTYPE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "torch":
            raise ImportError("No module named 'torch'")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def on(monkeypatch: pytest.MonkeyPatch, system: str, processor: str, installed: bool) -> None:
    """A platform, with or without Triton. What is replaced are this file's own names, not those of all modules."""
    util = SimpleNamespace(find_spec=lambda name: object() if installed else None)
    monkeypatch.setattr(torch_device, "importlib", SimpleNamespace(util=util))
    monkeypatch.setattr(torch_device, "sys", SimpleNamespace(platform=system, modules=sys.modules))
    monkeypatch.setattr(torch_device, "platform", SimpleNamespace(machine=lambda: processor))


class FakeTorch:
    """A machine: torch with or without CUDA, its GPU if there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cuda: str | None, capability: tuple[int, int] | None) -> None:
        fake = SimpleNamespace(
            __version__="2.13.0",
            version=SimpleNamespace(cuda=cuda),
            cuda=SimpleNamespace(
                is_available=lambda: capability is not None,
                get_device_capability=lambda: capability,
                get_device_name=lambda: "GTX 1080",
            ),
        )
        monkeypatch.setitem(sys.modules, "torch", fake)
        monkeypatch.setattr(torch_device, "triton_obstacle", lambda: None)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_device, "ctypes", SimpleNamespace(CDLL=lambda name: None))


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(torch_device, "ctypes", SimpleNamespace(CDLL=missing))


def test_everything_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, no_driver: None, without_torch: None
) -> None:
    on(monkeypatch, "linux", "x86_64", installed=False)
    with pytest.raises(BackendError) as raised:
        ondevice.load("smollm2", backend="cuda")
    text = str(raised.value)
    for part in ("torch is not installed", "triton is not installed: pip install 'ondevice[triton]'",
                 "no NVIDIA driver (libcuda.so.1", "ONDEVICE_TRITON_INTERPRET=1 interprets"):  # fmt: skip
        assert part in text


def test_torch_without_cuda(monkeypatch: pytest.MonkeyPatch, driver: None) -> None:
    FakeTorch(monkeypatch, None, None)
    assert torch_device.cuda_obstacles() == [
        "torch 2.13.0 is built without CUDA: install a build of torch with it",
    ]


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, driver: None) -> None:
    FakeTorch(monkeypatch, "13.0", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    (problem,) = torch_device.cuda_obstacles()
    assert "finds no NVIDIA GPU" in problem and "CUDA_VISIBLE_DEVICES (7)" in problem


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch, driver: None) -> None:
    FakeTorch(monkeypatch, "13.0", (6, 1))
    assert torch_device.cuda_obstacles() == [
        "GTX 1080 has compute capability 6.1, the kernels need 8.0 (Ampere) or newer: take --backend cpu"
    ]
    FakeTorch(monkeypatch, "13.0", (9, 0))
    assert not torch_device.cuda_obstacles()


def test_other_platforms_and_versions_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "darwin", "arm64", installed=False)
    assert "this is darwin on arm64: take --backend cpu" in str(torch_device.triton_obstacle())
    on(monkeypatch, "linux", "x86_64", installed=True)
    monkeypatch.setattr(torch_device, "metadata", SimpleNamespace(version=lambda name: "3.1.0"))
    assert torch_device.triton_obstacle() == "triton is 3.1.0, the kernels are for 3.6: pip install 'triton==3.6.0'"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_command_line(tiny_path: Any, no_driver: None) -> None:
    result = CliRunner().invoke(cli, ["generate", str(tiny_path), "-p", "Hi", "--backend", "cuda"])
    assert result.exit_code == 1 and "backend cuda cannot run here" in result.output
    assert "Traceback" not in result.output
    result = CliRunner().invoke(cli, ["generate", str(tiny_path), "-p", "Hi", "--backend", "torch", "-t", "2"])
    assert result.exit_code != 0 and "threads is 2, which is of the cpu backend" in result.output


def test_torch_generates_as_the_reference_does(tiny_path: Any, tiny: Any) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    ours = ondevice.load(tiny_path, backend="torch")
    for prompt in ("Hello", "The quick brown fox"):
        assert (
            ours.generate(prompt, max_tokens=12, temperature=0).tokens
            == tiny.generate(prompt, max_tokens=12, temperature=0).tokens
        )


def test_devices_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setenv(torch_device.DEVICE, "tpu")
    with pytest.raises(OptionError, match="ONDEVICE_TORCH_DEVICE is 'tpu'; choose one of cpu, mps, cuda"):
        torch_device.find_torch()
    monkeypatch.setenv(torch_device.DEVICE, "cpu")
    monkeypatch.setenv(torch_device.DTYPE, "float16")
    with pytest.raises(OptionError, match="ONDEVICE_TORCH_DTYPE is 'float16'; choose one of bfloat16, float32"):
        torch_device.find_torch()


def test_triton_that_was_loaded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(torch_device.INTERPRET, "1")
    monkeypatch.delenv(torch_device.TRITON_INTERPRET, raising=False)
    monkeypatch.setattr(torch_device, "triton_obstacle", lambda: None)
    monkeypatch.setattr(torch_device, "torch_obstacle", lambda: None)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    with pytest.raises(BackendError, match="ONDEVICE_TRITON_INTERPRET was set after Triton had been loaded"):
        torch_device.require_cuda()
