"""Examples for the eye and for machines: what is context, what is a target, where it stops, what was left out and why.

Speaks examples and text. Knows no files and no options.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from graft.config.train import Encode
from graft.tokens.encode import encode
from graft.tokens.renderer import Renderer, TemplateRefused
from graft.types import Conversation, Example, Reject
from graft.visible import escape_hidden
from graft.words import counted

STYLES = {
    "context": "dim",
    "target": "green",
    "weighted": "yellow",
    "stop": "bold magenta underline",
}
"""How each kind of token is drawn; `weighted` is a target whose weight is not 1."""

WAYS = {
    "template": "the chat template's own text",
    "composed": "composed from the message, because the template rewrites what generation would produce",
    "text": "raw text",
}


_BEFORE = 4
"""Tokens decoded before a token, to see what it adds: as many as the longest character in UTF-8 has bytes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens start..stop of an example, the fewest that are whole characters, and their text."""

    start: int
    stop: int
    text: str
    kind: str
    """A key of `STYLES`."""


def pieces(example: Example, renderer: Renderer) -> list[Piece]:
    """The tokens of an example as text; tokens that are parts of one character stand together."""
    ids = example.ids.tolist()
    last = len(ids) - 1
    kinds = [
        kind_of(float(weight), index == last and ids[index] in renderer.stop_ids)
        for index, weight in enumerate(example.weights)
    ]
    return pieces_of(ids, kinds, 0, renderer)


def pieces_of(ids: Sequence[int], kinds: Sequence[str], begin: int, renderer: Renderer) -> list[Piece]:
    """The tokens from `begin` on as text, in the light of those before; kinds[i] is the kind of ids[i]."""
    found: list[Piece] = []
    start = begin
    for stop in range(begin + 1, len(ids) + 1):
        text = _text_between(renderer, ids, start, stop)
        is_last = stop == len(ids) or kinds[stop] != kinds[start]
        if is_last or (text and not text.endswith("\ufffd")):
            found.append(Piece(start, stop, text, kinds[start]))
            start = stop
    return found


def _text_between(renderer: Renderer, ids: Sequence[int], start: int, stop: int) -> str:
    """What tokens start..stop add to the text: some tokenizers drop a first token's blank, so a few come before it."""
    before = max(0, start - _BEFORE)
    lead = renderer.decode(ids[before:start]) if start else ""
    while lead.startswith("\ufffd") and before > max(0, start - 2 * _BEFORE):  # it begins within a character
        before -= 1
        lead = renderer.decode(ids[before:start])
    whole = renderer.decode(ids[before:stop])
    return whole[len(lead) :] if whole.startswith(lead) else renderer.decode(ids[start:stop])


def kind_of(weight: float, stops: bool) -> str:
    """The kind of a token with this loss weight; `stops` says that it ends an answer."""
    if weight == 0:
        return "context"
    if stops:
        return "stop"
    return "target" if weight == 1 else "weighted"


@dataclass(frozen=True, slots=True)
class TurnStart:
    """Where a turn of the conversation begins in an example."""

    token: int
    """Index of its first token."""
    said: str
    """Number and role of the turn, as `2 assistant`."""


def turn_starts(
    conversation: Conversation, example: Example, found: Sequence[Piece], renderer: Renderer
) -> list[TurnStart]:
    """Where each turn begins among an example's pieces, as far as the chat template lets it be known.

    A turn begins where the ids of the turns before it end. Where those are written differently in a longer
    conversation (reasoning that is stripped, oldest turns that were dropped), it begins with its own content, or with
    what the template wrote before the content of an earlier turn of its role.
    """
    tokens = [piece.start for piece in found]
    offsets = list(accumulate((len(piece.text) for piece in found), initial=0))
    whole = "".join(piece.text for piece in found)
    ids = example.ids.tolist()
    openings: dict[str, str] = {}
    starts: list[TurnStart] = []
    at = 0  # the piece with which the turn before begins
    for index, message in enumerate(conversation.messages[: example.turn + 1]):
        content = message.content.strip()
        token = _end_of_turns_before(conversation, index, ids, renderer)
        if token is not None and token >= tokens[at]:
            at = min(bisect_left(tokens, token), len(found) - 1)
            place = whole.find(content, offsets[at]) if content else -1
            if index and place > offsets[at]:
                openings.setdefault(message.role, whole[offsets[at] : place])
        else:
            place = whole.find(content, offsets[at]) if content else -1
            if place < 0:
                continue
            opening = openings.get(message.role, "")
            place -= len(opening) if whole.endswith(opening, offsets[at], place) else 0
            at = bisect_left(offsets, place, hi=len(found) - 1)
        starts.append(TurnStart(tokens[at], f"{index} {message.role}"))
    return starts


