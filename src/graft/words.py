"""Words that go with numbers. Knows nothing of what is counted."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 row`, `2 rows`; `plural` where it is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def one_or_many(count: int, one: str, many: str) -> str:
    """The word that fits the number: has or have, was or were."""
    return one if count == 1 else many
