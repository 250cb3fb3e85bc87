"""What a run leaves: questions, conversations and rejects as files, and counts that add up.

Speaks of questions, rows and counts. Knows no requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.data.synth.ask import Desk
from graft.data.synth.budget import Budget
from graft.data.synth.journal import Journal
from graft.data.synth.material import Material
from graft.data.synth.questions import Harvest, Question, Refused
from graft.data.write import write_conversations, write_lines
from graft.errors import GraftError
from graft.types import Conversation


@dataclass(slots=True)
class Work:
    """What the run brought."""

    seeds: list[Question]
    harvest: Harvest
    questions: list[Question]
    rows: list[Conversation]
    rejects: list[Refused]
    unanswered: int = 0
    """Questions that were not reached."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The counts for people and machines, and why it ended early, if it did."""

    summary: dict[str, Any]
    stopped: GraftError | None


def write_results(out: Path, work: Work, material: Material) -> None:
    """Write questions, conversations and rejects, each file whole or not at all."""
    write_lines(
        out / "questions.jsonl",
        ({"id": number, "question": question.text} for number, question in enumerate(work.questions, 1)),
    )
    write_conversations(out / "data.jsonl", work.rows)
    before = [Refused(reject) for reject in (*material.seeds.rejects, *material.library.rejects)]
    write_lines(out / "rejects.jsonl", (_reject_row(refused) for refused in (*before, *work.rejects)))


def _reject_row(refused: Refused) -> dict[str, Any]:
    row = asdict(refused.reject)
    return row | {"text": refused.text} if refused.text else row


def summarise(
    out: Path, material: Material, work: Work, desk: Desk, journal: Journal, budget: Budget, looks: Counter[str]
) -> dict[str, Any]:
    """Counts that add up: seeds, candidates and questions each are kept or rejected."""
    harvest = work.harvest
    replies = [entry.reply for entry in journal.entries.values() if entry.reply is not None]
    refused_seeds = sum(refused.reject.field == "question" for refused in work.rejects)
    summary: dict[str, Any] = {
        "seeds": {
            "read": material.seeds.read,
            "kept": len(material.seeds.kept) - refused_seeds,
            "rejected": len(material.seeds.rejects) + refused_seeds,
        },
        "documents": {"files": material.library.files, "pieces": len(material.library.chunks)},
        "questions": {
            "requests": harvest.requests,
            "failed_requests": harvest.failed,
            "candidates": harvest.candidates,
            "kept": len(harvest.kept),
            "rejected": harvest.candidates - len(harvest.kept),
        },
        "answers": {
            "asked": len(work.questions),
            "kept": len(work.rows) - len(material.rows),
            "rejected": sum(refused.reject.file == "answers" for refused in work.rejects),
            "not_reached": work.unanswered,
        },
        "critique": dict(looks),
        "identity": len(material.rows),
        "rows": len(work.rows),
        "reasons": _reasons(work.rejects),
        "requests": {
            "asked_now": desk.asked.total(),
            "from_journal": desk.known.total(),
            "failed_attempts": desk.retried.total(),
            "cut_in_flight": journal.cut,
        },
        "tokens": {
            "prompt": budget.prompt,
            "completion": budget.completion,
            "answers_without_usage": sum(reply.usage.estimated for reply in replies),
            "answers_over_their_limit": desk.over,
        },
        "cost": budget.cost(),
        "currency": None if budget.prices is None else budget.prices.currency,
        "exhausted": harvest.exhausted,
        "complete": desk.halted is None,
        "written": {str(out / "data.jsonl"): len(work.rows), str(out / "questions.jsonl"): len(work.questions)},
        "rejects": str(out / "rejects.jsonl"),
    }
    return summary


def _reasons(rejects: Sequence[Refused]) -> dict[str, int]:
    """How often each kind of reason occurs: what stands before the first number, quotation or colon."""
    kinds: Counter[str] = Counter()
    for refused in rejects:
        kind = refused.reject.reason
        for mark in (":", " '", ' "', " (", "; "):
            kind = kind.split(mark, 1)[0]
        kinds[f"{refused.reject.file if refused.reject.file in ('questions', 'answers') else 'seeds'}: {kind}"] += 1
    return dict(kinds.most_common())
