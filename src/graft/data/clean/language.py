"""The language that a text is written in. Speaks of texts and language codes; knows no conversations and no settings.

py3langid decides between alphabets' languages; what it is weak at is settled around it: code and addresses are no
language, Chinese, Japanese and Korean are told by their scripts, and a few words weigh the common languages higher.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

UNKNOWN = "und"
"""ISO 639-2's code for "undetermined": numbers, code, a word or two that could be anything."""

_ENOUGH = 600
"""Characters of prose that are looked at: the detector errs no less on more, and its time grows with the length."""
_RAW = 10 * _ENOUGH
"""Characters among which prose is looked for; what comes before them may be one long block of code."""

_NO_PROSE = re.compile(
    r"```.*?(?:```|\Z)"  # a code block, or one that never ends
    r"|`[^`\n]*`|https?://[!-~]+|(?<![\w.+-])[\w.+-]{1,64}@[\w.-]+|<[^<>\n]{1,200}>|\\[a-zA-Z]+",
    re.DOTALL | re.ASCII,
)
_WORD = re.compile(r"[^\W\d_]+")
_KANA = re.compile("[\u3041-\u309f\u30a0-\u30fa\u30fd-\u30ff\u31f0-\u31ff\uff66-\uff9d]")
_HAN = re.compile("[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
_EAST_ASIAN = re.compile(f"(?:{_KANA.pattern}|{_HAN.pattern}|{_HANGUL.pattern})+")

_KANA_OF_JAPANESE = 0.1
"""Least share of kana among kana and Han characters for Japanese: running text has about half, ornament less."""

_MEMBERS = {
    **{"yue": "zh", "wuu": "zh", "arz": "ar", "ary": "ar", "sdh": "ku", "uzs": "uz", "ltg": "lv", "gug": "gn"},
    **{"fuv": "ff", "kik": "ki", "hbo": "he", "grc": "el", "zxx": UNKNOWN},
}
"""Labels of the model as the ISO 639-1 language that they are a part or an older form of."""

_COMMON = frozenset(
    {
        *("ar", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko", "nl"),
        *("no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "vi", "zh"),
    }
)
_RARE = 0.1
"""Prior weight of a language that is not common. Ten words outweigh it; two words do not."""

_NOTHING = 1e-4
"""Languages this much less likely than the first change nothing, with the prior neither."""
_LEAST = 0.2
"""Less than this is no answer: a text without one known feature gets about 0.07 for whatever comes first."""


def detect_language(text: str) -> tuple[str, float]:
    """The language of most of the text, and how sure that is, from 0 to 1.

    ISO 639-1 codes; 639-3 for the few languages without one. Code blocks, addresses and tags are left out; in mixed
    text a Chinese or Japanese character counts as much as a word of another script. Cantonese and Wu count as `zh`.
    (UNKNOWN, 0.0) where no letters are left or they say nothing.
    """
    prose = _prose(text)
    words = _WORD.findall(_EAST_ASIAN.sub(" ", prose))
    kana, han, hangul = (len(script.findall(prose)) for script in (_KANA, _HAN, _HANGUL))
    east_asian = kana + han + hangul
    total = len(words) + east_asian
    if not total:
        return UNKNOWN, 0.0
    if east_asian >= len(words):
        return _east_asian(kana, han, hangul), round(east_asian / total, 4)
    code, confidence = _alphabetic(" ".join(words))
    return code, round(confidence * len(words) / total, 4)


def known_languages() -> tuple[str, ...]:
    """Every code that `detect_language` can answer, in alphabetical order, without UNKNOWN."""
    labels = {_MEMBERS.get(label, label) for label in _model().labels}
    return tuple(sorted(labels - {UNKNOWN}))


def _prose(text: str) -> str:
    """The first characters of the text that are prose."""
    return _NO_PROSE.sub(" ", text[:_RAW])[:_ENOUGH]


def _east_asian(kana: int, han: int, hangul: int) -> str:
    if hangul >= max(kana, han):
        return "ko"
    return "ja" if kana >= _KANA_OF_JAPANESE * (kana + han) else "zh"


def _alphabetic(text: str) -> tuple[str, float]:
    """The model's answer, with a prior: its own scores of one or two words are nearly flat over 140 languages."""
    scores: dict[str, float] = {}
    ranked = _model().rank(text)
    for label, score in ranked:
        if score < _NOTHING * ranked[0][1]:
            break
        code = _MEMBERS.get(label, label)
        scores[code] = scores.get(code, 0.0) + score * (1.0 if code in _COMMON else _RARE)
    best = max(scores, key=lambda code: scores[code])
    confidence = scores[best] / sum(scores.values())
    return (best, confidence) if confidence >= _LEAST else (UNKNOWN, 0.0)


@cache
def _model() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
