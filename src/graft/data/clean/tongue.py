"""Conversations kept or skipped by their language. Knows no detector: see `language`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from graft.config.base import did_you_mean
from graft.config.clean import Language
from graft.data.clean.language import UNKNOWN, detect_language, known_languages
from graft.data.clean.step import Drop, Notes, Result, texts
from graft.errors import ConfigError
from graft.types import Conversation

_OF_EACH = 2000
"""Characters of each turn that are looked at: a long question must not hide the answer's language."""


def check_languages(settings: Language) -> None:
    """Refuse a code that the detector can never answer.

    Raises:
        ConfigError: names the code, the nearest known one, and how many there are.
    """
    known = known_languages()
    for code in (*settings.keep, *settings.skip):
        if code not in known:
            raise ConfigError(
                f"step language: no language `{code}`{_nearest(code, known)} Known are, by ISO 639: {', '.join(known)}"
            )


_MISTAKEN = {
    **{"cn": "zh", "tw": "zh", "hk": "zh", "jp": "ja", "kr": "ko", "gr": "el", "cz": "cs", "dk": "da", "se": "sv"},
    **{"ua": "uk", "vn": "vi", "iw": "he", "in": "id", "by": "be", "ir": "fa", "us": "en", "gb": "en", "eng": "en"},
    **{"zho": "zh", "chi": "zh", "cmn": "zh", "jpn": "ja", "kor": "ko", "deu": "de", "ger": "de", "fra": "fr"},
    **{"fre": "fr", "spa": "es", "ita": "it", "por": "pt", "rus": "ru", "ara": "ar", "nld": "nl", "dut": "nl"},
    **{"english": "en", "chinese": "zh", "mandarin": "zh", "japanese": "ja", "korean": "ko", "german": "de"},
    **{"french": "fr", "spanish": "es", "italian": "it", "portuguese": "pt", "russian": "ru", "arabic": "ar"},
    **{"dutch": "nl", "polish": "pl", "turkish": "tr", "ukrainian": "uk", "vietnamese": "vi", "hindi": "hi"},
}
"""Countries, three-letter codes and names that stand where a two-letter code is meant."""


def _nearest(code: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the code that is meant, or a full stop."""
    plain = code.strip().lower()
    base = re.split("[-_]", plain)[0]  # zh-CN, pt_BR
    meant = next((word for word in (plain, base, _MISTAKEN.get(plain), _MISTAKEN.get(base)) if word in known), None)
    return f"; did you mean `{meant}`?" if meant else did_you_mean(plain, known) or "."


def filter_language(conversation: Conversation, settings: Language, notes: Notes) -> Result:
    """Drop by the language that most of the characters of questions, answers or raw text are in.

    Each turn is detected alone and counts by its length, so that a translation is of neither language for sure.
    """
    votes: dict[str, float] = {}
    total = 0.0
    for field, role, text in texts(conversation):
        if role in ("system", "tool") or "." in field:
            continue
        code, sure = detect_language(text[: 3 * _OF_EACH])
        size = min(len(text), _OF_EACH)
        total += size
        if code != UNKNOWN:
            votes[code] = votes.get(code, 0.0) + sure * size
    code = max(votes, key=lambda name: (votes[name], name)) if votes else UNKNOWN
    confidence = votes.get(code, 0.0) / total if total else 0.0
    place = "messages" if conversation.text is None else "text"
    if code == UNKNOWN or confidence < settings.sure:
        notes["language not known"] += 1
        return conversation if settings.unknown == "keep" else Drop(place, "language not known")
    notes[f"language {code}"] += 1
    if code in settings.skip:
        return Drop(place, f"language {code} is skipped ({confidence:.0%} sure)")
    if settings.keep and code not in settings.keep:
        return Drop(place, f"language {code} is not kept ({confidence:.0%} sure)")
    return conversation
