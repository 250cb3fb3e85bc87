"""Which conversations give away an evaluation: by the same text, by nearly the same, or by 13 words in a row.

Speaks of conversations, n-grams and evaluation rows. Knows no files beyond the places named in what it finds.

The n-gram test is that of GPT-3 (Brown et al., 2020, appendix C): one 13-gram in common is enough, unless it
is the wording of the task, which many evaluation rows have and which says nothing about any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from graft.data.alike.dedup import NEAR, SKETCHED_AT_ONCE, conversation_text
from graft.data.alike.sketch import Index, bands_for, candidates, collect, similar, sketch
from graft.data.alike.text import Hashes, digest, normalise, tokenise, windows
from graft.types import Conversation, Origin

Kind = Literal["exact", "near", "13-gram"]

GRAM = 13
"""Consecutive tokens of an n-gram: words, or characters of a script without spaces."""
PHRASE = 7
"""Consecutive tokens of a phrase: over half an n-gram."""
COMMON = 10
"""A phrase in more evaluation prompts than this, or in over half of them, is the wording of the task; an n-gram with
such a phrase in it is no leak. (GPT-3 passed over n-grams found more than 10 times.)"""


@dataclass(frozen=True, slots=True)
class Overlap:
    """What of the evaluation a conversation gives away."""

    kind: Kind
    score: float
    """exact: 1; near: Jaccard similarity; 13-gram: share of the evaluation row's 13-grams that occur."""
    against: Origin


class Evaluation:
    """An index of evaluation rows: of each, its first prompt and its whole text without the system's are looked for.

    Looked at in a conversation are each user turn and its whole text. Rows of equal text count as the first of them.
    """

    def __init__(self, rows: Iterable[Conversation], threshold: float = NEAR, gram_share: float = 0.0) -> None:
        """Index the rows.

        `threshold` is the Jaccard similarity of a near overlap; `gram_share` the least share of an evaluation row's
        13-grams that must occur in a conversation, 0 for any one.
        """
        self._threshold = threshold
        self._gram_share = gram_share
        self._origins: list[Origin] = []
        self._exact: dict[bytes, int] = {}
        pieces: list[str] = []
        owners: list[int] = []
        wholes: list[str] = []
        prompts: list[int] = []
        self.rows = 0
        for row in rows:
            self.rows += 1
            number, whole = len(self._origins), conversation_text(row)
            texts = [text for text in dict.fromkeys((*_prompts(row)[:1], whole)) if text.strip()]
            keys = [digest(normalise(text)) for text in texts]
            new = [text for text, key in zip(texts, keys, strict=True) if self._exact.setdefault(key, number) == number]
            if new:
                pieces += new
                owners += [number] * len(new)
                wholes.append(whole)
                prompts.append(self._exact[keys[0]])
                self._origins.append(row.origin)
        self._owners: Index = np.array(owners, np.int64)
        bands = bands_for(threshold)
        self._sketches = collect((sketch(part, bands) for part in _parts(pieces)), bands)
        self._orders = np.argsort(self._sketches.bands, axis=0, kind="stable")
        self._grams, self._gram_rows, self._gram_counts = _index(wholes, np.array(prompts, np.int64))

    def overlaps(self, conversations: Sequence[Conversation]) -> list[Overlap | None]:
        """For each conversation the overlap found: exact before near before 13-gram, then the highest score."""
        wholes = [conversation_text(conversation) for conversation in conversations]
        pieces = [
            list(dict.fromkeys((*_prompts(conversation), whole)))
            for conversation, whole in zip(conversations, wholes, strict=True)
        ]
        found: list[Overlap | None] = [self._same(of_one) for of_one in pieces]
        for look in (self._near, self._gram):
            rest = [index for index, overlap in enumerate(found) if overlap is None]
            for index, overlap in look([pieces[index] for index in rest]).items():
                found[rest[index]] = overlap
        return found

    def _same(self, pieces: Sequence[str]) -> Overlap | None:
        for piece in pieces:
            row = self._exact.get(digest(normalise(piece)))
            if row is not None:
                return Overlap("exact", 1.0, self._origins[row])
        return None

    def _near(self, pieces: Sequence[Sequence[str]]) -> dict[int, Overlap]:
        flat = [piece for of_one in pieces for piece in of_one]
        if not flat or not self._origins:
            return {}
        owner = np.repeat(np.arange(len(pieces)), [len(of_one) for of_one in pieces])
        mine = sketch(flat, self._sketches.bands.shape[1])
        a, b = candidates(mine, self._sketches, self._orders)
        score = similar(mine, a, self._sketches, b, self._threshold)
        near = score >= self._threshold
        return self._best("near", owner[a[near]], self._owners[b[near]], score[near])

    def _gram(self, pieces: Sequence[Sequence[str]]) -> dict[int, Overlap]:
        """The last piece of each is its whole text."""
        grams, offsets = _windows([of_one[-1] for of_one in pieces], GRAM)
        first = np.searchsorted(self._grams, grams, side="left")
        count = np.searchsorted(self._grams, grams, side="right") - first
        hits = np.flatnonzero(count)
        if not len(hits):
            return {}
        place = np.repeat(first[hits] - (np.cumsum(count[hits]) - count[hits]), count[hits]) + np.arange(count.sum())
        owner = np.repeat(np.searchsorted(offsets, hits, side="right") - 1, count[hits])
        # Each n-gram of an evaluation row counts once, however often it is said.
        said = np.unique(owner * len(self._grams) + place)
        owner, rows = said // len(self._grams), self._gram_rows[said % len(self._grams)]
        both, shared = np.unique(owner * len(self._origins) + rows, return_counts=True)
        owner, rows = both // len(self._origins), both % len(self._origins)
        score = shared / self._gram_counts[rows]
        enough = score >= self._gram_share
        return self._best("13-gram", owner[enough], rows[enough], score[enough])

    def _best(self, kind: Kind, owner: Index, row: Index, score: npt.NDArray[np.float64]) -> dict[int, Overlap]:
        """The highest score of each owner, of the earliest evaluation row that reaches it."""
        found: dict[int, Overlap] = {}
        for index in np.lexsort((row, -score, owner)).tolist():
            origin = self._origins[int(row[index])]
            found.setdefault(int(owner[index]), Overlap(kind, float(score[index]), origin))
        return found


