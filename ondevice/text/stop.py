"""Stop strings in streamed text."""

from __future__ import annotations

from collections.abc import Sequence

from ondevice.errors import OptionError


class StopMatcher:
    """Cuts a stream of text at the first stop string, and holds back no more than it must.

    Args:
        stops: the stop strings; none is allowed, an empty one is not.

    Raises:
        OptionError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or any(not isinstance(stop, str) or not stop for stop in stops):
            raise OptionError(f"stop={stops!r}: a list of texts that are not empty is needed")
        self._stops = tuple(dict.fromkeys(stops))
        # What may still grow into a stop string: looked up for each suffix, longest first.
        self._beginnings = frozenset(stop[:size] for stop in self._stops for size in range(1, len(stop)))
        self._longest = max((len(stop) for stop in self._stops), default=1) - 1
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece of text.

        Args:
            text: new text, of any length.

        Returns:
            Text that is safe to show, and the stop string that matched, if one did. The match and all that
            follows it are dropped. Of several, the one that is complete first wins.
        """
        if self._matched is not None:
            return "", self._matched
        buffer = self._held + text
        # The first to be complete wins, then the longest: the cut does not depend on how the text was split.
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := buffer.find(stop)) >= 0]
        if hits:
            _, start, self._matched = min(hits)
            self._held = ""
            return buffer[:start], self._matched
        longest = min(self._longest, len(buffer))
        keep = next((n for n in range(longest, 0, -1) if buffer[-n:] in self._beginnings), 0)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        return buffer[:cut], None

    def finish(self) -> str:
        """Ends the text.

        Returns:
            What was held back, as no stop string can be completed any more.
        """
        held, self._held = self._held, ""
        return held
