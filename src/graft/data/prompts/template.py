"""A prompt template: how one labelled row becomes a question and its answer.

Speaks of variables, choices and text. Knows no columns, no files and no conversation.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from graft.data.prompts.draw import Draw
from graft.data.prompts.filters import NothingToAsk
from graft.data.prompts.sandbox import Compiled

Form = Literal["word", "letter", "number", "json", "text"]
"""What the answer is: a choice as it is written, its letter or number in the list, a JSON object, or free text."""
FORMS = get_args(Form)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A question with its answer."""

    prompt: str
    target: str | None
    """The answer, exactly as it is to be given; None where only the question was wanted."""
    choices: tuple[str, ...] = ()
    """The possible answers in the order in which the prompt lists them; empty where the answer is free."""
    label: str | None = None
    """The right one of the choices."""


class Template(Protocol):
    """What both kinds of templates can do: ours and promptsource's."""

    @property
    def name(self) -> str:
        """Unique among all templates that are loaded."""

    @property
    def task(self) -> str: ...

    @property
    def lang(self) -> str: ...

    @property
    def form(self) -> Form: ...

    @property
    def variables(self) -> frozenset[str]:
        """Names that a row must bring, unless the template does without them."""

    def why_not(self, choices: Sequence[str]) -> str | None:
        """Why it cannot be used with these choices at all; None where it can."""

    def render(self, row: Mapping[str, Any], choices: Sequence[str], draw: Draw, answered: bool = True) -> Rendered:
        """Ask about a row. Raises NothingToAsk where this template has none, TemplateFailure where it breaks."""


def keys_of(form: str, count: int) -> list[str]:
    """How the choices of a list are called: A, B, ... in the letter form, else 1, 2, ..."""
    if form == "letter":
        return list(string.ascii_uppercase[:count])
    return [str(number) for number in range(1, count + 1)]


_FROM_CHOICES = frozenset({"choices", "keys", "options", "key"})


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """One of ours, or of the user's own in the same YAML form: two pieces of Jinja.

    Beside the row's roles they are given `choices` (names in the order to be shown), `keys` (A, B, ... in the letter
    form, else 1, 2, ...), `options` (one line per choice: key, full stop, name), and, for the target alone, `label`
    (the right name) and `key` (the right letter or number).
    """

    name: str
    task: str
    lang: str
    form: Form
    prompt: Compiled
    target: Compiled
    hidden: str | None = None
    """Why the prompt does not list the choices; None where it does, or has none."""

    @property
    def variables(self) -> frozenset[str]:
        return (self.prompt.variables | self.target.variables) - _FROM_CHOICES

    @property
    def chooses(self) -> bool:
        """Whether its answer is one of a few labels."""
        return not _FROM_CHOICES.isdisjoint(self.prompt.variables | self.target.variables)

    def why_not(self, choices: Sequence[str]) -> str | None:
        """Letters end at Z, and wide lists are shown as numbers or not at all."""
        if self.form == "letter" and len(choices) > len(string.ascii_uppercase):
            return f"{len(choices)} choices are more than the 26 letters"
        return None

    def render(self, row: Mapping[str, Any], choices: Sequence[str], draw: Draw, answered: bool = True) -> Rendered:
        """Ask about a row; `row["label"]` is one of `choices` where there are any.

        Raises:
            NothingToAsk: the prompt or target comes out empty.
            TemplateFailure: a variable is missing.
        """
        keys = keys_of(self.form, len(choices))
        shown = {key: value for key, value in row.items() if key != "label" or not choices}
        if choices:
            options = "\n".join(f"{key}. {choice}" for key, choice in zip(keys, choices, strict=True))
            shown |= {"choices": list(choices), "keys": keys, "options": options}
        prompt = self.prompt.render(shown, draw).strip()
        if not prompt:
            raise NothingToAsk("the prompt comes out empty")
        if not answered:
            return Rendered(prompt, None, tuple(choices))
        label = row.get("label") if choices else None
        if label is not None:
            shown |= {"label": label, "key": keys[list(choices).index(label)]}
        target = self.target.render(shown, draw).strip()
        if not target:
            raise NothingToAsk("the answer comes out empty")
        return Rendered(prompt, target, tuple(choices), label)
