"""Conversations become examples: token ids and the loss weight of each token as a target.

Speaks conversations, text and ids. Knows no trees, no batches and no tensors.

One example is one assistant turn exactly as it will be generated: the prompt's ids are those that generation is given,
the rest is what the model must then say, through its stop token. Everything that is left out is counted or rejected.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graft import console
from graft.config.train import Encode
from graft.tokens import probe, response, spelling
from graft.tokens.renderer import Renderer, TemplateRefused
from graft.tokens.response import Turn
from graft.tokens.row_weight import weighed
from graft.tokens.spelling import Unfit
from graft.tokens.spread import map_chunks
from graft.tokens.tokenise import Spelled
from graft.types import Conversation, Example, Message, Reject

_HALF_PAIR = re.compile("[\ud800-\udfff]")

TOO_LONG = "turns left out: longer than encode.max_length"
OLDEST_DROPPED = "oldest turns dropped to fit encode.max_length"
REFUSED = "turns left out: the template cannot write them"
SYSTEM_DROPPED = "conversations whose system turn the template does not write"
TOOLS_DROPPED = "conversations whose tools the template does not write"
CONTROL_TEXT = "conversations with control-token text in their content: the tokenizer reads it as the token"
NO_EOS = "raw texts without an end: the tokenizer has no EOS token"
THINKING = "turns rendered with the template's thinking switch on"
NOT_THINKING = "turns rendered with the template's thinking switch off"
COMPOSED = "answers composed from the message: the template rewrites what generation would produce"


@dataclass(frozen=True, slots=True)
class Encoded:
    """All examples of some conversations. Conversations with an example + rejects = conversations given."""

    examples: tuple[Example, ...]
    """In the order of the conversations, and of the turns in each."""
    rejects: tuple[Reject, ...]
    notes: dict[str, int]
    """What happened on the way that is no reject, and how often."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What all steps of one chunk's encoding share."""

    renderer: Renderer
    settings: Encode
    notes: Counter[str]
    """Counted up on the way."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One example on its way: its text is known, its ids are not yet."""

    turn: int
    weight: float
    text: Turn
    messages: tuple[Message, ...]
    """The conversation up to the answer, as it was rendered."""


def encode(conversation: Conversation, renderer: Renderer, settings: Encode) -> list[Example] | Reject:
    """The examples of one conversation, at least one, or why there is none."""
    found = encode_all([conversation], renderer, settings)
    return list(found.examples) if found.examples else found.rejects[0]


def encode_all(conversations: Iterable[Conversation], renderer: Renderer, settings: Encode) -> Encoded:
    """The examples of all conversations, with every reject and a count of everything else worth knowing."""
    examples: list[Example] = []
    rejects: list[Reject] = []
    notes: Counter[str] = Counter()
    for result in encode_each(conversations, renderer, settings, notes):
        if isinstance(result, Reject):
            rejects.append(result)
        else:
            examples += result
    return Encoded(tuple(examples), tuple(rejects), {said: count for said, count in notes.items() if count})


def encode_each(
    conversations: Iterable[Conversation], renderer: Renderer, settings: Encode, notes: Counter[str], workers: int = 1
) -> Iterator[list[Example] | Reject]:
    """One result per conversation, in order; `notes` is counted up on the way.

    Conversations are taken as they are needed, and nothing is kept: memory does not grow with their number. More
    `workers` (processes) change nothing but the time.
    """
    watched = console.track(conversations, "encode")
    for results, counted in map_chunks(encode_chunk, watched, renderer, settings, workers):
        notes.update(counted)
        yield from results


def encode_chunk(
    chunk: Sequence[Conversation], renderer: Renderer, settings: Encode
) -> tuple[list[list[Example] | Reject], Counter[str]]:
    """The results of some conversations, and what happened on the way.

    Text of all turns first, then one call of the tokenizer for all of it, then the ids of each example.
    """
    work = _Work(renderer, settings, Counter())
    planned: list[list[_Job] | Reject | None] = []
    texts: list[str] = []
    for conversation in chunk:
        jobs = None if conversation.text is not None else _plan(conversation, work)
        planned.append(jobs)
        for job in jobs if isinstance(jobs, list) else ():
            texts += (job.text.prompt, job.text.prompt + job.text.response)
    spelled = iter(renderer.spelled(texts))
    raw = iter(renderer.raw_ids([c.text for c in chunk if c.text is not None and _text_problem(c.text) is None]))
    results: list[list[Example] | Reject] = []
    for conversation, jobs in zip(chunk, planned, strict=True):
        if jobs is None:
            results.append(_encode_text(conversation, raw, work))
        elif isinstance(jobs, Reject):
            results.append(jobs)
        else:
            pairs = [(next(spelled), next(spelled)) for _ in jobs]
            results.append(_finish(conversation, jobs, pairs, work))
    return [weighed(conversation, result) for conversation, result in zip(chunk, results, strict=True)], work.notes


