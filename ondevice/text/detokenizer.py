"""Token ids to text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ondevice.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns a stream of token ids into text; joined, it is what decoding all ids at once gives.

    Args:
        tokenizer: whose ids they are.
        skip_special: leave special tokens out.
        prompt: ids that come before the stream. The text of the stream is then what decoding both gives beyond the
            prompt's text: the space that some tokenizers remove from the start of a text stays.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, prompt: Sequence[int] = ()) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stripped, self._to_strip = self._pieces.stripped
        self._at_start = True
        for token_id in prompt:
            self.push(token_id)
            if not self._at_start and not self._to_strip:
                break
        # A prompt that ends inside a character is not completed by the answer.
        self._utf8.reset()

    def push(self, token_id: int) -> str:
        """Takes the next token.

        Args:
            token_id: its id.

        Returns:
            The text that it completes; "" while a character is unfinished.
        """
        if token_id in self._skipped:
            return ""
        if not self._at_start:
            return self._strip(self._utf8.decode(self._pieces.of(token_id)))
        self._at_start = not self._pieces.of(token_id)
        return self._strip(self._utf8.decode(self._pieces.first(token_id)))

    def finish(self) -> str:
        """Ends the text.

        Returns:
            U+FFFD for a character that was left unfinished, else "".
        """
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._to_strip and text:
            if not text.startswith(self._stripped):
                self._to_strip = 0
                break
            text = text[1:]
            self._to_strip -= 1
        return text
