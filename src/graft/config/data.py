"""Settings of the way of the data: where rows come from, what is held out. Knows no torch and no file's content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from graft.config.base import Settings

Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "question-answer", "text"]


class Source(Settings):
    """One file of data and how much of it an epoch holds."""

    path: str
    """A jsonl, json, csv or parquet file."""
    format: Format = "auto"
    """Layout of its rows; `auto` detects it and says why."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each of its conversations appears in an epoch: 2 is twice, 0.5 is another half every epoch."""


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
