"""The order that the turns of a conversation must have.

Speaks of turns and roles. Knows no files, columns or formats, and repairs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from graft.data.layout.turns import Turn
from graft.data.values import UnfitError


def without_empty_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns without an empty assistant turn at their end: the answer is still to be given."""
    if not turns:
        return turns
    last = turns[-1].message
    empty = last.role == "assistant" and not last.tool_calls and not last.content.strip()
    return turns[:-1] if empty else turns


def check_turns(turns: Sequence[Turn], place: str, require_answer: bool = True) -> None:
    """Refuse a conversation that no template can be trusted with.

    A system turn may only be the first. User and assistant turns alternate (an assistant may begin), tool turns follow
    an assistant's tool calls and are answered by the assistant. There is an assistant turn where one is required, and
    none is empty.

    Raises:
        UnfitError: names the turn, and both roles where the order is wrong.
    """
    if not turns:
        raise UnfitError(place, "has no messages")
    before: Turn | None = None
    for turn in turns:
        if not before or (before.message.role, turn.message.role) not in _USUAL:
            _check_order(before, turn)
        message = turn.message
        if message.role == "assistant" and not message.tool_calls and not message.content.strip():
            raise UnfitError(turn.place, "empty answer")
        before = turn
    if require_answer and all(turn.message.role != "assistant" for turn in turns):
        raise UnfitError(place, "no assistant turn")


_USUAL = frozenset({("system", "user"), ("user", "assistant"), ("assistant", "user")})


def _check_order(before: Turn | None, turn: Turn) -> None:
    role = turn.message.role
    last = before.message.role if before else None
    wrong = ""
    if role == "tool" and last != "tool" and not (before and before.message.tool_calls):
        wrong = "a tool turn must follow an assistant's tool calls"
    elif role == "system" and before:
        wrong = "a system turn can only be the first"
    elif role == "user" and last == "tool":
        wrong = "the assistant must answer the tool first"
    elif role == last and role != "tool":
        wrong = "merge the two into one turn"
    if wrong:
        after = f"right after {before.message.role} ({before.place})" if before else "at the start"
        raise UnfitError(turn.place, f"roles out of order: {role} {after}; {wrong}")
