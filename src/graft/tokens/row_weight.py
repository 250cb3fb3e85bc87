"""A row's own loss weight: the column `loss_weight` multiplies the weight of all that is trained on in its row.

Not `weight`, which in many a table is something else. Speaks conversations and examples; knows no template.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from graft.types import Conversation, Example, Reject

COLUMN = "loss_weight"


def weighed(conversation: Conversation, result: list[Example] | Reject) -> list[Example] | Reject:
    """What a conversation was encoded to, with its row's weight; a reject where that is no weight, or 0."""
    given = conversation.meta.get(COLUMN)
    if given is None or isinstance(result, Reject):
        return result
    weight = _number(given)
    if weight is None or not weight > 0:
        reason = f"{str(given)[:40]!r} is not a number from 0 up" if weight is None else "0: nothing to learn"
        return Reject(conversation.origin.file, conversation.origin.line, COLUMN, reason)
    return [replace(example, weights=example.weights * np.float32(weight)) for example in result]


def _number(given: object) -> float | None:
    """A table's text counts as the number it spells."""
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        number = float(given)
    except ValueError:
        return None
    return number if math.isfinite(number) and 0 <= number <= 1e9 else None
