"""The prompts: shipped ones and the user's own, as named pieces of text with placeholders. Knows no model and no files
of data.

`{name}` is filled in one pass, so that a question that holds braces stays as it is; `{{name}}` writes `{name}`. Other
braces (JSON in a prompt) mean nothing here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from graft.config.base import did_you_mean
from graft.config.synth import Persona, Synth
from graft.errors import ConfigError, first_line

Chat = tuple[tuple[str, str], ...]
"""(role, content) pairs: what is sent."""

SHIPPED = ("en", "zh")
_SPOT = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")

_EVERYWHERE = frozenset({"domain", "in_domain", "persona", "name", "company", "date", "about"})
_OWN: dict[str, tuple[set[str], set[str]]] = {  # prompt: (must be there, may be there), beside those known everywhere
    "questions": ({"n"}, {"examples"}),
    "answers": ({"question"}, set()),
    "document_questions": ({"document", "n"}, {"examples"}),
    "document_answers": ({"document", "question"}, set()),
    "critique": ({"question", "answer"}, {"document", "grounds"}),
    "rewrite": ({"question", "answer", "critique"}, {"document", "grounds"}),
}
_PIECES: dict[str, set[str]] = {  # plain pieces of text and the placeholders of their own
    "join": set(),
    "in_domain": set(),
    "grounds": {"document"},
    "example": {"number", "question"},
    "context_turn": {"document", "question"},
    "nothing": set(),
    "fine": set(),
}


@dataclass(frozen=True, slots=True)
class Wording:
    """A full set of prompts, checked, with the recipe's own values at hand."""

    chats: Mapping[str, tuple[str, str]]
    """Prompt's name -> (system, user)."""
    pieces: Mapping[str, str]
    values: Mapping[str, str]
    """Placeholders that are the same in every prompt."""

    def chat(self, name: str, **values: str | int) -> Chat:
        """The messages of a prompt; a blank system text is left out."""
        known = {**self.values, "grounds": "", **{key: str(value) for key, value in values.items()}}
        system, user = (fill(text, known).strip() for text in self.chats[name])
        return (("system", system), ("user", user)) if system else (("user", user),)

    def piece(self, name: str, **values: str | int) -> str:
        """A plain piece of text."""
        return fill(self.pieces[name], {**self.values, **{key: str(value) for key, value in values.items()}})

    def free(self, text: str) -> str:
        """A text of the recipe that may use the placeholders known everywhere."""
        return fill(text, self.values).strip()


def fill(text: str, values: Mapping[str, str]) -> str:
    """The text with its placeholders filled; one that `values` lacks stays."""

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return f"{{{match[1]}}}"
        return values.get(match[2], match[0])

    return _SPOT.sub(value, text)


def load_wording(settings: Synth) -> Wording:
    """The shipped prompts of the language, with the user's own laid over them.

    Raises:
        ConfigError: the file cannot be read, a prompt or placeholder is unknown, or one that is needed is missing.
    """
    place = f"prompts for `{settings.language}`"
    raw: dict[str, Any] = {}
    if settings.language in SHIPPED:
        shipped = files("graft.data.synth").joinpath("prompts", f"{settings.language}.yaml")
        raw = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    if settings.prompts is not None:
        place = settings.prompts
        raw |= _read(Path(settings.prompts))
    missing = [name for name in (*_OWN, *_PIECES, "persona") if name not in raw]
    if missing:
        raise ConfigError(
            f"{place}: {', '.join(missing)} missing, and graft ships prompts for {' and '.join(SHIPPED)} only; "
            "copy en.yaml (docs/synth.md), translate it, and name it as `prompts`"
        )
    variables = set(settings.variables)
    if taken := sorted(variables & (_EVERYWHERE | {"n", "examples", "question", "answer", "document", "critique"})):
        raise ConfigError(f"variables: {taken[0]} has a meaning of its own in prompts; choose another name")
    for text, name in ((settings.answers.system, "answers.system"), (settings.domain, "domain")):
        _check_spots(text, name, _EVERYWHERE | variables)
    chats = {name: _chat(raw[name], f"{place}: {name}", name, variables) for name in _OWN}
    pieces = {name: _piece(raw[name], f"{place}: {name}", own | variables) for name, own in _PIECES.items()}
    sentences = raw["persona"]
    if not isinstance(sentences, Mapping) or not all(isinstance(text, str) for text in sentences.values()):
        raise ConfigError(f"{place}: persona: expected a sentence for each of {', '.join(Persona.model_fields)}")
    return Wording(chats, pieces, _values(settings, sentences, pieces))


def _values(settings: Synth, sentences: Mapping[str, str], pieces: Mapping[str, str]) -> dict[str, str]:
    persona = {name: value for name, value in settings.persona.model_dump().items() if value}
    said = [fill(sentence, persona) for part, sentence in sentences.items() if part in persona]
    values = {**dict.fromkeys(Persona.model_fields, ""), **persona, **settings.variables}
    values |= {"domain": settings.domain, "persona": pieces["join"].join(said)}
    return values | {"in_domain": fill(pieces["in_domain"], values) if settings.domain else ""}


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"prompts: {path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"prompts: {path}: not valid YAML in UTF-8 ({first_line(error)})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"prompts: {path}: expected prompts by their names, such as `questions:`")
    known = (*_OWN, *_PIECES, "persona")
    for name in raw:
        if name not in known:
            raise ConfigError(
                f"{path}: unknown prompt `{name}`{did_you_mean(str(name), known)}; known are {', '.join(known)}"
            )
    return raw


def _chat(value: Any, place: str, name: str, variables: set[str]) -> tuple[str, str]:
    """(system, user) of {system, user}, or of the user's text alone."""
    if isinstance(value, str):
        value = {"user": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("user"), str) or set(value) - {"system", "user"}:
        raise ConfigError(f"{place}: expected a text, or `system` and `user` texts")
    system, user = value.get("system") or "", value["user"]
    needed, possible = _OWN[name]
    found = _check_spots(f"{system}\n{user}", place, _EVERYWHERE | variables | needed | possible)
    if lacking := sorted(needed - found):
        raise ConfigError(f"{place}: does not use {{{lacking[0]}}}, so every request would be the same; write it in")
    return system, user


def _piece(value: Any, place: str, own: set[str]) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{place}: expected a text")
    _check_spots(value, place, _EVERYWHERE | own)
    return value


def _check_spots(text: str, place: str, known: set[str] | frozenset[str]) -> set[str]:
    """The placeholders of a text.

    Raises:
        ConfigError: one that is not known; it would be sent as it stands.
    """
    found = {match[2] for match in _SPOT.finditer(text) if match[2]}
    if unknown := sorted(found - known):
        hint = did_you_mean(unknown[0], sorted(known))
        raise ConfigError(
            f"{place}: unknown placeholder {{{unknown[0]}}}{hint}; known here are {', '.join(sorted(known))}; "
            f"{{{{{unknown[0]}}}}} writes the braces themselves, `variables` adds placeholders"
        )
    return found