def _end_of_turns_before(conversation: Conversation, index: int, ids: Sequence[int], renderer: Renderer) -> int | None:
    """How many tokens the turns before one take; None where an example does not begin with them as they are alone."""
    if index == 0:
        return 0
    try:
        text = renderer.render(conversation.messages[:index], conversation.tools, generation_prompt=False)
    except TemplateRefused:  # many refuse a conversation that is only a system turn
        return None
    before = renderer.ids([text])[0]
    return len(before) if before and list(ids[: len(before)]) == before else None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An assistant turn that is not trained on in an example of its own."""

    turn: int
    reason: str


def left_out(
    conversation: Conversation, result: Sequence[Example] | Reject, renderer: Renderer, settings: Encode
) -> list[LeftOut]:
    """The assistant turns that have no example, each with the reason; a rejected conversation has said its own."""
    if isinstance(result, Reject) or conversation.text is not None:
        return []
    there = {example.turn for example in result}
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    return [
        LeftOut(turn, _why_left_out(conversation, turn, turn == turns[-1], renderer, settings))
        for turn in turns
        if turn not in there
    ]


def _why_left_out(conversation: Conversation, turn: int, is_last: bool, renderer: Renderer, settings: Encode) -> str:
    if settings.train_on == "everything" and not is_last:
        return "part of the last turn's example (train_on: everything)"
    own = conversation.messages[turn].weight
    if own is not None and own <= 0:
        return "its weight is 0: context only"
    if own is None and settings.train_on == "last_turn" and not is_last:
        return "not the last answer (train_on: last_turn): context only"
    # The encoder only counts the turns that it leaves out: asked about this one alone, it says why.
    alone = replace(conversation, messages=conversation.messages[: turn + 1])
    answer = encode(alone, renderer, settings.model_copy(update={"train_on": "last_turn"}))
    return answer.reason if isinstance(answer, Reject) else "left out by the encoder"


def legend() -> Text:
    """What the colours mean."""
    text = Text("context", style=STYLES["context"])
    for name, said in (("target", "target"), ("weighted", "target, weight not 1"), ("stop", "stop")):
        text.append("  ").append(said, style=STYLES[name])
    text.append("  ").append(" 1 user ", style="reverse").append(" turn begins")
    return text.append("  ↵ line break, ⇥ tab, · blank at a token's end, ⟨U+...⟩ hidden character", style="dim")


def draw(
    conversation: Conversation,
    result: Sequence[Example] | Reject,
    renderer: Renderer,
    settings: Encode | None = None,
) -> RenderableType:
    """A conversation's examples in colour, or why it has none; with the settings also which turns were left out."""
    head = Text(escape_hidden(f"{conversation.id}  "), style="bold")
    head.append(escape_hidden(str(conversation.origin)), style="dim")
    if isinstance(result, Reject):
        said = escape_hidden(f"  rejected: {result.field}: {result.reason}")
        return Group(head, Text(said, style="bold red"), Text())
    parts: list[RenderableType] = [head]
    for example in result:
        parts += [Text(f"  {facts(example)}", style="cyan"), _coloured(conversation, example, renderer), Text()]
    for missing in left_out(conversation, result, renderer, settings) if settings else ():
        parts.append(Text(escape_hidden(f"  turn {missing.turn}: no example: {missing.reason}"), style="yellow"))
    return Group(*parts)


def facts(example: Example) -> str:
    """The counts of an example and why its tokens are what they are."""
    targets = int((example.weights > 0).sum())
    weights = sorted({float(weight) for weight in example.weights if weight > 0})
    said = " and ".join(f"{weight:g}" for weight in weights)
    turn = "text" if example.way == "text" else f"turn {example.turn}"
    return (
        f"{turn}: {counted(len(example.ids), 'token')}, {example.prompt_len} prompt, {counted(targets, 'target')} of "
        f"weight {said}; {example.way}: {WAYS[example.way]}"
    )


def _coloured(conversation: Conversation, example: Example, renderer: Renderer) -> Text:
    found = pieces(example, renderer)
    starts = {start.token: start.said for start in turn_starts(conversation, example, found, renderer)}
    text = Text()
    for piece in found:
        if piece.start in starts:
            text.append(f" {starts[piece.start]} ", style="reverse")
        text.append(visible(piece.text), style=STYLES[piece.kind])
    return text


def visible(text: str) -> str:
    """Text with line breaks and tabs marked, blanks at its end as dots, and hidden characters written out."""
    bare = text.rstrip(" ")
    marked = bare + "·" * (len(text) - len(bare))
    return escape_hidden(marked).replace("\t", "⇥").replace("\n", "↵\n")


def to_json(conversation: Conversation, result: Sequence[Example] | Reject, renderer: Renderer) -> dict[str, Any]:
    """A conversation's examples as plain data."""
    if isinstance(result, Reject):
        return {"id": conversation.id, "examples": [], "rejected": f"{result.field}: {result.reason}"}
    return {"id": conversation.id, "examples": list(_rows(result, renderer)), "rejected": None}


def _rows(examples: Sequence[Example], renderer: Renderer) -> Iterator[dict[str, Any]]:
    for example in examples:
        yield {
            "ids": example.ids.tolist(),
            "weights": example.weights.tolist(),
            "prompt_len": example.prompt_len,
            "text": renderer.decode(example.ids.tolist()),
            "turn": example.turn,
            "way": example.way,
        }
