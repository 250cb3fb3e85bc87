"""Turns that are out of order, put in order by a stated policy; what no policy can decide stays for the last check.

Speaks of turns and roles. Never invents a word: turns are joined or left out.
"""

from __future__ import annotations

from dataclasses import replace

from graft.config.clean import Repair
from graft.data.clean.step import Drop, Notes, Result
from graft.types import Conversation, Message


def repair_order(conversation: Conversation, settings: Repair, notes: Notes) -> Result:
    """Merge consecutive turns of a role, drop answers before the first question and questions after the last answer.

    A second system turn further down, a tool turn without its call and two calls in a row stay as they are.
    """
    if conversation.text is not None:
        return conversation
    turns = list(conversation.messages)
    if settings.same_role == "merge":
        turns = _merged(turns)
    notes["turns merged"] += len(conversation.messages) - len(turns)
    if settings.first_answer == "drop":
        turns = _without_first_answers(turns, notes)
    if settings.trailing_user == "drop":
        while turns and turns[-1].role == "user":
            turns.pop()
            notes["trailing user turns dropped"] += 1
    if all(message.role != "assistant" for message in turns):
        return Drop("messages", "no answer to a question is left")
    messages = tuple(turns)
    return conversation if messages == conversation.messages else replace(conversation, messages=messages)


def _merged(turns: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in turns:
        if merged and _can_merge(merged[-1], message):
            merged[-1] = _joined(merged[-1], message)
        else:
            merged.append(message)
    return merged


def _can_merge(before: Message, after: Message) -> bool:
    """Tool results belong to calls of their own, and two weights or names cannot be one."""
    same = (before.role, before.weight, before.name) == (after.role, after.weight, after.name)
    return same and before.role != "tool" and not before.tool_calls


def _joined(before: Message, after: Message) -> Message:
    """A call may follow what was said; an empty turn leaves no blank line."""
    content = "\n\n".join(part for part in (before.content, after.content) if part.strip())
    thoughts = [part for part in (before.reasoning, after.reasoning) if part]
    return replace(after, content=content, reasoning="\n\n".join(thoughts) or None)


def _without_first_answers(turns: list[Message], notes: Notes) -> list[Message]:
    """Everything between the system turns and the first user turn goes."""
    start = next((index for index, message in enumerate(turns) if message.role != "system"), len(turns))
    first = next((index for index, message in enumerate(turns) if message.role == "user"), len(turns))
    notes["answers without a question dropped"] += max(0, first - start)
    return turns[:start] + turns[max(start, first) :]
