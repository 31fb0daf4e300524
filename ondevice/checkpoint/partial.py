"""A folder that several runs may make: what a killed run has finished is found again by the next one.

Beside the target lies `.NAME.partial` with the lock of the process that works on it, `state.json`, which lists the
finished files, and `model`, which becomes the target. No model is found in `.NAME.partial` itself at any time.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ondevice.checkpoint.atomic import atomic_file, atomic_folder
from ondevice.checkpoint.json_file import read_json
from ondevice.errors import CheckpointError, OndeviceError

_LOG = logging.getLogger("ondevice")


class Work:
    """A folder that is being made.

    Args:
        folder: to put files in.
        job: stands for all that decides what comes into it; None if nothing is kept for another run.
        state: file that says what is finished.

    Attributes:
        finished: of an earlier run of the same job, in the order in which they were recorded: objects with "file",
            "size" and what else was recorded. Such a file has the recorded size, and not yet the "final" name.
    """

    def __init__(self, folder: Path, job: str | None = None, state: Path | None = None) -> None:
        self.folder, self.job, self.state = folder, job, state
        self.finished: list[dict[str, Any]] = []

    def record(self, finished: Sequence[Mapping[str, Any]]) -> None:
        """Keeps what is finished by now for another run, if one may come; the files must be on the disk already."""
        if self.state is not None:
            with atomic_file(self.state) as f:
                f.write(json.dumps({"job": self.job, "finished": list(finished)}).encode())

    def find(self) -> None:
        """Looks for what an earlier run has finished, and deletes everything else."""
        assert self.state is not None
        kept: list[dict[str, Any]] = []
        try:
            stated = read_json(self.state) if self.state.exists() else {"job": self.job, "finished": []}
            same = stated["job"] == self.job
            for entry in stated["finished"] if same else ():
                file = self.folder / Path(entry["file"]).name
                final = entry.pop("final", None)  # the name that the run was giving it when it ended
                if final is not None and not file.exists() and (self.folder / Path(final).name).is_file():
                    (self.folder / Path(final).name).rename(file)
                # What comes after a file that is not whole was decided by it, so it is made anew too.
                if not file.is_file() or file.stat().st_size != entry["size"]:
                    break
                kept.append(entry)
        except (CheckpointError, KeyError, TypeError, AttributeError):
            same, kept = False, []
        if not same:
            _LOG.info("%s: is of another conversion that was not finished; it is thrown away", self.state.parent)
        self.finished = kept
        names = {entry["file"] for entry in kept}
        for path in list(self.folder.iterdir()):
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not kept:
            self.state.unlink(missing_ok=True)
        else:
            self.record(kept)
            _LOG.info("%s: goes on after %d finished files", self.state.parent, len(kept))


@contextmanager
def make_folder(path: Path, job: str | None) -> Iterator[Work]:
    """A folder that appears at `path`, whole, when the block ends without an error.

    Args:
        path: folder to make; must not exist.
        job: what is finished is kept for a later run of the same job, unless what it is made of is at fault
            (CheckpointError); None: nothing is left behind after an error.

    Raises:
        OndeviceError: it exists, another process works on it, or the disk is full or refuses.
    """
    if job is None:
        with atomic_folder(path) as temporary:
            yield Work(temporary)
        return
    outer = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_existing(path, outer)
        with _locked(outer, path):
            _refuse_existing(path, outer)
            yield from _in_turn(path, outer, job)
    except OSError as e:
        kept = f" ({outer.name} has what is finished; the same again goes on from there)" if outer.exists() else ""
        raise OndeviceError(
            f"{path}: cannot be written: {e.strerror or e}; free some space or choose another place{kept}"
        ) from e


def _in_turn(path: Path, outer: Path, job: str) -> Iterator[Work]:
    work = Work(outer / "model", job, outer / "state.json")
    keep = False
    try:
        work.folder.mkdir(exist_ok=True)
        work.find()
        yield work
        work.folder.chmod(0o755)
        work.folder.rename(path)
    except CheckpointError:
        raise
    except BaseException:
        keep = (outer / "state.json").exists()
        raise
    finally:
        if not keep:
            shutil.rmtree(outer, ignore_errors=True)


def _refuse_existing(path: Path, outer: Path) -> None:
    if path.exists():
        if outer.is_dir() and not (outer / "model").exists():  # killed after its last step
            shutil.rmtree(outer, ignore_errors=True)
        raise OndeviceError(f"{path}: exists already; remove it or choose another name")


@contextmanager
def _locked(outer: Path, path: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets go of it when the process ends, however it ends."""
    import fcntl

    outer.mkdir(exist_ok=True)
    lock = outer / "lock"
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held it may have ended, and the folder be gone, since the file was opened.
            mine = lock.exists() and os.path.samestat(os.stat(lock), os.fstat(handle.fileno()))
        except BlockingIOError:
            mine = False
        if not mine:
            raise OndeviceError(f"{path}: another process is making it; wait until it ends, or choose another name")
        yield
