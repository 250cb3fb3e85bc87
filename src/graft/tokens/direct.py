"""What transformers' `apply_chat_template(tokenize=False)` writes, without what its wrapper costs.

Speaks rows of messages and text. Knows no ids and no targets.

The wrapper copies every message, the tools and the special tokens into plain data at each call, which takes three
times as long as rendering short talk. Messages as `renderer` makes them are plain already, so the compiled template
can be called as the wrapper calls it. That this is all that the wrapper does is not believed but compared: the first
rendering of each kind (which keys the messages have, tools or none, switches) is done both ways, and a kind for which
the two differ is left to the wrapper, as is everything that is not plain.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jinja2

from graft.tokens.watchdog import bound_operations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]

PLAIN = frozenset((str, int, float, bool, type(None)))


class DirectTemplate:
    """One template as one tokenizer writes it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._compiled = _compiled(template)
        self._special = dict(tokenizer.special_tokens_map)
        self._kinds: dict[Hashable, bool] = {}
        self._tools: tuple[object, Rows | None] = ((), None)

    def render(
        self,
        messages: Rows,
        tools: Sequence[Mapping[str, Any]],
        generation_prompt: bool,
        switches: Mapping[str, bool],
    ) -> str:
        """The text of `apply_chat_template`; raises what the template raises."""
        schemas = self._schemas(tools)
        if self._compiled is None or not _is_plain(messages) or (schemas is None and tools):
            return self._wrapped(messages, [dict(tool) for tool in tools] or None, generation_prompt, switches)
        kind = (frozenset[str]().union(*messages), bool(tools), generation_prompt, tuple(switches.items()))
        if kind not in self._kinds:
            wanted = self._wrapped(messages, schemas, generation_prompt, switches)
            self._kinds[kind] = self._called(messages, schemas, generation_prompt, switches) == wanted
            return wanted
        render = self._called if self._kinds[kind] else self._wrapped
        return render(messages, schemas, generation_prompt, switches)

    def _wrapped(
        self, messages: Rows, tools: Rows | None, generation_prompt: bool, switches: Mapping[str, bool]
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", messages),
            tools=cast("Any", tools),
            chat_template=self._template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **cast("dict[str, Any]", switches),
        )
        assert isinstance(text, str)
        return text

    def _called(self, messages: Rows, tools: Rows | None, generation_prompt: bool, switches: Mapping[str, bool]) -> str:
        """As `render_jinja_template` in transformers' chat_template_utils.py calls it."""
        assert self._compiled is not None
        values = {**self._special, **switches}
        return self._compiled.render(
            values,
            messages=[_with_aliases(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=generation_prompt,
        )

    def _schemas(self, tools: Sequence[Mapping[str, Any]]) -> Rows | None:
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


def _compiled(template: str) -> jinja2.Template | None:
    """transformers' own compiled form of a template, which it keeps, made faster; what it writes stays the same.

    jinja2 copies a template's globals at every rendering, twice, and out of a `ChainMap`, whose steps are Python: with
    short talks that is a third of the time. A plain dict of the same globals is copied at once.
    """
    with contextlib.suppress(ImportError, AttributeError, jinja2.TemplateError):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        compiled: jinja2.Template = _compile_jinja_template(template)
        bound_operations(compiled, template)
        compiled.globals = dict(compiled.globals)
        return compiled
    return None


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
