"""Sources to conversations: every row of every file is kept or rejected, and the counts say so.

Speaks of sources, conversations and rejects. Knows no tokens: what is too long is decided later.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

from graft.config.data import Source
from graft.data.formats import FORMATS, Format, check_asked, detect, to_conversation, unused_message_keys
from graft.data.read import Raw, read_rows
from graft.data.write import write_lines
from graft.errors import DataRefused, InputError
from graft.types import Conversation, Reject

SAMPLE_ROWS = 100
"""Readable rows at the beginning of a file that decide its format."""


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
    """Read every source in order, each in its own format, with ids that are unique over all of them.

    Without `require_answer` a conversation may end before its answer: a question that a model will be asked.

    Raises:
        InputError: a file cannot be read, fits no format, or is named twice.
    """
    parts: list[Loaded] = []
    taken: Counter[str] = Counter()
    seen: set[Path] = set()
    for source in sources:
        path = Path(source.path).resolve()
        if path in seen:
            raise InputError(f"{source.path}: named twice; name it once, with weight: 2 to see its rows twice as often")
        seen.add(path)
        parts.append(_load(source, taken, require_answer))
    return Loaded(
        [conversation for part in parts for conversation in part.conversations],
        [reject for part in parts for reject in part.rejects],
        sum(part.read for part in parts),
        [decision for part in parts for decision in part.decisions],
    )


def _load(source: Source, taken: Counter[str], require_answer: bool) -> Loaded:
    """What one source holds; `taken` are the ids given so far."""
    form, rows = _choose(source, read_rows(Path(source.path)))
    conversations: list[Conversation] = []
    rejects: list[Reject] = []
    read, fits, unused = 0, Counter[tuple[str, ...]](), Counter[str]()
    for raw in rows:
        read += 1
        if isinstance(raw.value, Reject):
            rejects.append(raw.value)
            continue
        if fit := form.fit(raw.value):
            fits[fit] += 1
        result = to_conversation(form, raw.value, raw.origin, source.path, require_answer)
        if isinstance(result, Reject):
            rejects.append(result)
            continue
        conversations.append(_with_unique_id(result, taken))
        unused.update(unused_message_keys(raw.value))
    return Loaded(conversations, rejects, read, _decisions(source, form, read, fits, unused))


def _decisions(
    source: Source, form: Format, read: int, fits: Counter[tuple[str, ...]], unused: Counter[str]
) -> list[str]:
    """The format with its evidence, and what of the messages could not be kept."""
    names = " or ".join(", ".join(fit) for fit, _ in fits.most_common())
    how = "" if source.format == "auto" else " (as asked)"
    decisions = [f"{source.path}: {form.name}{how}: {fits.total()} of {read} rows have {names}"]
    if unused:
        keys = ", ".join(f"{key} ({count} rows)" for key, count in unused.most_common(8))
        decisions.append(f"{source.path}: keys of messages that graft has no use for: {keys}")
    return decisions


def _choose(source: Source, rows: Iterator[Raw]) -> tuple[Format, Iterator[Raw]]:
    """The source's format, and all of its rows again."""
    head: list[Raw] = []
    sample = []
    for raw in rows:
        head.append(raw)
        if not isinstance(raw.value, Reject):
            sample.append(raw.value)
        if len(sample) == SAMPLE_ROWS:
            break
    if not sample:
        first = next(raw.value for raw in head if isinstance(raw.value, Reject))
        raise InputError(
            f"{source.path}: none of its {len(head)} rows can be read; the first, line {first.line}: "
            f"{first.field + ': ' if first.field else ''}{first.reason}"
        )
    if source.format == "auto":
        form = detect(sample, source.path)
    else:
        form = FORMATS[source.format]
        check_asked(form, sample, source.path)
    return form, chain(head, rows)


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
    """How often each kind of reason occurs, commonest first, each with its first reject; numbers do not tell apart."""
    first: dict[str, Reject] = {}
    counts: Counter[str] = Counter()
    for reject in rejects:
        key = re.sub(r"0x[0-9a-f]+|\d+", "N", reject.reason)
        first.setdefault(key, reject)
        counts[key] += 1
    return [(count, first[key]) for key, count in counts.most_common(most)]


def refuse_if_too_many(rejects: Sequence[Reject], read: int, limit: float) -> None:
    """Stop when more than `limit` (a share) of the rows read were rejected, or all of them.

    Raises:
        DataRefused: with both numbers, the three commonest reasons with an example place each, and the next step.
    """
    if not rejects or (len(rejects) <= limit * read and len(rejects) < read):
        return
    lines = [
        f"{len(rejects)} of {read} rows ({len(rejects) / read:.1%}) were rejected, max_rejected allows {limit:.1%}"
    ]
    for count, reject in commonest_reasons(rejects):
        field = f"{reject.field}: " if reject.field else ""
        lines.append(f"  {count} x {field}{reject.reason}  (first at {reject.file}:{reject.line})")
    if len(rejects) == read:
        lines.append("nothing is left; correct the rows, or see docs/data.md for the formats")
    else:
        enough = math.ceil(len(rejects) / read * 1000) / 1000
        lines.append(f"correct the rows, or go on without them: max_rejected={enough:g}")
    raise DataRefused("\n".join(lines))


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write one {file, line, field, reason} object per line; an empty file says that there were none.

    Raises:
        InputError: the file cannot be written.
    """
    write_lines(path, (asdict(reject) for reject in rejects))
