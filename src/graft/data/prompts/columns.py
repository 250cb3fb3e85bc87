"""Which columns of a labelled set play which role, by their names or as the user says, and what they hold.

Speaks of columns, roles and values. Knows no templates and no files beyond their names in messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from graft.config.base import did_you_mean
from graft.data.prompts.labels import label_key
from graft.data.prompts.tasks import TASKS, Role
from graft.data.values import UnfitError, kind, parse_json
from graft.errors import ConfigError, InputError

Assigned = dict[str, tuple[str, ...]]
"""Role -> the columns whose texts it is made of."""


def assign(roles: Sequence[Role], found: Sequence[str], given: Mapping[str, str], place: str) -> Assigned:
    """Columns for roles: as `given`, else by name; no column plays two roles.

    Raises:
        ConfigError: a given role is not one of the task's.
        InputError: a given column is not there, or a needed role has none.
    """
    assigned: Assigned = {}
    names = [role.name for role in roles]
    for name, said in given.items():
        if name not in names:
            raise ConfigError(
                f"--columns {name}={said}: the task has the roles {', '.join(names)}{did_you_mean(name, names)}"
            )
        assigned[name] = tuple(_existing(column.strip(), found, place) for column in said.split("+"))
    taken = {column for columns in assigned.values() for column in columns}
    for role in roles:
        if role.name in assigned:
            continue
        column = find_column((role.name, *role.aliases), found, taken)
        if column is None:
            if role.needed:
                raise InputError(_no_column(role, found, place))
            continue
        before = find_column(role.joins, found, taken | {column})
        assigned[role.name] = (column,) if before is None else (before, column)
        taken.update(assigned[role.name])
    return assigned


def find_column(names: Sequence[str], found: Sequence[str], taken: set[str]) -> str | None:
    """The first of the names that is a free column, without regard to case and to `-`, `_` or blank."""
    by_name = {_folded(column): column for column in reversed(found) if column not in taken}
    return next((by_name[_folded(name)] for name in names if _folded(name) in by_name), None)


def _folded(name: str) -> str:
    return name.strip().casefold().replace("-", "_").replace(" ", "_")


def _existing(column: str, found: Sequence[str], place: str) -> str:
    if column not in found:
        raise InputError(
            f"{place}: has no column `{column}`{did_you_mean(column, found)}; it has {', '.join(found[:20])}"
        )
    return column


def _no_column(role: Role, found: Sequence[str], place: str) -> str:
    shown = ", ".join((role.name, *role.aliases)[:8])
    unnamed = all(column.startswith("column_") for column in found)
    how = "--header NAME,NAME,... names them" if unnamed else f"say which it is: --columns {role.name}=NAME"
    return f"{place}: no column for `{role.name}` (such as {shown}); it has {', '.join(found[:20])}; {how}"


def any_role(name: str) -> Role:
    """The aliases that a name has in any task: for templates that name columns and not roles."""
    roles = [role for task in TASKS.values() for role in task.roles if role.name == name]
    aliases = dict.fromkeys(alias for role in roles for alias in role.aliases)
    return Role(name, tuple(aliases), needed=False, joins=roles[0].joins if roles else ())


def role_value(row: Mapping[str, Any], role: str, columns: Sequence[str]) -> str:
    """The text that a row has for a role.

    Raises:
        UnfitError: there is none, or it is something else than text.
    """
    texts = [text for column in columns if (text := _text(row.get(column), column)).strip()]
    if not texts:
        raise UnfitError("+".join(columns), f"is empty; it is the `{role}`")
    return "\n".join(texts)


def _text(value: Any, column: str) -> str:
    """Text, a number, a list of texts as lines; of answers in SQuAD's form the first."""
    if isinstance(value, Mapping) and "text" in value:
        value = first_answer(value["text"])
    if value is None or value == []:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return label_key(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise UnfitError(column, f"is {kind(value)}, not text")


def first_answer(value: Any) -> Any:
    """Where a row lists several right answers, the first."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return value[0]
    return value


def json_answer(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """What is to be extracted: a JSON value, or an object of several columns.

    Raises:
        UnfitError: the column is empty, or holds text that is no JSON object or list.
    """
    if len(columns) > 1:
        return {column: row.get(column) for column in columns}
    value = row.get(columns[0])
    if isinstance(value, str) and value.strip():
        try:
            value = parse_json(value)
        except ValueError:
            raise UnfitError(columns[0], "is text that is no JSON") from None
    if not isinstance(value, Mapping | list) or not value:
        raise UnfitError(columns[0], f"is {kind(value)}, not a JSON object or list to extract")
    return value


def as_json(value: Any) -> str:
    """JSON as it is to be answered."""
    return json.dumps(value, ensure_ascii=False)