def _plan(conversation: Conversation, work: _Work) -> list[_Job] | Reject:
    """The text of each example of a conversation."""
    messages = conversation.messages
    problem = _first_problem(messages)
    if problem is not None:
        return _reject(conversation, *problem)
    jobs: list[_Job] = []
    refusals: list[tuple[str, str]] = []
    targets = _targets(messages, work.settings)
    if not targets:
        return _reject(conversation, "messages", "every assistant turn has weight 0")
    talk = response.talk_of(work.renderer, messages, [index for index, _ in targets], conversation.tools)
    for index, weight in targets:
        try:
            turn = response.turn_of(talk, index)
        except TemplateRefused as error:
            refusals.append((f"messages[{index}]", str(error)))
            continue
        jobs.append(_Job(index, weight, turn, messages[: index + 1]))
    if not jobs:
        field, reason = refusals[0]
        return _reject(conversation, field, f"chat template: {reason}")
    if refusals:
        work.notes[REFUSED] += len(refusals)
    return jobs


def _first_problem(messages: Sequence[Message]) -> tuple[str, str] | None:
    """Field and reason where a conversation cannot be encoded by any template."""
    if not any(message.role == "assistant" for message in messages):
        return "messages", "no assistant turn, so nothing to learn"
    for index, message in enumerate(messages):
        if message.weight is not None and not (math.isfinite(message.weight) and message.weight >= 0):
            return f"messages[{index}].weight", f"weight {message.weight} is not a number from 0 up"
        if _HALF_PAIR.search(message.content) or _HALF_PAIR.search(message.reasoning or ""):
            return f"messages[{index}].content", "half of a surrogate pair: not Unicode text; mend the file's encoding"
    return None


def _targets(messages: Sequence[Message], settings: Encode) -> list[tuple[int, float]]:
    """Index and weight of the assistant turns that yield an example. A turn's own weight overrides `train_on`."""
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if settings.train_on == "everything":
        return [(turns[-1], 1.0)]
    found: list[tuple[int, float]] = []
    for index in turns:
        own = messages[index].weight
        weight = own if own is not None else float(settings.train_on == "all_turns" or index == turns[-1])
        if weight > 0:
            found.append((index, weight))
    return found


def _finish(
    conversation: Conversation,
    jobs: Sequence[_Job],
    pairs: Sequence[tuple[Spelled, Spelled]],
    work: _Work,
) -> list[Example] | Reject:
    """Ids and weights of a conversation's examples; those that are too long or fail an invariant are left out."""
    examples: list[Example] = []
    problems: list[tuple[str, str]] = []
    said: Counter[str] = Counter()
    for job, pair in zip(jobs, pairs, strict=True):
        try:
            made = _make(conversation, job, pair, work, said)
        except (Unfit, TemplateRefused) as error:
            problems.append((f"messages[{job.turn}]", str(error)))
            continue
        examples.append(made)
    if not examples:
        return _reject(conversation, *problems[0])
    for _, reason in problems:
        said[TOO_LONG if reason.startswith("too long") else REFUSED] += 1
    _note_what_is_missing(conversation, jobs[-1], work.renderer, said)
    if said:
        work.notes.update(said)
    return examples


def _make(
    conversation: Conversation,
    job: _Job,
    pair: tuple[Spelled, Spelled],
    work: _Work,
    said: Counter[str],
) -> Example:
    """One example with every invariant checked.

    Raises:
        Unfit: it is too long, or an invariant does not hold.
        TemplateRefused: the template cannot write the conversation without its oldest turns.
    """
    renderer, settings = work.renderer, work.settings
    turn, (prompt, full) = job.text, pair
    messages = job.messages
    while True:
        answer, exact = spelling.response_ids(renderer, turn, prompt, full)
        length = len(prompt.ids) + len(answer)
        if length <= settings.max_length:
            break
        shorter = without_oldest_turn(messages) if settings.overlong == "drop_oldest_turns" else None
        if shorter is None:
            raise Unfit(f"too long: {length} tokens > encode.max_length {settings.max_length}")
        messages = shorter
        turn = response.find_turn(renderer, messages, len(messages) - 1, conversation.tools)
        prompt, full = renderer.spelled([turn.prompt, turn.prompt + turn.response])
        said[OLDEST_DROPPED] += 1
    spelling.check(renderer, turn, prompt.ids, answer)
    if not exact:
        said[spelling.inexact_reason(renderer, turn, answer)] += 1
    if turn.notes:
        said.update(turn.notes)
    if turn.way == "composed":
        said[COMPOSED] += 1
    if renderer.switches:
        said[THINKING if response.is_reasoned(messages[-1]) else NOT_THINKING] += 1
    prompt_len = len(prompt.ids)
    ids = np.concatenate((prompt.ids, answer), dtype=np.int32)
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[prompt_len:] = job.weight
    if settings.train_on == "everything":
        weights = _weights_of_everything(conversation, messages, ids, prompt_len, renderer)
    weights[0] = 0
    return Example(conversation.id, job.turn, ids, weights, prompt_len, turn.way)


