"""Text to token ids and back."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ondevice.errors import OptionError
from ondevice.text.chat_template import render
from ondevice.text.detokenizer import Detokenizer
from ondevice.text.gguf_tokenizer import read_gguf
from ondevice.text.hub_folder import read_folder
from ondevice.text.literal_guard import LiteralGuard
from ondevice.text.messages import flat_messages
from ondevice.text.pieces import Pieces
from ondevice.text.source import TokenizerSource
from ondevice.text.template_values import plain


class Tokenizer:
    """A model's tokenizer. Encoding is safe to call from several threads.

    Special tokens are matched under private names that no text can hold: what a user types has only ordinary
    tokens, and where special tokens are wanted their text is exchanged for the private name first.

    Args:
        source: the parts, from `from_folder` or `from_gguf`.
    """

    def __init__(self, source: TokenizerSource) -> None:
        self._source = source
        self._backend = source.backend
        added = self._backend.get_added_tokens_decoder()
        self.vocab_size = source.vocab_size
        self.bos_id = source.bos_id
        self.eos_id = source.eos_id
        self.add_bos = source.bos_id is not None and source.bos_id in source.prefix
        self.stop_ids = source.stop_ids
        self.special_ids: frozenset[int] = frozenset(source.special.values())
        self.chat_template = source.chat_template
        self.pieces = Pieces(self._backend, added, self.vocab_size, source.path)
        self._guard = LiteralGuard(source.special)
        # The unknown token stands for characters without a piece; it is not made of its own text.
        self._never_typed = self.special_ids - _unknown(self._backend)
        self._name_privately(added)

    @classmethod
    def from_folder(cls, path: Path) -> Tokenizer:
        """Reads the tokenizer of a Hub folder.

        Args:
            path: folder with tokenizer.json, tokenizer.model, or vocab.json and merges.txt, and the files beside them.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: a file is missing, damaged or contradicts another.
            UnsupportedModelError: a tokenizer of another kind.
        """
        return cls(read_folder(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], path: Path) -> Tokenizer:
        """Builds the tokenizer that a GGUF file's metadata describes.

        Args:
            metadata: key -> plain Python value.
            path: the file, for messages.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: a key is missing, has the wrong type or contradicts another.
            UnsupportedModelError: another kind of vocabulary or pre-tokenizer.
        """
        return cls(read_gguf(metadata, Path(path)))

    def _name_privately(self, added: Mapping[int, AddedToken]) -> None:
        # Private-use characters only: no special token's text can be found inside a name.
        self._mark = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(16))
        self._private = {text: _private_name(self._mark, i) for text, i in self._source.special.items()}
        self._cut = _private_name(self._mark, self.vocab_size)
        self._backend.encode_special_tokens = True
        tokens = [AddedToken(self._cut, normalized=False, special=False)]
        for text, token_id in self._source.special.items():
            old = added[token_id]
            tokens.append(
                AddedToken(
                    self._private[text],
                    single_word=old.single_word,
                    lstrip=old.lstrip,
                    rstrip=old.rstrip,
                    normalized=False,
                    special=False,
                )
            )
        self._backend.add_tokens(tokens)
        self._cut_id = self._backend.token_to_id(self._cut)
        self._real = {
            self._backend.token_to_id(self._private[text]): token_id for text, token_id in self._source.special.items()
        }
        # Longest first: of two tokens that begin alike the longer one is meant.
        texts = sorted(self._source.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts))) if texts else None

    def _exchange(self, text: str) -> str:
        """Puts private names for the special tokens in a text."""
        self._refuse_mark(text)
        if self._special is None:
            return text
        return self._special.sub(lambda match: self._private[match.group()], text)

    def _refuse_mark(self, text: str) -> None:
        if self._mark in text:
            raise OptionError("text: holds this process's private name for special tokens; remove it")

    def _ids(self, text: str) -> list[int]:
        text = _well_formed(text)
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._never_typed.isdisjoint(ids):
            # Some models make a special token of its text by themselves: Unigram, or BPE with merges for it. Cut
            # up it stays text, though a model that begins every word with a space may see one more.
            ids = self._backend.encode(self._guard.cut(text, self._cut), add_special_tokens=False).ids
        real = self._real
        return [real.get(i, i) for i in ids if i != self._cut_id]

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Encodes a text.

        Args:
            text: any text; lone surrogates become U+FFFD.
            add_special: put BOS, and whatever else the model was trained with, around it. A text that already
                begins with BOS gets no second one.
            parse_special: read the text of special tokens as these tokens; else it stays ordinary text.

        Returns:
            Token ids.
        """
        if parse_special:
            text = self._exchange(text)
        else:
            self._refuse_mark(text)
        ids = self._ids(text)
        if not add_special:
            return ids
        has_bos = self.add_bos and ids[:1] == [self.bos_id]
        prefix = [i for i in self._source.prefix if not (has_bos and i == self.bos_id)]
        return [*prefix, *ids, *self._source.suffix]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Renders a conversation with the chat template and encodes it.

        Args:
            messages: dicts with "role" and "content"; content is a text or a list of {"type": "text"} parts.
            add_generation_prompt: end with the beginning of the assistant's turn.
            template_kwargs: further variables of the template, such as tools.

        Returns:
            Token ids. Special tokens are only those that the template itself writes; their text inside
            messages or other variables stays text.

        Raises:
            OptionError: there is no chat template, or the messages are not of that form.
            TemplateError: the template fails or refuses the messages.
        """
        if self.chat_template is None:
            raise OptionError(
                f"{self._source.path}: the model has no chat template; use --raw to send the prompt as it is"
            )
        values = plain({**template_kwargs, "messages": flat_messages(messages)}, "messages")
        sealed, unseal = self._guard.seal(values, self.chat_template)
        text = render(
            self.chat_template,
            sealed.pop("messages"),
            bos_token=self._text_of(self.bos_id),
            eos_token=self._text_of(self.eos_id),
            add_generation_prompt=add_generation_prompt,
            **sealed,
        )
        ids = self._ids(self._exchange(text).translate(unseal))
        if self.bos_id is not None and self.add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decodes token ids.

        Args:
            ids: token ids; an id without a token gives nothing.
            skip_special: leave special tokens out.

        Returns:
            The text; bytes that are not UTF-8 become U+FFFD.
        """
        stream = Detokenizer(self, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.finish()])

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token inside a text.

        Args:
            token_id: any id.

        Returns:
            Its bytes, not always whole characters; empty for an id without a token.
        """
        return self.pieces.of(token_id)

    def _text_of(self, token_id: int | None) -> str | None:
        return None if token_id is None else self._backend.id_to_token(token_id)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json.

        Args:
            folder: an existing folder; `from_folder` on it gives the same ids and stops.
        """
        backend = json.loads(self._backend.to_str())
        backend["added_tokens"] = [t for t in backend["added_tokens"] if t["id"] < self.vocab_size]
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self._text_of(self.bos_id),
            "eos_token": self._text_of(self.eos_id),
            "add_bos_token": self.add_bos,
            "add_eos_token": self.eos_id is not None and self.eos_id in self._source.suffix,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        generation = {"bos_token_id": self.bos_id, "eos_token_id": sorted(self.stop_ids)}
        _write(folder / "tokenizer.json", backend)
        _write(folder / "tokenizer_config.json", {k: v for k, v in config.items() if v is not None})
        _write(folder / "generation_config.json", {k: v for k, v in generation.items() if v not in (None, [])})


def _unknown(backend: tokenizers.Tokenizer) -> set[int]:
    """What the model makes of a character that no vocabulary has, where that is not its bytes."""
    try:
        return {token.id for token in backend.model.tokenize("\U0010ffff")}
    except Exception:  # the library raises bare Exception for a model without an unknown token
        return set()


def _private_name(mark: str, number: int) -> str:
    return f"{mark}{''.join(chr(0xE100 + int(digit)) for digit in str(number))}\ue200"


def _well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates as U+FFFD; UTF-8 has neither."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
