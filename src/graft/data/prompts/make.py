"""A labelled set to an instruction set: for each row one or several templates, with solved examples where wanted.

Speaks of rows, templates and conversations. Knows no files beyond what `labelled` opens.

The data are read twice: first for the labels, which every prompt may list, and for the pool of examples; then row by
row, so that the size of the set does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graft.config.prompts import Prompts
from graft.data.prompts.draw import Draw
from graft.data.prompts.filters import NothingToAsk, TemplateFailure, TooSlow
from graft.data.prompts.labelled import Labelled, Piece
from graft.data.prompts.labels import Labels
from graft.data.prompts.shots import Pool
from graft.data.prompts.tasks import LABEL, Task
from graft.data.prompts.template import Rendered, Template
from graft.data.splitting.split import Part
from graft.data.tally import Tally
from graft.errors import InputError
from graft.types import Conversation, Message, Reject

OWN_META = ("template", "task", "lang", "form", "label", "choices", "target", "row", "part", "shots")
"""Columns that say how a conversation was made. They win over columns of the data with the same name."""

MOST_REASONS = 1000
FAILURES_IN_A_ROW = 100
"""So many rows in a row on which a template breaks, without one on which it works, and it is tried no more."""


@dataclass(frozen=True, slots=True)
class Made:
    """A conversation and the part that it belongs to."""

    part: Part
    conversation: Conversation


@dataclass(slots=True)
class Counts:
    """What was made: by template, and by label and part."""

    templates: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    shots: Counter[int] = field(default_factory=Counter)
    """How many conversations have how many examples."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How often a template had nothing to ask about a row, by template and reason."""

    def pass_over(self, template: str, said: str) -> None:
        """Count it; reasons may quote the row, so only so many are told apart."""
        reason = f"{template}: {said}"
        if reason not in self.passed_over and len(self.passed_over) >= MOST_REASONS:
            reason = f"{template}: another reason"
        self.passed_over[reason] += 1


