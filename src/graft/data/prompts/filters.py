"""What templates may compute with: a meter for each rendering, and filters that know the size of what they make.

Speaks of values, steps and sizes. Knows no templates and no rows.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from graft.data.prompts.draw import Draw

MOST_STEPS = 100_000
"""Rounds of all loops and calls of one rendering."""
MOST_SIZE = 2_000_000
"""Characters and elements of any one value, and characters of the text that is rendered."""
_ELEMENT = 8
"""What an element counts: lists are slower to weigh, and larger in memory, than text."""
MOST_WEIGHED = 1_000_000
"""Elements that one rendering may have weighed in all: a list that grows is weighed again each time it does."""
MOST_SECONDS = 10.0
"""A last resort, for what is slow within the other bounds."""


class TemplateFailure(Exception):
    """A template that cannot be compiled, or rendered with these variables; the text says why. Users see no traceback
    of it: whoever knows the template and the row makes an error or a reject of it."""


class NothingToAsk(TemplateFailure):
    """It runs, and has nothing to say about this row: its prompt or its answer comes out empty."""


class TooSlow(TemplateFailure):
    """It ran out of time. What is left out must not depend on the machine, so this ends the work."""


@dataclass(slots=True)
class Meter:
    """What one rendering has used, and the chance that its filters draw from."""

    draw: Draw
    ends: float
    steps: int = 0
    weighed: int = 0

    def weigh(self, elements: int) -> None:
        self.weighed += elements
        if self.weighed > MOST_WEIGHED:
            raise TemplateFailure(f"more than {MOST_WEIGHED:,} elements to go through")

    def spend(self) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise TemplateFailure(f"more than {MOST_STEPS:,} loop rounds and calls")
        if time.monotonic() > self.ends:
            raise TooSlow(f"rendering takes longer than {MOST_SECONDS:g} s")


METER: ContextVar[Meter] = ContextVar("meter")  # not a template variable: no template can reach it


def bounded(value: Any) -> Any:
    """The value itself, when all that it holds is no larger than MOST_SIZE; shared parts count every time."""
    if isinstance(value, str) and len(value) <= MOST_SIZE:
        return value
    size, seen, waiting = 0, 0, [value]
    while waiting:
        item = waiting.pop()
        seen += 1
        size += len(item) if isinstance(item, str) else _ELEMENT
        if size > MOST_SIZE:
            raise TemplateFailure(f"a value of more than {MOST_SIZE:,} characters and elements")
        if isinstance(item, Mapping):
            waiting += (*item.keys(), *item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            if size + _ELEMENT * len(item) > MOST_SIZE:
                raise TemplateFailure(f"a value of more than {MOST_SIZE:,} characters and elements")
            waiting += item
    METER.get().weigh(seen)
    return value


def stepping(items: Iterable[Any]) -> Iterable[Any]:
    """The items of a loop, each of which is counted."""
    meter = METER.get()
    for item in items:
        meter.spend()
        yield item


def join(items: Iterable[Any], between: str = "", attribute: str | int | None = None) -> str:
    """Jinja's `join`, with its size known before it is made."""
    if attribute is not None:
        items = [item[attribute] for item in items]
    texts = [str(bounded(item)) for item in items]
    if sum(map(len, texts)) + len(str(between)) * len(texts) > MOST_SIZE:
        raise TemplateFailure(f"a joined text of more than {MOST_SIZE:,} characters")
    return str(between).join(texts)


def replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    """Jinja's `replace`, with its size known before it is made."""
    text, old, new = str(bounded(text)), str(old), str(new)
    found = text.count(old) if count < 0 else min(count, text.count(old))
    if len(text) + found * (len(new) - len(old)) > MOST_SIZE:
        raise TemplateFailure(f"a replaced text of more than {MOST_SIZE:,} characters")
    replaced: str = text.replace(old, new, count)
    return replaced


def _choice(items: Iterable[Any]) -> Any:
    """One of the items, by the row's seed (promptsource's `choice`, Jinja's `random`)."""
    items = list(items)
    if not items:
        raise TemplateFailure("`choice` of nothing")
    return METER.get().draw.pick(items)


def _most_frequent(items: Iterable[Any]) -> list[Any]:
    """All items that occur as often as the commonest one, in order of first appearance (promptsource's filter)."""
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most]


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as people write it: Jinja's own `tojson` is for HTML and would escape `<` and every Chinese character."""
    if indent is not None and not 0 <= indent <= 8:
        raise TemplateFailure(f"an indent of {indent}; 0 to 8 can be had")
    return json.dumps(bounded(value), ensure_ascii=False, indent=indent)


OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "choice": _choice,
    "join": join,
    "joined_": join,
    "bounded_": bounded,
    "most_frequent": _most_frequent,
    "random": _choice,
    "replace": replace,
    "round": lambda value, precision=0: round(float(value), max(-20, min(20, int(precision)))),
    "tojson": _to_json,
}
