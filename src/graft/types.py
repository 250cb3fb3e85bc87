"""The nouns, in the order in which data meets them: Conversation, Example, Row.

raw row --formats--> Conversation --encode--> Example --tree--> Row --model, loss--> number

All are frozen: a stage makes new ones and never changes those of an earlier stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from, so that every message about it can name the place."""

    file: str
    line: int
    """1-based: the line of a jsonl or csv file, the element of a json list, the row of a parquet file."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn, as the chat template will see it."""

    role: Role
    content: str
    reasoning: str | None = None
    """What the assistant thought before `content` (the template's `reasoning_content`)."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """OpenAI form: {"type": "function", "function": {"name": ..., "arguments": {...}}}; arguments are parsed."""
    name: str | None = None
    tool_call_id: str | None = None
    weight: float | None = None
    """Loss weight of an assistant turn; None leaves it to `train_on`, 0 switches the turn off."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """The one canonical record between import and tokens: either messages, or raw text."""

    id: str
    origin: Origin
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    """Raw text, every token a target; `messages` is then empty."""
    source: str = ""
    """The `data` entry it came from (a file's path as the user wrote it)."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Columns that no format claimed (a label, a topic), kept for reports and evaluation."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that will not be trained on: the place, the field and the reason."""

    file: str
    line: int
    field: str
    reason: str


@dataclass(frozen=True, slots=True)
class Example:
    """One assistant turn exactly as it will be generated (or one piece of raw text), as token ids."""

    conversation: str
    """Id of the conversation that it belongs to."""
    turn: int
    """Index of the supervised message in its conversation; 0 for raw text."""
    ids: IntArray
    """[L] token ids: prompt, then response."""
    weights: FloatArray
    """[L] loss weight of each token as a target; 0 for context. weights[0] is always 0: nothing predicts it."""
    prompt_len: int
    """Number of leading ids that generation would be given as its prompt; 0 for raw text."""
    way: str = "template"
    """How the response was made: "template" (the chat template's own text), "composed" (from the message itself,
    where the template drops or rewrites what generation would produce), or "text" (raw text)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A packed forest of N nodes in depth-first order: what one forward pass computes.

    Attention: query i sees key j iff j <= i < end[j].
    """

    ids: IntArray
    """[N] token id of each node."""
    depth: IntArray
    """[N] position id: the token's index in its own example."""
    parent: IntArray
    """[N] index of the previous token of the path, -1 at a root. Node i is predicted from hidden[parent[i]]."""
    end: IntArray
    """[N] exclusive end of the node's subtree."""
    weight: FloatArray
    """[N] sum, over the examples that pass through the node, of its loss weight as a target."""
    multiplicity: IntArray
    """[N] number of examples that pass through the node."""
    conversations: tuple[str, ...] = ()
    """Ids of the conversations whose examples are in the row, in order of first appearance."""

    def __len__(self) -> int:
        return len(self.ids)
