"""The Python API: `load` a model, then `generate`, `stream` or hold a `session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

from ondevice.checkpoint import open_checkpoint, store
from ondevice.decoder import Decoder
from ondevice.defaults import BACKENDS, DEFAULT_MODEL
from ondevice.errors import ModelNotFoundError, OptionError
from ondevice.generation.batch import Piece, Row, Stats, generate
from ondevice.generation.sampling import SamplingParams, TokenLogprob
from ondevice.generation.session import Session
from ondevice.ops.base import Ops
from ondevice.sparsity.head_sketch import add_wanted_sketch
from ondevice.sparsity.settings import SparsitySettings

Progress = Callable[[int, int, str], None]
Messages = Sequence[Mapping[str, Any]]
DEFAULT_CONTEXT = 8192
"""Tokens of a session where the model could hold more: its cache would cost memory that few conversations need."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one prompt.

    Args:
        text: the answer, without a stop string.
        tokens: its ids, with the end token where it gave one.
        finish_reason: "stop" or "length".
        stop: the stop string that ended it, if one did.
        stats: counts and times.
        logprobs: per token, where asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    stop: str | None
    stats: Stats
    logprobs: list[TokenLogprob] | None = None


def load(
    name: str | Path,
    *,
    backend: str = "auto",
    threads: int | None = None,
    tau: float | None = None,
    strict: bool = False,
    dense: bool = False,
    plan: str | Path = "auto",
    sketch_head: bool | None = None,
    tile_cache: bool = True,
    kv_bits: int | None = None,
    progress: Progress | None = None,
) -> Model:
    """Loads a model.

    Args:
        name: an alias such as "smollm2" (fetched once if need be), a model in the store, or a path to a GGUF file or to
            a folder of safetensors.
        backend: "auto" (cpu), "cpu", "mlx" (Apple silicon's GPU; on Linux MLX's slow build for CPUs), "cuda" (an NVIDIA
            GPU, by Triton's kernels), "torch" (plain torch, for comparisons and training), or "reference" (float64,
            slow: the judge of the others).
        threads: of the CPU backend; by default one per core that this process may use.
        tau: of a d2dmoe model, in the place of the checkpoint's: experts run from this part of the largest prediction
            on, so 0 runs all.
        strict: raise where skipping work falls back to the dense path, instead of saying so once.
        dense: skip no work.
        plan: of a model that skips, where it does: "auto" (layers that a short measurement on this machine shows to be
            faster so), "sparse" (all), "dense" (none: masked where the method promises the same result), or a JSON
            file of a plan, such as the statistics of an answer hold.
        sketch_head: score all words of the vocabulary by a sketch, and compute the logits of those that matter. Costs
            memory, and time at the first load; requests for log-probabilities or penalties go without it. None goes by
            the model: by `sketch_head` in its config.json, which a backend without sketches and `dense` leave aside.
        tile_cache: whether a backend may keep packed weights in the user's cache folder, and take them from there;
            ONDEVICE_NO_TILE_CACHE=1 in the environment forbids it too.
        kv_bits: 8 or 4 keep keys and values in affine groups of so many bits, which costs precision and saves memory;
            of the mlx backend.
        progress: called with (done, of how many, what) while files are fetched, packed and compiled.

    Raises:
        OndeviceError: no such model, a damaged file, or an architecture that is not supported.
        OptionError: tau for a model that has none, or dense for one that has no dense form, or another
            model's plan, or a sketch of a head that can have none.
        SparsityError: in strict settings, the backend cannot skip what the model asks for.
    """
    table = op_table(backend, threads, progress and compiling_progress(progress), kv_bits)
    path = find(str(name), progress)
    with open_checkpoint(path) as checkpoint:
        tokenizer = checkpoint.tokenizer()
        table.admit(checkpoint)
        with table.keeping(checkpoint, progress) if tile_cache else nullcontext():
            settings = SparsitySettings(tau, strict, dense, plan)
            decoder = Decoder(checkpoint, table, progress, settings)
            add_wanted_sketch(decoder, checkpoint, sketch_head, settings, progress)
    table.prepare(decoder.spec, progress and compiling_progress(progress))
    return Model(str(name), path, decoder, tokenizer)


