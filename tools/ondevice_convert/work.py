"""What an unfinished conversion has found so far, on disk beside its target, so that a killed one can go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ondevice.checkpoint.atomic import atomic_folder
from ondevice.checkpoint.quantization import Quantized, Tensor
from ondevice.checkpoint.safetensors import SafetensorsFile, write_safetensors
from ondevice.errors import CheckpointError, OndeviceError
from ondevice.sparsity.section import KEY, read_section
from ondevice.spec import ModelSpec
from ondevice.spec_fields import Fields
from ondevice_convert.fitted import Fitted
from ondevice_convert.report import Report
from ondevice_convert.samples import Samples
from ondevice_convert.texts import Texts

_LOG = logging.getLogger("ondevice")
META = "found"
REPORT = "report"
PARTS = ("packed", "scales", "biases", "super_scales", "super_biases")
"""Of a quantized tensor."""


class Work:
    """A folder of things found, each in a file that appears whole or not at all.

    Args:
        target: folder that the conversion makes; the work lies beside it.
        job: digest of all that decides the result. What another job has left there is deleted.
    """

    def __init__(self, target: Path, job: str) -> None:
        self.folder, self.job = target.parent / f".{target.name}.work", job
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a")
        except OSError as e:
            raise OndeviceError(f"{self.folder}: cannot be written: {e.strerror}; choose another place") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            self._lock.close()
            raise OndeviceError(f"{target}: another process converts to it; wait for it, or choose another name") from e
        stamp = self.folder / "job"
        if not (stamp.exists() and stamp.read_text() == job):
            if len(list(self.folder.iterdir())) > 1:
                _LOG.info("%s: of another conversion, which was not finished; it is deleted", self.folder)
            for path in self.folder.iterdir():
                if path.name != "lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            stamp.write_text(job)

    def close(self) -> None:
        """Deletes it all: the conversion is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def give_up(self) -> None:
        """After an error: what was found stays, but where there is nothing no trace is left."""
        if {path.name for path in self.folder.iterdir()} <= {"lock", "job"}:
            self.close()
        else:
            self._lock.close()

    @property
    def decided(self) -> str:
        """Digest of the job and of what was decided: other searches of the same job may decide otherwise."""
        return hashlib.sha256(self.job.encode() + (self.folder / "outcome.safetensors").read_bytes()).hexdigest()

    def keep(self, name: str, arrays: Mapping[str, NDArray[Any]], facts: Any) -> None:
        """Writes arrays and facts that JSON can hold."""
        given = dict(arrays) or {"none": np.zeros(1, np.float32)}
        write_safetensors(self.folder / f"{name}.safetensors", given, {META: json.dumps(facts)})

    def find(self, name: str) -> tuple[dict[str, NDArray[Any]], Any] | None:
        """What `keep` wrote under a name; None if there is nothing whole."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            file = SafetensorsFile(path)
            arrays = {key: file.array(key) for key in file.entries}
            return arrays, json.loads(file.metadata[META])
        except (CheckpointError, KeyError, ValueError):
            return None

    def keep_samples(self, samples: Samples) -> None:
        """Writes samples."""
        self.keep("samples", samples.places, None)

    def samples(self) -> Samples | None:
        """Samples that were written, mapped from the file."""
        found = self.find("samples")
        return None if found is None else Samples(found[0])

    def keep_texts(self, texts: Texts) -> None:
        """Writes a text that a model wrote."""
        parts = {"fit": np.asarray(texts.fit, np.int64), "unseen": np.asarray(texts.unseen, np.int64)}
        self.keep("texts", parts, [texts.window, texts.origin, texts.sha256])

    def texts(self) -> Texts | None:
        """What `keep_texts` wrote."""
        found = self.find("texts")
        return None if found is None else Texts(found[0]["fit"].tolist(), found[0]["unseen"].tolist(), *found[1])

    def keep_outcome(self, fitted: Fitted | None, sketch_head: bool, report: Report) -> None:
        """Writes what was decided, and the report about it."""
        whole = self.folder / REPORT
        shutil.rmtree(whole, ignore_errors=True)
        with atomic_folder(whole) as folder:
            report.write(folder)
        arrays: dict[str, NDArray[Any]] = {}
        facts: dict[str, Any] = {"sketch_head": sketch_head}
        if fitted is not None:
            for name, tensor in fitted.added.items():
                if isinstance(tensor, Quantized):
                    parts = {part: getattr(tensor, part) for part in PARTS}
                    arrays |= {f"{part}.{name}": array for part, array in parts.items() if array is not None}
                    facts["quantized"] = {**facts.get("quantized", {}), name: [tensor.bits, tensor.group_size]}
                else:
                    arrays[f"added.{name}"] = tensor
            arrays |= {f"order.{layer}": order for layer, order in fitted.orders.items()}
            facts[KEY] = fitted.method.document()
        self.keep("outcome", arrays, facts)

    def outcome(self, spec: ModelSpec) -> tuple[Fitted | None, bool] | None:
        """What `keep_outcome` wrote for a model: the method, without what its layers came to, and the head's sketch."""
        found = self.find("outcome")
        if found is None or not (self.folder / REPORT).is_dir():
            return None
        arrays, facts = found
        if KEY not in facts:
            return None, facts["sketch_head"]
        method = read_section(Fields({KEY: facts[KEY]}, self.folder / "outcome.safetensors"), spec)
        assert method is not None
        added: dict[str, Tensor] = {
            name.removeprefix("added."): array for name, array in arrays.items() if name.startswith("added.")
        }
        for name, (bits, group_size) in facts.get("quantized", {}).items():
            packed, scales, biases, *supers = (arrays.get(f"{part}.{name}") for part in PARTS)
            assert packed is not None and scales is not None
            added[name] = Quantized(packed, scales, biases, bits, group_size, *supers)
        orders = {int(name.removeprefix("order.")): a for name, a in arrays.items() if name.startswith("order.")}
        return Fitted(method, added, orders), facts["sketch_head"]

    def copy_report(self, folder: Path) -> None:
        """Puts the report into the model's folder."""
        shutil.copytree(self.folder / REPORT, folder, dirs_exist_ok=True)
