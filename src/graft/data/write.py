"""Conversations to chat-messages jsonl or parquet, graft's canonical files, which `load` reads back without loss.

Speaks of conversations, lines and row groups. Equal after a round trip is everything but `origin` and `source`, which
name the file that was read last, and empty reasoning (""), which is the same as none.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from graft.data.layout.calls import has_tagged_calls
from graft.data.layout.formats import RESERVED
from graft.data.layout.turns import split_think
from graft.data.reading.columnar import JSON_COLUMNS
from graft.errors import InputError
from graft.runs import atomic_file
from graft.types import Conversation, Message

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""What a file of conversations may be called."""
_GROUP_ROWS, _GROUP_CHARS = 16384, 1 << 25
"""A parquet row group is written when either is reached: it bounds what is held in memory."""

_ENCODER = json.JSONEncoder(ensure_ascii=False)
_HIDDEN = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
"""Characters that reorder, hide or break a line where a person reads it. JSON escapes the lower controls itself.
Joiners (U+200C, U+200D) stay: Persian and emoji need them."""


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> int:
    """Write conversations as they come; the file appears whole or not at all. Returns how many there were.

    Raises:
        InputError: the file cannot be written, or has none of SUFFIXES.
    """
    count = 0
    with conversation_writer(path) as write:
        for conversation in conversations:
            write(conversation)
            count += 1
    return count


@contextmanager
def conversation_writer(path: Path) -> Iterator[Callable[[Conversation], None]]:
    """A function that adds a conversation to a file; the file appears when the block ends well.

    Raises:
        InputError: the file cannot be written, or has none of SUFFIXES.
    """
    check_suffix(path)
    if path.suffix == ".parquet":
        with _parquet_writer(path) as write:
            yield write
    else:
        with line_writer(path) as write_line:
            yield lambda conversation: write_line(as_row(conversation))


def check_suffix(path: Path) -> None:
    """Refuse a name that does not say how conversations are to be written.

    Raises:
        InputError: it ends in none of SUFFIXES.
    """
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: conversations are written as {', '.join(SUFFIXES)}; choose a name that ends in one")


def stem_of(path: Path) -> str:
    """The file's name without the one of SUFFIXES in which it ends."""
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.name)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as jsonl as they come, atomically; .gz and .zst are compressed.

    Raises:
        InputError: the file cannot be written.
    """
    with line_writer(path) as write:
        for row in rows:
            write(row)


@contextmanager
def line_writer(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that adds an object to a jsonl file; the file appears when the block ends well.

    Raises:
        InputError: the file cannot be written.
    """
    with _naming(path), atomic_file(path) as file, _compressed(file, path.suffix) as lines:

        def write(row: Mapping[str, Any]) -> None:
            lines.write(encode_line(row))

        yield write


def encode_line(row: Mapping[str, Any]) -> bytes:
    """The row as a line of JSON that a person can read: text as it is, but for what would hide or move it."""
    text = _ENCODER.encode(row)
    if not text.isascii() or "\x7f" in text:
        text = _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    # `backslashreplace` turns what UTF-8 cannot hold (a file name's odd byte) into a valid JSON escape.
    return text.encode(errors="backslashreplace") + b"\n"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None


@contextmanager
def _compressed(file: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    """The file itself, or one that compresses into it, by suffix; no name or time goes in: same rows, same bytes."""
    if suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            yield cast(BinaryIO, packed)
    elif suffix == ".zst":
        import zstandard

        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as packer:
            yield cast(BinaryIO, packer)
    else:
        yield file


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Callable[[Conversation], None]]:
    """A function that adds a conversation to a parquet file. What differs from row to row is a column of JSON text."""
    import pyarrow as pa  # here, because it would slow the start of every other command
    import pyarrow.parquet as pq

    text = pa.string()
    message = [(key, text) for key in ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")]
    schema = pa.schema(
        [
            ("id", text),
            ("messages", pa.list_(pa.struct([*message, ("weight", pa.float64())]))),
            ("tools", text),
            ("text", text),
            ("meta", text),
        ],
        {JSON_COLUMNS: b"tools meta"},
    )
    rows: list[dict[str, Any]] = []
    chars = 0
    with _naming(path), atomic_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:

        def write(conversation: Conversation) -> None:
            nonlocal chars
            rows.append(_flat_row(conversation))
            chars += sum(len(message.content) for message in conversation.messages) + len(conversation.text or "")
            if len(rows) == _GROUP_ROWS or chars > _GROUP_CHARS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
                chars = 0

        yield write
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _flat_row(conversation: Conversation) -> dict[str, Any]:
    """The conversation with the columns of the parquet file; null where there is nothing."""
    messages = [_message(message) for message in conversation.messages]
    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = json.dumps(message["tool_calls"], ensure_ascii=False)
    return {
        "id": conversation.id,
        "messages": messages,
        "tools": json.dumps(conversation.tools, ensure_ascii=False) if conversation.tools else None,
        "text": conversation.text,
        "meta": json.dumps(conversation.meta, ensure_ascii=False) if conversation.meta else None,
    }


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
    apart = {column: value for column, value in conversation.meta.items() if _means_something(column, value)}
    row |= {column: value for column, value in conversation.meta.items() if column not in apart}
    if apart:
        row["meta"] = apart
    return row


def _means_something(column: str, value: Any) -> bool:
    """Whether a column of `meta` would be read as more than that; `label: false` marks what KTO sets do not want."""
    return column in RESERVED or (column == "label" and isinstance(value, bool))


def _message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    elif message.role == "assistant" and split_think(message.content)[1] != message.content:
        value["reasoning_content"] = ""  # says: the think block is content, do not split it off
    if message.tool_calls:
        value["tool_calls"] = list(message.tool_calls)
    elif message.role == "assistant" and has_tagged_calls(message.content):
        value["tool_calls"] = []  # says the same of `<tool_call>` blocks
    for key, item in (("name", message.name), ("tool_call_id", message.tool_call_id), ("weight", message.weight)):
        if item is not None:
            value[key] = item
    return value
