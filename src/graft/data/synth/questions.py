"""Questions: the user's own, then new ones, each asked for with examples and let into the pool only when it is new.

Speaks of questions, requests and the pool. Knows no endpoint: the desk answers.

The plan is a pure function of the recipe and of the answers. Request i takes its generated examples from what the first
i - ahead + 1 requests brought, so `ahead` of them can be under way at once, and a later start builds the same requests
again and finds their answers in the journal, whatever came back first.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from graft.config.synth import Synth
from graft.data.layout.turns import split_think
from graft.data.synth.ask import Desk, Stopped
from graft.data.synth.client import Reply, Request
from graft.data.synth.documents import Chunk
from graft.data.synth.journal import Entry
from graft.data.synth.novelty import Novelty
from graft.data.synth.parse import parse_questions
from graft.data.synth.seeds import Seed
from graft.data.synth.wording import Wording
from graft.types import Reject


@dataclass(frozen=True, slots=True)
class Question:
    """A question to be answered."""

    id: str
    text: str
    kind: str
    """`seed`, `generated`, `document` or `identity`."""
    chunk: Chunk | None = None
    """The piece of text that is to answer it."""
    must_say: tuple[str, ...] = ()
    """Words that its answer must hold."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A reject with the text that was refused, since that stands in no file of the user's."""

    reject: Reject
    text: str = ""


@dataclass(slots=True)
class Harvest:
    """What generation brought: len(kept) + len(rejects that are items) == candidates."""

    kept: list[Question] = field(default_factory=list)
    rejects: list[Refused] = field(default_factory=list)
    candidates: int = 0
    requests: int = 0
    failed: int = 0
    """Requests that brought no list; each is a reject too."""
    exhausted: bool = False
    """Ended because nothing new came any more."""


class Plan(Protocol):
    """Which requests there are."""

    per_request: int

    def has(self, index: int) -> bool:
        """Whether there is a request of this index."""

    def request(self, index: int, generated: Sequence[str]) -> Request:
        """The request, given the generated questions that it may use as examples."""

    def chunk(self, index: int) -> Chunk | None:
        """The piece of text that its questions are about."""


class SeedPlan:
    """Requests without end: some seeds and some generated questions as examples (self-instruct: 6 and 2)."""

    def __init__(self, settings: Synth, wording: Wording, seeds: Sequence[str]) -> None:
        self.per_request = settings.questions.per_request
        self._settings = settings
        self._wording = wording
        self._seeds = seeds

    def has(self, index: int) -> bool:
        return True

    def chunk(self, index: int) -> Chunk | None:
        return None

    def request(self, index: int, generated: Sequence[str]) -> Request:
        own = self._settings.questions
        rng = random.Random(f"{self._settings.seed}:questions:{index}")  # noqa: S311  # a seeded choice, no secret
        newer = rng.sample(range(len(generated)), min(own.generated_examples, len(generated)))
        wanted = own.seed_examples + own.generated_examples - len(newer)
        older = rng.sample(range(len(self._seeds)), min(wanted, len(self._seeds)))
        examples = [self._seeds[at] for at in older] + [generated[at] for at in newer]
        rng.shuffle(examples)
        chat = self._wording.chat("questions", n=own.per_request, examples=_listed(self._wording, examples))
        return Request("questions", chat, own, own.max_tokens, index)


class DocumentPlan:
    """One request for each piece of the user's texts."""

    def __init__(self, settings: Synth, wording: Wording, seeds: Sequence[str], chunks: Sequence[Chunk]) -> None:
        self.per_request = settings.documents.questions_per_chunk
        self._settings = settings
        self._wording = wording
        self._seeds = seeds
        self._chunks = chunks

    def has(self, index: int) -> bool:
        return index < len(self._chunks)

    def chunk(self, index: int) -> Chunk | None:
        return self._chunks[index]

    def request(self, index: int, generated: Sequence[str]) -> Request:
        own = self._settings.questions
        rng = random.Random(f"{self._settings.seed}:documents:{index}")  # noqa: S311
        examples = rng.sample(list(self._seeds), min(own.seed_examples, len(self._seeds)))
        chat = self._wording.chat(
            "document_questions",
            n=self.per_request,
            document=self._chunks[index].text,
            examples=_listed(self._wording, examples),
        )
        return Request("questions", chat, own, own.max_tokens, index)


