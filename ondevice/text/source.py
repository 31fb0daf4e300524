"""What a tokenizer is made of, whichever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import tokenizers

# Tokens that end a turn or a text by convention. A checkpoint often names only one of them as its EOS, and a
# chat model that writes another would talk on with itself.
TURN_ENDS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<turn|>",
        "<|return|>",
        "<|eot|>",
        "<EOT>",
        "[EOT]",
    }
)


class TokenType(IntEnum):
    """What a piece of a vocabulary is; SentencePiece and GGUF have the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class TokenizerSource:
    """The parts that `Tokenizer` is built from.

    Args:
        backend: the `tokenizers` pipeline; `Tokenizer` takes it over and changes it.
        path: file or folder it came from, for messages.
        vocab_size: ids from here on are not the model's.
        special: text of every special token -> id.
        bos_id, eos_id: the main ones, None where there is none.
        prefix, suffix: ids put before and after a text that is encoded with its special tokens.
        stop_ids: every id that ends a generation.
        chat_template: Jinja source, None where there is none.
    """

    backend: tokenizers.Tokenizer
    path: Path
    vocab_size: int
    special: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    stop_ids: frozenset[int]
    chat_template: str | None


def turn_ends(special: Mapping[str, int]) -> set[int]:
    """Ids of the special tokens that end a turn by convention.

    Args:
        special: text of every special token -> id.

    Returns:
        Their ids.
    """
    return {token_id for text, token_id in special.items() if text in TURN_ENDS}
