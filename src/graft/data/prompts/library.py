"""The library of prompt templates: YAML files of ours, of the user, and of promptsource.

Speaks of YAML, names and templates. Knows no rows.

    task: sentiment            # one of TASKS, or any word: its templates then take columns by their own names
    lang: en
    labels: [negative, positive]               # of the sample; data bring their own
    sample: {text: ..., label: positive}       # a row to show and test the templates on
    templates:
      - name: is-it
        form: word             # word, letter, number, json or text
        hidden: ...            # why the choices are not listed; left out where they are
        prompt: ...
        target: ...
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from graft.config.base import did_you_mean
from graft.data.prompts.columns import as_json
from graft.data.prompts.draw import Draw
from graft.data.prompts.filters import TemplateFailure
from graft.data.prompts.promptsource import is_promptsource, read_promptsource
from graft.data.prompts.safe_yaml import read_yaml
from graft.data.prompts.sandbox import compiled
from graft.data.prompts.tasks import TASKS
from graft.data.prompts.template import FORMS, PromptTemplate, Rendered, Template
from graft.errors import ConfigError, InputError

FOLDER = Path(__file__).parent / "library"
LANGUAGES = ("en", "zh")
_KEYS = ("name", "form", "hidden", "prompt", "target")


@dataclass(frozen=True, slots=True)
class Collection:
    """The templates of one file."""

    file: str
    task: str
    lang: str
    templates: tuple[Template, ...]
    labels: tuple[str, ...] = ()
    """The choices of the sample."""
    sample: Mapping[str, Any] | None = None
    """A row that fits them, where the file has one."""
    failures: tuple[str, ...] = ()
    """Templates that cannot be used, each with the reason."""


@cache
def library() -> tuple[Collection, ...]:
    """Everything that graft brings, by language, then in the order of TASKS."""
    return tuple(_own(task, lang) for lang in LANGUAGES for task in TASKS)


@cache
def _own(task: str, lang: str) -> Collection:
    return _read_file(FOLDER / lang / f"{task}.yaml")


def read_templates(path: Path) -> list[Collection]:
    """The collections of a YAML file, of either form, or of every YAML file below a folder.

    Raises:
        InputError: nothing is there, or a file is no template file; names file and key.
    """
    if path.is_dir():
        files = sorted((*path.rglob("*.yaml"), *path.rglob("*.yml")))
        if not files:
            raise InputError(f"{path}: a folder without .yaml files; name a template file")
        return [_read_file(file) for file in files]
    return [_read_file(path)]


def _read_file(path: Path) -> Collection:
    value = read_yaml(path)
    if is_promptsource(value):
        found = read_promptsource(value, str(path))
        return Collection(str(path), "", "en", found.templates, failures=found.failures)
    return _read_own(value, path)


def _read_own(value: Any, path: Path) -> Collection:
    if not isinstance(value, Mapping) or not isinstance(value.get("templates"), list):
        raise InputError(f"{path}: no template file; it needs `task`, `lang` and a list `templates` (docs/prompts.md)")
    known = ("task", "lang", "labels", "sample", "templates")
    _refuse_unknown(value, known, str(path))
    task, lang = _word(value, "task", str(path)), _word(value, "lang", str(path))
    templates: dict[str, Template] = {}
    for number, item in enumerate(value["templates"], 1):
        template = _template(item, task, lang, f"{path}: template {number}")
        if template.name in templates:
            raise InputError(f"{path}: template {number}: the name {template.name} stands above already")
        templates[template.name] = template
    labels, sample = value.get("labels") or [], value.get("sample")
    if not isinstance(labels, list):
        raise InputError(f"{path}: `labels` is a list of names, as in labels: [negative, positive]")
    if not isinstance(sample, Mapping | None):
        raise InputError(f"{path}: `sample` is a row by its columns, as in sample: {{text: ..., label: ...}}")
    return Collection(str(path), task, lang, tuple(templates.values()), tuple(map(str, labels)), sample)


def _template(item: Any, task: str, lang: str, place: str) -> PromptTemplate:
    if not isinstance(item, Mapping):
        raise InputError(f"{place}: expected name, form, prompt and target")
    _refuse_unknown(item, _KEYS, place)
    name = _word(item, "name", place)
    form = item.get("form", "text")
    if form not in FORMS:
        raise InputError(f"{place}: form {form!r} is none of {', '.join(FORMS)}{did_you_mean(str(form), FORMS)}")
    pieces = {}
    for key in ("prompt", "target"):
        try:
            pieces[key] = compiled(_word(item, key, place))
        except TemplateFailure as failure:
            raise InputError(f"{place} ({name}): {key}: {failure}") from None
    hidden = item.get("hidden")
    if not isinstance(hidden, str | None):
        raise InputError(f"{place} ({name}): `hidden` is text: why the choices are not listed")
    return PromptTemplate(f"{lang}/{task}/{name}", task, lang, form, pieces["prompt"], pieces["target"], hidden)


def _word(value: Mapping[str, Any], key: str, place: str) -> str:
    word = value.get(key)
    if not isinstance(word, str) or not word.strip():
        raise InputError(f"{place}: `{key}` is needed, as text")
    return word


def _refuse_unknown(value: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in value:
        if key not in known:
            raise InputError(
                f"{place}: unknown key `{key}`{did_you_mean(str(key), known)}; known are {', '.join(known)}"
            )


def for_task(task: str, lang: str) -> Collection:
    """The library's templates for a task.

    Raises:
        ConfigError: there is no such task or language; proposes the nearest.
    """
    if task not in TASKS:
        raise ConfigError(f"--task {task}: no such task{did_you_mean(task, list(TASKS))}; known are {', '.join(TASKS)}")
    if lang not in LANGUAGES:
        raise ConfigError(
            f"--lang {lang}: the library has {' and '.join(LANGUAGES)}; for others write a template file, --templates"
        )
    return _own(task, lang)


def choose(templates: Iterable[Template], wanted: str) -> list[Template]:
    """Those that are wanted: `random` and `all` mean all of them; else names, comma-separated, whole or the last part.

    Raises:
        ConfigError: no template, or several, have the name; proposes the nearest.
    """
    known = list(templates)
    if wanted in ("random", "all"):
        return known
    return [find(known, name.strip()) for name in wanted.split(",")]


def find(templates: Sequence[Template], name: str) -> Template:
    """The template of that name, whole or its last part.

    Raises:
        ConfigError: no template, or several, have the name; proposes the nearest.
    """
    found = [item for item in templates if item.name == name] or [
        item for item in templates if item.name.rsplit("/", 1)[-1] == name
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"{name}: {len(found)} templates have that name: {', '.join(item.name for item in found[:5])}"
        )
    names = [item.name for item in templates]
    near = difflib.get_close_matches(name, [*names, *(full.rsplit("/", 1)[-1] for full in names)], n=1, cutoff=0.5)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    raise ConfigError(f"{name}: no such template{hint}; `graft data prompts --list` shows them")


def render_sample(template: Template, collection: Collection) -> Rendered:
    """What a template makes of its collection's sample row.

    Raises:
        InputError: it cannot be rendered on it.
    """
    row: dict[str, Any] = {}
    for name, value in (collection.sample or {}).items():
        row[name] = as_json(value) if isinstance(value, Mapping | list) else value
        if isinstance(value, Mapping):
            row["fields"] = list(value)
    try:
        return template.render(row, collection.labels, Draw(0, template.name))
    except TemplateFailure as failure:
        raise InputError(f"{collection.file}: {template.name}: on the file's own sample: {failure}") from None
