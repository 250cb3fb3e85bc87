"""What the cleaning steps have in common: their answer, and how they look at the texts and turns of a conversation.

Speaks of conversations. A step is a pure function of one conversation: it knows no other row, no file and no order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from graft.types import Conversation, Message

Notes = Counter[str]
"""What a step found, by name: counts for the report that are neither changes nor drops."""
Removal = Literal["pair", "rest", "conversation"]
"""What goes with a bad turn: its question and answers, also everything after them, or the whole conversation."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a step lets a conversation go."""

    field: str
    """The turn that decided, such as `messages[3]`; `messages` or `text` for the whole."""
    reason: str


Result = Conversation | Drop
Edit = Callable[[str, str], str]
"""(role of the turn or "text", its text) to the text to have instead."""


def edit_texts(conversation: Conversation, edit: Edit, calls: bool = False) -> Conversation:
    """The conversation with every content, reasoning and raw text edited; itself where nothing changed.

    With `calls` also the texts inside of the arguments of tool calls.
    """
    if conversation.text is not None:
        text = edit("text", conversation.text)
        return conversation if text == conversation.text else replace(conversation, text=text)
    messages = tuple(_edit_message(message, edit, calls) for message in conversation.messages)
    unchanged = all(new is old for new, old in zip(messages, conversation.messages, strict=True))
    return conversation if unchanged else replace(conversation, messages=messages)


def _edit_message(message: Message, edit: Edit, calls: bool) -> Message:
    content = edit(message.role, message.content)
    reasoning = None if message.reasoning is None else edit(message.role, message.reasoning)
    tool_calls = message.tool_calls
    if calls and tool_calls:
        tool_calls = tuple(_edit_call(call, message.role, edit) for call in tool_calls)
    if (content, reasoning, tool_calls) == (message.content, message.reasoning, message.tool_calls):
        return message
    return replace(message, content=content, reasoning=reasoning, tool_calls=tool_calls)


def _edit_call(call: Mapping[str, Any], role: str, edit: Edit) -> Mapping[str, Any]:
    """Only what the arguments say is edited, never a name or a key: those belong to the tool."""
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": _edit_value(function.get("arguments"), role, edit)}}


def _edit_value(value: Any, role: str, edit: Edit) -> Any:
    if isinstance(value, str):
        return edit(role, value)
    if isinstance(value, Mapping):
        return {key: _edit_value(item, role, edit) for key, item in value.items()}
    return [_edit_value(item, role, edit) for item in value] if isinstance(value, list) else value


def texts(conversation: Conversation) -> Iterator[tuple[str, str, str]]:
    """(field, role or "text", text) of every content and reasoning, or of the raw text."""
    if conversation.text is not None:
        yield "text", "text", conversation.text
    for index, message in enumerate(conversation.messages):
        yield f"messages[{index}]", message.role, message.content
        if message.reasoning is not None:
            yield f"messages[{index}].reasoning_content", message.role, message.reasoning


def chars(conversation: Conversation) -> int:
    """Characters of all texts together."""
    return sum(len(text) for _, _, text in texts(conversation))


def exchanges(messages: Collection[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What stands before the first user turn; then each user turn with all turns up to the next user turn."""
    head: list[Message] = []
    parts: list[list[Message]] = []
    for message in messages:
        if message.role == "user":
            parts.append([message])
        else:
            (parts[-1] if parts else head).append(message)
    return head, parts


def remove_turns(conversation: Conversation, bad: Collection[int], how: Removal) -> Conversation | None:
    """The conversation without the turns of these indices and what goes with them; None where no answer is left.

    A bad turn before the first question (a greeting) goes alone.
    """
    if how == "conversation":
        return None
    head, parts = exchanges(conversation.messages)
    start = len(head)
    kept = [message for index, message in enumerate(head) if index not in bad]
    for part in parts:
        spoilt = any(index in bad for index in range(start, start + len(part)))
        start += len(part)
        if spoilt and how == "rest":
            break
        if not spoilt:
            kept += part
    if all(message.role != "assistant" for message in kept):
        return None
    return replace(conversation, messages=tuple(kept))
