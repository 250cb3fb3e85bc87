"""The user's own texts, in pieces that fit a prompt. Speaks of files and pieces; knows no requests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.config.synth import Documents
from graft.data.alike.text import normalise
from graft.errors import InputError
from graft.types import Reject

_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE = re.compile(r"(?<=[。！？；!?])|(?<=[.;])(?=\s)|(?<=\n)")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document."""

    file: str
    """The path as the user wrote it, or below the folder that the user named."""
    number: int
    """1-based, in the order of the file."""
    text: str


@dataclass(frozen=True, slots=True)
class Library:
    """The pieces of all documents in order. files read = files with pieces + rejects about whole files."""

    chunks: list[Chunk]
    rejects: list[Reject]
    files: int


def load_documents(settings: Documents) -> Library:
    """Read the files and cut them; a piece that says the same as an earlier one is rejected.

    Raises:
        InputError: a path does not exist, or nothing at all is found.
    """
    chunks: list[Chunk] = []
    rejects: list[Reject] = []
    seen: dict[str, Chunk] = {}
    files = 0
    for path in _files(settings):
        files += 1
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            rejects.append(Reject(str(path), 0, "", f"byte {error.start} is not UTF-8; save the file as UTF-8"))
            continue
        except OSError as error:
            rejects.append(Reject(str(path), 0, "", f"cannot be read ({error.strerror})"))
            continue
        pieces = cut(text, settings.chunk_chars)
        if not pieces:
            rejects.append(Reject(str(path), 0, "", "is empty"))
        for number, piece in enumerate(pieces, 1):
            chunk = Chunk(str(path), number, piece)
            first = seen.setdefault(normalise(piece), chunk)
            if first is chunk:
                chunks.append(chunk)
            else:
                rejects.append(
                    Reject(chunk.file, number, "piece", f"says the same as {first.file}, piece {first.number}")
                )
    if not chunks:
        raise InputError(
            f"documents.paths: no text found in {', '.join(settings.paths)}; files end in {_named(settings)}"
        )
    return Library(chunks, rejects, files)


def cut(text: str, most: int) -> list[str]:
    """Pieces of up to `most` characters, about equally long: whole paragraphs, else sentences, else cut anyhow."""
    parts = [part for part in (part.strip() for part in _PARAGRAPH.split(text)) if part]
    return _pack(list(_split(parts, most)), most, "\n\n")


def _split(parts: Sequence[str], most: int) -> Iterator[str]:
    for part in parts:
        if len(part) <= most:
            yield part
            continue
        sentences = [piece for piece in _SENTENCE.split(part) if piece.strip()]
        hard = (sentence[at : at + most] for sentence in sentences for at in range(0, len(sentence), most))
        yield from (piece.strip() for piece in _pack(list(hard), most, ""))


def _pack(parts: Sequence[str], most: int, between: str) -> list[str]:
    """Join neighbours as long as they fit, aiming at pieces of one length rather than at full ones and a rest."""
    total = sum(len(part) + len(between) for part in parts)
    aim = total / max(1, -(-total // most))
    packed: list[str] = []
    for part in parts:
        last = packed[-1] if packed else ""
        if packed and len(last) + len(between) + len(part) <= most and len(last) + len(part) / 2 <= aim:
            packed[-1] = f"{last}{between}{part}"
        else:
            packed.append(part)
    return packed


def _files(settings: Documents) -> Iterator[Path]:
    """Files as named, and those of folders by suffix, in the order of their names; each once."""
    seen: set[Path] = set()
    for name in settings.paths:
        path = Path(name)
        if path.is_dir():
            found = sorted(
                (item for item in path.rglob("*") if item.is_file() and item.suffix.lower() in settings.suffixes),
                key=lambda item: item.relative_to(path).as_posix(),
            )
        elif path.is_file():
            found = [path]
        else:
            raise InputError(f"documents.paths: {path}: no such file or folder; check the path")
        for item in found:
            if item.resolve() not in seen:
                seen.add(item.resolve())
                yield item


def _named(settings: Documents) -> str:
    return " or ".join(settings.suffixes)