def find(name: str, progress: Progress | None = None) -> Path:
    """Path of a model; an alias that is not in the store yet is fetched, since its size and origin are known."""
    try:
        return store.resolve(name)
    except ModelNotFoundError:
        if name != DEFAULT_MODEL:
            raise
        return store.pull(name, progress)


def compiling_progress(progress: Progress) -> Progress:
    """A progress for compiling: it says what the names of kernels alone would not."""
    return lambda done, total, label: progress(done, total, label and f"compiling {label}")


def op_table(backend: str, threads: int | None, progress: Progress | None, kv_bits: int | None = None) -> Ops:
    """The op table of a backend: the one place where a platform is chosen.

    Args:
        backend, threads, kv_bits: as of `load`.
        progress: hears of what is compiled.

    Raises:
        OptionError: no such backend, an impossible number of threads, or kv_bits that the backend has not.
        BackendError: it cannot run here; the text says what is missing, and the way out.
    """
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; it must be at least 1")
    if backend == "mlx":
        from ondevice.ops.mlx_device import mlx_table, require

        require()
        return mlx_table(kv_bits or 0)
    if kv_bits is not None:
        raise OptionError(f"kv_bits is {kv_bits}: backend {backend} keeps keys and values in floats; take backend mlx")
    if backend in ("auto", "cpu"):
        from cpu_kernels.compile import compile_all
        from cpu_kernels.threads import POOL
        from ondevice.ops.cpu import CpuOps

        compile_all(POOL, progress)
        return CpuOps(threads)
    if backend in ("cuda", "torch"):
        from ondevice.ops.torch_device import require_cuda, require_torch

        if threads is not None:
            raise OptionError(f"threads is {threads}, which is of the cpu backend; leave it out with {backend}")
        if backend == "cuda":
            require_cuda()
            from ondevice.ops.torch_cuda import CudaOps

            return CudaOps()
        require_torch()
        from ondevice.ops.torch import TorchOps

        return TorchOps()
    if backend == "reference":
        from ondevice.ops.reference import ReferenceOps

        return ReferenceOps()
    raise OptionError(f"backend {backend!r} is not available; choose one of {', '.join(BACKENDS)}")


