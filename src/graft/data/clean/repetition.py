"""Answers that loop: junk of a model that repeated itself, or of a page that was saved many times over."""

from __future__ import annotations

import re
from collections import Counter

from graft.config.clean import Repetition
from graft.data.clean.step import Drop, Notes, Result, texts
from graft.types import Conversation

_UNIT = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
"""A word, or a character of a script that writes no blanks between words."""
_LAID_OUT = re.compile(r"```.*?(?:```|\Z)|^[ \t]*\|[^\n]*$|^[-=_*#+.|:~ \t]{3,}$", re.DOTALL | re.MULTILINE)
"""Code, tables and rules repeat themselves with good reason."""


def drop_repetition(conversation: Conversation, settings: Repetition, notes: Notes) -> Result:
    """Drop where in an answer or the raw text too large a share of the n-grams occurred before in it."""
    for field, role, text in texts(conversation):
        if role not in ("assistant", "text") or len(text) < settings.min_units:
            continue
        share, example = repeated_share(text, settings.n, settings.min_units)
        if share > settings.share:
            return Drop(field, f"repeats itself: {share:.0%} of its {settings.n}-grams, such as {example!r}")
    return conversation


def repeated_share(text: str, n: int, min_units: int) -> tuple[float, str]:
    """Share of the n-grams that are repeats of an earlier one, and the commonest n-gram; 0 for a short text."""
    units = _UNIT.findall(_LAID_OUT.sub(" ", text))
    total = len(units) - n + 1
    if len(units) < min_units or total < 1:
        return 0.0, ""
    grams = Counter(zip(*(units[start : start + total] for start in range(n)), strict=True))
    share = 1 - len(grams) / total
    if share == 0:
        return 0.0, ""
    best = grams.most_common(1)[0][0]
    return share, ("" if all(unit > "\u0e00" for unit in best) else " ").join(best)[:80]