def _prompts(conversation: Conversation) -> list[str]:
    """What the user says, turn by turn."""
    return [message.content for message in conversation.messages if message.role == "user"]


def _index(texts: Sequence[str], prompts: Index) -> tuple[Hashes, Index, Index]:
    """The telling n-grams of all texts, sorted; the text that each belongs to; how many each text has.

    An n-gram belongs to the first text of each prompt (`prompts` [texts], as numbers) that has it. It is telling
    unless the wording of the task is in it: a PHRASE that too many prompts share.
    """
    common, phrase_offsets = _common_before(texts, prompts)
    grams, offsets = _all_windows(texts, GRAM)
    owner = np.repeat(np.arange(len(texts), dtype=np.int32), np.diff(offsets))
    start = np.arange(len(grams)) + (phrase_offsets[:-1] - offsets[:-1])[owner]  # the phrase at the n-gram's beginning
    telling = common[start + GRAM - PHRASE + 1] == common[start]
    del common, start
    grams, owner = grams[telling], owner[telling]
    found, owners = [grams[:0]], [owner[:0]]
    for part in _ranges(grams):
        some, of = grams[part], owner[part]
        order = np.lexsort((of, prompts[of], some))
        some, of = some[order], of[order]
        first = np.ones(len(some), np.bool_)
        first[1:] = (some[1:] != some[:-1]) | (prompts[of[1:]] != prompts[of[:-1]])
        found.append(some[first])
        owners.append(of[first])
    grams, owner = np.concatenate(found), np.concatenate(owners)
    return grams, owner.astype(np.int64), np.bincount(owner, minlength=len(texts))


_RANGE = 1 << 21
"""Hashes sorted at once: the working memory of a sort is several times theirs."""


def _ranges(hashes: Hashes) -> Iterable[npt.NDArray[np.int64]]:
    """The places of all hashes, in pieces by their highest bits: sorted piece by piece, all are sorted."""
    bits = max(0, (len(hashes) // _RANGE).bit_length())
    high = (hashes >> np.uint64(64 - bits)).astype(np.uint16) if bits else np.zeros(len(hashes), np.uint16)
    for number in range(1 << bits):
        yield np.flatnonzero(high == number)


def _common_before(texts: Sequence[str], prompts: Index) -> tuple[Index, Index]:
    """[phrases + 1] how many common phrases stand before each one, and the offsets [texts + 1] of each text's."""
    phrases, offsets = _all_windows(texts, PHRASE)
    of_prompt = np.repeat(prompts.astype(np.int32), np.diff(offsets))
    most = min(COMMON, max(2, len(np.unique(of_prompt)) // 2))
    before = np.zeros(len(phrases) + 1, np.int64)
    for part in _ranges(phrases):
        before[1 + part] = _common(phrases[part], of_prompt[part], most)
    return np.cumsum(before, out=before), offsets


def _common(phrases: Hashes, prompt: npt.NDArray[np.int32], most: int) -> npt.NDArray[np.bool_]:
    """[phrases] whether the phrase occurs in more than `most` prompts: COMMON, or half of them (and two)."""
    if not len(phrases):
        return np.zeros(0, np.bool_)
    order = np.lexsort((prompt, phrases))
    ordered, of = phrases[order], prompt[order]
    new = np.concatenate([np.ones(1, np.bool_), ordered[1:] != ordered[:-1]])
    another = new | np.concatenate([np.ones(1, np.bool_), of[1:] != of[:-1]])
    number = np.cumsum(new) - 1  # of the distinct phrase
    counts = np.bincount(number, weights=another)
    found = np.zeros(len(phrases), np.bool_)
    found[order] = (counts > most)[number]
    return found


def _all_windows(texts: Sequence[str], size: int) -> tuple[Hashes, Index]:
    """Windows of `size` tokens of all texts, and the offsets [texts + 1] of each text's."""
    hashes, sizes = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)]
    for part in _parts(texts):
        found, offsets = _windows(part, size)
        hashes.append(found)
        sizes.append(np.diff(offsets))
    return np.concatenate(hashes), np.cumsum(np.concatenate(sizes))


def _windows(texts: Sequence[str], size: int) -> tuple[Hashes, Index]:
    """Windows of words: symbols are passed over, or a sum such as `<<2+3=5>>` alone would fill an n-gram."""
    return windows(tokenise(texts).without_symbols(), size, size)


def _parts(texts: Sequence[str]) -> Iterable[list[str]]:
    return (list(texts[start : start + SKETCHED_AT_ONCE]) for start in range(0, len(texts), SKETCHED_AT_ONCE))
