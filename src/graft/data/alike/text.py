"""What two texts have in common beneath their spelling: normalised text, words, and windows of words as numbers.

Speaks of characters, words and shingles. Knows no conversations and no files. Batches of texts are handled as flat
numpy arrays: T tokens of n texts lie behind each other, and `offsets` [n + 1] says where each text begins.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]

SHINGLE_WORDS = 2
"""Words of a shingle. One changed word changes two shingles: a text of 20 words keeps a Jaccard similarity of 0.8.
Longer shingles are usual for web pages; the questions of an instruction set are short."""
SHINGLE_CHARACTERS = 3
"""Characters of a shingle in a script without spaces: about as much as two words say."""

_UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai and Lao, Burmese, Khmer
    *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x3035)),  # radicals, Han signs and numerals
    *((0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF)),  # Hiragana, Katakana, Bopomofo
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF)),  # Han
    *((0x1AFF0, 0x1B16F), (0x20000, 0x3FFFF)),  # more Kana, more Han
)
"""Scripts that put no blanks between words, as first and last code points: there a character counts as a word."""
_SELECTORS = (0xFE00, 0xFE0F)
"""Variation selectors: how a character looks, not what it says."""
_PLANES = 0x40000
"""No letter, digit, symbol or punctuation has a higher code point."""
BREAK, WORD, CHARACTER, SYMBOL = range(4)
"""Kinds of characters: BREAK ends a word, WORD is part of one, the others are tokens by themselves."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_STEP = 0xD6E8FEB86659FD93


def normalise(text: str) -> str:
    """NFKC, case-folded, without blanks and punctuation; only without blanks where nothing else would be left."""
    folded = "".join(fold(text).split())
    return folded.translate(_no_punctuation()) or folded


def fold(text: str) -> str:
    """One spelling of case and width: NFKC, case-folded."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def digest(*parts: str) -> bytes:
    """16 bytes that tell sequences of texts apart, on every machine the same."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.digest()


@functools.cache
def _no_punctuation() -> dict[int, None]:
    return {code: None for code in range(_PLANES) if unicodedata.category(chr(code)).startswith("P")}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The T tokens of n texts, as hashes."""

    hashes: Hashes
    """[T] the same number for the same token."""
    kinds: npt.NDArray[np.uint8]
    """[T] WORD, CHARACTER (of a script without spaces) or SYMBOL."""
    offsets: Offsets
    """[n + 1] text i has the tokens offsets[i] to offsets[i + 1]."""

    def without_symbols(self) -> Tokens:
        """Only the words and characters."""
        said = self.kinds != SYMBOL
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(said)])
        return Tokens(self.hashes[said], self.kinds[said], before[self.offsets])


def tokenise(texts: Sequence[str]) -> Tokens:
    """Words, without regard to case, width, blanks and punctuation, of every text.

    A word is a run of letters, marks and digits. Each character of a script without spaces, and each symbol, is a
    token of its own: `3+4` and `3=4` differ, `don't` is `don` and `t`.
    """
    folded = [fold(text) for text in texts]
    lengths = np.fromiter((len(text) + 1 for text in folded), np.int64, len(folded))
    ends = np.cumsum(lengths)
    joined = "\n".join([*folded, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)  # [C]
    kinds = _kinds()[codes]
    starts = kinds >= CHARACTER
    word = kinds == WORD
    starts[1:] |= word[1:] & ~word[:-1]
    starts[:1] |= word[:1]
    used = np.flatnonzero(kinds)  # [M] the characters that belong to a token
    begins = np.flatnonzero(starts[used])  # [T] where in `used` a token begins
    hashes = _hash_runs(codes[used], begins)
    first = used[begins]
    offsets = np.concatenate([np.zeros(1, np.int64), np.searchsorted(first, ends)])
    return Tokens(hashes, kinds[first], offsets)


def windows(tokens: Tokens, words: int, characters: int) -> tuple[Hashes, Offsets]:
    """A hash of every window of consecutive tokens, and the offsets [n + 1] of each text's windows.

    A window that begins with a character or symbol holds `characters` tokens, any other one `words`. Windows do not
    reach over the end of their text, so a short text may have none.
    """
    total = len(tokens.hashes)
    hashes = np.zeros(total, np.uint64)
    sizes = np.where(tokens.kinds == WORD, words, characters)
    for size in {words, characters}:
        mine = np.flatnonzero((sizes == size) & (np.arange(total) + size <= total))
        value = np.full(len(mine), size, np.uint64)
        for step in range(size):
            value = (value + tokens.hashes[mine + step]) * np.uint64(_STEP)
            value ^= value >> np.uint64(29)
        hashes[mine] = _mix(value)
    text_end = np.repeat(tokens.offsets[1:], np.diff(tokens.offsets))
    whole = np.arange(total) + sizes <= text_end
    counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(whole)])
    return hashes[whole], counts[tokens.offsets]


def shingles(text: str) -> Hashes:
    """The set of a text's shingles as sorted hashes; see `shingle_sets`."""
    return shingle_sets([text])[0]


