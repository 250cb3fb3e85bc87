"""promptsource's template files as they are: one piece of Jinja per template, divided by `|||` into prompt and answer.

Speaks of promptsource's keys and rules (https://github.com/bigscience-workshop/promptsource). Knows no rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.data.prompts.draw import Draw
from graft.data.prompts.filters import NothingToAsk, TemplateFailure
from graft.data.prompts.sandbox import Compiled, compiled
from graft.data.prompts.template import Form, Rendered, Template
from graft.errors import InputError

BETWEEN = "|||"
PROTECTED = "3ed2dface8203c4c9dfb1a5dc58e41e0"
"""What stands for `|||` inside a row while it is rendered. It is promptsource's own word, because some of its
templates look for it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds."""

    templates: tuple[Template, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SourceTemplate:
    """A template of promptsource. Its variables are the columns of the set that it was written for."""

    name: str
    lang: str
    jinja: Compiled
    choices: Compiled | None
    """Renders to the possible answers, with `|||` between; None where the answer is free."""
    choices_in_prompt: bool
    metrics: tuple[str, ...]
    task: str = ""

    @property
    def form(self) -> Form:
        return "word" if self.choices else "text"

    @property
    def variables(self) -> frozenset[str]:
        return (self.jinja.variables | (self.choices.variables if self.choices else frozenset())) - {"answer_choices"}

    @property
    def fixed_choices(self) -> tuple[str, ...]:
        """The answers where they are the same for every row, else none."""
        if self.choices is None or self.choices.variables:
            return ()
        return tuple(self._choices({}, Draw()))

    def why_not(self, choices: Sequence[str]) -> str | None:
        """It has its own choices: those of the data play no part."""
        return None

    def render(self, row: Mapping[str, Any], choices: Sequence[str], draw: Draw, answered: bool = True) -> Rendered:
        """Ask about a row, by columns; `choices` are the template's own.

        Raises:
            TemplateFailure: a column is missing, or the template does not apply to this row (it comes out empty).
        """
        protected = {
            key: value.replace(BETWEEN, PROTECTED) if isinstance(value, str) else value for key, value in row.items()
        }
        own = self._choices(protected, draw)
        parts = self.jinja.render(protected | {"answer_choices": own}, draw).split(BETWEEN)
        prompt, *rest = (part.replace(PROTECTED, BETWEEN).strip() for part in parts)
        if not prompt:
            raise NothingToAsk("it does not apply: its prompt comes out empty")
        if not answered:
            return Rendered(prompt, None, tuple(own))
        if len(rest) != 1 or not rest[0]:
            found = "no answer" if not any(rest) else f"{len(rest)} answers"
            raise NothingToAsk(f"it does not apply: it gives {found}")
        return Rendered(prompt, rest[0], tuple(own), rest[0] if rest[0] in own else None)

    def _choices(self, row: Mapping[str, Any], draw: Draw) -> list[str]:
        if self.choices is None:
            return []
        return [choice.replace(PROTECTED, BETWEEN).strip() for choice in self.choices.render(row, draw).split(BETWEEN)]


def answers_with(names: Sequence[str], choices: Sequence[str]) -> bool:
    """Whether every name is among a template's own answers, in whatever order."""
    return {_folded(name) for name in names} <= {_folded(choice) for choice in choices}


def positions_of(names: Sequence[str], choices: Sequence[str]) -> tuple[int, ...] | str:
    """Where labels stand among a template's own answers: by name where all are found, else in their order.

    The order is not trusted where some names are found at other places: the answers then are sorted otherwise. The
    result is a tuple of indices, or the reason why there is none.
    """
    known = {_folded(choice): index for index, choice in enumerate(choices)}
    found = [known.get(_folded(name)) for name in names]
    if all(index is not None for index in found):
        return tuple(index for index in found if index is not None)
    moved = [name for place, (name, index) in enumerate(zip(names, found, strict=True)) if index not in (None, place)]
    if moved:
        strange = next(name for name, index in zip(names, found, strict=True) if index is None)
        return f"its answers are in another order than the labels ({moved[0]}), and {strange} is not among them"
    if choices and len(choices) < len(names):
        return f"it has {len(choices)} answers for {len(names)} labels"
    return tuple(range(len(names)))


def _folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split()).strip(" ?.!")


def is_promptsource(value: Any) -> bool:
    """Whether a decoded YAML file is promptsource's: its templates are a mapping by id."""
    return isinstance(value, Mapping) and isinstance(value.get("templates"), Mapping) and "dataset" in value


def read_promptsource(value: Mapping[str, Any], file: str) -> Found:
    """The templates of a decoded file. One that cannot be compiled is a failure, and the others go on.

    Raises:
        InputError: there is not one that can be used.
    """
    dataset = "/".join(str(value[key]) for key in ("dataset", "subset") if value.get(key))
    templates: dict[str, Template] = {}
    failures: list[str] = []
    for key, item in value["templates"].items():
        try:
            template = _read(item, dataset)
        except TemplateFailure as failure:
            failures.append(f"{dataset}/{item.get('name', key) if isinstance(item, Mapping) else key}: {failure}")
            continue
        if template.name in templates:
            failures.append(f"{template.name}: a second template of that name")
            continue
        templates[template.name] = template
    if not templates:
        raise InputError(
            f"{file}: none of its {len(failures)} templates can be used; the first: {[*failures, 'none'][0]}"
        )
    return Found(tuple(templates.values()), tuple(failures))


def _read(item: Any, dataset: str) -> SourceTemplate:
    if not isinstance(item, Mapping) or not isinstance(item.get("jinja"), str):
        raise TemplateFailure("it has no `jinja`")
    metadata = item.get("metadata")
    if not isinstance(metadata, Mapping):
        metadata = {}
    choices = item.get("answer_choices")
    languages, metrics = (_listed(metadata.get(key)) for key in ("languages", "metrics"))
    return SourceTemplate(
        name=f"{dataset}/{item.get('name')}",
        lang=languages[0] if languages else "en",
        jinja=compiled(item["jinja"], trim=False),
        choices=compiled(choices, trim=False) if isinstance(choices, str) and choices.strip() else None,
        choices_in_prompt=bool(metadata.get("choices_in_prompt")),
        metrics=metrics,
    )


def _listed(value: Any) -> tuple[str, ...]:
    """A list as texts; what is none says nothing."""
    return tuple(map(str, value)) if isinstance(value, list) else ()
