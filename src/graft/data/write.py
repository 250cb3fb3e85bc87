"""Conversations to chat-messages jsonl, graft's canonical file, which `load` reads back without loss.

Speaks of conversations and lines. Equal after a round trip is everything but `origin` and `source`, which name the
file that was read last, and empty reasoning (""), which is the same as none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from graft.data.formats import RESERVED
from graft.data.turns import split_think
from graft.errors import InputError
from graft.runs import write_atomic
from graft.types import Conversation, Message


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write one conversation per line; the file appears whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    write_lines(path, (as_row(conversation) for conversation in conversations))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as jsonl, atomically.

    Raises:
        InputError: the file cannot be written.
    """
    # `backslashreplace` turns what UTF-8 cannot hold (a file name's odd byte) into a valid JSON escape.
    lines = (json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n" for row in rows)
    try:
        write_atomic(path, b"".join(lines))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def as_row(conversation: Conversation) -> dict[str, Any]:
    """The conversation as a row of the `messages` format.

    `meta` becomes columns; those whose name means something to a format go into one column `meta`, so that no file
    is read otherwise than it was written. Raw text has `messages: []` and `text`, so that a file can hold both.
    """
    row: dict[str, Any] = {
        "id": conversation.id,
        "messages": [_message(message) for message in conversation.messages],
    }
    if conversation.tools:
        row["tools"] = list(conversation.tools)
    if conversation.text is not None:
        row["text"] = conversation.text
    apart = {column: value for column, value in conversation.meta.items() if column in RESERVED}
    row |= {column: value for column, value in conversation.meta.items() if column not in RESERVED}
    if apart:
        row["meta"] = apart
    return row


def _message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    elif message.role == "assistant" and split_think(message.content)[1] != message.content:
        value["reasoning_content"] = ""  # says: the think block is content, do not split it off
    if message.tool_calls:
        value["tool_calls"] = list(message.tool_calls)
    for key, item in (("name", message.name), ("tool_call_id", message.tool_call_id), ("weight", message.weight)):
        if item is not None:
            value[key] = item
    return value
