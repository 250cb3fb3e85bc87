"""Settings of `graft data clean`: an ordered list of steps, each with its own typed settings. Knows no data.

A recipe lists steps by name, with settings where they differ from the defaults:

    steps:
      - html
      - language: {keep: [en, zh]}
      - near: {threshold: 0.9}

On the command line `language.keep=en,zh` sets one setting of one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from graft.config.base import Settings, did_you_mean


def _as_words(value: Any) -> Any:
    """`en,zh` is [en, zh]; `no` is Norwegian and not a switch, though YAML reads it so."""
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, bool):
        value = [value]
    if isinstance(value, Sequence):
        return tuple("no" if item is False else item.strip() if isinstance(item, str) else item for item in value)
    return value


Words = Annotated[tuple[str, ...], BeforeValidator(_as_words)]
Where = Literal["user", "assistant", "system", "tool", "text"]


class Damage(Settings):
    """Encoding damage: repaired where that is certain, dropped where the text is lost."""

    step: Literal["damage"] = "damage"
    lost: float = Field(default=0.005, ge=0, le=1)
    """Drop when a larger share of a turn's characters was lost for good (U+FFFD, 锟斤拷). 1 keeps all."""


class Html(Settings):
    """Rendered HTML, as browser extensions save chats, to markdown."""

    step: Literal["html"] = "html"
    when: Literal["export", "tags"] = "export"
    """`export`: only messages that are a chat page's rendering; `tags`: every message that is HTML from its first
    character to its last, such as a set of pages. HTML that is code in an answer is touched by neither."""


class Debris(Settings):
    """Words of a chat page's buttons and counters ("Copy code", "1 / 1", "Regenerate response")."""

    step: Literal["debris"] = "debris"


class Repair(Settings):
    """Turns that are out of order, put in order."""

    step: Literal["repair"] = "repair"
    same_role: Literal["merge", "keep"] = "merge"
    """Consecutive turns of one role are joined with a blank line."""
    first_answer: Literal["drop", "keep"] = "drop"
    """Assistant turns before the first user turn: a greeting that nobody asked for."""
    trailing_user: Literal["drop", "keep"] = "drop"
    """User turns after the last answer."""


class Rule(Settings):
    """One regular expression of the user's own."""

    name: str = Field(min_length=1, max_length=60)
    """What reports and rejects call it."""
    pattern: str = Field(min_length=1)
    """In the syntax of Python's `regex` package, a superset of `re`. It may match anywhere; ^ and $ are line ends."""
    action: Literal["drop", "keep", "replace"]
    """`drop` the conversations where it matches, `keep` only those, or `replace` every match."""
    by: str | None = None
    """What replaces a match (\\1, \\g<name> refer to groups); "" removes it."""
    where: Annotated[tuple[Where, ...], BeforeValidator(_as_words)] = Field(
        default=("user", "assistant", "text"), min_length=1
    )
    """Turns that are looked at; `text` is raw text."""
    ignore_case: bool = False
    """Whether a and A are the same."""

    @model_validator(mode="after")
    def _replace_by_something(self) -> Self:
        if (self.action == "replace") != (self.by is not None):
            raise ValueError(f'rule {self.name}: `by` goes with action replace, and only with it (by: "" removes)')
        return self