class Model:
    """A loaded model. Made by `load`.

    Attributes:
        name: as it was asked for.
        path: its file or folder.
        spec: sizes and features.
        tokenizer: text to ids and back.
        decoder: ids to logits.
    """

    def __init__(self, name: str, path: Path, decoder: Decoder, tokenizer: Any) -> None:
        self.name, self.path, self.decoder, self.tokenizer = name, path, decoder, tokenizer
        self.spec = decoder.spec

    def encode(self, prompt: str | Messages, *, raw: bool = False, system: str | None = None) -> list[int]:
        """Ids of a prompt.

        Args:
            prompt: text, or chat messages with "role" and "content". Text becomes a user's message where the model has
                a chat template.
            raw: take text as it is, without a template.
            system: a system message put before.
        """
        if isinstance(prompt, str):
            if raw or self.tokenizer.chat_template is None:
                if system is not None:
                    raise OptionError("a system message needs a chat template, which this prompt does not go through")
                return self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        elif raw:
            raise OptionError("raw takes text; messages need the chat template")
        head = [] if system is None else [{"role": "system", "content": system}]
        return self.tokenizer.encode_chat([*head, *prompt])

    @overload
    def generate(
        self,
        prompt: str,
        *,
        raw: bool = ...,
        system: str | None = ...,
        context: int | None = ...,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def generate(
        self,
        prompt: Sequence[Any],
        *,
        raw: bool = ...,
        system: str | None = ...,
        context: int | None = ...,
        **sampling: Any,
    ) -> Answer | list[Answer]: ...

    def generate(
        self,
        prompt: str | Sequence[Any],
        *,
        raw: bool = False,
        system: str | None = None,
        context: int | None = None,
        **sampling: Any,
    ) -> Answer | list[Answer]:
        """Answers one prompt, or several as one batch.

        Args:
            prompt: text, a list of chat messages, or a list of prompts.
            raw, system: see `encode`.
            context: tokens per sequence, prompt and answer together; by default what the model allows.
            sampling: fields of SamplingParams.

        Returns:
            An Answer; for a list of prompts, a list of them. A row of a batch equals its single run; on mlx, up to
            rounding.

        Raises:
            OptionError: an unknown or impossible option.
            ContextLengthError: a prompt does not fit.
        """
        one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], Mapping))
        prompts: list[Any] = [prompt] if one else list(prompt)
        rows = self._rows(prompts, raw, system, _params(sampling))
        pieces: list[list[Piece]] = [[] for _ in rows]
        for piece in self._run(rows, context):
            pieces[piece.row].append(piece)
        answers = [_answer(row, got) for row, got in zip(rows, pieces)]
        return answers[0] if one else answers

    def stream(
        self,
        prompt: str | Messages,
        *,
        raw: bool = False,
        system: str | None = None,
        context: int | None = None,
        **sampling: Any,
    ) -> Iterator[Piece]:
        """Answers one prompt piece by piece; the arguments are those of `generate`."""
        rows = self._rows([prompt], raw, system, _params(sampling))
        return self._run(rows, context)

    def session(self, context: int | None = None) -> Session:
        """A conversation that keeps its keys and values.

        Args:
            context: tokens that it may hold; by default the model's context, at most 8192.
        """
        return Session(self.decoder, self.tokenizer, context or min(self.spec.context_length, DEFAULT_CONTEXT))

    def _rows(self, prompts: list[Any], raw: bool, system: str | None, params: SamplingParams) -> list[Row]:
        rows = []
        for i, prompt in enumerate(prompts):
            ids = self.encode(prompt, raw=raw, system=system)
            if not ids:
                raise OptionError("an empty prompt has nothing to go on from")
            rows.append(Row(i, ids, params, self.tokenizer, self.spec.vocab_size, slot=i))
        return rows

    def _run(self, rows: list[Row], context: int | None) -> Iterator[Piece]:
        if not rows:
            return iter(())
        if context is not None:
            self.spec.check_context(context, "context")
        return self._run_groups(rows, context or self.spec.context_length)

    def _run_groups(self, rows: list[Row], context: int) -> Iterator[Piece]:
        """Runs the rows as one batch; as two where rope has other factors for long sequences than for short ones.

        Which factors a row gets must depend on that row alone, and they follow from the size of its cache.
        """
        border = self.spec.rope_border
        need = {row.index: min(len(row.prompt) + row.params.max_tokens, context) for row in rows}
        for long in (False, True):
            group = [row for row in rows if (border > 0 and need[row.index] > border) == long]
            for slot, row in enumerate(group):
                row.slot = slot
            if group:
                cache = self.decoder.new_cache(len(group), max(need[row.index] for row in group))
                yield from generate(self.decoder, group, cache)


def _params(sampling: dict[str, Any]) -> SamplingParams:
    known = set(SamplingParams.__dataclass_fields__)
    unknown = sorted(set(sampling) - known)
    if unknown:
        raise OptionError(f"unknown option {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return replace(SamplingParams(), **sampling)


def _answer(row: Row, pieces: list[Piece]) -> Answer:
    logprobs = [p.logprob for p in pieces if p.logprob is not None]
    text = "".join(p.text for p in pieces)
    asked = row.params.logprobs is not None
    reason = row.finish_reason or "length"
    return Answer(text, row.tokens, reason, row.stop, row.stats, logprobs if asked else None)
