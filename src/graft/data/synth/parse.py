"""A model's list of questions, however it wrote it: numbered, with bullets, as JSON or JSON lines, with talk around it.

Speaks of one answer's text. Knows no requests and no pool.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

KEYS = ("question", "instruction", "query", "prompt", "text", "问题")
"""Keys under which an object of a JSON answer may hold its question."""

_MARK = re.compile(
    r"""^[ \t]*(?:[#>][#> ]*)?(?:\*\*|__)?            # a heading, a quotation, bold type
    (?:
      [(（\[]?\d{1,3}[)）\]]                          # 1)  (1)  [1]
    | \d{1,3}[.．、:：](?!\d)                          # 1.  1、  but not 1.5
    | [①-⑳]
    | (?:Q|Question|问题|问)[ ]?\d{1,3}[ ]*[.．、:：)]  # Q1:  Question 1.  问题1：
    | [-*•‣–][ ]
    )
    (?:\*\*|__)?[ \t]*""",
    re.VERBOSE | re.IGNORECASE,
)
_LABEL = re.compile(
    r"^(?:\*\*)?(?:question|instruction|query|问题|提问|q)(?:\*\*)?[ ]?[:：](?:\*\*)?\s*", re.IGNORECASE
)
_FENCE = re.compile(r"```[\w-]*\n(.*?)(?:```|\Z)", re.DOTALL)
_JSON = re.compile(r"^[\[{]\s*[\"\[{]", re.MULTILINE)
_QUOTES = {'"': '"', "“": "”", "「": "」", "'": "'"}


def parse_questions(text: str, cut: bool = False) -> list[str]:
    """The questions in order; empty where there is no list. Of a `cut` answer the last item, torn, is left out."""
    fenced = _FENCE.search(text)
    for body in (fenced[1], text) if fenced else (text,):
        if found := [question for question in map(_tidy, _items(body.strip(), cut)) if question]:
            return found
    return []


def _items(text: str, cut: bool) -> list[str]:
    start = _JSON.search(text)
    items = [] if start and not start.start() else _marked_items(text)
    if start and not items:
        return list(_json_items(text[start.start() :]))  # what is not whole is no value: nothing torn comes through
    if not items:
        items = [line for line in text.splitlines() if line.rstrip().endswith(("?", "？"))]
    return items[:-1] if cut else items


def _json_items(text: str) -> Iterator[str]:
    """Questions of JSON values that follow one another, or stand in a list whose end may be missing."""
    decoder, place = json.JSONDecoder(), 0
    while place < len(text):
        if text[place] not in '{["':
            place += 1
            continue
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            if text[place] == '"':  # a text that never ends
                return
            # Go inside a list that is not whole; behind an object that is not, go on with what begins next.
            place = place + 1 if text[place] == "[" else _next_start(text, place + 1)
            continue
        yield from _questions_of(value)
        place = end


def _next_start(text: str, place: int) -> int:
    return min((found for found in (text.find(char, place) for char in "{[") if found >= 0), default=len(text))


def _questions_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _questions_of(item)
    elif isinstance(value, Mapping):
        own = next((value[key] for key in KEYS if isinstance(value.get(key), str)), None)
        if own is not None:
            yield own
        else:  # {"questions": [...]}
            for item in value.values():
                if isinstance(item, list):
                    yield from _questions_of(item)


def _marked_items(text: str) -> list[str]:
    """Items that begin with a number or a bullet. A line without one goes on with the item until a blank line ends it.

    Where there are numbers, bullets are parts of an item.
    """
    lines = text.splitlines()
    marks = [_MARK.match(line) for line in lines]
    numbered = any(mark and not _is_bullet(mark[0]) for mark in marks)
    items: list[str] = []
    open_item = False
    for line, mark in zip(lines, marks, strict=True):
        if mark and not (numbered and _is_bullet(mark[0])):
            items.append(line[mark.end() :].strip())
            open_item = True
        elif not line.strip():
            open_item = open_item and not items[-1]  # a number alone in its line still waits for its text
        elif open_item:
            items[-1] = f"{items[-1]}\n{line.strip()}".strip()
    return items


def _is_bullet(mark: str) -> bool:
    return mark.strip().strip("*_#> ") in ("-", "", "•", "‣", "–")


def _tidy(item: str) -> str:
    """Without a label, bold type and quotation marks around the whole."""
    item = _LABEL.sub("", item.strip()).strip()
    if item.startswith("**") and item.endswith("**") and item.count("**") == 2:
        item = item[2:-2].strip()
    item = item.rstrip("*_ ") if item.endswith("**") and item.count("**") % 2 else item
    if len(item) > 2 and _QUOTES.get(item[0]) == item[-1] and item[0] not in item[1:-1]:
        item = item[1:-1].strip()
    return item
