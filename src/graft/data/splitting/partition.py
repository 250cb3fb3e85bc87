"""Files of conversations to a folder of train.jsonl, val.jsonl and test.jsonl, however large they are.

Speaks of files, rows and parts. Knows nothing of how rows are grouped, divided or found to overlap.

Two passes: the first reads every row, writes it aside as it will be, and keeps a few numbers of it in memory; the
second copies each line to its part.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from graft.config.data import Source
from graft.data.alike.dedup import SKETCHED_AT_ONCE
from graft.data.alike.overlap import Evaluation, Overlap
from graft.data.alike.questions import stream_questions
from graft.data.layout.formats import FORMATS, to_conversation
from graft.data.load import stream_sources
from graft.data.parallel import map_batches
from graft.data.splitting.divide import PARTS, TRAIN, Codes, divide
from graft.data.splitting.division import Outcome, Wanted, describe, notes_on, refuse_nothing, said_of_groups
from graft.data.splitting.grouping import Grouping, sketch_pairs
from graft.data.splitting.strata import Columns
from graft.data.tally import Tally
from graft.data.write import as_row, encode_line, line_writer
from graft.errors import InputError
from graft.runs import atomic_file
from graft.types import Conversation, Origin, Reject

Write = Callable[[Mapping[str, Any]], None]


def split_files(
    sources: Sequence[Source], out: Path, wanted: Wanted, advance: Callable[[int], None] = lambda rows: None
) -> Outcome:
    """Divide the rows of `sources` into files of the folder `out`, which must exist.

    `rejects.jsonl` lists rows that cannot be read or were dropped; `overlaps.jsonl` those only reported.

    Raises:
        ConfigError: more rows are wanted than there are.
        InputError: a file cannot be read or written, a column is in no row, or `out` has a part of another split.
        DataRefused: too many rows were rejected, or every one overlaps an evaluation file.
    """
    outcome = Outcome(Tally())
    targets = [out / f"{name}.jsonl" for name in PARTS]
    for target in targets:
        if target.is_dir():
            raise InputError(f"{target}: is a folder, and a part would be written there; choose another --out")
    evaluation = _read_evaluation(wanted, outcome) if wanted.against else None
    grouping, columns = Grouping(wanted.group, wanted.near), Columns(wanted.stratify)
    with _spool(out) as spool, _overlaps_file(out / "overlaps.jsonl", wanted) as list_overlap:
        with line_writer(out / "rejects.jsonl") as reject:
            rows = _kept(stream_sources(sources, outcome.tally), reject)
            if evaluation is not None:
                rows = _compared(rows, evaluation, wanted.drop, reject if wanted.drop else list_overlap, outcome)
            count = _first_pass(_told(rows, advance), spool, grouping, columns, wanted.workers)
        outcome.tally.refuse_if_too_many(wanted.max_rejected)
        outcome.decisions += outcome.tally.decisions
        refuse_nothing(count, outcome, wanted)
        strata, why = columns.choose()
        grouped = grouping.grouped()
        parts = divide(
            grouped.places, grouped.groups, None if strata is None else strata.codes, wanted.val, wanted.test
        )
        describe(outcome, grouped, strata, parts)
        outcome.decisions += [said_of_groups(grouping, columns, outcome, count), why]
        outcome.notes += notes_on(outcome, wanted, count)
        for name, target in zip(PARTS, targets, strict=True):
            if not outcome.rows[name] and target.exists():  # it would be taken for a part of this split
                raise InputError(f"{target}: is from another split, this one has no {name} part; remove it")
        if wanted.check:
            outcome.parts_overlap = _check_parts(spool, targets, parts, wanted, list_overlap)
        _write_parts(spool, targets, parts)
    outcome.written = {
        str(target): outcome.rows[name] for name, target in zip(PARTS, targets, strict=True) if outcome.rows[name]
    }
    return outcome


# The first pass -------------------------------------------------------------------------------------------------


def _read_evaluation(wanted: Wanted, outcome: Outcome) -> Evaluation:
    evaluation = Evaluation(_questions(wanted.against, outcome), wanted.near, wanted.gram_share)
    outcome.evaluation_rows = evaluation.rows
    return evaluation


def _questions(files: Sequence[str], outcome: Outcome) -> Iterator[Conversation]:
    """All evaluation rows. A file that would guard against nothing is an error, never a silent success."""
    for file in files:
        tally = Tally()
        for item in stream_questions(file, tally):
            if isinstance(item, Conversation):
                yield item
        outcome.decisions += tally.decisions
        for count, reject in tally.commonest():
            said = f"{file}: {count} rows cannot be compared, the first in line {reject.line}: {reject.reason}"
            if not tally.kept:
                raise InputError(f"{said}; correct the file or leave it out")
            outcome.notes.append(said)


def _kept(items: Iterable[Conversation | Reject], reject: Write) -> Iterator[Conversation]:
    for item in items:
        if isinstance(item, Reject):
            reject(asdict(item))
        else:
            yield item


def _compared(
    rows: Iterator[Conversation], evaluation: Evaluation, drop: bool, write: Write, outcome: Outcome
) -> Iterator[Conversation]:
    """The rows, without those that overlap the evaluation where they are to be dropped."""
    while batch := list(islice(rows, SKETCHED_AT_ONCE)):
        for row, overlap in zip(batch, evaluation.overlaps(batch), strict=True):
            if overlap is not None:
                outcome.against[overlap.kind] += 1
                outcome.dropped += drop
                write(_overlap_row(row.origin, overlap))
            if overlap is None or not drop:
                yield row


def _overlap_row(origin: Origin, overlap: Overlap) -> dict[str, Any]:
    """A line of rejects.jsonl or overlaps.jsonl."""
    reason = f"overlaps {overlap.against} ({overlap.kind}, {overlap.score:.3g})"
    found = {"against": str(overlap.against), "kind": overlap.kind, "score": round(overlap.score, 4)}
    return asdict(Reject(origin.file, origin.line, "", reason)) | found


def _told(rows: Iterator[Conversation], advance: Callable[[int], None]) -> Iterator[Conversation]:
    for row in rows:
        advance(1)
        yield row


def _first_pass(
    rows: Iterator[Conversation], spool: BinaryIO, grouping: Grouping, columns: Columns, workers: int
) -> int:
    """Write every row aside and tell it to the grouping and the columns. Returns their number."""
    count = 0

    def texts() -> Iterator[tuple[str, str]]:
        nonlocal count
        for row in rows:
            spool.write(encode_line(as_row(row)))
            columns.add(row)
            count += 1
            yield grouping.add(row)

    if grouping.how == "near":
        make = partial(sketch_pairs, bands=grouping.bands)
        for prompts, wholes in map_batches(make, texts(), workers, SKETCHED_AT_ONCE):
            grouping.add_sketches(prompts, wholes)
    else:
        deque(texts(), maxlen=0)
    return count


# Between the passes ---------------------------------------------------------------------------------------------


def _check_parts(spool: BinaryIO, targets: Sequence[Path], parts: Codes, wanted: Wanted, write: Write) -> Counter[str]:
    """Overlaps of the training part with the held-out ones, by kind; each is listed."""
    held_out = Evaluation(_conversations(spool, targets, parts, train=False), wanted.near, wanted.gram_share)
    found = Outcome(Tally())
    deque(_compared(_conversations(spool, targets, parts, train=True), held_out, False, write, found), maxlen=0)
    return found.against


def _conversations(spool: BinaryIO, targets: Sequence[Path], parts: Codes, train: bool) -> Iterator[Conversation]:
    """The training rows or the others, with their places in the files to be written."""
    spool.seek(0)
    lines = [0] * len(PARTS)
    for line, part in zip(spool, parts.tolist(), strict=True):
        lines[part] += 1
        if (part == TRAIN) == train:
            origin = Origin(str(targets[part]), lines[part])
            row = to_conversation(FORMATS["messages"], json.loads(line), origin, "", require_answer=False)
            assert isinstance(row, Conversation)  # it was one when it was written
            yield row


# The second pass ------------------------------------------------------------------------------------------------


def _write_parts(spool: BinaryIO, targets: Sequence[Path], parts: Codes) -> None:
    """Copy each line to its part; an empty part has no file."""
    spool.seek(0)
    with ExitStack() as stack:
        files = {part: stack.enter_context(_part_file(targets[part])) for part in np.unique(parts).tolist()}
        for line, part in zip(spool, parts.tolist(), strict=True):
            files[part].write(line)
        for file in files.values():  # all on the disk before the first gets its name: old and new parts may share rows
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def _part_file(path: Path) -> Iterator[BinaryIO]:
    try:
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from None


@contextmanager
def _spool(folder: Path) -> Iterator[BinaryIO]:
    """A file without a name beside the parts, as large as all of them; gone when the block ends."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error}); choose another folder") from None


@contextmanager
def _overlaps_file(path: Path, wanted: Wanted) -> Iterator[Write]:
    """Lists overlaps that are only reported. Made when such are looked for; else that of an earlier split goes, once
    this one has come to its end: its lines would be about other parts."""
    if wanted.check or (wanted.against and not wanted.drop):
        with line_writer(path) as write:
            yield write
        return
    yield lambda row: None
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: is from an earlier split and cannot be removed ({error.strerror})") from None
