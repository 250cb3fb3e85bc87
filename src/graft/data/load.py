"""Sources to conversations: every row of every file is kept or rejected, and the counts say so.

Speaks of sources, conversations and rejects. Knows no tokens: what is too long is decided later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from graft.config.data import Source
from graft.data.layout.choose import Choice, NotRowsError, choose
from graft.data.layout.formats import to_conversation, unused_message_keys
from graft.data.reading.read import Part, open_address
from graft.data.tally import PartTally, Tally
from graft.data.write import line_writer, write_lines
from graft.errors import InputError
from graft.types import Conversation, Reject
from graft.words import counted, one_or_many


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the sources held: len(conversations) + len(rejects) == read."""

    conversations: list[Conversation]
    rejects: list[Reject]
    read: int
    """Rows read; blank lines are no rows."""
    decisions: list[str]
    """One sentence per decision taken, such as `a.json: alpaca: 1666 of 1666 rows have instruction, output`."""


def load_sources(sources: Sequence[Source], require_answer: bool = True) -> Loaded:
    """Everything that `stream_sources` gives, held in memory."""
    tally = Tally()
    conversations: list[Conversation] = []
    rejects: list[Reject] = []
    for item in stream_sources(sources, tally, require_answer):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            conversations.append(item)
    return Loaded(conversations, rejects, tally.read, tally.decisions)


def stream_sources(
    sources: Sequence[Source], tally: Tally, require_answer: bool = True, check: bool = True
) -> Iterator[Conversation | Reject]:
    """Every row of every source in order, each file in its own format, with ids that are unique over all of them.

    Counts into `tally`; its decisions about a file are there once the file has been read to its end.
    Without `require_answer` a conversation may end before its answer: a question that a model will be asked.
    Without `check` turns may come in any order: for whoever repairs it.

    Raises:
        InputError: a file cannot be read, fits no format, or is named twice.
    """
    taken: Counter[str] = Counter()
    passed: NotRowsError | None = None
    for source, part in _parts(sources, tally):
        try:
            choice = choose(part.name, _as_listed(source, part), part.rows(), require_answer)
        except NotRowsError as error:
            if not part.among_others:
                raise
            tally.decisions.append(f"{part.name}: passed over, it holds no rows of data ({error.why})")
            passed = error
            continue
        tally.decisions += choice.notes
        tally.parts.append(PartTally(part.name, choice.form.name))
        yield from _stream(source, part, choice, tally, taken, require_answer, check)
    if passed is not None and not tally.parts:  # nothing else was there
        raise passed


def _parts(sources: Sequence[Source], tally: Tally) -> Iterator[tuple[Source, Part]]:
    """All files of all sources. They are looked for before the first is read: a wrong name must not cost an hour."""
    seen: set[str] = set()
    found: list[tuple[Source, Part]] = []
    for source in sources:
        opened = open_address(source.path)
        tally.decisions += opened.notes
        for part in opened.parts:
            if not seen.isdisjoint(part.files):
                raise InputError(
                    f"{part.name}: named twice; name it once, with weight: 2 to see its rows twice as often"
                )
            seen.update(part.files)
            found.append((source, part))
    yield from found


def _as_listed(source: Source, part: Part) -> Source:
    """The source with the format and the columns that a catalogue gives its data, where the user gave none."""
    if part.entry is None:
        return source
    form = part.entry.format if source.format == "auto" else source.format
    return source.model_copy(update={"format": form, "columns": {**part.entry.columns, **source.columns}})


def only_conversations(
    items: Iterable[Conversation | Reject], tally: Tally, rejects: Path, max_rejected: float
) -> Iterator[Conversation]:
    """Pass on the conversations and write the rejects to their file; at the end refuse where they were too many.

    The refusal comes while a writer still waits for the next conversation, so its file never appears; the
    file of the rejects does.

    Raises:
        DataRefused: more than `max_rejected` (a share) of the rows were rejected.
        InputError: the file of the rejects cannot be written.
    """
    with line_writer(rejects) as write:
        for item in items:
            if isinstance(item, Reject):
                write(asdict(item))
            else:
                yield item
    tally.refuse_if_too_many(max_rejected)


