"""Fetches models from the Hub: the configuration first, then only the files that are needed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ondevice.checkpoint.hub import PICKLES, read_spec
from ondevice.checkpoint.json_file import read_json
from ondevice.checkpoint.progress import Progress, watch_folder
from ondevice.errors import ModelNotFoundError, OndeviceError, UnsupportedModelError
from ondevice.spec import ModelSpec

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "README.md",
)


def pull_folder(
    repo_id: str,
    revision: str | None,
    folder: Path,
    progress: Progress | None,
    accept: Callable[[ModelSpec], None] | None = None,
) -> Path:
    """Fetches a checkpoint of safetensors.

    Args:
        repo_id: `org/repo`.
        revision: branch, tag or commit; None: the main branch.
        folder: that receives the files; what an earlier try left there is used.
        progress: receives bytes done, bytes in all, label.
        accept: called with what config.json says, before anything large is fetched; may raise.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: by the configuration; no weights were fetched.
        OndeviceError: it is not there, not allowed, or the Hub cannot be reached.
    """
    sizes, commit = _listing(repo_id, revision)
    if "config.json" not in sizes or not any(name.endswith(".safetensors") for name in sizes):
        raise _unusable(repo_id, sizes)
    _fetch(repo_id, commit, "config.json", folder)
    spec, _ = read_spec(read_json(folder / "config.json"), Path(f"{repo_id}/config.json"))
    if accept is not None:
        accept(spec)
    wanted = [name for name in sizes if name in COMPANIONS or _is_weight(name, sizes)]
    _check_space(repo_id, folder, sum(sizes[name] for name in wanted))
    with watch_folder(folder, sum(sizes[name] for name in wanted), repo_id, progress):
        for name in sorted(wanted, key=lambda name: sizes[name]):
            _fetch(repo_id, commit, name, folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return folder


def pull_file(repo_id: str, revision: str | None, file: str, folder: Path, progress: Progress | None) -> Path:
    """Fetches one GGUF file and checks its header.

    Args:
        file: path in the repository.
        repo_id, revision, folder, progress: as in `pull_folder`.

    Returns:
        The file, inside `folder`.
    """
    from ondevice.checkpoint.gguf_checkpoint import GgufCheckpoint

    sizes, commit = _listing(repo_id, revision)
    if file not in sizes:
        raise _unusable(repo_id, sizes, file)
    _check_space(repo_id, folder, sizes[file])
    with watch_folder(folder, sizes[file], f"{repo_id}/{file}", progress):
        _fetch(repo_id, commit, file, folder)
    GgufCheckpoint(folder / file).close()
    return folder / file


def _is_weight(name: str, sizes: dict[str, int]) -> bool:
    """Whether a file belongs to the weights: model*.safetensors, or any where there are none of that name."""
    if any(re.fullmatch(r"model[\w.-]*\.safetensors", other) for other in sizes):
        return re.fullmatch(r"model[\w.-]*\.safetensors", name) is not None
    return re.fullmatch(r"[\w.-]+\.safetensors", name) is not None


def _listing(repo_id: str, revision: str | None) -> tuple[dict[str, int], str | None]:
    """Names and sizes of a repository's files, and the commit that they belong to."""
    with _plain_errors(repo_id):
        from huggingface_hub import HfApi

        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
    return {file.rfilename: file.size or 0 for file in info.siblings or []}, info.sha or revision


def _fetch(repo_id: str, commit: str | None, name: str, folder: Path) -> None:
    """Downloads one file into a folder; the Hub's own progress bars stay silent."""
    with _plain_errors(repo_id):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )

        was_silent = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            hf_hub_download(repo_id, name, revision=commit, local_dir=folder)
        finally:
            if not was_silent:
                enable_progress_bars()


@contextmanager
def _plain_errors(repo_id: str) -> Iterator[None]:
    """Turns the Hub library's errors, whose kinds differ between its versions, into ours."""
    from huggingface_hub import errors

    url = f"https://huggingface.co/{repo_id}"
    try:
        yield
    except OndeviceError:
        raise
    except errors.GatedRepoError as e:
        raise OndeviceError(f"{repo_id} is gated: accept its terms at {url}, then run `hf auth login`") from e
    except errors.RevisionNotFoundError as e:
        raise ModelNotFoundError(f"{repo_id} has no such revision; see {url}/commits/main") from e
    except errors.RepositoryNotFoundError as e:
        raise ModelNotFoundError(
            f"{repo_id} is not on the Hub, or private; check the spelling, or run `hf auth login`"
        ) from e
    except errors.LocalEntryNotFoundError as e:
        raise _unreachable(repo_id, e) from e
    except errors.EntryNotFoundError as e:
        raise ModelNotFoundError(f"{repo_id} lacks a file that it lists: {e}; try again") from e
    except Exception as e:  # network libraries raise many kinds, none of them ours
        raise _unreachable(repo_id, e) from e


def _unreachable(repo_id: str, error: Exception) -> OndeviceError:
    reason = next(iter(str(error).strip().splitlines()), "no reason given")
    return OndeviceError(
        f"{repo_id} could not be fetched ({type(error).__name__}: {reason}); "
        "check the connection and HF_ENDPOINT, or give the path of a model on disk; "
        "a second try goes on where this one stopped"
    )


def _unusable(repo_id: str, sizes: dict[str, int], file: str = "") -> OndeviceError:
    """Why a repository cannot be pulled as asked, and what can."""
    ggufs = sorted(name for name in sizes if name.endswith(".gguf"))
    if ggufs:
        some = ", ".join(f"{repo_id}/{name}" for name in ggufs[:8])
        return ModelNotFoundError(
            f"{repo_id} has no {file or 'safetensors checkpoint'}; pull one of its GGUF files: {some}"
        )
    if any(Path(name).match(pattern) for name in sizes for pattern in PICKLES):
        return UnsupportedModelError(
            repo_id,
            "only pickled weights, which can run code when opened; find a safetensors or GGUF version",
        )
    return ModelNotFoundError(f"{repo_id} has no {file or 'config.json with safetensors weights'}: nothing to pull")


def _check_space(repo_id: str, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OndeviceError(
            f"{repo_id} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {folder}; "
            "free some space or set ONDEVICE_HOME"
        )
