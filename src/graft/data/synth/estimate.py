"""What a run would ask and cost, before anything is asked. Speaks of prompts and tokens; opens no socket."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from graft.config.synth import Prices
from graft.data.synth.answers import first_request
from graft.data.synth.budget import estimate_tokens
from graft.data.synth.client import Request
from graft.data.synth.material import Material, plan_for
from graft.data.synth.novelty import Novelty
from graft.data.synth.questions import Question, take_seeds
from graft.data.synth.wording import Chat


@dataclass(frozen=True, slots=True)
class Estimate:
    """One stage."""

    stage: str
    requests: int
    """Where every question passes and no request must be repeated."""
    prompt_tokens: int
    """About: see `estimate_tokens`."""
    answer_tokens: int
    """At most: what `max_tokens` allows."""
    cost: float | None
    """At most; None without prices."""


@dataclass(frozen=True, slots=True)
class Preview:
    """The first request of each stage, and the estimate of all."""

    prompts: dict[str, Chat]
    stages: list[Estimate]

    def as_json(self) -> dict[str, Any]:
        """One object for machines."""
        prompts = {
            stage: [{"role": role, "content": content} for role, content in chat]
            for stage, chat in self.prompts.items()
        }
        return {"dry_run": True, "prompts": prompts, "stages": [asdict(stage) for stage in self.stages]}


def preview(material: Material) -> Preview:
    """Build what would be asked first, and count what would follow."""
    settings, wording = material.settings, material.wording
    seeds, _ = take_seeds(material.seeds.kept, Novelty(settings.filter, settings.language))
    plan = plan_for(material)
    prompts: dict[str, Chat] = {}
    stages: list[Estimate] = []

    wanted = min(material.wanted, len(material.library.chunks) * plan.per_request or math.inf)
    asking = math.ceil(wanted / plan.per_request)
    if asking:
        prompts["questions"] = plan.request(0, ()).chat
        sample = [plan.request(index, ()) for index in range(min(asking, 20)) if plan.has(index)]
        stages.append(_stage("questions", asking, sample, settings.questions.max_tokens, settings.prices))

    known = [*(seeds if settings.answers.answer_seeds else ()), *material.identity]
    answering = int(wanted) + len(known)
    if answering:
        chunk = material.library.chunks[0] if material.library.chunks else None
        text = seeds[0].text if seeds else "?"
        kind = "document" if chunk else "generated"
        generated = [Question("generated-1", text, kind, chunk)] if asking else []
        first = first_request((generated or known)[0], settings, wording, settings.answers.max_tokens)
        prompts["answers"] = first.chat
        each = [
            first_request(item, settings, wording, settings.answers.max_tokens) for item in (*generated, *known)[:20]
        ]
        stages.append(_stage("answers", answering, each, settings.answers.max_tokens, settings.prices))
        for _ in range(settings.critique.rounds):  # each looks at an answer of at most its full length
            looked = [
                Request(
                    "critique", (*request.chat, ("user", "x" * 3 * settings.answers.max_tokens)), settings.critique, 1
                )
                for request in each
            ]
            most = settings.critique.max_tokens + settings.answers.max_tokens
            stages.append(_stage("critique", 2 * answering, looked, most / 2, settings.prices))
    return Preview(prompts, stages)


def _stage(name: str, requests: int, sample: list[Request], max_tokens: float, prices: Prices | None) -> Estimate:
    """So many requests like those of the sample."""
    each = sum(estimate_tokens(content) for request in sample for _, content in request.chat) / len(sample)
    prompt, answer = round(each * requests), round(max_tokens * requests)
    cost = None if prices is None else (prompt * prices.input + answer * prices.output) / 1_000_000
    return Estimate(name, requests, prompt, answer, cost)
