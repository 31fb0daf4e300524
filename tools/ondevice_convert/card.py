"""The model card of a converted folder, README.md, and the licence files that come with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ondevice.checkpoint.json_file import MAX_BYTES

LICENCE_FILES = re.compile(r"(licen[sc]e|notice|copying|copyright|use[_-]?policy)([._-].*)?", re.I)
_IDENTIFIER = re.compile(r"[\w.+-]+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    about: Mapping[str, Any], origin: str, licences: Sequence[str] = (), facts: Mapping[str, Any] | None = None
) -> str:
    """README.md of a converted model.

    Args:
        about: of the source: `Checkpoint.about()`.
        origin: where the source comes from: a Hub repository "org/name", or words for people.
        licences: names of licence files that lie in the folder.
        facts: what to say of the conversion, by what it is: options, sizes, quality.

    Returns:
        Markdown with front matter, in which `licence` of `Checkpoint.about()` is found again; a licence that the
        source does not state is said to be unknown.
    """
    name, licence = _line(about.get("name") or origin), about.get("licence")
    return "\n".join(
        [
            "---",
            *_front_matter(origin, licence, licences),
            "---",
            "",
            f"# {name}",
            "",
            f"Converted by `ondevice convert` from {_line(origin)}.",
            "",
            _about_licence(licence, licences),
            "",
            *_table(facts or {}),
            "```",
            "ondevice chat FOLDER",
            "```",
            "",
        ]
    )


def copy_licences(source: Path, folder: Path) -> tuple[str, ...]:
    """Copies the licence files of a model's folder; beside a single file, such files need not be the model's.

    Args:
        source: `Checkpoint.path`.
        folder: to put them in.

    Returns:
        Their names, sorted.

    Raises:
        OSError: a file cannot be read or written.
    """
    if not source.is_dir():
        return ()
    found = [path for path in source.iterdir() if LICENCE_FILES.fullmatch(path.name) and path.is_file()]
    names = tuple(sorted(path.name for path in found if path.stat().st_size <= MAX_BYTES))
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def _front_matter(origin: str, licence: str | None, licences: Sequence[str]) -> list[str]:
    """Strings are written as JSON, which YAML has in it."""
    lines = []
    if licence is not None and _IDENTIFIER.fullmatch(licence):
        lines.append(f"license: {licence}")
    elif licence is not None:
        lines += ["license: other", f"license_name: {json.dumps(_line(licence)[:100])}"]
    if licence is not None and licences:
        lines.append(f"license_link: {json.dumps(licences[0])}")
    if _HUB_ID.fullmatch(origin):
        lines.append(f"base_model: {json.dumps(origin)}")
    return [*lines, "library_name: ondevice", "pipeline_tag: text-generation", "tags:", "- ondevice"]


def _about_licence(licence: str | None, licences: Sequence[str]) -> str:
    files = f"See {', '.join(f'[{name}]({name})' for name in licences)}." if licences else ""
    if licence is None:
        return f"Licence: unknown, the source does not state one. {files}".rstrip()
    return f"Licence: {_line(licence)}, as the source states. {files}".rstrip()


def _table(facts: Mapping[str, Any]) -> list[str]:
    if not facts:
        return []
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items()]
    return ["| | |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    return _line(str(value)).replace("|", "\\|")


def _line(text: str) -> str:
    """A text in one line."""
    return " ".join(str(text).split())
