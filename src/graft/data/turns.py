"""One turn of a chat as data files write it, read as a Message; and the order that turns must have.

Speaks of roles, content, reasoning, tool calls and weights. Knows no files, columns or formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from graft.data.values import UnfitError, kind, parse_json, tidy
from graft.types import Message, Role


class Turn(NamedTuple):
    """A message and where in its row it stands, such as `messages[2]`, for the words of a reject."""

    place: str
    message: Message


_ROLES: dict[str, Role | Literal["function_call"]] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""What the roles are called elsewhere. A `function_call` is an assistant turn whose content is the call as JSON."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = frozenset(
    {
        *("role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id"),
        *("weight", "loss_weight", "train", "loss", "human", "assistant"),
        *_REASONING,
    }
)
"""Keys of a message that are read; others have no place in a Message."""

_THINK = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)


def split_think(content: str) -> tuple[str | None, str]:
    """Reasoning and answer of an assistant's text that may begin with a `<think>...</think>` block.

    An empty block, as Qwen3 writes it for "no thinking", is reasoning None. Newlines around the reasoning and before
    the answer belong to the block: every template that knows reasoning writes its own.
    """
    while found := _THINK.match(content):
        content = content[found.end() :]
        reasoning = found[1].strip("\n")
        if reasoning.strip():
            return reasoning, content
    return None, content


def text_of(value: Any, place: str) -> str:
    """The value, which must be text.

    Raises:
        UnfitError: it is something else.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise UnfitError(place, "is missing")
    raise UnfitError(place, f"is {kind(value)}, not text")


def list_of(value: Any, place: str) -> list[Any]:
    """The value, which must be a list or the JSON text of one; null and empty text are the empty list.

    Raises:
        UnfitError: it is something else, or no JSON.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        value = _parsed(value, place)
    if not isinstance(value, list):
        raise UnfitError(place, f"is {kind(value)}, not a list")
    return value


def _parsed(text: str, place: str) -> Any:
    try:
        return tidy(parse_json(text), place)
    except ValueError as error:
        raise UnfitError(place, f"is text that should be JSON: {error}") from None


def read_turns(values: Sequence[Any], place: str) -> list[Turn]:
    """The messages of a list; `place` is the list's name.

    Raises:
        UnfitError: an element is no message; names its place.
    """
    turns: list[Turn] = []
    for index, value in enumerate(values):
        here = f"{place}[{index}]"
        if isinstance(value, Mapping) and "human" in value and "assistant" in value:  # a pair of turns in one object
            turns.append(user(f"{here}.human", text_of(value["human"], f"{here}.human")))
            turns.append(assistant(f"{here}.assistant", text_of(value["assistant"], f"{here}.assistant")))
        else:
            turns.append(Turn(here, read_message(value, here)))
    return turns


def system(place: str, content: str) -> Turn:
    """A system turn."""
    return Turn(place, Message("system", content))


def user(place: str, content: str) -> Turn:
    """A user turn."""
    return Turn(place, Message("user", content))


def assistant(place: str, content: str) -> Turn:
    """An assistant turn; a leading think block becomes its reasoning."""
    reasoning, answer = split_think(content)
    return Turn(place, Message("assistant", answer, reasoning=reasoning))


def read_message(value: Any, place: str) -> Message:
    """A message in OpenAI's form (role, content) or ShareGPT's (from, value).

    Raises:
        UnfitError: it cannot be read without a guess; names the place down to the key.
    """
    if not isinstance(value, Mapping):
        raise UnfitError(place, f"is {kind(value)}, not an object with role and content")
    role_key = "role" if value.get("role") is not None else "from"
    name = text_of(value.get(role_key), f"{place}.{role_key if role_key in value else 'role'}")
    role = _ROLES.get(name.strip().lower())
    if role is None:
        raise UnfitError(f"{place}.{role_key}", f"unknown role `{name[:40]}`; roles are {', '.join(_ROLES)}")
    key = "content" if value.get("content") is not None or "value" not in value else "value"
    parts = _content(value.get(key), f"{place}.{key}")
    calls = [*parts.calls, *_tool_calls(value, place)]
    reasoning, content = parts.reasoning, parts.text
    if role == "function_call":
        role = "assistant"
        reasoning, content = split_think(content)
        calls += _calls_in_text(content, f"{place}.{key}")
        content = ""
    elif role == "assistant":
        reasoning, content = _reasoning(value, place, reasoning, content)
    elif calls or parts.reasoning or any(value.get(name) for name in _REASONING):
        raise UnfitError(place, f"a {role} turn with reasoning or tool calls; only an assistant turn can have them")
    elif value.get(key) is None:
        raise UnfitError(f"{place}.{key}", "is missing")
    return Message(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=tuple(calls),
        name=_optional_text(value, "name", place),
        tool_call_id=_optional_text(value, "tool_call_id", place),
        weight=_weight(value, place),
    )


class _Content(NamedTuple):
    text: str
    reasoning: str | None
    calls: list[dict[str, Any]]


def _content(value: Any, place: str) -> _Content:
    """Text, or a list of parts: text, reasoning and tool calls. Parts of one kind are joined without a separator."""
    if value is None or isinstance(value, str):
        return _Content(value or "", None, [])
    if not isinstance(value, list):
        raise UnfitError(place, f"is {kind(value)}, not text or a list of text parts")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, part in enumerate(value):
        here = f"{place}[{index}]"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise UnfitError(here, f"is {kind(part)}, not a part with type and text")
        what = part.get("type")
        inner = next((part[key] for key in ("text", "value", "thinking") if part.get(key) is not None), None)
        if what == "text":
            texts.append(text_of(inner, here))
        elif what in ("reasoning", "thinking"):
            thoughts.append(text_of(inner, here))
        elif what == "tool_call":
            calls += _calls_in_text(text_of(inner, here), here)
        else:
            shown = what[:40] if isinstance(what, str) else kind(what)
            raise UnfitError(f"{here}.type", f"is `{shown}`; only text, reasoning and tool_call parts can be read")
    return _Content("".join(texts), "".join(thoughts) or None, calls)


def _reasoning(value: Mapping[str, Any], place: str, reasoning: str | None, content: str) -> tuple[str | None, str]:
    """Reasoning from its own key, else from a reasoning part, else from a think block that begins the content.

    A key that is there but empty says that there is none, and the content is then left as it is.
    """
    for key in _REASONING:
        if value.get(key) is not None:
            thought = text_of(value[key], f"{place}.{key}")
            return (thought if thought.strip() else None), content
    return (reasoning, content) if reasoning is not None else split_think(content)


def _optional_text(value: Mapping[str, Any], key: str, place: str) -> str | None:
    return None if value.get(key) is None else text_of(value[key], f"{place}.{key}")


def _weight(value: Mapping[str, Any], place: str) -> float | None:
    """Loss weight from `weight` or `loss_weight` (a number >= 0), or from `train` or `loss` (true or false)."""
    for key in ("weight", "loss_weight"):
        number = value.get(key)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UnfitError(f"{place}.{key}", f"is {kind(number)}, not a number")
        if not 0 <= number <= 1e9:
            raise UnfitError(f"{place}.{key}", f"is {str(number)[:20]}, not a number from 0 to 1e9")
        return float(number)
    for key in ("train", "loss"):
        switch = value.get(key)
        if switch is None:
            continue
        if not isinstance(switch, bool):
            raise UnfitError(f"{place}.{key}", f"is {kind(switch)}, not true or false; a number goes into `weight`")
        return 1.0 if switch else 0.0
    return None


def _tool_calls(value: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """Calls under `tool_calls`, or the single one under `function_call` as older OpenAI files have it."""
    calls = list_of(value.get("tool_calls"), f"{place}.tool_calls")
    read = [_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]
    if value.get("function_call") is not None:
        read.append(_call(value["function_call"], f"{place}.function_call"))
    return read


def _calls_in_text(text: str, place: str) -> list[dict[str, Any]]:
    value = _parsed(text, place)
    if isinstance(value, list):
        return [_call(call, f"{place}[{index}]") for index, call in enumerate(value)]
    return [_call(value, place)]


def _call(value: Any, place: str) -> dict[str, Any]:
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
        arguments = _parsed(arguments, f"{where}.arguments") if arguments.strip() else {}
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
        tool = _parsed(item, here) if isinstance(item, str) else item
        if not isinstance(tool, Mapping):
            raise UnfitError(here, f"is {kind(tool)}, not the description of a function")
        if isinstance(tool.get("function"), Mapping):
            tools.append(dict(tool))
        elif isinstance(tool.get("name"), str):
            tools.append({"type": "function", "function": dict(tool)})
        else:
            raise UnfitError(here, "describes no function: it has neither `function` nor `name`")
    return tuple(tools)


def without_empty_answer(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns without an empty assistant turn at their end: the answer is still to be given."""
    if not turns:
        return turns
    last = turns[-1].message
    empty = last.role == "assistant" and not last.tool_calls and not last.content.strip()
    return turns[:-1] if empty else turns


