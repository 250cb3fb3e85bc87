"""What transformers' `apply_chat_template(tokenize=False)` writes, without what its wrapper costs.

Speaks rows of messages and text. Knows no ids and no targets.

The wrapper copies every message, the tools and the special tokens into plain data at each call, which takes three
times as long as rendering short talk. Messages as `renderer` makes them are plain already, so the compiled template
can be called as the wrapper calls it. That this is all that the wrapper does is not believed but compared: the first
rendering of each kind (which keys the messages have, tools or none, switches) is done both ways, and a kind for which
the two differ is left to the wrapper, as is everything that is not plain. In the same way the beginnings of a
conversation, which one rendering tells of (`beginnings`), are compared with their own renderings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jinja2

from graft.tokens.beginnings import Beginnings, MarkedTemplate, compiled
from graft.tokens.quick_jinja import quickened
from graft.tokens.watchdog import bound_operations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = frozenset((str, int, float, bool, type(None)))

MOST_KINDS = 4096
"""Kinds of conversations that are remembered: a stranger's data cannot fill the memory with kinds of its own."""


class Rows:
    """Messages as a template wants them, and what is found out about them once."""

    __slots__ = ("aliased", "are_plain", "messages")

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self.messages = messages
        self.aliased = [_with_aliases(message) for message in messages]
        """As the wrapper hands them on."""
        self.are_plain = _is_plain(messages)

    def first(self, count: int) -> Rows:
        """The first of them."""
        if count == len(self.messages):
            return self
        part = Rows.__new__(Rows)
        part.messages, part.aliased = self.messages[:count], self.aliased[:count]
        part.are_plain = self.are_plain or _is_plain(part.messages)
        return part


class DirectTemplate:
    """One template as one tokenizer writes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._compiled, self._marked = _compiled(template)
        self._special = dict(tokenizer.special_tokens_map)
        self._kinds: dict[Hashable, bool] = {}
        self._told: dict[Hashable, bool] = {}
        """Kind of conversation -> whether its beginnings were found to be what the template writes of them."""
        self._tools: tuple[object, list[dict[str, Any]] | None] = ((), None)

    def render(
        self, rows: Rows, tools: Sequence[Mapping[str, Any]], generation_prompt: bool, switches: Mapping[str, bool]
    ) -> str:
        """The text of `apply_chat_template`; raises what the template raises."""
        schemas = self._schemas(tools)
        if self._compiled is None or not rows.are_plain or (schemas is None and tools):
            return self._wrapped(rows, [dict(tool) for tool in tools] or None, generation_prompt, switches)
        kind = (frozenset[str]().union(*rows.messages), bool(tools), generation_prompt, *switches.items())
        if kind not in self._kinds:
            wanted = self._wrapped(rows, schemas, generation_prompt, switches)
            self._kinds[kind] = self._called(rows, schemas, generation_prompt, switches) == wanted
            return wanted
        render = self._called if self._kinds[kind] else self._wrapped
        return render(rows, schemas, generation_prompt, switches)

    def beginnings(
        self, rows: Rows, tools: Sequence[Mapping[str, Any]], generation_prompt: bool, switches: Mapping[str, bool]
    ) -> Beginnings | None:
        """What the template writes of the rows' beginnings, as far as one rendering of all tells; None: nothing."""
        schemas = self._schemas(tools)
        if self._marked is None or not rows.are_plain or (schemas is None and tools):
            return None
        roles = frozenset([message["role"] for message in rows.messages])
        kind = (frozenset[str]().union(*rows.messages), roles, bool(tools), generation_prompt, *switches.items())
        known = self._told.get(kind)
        if known is False or (known is None and len(self._told) >= MOST_KINDS):
            return None
        values = {**switches, "tools": schemas, "documents": None, "add_generation_prompt": generation_prompt}
        found = self._marked.render(self._special, values, rows.aliased)
        if known is None:
            self._told[kind] = self._are_true(found, rows, tools, switches)
        return found if self._told[kind] else None

    def _are_true(
        self, found: Beginnings, rows: Rows, tools: Sequence[Mapping[str, Any]], switches: Mapping[str, bool]
    ) -> bool:
        """Whether each beginning, rendered by itself, is what was found."""
        for count in found.cuts:
            for asked in found.tails:
                try:
                    if self.render(rows.first(count), tools, asked, switches) != found.of(count, asked):
                        return False
                except Exception:  # the template raises
                    return False
        return True

    def _wrapped(
        self, rows: Rows, tools: list[dict[str, Any]] | None, generation_prompt: bool, switches: Mapping[str, bool]
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", rows.messages),
            tools=cast("Any", tools),
            chat_template=self._template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **cast("dict[str, Any]", switches),
        )
        assert isinstance(text, str)
        return text

    def _called(
        self, rows: Rows, tools: list[dict[str, Any]] | None, generation_prompt: bool, switches: Mapping[str, bool]
    ) -> str:
        """As `render_jinja_template` in transformers' chat_template_utils.py calls it."""
        assert self._compiled is not None
        return self._compiled.render(
            {**self._special, **switches},
            messages=rows.aliased,
            tools=tools,
            documents=None,
            add_generation_prompt=generation_prompt,
        )

    def _schemas(self, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """The tools as plain dicts, None where there are none or they are not plain; remembered for the next turn."""
        if not tools:
            return None
        last, schemas = self._tools
        if last is not tools:
            schemas = [dict(tool) for tool in tools]
            schemas = schemas if _is_plain(schemas) else None
            if type(tools) is tuple:  # a conversation's; a list may be another one the next time
                self._tools = (tools, schemas)
        return schemas


def _compiled(template: str) -> tuple[jinja2.Template | None, MarkedTemplate | None]:
    """A template compiled in the environment that transformers compiles it in, made faster; and with marks."""
    with contextlib.suppress(ImportError, AttributeError, jinja2.TemplateError):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs: jinja2.Template = _compile_jinja_template(template)
        bound_operations(theirs, template)
        environment, names = quickened(theirs.environment), dict(theirs.globals)
        ours = compiled(environment, environment.parse(template), names)
        return ours, MarkedTemplate.of(environment, template, names)
    return None, None


def _with_aliases(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning also under the name by which gpt-oss's template reads it."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def _is_plain(value: Any) -> bool:
    """Whether a value is JSON of exact Python types: the wrapper would copy it as it is."""
    kind = type(value)
    if kind is dict:
        return {str}.issuperset(map(type, value)) and _are_plain(value.values())
    return kind in PLAIN or (kind is list and _are_plain(value))


def _are_plain(values: Collection[Any]) -> bool:
    """The same of several values; strings and numbers, which are nearly all, cost no call each."""
    return PLAIN.issuperset(map(type, values)) or all(map(_is_plain, values))
