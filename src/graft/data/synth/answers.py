"""Answers: each question asked in the persona's name, the answer judged, and where wanted criticised and rewritten.

Speaks of questions, replies and conversations. Knows no endpoint: the desk answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from graft.config.synth import Synth
from graft.data.clean.refusal import find_boilerplate
from graft.data.layout.turns import split_think
from graft.data.synth.ask import Desk
from graft.data.synth.client import Reply, Request
from graft.data.synth.novelty import banned_words, excerpt, other_language, words
from graft.data.synth.questions import Question, Refused, refused_by_endpoint
from graft.data.synth.wording import Wording
from graft.types import Conversation, Message, Origin, Reject


@dataclass(frozen=True, slots=True)
class Draft:
    """An answer as it stands."""

    text: str
    reasoning: str
    rewritten: int = 0


class Answerer:
    """Answers questions, one call each; calls may run at once, they share only the counts."""

    def __init__(self, settings: Synth, wording: Wording, desk: Desk) -> None:
        self._settings = settings
        self._wording = wording
        self._desk = desk
        self._banned = banned_words(settings.filter.banned)
        self.looks: Counter[str] = Counter()
        """How critiques ended: `fine`, `rewritten`, `unusable`."""

    async def answer(self, number: int, question: Question) -> Conversation | Refused:
        """The question with its answer, or why there is none. `number` is its line in the questions file.

        Raises:
            Stopped: nothing more is asked.
        """
        own, reasons = self._settings.answers, list[str]()
        max_tokens, text = own.max_tokens, ""
        for attempt in range(own.attempts):
            entry = await self._desk.ask(first_request(question, self._settings, self._wording, max_tokens, attempt))
            if entry.reply is None:
                reasons.append(entry.why)
                break
            draft, why, again = self._judge(entry.reply, question, max_tokens)
            if why is None:
                draft = await self._look_over(question, draft)
                return as_conversation(number, question, draft, self._settings, self._wording)
            text = draft.text
            reasons.append(why)
            if not again:
                break
            if entry.reply.finish == "length":
                max_tokens *= 2
        reason = "; then ".join(dict.fromkeys(reasons))
        return Refused(Reject("answers", number, "answer", f"{reason} (asked: {excerpt(question.text)!r})"), text)

    def _judge(self, reply: Reply, question: Question, max_tokens: int) -> tuple[Draft, str | None, bool]:
        """The draft, what is wrong with it, and whether asking again may help."""
        settings, own = self._settings, self._settings.answers
        thought, text = split_think(reply.text)
        draft = Draft(text.strip(), (reply.reasoning or thought or "").strip())
        count = len(words(draft.text))
        why, again = None, True
        if withheld := refused_by_endpoint(reply):
            why = withheld
        elif reply.finish == "length":
            why = f"cut at {max_tokens} tokens (answers.max_tokens)"
        elif not draft.text:
            why = "empty answer"
        elif question.chunk is not None and self._is_word("nothing", draft.text):
            why, again = "the text does not answer it", False
        elif count < own.min_words:
            why = f"too short: {count} words, answers.min_words is {own.min_words}"
        elif count > own.max_words:
            why = f"too long: {count} words, answers.max_words is {own.max_words}"
        elif (word := self._banned(draft.text)) is not None:
            why = f"holds the banned word {word!r}"
        elif settings.filter.language and (other := other_language(draft.text, settings.language)):
            why = f"is written in `{other}`, `{settings.language}` is wanted"
        elif missing := [name for name in question.must_say if name not in draft.text]:
            why = f"does not say {missing[0]!r}"
        elif not own.keep_refusals and question.kind != "identity" and (found := find_boilerplate(draft.text)):
            why = f"refuses, or speaks as a language model: {found[1]!r}"
        if own.temperature == 0 and reply.finish != "length":
            again = False  # it would say the same
        return draft, why, again

    async def _look_over(self, question: Question, draft: Draft) -> Draft:
        """Critique and rewrite, as often as wanted; a rewrite that cannot be used leaves the answer as it was."""
        settings = self._settings
        document = "" if question.chunk is None else question.chunk.text
        grounds = self._wording.piece("grounds", document=document) if document else ""
        for index in range(settings.critique.rounds):
            known = {"question": question.text, "answer": draft.text, "document": document, "grounds": grounds}
            chat = self._wording.chat("critique", **known)
            entry = await self._desk.ask(
                Request("critique", chat, settings.critique, settings.critique.max_tokens, index)
            )
            faults = "" if entry.reply is None else split_think(entry.reply.text)[1].strip()
            if self._is_word("fine", faults):
                self.looks["fine"] += 1
                break
            if not faults:
                self.looks["unusable"] += 1
                break
            chat = self._wording.chat("rewrite", critique=faults, **known)
            entry = await self._desk.ask(Request("rewrite", chat, settings.answers, settings.answers.max_tokens, index))
            if entry.reply is None:
                self.looks["unusable"] += 1
                break
            new, why, _ = self._judge(entry.reply, question, settings.answers.max_tokens)
            if why is not None:
                self.looks["unusable"] += 1
                break
            self.looks["rewritten"] += 1
            draft = Draft(new.text, new.reasoning, draft.rewritten + 1)
        return draft

    def _is_word(self, piece: str, text: str) -> bool:
        """Whether an answer is no more than the agreed word."""
        return text.strip(" \n\t.。!！*\"'“”`").casefold() == self._wording.piece(piece).casefold()


def first_request(question: Question, settings: Synth, wording: Wording, max_tokens: int, attempt: int = 0) -> Request:
    """The request for an answer."""
    if question.chunk is None:
        chat = wording.chat("answers", question=question.text)
    else:
        chat = wording.chat("document_answers", question=question.text, document=question.chunk.text)
    return Request("answers", chat, settings.answers, max_tokens, attempt)


def as_conversation(number: int, question: Question, draft: Draft, settings: Synth, wording: Wording) -> Conversation:
    """The row to be trained on."""
    chunk = question.chunk
    asked = question.text
    meta: dict[str, object] = {"kind": question.kind}
    if chunk is not None:
        meta |= {"document": chunk.file, "piece": chunk.number}
        if settings.documents.context == "meta":
            meta["context"] = chunk.text
        elif settings.documents.context == "prompt":
            asked = wording.piece("context_turn", document=chunk.text, question=question.text)
    if draft.rewritten:
        meta["rewritten"] = draft.rewritten
    reasoning = draft.reasoning if settings.answers.keep_reasoning and draft.reasoning else None
    messages: Sequence[Message] = (
        *([Message("system", system)] if (system := wording.free(settings.answers.system)) else []),
        Message("user", asked),
        Message("assistant", draft.text, reasoning=reasoning),
    )
    return Conversation(question.id, Origin("questions.jsonl", number), tuple(messages), meta=meta)
