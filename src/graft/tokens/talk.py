"""One conversation as text, turn by turn: what its turns share is rendered once.

Speaks messages and text. Knows no ids and no targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graft.tokens.beginnings import Beginnings
from graft.tokens.direct import Rows
from graft.tokens.renderer import Renderer, message_dict
from graft.types import Message


class Talk:
    """A conversation of which several beginnings will be asked for."""

    def __init__(
        self,
        renderer: Renderer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        last: Mapping[bool, int],
    ) -> None:
        """Rendered by `renderer` with these tools.

        `last` is the last of the turns that will be asked for: with the template's thinking switches on, and off.
        Where the template has no switches, the two are rendered together.
        """
        self.renderer = renderer
        self.messages = messages
        self.tools = tools
        self._last = last if renderer.switches else {False: max(last.values())}
        self._rows = renderer.rows(messages[: max(last.values()) + 1])
        self._found: dict[tuple[bool, bool], Beginnings | None] = {}

    def prompt(self, index: int, thinking: bool) -> str:
        """What generation is given before the turn at `index`.

        Raises:
            TemplateRefused: the template raises on these messages.
        """
        return self._beginning(index, thinking, True)

    def full(self, index: int, thinking: bool) -> str:
        """The conversation through the turn at `index`.

        Raises:
            TemplateRefused: the template raises on these messages.
        """
        return self._beginning(index + 1, thinking, False)

    def ending_in(self, target: Message, index: int, thinking: bool) -> str:
        """The conversation through the turn at `index`, with another one in its place.

        Raises:
            TemplateRefused: the template raises on these messages.
        """
        renderer = self.renderer
        last = message_dict(target, renderer.content_parts, renderer.string_arguments)
        rows = Rows([*self._rows.messages[:index], last])
        return renderer.render_rows(rows, self.tools, thinking, generation_prompt=False)

    def _beginning(self, count: int, thinking: bool, generation_prompt: bool) -> str:
        switched = thinking if self.renderer.switches else False
        found = self._rendered(switched, False)
        if found is not None and generation_prompt not in found.tails:
            found = self._rendered(switched, generation_prompt)
        text = found.of(count, generation_prompt) if found is not None else None
        if text is not None:
            return text
        return self.renderer.render_rows(self._rows.first(count), self.tools, thinking, generation_prompt)

    def _rendered(self, switched: bool, generation_prompt: bool) -> Beginnings | None:
        """The longest beginning that will be asked for, rendered once."""
        key = (switched, generation_prompt)
        if key not in self._found:
            rows = self._rows.first(self._last[switched] + (not generation_prompt))
            self._found[key] = self.renderer.beginnings(rows, self.tools, switched, generation_prompt)
        return self._found[key]
