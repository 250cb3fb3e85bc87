"""Examples for the eye and for machines: what is context, what is a target, where it stops, and why.

Speaks examples and text. Knows no files and no options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from graft.tokens.renderer import Renderer
from graft.types import Conversation, Example, Reject

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
    kinds = [_kind(example, index, renderer.stop_ids) for index in range(len(ids))]
    found: list[Piece] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        text = _text_between(renderer, ids, start, stop)
        is_last = stop == len(ids) or kinds[stop] != kinds[start]
        if is_last or (text and not text.endswith("\ufffd")):
            found.append(Piece(start, stop, text, kinds[start]))
            start = stop
    return found


def _text_between(renderer: Renderer, ids: Sequence[int], start: int, stop: int) -> str:
    """What tokens start..stop add to the text: some tokenizers drop a first token's blank, so a few come before it."""
    before = max(0, start - 4)
    lead = renderer.decode(ids[before:start]) if start else ""
    whole = renderer.decode(ids[before:stop])
    return whole[len(lead) :] if whole.startswith(lead) else renderer.decode(ids[start:stop])


def _kind(example: Example, index: int, stop_ids: Sequence[int]) -> str:
    weight = float(example.weights[index])
    if weight == 0:
        return "context"
    if int(example.ids[index]) in stop_ids and index == len(example.ids) - 1:
        return "stop"
    return "target" if weight == 1 else "weighted"


def legend() -> Text:
    """What the colours mean."""
    text = Text("context", style=STYLES["context"])
    for name, said in (("target", "target"), ("weighted", "target, weight not 1"), ("stop", "stop")):
        text.append("  ").append(said, style=STYLES[name])
    return text.append("  ↵ line break, ⇥ tab, · blank at a token's end", style="dim")


def draw(conversation: Conversation, result: Sequence[Example] | Reject, renderer: Renderer) -> RenderableType:
    """A conversation's examples in colour, or why it has none."""
    head = Text(f"{conversation.id}  ", style="bold").append(str(conversation.origin), style="dim")
    if isinstance(result, Reject):
        return Group(head, Text(f"  rejected: {result.field}: {result.reason}", style="bold red"), Text())
    parts: list[RenderableType] = [head]
    for example in result:
        parts += [Text(_facts(example), style="cyan"), _coloured(example, renderer), Text()]
    return Group(*parts)


def _facts(example: Example) -> str:
    """The counts of an example and why its tokens are what they are."""
    targets = int((example.weights > 0).sum())
    weights = sorted({float(weight) for weight in example.weights if weight > 0})
    said = " and ".join(f"{weight:g}" for weight in weights)
    turn = "text" if example.way == "text" else f"turn {example.turn}"
    return (
        f"  {turn}: {len(example.ids)} tokens, {example.prompt_len} prompt, {targets} targets of weight {said}"
        f"; {example.way}: {WAYS[example.way]}"
    )


def _coloured(example: Example, renderer: Renderer) -> Text:
    text = Text()
    for piece in pieces(example, renderer):
        text.append(visible(piece.text), style=STYLES[piece.kind])
    return text


def visible(text: str) -> str:
    """Text with its line breaks and tabs marked, and blanks at its end as dots."""
    bare = text.rstrip(" ")
    marked = bare + "·" * (len(text) - len(bare))
    return marked.replace("\r", "␍").replace("\t", "⇥").replace("\n", "↵\n")


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
