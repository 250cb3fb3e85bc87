"""Everything that can be done, and found wrong, before any weight is read: data, split, ids, plan."""

from __future__ import annotations

import hashlib
import re
from collections import Counter as Tally
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

import numpy as np

from graft.config.data import Source
from graft.config.train import Train
from graft.console import note, warn
from graft.data.load import Loaded, load_sources, refuse_if_too_many, write_rejects
from graft.data.splitting.split import Parts, split
from graft.data.write import write_conversations
from graft.errors import InputError
from graft.model.files.load import vocabulary_size
from graft.runs import RunFolder, weights_fingerprint
from graft.tokens.encode import NOT_THINKING, THINKING
from graft.tokens.load import load_renderer, say_notes
from graft.tokens.plan import Plan
from graft.tokens.renderer import Renderer
from graft.tokens.spelling import UNSPELLED
from graft.tokens.store import ExampleStore, encode_stored
from graft.train.saving.checkpoint import decisive
from graft.types import Conversation, Reject
from graft.words import counted

FEW = 10
"""Conversations held out for validation under which the run says that they are few."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run trains on."""

    renderer: Renderer
    train: ExampleStore
    val: ExampleStore
    plan: Plan
    made_of: dict[str, str]
    """Hash or value of everything that decides the run's course; a resumed run must have the same."""
    counts: dict[str, int]
    """Rows read and kept, for the report."""
    thinking: bool | None
    """How most examples set the template's thinking switch: how the tuned model wants to be asked. None without one."""


def prepare(settings: Train, run: RunFolder, passing: bool = False) -> Prepared:
    """Read, split and encode the data; writes the rejects and the held-out parts to the run folder.

    A `passing` folder is not there afterwards, so no file in it is named.

    Raises:
        InputError: a file, the tokenizer or the template cannot serve, or nothing is left to train on.
        DataRefused: too many rows were rejected.
    """
    renderer = renderer_of(settings)
    note(f"chat template: {renderer.template_name}")
    say_notes(renderer)
    vocabulary = vocabulary_size(settings.model, settings.trust_remote_code)
    loaded = _load(settings.data)
    others = [_load(sources) for sources in (settings.val, settings.test)]
    held_out = _parts(settings, loaded, *others)
    train, validation = (encode_stored(part, renderer, settings.encode) for part in (held_out.train, held_out.val))
    # Each reject is counted against the file that it came from.
    by_set = [[*part.rejects] for part in (loaded, *others)]
    by_set[0] += train.rejects
    by_set[1 if settings.val else 0] += validation.rejects
    rejects = [reject for of_set in by_set for reject in of_set]
    write_rejects(run.rejects, rejects)
    for of_set, part in zip(by_set, (loaded, *others), strict=True):
        refuse_if_too_many(of_set, part.read, settings.max_rejected)
    for text, count in train.notes.items():
        if count:
            said = f"{text}: {count}"
            warn(said) if text == UNSPELLED else note(said)
    if not len(train):
        raise InputError(f"no conversation is left to train on of {loaded.read} read; see {run.rejects}")
    _check_vocabulary(settings.model, train, vocabulary, renderer.new_tokens)
    _write_held_out(run, held_out)
    plan = Plan(
        _repeats(settings.data, held_out.train, train),
        settings.batch_size,
        settings.epochs,
        settings.seed,
        settings.max_steps,
    )
    counts = {
        "read": sum(part.read for part in (loaded, *others)),
        "rejected": len(rejects),
        "train": len(train),
        "val": len(validation),
        "test": len(held_out.test),
    }
    note(", ".join(f"{count} {name}" for name, count in counts.items()))
    _say_rejects(rejects, None if passing else run)
    if not settings.val:
        _say_few(len(validation))
    return Prepared(
        renderer,
        train,
        validation,
        plan,
        _made_of(settings, train, validation, renderer, plan),
        counts,
        _thinking(train),
    )


def _say_rejects(rejects: Sequence[Reject], run: RunFolder | None) -> None:
    if rejects:
        # The reasons name numbers and values behind their first words.
        first, count = Tally(re.split(r"[:\d]", reject.reason)[0] for reject in rejects).most_common(1)[0]
        example = next(reject.reason for reject in rejects if reject.reason.startswith(first))
        where = "a run lists them all" if run is None else f"all of them in {run.rejects}"
        note(f"rejected, {count} of {len(rejects)}: {example}; {where}")


def _say_few(held_out: int) -> None:
    if 0 < held_out < FEW:
        note(
            f"{counted(held_out, 'conversation')} held out for validation: its loss, and which checkpoint is best, "
            "rest on little; give val=FILE or a larger split.val"
        )


def renderer_of(settings: Train) -> Renderer:
    """What makes the run's ids.

    Raises:
        InputError: the tokenizer or the template cannot serve.
    """
    return load_renderer(
        settings.model,
        settings.encode.template,
        settings.encode.date,
        trust_remote_code=settings.trust_remote_code,
        new_tokens=settings.new_tokens,
    )


def _load(sources: Sequence[Source]) -> Loaded:
    loaded = load_sources(sources)
    for decision in loaded.decisions:
        note(decision)
    return loaded


def _parts(settings: Train, loaded: Loaded, val_files: Loaded, test_files: Loaded) -> Parts:
    """Training, validation and test set: each from its own files, or held out of the training data."""
    parts = split(
        loaded.conversations,
        val=0.0 if settings.val else settings.split.val,
        test=0.0 if settings.test else settings.split.test,
    )
    val = val_files.conversations if settings.val else parts.val
    test = test_files.conversations if settings.test else parts.test
    for text in parts.notes:
        warn(text)
    if not val:
        warn("there is no validation data: overfitting will not be seen; give --val FILE or a larger split.val")
    return replace(parts, val=val, test=test)


def _check_vocabulary(model: str, store: ExampleStore, vocabulary: int | None, new: Container[int]) -> None:
    largest = max((int(token) for token in np.unique(store.ids) if int(token) not in new), default=-1)
    if vocabulary is not None and largest >= vocabulary:
        raise InputError(
            f"{model}: its tokenizer makes id {largest}, but the model has only {vocabulary} embeddings (0 to "
            f"{vocabulary - 1}); this tokenizer belongs to another model"
        )


def _write_held_out(run: RunFolder, parts: Parts) -> None:
    for name, part in (("val", parts.val), ("test", parts.test)):
        if part:
            run.data.mkdir(parents=True, exist_ok=True)
            write_conversations(run.data / f"{name}.jsonl", part)


def _thinking(train: ExampleStore) -> bool | None:
    on, off = train.notes.get(THINKING, 0), train.notes.get(NOT_THINKING, 0)
    return None if on == off == 0 else on > off


def _repeats(
    sources: Sequence[Source], conversations: Sequence[Conversation], store: ExampleStore
) -> tuple[float, ...]:
    weight = {source.path: source.weight for source in sources}
    of_conversation = {conversation.id: weight[conversation.source] for conversation in conversations}
    return tuple(of_conversation[name] for name in store.conversations)


def _made_of(
    settings: Train, train: ExampleStore, validation: ExampleStore, renderer: Renderer, plan: Plan
) -> dict[str, str]:
    """What decides the course of a run."""
    repeats = hashlib.blake2b(repr(plan.repeats).encode(), digest_size=8).hexdigest()
    return {
        **decisive(settings),
        "model's weights": weights_fingerprint(settings.model),
        "encoded data": train.key,
        "validation data": validation.key,
        "chat template and tokenizer": renderer.fingerprint(),
        "source weights": repeats,
    }
