"""The whole of `graft data synth`, in the order in which it happens: seeds, questions, answers, files.

OUT/
    config.yaml       every effective setting; never the key
    journal.jsonl     every request and its answer (see `journal`)
    questions.jsonl   {"id", "question"} rows: what was to be answered
    data.jsonl        the conversations, chat-messages jsonl
    rejects.jsonl     everything refused: file or stage, line or number, field, reason and text
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from graft import console
from graft.data.synth.answers import Answerer
from graft.data.synth.ask import Desk, in_order
from graft.data.synth.budget import Budget
from graft.data.synth.changes import check_plan
from graft.data.synth.client import Client
from graft.data.synth.journal import Journal
from graft.data.synth.material import Material, plan_for
from graft.data.synth.novelty import Novelty
from graft.data.synth.questions import Refused, generate, take_seeds
from graft.data.synth.results import Outcome, Work, summarise, write_results
from graft.errors import Interrupted
from graft.runs import make_writable, write_atomic
from graft.types import Conversation


def synthesise(material: Material, out: Path, accept_changes: bool = False) -> Outcome:
    """Do what is still to be done in a folder, and write its files from the journal.

    Raises:
        ConfigError: the endpoint needs a key.
        InputError: the folder cannot be used, or its journal was begun with another plan.
    """
    client = Client(material.settings.endpoint)
    if client.in_the_open:
        console.warn(f"{material.settings.endpoint.base_url}: the key travels unencrypted; use https")
    make_writable(out)
    journal = Journal(out / "journal.jsonl")
    try:
        check_plan(journal, material, client.scrub, accept_changes)
        effective = material.settings.model_dump(mode="json")
        as_yaml = yaml.safe_dump(effective, allow_unicode=True, sort_keys=False, width=120)
        write_atomic(out / "config.yaml", client.scrub(as_yaml))
        budget = Budget(material.settings.budget, material.settings.prices)
        for usage in journal.used:
            budget.count(usage)
        desk = Desk(material.settings.endpoint, client, journal, budget)
        work, looks = asyncio.run(_work(material, desk, client))
        if desk.halted is None:
            desk.settle_doubts()
        write_results(out, work, material)
        return Outcome(summarise(out, material, work, desk, journal, budget, looks), desk.halted)
    finally:
        journal.close()


async def _work(material: Material, desk: Desk, client: Client) -> tuple[Work, Counter[str]]:
    settings = material.settings
    novelty = Novelty(settings.filter, settings.language)
    with _stop_on_signals(desk):
        try:
            seeds, refused = take_seeds(material.seeds.kept, novelty)
            wanted = material.wanted
            with console.progress("questions", None if math.isinf(wanted) else int(wanted)) as advance:
                harvest = await generate(plan_for(material), settings, wanted, novelty, desk, advance)
            identity = [question for question in material.identity if novelty.pool.same(question.text) is None]
            asked = (*(seeds if settings.answers.answer_seeds else ()), *harvest.kept, *identity)
            work = Work(seeds, harvest, list(asked), list(material.rows), [*refused, *harvest.rejects])
            answerer = Answerer(settings, material.wording, desk)
            await _answer_all(work, answerer, desk, settings.endpoint.concurrency)
            return work, answerer.looks
        except BaseException as error:  # a defect: even then, what is in flight comes home before it is shown
            desk.halt(Interrupted(f"stopped by {type(error).__name__}"))
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
            raise
        finally:
            await client.close()


async def _answer_all(work: Work, answerer: Answerer, desk: Desk, concurrency: int) -> None:
    work.unanswered = len(work.questions)
    if desk.halted:
        return
    jobs = (answerer.answer(number, question) for number, question in enumerate(work.questions, 1))
    rows: list[Conversation] = []
    with console.progress("answers", len(work.questions)) as advance:
        # Wider than the slots, so that one slow answer does not keep the others waiting to be asked.
        async for result in in_order(jobs, 4 * concurrency):
            work.unanswered -= 1
            if isinstance(result, Refused):
                work.rejects.append(result)
            else:
                rows.append(result)
            advance(1, desk.budget.said())
    work.rows = rows + work.rows


@contextlib.contextmanager
def _stop_on_signals(desk: Desk) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets what is in flight come home; the second ends at once, safe at any byte."""
    asked: list[int] = []

    def ask(number: int) -> None:
        if asked:
            os._exit(128 + number)
        asked.append(number)
        name = signal.Signals(number).name
        console.note(
            f"{name}: waiting for the {desk.in_flight} answers in flight, then stopping; again to stop at once"
        )
        desk.halt(Interrupted(f"stopped by {name}"))

    loop = asyncio.get_running_loop()
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # not the main thread, or Windows
            loop.add_signal_handler(number, ask, number)
            caught.append(number)
    try:
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
