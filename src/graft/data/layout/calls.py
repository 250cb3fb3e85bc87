"""Tool calls and tool descriptions, in whatever form data files write them, in OpenAI's form.

Speaks of calls, functions and arguments. Knows no turns, files, columns or formats.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from graft.data.values import UnfitError, kind, list_of, parsed, text_of, tidy


def calls_in_text(text: str, place: str) -> list[dict[str, Any]]:
    """The call, or list of calls, that a text holds as JSON or as Python prints it.

    Raises:
        UnfitError: it holds neither.
    """
    value = _literal(text) if text.startswith(("{'", "[{'")) else None
    value = parsed(text, place) if value is None else value
    if isinstance(value, list):
        return [read_call(call, f"{place}[{index}]") for index, call in enumerate(value)]
    return [read_call(value, place)]


def read_call(value: Any, place: str) -> dict[str, Any]:
    """A tool call in OpenAI's form with parsed arguments; name first, for templates that write the object as it is."""
    if not isinstance(value, Mapping):
        raise UnfitError(place, f"is {kind(value)}, not an object with name and arguments")
    wrapped = value.get("function") is not None
    function = value["function"] if wrapped else value
    where = f"{place}.function" if wrapped else place
    if not isinstance(function, Mapping):
        raise UnfitError(where, f"is {kind(function)}, not an object with name and arguments")
    name = text_of(function.get("name"), f"{where}.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{where}.arguments") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise UnfitError(f"{where}.arguments", f"is {kind(arguments)}, not an object")
    inner: dict[str, Any] = {"name": name, "arguments": arguments}
    own = ("type", "function", "name", "arguments")
    outer = {key: item for key, item in value.items() if key not in own and item is not None}
    if wrapped:
        inner |= {key: item for key, item in function.items() if key not in inner and item is not None}
    return {"type": "function", "function": inner, **outer}


def read_tools(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Tool descriptions in OpenAI's form, from a list or its JSON text; a bare function description is wrapped.

    Raises:
        UnfitError: an element describes no function.
    """
    tools: list[dict[str, Any]] = []
    for index, item in enumerate(list_of(value, place)):
        here = f"{place}[{index}]"
        tool = parsed(item, here) if isinstance(item, str) else item
        if not isinstance(tool, Mapping):
            raise UnfitError(here, f"is {kind(tool)}, not the description of a function")
        if isinstance(tool.get("function"), Mapping):
            tools.append(dict(tool))
        elif isinstance(tool.get("name"), str):
            tools.append({"type": "function", "function": _function(tool)})
        else:
            raise UnfitError(here, "describes no function: it has neither `function` nor `name`")
    return tuple(tools)


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A bare function description; Anthropic calls its `parameters` `input_schema`."""
    if "input_schema" not in tool or "parameters" in tool:
        return dict(tool)
    return {("parameters" if key == "input_schema" else key): value for key, value in tool.items() if key != "type"}


def tagged_blocks(text: str, tag: str, start: int = 0) -> tuple[list[str], int]:
    """The insides of the blocks `<tag>...</tag>` that stand one after the other from `start` on, with nothing but
    blanks between them, and where the last one and the blanks after it end.

    Every character is looked at once, however often a tag is opened and never closed.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    blocks: list[str] = []
    while text.startswith(opening, start):
        inside = start + len(opening)
        end = text.find(closing, inside)
        if end < 0:
            break
        blocks.append(text[inside:end])
        blanks = _BLANKS.match(text, end + len(closing))
        assert blanks is not None  # it matches no blanks too
        start = blanks.end()
    return blocks, start


_BLANKS = re.compile(r"\s*")
_OPEN = "<tool_call>"


def has_tagged_calls(content: str) -> bool:
    """Whether a text ends with `<tool_call>{...}</tool_call>` blocks, as models are shown their calls."""
    return _OPEN in content and bool(_tagged(content)[1])


def split_tagged_calls(content: str, place: str) -> tuple[str, list[dict[str, Any]]]:
    """The text before the `<tool_call>{...}</tool_call>` blocks that end it, and their calls.

    Raises:
        UnfitError: a block holds no call.
    """
    if _OPEN not in content:
        return content, []
    said, blocks = _tagged(content)
    return said, [call for block in blocks for call in calls_in_text(block, place)]


def _tagged(content: str) -> tuple[str, list[str]]:
    """The text and the insides of its last blocks; without blocks where anything else follows them."""
    first = content.find(_OPEN)
    found, end = tagged_blocks(content, "tool_call", first)
    blocks = [inside.strip() for inside in found]
    if end < len(content) or not all(inside.startswith(("{", "[")) for inside in blocks):
        return content, []
    return content[:first].rstrip(), blocks


def _literal(text: str) -> Any:
    """The value of a text that was printed by Python: {'name': 'f'} is common where JSON was meant."""
    try:
        return tidy(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
