"""What stands before and after a text that is encoded with its special tokens."""

from __future__ import annotations

import tokenizers
from tokenizers import processors


def write_ends(backend: tokenizers.Tokenizer, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> None:
    """Gives the pipeline a post-processor that adds the ends, so that a saved tokenizer.json has it.

    Args:
        backend: the pipeline.
        prefix, suffix: ids before and after a text.
    """
    text_of = {token_id: backend.id_to_token(token_id) for token_id in (*prefix, *suffix)}
    if text_of:
        backend.post_processor = processors.TemplateProcessing(
            single=[*(text_of[i] for i in prefix), "$A", *(text_of[i] for i in suffix)],
            special_tokens=[(text, token_id) for token_id, text in text_of.items()],
        )


def read_ends(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor puts before and after a text.

    Args:
        backend: the pipeline.

    Returns:
        Ids before and after.
    """
    for probe in ("a", "e", "1", ".", " "):
        ids = backend.encode(probe, add_special_tokens=False).ids
        if ids:
            whole = backend.encode(probe, add_special_tokens=True).ids
            start = next(i for i in range(len(whole)) if whole[i : i + len(ids)] == ids)
            return tuple(whole[:start]), tuple(whole[start + len(ids) :])
    return (), ()