@dataclass(slots=True)
class Maker:
    """Everything that is decided before the first conversation is made."""

    settings: Prompts
    task: Task
    templates: list[Template]
    pieces: list[Piece]
    labels: Labels | None
    pool: Pool
    decisions: list[str]
    notes: list[str]
    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """For promptsource's templates, by name: where each label stands among the template's own answers."""
    counts: Counts = field(default_factory=Counts)
    broken: dict[str, str] = field(default_factory=dict)
    """Templates that are tried no more, by name, and why."""
    _failures: Counter[str] = field(default_factory=Counter)
    """On how many rows in a row each template broke."""

    def make(self, tally: Tally) -> Iterator[Made | Reject]:
        """All rows in order: each gives its conversations, or one reject. Counts rows into `tally`.

        Raises:
            InputError: a template takes too long for a row.
        """
        for piece in self.pieces:
            for row in piece.rows(self.settings.val, self.settings.test):
                made = row if isinstance(row, Reject) else self._of_row(row, piece.name)
                if isinstance(made, Reject):
                    tally.reject(made)
                    yield made
                else:
                    tally.keep()
                    yield from made

    def _of_row(self, row: Labelled, source: str) -> list[Made] | Reject:
        """The row's conversations. A template that has nothing to ask about it is passed over for the next one."""
        named = self._named(row)
        if isinstance(named, Reject):
            return named
        wanted = len(self.templates) if self.settings.template == "all" else self.settings.per_row
        order: Sequence[Template] = self.templates
        if self.settings.template != "all":
            order = Draw(self.settings.seed, row.key, row.label, "template").shuffled(self.templates)
        made: list[Conversation] = []
        why: dict[str, str] = {}
        for template in order:
            if template.name in self.broken:
                why[template.name] = self.broken[template.name]
                self.counts.pass_over(template.name, why[template.name])
                continue
            try:
                made.append(self._conversation(named, template, source))
            except TooSlow as failure:
                raise InputError(
                    f"{row.origin.file}:{row.origin.line}: template {template.name}: {failure}; make it simpler, or "
                    "leave it out with --template"
                ) from None
            except TemplateFailure as failure:
                why[template.name] = str(failure)
                self.counts.pass_over(template.name, str(failure))
                if not isinstance(failure, NothingToAsk):
                    self._note_failure(template.name, str(failure))
                continue
            self._failures[template.name] = 0
            self.counts.templates[template.name] += 1
            if len(made) == wanted:
                break
        if made:
            label = made[0].meta.get("label")
            if label is not None:
                self.counts.labels[str(label)] += 1
            self.counts.parts[row.part] += len(made)
            return [Made(row.part, conversation) for conversation in made]
        name, reason = next(iter(why.items()))
        more = f" (nor do {len(why) - 1} other templates fit)" if len(why) > 1 else ""
        return Reject(row.origin.file, row.origin.line, "", f"template {name}: {reason}{more}")

    def _note_failure(self, name: str, why: str) -> None:
        self._failures[name] += 1
        if self._failures[name] == FAILURES_IN_A_ROW:
            self.broken[name] = f"broke on {FAILURES_IN_A_ROW} rows in a row and is tried no more ({why})"
            self.notes.append(f"template {name} {self.broken[name]}; correct it, or leave it out with --template")

    def _named(self, row: Labelled) -> Labelled | Reject:
        """The row with its label's name."""
        if self.labels is None or row.label is None:
            return row
        name = self.labels.of.get(row.label)
        if name is None:
            known = ", ".join(list(self.labels.of)[:8])
            reason = f"`{row.label[:40]}` is none of the labels ({known})" if row.label else "is empty"
            return Reject(row.origin.file, row.origin.line, LABEL, reason)
        return replace(row, values={**row.values, LABEL: name})

    def _values(self, row: Labelled, template: Template) -> Mapping[str, Any]:
        """What the template sees of the row: promptsource's see a label as its index among their own answers."""
        if self.labels is None or row.label is None or template.name not in self.positions:
            return row.values
        index = self.positions[template.name][self.labels.names.index(row.values[LABEL])]
        return {**row.values, LABEL: index}

    def _conversation(self, row: Labelled, template: Template, source: str) -> Conversation:
        settings = self.settings
        choices = self._choices(row)
        draw = Draw(settings.seed, row.key, template.name)
        asked = template.render(self._values(row, template), choices, draw, settings.answers)
        shots = self._shots(row, template, choices)
        messages = _messages(asked, shots, settings.shots_as)
        several = settings.per_row > 1 or settings.template == "all"
        meta: dict[str, Any] = {
            "template": template.name,
            "task": template.task or self.task.name,
            "lang": template.lang,
            "form": template.form,
        }
        if asked.label is not None:
            meta[LABEL] = asked.label
        if asked.choices:
            meta["choices"] = list(asked.choices)
        if asked.target is not None:
            meta["target"] = asked.target
        meta["row"] = row.id
        if settings.val + settings.test or row.part != "train":
            meta["part"] = row.part
        if settings.shots:
            meta["shots"] = len(shots)
            self.counts.shots[len(shots)] += 1
        rest = {column: value for column, value in row.rest.items() if column not in OWN_META}
        return Conversation(
            id=f"{row.id}/{template.name.rsplit('/', 1)[-1]}" if several else row.id,
            origin=row.origin,
            messages=messages,
            source=source,
            meta=meta | rest,
        )

    def _choices(self, row: Labelled) -> list[str]:
        """The labels in the order in which this row's prompts list them."""
        if self.labels is None or not self.task.chooses:
            return []
        if self.settings.choice_order == "fixed":
            return list(self.labels.names)
        return Draw(self.settings.seed, row.key, "choices").shuffled(self.labels.names)

    def _shots(self, row: Labelled, template: Template, choices: Sequence[str]) -> list[Rendered]:
        """Solved examples by the same template, within the budget of characters, in a drawn order."""
        settings = self.settings
        if not settings.shots:
            return []
        draw = Draw(settings.seed, row.key, template.name, "shots")
        shots: list[Rendered] = []
        left = settings.shot_chars
        for tried, candidate in enumerate(self.pool.candidates(row, draw)):
            if len(shots) == settings.shots or tried == 3 * settings.shots:
                break
            named = self._named(candidate)
            if isinstance(named, Reject):
                continue
            try:
                values = self._values(named, template)
                shot = template.render(values, choices, Draw(settings.seed, candidate.key, template.name))
            except TooSlow:
                raise
            except TemplateFailure:
                continue
            size = len(shot.prompt) + len(shot.target or "")
            if size <= left:
                shots.append(shot)
                left -= size
        return draw.shuffled(shots)


def _messages(asked: Rendered, shots: Sequence[Rendered], shots_as: str) -> tuple[Message, ...]:
    """The conversation: examples as turns before the question, or as text above it, solved in the same layout."""
    answer = () if asked.target is None else (Message("assistant", asked.target),)
    if shots_as == "turns":
        earlier = [
            # An example's answer is context; it is trained on where it is asked about itself.
            turn
            for shot in shots
            for turn in (Message("user", shot.prompt), Message("assistant", shot.target or "", weight=0.0))
        ]
        return (*earlier, Message("user", asked.prompt), *answer)
    blocks = [f"{shot.prompt}\n{shot.target}" for shot in shots]
    return (Message("user", "\n\n".join([*blocks, asked.prompt])), *answer)
