"""What a set of conversations comes to in tokens: lengths, targets, what a length limit drops, what trees share.

Speaks conversations, examples and counts. Knows no files and no page.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graft.config.train import Encode
from graft.data.describing.histogram import Spread, spread
from graft.data.tally import Tally
from graft.tokens.encode import encode_each
from graft.tokens.plan import Plan
from graft.tokens.renderer import Renderer
from graft.tokens.tree import SHORTEST_RUN, Sharing, build_rows
from graft.types import Conversation, Example, FloatArray, IntArray, Reject

LIMITS = (512, 1024, 2048, 4096, 8192)
UNLIMITED = 1 << 30
MOST_COMPARED = 20_000_000
"""Tokens that are held and sorted at once, to find what the whole set shares: 80 MB."""

Heard = Callable[[int, int, int], None]
"""Told of each conversation: its index, its tokens without repeats of earlier turns, and its characters."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What `encode.max_length` at one value drops with `overlong: drop`. Raw text is cut into pieces instead."""

    max_length: int
    conversations: int
    """Conversations that lose an example."""
    whole: int
    """Conversations that lose all of theirs."""
    examples: int
    targets: int
    """Supervised tokens dropped."""


@dataclass(frozen=True, slots=True)
class SetSharing:
    """What trees share: inside a conversation, inside the steps of one epoch, in the set as one tree."""

    max_length: int
    batch_size: int
    steps: int
    conversations: int
    """Conversations that have an example within `max_length`."""
    alone: Sharing
    """Each conversation by itself: its later turns repeat its earlier ones."""
    step: Sharing
    """As training computes it: the rows of every step of the first epoch."""
    whole: Sharing
    """All of them, or the first `whole_conversations` of the epoch, merged into one forest; no run computes that."""
    whole_conversations: int


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """A set under one tokenizer and chat template."""

    conversations: int
    rejected: int
    reasons: tuple[tuple[int, Reject], ...]
    """Why conversations have no example at any length: count and first one, commonest first."""
    notes: dict[str, int]
    """What else the encoder had to say."""
    examples: int
    tokens: int
    """Of all examples; those of a conversation repeat its earlier turns."""
    nodes: int
    """Of each conversation's tree: what its examples repeat is counted once."""
    targets: int
    """Tokens with a weight above 0."""
    prompt: Spread
    """Tokens of each prompt (raw text has none)."""
    response: Spread
    """Tokens of each response, the stop included."""
    whole: Spread
    """Tokens of each example."""
    limits: tuple[Limit, ...]
    sharing: SetSharing


def token_statistics(
    conversations: Sequence[Conversation],
    renderer: Renderer,
    settings: Encode,
    batch_size: int,
    row_tokens: int,
    seed: int,
    heard: Heard | None = None,
    workers: int = 1,
) -> TokenStatistics:
    """Encode every conversation, whatever its length, and count.

    `settings.max_length` and `overlong` decide what the steps hold; the lengths and the limits are told without them.
    """
    lengths = _Lengths()
    notes: Counter[str] = Counter()
    tally = Tally()
    kept: list[list[Example]] = []
    overlong: list[tuple[int, Conversation]] = []
    nodes = 0
    free = settings.model_copy(update={"max_length": UNLIMITED})
    for index, result in enumerate(encode_each(conversations, renderer, free, notes, workers)):
        if isinstance(result, Reject):
            tally.reject(result)
            continue
        lengths.add(result)
        compact = _compact(result)
        nodes += (size := nodes_of(compact))
        if heard is not None:
            heard(index, size, _characters(conversations[index]))
        if max(len(example.ids) for example in result) > settings.max_length:
            overlong.append((len(kept), conversations[index]))
        kept.append(compact)
    # An example that fits is the same at every limit, so only those with a longer one are encoded again.
    again = encode_each([conversation for _, conversation in overlong], renderer, settings, Counter(), workers)
    for (place, _), result in zip(overlong, again, strict=True):
        kept[place] = [] if isinstance(result, Reject) else _compact(result)
    return TokenStatistics(
        conversations=len(conversations),
        rejected=tally.rejected,
        reasons=tuple(tally.commonest(10)),
        notes={said: count for said, count in notes.items() if count},
        examples=len(lengths.whole),
        tokens=sum(lengths.whole),
        nodes=nodes,
        targets=sum(lengths.targets),
        prompt=spread(lengths.prompt),
        response=spread(lengths.response),
        whole=spread(lengths.whole),
        limits=tuple(lengths.limit(limit) for limit in LIMITS),
        sharing=_sharing([item for item in kept if item], settings.max_length, batch_size, row_tokens, seed),
    )


