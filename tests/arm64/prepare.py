"""Sets up an aarch64 Python with Numba in a folder, run by qemu-user on x86-64 Linux.

    python tests/arm64/prepare.py            prints the interpreter's path

Debian packages are unpacked, not installed: the machine gets no foreign architecture, only qemu itself if it lacks it.
Numba, llvmlite, NumPy and the other wheels are those of the Python that runs this. What was made is kept in the user's
cache folder; ONDEVICE_ARM64_PYTHON names another interpreter to take instead.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import platformdirs

VARIABLE = "ONDEVICE_ARM64_PYTHON"
WHEELS = ("numba", "llvmlite", "numpy", "ml_dtypes", "platformdirs", "pytest")
QEMU = ("qemu-aarch64-static", "qemu-aarch64")
PYTHONS = dict.fromkeys([f"{sys.version_info.major}.{sys.version_info.minor}", "3.11", "3.12", "3.13"])
"""Versions to look for, the running one first: a release of Debian has one of them."""
SOURCES = {
    "debian": ("http://deb.debian.org/debian {} main", "http://deb.debian.org/debian-security {}-security main"),
    "ubuntu": (
        "http://ports.ubuntu.com/ubuntu-ports {} main universe",
        "http://ports.ubuntu.com/ubuntu-ports {}-security main universe",
    ),
}
"""Where a distribution keeps packages for arm64; the machine's own mirror may have none."""
LAUNCHER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export PYTHONPATH=$here/site${{PYTHONPATH:+:$PYTHONPATH}}
exec {qemu} -cpu max -L "$here/root" "$here/root/usr/bin/python{python}" "$@"
"""


class UnavailableError(Exception):
    """Why there can be no such Python here, and what to do about it."""


def interpreter() -> Path:
    """A command that runs aarch64 Python, set up now if need be.

    Raises:
        FileNotFoundError: ONDEVICE_ARM64_PYTHON names no program.
        UnavailableError: this machine cannot have it.
        subprocess.CalledProcessError: a download or an installation failed.
    """
    given = os.environ.get(VARIABLE)
    if given:
        if not os.access(given, os.X_OK) or Path(given).is_dir():
            raise FileNotFoundError(f"{VARIABLE}={given}: not a program; name what {__file__} printed")
        return Path(given)
    distribution, codename = _release()
    if distribution not in SOURCES or not all(map(shutil.which, ("apt-get", "dpkg-deb"))):
        raise UnavailableError(
            f"needs apt-get on Debian or Ubuntu, or {VARIABLE} set to an aarch64 Python 3.11 or newer with "
            + ", ".join(WHEELS)
        )
    qemu = _qemu()
    pins = [f"{name}=={version(name)}" for name in WHEELS]
    key = repr((Path(__file__).read_bytes(), pins, list(PYTHONS), codename, qemu))
    folder = platformdirs.user_cache_path("ondevice") / "arm64" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        _make(part, _sources(distribution, codename), qemu, pins)
        part.rename(folder)
    return folder / "python"


def _release() -> tuple[str, str]:
    """The distribution and the codename of its release."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise UnavailableError("is of use on x86-64 only; on Arm the ordinary kernel tests say the same")
    try:
        about = platform.freedesktop_os_release()
    except OSError:
        about = {}
    return about.get("ID", ""), about.get("VERSION_CODENAME", "")


def _sources(distribution: str, codename: str) -> str:
    """The text of a sources.list."""
    keys = f"/usr/share/keyrings/{distribution}-archive-keyring.gpg"
    return "".join(f"deb [signed-by={keys}] {line.format(codename)}\n" for line in SOURCES[distribution])


def _qemu() -> str:
    for name in QEMU:
        if shutil.which(name):
            return name
    elevated = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if elevated and (not shutil.which("sudo") or _run(*elevated, "true", check=False).returncode):
        raise UnavailableError("needs qemu: sudo apt-get install qemu-user-static")
    _run(*elevated, "apt-get", "update", "-qq")
    _run(*elevated, "apt-get", "install", "-y", "-qq", "--no-install-recommends", "qemu-user-static")
    return next(name for name in QEMU if shutil.which(name))


def _make(folder: Path, sources: str, qemu: str, pins: list[str]) -> None:
    root, site, apt = folder / "root", folder / "site", folder / "apt"
    for path in (root, apt / "lists" / "partial", apt / "archives" / "partial", apt / "empty"):
        path.mkdir(parents=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(sources)
    options = [
        "APT::Architecture=arm64",
        "APT::Architectures=arm64",
        "APT::Sandbox::User=",
        "Debug::NoLocking=1",
        f"Dir::State::Lists={apt}/lists",
        f"Dir::State::Status={apt}/status",
        f"Dir::Cache={apt}",
        f"Dir::Etc::SourceList={apt}/sources.list",
        f"Dir::Etc::SourceParts={apt}/empty",
    ]
    given = [f"-o{option}" for option in options]
    _run("apt-get", *given, "-qq", "update")
    python = _python(given)
    # `install` finds the dependencies; nothing but downloading happens.
    packages = [f"python{python}-minimal", f"libpython{python}-stdlib", "libstdc++6", "libgomp1"]
    _run("apt-get", *given, "-qq", "-y", "--no-install-recommends", "--download-only", "install", *packages)
    for package in (apt / "archives").glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(root))
    if not (root / "lib").exists():
        # Newer releases keep everything under /usr; the link belongs to a package that nobody depends on.
        (root / "lib").symlink_to("usr/lib")
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 40))]
    _run(
        *(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:"),
        *("--python-version", python, "--implementation", "cp", "--target", str(site)),
        *(word for name in platforms for word in ("--platform", name)),
        *pins,
    )
    shutil.rmtree(apt)
    launcher = folder / "python"
    launcher.write_text(LAUNCHER.format(qemu=qemu, python=python))
    launcher.chmod(0o755)


def _python(given: list[str]) -> str:
    for python in PYTHONS:
        known = _run("apt-cache", *given, "show", "--no-all-versions", f"python{python}-minimal", check=False)
        if known.returncode == 0:
            return python
    raise UnavailableError(f"this release has no Python {', '.join(PYTHONS)} for arm64; set {VARIABLE}")


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if check and done.returncode:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()
    return done


if __name__ == "__main__":
    try:
        print(interpreter())
    except UnavailableError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
