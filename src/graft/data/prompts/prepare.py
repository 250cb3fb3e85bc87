"""Everything that is decided before the first prompt is made: templates, columns, labels and the pool of examples.

Speaks of settings, files, templates and labels. Renders nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.config.prompts import Prompts
from graft.data.prompts.labelled import Labelled, Piece, open_labelled
from graft.data.prompts.labels import MOST_LABELS, Labels, name_labels, read_names
from graft.data.prompts.library import Collection, choose, for_task, read_templates
from graft.data.prompts.make import Maker
from graft.data.prompts.promptsource import SourceTemplate, answers_with, positions_of
from graft.data.prompts.shots import Pool
from graft.data.prompts.tasks import LABEL, TASKS, Role, Task
from graft.data.prompts.template import PromptTemplate, Template
from graft.errors import ConfigError, InputError


def prepare(settings: Prompts) -> Maker:
    """Read the templates, sort the columns, name the labels and fill the pool of examples.

    Raises:
        ConfigError: no such task, language, template or role, or settings that contradict each other.
        InputError: a file cannot serve; see `open_labelled` and `name_labels`.
    """
    collections, task = _collections(settings)
    notes = [f"{failure} (left out)" for collection in collections for failure in collection.failures]
    templates = choose([template for collection in collections for template in collection.templates], settings.template)
    by_column = _by_column(templates)
    opened = open_labelled(settings.data, task, settings, by_column, settings.answers)
    pool = Pool(settings.seed)
    pieces = opened.pieces
    survey = _survey(pieces, pool if settings.shots and not settings.shots_from else None, settings.val, settings.test)
    decisions = opened.decisions
    if settings.shots and settings.shots_from:
        others = open_labelled(settings.shots_from, task, settings, by_column)
        decisions += others.decisions
        survey.seen.update(_survey(others.pieces, pool).seen)
    labels = _labels(settings, task, templates, survey.seen, pieces[0])
    if labels is not None:
        decisions.append(labels.said)
    templates, positions, left_out = _usable(templates, labels)
    notes += left_out
    notes += _about_shots(settings, pool, survey)
    if settings.per_row > len(templates):
        notes.append(f"per_row {settings.per_row}: there are only {len(templates)} templates")
    return Maker(settings, task, templates, pieces, labels, pool, decisions, notes, positions)


def _collections(settings: Prompts) -> tuple[list[Collection], Task]:
    """The templates to choose from, and the task that their rows are read for."""
    if not settings.templates:
        if settings.task is None:
            raise ConfigError(
                f"say what the set is for: --task {' | '.join(TASKS)}; `graft data prompts --list` tells more"
            )
        return [for_task(settings.task, settings.lang)], TASKS[settings.task]
    collections = [item for path in settings.templates for item in read_templates(Path(path))]
    if settings.task is not None:
        collections = [item for item in collections if item.task in ("", settings.task)]
    templates = [template for item in collections for template in item.templates]
    kinds = {isinstance(template, SourceTemplate) for template in templates}
    tasks = {item.task for item in collections}
    if not templates:
        raise ConfigError(f"--task {settings.task}: none of the template files is for it; leave --task out")
    if len(kinds) > 1 or len(tasks) > 1:
        raise ConfigError(
            f"the template files are for different tasks ({', '.join(sorted(tasks)) or 'none'}); name one with --task"
        )
    name = tasks.pop()
    return collections, TASKS.get(name) or _task_of(name, templates)


def _task_of(name: str, templates: Sequence[Template]) -> Task:
    """A task that only the template files know: its roles are the variables that they use."""
    own = [template for template in templates if isinstance(template, PromptTemplate)]
    chooses = any(template.chooses for template in own)
    variables = {name for template in templates for name in template.variables} | ({LABEL} if chooses else set())
    answers = {name for template in own for name in template.target.variables - template.prompt.variables}
    answer = LABEL if chooses else next(iter(sorted(answers)), "")
    return Task(
        name or "promptsource", "", tuple(Role(variable, (), bool(own)) for variable in sorted(variables)), answer
    )


def _by_column(templates: Sequence[Template]) -> bool:
    return isinstance(templates[0], SourceTemplate)


@dataclass(slots=True)
class _Survey:
    """What the first reading finds."""

    seen: Counter[str]
    held_out: int = 0


def _survey(pieces: Sequence[Piece], pool: Pool | None, val: float = 0, test: float = 0) -> _Survey:
    """Read everything once, for the label values and the examples. Skipped where neither is needed."""
    survey = _Survey(Counter())
    for piece in pieces:
        if pool is None and LABEL not in piece.shape.columns:
            continue
        for row in piece.rows(val, test):
            if not isinstance(row, Labelled):
                continue
            if row.label is not None and (row.label in survey.seen or len(survey.seen) <= MOST_LABELS):
                survey.seen[row.label] += 1
            survey.held_out += row.part != "train"
            if pool is not None and row.part == "train":
                pool.add(row)
    return survey


def _labels(
    settings: Prompts, task: Task, templates: Sequence[Template], seen: Mapping[str, int], piece: Piece
) -> Labels | None:
    """The names of the labels, where the task has labels."""
    given = read_names(Path(settings.labels_from)) if settings.labels_from else settings.labels
    where = f"{piece.name}: {'+'.join(piece.shape.columns.get(LABEL, (LABEL,)))}"
    if _by_column(templates):
        return _source_labels(given, templates, seen, where)
    if not task.chooses:
        if given:
            raise ConfigError(f"--labels: the task {task.name} has no labels; leave it out")
        return None
    return name_labels(given, seen, task.usual, where)


def _source_labels(
    given: Sequence[str], templates: Sequence[Template], seen: Mapping[str, int], where: str
) -> Labels | None:
    """promptsource's templates index their own answers: what is decided here is which value stands for which index.

    Without names, numbers are indices; they may count from 1. Words are names where a template answers with them.
    """
    fixed = [item.fixed_choices for item in templates if isinstance(item, SourceTemplate) and item.fixed_choices]
    words = seen and not any(value.lstrip("-").isdigit() for value in seen)
    if given or (words and any(answers_with(sorted(seen), choices) for choices in fixed)):
        return name_labels(given, seen, (), where)
    counts = {len(choices) for choices in fixed}
    numbers = {int(value) for value in seen if value.isdigit()}
    if len(counts) == 1 and numbers and len(numbers) == len(seen) and 0 not in numbers and max(numbers) in counts:
        names = tuple(str(index) for index in range(max(numbers)))
        said = f"{where}: the values 1 to {max(numbers)} count the templates' answers from 1"
        return Labels(names, {str(number): str(number - 1) for number in range(1, max(numbers) + 1)}, said)
    return None


def _usable(
    templates: Sequence[Template], labels: Labels | None
) -> tuple[list[Template], dict[str, tuple[int, ...]], list[str]]:
    """The templates that can ask with these choices, where the labels stand in promptsource's, and what is left out.

    Raises:
        ConfigError: no template is left.
    """
    usable: list[Template] = []
    positions: dict[str, tuple[int, ...]] = {}
    left_out: list[str] = []
    for item in templates:
        found: tuple[int, ...] | str | None = item.why_not(labels.names if labels else ())
        if found is None and labels is not None and isinstance(item, SourceTemplate):
            found = positions_of(labels.names, item.fixed_choices)
        if isinstance(found, str):
            left_out.append(f"template {item.name} is left out: {found}")
            continue
        usable.append(item)
        if found is not None:
            positions[item.name] = found
    if not usable:
        raise ConfigError(f"{left_out[0]}; nothing is left, choose others with --template")
    return usable, positions, left_out


def _about_shots(settings: Prompts, pool: Pool, survey: _Survey) -> list[str]:
    if not settings.shots:
        return []
    if not len(pool):
        where = ", ".join(settings.shots_from) or "the training rows of the data"
        raise InputError(f"--shots {settings.shots}: {where} hold no row that can serve as an example")
    if not settings.shots_from and not survey.held_out:
        return [
            "the examples come from all rows: dividing what is written would put held-out rows into training prompts; "
            "divide here with --val and --test, or name --shots-from"
        ]
    return []
