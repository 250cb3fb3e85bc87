"""Proves without decoding that ids say a text.

Speaks ids and text. Knows no messages and no targets.

A decoder of byte-level tokenizers joins the bytes of its tokens, and nothing else (`decode_chain` in tokenizers'
byte_level.rs). So where the bytes of the tokens are those of the text, decoding gives the text; comparing them costs a
tenth of it. Where they are not, or the tokenizer has another decoder, nothing is said, and the decoder must be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Bytes(dict[int, bytes]):
    """Id -> bytes that a byte-level decoder makes of it, filled as ids are met."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend

    def __missing__(self, token_id: int) -> bytes:
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:  # the decoder passes over it
            self[token_id] = b""
        elif all(char in _BYTE_OF for char in token):
            self[token_id] = bytes(_BYTE_OF[char] for char in token)
        else:
            self[token_id] = token.encode()
        return self[token_id]

    def say(self, ids: Sequence[int], text: str) -> bool:
        """Whether the ids certainly decode to the text; False says nothing."""
        return b"".join(map(self.__getitem__, ids)) == text.encode("utf-8", "surrogatepass")


def bytes_of(tokenizer: PreTrainedTokenizerBase) -> Bytes | None:
    """The bytes of a tokenizer's tokens, or None where its decoder does more than join them."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    backend = tokenizer.backend_tokenizer
    return Bytes(backend) if type(backend.decoder) is decoders.ByteLevel else None


def _byte_of() -> dict[str, int]:
    """The characters by which GPT-2's vocabulary writes bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


_BYTE_OF = _byte_of()

BYTE_LETTERS = {byte: char for char, byte in _BYTE_OF.items()}
"""Byte -> the character that stands for it in a byte-level vocabulary; a table for `str.translate`."""