def shingle_sets(texts: Sequence[str]) -> tuple[Hashes, Offsets]:
    """The set of shingles of every text: sorted distinct hashes below 2**32, and offsets [n + 1].

    A shingle is SHINGLE_WORDS consecutive words, or SHINGLE_CHARACTERS where it begins with a symbol or in a script
    without spaces. A
    text too short for one is a single shingle, made from all that `normalise` leaves of it: it is like its equals
    only. 32 bits keep a set small; two different shingles of two texts with 1,000 each meet once in 4,000 pairs of
    texts, and then the similarity is off by a thousandth.
    """
    values, offsets = windows(tokenise(texts), SHINGLE_WORDS, SHINGLE_CHARACTERS)
    owner = np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(offsets))
    short = np.flatnonzero(np.diff(offsets) == 0)
    alone = [int.from_bytes(digest(normalise(texts[index]))[:8], "little") for index in short.tolist()]
    values = np.concatenate([values, np.array(alone, np.uint64)])
    owner = np.concatenate([owner, short.astype(np.uint64)])
    keys = np.sort(owner << np.uint64(32) | values >> np.uint64(32))
    keys = keys[np.concatenate([np.ones(min(len(keys), 1), np.bool_), keys[1:] != keys[:-1]])]
    bounds = np.searchsorted(keys, np.arange(len(texts) + 1, dtype=np.uint64) << np.uint64(32))
    return keys & np.uint64(0xFFFFFFFF), bounds.astype(np.int64)


@functools.cache
def _kinds() -> npt.NDArray[np.uint8]:
    """[code points] whether a character breaks words, belongs to a word, or is a token of its own."""
    of_category = {"L": WORD, "M": WORD, "N": WORD, "S": SYMBOL}
    kinds = np.full(sys.maxunicode + 1, BREAK, np.uint8)
    kinds[:_PLANES] = [of_category.get(unicodedata.category(chr(code))[0], BREAK) for code in range(_PLANES)]
    for first, last in _UNSPACED:
        span = kinds[first : last + 1]
        span[span == WORD] = CHARACTER
    kinds[_SELECTORS[0] : _SELECTORS[1] + 1] = BREAK
    return kinds


def _hash_runs(codes: npt.NDArray[np.uint32], begins: Offsets) -> Hashes:
    """[T] a polynomial hash, modulo 2**64, of each run of the code points [M] that begins at `begins`."""
    if not len(begins):
        return np.zeros(0, np.uint64)
    lengths = np.diff(begins, append=len(codes))
    place = np.arange(len(codes)) - np.repeat(begins, lengths)
    powers = np.multiply.accumulate(np.full(int(lengths.max()), _BASE, np.uint64))
    terms = _mix(codes.astype(np.uint64) + np.uint64(1)) * powers[place]
    return _mix(np.add.reduceat(terms, begins))


def _mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers that leaves no pattern: the finaliser of splitmix64 (Steele et al., 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
