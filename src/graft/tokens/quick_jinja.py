"""The environment in which transformers renders chat templates, with short ways for what templates do most.

Speaks Jinja. Knows no messages and no tokenizer.

A sandbox looks an attribute up as Python does, and only when that fails as a key: `message.role` costs an exception.
A dict has no attribute but those of its class, so any other name is a key at once. What a loop counts, and the methods
of text but for `format`, are what the sandbox lets through unchanged (`is_safe_attribute` and `wrap_str_format` in
jinja2's sandbox.py); they need not be looked at anew. Nothing is let through that the sandbox would hold back.
"""

from __future__ import annotations

from typing import Any

import jinja2
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graft.tokens.watchdog import PADDING

_OF_DICTS = frozenset(dir(dict))
_OF_LOOPS = frozenset(("first", "last", "index", "index0"))
_OF_TEXT = frozenset(name for name in dir(str) if not name.startswith("_")) - {"format", "format_map"} - PADDING


class _QuickEnvironment(ImmutableSandboxedEnvironment):
    """The same look-ups, faster."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is dict:
            if attribute not in _OF_DICTS:
                try:
                    return obj[attribute]
                except KeyError:
                    return self.undefined(obj=obj, name=attribute)
        elif (kind is LoopContext and attribute in _OF_LOOPS) or (kind is str and attribute in _OF_TEXT):
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def quickened(environment: jinja2.Environment) -> jinja2.Environment:
    """An environment with all settings, filters and globals of another one, or itself where it is no plain sandbox."""
    if type(environment) is not ImmutableSandboxedEnvironment:
        return environment
    quick = object.__new__(_QuickEnvironment)
    quick.__dict__.update(environment.__dict__)  # as jinja2's own `overlay` does
    return quick
