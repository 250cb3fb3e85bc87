"""How the rows of each layout are read: one function per format, from columns to turns or raw text.

Speaks of columns and turns. Knows no files, and not how a layout is recognised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.layout.turns import Turn, assistant, read_turns, user
from graft.data.values import UnfitError, list_of, text_of

Columns = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a format found in a row: turns, or raw text; and the columns that it took them from."""

    used: tuple[str, ...]
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    place: str = ""
    """Name of the column that a complaint about the whole conversation is about."""


def messages(row: Columns, required: bool = True) -> Draft:
    """OpenAI's chat form. `messages: []` beside `text` is raw text: so a canonical file can hold both."""
    values = list_of(row.get("messages"), "messages")
    if not values and isinstance(row.get("text"), str):
        return Draft(("messages", "text"), text=row["text"], place="text")
    return Draft(("messages",), tuple(read_turns(values, "messages")), place="messages")


CONVERSATIONS = ("conversations", "conversation", "items")


def sharegpt(row: Columns, required: bool = True) -> Draft:
    """Turns of from and value; `items` is what the site that gave the format its name calls them."""
    column = first_of(row, CONVERSATIONS)
    return Draft((column,), tuple(read_turns(list_of(row.get(column), column), column)), place=column)


def alpaca(row: Columns, required: bool = True) -> Draft:
    """The user's text is the instruction, a newline, and the input where there is one.

    Self-instruct's seed tasks have input and output in `instances`, a list of which one is taken if it is alone.
    """
    used, prefix, pair = ["instruction", "history"], "", row
    if row.get("instances") is not None:
        pair, prefix = _only_instance(row["instances"]), "instances[0]."
        used.append("instances")
    answer, extra = first_of(pair, ("output", "response")), first_of(pair, ("input", "context"))
    instruction = text_of(row.get("instruction"), "instruction")
    given = "" if pair.get(extra) is None else text_of(pair[extra], prefix + extra)
    prompt = "\n".join(part for part in (instruction, given) if part)
    turns = (*_history(row), user("instruction", prompt), *_answer(pair.get(answer), prefix + answer, required))
    return Draft((*used, *(() if prefix else (extra, answer))), turns, place=prefix + answer)


def _only_instance(value: Any) -> Columns:
    instances = list_of(value, "instances")
    if len(instances) != 1 or not isinstance(instances[0], Mapping):
        raise UnfitError("instances", f"has {len(instances)} elements; one object with input and output is needed")
    return instances[0]


def prompt_completion(row: Columns, required: bool = True) -> Draft:
    """Each side is text or a list of messages."""
    answer = first_of(row, ("completion", "response"))
    prompt, completion = row.get("prompt"), row.get(answer)
    before = read_turns(prompt, "prompt") if isinstance(prompt, list) else [user("prompt", text_of(prompt, "prompt"))]
    if isinstance(completion, list):
        after: Sequence[Turn] = read_turns(completion, answer)
    else:
        after = _answer(completion, answer, required)
    return Draft(("prompt", answer), (*before, *after), place=answer)


def question_answer(row: Columns, required: bool = True) -> Draft:
    """One question and one answer, with earlier turns in `history`."""
    ask, answer = first_of(row, ("question", "query")), first_of(row, ("answer", "response"))
    turns = (*_history(row), user(ask, text_of(row.get(ask), ask)), *_answer(row.get(answer), answer, required))
    return Draft((ask, answer, "history"), turns, place=answer)


def text(row: Columns, required: bool = True) -> Draft:
    """Raw text."""
    column = first_of(row, ("text", "content", "response"))
    return Draft((column,), text=text_of(row.get(column), column), place=column)


CHOSEN = ("chosen", "chosen_messages", "preferred_output")
REJECTED = ("rejected", "rejected_messages", "rejected_response", "non_preferred_output")


def preference(row: Columns, required: bool = True) -> Draft:
    """The chosen answer of two, after its prompt; the other one stays in the row's `meta`.

    `chosen` is a whole conversation (a list that a user or system turn begins, or a transcript of Human: and Assistant:
    paragraphs), or the answer to the prompt, which stands in any of the other formats' columns. Without a
    `chosen` the chosen answer is the end of `messages`.
    """
    column = first_of(row, CHOSEN)
    if row.get(column) is None:
        return messages(row)
    chosen = _side(row[column], column, assistant)
    whole = bool(chosen) and chosen[0].message.role in ("user", "system")
    used, before = _prompt_of(row)
    if not whole and not before:
        raise UnfitError(column, "is an answer without a prompt; `prompt` is missing")
    if row.get("messages") == row[column]:
        used = (*used, "messages")
    turns = chosen if whole else (*before, *chosen)
    return Draft((column, *used), tuple(turns), place=column)


def _prompt_of(row: Columns) -> tuple[tuple[str, ...], Sequence[Turn]]:
    """The prompt of a preference row, in whichever columns it stands, and these columns."""
    if row.get("prompt") is not None:
        return ("prompt",), _side(row["prompt"], "prompt", user)
    for column in (*CONVERSATIONS, "messages"):
        if row.get(column) is not None:
            return (column,), read_turns(list_of(row[column], column), column)
    if isinstance(row.get("input"), Mapping):  # OpenAI's preference files
        inner = list_of(row["input"].get("messages"), "input.messages")
        return ("input",), read_turns(inner, "input.messages")
    if row.get("instruction") is not None:
        draft = alpaca({key: row.get(key) for key in ("instruction", "input", "context", "history")}, required=False)
        return draft.used, draft.turns
    ask = first_of(row, ("question", "query"))
    if row.get(ask) is not None:
        return (ask, "history"), [*_history(row), user(ask, text_of(row[ask], ask))]
    return (), ()


_TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _side(value: Any, place: str, turn: Callable[[str, str], Turn]) -> Sequence[Turn]:
    """One side of a preference row: a list of messages, one message, a transcript, or the text of one turn."""
    if isinstance(value, list):
        return read_turns(value, place)
    if isinstance(value, Mapping):
        return read_turns([value], place)
    said = text_of(value, place)
    if said.lstrip().startswith(("Human:", "Assistant:")):
        return _transcript(said.lstrip(), place)
    return [turn(place, said)]


def _transcript(said: str, place: str) -> list[Turn]:
    """Paragraphs that begin with `Human:` or `Assistant:`, as Anthropic's preference sets have them."""
    parts = _TRANSCRIPT.split(said)[1:]
    turns: list[Turn] = []
    for index, (role, content) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        turn = user if role == "Human" else assistant
        if content.strip() or index < len(parts) // 2 - 1:  # a prompt ends with `Assistant:`, still to be answered
            turns.append(turn(f"{place}[{index}]", content.strip()))
    return turns


def _answer(value: Any, place: str, required: bool) -> Sequence[Turn]:
    """The answer's turns; none where there is no answer yet and none is required."""
    if value is None and not required:
        return ()
    return [assistant(place, text_of(value, place))]


def _history(row: Columns) -> list[Turn]:
    """Earlier turns as pairs: [[question, answer], ...]."""
    turns: list[Turn] = []
    for index, pair in enumerate(list_of(row.get("history"), "history")):
        here = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnfitError(here, "is not a pair [question, answer]")
        turns.append(user(f"{here}[0]", text_of(pair[0], f"{here}[0]")))
        turns.append(assistant(f"{here}[1]", text_of(pair[1], f"{here}[1]")))
    return turns


def first_of(row: Columns, names: tuple[str, ...]) -> str:
    """The first of the names that is a column with a value; the first name where none is."""
    return next((name for name in names if row.get(name) is not None), names[0])
