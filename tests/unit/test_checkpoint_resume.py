"""Runs of the writer that are ended before their time, and what the next run makes of what they have left."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from ondevice.checkpoint import open_checkpoint
from ondevice.checkpoint.quantization import quantize
from ondevice.checkpoint.writer import write_checkpoint
from ondevice.errors import CheckpointError, OndeviceError
from tests.tiny import tiny_spec, tiny_tensors

SHARD = 40_000


def convert(folder, made=None, job="a", ends_at=None, error=KeyboardInterrupt, **options):
    """Writes a tiny model, matrices of different kinds, in many files; `ends_at`: a tensor that raises an error."""
    spec = tiny_spec()
    tensors = tiny_tensors(spec)

    def make(name):
        if name == ends_at:
            raise error
        if made is not None:
            made.append(name)
        w = tensors[name]
        return quantize(w, 8 if "down" in name else 4, 32) if w.ndim == 2 and "o." not in name else w

    options = {"max_shard_bytes": SHARD, "job": job, **options}
    write_checkpoint(folder, spec, ((name, partial(make, name)) for name in tensors), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "m"
    convert(folder, job=None)
    assert len(contents(folder)) > 5
    return contents(folder)


def test_goes_on_where_it_was_interrupted(tmp_path, undisturbed, caplog):
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m", ends_at="layers.2.up.weight")
    partial_folder = tmp_path / ".m.partial"
    assert [path.name for path in tmp_path.iterdir()] == [partial_folder.name]
    for folder in (partial_folder, partial_folder / "model"):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(folder)
    made, calls = [], []
    with caplog.at_level(logging.INFO, "ondevice"):
        convert(tmp_path / "m", made, progress=lambda *call: calls.append(call))
    assert "goes on after" in caplog.text
    assert "layers.2.up.weight" in made and "layers.0.q.weight" not in made
    assert [call[0] for call in calls] == list(range(1, len(tiny_spec().tensors()) + 1))
    assert contents(tmp_path / "m") == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("other", [{"job": "b"}, {"max_shard_bytes": SHARD + 1}])
def test_another_jobs_leftovers_are_thrown_away(tmp_path, caplog, other):
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m", ends_at="layers.2.up.weight")
    made = []
    with caplog.at_level(logging.INFO, "ondevice"):
        convert(tmp_path / "m", made, **other)
    assert "thrown away" in caplog.text and made == list(tiny_spec().tensors())
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def damage_truncated(model, state):
    first = next(iter(sorted(model.iterdir())))
    first.write_bytes(first.read_bytes()[:-1])


def damage_gone(model, state):
    sorted(model.iterdir())[0].unlink()


def damage_state(model, state):
    state.write_text(state.read_text()[:-5])


def damage_state_shape(model, state):
    state.write_text(json.dumps({"job": json.loads(state.read_text())["job"], "finished": [3]}))


@pytest.mark.parametrize("damage", [damage_truncated, damage_gone, damage_state, damage_state_shape])
def test_files_that_are_not_whole_are_made_anew(tmp_path, undisturbed, damage):
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m", ends_at="layers.1.up.weight")
    left = tmp_path / ".m.partial"
    damage(left / "model", left / "state.json")
    (left / "model" / "junk").mkdir()
    (left / "model" / ".tmp-1").write_text("x")
    made = []
    convert(tmp_path / "m", made)
    assert made == list(tiny_spec().tensors()) and contents(tmp_path / "m") == undisturbed


def test_files_that_have_their_names_already_are_found(tmp_path, undisturbed):
    def interrupted(folder):
        assert len(list(folder.glob("model-0*.safetensors"))) > 2
        next(folder.glob("model-00002-*")).rename(folder / "shard-1")  # as if killed among the renames
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m", finish=interrupted)
    made = []
    convert(tmp_path / "m", made)
    assert not made and contents(tmp_path / "m") == undisturbed


def test_a_full_disk_keeps_what_is_finished(tmp_path, undisturbed):
    with pytest.raises(OndeviceError, match=r"No space left.*\.m\.partial has what is finished"):
        convert(tmp_path / "m", ends_at="layers.2.up.weight", error=OSError(errno.ENOSPC, "No space left on device"))
    made = []
    convert(tmp_path / "m", made)
    assert len(made) < len(tiny_spec().tensors()) and contents(tmp_path / "m") == undisturbed


@pytest.mark.parametrize(
    ("at", "error"),
    [("embed.weight", KeyboardInterrupt), ("layers.2.up.weight", CheckpointError("a.gguf", "is damaged"))],
)
def test_what_cannot_be_gone_on_with_is_not_kept(tmp_path, at, error):
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        convert(tmp_path / "m", ends_at=at, error=error)
    assert not list(tmp_path.iterdir())


def test_a_second_process_is_refused(tmp_path, undisturbed):
    refused = []

    def meanwhile(done, total, label):
        if done == 20:
            with pytest.raises(OndeviceError, match="another process is making it"):
                convert(tmp_path / "m")
            refused.append(label)

    convert(tmp_path / "m", progress=meanwhile)
    assert refused and contents(tmp_path / "m") == undisturbed


def test_an_existing_folder_is_refused_and_what_an_ended_run_left_beside_it_removed(tmp_path):
    convert(tmp_path / "m")
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "state.json").write_text("{}")
    with pytest.raises(OndeviceError, match="exists already"):
        convert(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_further_files_are_in_the_folder_when_it_appears(tmp_path):
    def finish(folder):
        assert not (tmp_path / "m").exists() and not (folder / "config.json").exists()
        (folder / "README.md").write_text("a card")

    convert(tmp_path / "m", finish=finish)
    assert contents(tmp_path / "m")["README.md"] == b"a card"


KILLED = """
import os, signal, shutil, sys
from pathlib import Path
from tests.unit.test_checkpoint_resume import contents, convert
from ondevice.checkpoint import open_checkpoint
from ondevice.errors import OndeviceError

root = Path(sys.argv[1])
CHANGES = {"open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "shutil.rmtree", "tempfile.mkstemp"}


def run(folder, kill_at):
    seen = 0

    def look(event, arguments):
        nonlocal seen
        if event in CHANGES and (event != "open" or str(root) in str(arguments[0])):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    convert(folder)
    return seen


def fork(folder, kill_at):
    child = os.fork()
    if not child:
        try:
            run(folder, kill_at)
        except OndeviceError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


whole = root / "whole"
convert(whole)
wanted, kill_at, killed, opened = contents(whole), -1, 0, 0
while True:
    kill_at += 2
    folder = root / "m"
    if fork(folder, kill_at) == 0:
        break
    killed += 1
    left = root / ".m.partial"
    for path in (left, left / "model", folder):
        try:
            open_checkpoint(path).close()
        except OndeviceError:
            continue
        assert path != left, "a partial folder loads"
        assert contents(path) == wanted, (kill_at, path)
        opened += 1
    if kill_at % 4 == 1:
        fork(folder, kill_at // 2 + 1)
    if not folder.exists():
        convert(folder)
    else:
        try:
            convert(folder)
        except OndeviceError as e:
            assert "exists already" in str(e), e
    assert contents(folder) == wanted, kill_at
    assert [path.name for path in root.iterdir() if path != whole] == ["m"], (kill_at, list(root.iterdir()))
    shutil.rmtree(folder)
print("killed", killed, "opened", opened)
"""


def test_killed_at_many_steps(tmp_path):
    """A process that is killed at every other step by which it changes files, half of the times once more."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 25