class Rules(Settings):
    """The user's own regular expressions, in order."""

    step: Literal["rules"] = "rules"
    rules: tuple[Rule, ...] = ()
    """Each with name, pattern, action and, for replace, `by`."""
    seconds: float = Field(default=2.0, gt=0, le=600)
    """A pattern that needs longer than this for one text stops the command: it would need hours for all."""

    @model_validator(mode="after")
    def _have_names_of_their_own(self) -> Self:
        names = [rule.name for rule in self.rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two rules are called {name}; give each a name of its own")
        return self


class Language(Settings):
    """Conversations by the language that most of their text is in."""

    step: Literal["language"] = "language"
    keep: Words = ()
    """ISO 639-1 codes to keep, such as en, zh; empty keeps all."""
    skip: Words = ()
    """Codes to drop."""
    sure: float = Field(default=0.5, ge=0, le=1)
    """A language that is less sure than this is not known, as that of a number or a line of code."""
    unknown: Literal["keep", "drop"] = "keep"
    """What happens to a conversation whose language is not known."""

    @model_validator(mode="after")
    def _not_both(self) -> Self:
        both = sorted(set(self.keep) & set(self.skip))
        if both:
            raise ValueError(f"{', '.join(both)} in both keep and skip; leave it in one")
        return self


class Empty(Settings):
    """Turns without a word: the answer to be learnt, or the question it belongs to."""

    step: Literal["empty"] = "empty"
    drop: Literal["pair", "rest", "conversation"] = "pair"
    """What goes with an empty turn: its question and answer, also all that follows, or the conversation."""


class Length(Settings):
    """Too short and too long, in characters."""

    step: Literal["length"] = "length"
    min_answer_chars: int = Field(default=1, ge=0)
    """Fewest characters that all answers (or the raw text) have together."""
    min_chars: int = Field(default=2, ge=0)
    """Fewest characters of the whole conversation."""
    max_chars: int = Field(default=200_000, ge=1)
    """Most characters of the whole conversation."""
    max_turn_chars: int | None = Field(default=None, ge=1)
    """Most characters of one turn."""

    @model_validator(mode="after")
    def _leave_a_range(self) -> Self:
        if self.min_chars > self.max_chars:
            raise ValueError(
                f"min_chars {self.min_chars} is more than max_chars {self.max_chars}: nothing would be kept"
            )
        return self


class Refusal(Settings):
    """Answers that refuse, or that begin with what an AI cannot do."""

    step: Literal["refusal"] = "refusal"
    what: Annotated[tuple[Literal["refusal", "disclaimer"], ...], BeforeValidator(_as_words)] = (
        "refusal",
        "disclaimer",
    )
    """`refusal`: I'm sorry, but I can't help with that. `disclaimer`: As an AI, I don't have feelings."""
    drop: Literal["pair", "rest", "conversation"] = "rest"
    """`pair`: the answer and its question; `rest`: also all that follows, which may build on it; or all of it."""


class Repetition(Settings):
    """Answers that loop: the same n words again and again."""

    step: Literal["repetition"] = "repetition"
    n: int = Field(default=4, ge=1, le=20)
    """Words (characters in Chinese, Japanese, Thai and their like) of an n-gram."""
    share: float = Field(default=0.6, gt=0, le=1)
    """Drop when a larger share of a turn's n-grams is repeated ones. Code blocks and tables are not looked at."""
    min_units: int = Field(default=40, ge=2)
    """Turns of fewer words (or characters) are left in peace."""


class Personal(Settings):
    """Personal data: addresses, telephone, card and identity numbers."""

    step: Literal["personal"] = "personal"
    action: Literal["report", "mask", "drop"] = "report"
    """`report` counts, `mask` writes [EMAIL_1] and the like, `drop` drops the conversation."""
    kinds: Annotated[tuple[Literal["email", "phone", "card", "iban", "id", "ip"], ...], BeforeValidator(_as_words)] = (
        Field(default=("email", "phone", "card", "iban", "id", "ip"), min_length=1)
    )
    """What is looked for. Numbers count only where their check digits are right."""
    regions: Words = ()
    """Countries (CN, US, DE ...) whose telephone numbers are known without +, too."""


class Exact(Settings):
    """Conversations that are equal but for case, blanks and punctuation; the first one stays."""

    step: Literal["exact"] = "exact"


class Near(Settings):
    """Conversations that are nearly equal (MinHash); the first of a group stays."""

    step: Literal["near"] = "near"
    threshold: float = Field(default=0.8, gt=0, lt=1)
    """Least Jaccard similarity of their shingles."""


class Cut(Settings):
    """Long conversations in several, at turn boundaries."""

    step: Literal["cut"] = "cut"
    max_tokens: int = Field(default=2048, ge=16)
    """Most tokens of a part as the chat template writes it, system turn and tools included."""
    model: str | None = None
    """Model or tokenizer folder that counts the tokens."""
    template: str | None = None
    """One of graft's chat templates or a Jinja file; none takes the model's own."""
    too_long: Literal["drop", "keep"] = "drop"
    """What happens to one question and answer that is longer than max_tokens alone; an answer is never cut."""


Step = (
    Annotated[Damage, Tag("damage")]
    | Annotated[Html, Tag("html")]
    | Annotated[Debris, Tag("debris")]
    | Annotated[Repair, Tag("repair")]
    | Annotated[Rules, Tag("rules")]
    | Annotated[Empty, Tag("empty")]
    | Annotated[Length, Tag("length")]
    | Annotated[Language, Tag("language")]
    | Annotated[Refusal, Tag("refusal")]
    | Annotated[Repetition, Tag("repetition")]
    | Annotated[Personal, Tag("personal")]
    | Annotated[Exact, Tag("exact")]
    | Annotated[Near, Tag("near")]
    | Annotated[Cut, Tag("cut")]
)
STEPS: dict[str, type[Settings]] = {get_args(item)[1].tag: get_args(item)[0] for item in get_args(Step)}
"""Every step by its name, in the order in which they run best."""

DEFAULT_STEPS = ("damage", "html", "debris", "repair", "empty", "length", "refusal", "repetition", "personal", "exact")
"""What runs without a recipe. The others wait for a word: a language, a rule, a model, or the time of `near`."""


def _as_step(value: Any) -> Any:
    """`html` and `{html: {when: tags}}` as {step: html, when: tags}.

    Raises:
        ValueError: there is no such step, or it has no such setting.
    """
    if isinstance(value, str):
        value = {value: None}
    if not isinstance(value, Mapping):
        return value
    if "step" in value:
        name, given = value["step"], {key: item for key, item in value.items() if key != "step"}
    elif len(value) == 1:
        name, given = next(iter(value.items()))
        given = {} if given is None else given
    else:
        raise ValueError("one step is expected, such as `- html` or `- language: {keep: [en]}`")
    model = _step_model(str(name))
    if not isinstance(given, Mapping):
        raise ValueError(f"step {name}: settings are written as a mapping, such as {name}: {{key: value}}")
    known = [field for field in model.model_fields if field != "step"]
    for key in given:
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; it has {', '.join(known) or 'none'}"
            raise ValueError(f"step {name} has no setting `{key}`{hint}")
    return {"step": name, **given}


def _step_model(name: str) -> type[Settings]:
    if name not in STEPS:
        hint = did_you_mean(name, list(STEPS)) or f"; steps are {', '.join(STEPS)}"
        raise ValueError(f"there is no step `{name}`{hint}")
    return STEPS[name]


def _name_of(value: Any) -> Any:
    return value.get("step") if isinstance(value, Mapping) else getattr(value, "step", None)


def _with_settings(steps: Sequence[Any], given: Mapping[str, Any]) -> list[Any]:
    """The steps with settings given by name laid over their own; a broken step stays, for its own error."""
    laid = list(steps)
    for name, settings in given.items():
        if not isinstance(settings, Mapping):
            raise ValueError(f"{name}: settings of a step are written {name}.key=value")
        found = False
        for index, item in enumerate(steps):
            step: Any = None
            with suppress(ValueError):
                step = _as_step(item)
            if isinstance(step, Mapping) and _name_of(step) == name:
                found = True
                laid[index] = _as_step({**step, **settings})
        if not found:
            raise ValueError(f"{name}: the recipe has no such step; add `- {name}` to its steps")
    return laid


OneStep = Annotated[Step, Discriminator(_name_of), BeforeValidator(_as_step)]


class Clean(Settings):
    """An ordered list of cleaning steps."""

    steps: tuple[OneStep, ...] = ()
    """Names, or names with settings, in the order in which they run; none is the default pipeline."""
    examples: int = Field(default=3, ge=0, le=100)
    """Examples of each kind that the report shows per step."""

    @model_validator(mode="before")
    @classmethod
    def _lay_settings_over_steps(cls, values: Any) -> Any:
        """`steps` absent is the default; a step's name as a key (from `language.keep=en`) sets that step's settings.

        In the default pipeline that also switches the step on; a recipe says itself which steps it has.
        """
        if not isinstance(values, Mapping):
            return values
        own = {key: item for key, item in values.items() if key not in STEPS}
        given = {key: item for key, item in values.items() if key in STEPS}
        if "steps" not in own:
            own["steps"] = [{"step": name} for name in STEPS if name in DEFAULT_STEPS or name in given]
        steps = own["steps"]
        if not isinstance(steps, list | tuple) or not steps:
            raise ValueError("steps: a list is expected, one `- name` per line; without `steps` the default ones run")
        return {**own, "steps": _with_settings(steps, given)}

    def only(self, names: Sequence[str]) -> Clean:
        """The same with these steps alone, in the pipeline's order; a step that it lacks comes last, with defaults.

        Raises:
            ValueError: there is no such step.
        """
        extra = [cast(Step, _step_model(name)()) for name in names if all(step.step != name for step in self.steps)]
        return self.model_copy(update={"steps": (*(step for step in self.steps if step.step in names), *extra)})

    def skip(self, names: Sequence[str]) -> Clean:
        """The same without these steps.

        Raises:
            ValueError: there is no such step.
        """
        for name in names:
            _step_model(name)
        return self.model_copy(update={"steps": tuple(step for step in self.steps if step.step not in names)})
