"""The metadata of a GGUF file's tokenizer, with every value checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from ondevice.errors import CheckpointError
from ondevice.text.source import TokenType

PREFIX = "tokenizer.ggml."


class GgufKeys:
    """Typed, checked access to `tokenizer.ggml.*`; every method raises CheckpointError that names its key.

    Args:
        metadata: key -> plain Python value.
        path: the file, for messages.
    """

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self._metadata = metadata
        self._path = path

    def _error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(self._path, problem, PREFIX + name)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """Value of a key.

        Args:
            name: of the key, without its beginning.
            kind: exact type.
            default: where the key is missing; None if it must be there.

        Returns:
            The value.
        """
        value = self._metadata.get(PREFIX + name, default)
        if value is None:
            raise self._error(name, "missing; the file has no usable tokenizer, fetch another one")
        # bool is an int in Python, but not in the file.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self._error(name, f"{kind.__name__} expected, not {type(value).__name__}")
        return value

    def _list(self, name: str, kind: type, default: Any = None) -> list[Any]:
        values: list[Any] = self.get(name, list, default)
        # type(), not isinstance: it refuses bools among ints. As a set it is quick on 250,000 entries.
        if not set(map(type, values)) <= {kind}:
            wrong = next(i for i, value in enumerate(values) if type(value) is not kind)
            raise self._error(name, f"{kind.__name__} expected at [{wrong}], not {type(values[wrong]).__name__}")
        return values

    def tokens(self) -> list[str]:
        """Texts of all tokens.

        Returns:
            The texts, different where they are not empty.
        """
        tokens = self._list("tokens", str)
        if not tokens:
            raise self._error("tokens", "empty")
        if len(set(tokens)) < len(tokens):
            # Several vocabularies pad with empty texts; they are never matched, so only real texts must differ.
            first: dict[str, int] = {}
            for index, text in enumerate(tokens):
                if first.setdefault(text, index) != index and text:
                    raise self._error("tokens", f"{text!r} stands twice, at [{first[text]}] and [{index}]")
        return tokens

    def token_types(self, count: int) -> list[int]:
        """Type of every token.

        Args:
            count: of tokens.

        Returns:
            The types.
        """
        types = self._list("token_type", int, [int(TokenType.NORMAL)] * count)
        if len(types) != count:
            raise self._error("token_type", f"{len(types)} entries for {count} tokens")
        known = set(map(int, TokenType))
        if not known.issuperset(types):
            wrong = next(i for i, value in enumerate(types) if value not in known)
            raise self._error("token_type", f"{types[wrong]} at [{wrong}] is no token type (1 to 6)")
        return types

    def scores(self, count: int) -> list[float]:
        """Score of every token; higher is merged first.

        Args:
            count: of tokens.

        Returns:
            The scores, all finite.
        """
        scores = self._list("scores", float)
        if len(scores) != count:
            raise self._error("scores", f"{len(scores)} entries for {count} tokens; convert the model again")
        wrong = next((i for i, value in enumerate(scores) if not math.isfinite(value)), None)
        if wrong is not None:
            raise self._error("scores", f"{scores[wrong]} at [{wrong}] is no score; convert the model again")
        return scores

    def merges(self, ids: Mapping[str, int]) -> list[tuple[str, str]]:
        """Merges of a BPE vocabulary, best first.

        Args:
            ids: text of every token -> id.

        Returns:
            Pairs of tokens.
        """
        merges = self._list("merges", str)
        halves = " ".join(merges).split(" ") if merges else []
        left, right = halves[::2], halves[1::2]
        # All at once: one by one, checking takes longer than building the tokenizer.
        needed = chain(halves, map(str.__add__, left, right))
        one_space = set(map(str.count, merges, repeat(" "))) <= {1}
        if not (one_space and "" not in halves and all(map(ids.__contains__, needed))):
            self._check_merges(merges, ids)
        if len(set(merges)) != len(merges):
            twice = next(merge for merge, times in Counter(merges).items() if times > 1)
            raise self._error("merges", f"{twice!r} stands twice")
        return list(zip(left, right))

    def _check_merges(self, merges: list[str], ids: Mapping[str, int]) -> None:
        """Names the first merge that is none."""
        for index, merge in enumerate(merges):
            left, space, right = merge.partition(" ")
            if not space or not left or not right or " " in right:
                raise self._error("merges", f"{merge!r} at [{index}] is not two tokens and one space")
            for text in (left, right, left + right):
                if text not in ids:
                    raise self._error("merges", f"{merge!r} at [{index}] needs {text!r}, which is no token")

    def token_id(self, name: str, count: int) -> int | None:
        """Id of a token that has a role.

        Args:
            name: of the key.
            count: of tokens.

        Returns:
            The id, None where the key is missing.
        """
        if PREFIX + name not in self._metadata:
            return None
        value: int = self.get(name, int)
        if not 0 <= value < count:
            raise self._error(name, f"{value} is outside the vocabulary of {count} tokens")
        return value

    def end(self, flag: str, id_name: str, token_id: int | None, default: bool) -> tuple[int, ...]:
        """What is put before or after a text.

        Args:
            flag: name of the key that says whether.
            id_name: name of the key with the id, for messages.
            token_id: the id.
            default: where the flag is missing.

        Returns:
            The id, or nothing.
        """
        if not self.get(flag, bool, default):
            return ()
        if token_id is None:
            raise self._error(flag, f"true, but {PREFIX}{id_name} is missing")
        return (token_id,)

    def template(self) -> str | None:
        """The chat template.

        Returns:
            Jinja source, None where there is none.
        """
        key = "tokenizer.chat_template"
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(self._path, f"str expected, not {type(value).__name__}", key)
        return value or None
