"""The user's own regular expressions: drop, keep or replace; a pattern that would never end is stopped."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from graft.config.clean import Rule, Rules
from graft.data.clean.step import Drop, Notes, Result, edit_texts, texts
from graft.errors import ConfigError, GraftError, first_line
from graft.types import Conversation

if TYPE_CHECKING:
    from regex import Pattern


def check_rules(settings: Rules) -> None:
    """Refuse patterns and replacements that are not valid, before any row is read.

    Raises:
        ConfigError: names the rule and what is wrong where.
    """
    for rule in settings.rules:
        _compiled(rule.name, rule.pattern, rule.ignore_case)
        if rule.by is not None:
            _try_replacement(rule)


def apply_rules(conversation: Conversation, settings: Rules, notes: Notes) -> Result:
    """The conversation after every rule in order, or dropped by the first that says so.

    Raises:
        GraftError: a pattern needed longer than `seconds` for one text; names the rule and the place.
    """
    for rule in settings.rules:
        pattern = _compiled(rule.name, rule.pattern, rule.ignore_case)
        try:
            result = _apply(conversation, rule, pattern, settings.seconds, notes)
        except TimeoutError:
            raise GraftError(
                f"rule {rule.name}: its pattern needed more than {settings.seconds:g} s for one text of "
                f"{conversation.origin}; nested repeats like (a+)+ do that, write it without them, "
                "or allow more: rules.seconds=60"
            ) from None
        if isinstance(result, Drop):
            return result
        conversation = result
    return conversation


def _apply(conversation: Conversation, rule: Rule, pattern: Pattern[str], seconds: float, notes: Notes) -> Result:
    if rule.action == "replace":

        def edit(role: str, text: str) -> str:
            if role not in rule.where:
                return text
            replaced, count = pattern.subn(rule.by or "", text, timeout=seconds)
            notes[f"{rule.name}: replaced"] += count
            return str(replaced)

        return edit_texts(conversation, edit)
    for field, role, text in texts(conversation):
        if role in rule.where and (found := pattern.search(text, timeout=seconds)):
            notes[f"{rule.name}: matched"] += 1
            return conversation if rule.action == "keep" else Drop(field, f"rule {rule.name} matches {found[0][:80]!r}")
    if rule.action == "keep":
        place = "messages" if conversation.text is None else "text"
        return Drop(place, f"rule {rule.name} matches nowhere")
    return conversation


@cache
def _compiled(name: str, pattern: str, ignore_case: bool) -> Pattern[str]:
    import regex

    flags = regex.MULTILINE | regex.VERSION0 | (regex.IGNORECASE if ignore_case else 0)
    try:
        return regex.compile(pattern, flags)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"rule {name}: pattern {pattern!r}: {first_line(error)}; correct it") from None


def _try_replacement(rule: Rule) -> None:
    """A group that the pattern has not would be found at the first match only, maybe hours later."""
    import regex

    _compiled(rule.name, rule.pattern, rule.ignore_case)
    probe = regex.compile(f"(?:{rule.pattern})?", regex.MULTILINE | regex.VERSION0)  # matches the empty text
    try:
        probe.sub(rule.by or "", "")
    except (regex.error, IndexError) as error:
        raise ConfigError(f"rule {rule.name}: by {rule.by!r}: {first_line(error)}; correct it") from None
