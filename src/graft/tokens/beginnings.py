"""What a chat template writes of every beginning of a conversation, learnt while the whole is rendered once.

Speaks rows of messages and text. Knows no ids and no targets.

A template is a program that reads a list of messages and writes text. Given messages[:t] instead of all of them, it
does the same, step by step, until it looks at something that only the whole has. So the list that it is given here
notes what is looked at. Where the template's loop over the messages asks for message t, and nothing from t on nor the
list's end was looked at before, then all that is written so far is what messages[:t] would have written, and there the
loop would end. What follows the loop is a text of its own, if it reads nothing that was set before it and no message.

- The loop stands at the top of the template, and nothing stands around it. Marks written before it, and where each of
  its rounds begins and ends, tell the loop's own question for the next message from one in its midst (`loop.last`).
- What follows the loop is rendered by itself, with the same switches.
- Every way to look into the list is noted; all but asking for a message by its place from the front, cutting off the
  first ones, and going through it, counts as looking at the whole.

This proves one beginning of one conversation. `direct` also compares the first conversation of each kind.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes

Rows = list[dict[str, Any]]

PROMPT = "add_generation_prompt"

_BETWEEN, _WITHIN = (f"graft's mark {secrets.token_hex(16)}" for _ in range(2))
"""Texts that no template writes by itself: from here on the loop goes on; from here on a round of it runs."""

_EVERYTHING = 1 << 62
"""More messages than there are: the end of the list was looked at."""

_NOT_OURS = (
    jinja2.nodes.Extends,
    jinja2.nodes.Block,
    jinja2.nodes.Include,
    jinja2.nodes.ImportedName,
    jinja2.nodes.Import,
    jinja2.nodes.FromImport,
    jinja2.nodes.EvalContextModifier,
)
"""Parts that make a template more than one list of statements."""


_NOT_OUR_FILTERS = ("pprint", "random")
"""The first writes a list of a class of its own in another way; the second never writes the same twice."""


@dataclass(slots=True)
class Beginnings:
    """A rendering of some messages, whole or up to where the template raised."""

    text: str
    cuts: dict[int, int]
    """Number of messages -> how many characters of `text` they write before what follows the loop."""
    tails: Mapping[bool, str]
    """What follows the loop, with and without the generation prompt; without an entry where that is not known."""

    def of(self, count: int, generation_prompt: bool) -> str | None:
        """What the template writes of the first `count` messages; None where the rendering does not tell."""
        cut, tail = self.cuts.get(count), self.tails.get(generation_prompt)
        return None if cut is None or tail is None else self.text[:cut] + tail


class MarkedTemplate:
    """A template whose loop over the messages is marked."""

    def __init__(self, whole: jinja2.Template, tail: jinja2.Template, prompt_in_head: bool) -> None:
        self._whole = whole
        self._tail = tail
        self._prompt_in_head = prompt_in_head
        self._tails: dict[tuple[Any, ...], str | None] = {}

    @classmethod
    def of(cls, environment: jinja2.Environment, source: str, globals_: Mapping[str, Any]) -> MarkedTemplate | None:
        """A template in the environment that compiles it; None where it is not of the form that can be marked."""
        tree = environment.parse(source)
        at = next((n for n in reversed(range(len(tree.body))) if _is_loop(tree.body[n])), None)
        if at is None or any(tree.find(kind) is not None for kind in _NOT_OURS):
            return None
        if any(used.name in _NOT_OUR_FILTERS for used in tree.find_all(jinja2.nodes.Filter)):
            return None
        loop, rest = tree.body[at], jinja2.nodes.Template(tree.body[at + 1 :], lineno=1)
        rest.set_environment(environment)
        assert isinstance(loop, jinja2.nodes.For)
        head = jinja2.nodes.Template(tree.body[: at + 1], lineno=1)
        free = jinja2.meta.find_undeclared_variables(rest)
        known = {"messages", "tools", "documents", "self", *_stored(head), *(set(globals_) - {"raise_exception"})}
        if free & known:
            return None
        asks = any(name.name == PROMPT for name in head.find_all(jinja2.nodes.Name))
        loop.body = [_mark(_WITHIN), *loop.body, _mark(_BETWEEN)]
        tree.body.insert(at, _mark(_BETWEEN))
        tree.set_environment(environment)
        return cls(compiled(environment, tree, globals_), compiled(environment, rest, globals_), asks)

    def render(self, constants: Mapping[str, Any], values: Mapping[str, Any], messages: Rows) -> Beginnings:
        """One rendering; where the template raises, it tells of what was written before.

        Args:
            constants: what the template is given at every rendering.
            values: what it is given besides, but for the messages; all but tools and documents are hashable.
            messages: rows that nothing changes any more.
        """
        watch = _Watch()
        parts, whole = watch.parts, True
        context = self._whole.new_context({**constants, **values, "messages": _Watched(messages, watch)})
        try:
            for part in self._whole.root_render_func(context):
                if part == _BETWEEN:
                    watch.between = True
                elif part == _WITHIN:
                    watch.between = False
                else:
                    parts.append(part)
                    watch.chars += len(part)
        except Exception:  # a template is a program of a stranger: it may raise anything, and will again by itself
            whole = False
        text, prompt = "".join(parts), bool(values[PROMPT])
        tails = {}
        for asked in (prompt,) if self._prompt_in_head else (True, False):
            tail = self._after(constants, values, asked)
            if tail is not None:
                tails[asked] = tail
        if whole and prompt in tails:
            if not text.endswith(tails[prompt]):
                return Beginnings(text, {}, {})
            watch.cuts[len(messages)] = len(text) - len(tails[prompt])
        return Beginnings(text, watch.cuts, tails)

    def _after(self, constants: Mapping[str, Any], values: Mapping[str, Any], prompt: bool) -> str | None:
        """What follows the loop, None where the template raises there."""
        given = {name: value for name, value in values.items() if name not in ("tools", "documents", PROMPT)}
        key = (prompt, *given.items())
        if key not in self._tails:
            try:
                self._tails[key] = self._tail.render({**constants, **given, PROMPT: prompt})
            except Exception:
                self._tails[key] = None
        return self._tails[key]


def compiled(
    environment: jinja2.Environment, tree: jinja2.nodes.Template, globals_: Mapping[str, Any]
) -> jinja2.Template:
    """A parsed template, ready to render."""
    return jinja2.Template.from_code(environment, environment.compile(tree), dict(globals_))


def _is_loop(node: jinja2.nodes.Node) -> bool:
    """Whether a statement is a plain loop over a name that speaks of messages."""
    if not isinstance(node, jinja2.nodes.For) or node.test is not None or node.else_ or node.recursive:
        return False
    return isinstance(node.iter, jinja2.nodes.Name) and "messages" in node.iter.name


def _stored(tree: jinja2.nodes.Node) -> set[str]:
    """Names that a part of a template gives a value to."""
    names = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx != "load"}
    return names | {macro.name for macro in tree.find_all(jinja2.nodes.Macro)}


def _mark(text: str) -> jinja2.nodes.Output:
    return jinja2.nodes.Output([jinja2.nodes.TemplateData(text)], lineno=1)


@dataclass(slots=True)
class _Watch:
    """What a template has written and looked at so far."""

    parts: list[str] = field(default_factory=list)
    chars: int = 0
    between: bool = False
    """Whether the next message that is asked for is asked for by the loop itself."""
    seen: int = 0
    """Nothing was looked at that the first `seen` messages by themselves would not show."""
    cuts: dict[int, int] = field(default_factory=dict)

    def ask(self, index: int) -> None:
        """Somebody goes on to the message at a place."""
        if self.between:
            self.between = False
            if 0 < index >= self.seen:  # no template is asked for a conversation without messages
                self.cuts[index] = self.chars
        if self.seen <= index:
            self.seen = index + 1


class _Watched(list[dict[str, Any]]):
    """Messages that note what is looked at. Each method of a list is one of this class."""

    __slots__ = ("_start", "_watch")

    def __init__(self, rows: Sequence[dict[str, Any]], watch: _Watch, start: int = 0) -> None:
        super().__init__(rows)
        self._watch = watch
        self._start = start
        """Place of the first of them in the conversation."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        watch, index = self._watch, self._start
        for row in list.__iter__(self):
            watch.ask(index)
            index += 1
            yield row
        watch.seen = _EVERYTHING

    def __getitem__(self, key: Any) -> Any:
        if type(key) is int and 0 <= key < list.__len__(self):
            self._watch.seen = max(self._watch.seen, self._start + key + 1)
            return list.__getitem__(self, key)
        if type(key) is slice and key.stop is None and key.step is None and type(key.start) is int and key.start >= 0:
            return _Watched(list.__getitem__(self, key), self._watch, self._start + key.start)
        self._watch.seen = _EVERYTHING
        return list.__getitem__(self, key)


def _looking_at_everything(name: str) -> Callable[..., Any]:
    honest = getattr(list, name)

    def method(self: _Watched, *given: Any, **named: Any) -> Any:
        self._watch.seen = _EVERYTHING
        return honest(self, *given, **named)

    return method


def _added_to(self: _Watched, other: list[Any]) -> list[Any]:
    """A list + these: list itself has no method for it, and would read them unnoticed. With anything else it raises."""
    self._watch.seen = _EVERYTHING
    return list.__add__(other, self)


_COMPARING = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__repr__"}
for _name in (set(dir(list)) - {"__class_getitem__", *_Watched.__dict__, *dir(object)}) | _COMPARING:
    setattr(_Watched, _name, _looking_at_everything(_name))
_Watched.__radd__ = _added_to  # type: ignore[attr-defined]
