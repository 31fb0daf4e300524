"""What pip would install: built from a source archive, run outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

REPO = Path(__file__).parents[2]
EXPECTED = {
    "ondevice",
    "ondevice_bench",
    "ondevice_chat",
    "ondevice_convert",
    "ondevice_eval",
    "ondevice_parity",
    "cpu_kernels",
    "cuda_kernels",
    "metal_kernels",
}


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_built_from_sdist_generates(tmp_path: Path, tiny_path: Path) -> None:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(REPO), cwd=tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == EXPECTED
    assert any(name.endswith("LICENSE") for name in names)
    code = "import ondevice; print(ondevice.__file__); from ondevice.cli import main; main()"
    out = run(
        *(sys.executable, "-c", code, "generate", str(tiny_path), "-p", "Hello", "--max-tokens", "5", "--json"),
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert str(tmp_path / "site") in out
    assert '"finish_reason"' in out