def check_turns(turns: Sequence[Turn], place: str, require_answer: bool = True) -> None:
    """Refuse a conversation that no template can be trusted with.

    A system turn may only be the first. User and assistant turns alternate (an assistant may begin), tool turns follow
    an assistant's tool calls and are answered by the assistant. There is an assistant turn where one is required, and
    none is empty.

    Raises:
        UnfitError: names the turn, and both roles where the order is wrong.
    """
    if not turns:
        raise UnfitError(place, "has no messages")
    before: Turn | None = None
    for turn in turns:
        _check_order(before, turn)
        message = turn.message
        if message.role == "assistant" and not message.tool_calls and not message.content.strip():
            raise UnfitError(turn.place, "empty answer")
        before = turn
    if require_answer and all(turn.message.role != "assistant" for turn in turns):
        raise UnfitError(place, "no assistant turn")


def _check_order(before: Turn | None, turn: Turn) -> None:
    role = turn.message.role
    last = before.message.role if before else None
    wrong = ""
    if role == "tool" and last != "tool" and not (before and before.message.tool_calls):
        wrong = "a tool turn must follow an assistant's tool calls"
    elif role == "system" and before:
        wrong = "a system turn can only be the first"
    elif role == "user" and last == "tool":
        wrong = "the assistant must answer the tool first"
    elif role == last and role != "tool":
        wrong = "merge the two into one turn"
    if wrong:
        after = f"right after {before.message.role} ({before.place})" if before else "at the start"
        raise UnfitError(turn.place, f"roles out of order: {role} {after}; {wrong}")
