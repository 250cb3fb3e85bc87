"""The base of all settings, and how a recipe becomes them. Knows no setting by name, no torch and no data.

A recipe is YAML; `key=value` overrides (dotted for nested keys: `lora.r=8`) are laid over it. An unknown key is an
error that names the line and the nearest known key: a typo must never become a silent default.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from graft.errors import ConfigError, first_line
from graft.private import secret_in

S = TypeVar("S", bound="Settings")


COMMAND_LINE = "the command line"


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`lr: yes` is a slip, not a learning rate of 1."""
        wanted = cls.model_fields[info.field_name or ""].annotation
        if get_origin(wanted) is Literal:  # `quantize: off`, which YAML reads as false, is answered with the choices
            return value
        if isinstance(value, bool) and wanted is not bool and bool not in get_args(wanted):
            raise ValueError("a number or text is expected, not yes or no")
        return value


def load(
    model: type[S], recipe: Path | None = None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> S:
    """Settings from a recipe, with `key=value` overrides and the command's own flags (None is not given) laid over it.

    Raises:
        ConfigError: the recipe cannot be read, a key or value does not fit (names the line where there is one), or a
            flag and an override set the same.
    """
    values: dict[str, Any] = {}
    places: dict[tuple[str, ...], str] = {(): str(recipe or COMMAND_LINE)}
    if recipe is not None:
        values, lines = _read_yaml(recipe)
        places |= {path: f"{recipe}:{line}" for path, line in lines.items()}
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    for override in overrides:
        path, value = _parse_override(override)
        _refuse_twice(path, override, given)
        _set(values, path, value, override)
        places[path] = COMMAND_LINE
    for key, value in given.items():
        path = tuple(key.split("."))
        _set(values, path, value, f"--{key}")
        places[path] = COMMAND_LINE
    for path in secret_in(values):
        raise ConfigError(
            f"{_nearest(path, places)}: `{'.'.join(path)}` holds a password or a key, and settings are written into "
            "files; put it into an environment variable or a netrc file, and take it out of the address"
        )
    return _validate(model, values, places)


def _nearest(path: tuple[str, ...], places: Mapping[tuple[str, ...], str]) -> str:
    """Where a setting, or else the mapping that it is in, was written."""
    return next(places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """A YAML mapping and the 1-based line of each of its keys, by key path."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_aliases(text, path)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader that reads 2e-4
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        other = "" if path.suffix in (".yaml", ".yml") else f"; if it is data, --data {path} takes it"
        raise ConfigError(
            f"recipe {path}{where}: not valid YAML ({getattr(error, 'problem', None) or first_line(error)}){other}"
        ) from None
    except (ValueError, RecursionError) as error:  # an impossible date, brackets without end
        raise ConfigError(f"recipe {path}: a value cannot be read ({first_line(error)}); put it in quotes") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path}: expected `key: value` lines, found a {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines, str(path))
    return values, lines


def _refuse_aliases(text: str, path: Path) -> None:
    """A recipe needs no YAML aliases, and one that refers to itself, or to others tenfold, would never end."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            line = token.start_mark.line + 1
            raise ConfigError(f"recipe {path}:{line}: `*{token.value}` is a YAML alias; write the value out")


def _collect_lines(node: yaml.Node | None, path: tuple[str, ...], lines: dict[tuple[str, ...], int], file: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = (*path, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"recipe {file}:{line}: `{'.'.join(name)}` stands in line {lines[name]} already")
            lines[name] = line
            _collect_lines(value, name, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, str(index))] = value.start_mark.line + 1
            _collect_lines(value, (*path, str(index)), lines, file)


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `2e-4` as a number: YAML 1.1 wants a dot there, people do not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"{text!r}: an override is written key=value, for example lora.r=8")
    try:
        return tuple(key.split(".")), yaml.load(value, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError:
        return tuple(key.split(".")), value


def _refuse_twice(path: tuple[str, ...], override: str, flags: Mapping[str, Any]) -> None:
    """Neither a flag nor an override wins over the other: both were written in one line."""
    for key in flags:
        named = tuple(key.split("."))
        shorter = min(len(named), len(path))
        if named[:shorter] == path[:shorter]:
            raise ConfigError(f"--{key.replace('_', '-')} and {override}: both set `{key}`; give one of them")


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any, said: str) -> None:
    """Lay one value over the tree, making mappings on the way."""
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{said}: `{key}` is a {type(inner).__name__}, it has no key `{path[-1]}`")
        values = inner
    values[path[-1]] = value


def _validate(model: type[S], values: Mapping[str, Any], places: Mapping[tuple[str, ...], str]) -> S:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found: dict[tuple[str, ...], tuple[str, list[str]]] = {}
        for item in error.errors():
            path = tuple(part for part in map(str, item["loc"]) if not KIND.fullmatch(part))
            where, what = _explain(model, item, path, _nearest(path, places))
            found.setdefault(path, (where, []))[1].append(what)
        said = (f"{where}: {', or '.join(dict.fromkeys(what))}" for where, what in found.values())
        raise ConfigError("\n".join(said)) from None


def _explain(model: type[Settings], item: Any, path: tuple[str, ...], where: str) -> tuple[str, str]:
    """Where a value stands, and what is wrong with it. A setting of several kinds has an error for each of them."""
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        names = setting_names(model)
        near = difflib.get_close_matches(key, NAMES_ELSEWHERE, n=1, cutoff=0.85)  # `lerning_rate`
        hint = _from_another_tool(key, names) or did_you_mean(key, names) or _from_another_tool("".join(near), names)
        return where, f"unknown setting `{key}`{hint or f'; `graft schema {model.__name__.lower()}` lists them all'}"
    if item["type"] == "missing":
        if key in ("model", "data"):
            return where, f"`{key}` is needed, for example --{key} PATH or `{key}: PATH` in the recipe"
        return where, f"`{key}` is needed"
    given = item["input"]
    shown = str(given).lower() if isinstance(given, bool) else repr(given)
    return f"{where}: `{key}` = {shown}" if key else where, _what_is_wrong(item)


KIND = re.compile(r"str|bool|int|float|(literal|tuple|list|dict|constrained|function|nullable)\W.*")
"""What pydantic adds to a setting's place where several kinds of value are allowed there."""
NEEDED = {
    "int": "a whole number is needed",
    "float": "a number is needed",
    "bool": "true or false is needed",
    "string": "text is needed",
    "list": "a list is needed",
    "tuple": "a list is needed",
    "dict": "a mapping is needed",
    "model": "a mapping of settings is needed",
    "finite": "a finite number is needed",
}
"""By the first word of what pydantic calls an error of type (`int_parsing`, `list_type`, ...)."""
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _what_is_wrong(item: Any) -> str:
    """In words of settings; what has none here, in pydantic's."""
    kind, context = str(item["type"]), item.get("ctx") or {}
    if kind == "literal_error":
        given = item["input"] if isinstance(item["input"], str) else ""
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"it is one of {', '.join(choices)}{did_you_mean(given, choices)}"
    limits = [f"{words} {context[name]}" for name, words in LIMITS.items() if name in context]
    if limits:
        return f"it must be {limits[0]}"
    needed = None if kind.startswith("string_too") else NEEDED.get(kind.split("_", maxsplit=1)[0])
    return needed or str(item["msg"]).removeprefix("Value error, ")


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every setting, nested ones too: `lora`, `lora.r`, ..."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += setting_names(info.annotation, f"{prefix}{name}.")
    return names


NAMES_ELSEWHERE = {
    "learning_rate": "lr", "num_train_epochs": "epochs", "num_epochs": "epochs", "output_dir": "out", "dataset": "data",
    "per_device_train_batch_size": "batch_size", "gradient_accumulation_steps": "batch_size",
    "micro_batch_size": "batch_size", "model_name_or_path": "model", "base_model": "model",
    "lora_rank": "lora.r", "lora_r": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout",
    "cutoff_len": "encode.max_length", "max_seq_length": "encode.max_length", "sequence_len": "encode.max_length",
    "lr_scheduler_type": "schedule", "lr_scheduler": "schedule", "warmup_ratio": "warmup", "warmup_steps": "warmup",
    "max_grad_norm": "clip", "val_size": "split.val", "val_set_size": "split.val", "eval_steps": "eval_every",
    "save_steps": "save_every", "save_total_limit": "keep_last", "logging_steps": "log_every", "optim": "optimizer",
}  # fmt: skip
"""What transformers, TRL, LLaMA-Factory, Axolotl and ms-swift call settings that have another name here."""


def _from_another_tool(key: str, known: Sequence[str]) -> str:
    name = NAMES_ELSEWHERE.get(key)
    return f"; here it is called `{name}`" if name in known else ""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the nearest known word (a nested name is found by its last part too), or nothing."""
    last = word.rsplit(".", 1)[-1]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    if last in by_leaf:
        return f"; did you mean `{by_leaf[last]}`?"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(last, list(by_leaf), n=1, cutoff=0.6)]
    return f"; did you mean `{near[0]}`?" if near else ""