def _listed(wording: Wording, examples: Iterable[str]) -> str:
    """The examples as the prompt shows them, each in one line."""
    lines = (wording.piece("example", number=n, question=" ".join(text.split())) for n, text in enumerate(examples, 1))
    return "\n".join(lines)


def take_seeds(seeds: Sequence[Seed], novelty: Novelty) -> tuple[list[Question], list[Refused]]:
    """Put the seeds into the pool; those that repeat another one are refused. Answered ones become no questions."""
    questions: list[Question] = []
    refused: list[Refused] = []
    for number, seed in enumerate(seeds, 1):
        if novelty.pool.same(seed.text) is not None:
            origin = seed.origin
            refused.append(Refused(Reject(origin.file, origin.line, "question", "is there already"), seed.text))
            continue
        novelty.pool.add(seed.text)
        if not seed.answered:
            questions.append(Question(f"seed-{number}", seed.text, "seed"))
    return questions, refused


async def generate(
    plan: Plan, settings: Synth, wanted: float, novelty: Novelty, desk: Desk, advance: Callable[[int, str], None]
) -> Harvest:
    """Ask for questions until `wanted` have passed, the plan ends, or nothing new comes; stops early with the desk."""
    harvest = Harvest()
    sizes = [0]
    """Generated questions after so many requests."""
    texts: list[str] = []
    under_way: deque[asyncio.Task[Entry]] = deque()
    launched = barren = 0
    ahead = settings.questions.ahead
    try:
        while True:
            while (
                plan.has(launched)
                and len(under_way) < ahead
                and len(harvest.kept) + len(under_way) * plan.per_request < wanted
                and barren < settings.questions.patience
            ):
                known = texts[: sizes[max(0, launched - ahead + 1)]]
                under_way.append(asyncio.create_task(desk.ask(plan.request(launched, known))))
                launched += 1
            if not under_way:
                break
            entry = await under_way.popleft()
            before = len(harvest.kept)
            _take(entry, harvest, plan, wanted, novelty, settings)
            new = harvest.kept[before:]
            texts += [question.text for question in new]
            sizes.append(len(texts))
            barren = 0 if new else barren + 1
            advance(len(new), desk.budget.said())
    except Stopped:
        await asyncio.gather(*under_way, return_exceptions=True)  # they may be paid: let them come home
    harvest.exhausted = barren >= settings.questions.patience
    return harvest


def _take(entry: Entry, harvest: Harvest, plan: Plan, wanted: float, novelty: Novelty, settings: Synth) -> None:
    """Judge what one request brought."""
    index = harvest.requests
    harvest.requests += 1
    chunk = plan.chunk(index)
    candidates, why, said = _candidates(entry, settings.questions.max_tokens)
    if not candidates:
        harvest.failed += 1
        harvest.rejects.append(Refused(Reject("questions", index + 1, "request", why), said))
    for number, text in enumerate(candidates, 1):
        harvest.candidates += 1
        reason = novelty.why_not(text)
        if reason is None and len(harvest.kept) >= wanted:
            reason = f"surplus: {wanted:.0f} were wanted (count)"
        if reason is not None:
            harvest.rejects.append(Refused(Reject("questions", index + 1, f"item {number}", reason), text))
            continue
        novelty.pool.add(text)
        kind = "generated" if chunk is None else "document"
        harvest.kept.append(Question(f"{kind}-{len(harvest.kept) + 1}", text, kind, chunk))


def _candidates(entry: Entry, max_tokens: int) -> tuple[list[str], str, str]:
    """The questions of an answer; else why there are none, and what was said instead."""
    reply = entry.reply
    if reply is None:
        return [], entry.why, ""
    if why := refused_by_endpoint(reply):
        return [], why, reply.refusal
    text = split_think(reply.text)[1]
    cut = reply.finish == "length"
    if found := parse_questions(text, cut):
        return found, "", ""
    return [], f"cut at {max_tokens} tokens before a whole question" if cut else "holds no list of questions", text


def refused_by_endpoint(reply: Reply) -> str | None:
    """Why the endpoint itself, not the model's words, withholds an answer."""
    if reply.refusal:
        return "the endpoint marks it as a refusal"
    if reply.finish == "content_filter":
        return "withheld by the endpoint's content filter"
    return None
