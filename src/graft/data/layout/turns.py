"""One turn of a chat as data files write it, read as a Message.

Speaks of roles, content, reasoning, tool calls and weights. Knows no files, columns or formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from graft.data.layout.calls import calls_in_text, read_call, split_tagged_calls, tagged_blocks
from graft.data.values import UnfitError, kind, list_of, text_of
from graft.types import Message, Role


class Turn(NamedTuple):
    """A message and where in its row it stands, such as `messages[2]`, for the words of a reject."""

    place: str
    message: Message


_ROLES: dict[str, Role | Literal["function_call"]] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "chatbot", "bot"), "assistant"),
    **dict.fromkeys(
        ("tool", "observation", "observations", "function", "function_response", "tool_response", "ipython"), "tool"
    ),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
"""What the roles are called elsewhere. A `function_call` is an assistant turn whose content is the call as JSON."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
MESSAGE_KEYS = frozenset(
    {
        *("role", "from", "content", "value", "name", "tool_calls", "function_call", "tool_call_id"),
        *("weight", "loss_weight", "loss_scale", "train", "loss", "human", "user", "assistant"),
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
    end = 0
    while found := _THINK.match(content, end):
        end = found.end()
        reasoning = found[1].strip("\n")
        if reasoning.strip():
            return reasoning, content[end:]
    return None, content[end:]


def read_turns(values: Sequence[Any], place: str) -> list[Turn]:
    """The messages of a list; `place` is the list's name.

    Raises:
        UnfitError: an element is no message; names its place.
    """
    turns: list[Turn] = []
    for index, value in enumerate(values):
        here = f"{place}[{index}]"
        if not isinstance(value, dict):
            raise UnfitError(here, f"is {kind(value)}, not an object with role and content")
        if "assistant" in value and (pair := _pair(value, here)):
            turns += pair
        elif results := _tool_results(value, here):
            turns += results
        else:
            turns.append(Turn(here, read_message(value, here)))
            if index and turns[-1].message.tool_calls and _role(value) == _role(values[index - 1]) == "function_call":
                turns[-2:] = [_one_turn(turns[-2], turns[-1])]
    return turns


def _pair(value: Mapping[str, Any], place: str) -> list[Turn]:
    """A question and its answer in one object, {"human": ..., "assistant": ...}; nothing where it is none."""
    ask = "human" if "human" in value else "user"
    if ask not in value or "assistant" not in value:
        return []
    return [
        user(f"{place}.{ask}", text_of(value[ask], f"{place}.{ask}")),
        assistant(f"{place}.assistant", text_of(value["assistant"], f"{place}.assistant")),
    ]


def _tool_results(value: Mapping[str, Any], place: str) -> list[Turn]:
    """The tool turns, and the user's, in a message that holds results; nothing where it holds none.

    Anthropic has `tool_result` parts in a user's message; ShareGPT sets for Hermes have `<tool_response>` blocks.
    """
    content = value.get("content")
    if isinstance(content, list) and any(_is_result(part) for part in content) and _role(value) in ("user", "tool"):
        return _result_parts(value, content, place)
    said = value.get("value")
    if not isinstance(said, str) or "<tool_response>" not in said or _role(value) != "tool":
        return []
    blocks, end = tagged_blocks(said, "tool_response", len(said) - len(said.lstrip()))
    if end < len(said):
        return []
    return [Turn(place, Message("tool", block.strip())) for block in blocks]


def _is_result(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "tool_result"


def _result_parts(value: Mapping[str, Any], parts: Sequence[Any], place: str) -> list[Turn]:
    turns: list[Turn] = []
    rest: list[Any] = []
    for index, part in enumerate(parts):
        if _is_result(part):
            here = f"{place}.content[{index}]"
            name = _optional_text(part, "tool_use_id", here)
            turns.append(Turn(here, Message("tool", content_text(part.get("content"), here), tool_call_id=name)))
        rest.append("" if _is_result(part) else part)  # an empty part keeps the places of those behind it
    return turns + ([Turn(place, read_message({**value, "content": rest}, place))] if any(rest) else [])


def _role(value: Any) -> str | None:
    """The role of a message by our name; None where it has none that is known."""
    name = value.get("role", value.get("from")) if isinstance(value, Mapping) else None
    return _ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def _one_turn(first: Turn, second: Turn) -> Turn:
    """Calls that stand one after the other are the calls of one turn."""
    calls = (*first.message.tool_calls, *second.message.tool_calls)
    thoughts = [thought for thought in (first.message.reasoning, second.message.reasoning) if thought]
    return Turn(first.place, replace(first.message, tool_calls=calls, reasoning="\n\n".join(thoughts) or None))


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


def read_message(value: Mapping[str, Any], place: str) -> Message:
    """A message in OpenAI's form (role, content) or ShareGPT's (from, value).

    Raises:
        UnfitError: it cannot be read without a guess; names the place down to the key.
    """
    role_key = "role" if value.get("role") is not None else "from"
    name = text_of(value.get(role_key), f"{place}.{role_key if role_key in value else 'role'}")
    role = _ROLES.get(name.strip().lower())
    if role is None:
        raise UnfitError(f"{place}.{role_key}", f"unknown role `{name[:40]}`; roles are {', '.join(_ROLES)}")
    key = "content" if value.get("content") is not None or "value" not in value else "value"
    given = value.get(key)
    if len(value) == 2 and isinstance(given, str) and role != "function_call":  # only role and text, as most are
        return _plain_message(role, given, f"{place}.{key}")
    parts = _Content(given, None, []) if isinstance(given, str) else _content(given, f"{place}.{key}")
    calls = [*parts.calls, *_tool_calls(value, place)]
    reasoning, content = parts.reasoning, parts.text
    if role == "function_call":
        role = "assistant"
        reasoning, content = split_think(content)
        calls += calls_in_text(content, f"{place}.{key}")
        content = ""
    elif role == "assistant":
        reasoning, content = _reasoning(value, place, reasoning, content)
        if not calls and value.get("tool_calls") is None:  # an empty list says that there are none in the text either
            content, calls = split_tagged_calls(content, f"{place}.{key}")
    elif calls or parts.reasoning or any(value.get(name) for name in _REASONING):
        raise UnfitError(place, f"a {role} turn with reasoning or tool calls; only an assistant turn can have them")
    elif given is None:
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


def _plain_message(role: Role, said: str, place: str) -> Message:
    if role != "assistant":
        return Message(role, said)
    reasoning, content = split_think(said)
    content, calls = split_tagged_calls(content, place)
    return Message(role, content, reasoning, tuple(calls))


class _Content(NamedTuple):
    text: str
    reasoning: str | None
    calls: list[dict[str, Any]]


def content_text(value: Any, place: str) -> str:
    """Text, or a list of text parts; null is none.

    Raises:
        UnfitError: it is something else, or has other parts.
    """
    content = _content(value, place)
    if content.reasoning or content.calls:
        raise UnfitError(place, "has reasoning or tool calls; only an assistant turn can have them")
    return content.text


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
        if what in ("text", "input_text", "output_text"):
            texts.append(text_of(inner, here))
        elif what in ("reasoning", "thinking"):
            thoughts.append(text_of(inner, here))
        elif what == "tool_call":
            calls += calls_in_text(text_of(inner, here), here)
        elif what == "tool_use":  # Anthropic's
            call = {"name": part.get("name"), "arguments": part.get("input"), "id": part.get("id")}
            calls.append(read_call(call, here))
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
    """Loss weight: a number >= 0 (`weight`, `loss_weight`, `loss_scale`), or true or false (`train`, `loss`)."""
    for key in ("weight", "loss_weight", "loss_scale"):
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
    if value.get("tool_calls") is None and value.get("function_call") is None:
        return []
    calls = list_of(value.get("tool_calls"), f"{place}.tool_calls")
    read = [read_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]
    if value.get("function_call") is not None:
        read.append(read_call(value["function_call"], f"{place}.function_call"))
    return read
