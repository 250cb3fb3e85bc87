"""Settings of `graft data prompts`. Knows no template and no file's content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from graft.config.base import Settings


def _as_words(value: Any) -> Any:
    """Accept `a,b` and `[a, b]` alike."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


def _as_pairs(value: Any) -> Any:
    """Accept `text=title+body,label=class` and {text: title+body} alike."""
    if isinstance(value, Mapping):
        return value
    pairs: dict[str, str] = {}
    for word in [value] if isinstance(value, str) else value:
        for piece in str(word).split(","):
            name, sign, said = (part.strip() for part in piece.partition("="))
            if not (name and sign and said):
                raise ValueError(f"{piece.strip()!r} is not written NAME=COLUMN, for example text=review,label=label")
            if name in pairs:
                raise ValueError(f"`{name}` is given twice; join columns with +, for example text=title+body")
            pairs[name] = said
    return pairs


def _as_texts(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else value


Words = Annotated[tuple[str, ...], BeforeValidator(_as_words)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]


class Prompts(Settings):
    """All settings of `graft data prompts`."""

    data: Texts = Field(min_length=1)
    """Labelled sets: files, folders or hub addresses."""
    task: str | None = None
    """What the set is for; `--list` shows the tasks of the library. May be left out with template files."""
    lang: str = "en"
    """Language of the library's templates."""
    templates: Texts = ()
    """Template files of your own or of promptsource, instead of the library."""
    template: str = "random"
    """`random` (one per row, by the seed), `all` (each of them), or names with commas between (random among them)."""
    per_row: int = Field(default=1, ge=1)
    """Different templates for each row."""
    columns: Annotated[Mapping[str, str], BeforeValidator(_as_pairs)] = Field(default_factory=dict)
    """Which column is what, where its name does not say: text=review,label=class; text=title+body joins two."""
    header: Words = ()
    """Names of the columns of a csv, tsv or txt file that has no header line."""
    labels: Words = ()
    """Names of the labels: by value (0=negative,1=positive) or in their order (negative,positive)."""
    labels_from: str | None = None
    """A file with the names: a JSON or YAML list or mapping, or text with one name per line."""
    languages: str | None = Field(default=None, pattern=r"^[A-Za-z_]+-[A-Za-z_]+$")
    """Of a translation set whose columns do not say it: de-en."""
    choice_order: Literal["shuffled", "fixed"] = "shuffled"
    """Order in which a prompt lists the labels: another one for each row, by the seed, or always the same."""
    shots: int = Field(default=0, ge=0)
    """Solved examples before each question."""
    shots_from: Texts = ()
    """Where the examples come from; empty takes the training rows of the data itself."""
    shots_as: Literal["turns", "text"] = "turns"
    """Examples as earlier turns of the conversation, or as one text with the question."""
    shot_chars: int = Field(default=6000, ge=0)
    """Most characters that the examples of a row may have together; those that do not fit are left out."""
    answers: bool = True
    """False writes the questions alone, for a set without answers."""
    val: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows for validation, taken before any prompt is made."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Share of the rows for testing."""
    seed: int = 0
    """What templates, orders and examples are drawn by."""
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    """Refuse when a larger share of the rows is rejected."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val} + test {self.test} leave nothing to train on; make their sum less than 1")
        if self.labels and self.labels_from:
            raise ValueError("labels and labels_from both name the labels; give one of them")
        if self.shots_from and not self.shots:
            raise ValueError("shots_from says where examples come from, and shots is 0: give both or neither")
        if self.shots and not self.answers and not self.shots_from:
            raise ValueError("without answers there are no solved examples: leave shots out, or give shots_from")
        return self
