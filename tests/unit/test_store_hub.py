from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from ondevice.checkpoint import open_checkpoint, store
from ondevice.errors import ModelNotFoundError, OndeviceError, UnsupportedModelError
from tests.tiny import tiny_checkpoint, tiny_gguf, tiny_spec


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ONDEVICE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".locks" not in p.parts)


class Hub:
    """A pretended Hub: repositories as folders, and a record of what was asked for."""

    def __init__(self, folder: Path):
        self.folder, self.asked, self.fail = folder, [], None

    def model_info(self, repo_id, revision=None, files_metadata=False):
        if isinstance(self.fail, Exception):
            raise self.fail
        repo = self.folder / repo_id
        if not repo.is_dir():
            raise hub_errors.RepositoryNotFoundError("404", response=response(404))
        names = [p.relative_to(repo).as_posix() for p in repo.rglob("*") if p.is_file()]
        siblings = [SimpleNamespace(rfilename=n, size=(repo / n).stat().st_size) for n in names]
        return SimpleNamespace(siblings=siblings, sha=f"sha-of-{revision or 'main'}")

    def hf_hub_download(self, repo_id, filename, *, revision, local_dir):
        self.asked.append((filename, revision))
        if self.fail == filename:
            raise ConnectionError("cable cut")
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / repo_id / filename, target)
        (Path(local_dir) / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        return str(target)


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    pretended = Hub(tmp_path / "the-hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pretended)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", pretended.hf_hub_download)
    return pretended


def test_a_repository_is_pulled_with_only_what_is_needed(home, hub):
    repo = tiny_checkpoint(hub.folder / "org" / "tiny", max_shard_bytes=100_000)
    for name in (
        "pytorch_model.bin",
        "model.py",
        "onnx/model.onnx",
        "tf_model.h5",
        "original/model.safetensors",
    ):
        (repo / name).parent.mkdir(exist_ok=True)
        (repo / name).write_text("x")
    (repo / "tokenizer.json").write_text("{}")
    (repo / "LICENSE").write_text("free")
    path = store.pull("org/tiny")
    assert path == home / "hub/org/tiny" == store.resolve("org/tiny") == store.pull("org/tiny")
    assert open_checkpoint(path).spec == tiny_spec()
    weights = sorted(p.name for p in repo.glob("model-*.safetensors"))
    assert len(weights) > 2
    assert files(path) == sorted(["LICENSE", "config.json", "model.safetensors.index.json", "tokenizer.json", *weights])
    assert hub.asked[0] == ("config.json", "sha-of-main") and not (path / ".cache").exists()
    assert [(entry.name, entry.format) for entry in store.ls()] == [("org/tiny", "hub")]


def test_revisions_and_gguf_files_lie_apart(home, hub):
    tiny_checkpoint(hub.folder / "org" / "tiny")
    tiny_gguf(hub.folder / "org" / "tiny" / "a.gguf")
    (hub.folder / "org" / "tiny" / "sub").mkdir()
    tiny_gguf(hub.folder / "org" / "tiny" / "sub" / "b.gguf")
    names = ["org/tiny", "org/tiny/a.gguf", "org/tiny/sub/b.gguf", "org/tiny@v1.0", "org/tiny@v1.0/a.gguf"]
    paths = [store.pull(name) for name in names]
    assert [entry.name for entry in store.ls()] == names and len(set(paths)) == len(names)
    assert ("a.gguf", "sha-of-v1.0") in hub.asked
    for name, path in zip(names, paths):
        assert open_checkpoint(store.resolve(name)).spec == tiny_spec() and store.resolve(name) == path
    for name in names:
        store.remove(name)
        with pytest.raises(ModelNotFoundError):
            store.resolve(name)
    assert store.ls() == [] and not (home / "hub").exists() and not (home / "gguf").exists()


def test_an_unsupported_model_is_refused_before_its_weights(home, hub):
    repo = tiny_checkpoint(hub.folder / "org" / "odd")
    config = json.loads((repo / "config.json").read_text())
    for change in ({"model_type": "mamba"}, {"quantization_config": {"quant_method": "awq"}}):
        (repo / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UnsupportedModelError, match=r"mamba|awq"):
            store.pull("org/odd")
    assert {name for name, _ in hub.asked} == {"config.json"} and files(home) == []


def test_a_gguf_of_another_architecture_is_not_kept(home, hub):
    (hub.folder / "org" / "odd").mkdir(parents=True)
    path = tiny_gguf(hub.folder / "org" / "odd" / "a.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"rwkv7"))
    with pytest.raises(UnsupportedModelError, match="rwkv7"):
        store.pull("org/odd/a.gguf")
    assert files(home) == []


@pytest.mark.parametrize(
    ("names", "asked", "problem"),
    [
        (["a.gguf", "b.gguf"], "org/m", "org/m/a.gguf, org/m/b.gguf"),
        (["a.gguf"], "org/m/c.gguf", r"no c\.gguf.*org/m/a\.gguf"),
        (["config.json", "pytorch_model.bin"], "org/m", "pickled"),
        (["README.md"], "org/m", "nothing to pull"),
    ],
)
def test_repositories_without_usable_weights(hub, names, asked, problem):
    folder = hub.folder / "org" / "m"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")
    with pytest.raises(OndeviceError, match=problem):
        store.pull(asked)


def test_an_interrupted_pull_goes_on(home, hub):
    tiny_checkpoint(hub.folder / "org" / "tiny")
    hub.fail = "model.safetensors"
    with pytest.raises(OndeviceError, match=r"cable cut.*connection"):
        store.pull("org/tiny")
    assert store.ls() == [] and (home / ".partial/hub/org/tiny/config.json").exists()
    hub.fail = None
    assert open_checkpoint(store.pull("org/tiny")).spec == tiny_spec()
    assert not (home / ".partial/hub/org/tiny").exists()


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            hub_errors.GatedRepoError("403", response=response(403)),
            "gated.*huggingface.co/org/m.*hf auth login",
        ),
        (hub_errors.RevisionNotFoundError("404", response=response(404)), "no such revision"),
        (hub_errors.RepositoryNotFoundError("404", response=response(404)), "not on the Hub, or private"),
        (hub_errors.LocalEntryNotFoundError("offline"), "connection"),
        (ConnectionError("Name or service not known"), "Name or service not known.*connection"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(hub, error, problem):
    hub.fail = error
    with pytest.raises(OndeviceError, match=problem):
        store.pull("org/m")


def test_too_little_space_is_noticed_first(hub, monkeypatch):
    tiny_checkpoint(hub.folder / "org" / "tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OndeviceError, match="GB are free"):
        store.pull("org/tiny")
    assert {name for name, _ in hub.asked} == {"config.json"}
