"""A conversation with a model, without a terminal: messages, settings and what became of the last answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ondevice.errors import ContextLengthError, OptionError
from ondevice.generation.batch import Stats
from ondevice.generation.sampling import SamplingParams

if TYPE_CHECKING:
    from ondevice.model import Model

SETTINGS = {
    "max_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
    "stop": str,
}
"""What can be set, and of which kind it is."""
OPTIONAL = ("seed", "stop")
SHORT = {"temp": "temperature"}


class Conversation:
    """What was said, and the session that holds its keys and values.

    Args:
        model: that answers.
        params: how its answers are chosen.
        system: a system message.
        context: tokens that the conversation may hold; by default what `Model.session` takes.

    Attributes:
        messages: chat messages without the system message.
        reason: why the last answer ended: "stop", "length", "stopped" by the user, or "" before the first.

    Raises:
        OptionError: the model has no chat template.
    """

    def __init__(
        self, model: Model, params: SamplingParams, system: str | None = None, context: int | None = None
    ) -> None:
        if model.tokenizer.chat_template is None:
            raise OptionError(
                f"{model.name} has no chat template, so it cannot chat; "
                f"`ondevice generate {model.name} --raw -p TEXT` goes on from a text"
            )
        self.model, self.params, self.system = model, params, system
        self.session = model.session(context)
        self.messages: list[dict[str, str]] = []
        self.reason = ""
        self._kept = False

    def ask(self, text: str) -> Iterator[str]:
        """Answers, piece by piece. Closed half-way, it keeps what was answered so far.

        A turn of which nothing was answered leaves no trace: two messages of the user in a row would be refused by many
        chat templates.

        Raises:
            ContextLengthError: the conversation does not fit any more.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        ids = self.model.encode(turn, system=self.system)
        if len(ids) >= self.session.context:
            raise ContextLengthError(
                f"the conversation would take {len(ids)} of {self.session.context} tokens; /clear starts anew, and "
                "`ondevice chat --context N` makes room where the model allows it"
            )
        self.reason, answer = "stopped", ""
        try:
            for piece in self.session.stream(ids, self.params):
                answer += piece.text
                self.reason = piece.finish_reason or self.reason
                yield piece.text
        finally:
            self._kept = bool(answer) or self.reason == "stop"
            if self._kept:
                self.messages = [*turn, {"role": "assistant", "content": answer}]

    @property
    def note(self) -> str:
        """What the user should know about how the last answer ended; "" if it ended by itself."""
        if self.reason == "stopped":
            return "stopped" if self._kept else "stopped before the answer began; the message is forgotten"
        if self.reason != "length":
            return ""
        if self.stats.generated_tokens < self.params.max_tokens:
            return f"the context of {self.session.context} tokens is full: /clear starts anew, --context N makes room"
        return f"cut off after {self.params.max_tokens} tokens: /set max_tokens N allows more"

    @property
    def stats(self) -> Stats:
        """Counts and times of the last answer."""
        return self.session.stats

    def clear(self) -> None:
        """Forgets what was said; the system message and the settings stay."""
        self.messages, self.reason = [], ""

    def set(self, key: str, value: str) -> None:
        """Changes a setting.

        Args:
            key: one of SETTINGS.
            value: as typed; "none" takes a seed or stop string away.

        Raises:
            OptionError: no such setting, or not a value for it; nothing has changed.
        """
        key = SHORT.get(key, key)
        if key not in SETTINGS:
            raise OptionError(f"no setting {key!r}; known are {', '.join(SETTINGS)}")
        parsed: Any
        if key in OPTIONAL and value == "none":
            parsed = () if key == "stop" else None
        else:
            try:
                parsed = SETTINGS[key](value)
            except ValueError:
                kind = "a whole number" if SETTINGS[key] is int else "a number"
                raise OptionError(f"{key} is {value!r}; it must be {kind}") from None
        self.params = replace(self.params, **{key: parsed})

    def settings(self) -> str:
        """The settings in one line."""
        shown = {key: getattr(self.params, key) for key in SETTINGS}
        shown["seed"] = "random" if self.params.seed is None else self.params.seed
        shown["stop"] = " ".join(map(repr, self.params.stop))
        return ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in shown.items()
            if value != ""
        )
