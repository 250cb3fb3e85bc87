"""A stream of conversations and drops, put aside on disk while another pass is made over its texts.

Speaks of lines of JSON in a temporary file that has no name and goes with the process.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graft.data.clean.report import Dropped
from graft.types import Conversation, Message, Origin


class Spool:
    """Written once, then read once, in order."""

    def __init__(self, folder: Path) -> None:
        """The temporary file lies in `folder`: where the result goes there is room for it."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed by `read`, or with the process

    def write(self, item: Conversation | Dropped) -> None:
        """Put one item at the end."""
        kind = "dropped" if isinstance(item, Dropped) else "conversation"
        self._file.write(json.dumps([kind, asdict(item)]).encode() + b"\n")

    def read(self) -> Iterator[Conversation | Dropped]:
        """Every item that was written, equal to what it was; then the file is gone."""
        with self._file as file:
            file.seek(0)
            for line in file:
                kind, value = json.loads(line)
                yield Dropped(**value) if kind == "dropped" else _conversation(value)


def _conversation(value: dict[str, Any]) -> Conversation:
    messages = tuple(
        Message(**{**message, "tool_calls": tuple(message["tool_calls"])}) for message in value.pop("messages")
    )
    origin, tools = Origin(**value.pop("origin")), tuple(value.pop("tools"))
    return Conversation(**value, origin=origin, messages=messages, tools=tools)