class _Lengths:
    """The lengths of all examples, one number each."""

    def __init__(self) -> None:
        self.prompt, self.response, self.whole, self.targets = (array("q") for _ in range(4))
        self.owner, self.is_text = array("q"), array("b")
        self._conversations = 0

    def add(self, examples: Sequence[Example]) -> None:
        for example in examples:
            self.whole.append(len(example.ids))
            self.targets.append(int(np.count_nonzero(example.weights)))
            self.owner.append(self._conversations)
            self.is_text.append(example.way == "text")
            if example.way != "text":
                self.prompt.append(example.prompt_len)
            self.response.append(len(example.ids) - example.prompt_len)
        self._conversations += 1

    def limit(self, max_length: int) -> Limit:
        whole, targets, owner, is_text = (
            np.asarray(values) for values in (self.whole, self.targets, self.owner, self.is_text)
        )
        dropped = (whole > max_length) & (is_text == 0)
        losing = np.unique(owner[dropped])
        left = np.unique(owner[~dropped])
        return Limit(
            max_length=max_length,
            conversations=len(losing),
            whole=len(np.setdiff1d(losing, left, assume_unique=True)),
            examples=int(dropped.sum()),
            targets=int(targets[dropped].sum()),
        )


def _compact(examples: Sequence[Example]) -> list[Example]:
    """The same ids in less memory: an example that begins another one is a view of it, and all weights are 0.

    Sharing does not look at weights, and a conversation of 20 turns would else be held 20 times.
    """
    longest_first = sorted(range(len(examples)), key=lambda index: -len(examples[index].ids))
    held: list[IntArray] = []
    made: dict[int, Example] = {}
    for index in longest_first:
        ids = examples[index].ids
        whole = next((other for other in held if np.array_equal(other[: len(ids)], ids)), None)
        if whole is None:
            held.append(whole := ids.copy())
        made[index] = replace(examples[index], ids=whole[: len(ids)], weights=_no_weights(len(ids)))
    return [made[index] for index in range(len(examples))]


_zeros: FloatArray = np.zeros(1 << 12, np.float32)


def _no_weights(length: int) -> FloatArray:
    """A view of one array of zeros that all examples share."""
    global _zeros  # noqa: PLW0603 - grows to the longest example that was met
    if length > len(_zeros):
        _zeros = np.zeros(2 * length, np.float32)
    return _zeros[:length]


def _characters(conversation: Conversation) -> int:
    """Characters of all that a chat template may write of a conversation, tools as JSON among them."""
    if conversation.text is not None:
        return len(conversation.text)
    said = sum(len(message.content) + len(message.reasoning or "") for message in conversation.messages)
    calls = [call for message in conversation.messages for call in message.tool_calls]
    return said + sum(len(json.dumps(item, ensure_ascii=False)) for item in (*conversation.tools, *calls))


def _sharing(
    kept: Sequence[Sequence[Example]], max_length: int, batch_size: int, row_tokens: int, seed: int
) -> SetSharing:
    """Sharing of one epoch, with the plan and the rows that training makes."""
    tokens = sum(len(example.ids) for examples in kept for example in examples)
    alone = sum(nodes_of(examples) for examples in kept)
    plan = Plan((1.0,) * len(kept), batch_size, 1.0, seed)
    order = plan.epoch_order(0)
    steps = plan.total_steps if kept else 0
    nodes = 0
    for step in np.array_split(order, steps) if kept else ():  # all of `plan.step`, with one shuffle
        rows = build_rows([example for index in step for example in kept[index]], row_tokens, shortest_run=SHORTEST_RUN)
        nodes += sum(len(row) for row in rows)
    compared: list[Example] = []
    held = whole_conversations = 0
    for index in order:
        held += sum(len(example.ids) for example in kept[index])
        if held > MOST_COMPARED and compared:
            break
        compared += kept[index]
        whole_conversations += 1
    whole = Sharing(sum(len(example.ids) for example in compared), nodes_of(compared))
    return SetSharing(
        max_length,
        batch_size,
        steps,
        len(kept),
        Sharing(tokens, alone),
        Sharing(tokens, nodes),
        whole,
        whole_conversations,
    )


def nodes_of(examples: Iterable[Example]) -> int:
    """Nodes of the one forest that examples merge into: the tokens beyond each one's common prefix with the one before.

    The same as the nodes of `build_rows` with a row without end, and faster: nothing is built.
    """
    paths = sorted(example.ids.astype(">i4").tobytes() for example in examples)
    nodes = 0
    before = np.empty(0, np.int32)
    for path in paths:
        ids = np.frombuffer(path, np.int32)
        most = min(len(ids), len(before))
        differs = np.flatnonzero(ids[:most] != before[:most])
        nodes += len(ids) - (int(differs[0]) if len(differs) else most)
        before = ids
    return nodes
