"""YAML of strangers to plain values. Two tags of promptsource are read as the mappings that they are; no other tag is.

Speaks of YAML alone. Nothing is ever constructed but mappings, lists, text, numbers and null.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from graft.errors import InputError, first_line

PROMPTSOURCE_TAGS = ("!Template", "!TemplateMetadata")
MOST_BYTES = 20_000_000
MOST_NESTED = 100
_OPENS = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
_CLOSES = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)


_Safe = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times as fast, where PyYAML was built with it


class _Loader(_Safe):  # type: ignore[misc, valid-type]
    """The safe loader, with two tags that say `mapping` in other words."""


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, f"{node.tag} is not a mapping", node.start_mark)
    return loader.construct_mapping(node, deep=True)


for _tag in PROMPTSOURCE_TAGS:
    _Loader.add_constructor(_tag, _mapping)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file.

    Raises:
        InputError: it cannot be read, is not UTF-8, not valid YAML, nested too deeply, has another tag or an alias;
            names the line.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: has {path.stat().st_size:,} bytes; template files have at most {MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        _refuse_bombs(text, path)
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader with two more tags
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise InputError(
            f"{path}{where}: not valid YAML ({getattr(error, 'problem', None) or first_line(error)})"
        ) from None
    except (ValueError, RecursionError) as error:  # an impossible date, brackets without end
        raise InputError(f"{path}: a value cannot be read ({first_line(error)}); put it in quotes") from None


def _refuse_bombs(text: str, path: Path) -> None:
    """Aliases of aliases would never end, and brackets in brackets take the square of their number."""
    depth = 0
    for token in yaml.scan(text, Loader=_Safe):
        depth += isinstance(token, _OPENS) - isinstance(token, _CLOSES)
        where = f"{path}:{token.start_mark.line + 1}"
        if depth > MOST_NESTED:
            raise InputError(f"{where}: nested more than {MOST_NESTED} levels deep; no template needs that")
        if isinstance(token, yaml.AliasToken):
            raise InputError(f"{where}: `*{token.value}` is a YAML alias; write it out")