def without_oldest_turn(messages: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """The conversation without its oldest user turn and all that answers it, or None when only the last is left.

    System messages at the head stay.
    """
    head = 0
    while head < len(messages) and messages[head].role == "system":
        head += 1
    starts = [index for index in range(head, len(messages)) if messages[index].role == "user"]
    following = [index for index in starts if index > head]
    return messages[:head] + messages[following[0] :] if following else None


def _weights_of_everything(
    conversation: Conversation, messages: tuple[Message, ...], ids: np.ndarray, prompt_len: int, renderer: Renderer
) -> np.ndarray:
    """Weight 1 for every token, and an assistant turn's own weight for its response."""
    weights = np.ones(len(ids), dtype=np.float32)
    last = messages[-1].weight
    if last is not None:
        weights[prompt_len:] = last
    for index, message in enumerate(messages[:-1]):
        if message.role != "assistant" or message.weight is None:
            continue
        turn = response.find_turn(renderer, messages, index, conversation.tools)
        prompt, full = renderer.spelled([turn.prompt, turn.prompt + turn.response])
        whole = np.concatenate((prompt.ids, spelling.response_ids(renderer, turn, prompt, full)[0]))
        if not np.array_equal(ids[: len(whole)], whole):
            raise Unfit(
                f"messages[{index}].weight cannot be kept with train_on: everything, because the template writes this "
                "turn differently in the history; use train_on: all_turns"
            )
        weights[len(prompt.ids) : len(whole)] = message.weight
    return weights


def _text_problem(text: str) -> str | None:
    """Why a raw text cannot be encoded."""
    if not text.strip():
        return "the text is empty"
    if _HALF_PAIR.search(text):
        return "half of a surrogate pair: not Unicode text; mend the file's encoding"
    return None


def _encode_text(conversation: Conversation, raw: Iterator[list[int]], work: _Work) -> list[Example] | Reject:
    """Raw text, every token a target: BOS where the tokenizer puts it, EOS at the end, in pieces of max_length.

    Each piece after the first begins with the last token of the one before, as context: so every token after the first
    is a target exactly once. `raw` gives the ids of the texts that can be encoded, in their order.
    """
    problem = _text_problem(conversation.text or "")
    if problem is not None:
        return _reject(conversation, "text", problem)
    renderer, settings = work.renderer, work.settings
    ids = next(raw)
    eos = renderer.tokenizer.eos_token_id
    if eos is None:
        work.notes[NO_EOS] += 1
    elif not ids or ids[-1] != eos:
        ids.append(eos)
    if len(ids) < 2:
        return _reject(conversation, "text", "a single token: nothing to predict")
    examples = []
    for start in range(0, len(ids) - 1, settings.max_length - 1):
        piece = np.array(ids[start : start + settings.max_length], dtype=np.int32)
        weights = np.ones(len(piece), dtype=np.float32)
        weights[0] = 0
        examples.append(Example(conversation.id, 0, piece, weights, 0, "text"))
    return examples


def _note_what_is_missing(conversation: Conversation, job: _Job, renderer: Renderer, said: Counter[str]) -> None:
    """Count what a template drops without a word, and control tokens written out in the content."""
    prompt = job.text.prompt
    system = conversation.messages[0]
    if system.role == "system" and system.content.strip() and system.content.strip() not in prompt:
        said[SYSTEM_DROPPED] += 1
    names = [str(_name_of_tool(tool)) for tool in conversation.tools]
    if any(name not in prompt for name in names):
        said[TOOLS_DROPPED] += 1
    pattern = probe.control_pattern(renderer)
    if any(pattern.search(message.content) for message in job.messages):
        said[CONTROL_TEXT] += 1


def _name_of_tool(tool: object) -> object:
    """A tool's name in its JSON schema, with or without the `function` wrapping."""
    inner = tool.get("function", tool) if isinstance(tool, dict) else {}
    return inner.get("name", "") if isinstance(inner, dict) else ""


def _reject(conversation: Conversation, field: str, reason: str) -> Reject:
    return Reject(conversation.origin.file, conversation.origin.line, field, reason)
