"""Bytes as tokens, in the form that Transformers and the harness read."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTES = 256


def byte_signs() -> list[str]:
    """The printable sign that stands for each byte in byte-level vocabularies: itself where it is one, else the next from U+0100 on.

    Source: GPT-2's published encoder, ``bytes_to_unicode``.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(BYTES)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token b is byte b of UTF-8 and there are no others; byte 0 pads, and ends a text."""
    signs = byte_signs()
    tokenizer = Tokenizer(models.BPE(vocab={sign: byte for byte, sign in enumerate(signs)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=signs[0], eos_token=signs[0])
