"""Settings of the way of the data: where rows come from, what is held out. Knows no torch and no file's content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from graft.config.base import Settings, did_you_mean

Format = Literal["auto", "preference", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer", "text"]

COLUMNS = (
    *("messages", "conversations", "instruction", "input", "output", "question", "answer", "prompt", "completion"),
    *("text", "history", "system", "tools", "chosen", "rejected", "label", "id"),
)
"""Names of columns that graft knows, and that `columns` can give to others."""


class Source(Settings):
    """One file, folder or data set and how much of it an epoch holds."""

    path: str = Field(min_length=1)
    """A jsonl, json, csv, tsv, xlsx, parquet, arrow, txt or md file, text also as .gz or .zst; `FILE.xlsx#SHEET`; a
    folder of files, `FOLDER#SPLIT`; or `hf:OWNER/NAME:CONFIG@REVISION#SPLIT`."""
    format: Format = "auto"
    """Layout of its rows; `auto` detects it and says why."""
    columns: Mapping[str, str] = Field(default_factory=dict)
    """What its columns are called where their names say nothing to graft, ours to theirs: {question: Frage}."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each of its conversations appears in an epoch: 2 is twice, 0.5 is another half every epoch."""
    _by_options: bool = PrivateAttr(default=False)

    def by_options(self) -> Self:
        """The same, named in a command that has the options --format and --columns: messages then speak of those."""
        self._by_options = True
        return self

    def how_to_name(self, columns: Mapping[str, str]) -> str:
        """How the user says what the columns are called, ours to theirs, where they named this source."""
        pairs = ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())
        if self._by_options:
            return f"--columns {pairs}"
        inner = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        return (
            f"`data: [{{path: {self.path}, columns: {{{inner}}}}}]` in a recipe, or write it anew first: graft data "
            f"import {self.path} --columns {pairs} --out FILE"
        )

    def how_to_ask_for(self, form: str) -> str:
        """How the user says which format the rows have."""
        return (
            f"--format {form}" if self._by_options else f"`data: [{{path: {self.path}, format: {form}}}]` in a recipe"
        )

    @field_validator("columns")
    @classmethod
    def _known_names(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name in value:
            if name not in COLUMNS:
                raise ValueError(f"`{name}` is no column of graft's{did_you_mean(name, COLUMNS)}; {', '.join(COLUMNS)}")
        if len(set(value.values())) < len(value):
            raise ValueError("two of graft's columns are to be read from one; name different ones")
        return value


def _as_sources(value: Any) -> Any:
    """Accept `a.jsonl`, `[a.jsonl, {path: b.csv, weight: 2}]` and a single mapping alike."""
    if isinstance(value, str | Mapping):
        value = [value]
    if isinstance(value, Sequence):
        return tuple({"path": item} if isinstance(item, str) else item for item in value)
    return value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class Split(Settings):
    """Shares of the data that are held out, by a hash of the normalised first prompt."""

    val: float = Field(default=0.05, ge=0, lt=1)
    """Share for validation; used where no `val` file is given."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Share for test; used where no `test` file is given."""

    @model_validator(mode="after")
    def _leave_something_to_train(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val} + test {self.test} leave nothing to train on; make their sum less than 1")
        return self