def _stream(
    source: Source,
    part: Part,
    choice: Choice,
    tally: Tally,
    taken: Counter[str],
    require_answer: bool,
    check: bool,
) -> Iterator[Conversation | Reject]:
    """What one file holds; `taken` are the ids given so far."""
    form, fits, unused, kept = choice.form, Counter[tuple[str, ...]](), Counter[str](), Counter[str]()
    for raw in choice.rows:
        if isinstance(raw.value, Reject):
            tally.reject(raw.value)
            yield raw.value
            continue
        row = choice.in_our_words(raw.value)
        if fit := form.fit(row, required=require_answer):
            fits[fit] += 1
        result = to_conversation(form, row, raw.origin, source.path, require_answer, check)
        if isinstance(result, Reject):
            result = choice.in_their_words(result)
            tally.reject(result)
            yield result
            continue
        unused.update(unused_message_keys(row))
        if result.meta:
            kept.update(result.meta.keys())
        tally.keep()
        yield _with_unique_id(result, taken)
    tally.decisions += _decisions(source, part, choice, tally.parts[-1].read, fits, unused, kept)


def _decisions(
    source: Source,
    part: Part,
    choice: Choice,
    read: int,
    fits: Counter[tuple[str, ...]],
    unused: Counter[str],
    kept: Counter[str],
) -> list[str]:
    """The format with its evidence, the columns that it has no use for, and what of the messages could not be kept."""
    names = " or ".join(", ".join(choice.columns.get(name, name) for name in fit) for fit, _ in fits.most_common())
    how = "" if source.format == "auto" else " (as asked)"
    rows = f"{counted(read, 'row')} {one_or_many(read, 'has', 'have')}"
    decisions = [f"{part.name}: {choice.form.name}{how}: {fits.total()} of {rows} {names}"]
    if kept:
        more = f" and {len(kept) - 8} more" if len(kept) > 8 else ""
        columns = ", ".join(name[:40] for name, _ in kept.most_common(8))
        decisions.append(f"{part.name}: columns that go along as meta: {columns}{more}")
    if unused:
        keys = ", ".join(f"{key[:40]} ({counted(count, 'row')})" for key, count in unused.most_common(8))
        decisions.append(f"{part.name}: keys of messages that graft has no use for: {keys}")
    return decisions


def _with_unique_id(conversation: Conversation, taken: Counter[str]) -> Conversation:
    """The conversation with `#2`, `#3`, ... behind its id where that id was met before."""
    wanted = name = conversation.id
    number = max(taken[wanted], 1)
    while taken[name]:
        number += 1
        name = f"{wanted}#{number}"
    taken[name] = 1
    if name == wanted:
        return conversation
    taken[wanted] = number  # the next one goes on from here
    return replace(conversation, id=name)


def commonest_reasons(rejects: Iterable[Reject], most: int = 3) -> list[tuple[int, Reject]]:
    """How often each kind of reason occurs, commonest first, each with its first reject."""
    return _tally(rejects).commonest(most)


def refuse_if_too_many(rejects: Sequence[Reject], read: int, limit: float) -> None:
    """`Tally.refuse_if_too_many` for rejects that were collected in a list."""
    tally = _tally(rejects)
    tally.kept = read - tally.rejected
    tally.refuse_if_too_many(limit)


def _tally(rejects: Iterable[Reject]) -> Tally:
    tally = Tally()
    for reject in rejects:
        tally.reject(reject)
    return tally


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write one {file, line, field, reason} object per line; an empty file says that there were none.

    Raises:
        InputError: the file cannot be written.
    """
    write_lines(path, (asdict(reject) for reject in rejects))
