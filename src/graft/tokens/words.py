"""Text to ids word by word: a byte-level tokenizer's own model is asked once for each distinct word.

Speaks text and ids. Knows no control tokens, no messages and no targets.

A byte-level BPE tokenizer cuts a text into words by a pattern and tokenises each word by itself: its ids are a function
of the word alone. So `Words` cuts a text by the same pattern and looks its words up; the tokenizer's own model answers
for a word that is met for the first time. Real text repeats its words: the table answers for nine of ten.

`words_of` gives a `Words` only where that is the whole of what the tokenizer does (no normaliser or NFC, one pattern,
bytes, BPE without chance), and a text is spelled only if every character of it is understood (`Alphabet`):

- Whether the pattern's `\\p{L}`, `\\p{N}`, `\\s` take the character is asked of the tokenizer's own engine, and must be
  what the `regex` library says: the two may know different versions of Unicode.
- NFC leaves every text of such characters as it is, in every version of Unicode: the character is its own NFC, has
  combining class 0 and is not the second half of a composed character. Only assigned characters are taken, and
  Unicode never gives them other compositions (Unicode Standard Annex 15, "Stability of normalized forms").
- Without regard to case it is no letter of the pattern's contractions ('s, 're ...).

A word is kept only if the bytes of its ids are the word's: then the ids of a text of such words decode to that text,
because the decoder joins bytes (`proof`). Where any of this does not hold, `spell` says so and the tokenizer is asked.
"""

from __future__ import annotations

import array
import functools
import json
import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import regex

from graft.tokens.proof import BYTE_LETTERS, Bytes, bytes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_WORDS = 1 << 17
"""Words kept, about 30 MB; a table that is full begins anew, so that it follows the data."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern that a ByteLevel pre-tokenizer has by itself (tokenizers' byte_level.rs; Radford et al. 2019)."""

_ATOM = (
    r"(?:\(\?i:'[a-z]+(?:\|'[a-z]+)*\)|'[a-z]+|\(\?!\\S\)|\\p\{[A-Z][a-z]?\}|\\[srn]| "
    r"|\[\^?(?:\\p\{[A-Z][a-z]?\}|\\[srn]|[/ ])+\])"
)
_UNDERSTOOD = re.compile(rf"(?:{_ATOM}(?:[?*+]|\{{\d,\d\}})?)+(?:\|(?:{_ATOM}(?:[?*+]|\{{\d,\d\}})?)+)*")
"""Patterns that mean the same to both engines, given what their classes hold; most since GPT-2 do."""


class NotByWords(Exception):
    """A text that the tokenizer must be asked for."""


class Words(dict[str, bytes]):
    """Word -> its ids as int32 bytes, filled as words are met."""

    def __init__(self, pattern: str, model: Any, composes: bool, proof: Bytes) -> None:
        """Words of a pattern, answered by the tokenizer's model. `composes`: texts are normalised to NFC first."""
        super().__init__()
        self._cut: Callable[[str], list[str]] = regex.compile(pattern).findall
        self._known = self.__getitem__
        self._alphabet = Alphabet(pattern, composes)
        self._composes = composes
        self._model = model
        self._proof = proof

    def spell(self, text: str) -> bytes:
        """Ids of a text without control tokens, as int32 bytes; they are proven to decode to the text.

        Raises:
            NotByWords: the tokenizer must be asked.
        """
        words = self._cut(text)
        if "".join(words) != text:  # something between the words, which is a word to the tokenizer
            raise NotByWords
        return b"".join(map(self._known, words))

    def leaves(self, text: str) -> bool:
        """Whether the normaliser leaves a text as it is."""
        return not self._composes or unicodedata.normalize("NFC", text) == text

    def __missing__(self, word: str) -> bytes:
        if not all(map(self._alphabet.__getitem__, word)):
            raise NotByWords
        letters = word.encode().decode("latin-1").translate(BYTE_LETTERS)
        ids = [token.id for token in self._model.tokenize(letters)]
        if not self._proof.say(ids, word):
            raise NotByWords
        if len(self) >= MOST_WORDS:
            self.clear()
        found = self[word] = array.array("i", ids).tobytes()
        return found


class Alphabet(dict[str, bool]):
    """Character -> whether it means the same to both engines and to every normaliser, filled as characters are met."""

    def __init__(self, pattern: str, composes: bool) -> None:
        super().__init__()
        classes = sorted(set(re.findall(r"\\p\{\w+\}|\\s", pattern.replace(r"\S", r"\s"))))
        self._here = [regex.compile(one).match for one in classes]
        self._there = [_engine(one) for one in classes]
        self._contractions = "".join(re.findall(r"'[a-z]+", pattern))
        self._composes = composes

    def __missing__(self, char: str) -> bool:
        alike = all(
            (here(char) is not None) == there(char) for here, there in zip(self._here, self._there, strict=True)
        )
        self[char] = alike and self._case_is_plain(char) and (not self._composes or _stands_alone(char))
        return self[char]

    def _case_is_plain(self, char: str) -> bool:
        return char.isascii() or char.casefold() not in self._contractions


def _engine(one: str) -> Callable[[str], bool]:
    """Whether the tokenizers library takes a character for one of a class."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(one), "removed")
    return lambda char: not split.pre_tokenize_str(char)


def _stands_alone(char: str) -> bool:
    """Whether NFC leaves the character as it is, beside any other such character, in every version of Unicode."""
    assigned = unicodedata.category(char) not in ("Cn", "Cs", "Co")
    alone = unicodedata.combining(char) == 0 and unicodedata.normalize("NFC", char) == char
    return assigned and alone and char not in _second_halves()


@functools.cache
def _second_halves() -> frozenset[str]:
    """Characters that NFC may join to the one before: those that a composed one ends with, and Hangul's letters."""
    found = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A7, 0x11C3))}
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return frozenset(found)


def words_of(tokenizer: PreTrainedTokenizerBase) -> Words | None:
    """The words of a tokenizer, or None where it does anything else than cut text by a pattern into words of bytes."""
    from tokenizers import models

    proof = bytes_of(tokenizer)
    if proof is None:
        return None
    backend = cast("Any", tokenizer).backend_tokenizer
    model, normalizer = backend.model, _state(backend.normalizer)
    pattern = _pattern_of(_state(backend.pre_tokenizer))
    by_chance = type(model) is models.BPE and model.dropout
    if pattern is None or type(model) is not models.BPE or by_chance or normalizer not in (None, {"type": "NFC"}):
        return None
    return Words(pattern, model, normalizer is not None, proof)


def _pattern_of(pre_tokenizer: Any) -> str | None:
    """The pattern by which a pre-tokenizer cuts words of bytes, or None where it does anything else."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if _UNDERSTOOD.fullmatch(pattern):
            return pattern
    return None


def _state(part: Any) -> Any:
    """What a part of a tokenizer is, as tokenizer.json writes it."""
    return None if part is None else json.loads(part.__getstate__())
