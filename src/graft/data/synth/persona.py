"""Self-cognition rows: questions about who is answering, and answers in the persona's name, from templates.

Speaks of questions and answers. Knows no requests: what the model is to answer is only listed here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from typing import Any

import yaml

from graft.config.synth import Persona, Synth
from graft.data.synth.wording import SHIPPED, fill
from graft.errors import ConfigError


@dataclass(frozen=True, slots=True)
class IdentityPair:
    """A question about who is answering, and an answer."""

    kind: str
    question: str
    answer: str
    must_say: tuple[str, ...]
    """What an answer to this question must name, whoever writes it."""


def identity_pairs(settings: Synth, distinct_questions: bool = False) -> list[IdentityPair]:
    """Up to `identity.count` pairs, mixed by the seed: every question once before any comes again with another answer.

    `distinct_questions` leaves it at once: for a model that answers itself.

    Raises:
        ConfigError: there are no templates in the language.
    """
    if not settings.identity.count:
        return []
    groups = _load(settings.language)
    rng = random.Random(f"{settings.seed}:identity")  # noqa: S311
    rounds: list[list[IdentityPair]] = []
    for group in groups:
        needs = group.get("needs", [])
        if not all(getattr(settings.persona, need) for need in needs):
            continue
        pairs = _pairs_of(group, settings.persona, (*needs, "name"))
        answers = len(group["answers"])
        for start in range(0, len(pairs), answers):
            of_one_question = rng.sample(pairs[start : start + answers], answers)
            for number, pair in enumerate(of_one_question[:1] if distinct_questions else of_one_question):
                while len(rounds) <= number:
                    rounds.append([])
                rounds[number].append(pair)
    mixed = [pair for part in rounds for pair in rng.sample(part, len(part))]
    return mixed[: settings.identity.count]


def _pairs_of(group: Mapping[str, Any], persona: Persona, must: tuple[str, ...]) -> list[IdentityPair]:
    values = persona.model_dump()
    # An answer about the purpose may say it in other words; names it may not.
    must_say = tuple(values[name] for name in must if name in ("name", "company"))
    if group["kind"] in ("human", "purpose"):
        must_say = ()
    return [
        IdentityPair(group["kind"], question, fill(answer, values), must_say)
        for question, answer in product(group["questions"], group["answers"])
    ]


def _load(language: str) -> list[Mapping[str, Any]]:
    if language not in SHIPPED:
        raise ConfigError(
            f"identity: graft has templates for {' and '.join(SHIPPED)} only, `language` is {language}; "
            "set identity.count: 0 and add rows of your own"
        )
    path = files("graft.data.synth").joinpath("prompts", f"identity.{language}.yaml")
    groups: list[Mapping[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return groups
