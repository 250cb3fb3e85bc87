"""The steps in order over a stream of conversations, in several processes. What goes in comes out or is counted out.

Steps that look at one conversation run in batches in the workers; those that compare conversations (`exact`, `near`)
run between, in this process. What comes out is the same for any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graft.config.clean import Clean, Cut, Exact, Language, Near, Personal, Rules, Step
from graft.data.clean.cut import Count, cut_long
from graft.data.clean.damage import repair_damage
from graft.data.clean.debris import remove_debris
from graft.data.clean.duplicates import drop_equal, drop_near, equality_key
from graft.data.clean.html import convert_html
from graft.data.clean.length import check_length, drop_empty
from graft.data.clean.personal import check_regions, treat_personal
from graft.data.clean.refusal import drop_refusals
from graft.data.clean.repair import repair_order
from graft.data.clean.repetition import drop_repetition
from graft.data.clean.report import Dropped, StepReport
from graft.data.clean.rules import apply_rules, check_rules
from graft.data.clean.spool import Spool
from graft.data.clean.step import Drop, Notes, Result
from graft.data.clean.tongue import check_languages, filter_language
from graft.data.layout.order import check_turns
from graft.data.layout.turns import Turn
from graft.data.parallel import map_batches
from graft.data.values import UnfitError
from graft.errors import ConfigError
from graft.types import Conversation, Reject

Item = Conversation | Dropped

_STEPS: dict[str, Callable[[Conversation, Any, Notes], Result]] = {
    "damage": repair_damage,
    "html": convert_html,
    "debris": remove_debris,
    "repair": repair_order,
    "rules": apply_rules,
    "empty": drop_empty,
    "length": check_length,
    "language": filter_language,
    "refusal": drop_refusals,
    "repetition": drop_repetition,
    "personal": treat_personal,
}
"""A new step is one function and one entry here, and its settings in `config.clean`."""

CHECK = "check"
"""Name of what follows the last step that looks at one conversation: what it lets through, `load` reads back."""


@dataclass(slots=True)
class Report:
    """What every step did, in order."""

    steps: list[StepReport] = field(default_factory=list)
    unread: int = 0
    """Rows that were rejected before any step saw them."""

    @property
    def read(self) -> int:
        """Rows that came in."""
        return self.unread + (self.steps[0].entered if self.steps else 0)

    @property
    def added(self) -> int:
        """Conversations more than rows, from cutting."""
        return sum(step.added for step in self.steps)

    @property
    def rejected(self) -> int:
        """Rows and parts that did not come out: kept + rejected = read + added."""
        return self.unread + sum(step.dropped for step in self.steps)

    @property
    def kept(self) -> int:
        """Conversations that came out."""
        return self.steps[-1].left if self.steps else 0


def check_settings(settings: Clean) -> None:
    """Refuse before any row is read what would only be found at some row.

    Raises:
        ConfigError: a pattern, language, country or model that cannot serve; names the step.
    """
    if not settings.steps:
        raise ConfigError("no step is left to run; name some with --only or `steps`")
    for step in settings.steps:
        if isinstance(step, Rules):
            check_rules(step)
        elif isinstance(step, Language):
            check_languages(step)
            if not step.keep and not step.skip:
                raise ConfigError("step language: nothing to keep or skip; say language.keep=en,zh or language.skip=ru")
        elif isinstance(step, Personal):
            check_regions(step)
        elif isinstance(step, Cut) and step.model is None:
            raise ConfigError("step cut: no model to count tokens with; say cut.model=FOLDER")


def clean(
    rows: Iterable[Conversation | Reject],
    settings: Clean,
    report: Report,
    folder: Path,
    workers: int = 1,
    count: Count | None = None,
) -> Iterator[Item]:
    """Every row's conversation after all steps, or why there is none, in the order of the rows.

    Args:
        rows: what `stream_sources` gives; turns may be out of order.
        report: counted into; complete when the stream has ended.
        folder: where a temporary file of the size of the data may lie, for `near`.
        count: counts tokens for `cut`.

    Raises:
        GraftError: a step cannot go on (see `apply_rules`, `cut_long`).
    """
    stream: Iterator[Item] = _as_items(rows, report)
    local: list[Step] = []
    last = max((index for index, step in enumerate(settings.steps) if not isinstance(step, Exact | Near)), default=-1)
    for index, step in enumerate(settings.steps):
        if not isinstance(step, Exact | Near):
            local.append(step)
            continue
        checked = index > last and not any(done.step == CHECK for done in report.steps)
        keyed = isinstance(step, Exact)
        batches = _in_batches(stream, local, checked, keyed, settings.examples, report, workers, count)
        own = StepReport(step.step)
        report.steps.append(own)
        if isinstance(step, Exact):
            stream = drop_equal(batches, own, settings.examples)
        else:
            stream = drop_near((item for item, _ in batches), step, own, settings.examples, Spool(folder), workers)
        local = []
    if not any(done.step == CHECK for done in report.steps):
        stream = (
            item for item, _ in _in_batches(stream, local, True, False, settings.examples, report, workers, count)
        )
    return stream


def _as_items(rows: Iterable[Conversation | Reject], report: Report) -> Iterator[Item]:
    for row in rows:
        if isinstance(row, Reject):
            report.unread += 1
            yield Dropped(row.file, row.line, "read", row.field, row.reason)
        else:
            yield row


def _in_batches(
    stream: Iterator[Item],
    steps: Sequence[Step],
    checked: bool,
    keyed: bool,
    examples: int,
    report: Report,
    workers: int,
    count: Count | None,
) -> Iterator[tuple[Item, bytes]]:
    """The stream after some steps; the reports of the steps stand in `report` at once and grow with the stream."""
    mine = [StepReport(step.step) for step in steps] + ([StepReport(CHECK)] if checked else [])
    report.steps += mine
    if not mine and not keyed:
        return ((item, b"") for item in stream)
    work = partial(clean_batch, steps=tuple(steps), checked=checked, keyed=keyed, examples=examples, count=count)

    def run() -> Iterator[tuple[Item, bytes]]:
        for items, reports in map_batches(work, stream, workers):
            for own, new in zip(mine, reports, strict=True):
                own.add(new, examples)
            yield from items

    return run()


def clean_batch(
    items: list[Item], steps: tuple[Step, ...], checked: bool, keyed: bool, examples: int, count: Count | None
) -> tuple[list[tuple[Item, bytes]], list[StepReport]]:
    """What one worker does with one batch: each item after the steps, with its exact key where that is wanted.

    Pure but for caches: a step sees one conversation at a time.
    """
    reports = [StepReport(step.step) for step in steps]
    for step, own in zip(steps, reports, strict=True):
        items = [made for item in items for made in _apply(item, step, own, examples, count)]
    if checked:
        reports.append(StepReport(CHECK))
        items = [made for item in items for made in _apply(item, None, reports[-1], examples, count)]
    keys = (equality_key(item) if keyed and isinstance(item, Conversation) else b"" for item in items)
    return list(zip(items, keys, strict=True)), reports


def _apply(item: Item, step: Step | None, own: StepReport, examples: int, count: Count | None) -> list[Item]:
    """One step (None is the check) on one item; what was dropped before passes through."""
    if isinstance(item, Dropped):
        return [item]
    own.entered += 1
    result: Result | list[Conversation]
    if step is None:
        result = _checked(item)
    elif isinstance(step, Cut):
        assert count is not None
        result = cut_long(item, step, own.notes, count)
    else:
        result = _STEPS[step.step](item, step, own.notes)
    if isinstance(result, Drop):
        return [own.count_drop(item, result, examples)]
    if isinstance(result, list):
        own.added += len(result) - 1
        own.count_change(item, result[0], examples)
        return list(result)
    if result is not item:
        own.count_change(item, result, examples)
    return [result]


def _checked(conversation: Conversation) -> Result:
    """What `load` would refuse is dropped here, with its words."""
    if conversation.text is not None:
        return conversation if conversation.text.strip() else Drop("text", "empty text")
    turns = [Turn(f"messages[{index}]", message) for index, message in enumerate(conversation.messages)]
    try:
        check_turns(turns, "messages")
    except UnfitError as error:
        return Drop(error.field, error.reason)
    return conversation
