"""What is known before the first request: settings, prompts, seeds, documents, and what they make of each other.

Speaks of questions and files. Knows no requests' answers and opens no socket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from graft import console
from graft.config.synth import Synth
from graft.data.synth.answers import Draft, as_conversation
from graft.data.synth.documents import Library, load_documents
from graft.data.synth.persona import identity_pairs
from graft.data.synth.questions import DocumentPlan, Plan, Question, SeedPlan
from graft.data.synth.seeds import Seeds, load_seeds
from graft.data.synth.wording import Wording, load_wording
from graft.types import Conversation

DEFAULT_COUNT = 100


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that is known before the first request."""

    settings: Synth
    wording: Wording
    seeds: Seeds
    library: Library
    identity: list[Question]
    """Questions about the persona that the model is to answer."""
    rows: list[Conversation]
    """Rows about the persona from templates."""

    @property
    def wanted(self) -> float:
        """How many questions are to be generated."""
        settings = self.settings
        if settings.count is not None:
            return settings.count
        return math.inf if settings.documents.paths else DEFAULT_COUNT if settings.seeds else 0


def prepare(settings: Synth) -> Material:
    """Read prompts, seeds and documents. Opens no socket.

    Raises:
        ConfigError, InputError: one of them cannot serve.
    """
    wording = load_wording(settings)
    seeds = load_seeds(settings.seeds) if settings.seeds else Seeds([], [], 0, [])
    library = load_documents(settings.documents) if settings.documents.paths else Library([], [], 0)
    by_model = settings.identity.by == "model"
    pairs = identity_pairs(settings, distinct_questions=by_model)
    questions = [
        Question(f"identity-{number}", pair.question, "identity", must_say=pair.must_say)
        for number, pair in enumerate(pairs, 1)
    ]
    rows = [
        as_conversation(number, question, Draft(pair.answer, ""), settings, wording)
        for number, (question, pair) in enumerate(zip(questions, pairs, strict=True), 1)
    ]
    if len(pairs) < settings.identity.count:
        console.warn(f"identity.count is {settings.identity.count}, but the templates give only {len(pairs)} rows")
    return Material(settings, wording, seeds, library, questions if by_model else [], [] if by_model else rows)


def plan_for(material: Material) -> Plan:
    """Which requests bring questions."""
    seeds = [seed.text for seed in material.seeds.kept]
    if material.settings.documents.paths:
        return DocumentPlan(material.settings, material.wording, seeds, material.library.chunks)
    return SeedPlan(material.settings, material.wording, seeds)
