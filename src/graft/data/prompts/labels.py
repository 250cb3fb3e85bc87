"""The names of the labels: what the values of a label column are called in prompts and answers.

Speaks of label values and names. Knows no rows and no templates. Numbers are never given names by guesswork: which of
0 and 1 is the good one differs between sets.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.prompts.safe_yaml import read_yaml
from graft.data.values import parse_json
from graft.errors import ConfigError, InputError, first_line

MOST_LABELS = 500
"""More different values are no labels."""
_WHOLE = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class Labels:
    """The choices of a classification set."""

    names: tuple[str, ...]
    """In the order of the file or option that names them; sorted where the column itself does."""
    of: Mapping[str, str]
    """Value of the column -> name."""
    said: str
    """The decision, as a sentence."""


def label_key(value: Any) -> str:
    """A label value as text: 1, 1.0 and "1" are one label, true is "true"."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def name_labels(given: Sequence[str], seen: Collection[str], usual: Sequence[str], where: str) -> Labels:
    """The labels of a set.

    Args:
        given: `VALUE=NAME` words, or names in their order, or nothing.
        seen: the label values of the data.
        usual: names to propose in a message.
        where: the column and file, for messages.

    Raises:
        ConfigError: the words contradict each other.
        InputError: the names do not fit the values, or there are none for numbers.
    """
    if not given:
        return _from_column(seen, usual, where)
    if any("=" in word for word in given):
        return _by_value(given, seen, where)
    return _in_order(tuple(given), seen, where)


def _from_column(seen: Collection[str], usual: Sequence[str], where: str) -> Labels:
    if not seen:
        raise InputError(f"{where}: no row has a label, so the choices are unknown; name them: --labels a,b,c")
    if len(seen) > MOST_LABELS:
        raise InputError(
            f"{where}: has more than {MOST_LABELS} different values, which are no labels; say --columns label=NAME"
        )
    names = tuple(sorted(seen))
    if all(_WHOLE.fullmatch(name) for name in names):
        numbers = sorted(names, key=int)
        proposed = usual if len(usual) == len(numbers) else [f"NAME{number}" for number in numbers]
        pairs = ",".join(f"{number}={name}" for number, name in zip(numbers, proposed, strict=True))
        more = "..." if len(pairs) > 200 else ""
        raise InputError(
            f"{where}: the labels are numbers ({', '.join(numbers[:10])}), which say nothing in a prompt; name them, "
            f"for example --labels {pairs[:200]}{more} or --labels-from FILE"
        )
    return Labels(names, {name: name for name in names}, f"{where}: {len(names)} labels: {_shown(names)}")


def _by_value(given: Sequence[str], seen: Collection[str], where: str) -> Labels:
    of: dict[str, str] = {}
    for word in given:
        value, sign, name = (part.strip() for part in word.partition("="))
        if not (value and sign and name):
            raise ConfigError(f"--labels: {word!r} is not VALUE=NAME like the others, for example 0=negative")
        if value in of:
            raise ConfigError(f"--labels: the value {value} is named twice, {of[value]} and {name}")
        if twin := next((other for other, taken in of.items() if taken == name), None):
            raise ConfigError(
                f"--labels: the values {twin} and {value} are both called `{name}`: answers could not be told apart; "
                "give each a name of its own"
            )
        of[value] = name
    if seen and of.keys().isdisjoint(seen):
        raise InputError(f"{where}: has the values {_shown(sorted(seen))}, but --labels names {_shown(list(of))}")
    names = tuple(dict.fromkeys(of.values()))
    return Labels(names, of, f"{where}: {len(names)} labels, as given: {_shown([f'{k}={v}' for k, v in of.items()])}")


def _in_order(names: tuple[str, ...], seen: Collection[str], where: str) -> Labels:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"the label {twice[0]} is named twice; give every label once")
    if not seen or not set(names).isdisjoint(seen):
        return Labels(names, {name: name for name in names}, f"{where}: {len(names)} labels, as given: {_shown(names)}")
    numbers = sorted(int(value) for value in seen if _WHOLE.fullmatch(value) and int(value) >= 0)
    if len(numbers) < len([value for value in seen if not value.startswith("-")]):
        raise InputError(
            f"{where}: has the values {_shown(sorted(seen))}, of which none is among the names {_shown(names)}; "
            "say --labels VALUE=NAME,..."
        )
    low, high, count = numbers[0], numbers[-1], len(names)
    if low == 0 and high < count:
        first = 0
    elif low >= 1 and high == count:
        first = 1
    else:
        raise InputError(
            f"{where}: has the numbers {low} to {high} for {count} names, so it is unclear where they count from; "
            f"say which is which: --labels {low}={names[0]},..."
        )
    of = {str(number): name for number, name in enumerate(names, first)}
    return Labels(names, of, f"{where}: the numbers count the {count} names from {first}: {_shown(names)}")


def _shown(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def read_names(path: Path) -> tuple[str, ...]:
    """Names or `VALUE=NAME` words of a file.

    A JSON or YAML list or mapping; text with one name per line; a `dataset_info.json`, or a parquet file, in which
    the `datasets` library has noted them.

    Raises:
        InputError: it cannot be read, or holds no names.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _words(_noted_in(path), path)
    if suffix in (".yaml", ".yml"):
        return _words(read_yaml(path), path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path of --labels-from") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if suffix == ".json":
        try:
            return _words(parse_json(text), path)
        except ValueError as error:
            raise InputError(f"{path}: no JSON ({first_line(error)})") from None
    return _words([line.strip() for line in text.splitlines() if line.strip()], path)


def _noted_in(path: Path) -> Any:
    """What `datasets` wrote into a parquet file about its columns."""
    import pyarrow as pa  # here, because it would slow the start of every other command
    import pyarrow.parquet as pq

    try:
        noted = (pq.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
        return parse_json(noted.decode()).get("info")
    except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a parquet file with names ({first_line(error)})") from None


def _class_names(features: Any, path: Path) -> Any:
    """The names of the one column of classes that `datasets` describes."""
    columns = features.items() if isinstance(features, Mapping) else ()
    named = {column: item["names"] for column, item in columns if isinstance(item, Mapping) and item.get("names")}
    if len(named) > 1:
        raise InputError(
            f"{path}: names the classes of several columns ({', '.join(named)}); use --labels VALUE=NAME,..."
        )
    return next(iter(named.values()), None)


def _words(value: Any, path: Path) -> tuple[str, ...]:
    """A list of names; a mapping from value to name, or from name to number."""
    if isinstance(value, Mapping) and "features" in value:
        value = _class_names(value["features"], path)
    if isinstance(value, Mapping) and value:
        if all(isinstance(number, int) and not isinstance(number, bool) for number in value.values()):
            value = {number: name for name, number in value.items()}
        return tuple(f"{label_key(key)}={name}" for key, name in value.items())
    if isinstance(value, list) and value and all(isinstance(name, str | int) for name in value):
        return tuple(str(name) for name in value)
    raise InputError(f"{path}: holds no label names; it must be a list of names, or a mapping from value to name")
