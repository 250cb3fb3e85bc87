"""What a generated question must be to enter the pool: new, of a usual length, in the right language, without banned
words. Speaks of texts; knows no requests and no conversations.

The measure is that of self-instruct (Wang et al. 2023, https://arxiv.org/abs/2212.10560, section 2.2): ROUGE-L with
every text of the pool must stay below 0.7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from graft.config.synth import Filter
from graft.data.alike.text import normalise
from graft.data.clean.language import UNKNOWN, detect_language

SURE = 0.5
"""Least confidence at which another language counts: short questions leave doubts, and doubts are no reason."""

_EAST_ASIAN = (
    "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_EAST_ASIAN}]|[^\W_{_EAST_ASIAN}]+")
_CODE_POINTS = 0x110000 - 0x800
"""Characters that there are, without surrogates."""


def words(text: str) -> list[str]:
    """Lower-cased words; a Chinese, Japanese or Korean character is one. For ASCII those of the rouge-score library."""
    return _WORD.findall(text.lower())


class Pool:
    """The questions so far, and how near a text is to the nearest of them."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._coded: list[str] = []
        self._codes: dict[str, str] = {}
        self._known: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def add(self, text: str) -> None:
        """Put a text in, whatever it is."""
        self._known.setdefault(normalise(text), len(self.texts))
        self.texts.append(text)
        self._coded.append(self._code(text))

    def same(self, text: str) -> str | None:
        """A text of the pool that differs in no more than case, width, blanks and punctuation."""
        index = self._known.get(normalise(text))
        return None if index is None else self.texts[index]

    def nearest(self, text: str, least: float) -> tuple[float, str] | None:
        """The highest ROUGE-L F-measure with a text of the pool, and that text; None where it is below `least`.

        With LCS the length of the longest common subsequence of m and n words, precision is LCS / m and recall LCS / n:
        F = 2 LCS / (m + n), which is rapidfuzz's normalised Indel similarity of the sequences.
        """
        from rapidfuzz import process
        from rapidfuzz.distance import Indel

        found = process.extractOne(
            self._code(text),
            self._coded,
            scorer=Indel.normalized_similarity,
            processor=None,
            score_cutoff=max(
                0.0, least - 0.01
            ),  # only for speed: rapidfuzz rounds its own cutoff, and loses 6/20 at 0.3
        )
        if found is None or found[1] < least - 1e-9:  # 14/20 is 0.7, whatever a float makes of it
            return None
        return found[1], self.texts[found[2]]

    def _code(self, text: str) -> str:
        """The words, each as one character of its own, so that sequences of words are compared as fast as strings."""
        return "".join(self._codes.get(word) or self._new_code(word) for word in words(text))

    def _new_code(self, word: str) -> str:
        # A million words on, codes are used again, which could only make two texts look nearer than they are.
        number = len(self._codes) % _CODE_POINTS
        code = chr(number if number < 0xD800 else number + 0x800)
        self._codes[word] = code
        return code


def banned_words(banned: Sequence[str]) -> Callable[[str], str | None]:
    """A function that finds a text's first banned word. Words of an alphabet count as whole words only."""
    if not banned:
        return lambda _text: None
    spelled = (
        (rf"(?<!\w){re.escape(word)}(?!\w)" if re.fullmatch(rf"[^{_EAST_ASIAN}]+", word) else re.escape(word))
        for word in sorted(banned, key=len, reverse=True)
    )
    pattern = re.compile("|".join(spelled), re.IGNORECASE)

    def find(text: str) -> str | None:
        match = pattern.search(text)
        return match[0] if match else None

    return find


def other_language(text: str, wanted: str) -> str | None:
    """The language that the text is surely in, where it is not the wanted one."""
    language, confidence = detect_language(text)
    return None if language in (wanted, UNKNOWN) or confidence < SURE else language


class Novelty:
    """The filter with its pool."""

    def __init__(self, settings: Filter, language: str) -> None:
        self.pool = Pool()
        self._settings = settings
        self._language = language if settings.language else None
        self._banned = banned_words(settings.banned)

    def why_not(self, text: str) -> str | None:  # noqa: PLR0911  # one reason after the other
        """Why a question may not enter the pool; None where it may. The cheap reasons are looked for first."""
        limits, count = self._settings, len(words(text))
        if count < limits.min_words:
            return f"too short: {count} words, filter.min_words is {limits.min_words}"
        if count > limits.max_words:
            return f"too long: {count} words, filter.max_words is {limits.max_words}"
        if (word := self._banned(text)) is not None:
            return f"holds the banned word {word!r}"
        if self._language and (other := other_language(text, self._language)):
            return f"is written in `{other}`, `{self._language}` is wanted"
        if (same := self.pool.same(text)) is not None:
            return f"is the same as {excerpt(same)!r} but for case, blanks and punctuation"
        if (near := self.pool.nearest(text, limits.rouge)) is not None:
            return f"too near: ROUGE-L {near[0]:.2f} (filter.rouge {limits.rouge:g}) with {excerpt(near[1])!r}"
        return None


def excerpt(text: str, most: int = 60) -> str:
    """The beginning of a text in one line, for messages."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
