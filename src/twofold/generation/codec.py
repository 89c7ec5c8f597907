"""How a model reads and writes text: a tokenizer, or the bytes of UTF-8.

Text comes out in pieces that are whole: a character whose bytes are not all there yet waits for the rest.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from twofold.errors import TwofoldError
from twofold.spec import ModelSpec

BYTES = 256
REPLACEMENT = "\ufffd"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Decoder(Protocol):
    """Turns tokens into pieces of text, one token after another."""

    def push(self, token: int) -> str:
        """The text that is certain now; empty while a character is not whole."""

    def end(self) -> str:
        """What is left, a character that never became whole as U+FFFD."""


class Codec(Protocol):
    """How a model reads and writes text. ``end_token`` ends a text (-1: nothing does)."""

    end_token: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""

    def decoder(self, prompt: list[int]) -> Decoder:
        """A decoder of what follows the prompt."""


class ByteCodec:
    """Tokens are bytes of UTF-8."""

    end_token = -1

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode("utf-8"))

    def decoder(self, prompt: list[int]) -> Decoder:
        """A decoder of bytes; a prompt of whole characters leaves nothing to be completed."""
        del prompt
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class TokenizerCodec:
    """Tokens are those of a tokenizer of Transformers'."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.end_token = -1 if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around every text."""
        return list(self.tokenizer(text)["input_ids"])

    def decoder(self, prompt: list[int]) -> Decoder:
        """A decoder that knows the end of the prompt: whether a blank belongs between two tokens depends on both."""
        return _TokenDecoder(self.tokenizer, prompt)


class _TokenDecoder:
    """Decodes the last piece's tokens with and without the new ones; the difference is the new text.

    A character of UTF-8 has at most four bytes, so what is no text after more than four tokens will never be.
    """

    LONGEST = 4

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        self._known, self._new = self._whole_end(prompt), list[int]()

    def push(self, token: int) -> str:
        self._new.append(token)
        piece = self._piece()
        if not piece or (piece.endswith(REPLACEMENT) and len(self._new) <= self.LONGEST):
            return ""
        self._known, self._new = self._new, []
        return piece

    def end(self) -> str:
        return self._piece() if self._new else ""

    def _piece(self) -> str:
        return self._text(self._known + self._new)[len(self._text(self._known)) :]

    def _whole_end(self, prompt: list[int]) -> list[int]:
        """The fewest last tokens of the prompt that begin with a whole character."""
        for count in range(1, min(len(prompt), 4 * self.LONGEST) + 1):
            text = self._text(prompt[-count:])
            if text and not text.startswith(REPLACEMENT):
                return prompt[-count:]
        return []

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def codec_of(folder: Path, spec: ModelSpec) -> Codec:
    """The tokenizer of a model's folder, or bytes. Raises TwofoldError where there is neither, and for a tokenizer that cannot be read."""
    return codec_for(folder, spec.vocab_size)


def codec_for(folder: Path, vocab_size: int) -> Codec:
    """:func:`codec_of` a model of so many tokens, whoever made it."""
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return TokenizerCodec(_tokenizer(folder))
    if vocab_size == BYTES:
        return ByteCodec()
    raise TwofoldError(
        f"{folder} holds no tokenizer, and the model's {vocab_size} tokens are no bytes: save the tokenizer beside the model."
    )


def _tokenizer(folder: Path) -> Any:
    try:
        if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (a tokenizer's own code may raise anything)
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise TwofoldError(f"The tokenizer in {folder} cannot be read ({reason}): save it there again.") from None
