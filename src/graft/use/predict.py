"""A model's answers to a file of conversations. Speaks conversations, answers and predictions files; no metrics.

A question is everything before a conversation's last assistant turn (or all of it, where it ends with the user), and
its prompt comes from the same renderer as in training, with the thinking switch that training used for that turn.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graft.config.data import Source
from graft.config.engine import EngineName
from graft.config.train import Sampling
from graft.console import note, progress, warn
from graft.data.load import load_sources
from graft.errors import InputError
from graft.runs import write_atomic
from graft.tokens.chat_template import BLOCKS
from graft.tokens.renderer import Renderer, TemplateRefused
from graft.tokens.response import split_reasoning
from graft.types import Conversation, Message
from graft.words import counted, one_or_many

if TYPE_CHECKING:
    from graft.use.engine import Engine

Finish = Literal["stop", "length", "too_long", "refused"]
"""Why an answer ended: a stop token, the limit of new tokens; or why there is none: the prompt fills the model's
context, the chat template cannot write the conversation."""
_OUR_COLUMNS = ("id", "input", "messages", "predict", "reasoning", "target", "finish")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what the data says the answer is."""

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    target: str | None
    """The content of the last assistant turn; None where the conversation ends before one."""
    thinking: bool | None
    """Whether that turn reasons first; None leaves it to the template."""
    meta: Mapping[str, Any]

    @property
    def input(self) -> str:
        """The last thing that the user said."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said to one question."""

    question: Question
    text: str
    """The answer alone, without reasoning."""
    reasoning: str | None
    finish: Finish
    tokens: int
    """Generated tokens, reasoning included, stop token not."""

    @property
    def row(self) -> dict[str, Any]:
        """One line of a predictions file."""
        question = self.question
        row: dict[str, Any] = {"id": question.id, "input": question.input}
        if len(question.messages) > 1:
            row["messages"] = [{"role": message.role, "content": message.content} for message in question.messages]
        row |= {"predict": self.text, "target": question.target, "finish": self.finish}
        if self.reasoning:
            row["reasoning"] = self.reasoning
        return row | {key: value for key, value in question.meta.items() if key not in _OUR_COLUMNS}


def questions_of(conversations: Sequence[Conversation], thinking: bool | None = None) -> tuple[list[Question], int]:
    """One question per conversation, and how many conversations ask nothing (raw text).

    `thinking` is for conversations without an answer; one that has an answer is asked as training asked for it.
    """
    questions: list[Question] = []
    for conversation in conversations:
        messages = conversation.messages
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        ends_with_answer = bool(turns) and turns[-1] == len(messages) - 1
        if conversation.text is not None or not messages or turns == [0] == [len(messages) - 1]:
            continue
        target, asked, switch = None, messages, thinking
        if ends_with_answer:
            reasoning, target = split_reasoning(messages[-1])
            asked, switch = messages[:-1], bool(reasoning.strip())
        questions.append(Question(conversation.id, asked, conversation.tools, target, switch, conversation.meta))
    return questions, len(conversations) - len(questions)


def split_answer(text: str) -> tuple[str | None, str]:
    """Reasoning and answer of generated text; the block's opening may stand in the prompt, its end never does."""
    for opening, closing in BLOCKS:
        head, found, tail = text.partition(closing)
        if found:
            return head.strip().removeprefix(opening).strip() or None, tail.lstrip("\n")
    return None, text


def answer_all(
    engine: Engine,
    renderer: Renderer,
    questions: Sequence[Question],
    sampling: Sampling,
    *,
    shots: Sequence[Message] = (),
    label: str = "answering",
) -> list[Answer]:
    """Answers in the order of the questions, with a progress bar."""
    answers: dict[int, Answer] = {}
    with progress(label, len(questions)) as advance:
        for batch in answer_in_batches(engine, renderer, questions, sampling, shots):
            answers.update(batch)
            advance(len(batch), "")
    return [answers[index] for index in range(len(questions))]


def answer_in_batches(
    engine: Engine,
    renderer: Renderer,
    questions: Sequence[Question],
    sampling: Sampling,
    shots: Sequence[Message] = (),
) -> Iterator[list[tuple[int, Answer]]]:
    """(index of the question, answer), batch by batch as they are computed; those that cannot be asked come first.

    `shots` are example turns that are put before the first turn of each conversation, after its system text.
    """
    prompts: list[list[int]] = []
    places: list[int] = []
    unasked: list[tuple[int, Answer]] = []
    for index, question in enumerate(questions):
        try:
            prompt = renderer.prompt_ids(with_shots(question.messages, shots), question.tools, question.thinking)
        except TemplateRefused as error:
            warn(f"{question.id}: the chat template refuses it: {error}")
            unasked.append((index, Answer(question, "", None, "refused", 0)))
            continue
        if engine.new_tokens_allowed(len(prompt), 1) < 1:
            warn(f"{question.id}: its prompt of {len(prompt)} tokens fills the model's context; it gets no answer")
            unasked.append((index, Answer(question, "", None, "too_long", 0)))
            continue
        prompts.append(prompt)
        places.append(index)
    if unasked:
        yield unasked
    for batch in engine.answers(prompts, renderer.stop_ids, sampling):
        done = []
        for place, generated in batch:
            question = questions[places[place]]
            reasoning, text = split_answer(renderer.decode(generated.ids))
            finish: Finish = "stop" if generated.stopped else "length"
            done.append((places[place], Answer(question, text, reasoning, finish, len(generated.ids))))
        yield done


def with_shots(messages: Sequence[Message], shots: Sequence[Message]) -> list[Message]:
    """The conversation with example turns before its first turn, after its system text."""
    system = 1 if messages and messages[0].role == "system" else 0
    return [*messages[:system], *shots, *messages[system:]]


def predict_file(
    questions: Sequence[Question],
    out: Path,
    settings: Mapping[str, Any],
    open_engine: Callable[[], tuple[Engine, Renderer]],
    sampling: Sampling,
    *,
    overwrite: bool = False,
) -> dict[str, int]:
    """Answer questions into a jsonl file of {id, input, predict, target, finish, ...}; returns how many ended how.

    Answers are written as they end; a power cut loses no more than a second's. A run that was broken off goes on
    where it was: answered ids are skipped and a torn last line is removed. `settings` (everything that shapes the
    answers) lies beside the file, and answers of other settings are never mixed in. At the end the rows are in the
    order of the questions.

    Raises:
        InputError: the file was written with other settings, by something else, or for other questions.
    """
    begun = _begin(out, settings, overwrite)
    by_id = {question.id: question for question in questions}
    for name, row in begun.items():
        if name in by_id and (row["input"], row["target"]) != (by_id[name].input, by_id[name].target):
            raise InputError(f"{out}: its row {name!r} answers another question than the data has now; use --overwrite")
    missing = [question for question in questions if question.id not in begun]
    if begun:
        note(f"{out}: {len(questions) - len(missing)} of {len(questions)} questions are answered already")
    if missing:
        engine, renderer = open_engine()
        with out.open("ab") as file, progress("predicting", len(questions), len(questions) - len(missing)) as advance:
            synced = time.monotonic()
            for batch in answer_in_batches(engine, renderer, missing, sampling):
                file.write(b"".join(_line(answer.row) for _, answer in batch))
                file.flush()  # the process may be killed now
                if time.monotonic() - synced > 1:
                    os.fsync(file.fileno())  # the machine may lose its power now
                    synced = time.monotonic()
                advance(len(batch), "")
    rows = {row["id"]: row for row in _rows(out)}
    ordered = [rows.pop(question.id) for question in questions] + list(rows.values())
    write_atomic(out, b"".join(map(_line, ordered)))
    counts = dict.fromkeys(("stop", "length", "too_long", "refused"), 0)
    for row in ordered[: len(questions)]:
        counts[row["finish"]] += 1
    return counts


ENDED = {
    "stop": ("ended by itself", "ended by themselves"),
    "length": ("cut at the longest length", "cut at the longest length"),
    "too_long": ("not asked, the prompt fills the context", "not asked, their prompts fill the context"),
    "refused": ("refused by the chat template", "refused by the chat template"),
}
"""What `finish` means for one answer and for several."""


def counts_in_words(counts: Mapping[str, int]) -> str:
    """`12 answers: 10 ended by themselves, 2 cut at the longest length`."""
    ended = (f"{count} {one_or_many(count, *ENDED[name])}" for name, count in counts.items() if count)
    return f"{counted(sum(counts.values()), 'answer')}: {', '.join(ended)}"


def read_questions(data: Sequence[str], thinking: bool | None, limit: int | None = None) -> tuple[list[Question], int]:
    """The questions of files, the first `limit` of them, and how many rows were rejected.

    Raises:
        InputError: a file cannot be read, or nothing in them asks anything.
    """
    loaded = load_sources([Source(path=path) for path in data], require_answer=False)
    for reject in loaded.rejects[:3]:
        warn(f"{reject.file}:{reject.line}: {reject.field}: {reject.reason}")
    questions, silent = questions_of(loaded.conversations, thinking)
    if silent:
        asks = one_or_many(silent, "asks nothing (raw text) and is", "ask nothing (raw text) and are")
        warn(f"{silent} of {counted(len(loaded.conversations), 'conversation')} {asks} left out")
    if not questions:
        raise InputError(f"{', '.join(data)}: no questions among {counted(loaded.read, 'row')}")
    return list(questions[:limit]), len(loaded.rejects)


def write_predictions(path: Path, answers: Sequence[Answer]) -> None:
    """A predictions file in one go."""
    write_atomic(path, b"".join(_line(answer.row) for answer in answers))


def answer_settings(
    model: str,
    weights: str,
    renderer: Renderer,
    sampling: Sampling,
    engine: EngineName = "auto",
    base: str | None = None,
    quantize: str = "none",
) -> dict[str, Any]:
    """Everything that shapes an answer, for the file beside the predictions."""
    template = hashlib.sha256(renderer.template.encode()).hexdigest()[:16]
    settings = {
        "model": _anywhere(model), "weights": weights, "template": template, "sampling": sampling.model_dump()
    }  # fmt: skip
    if base is not None:
        settings |= {"base": _anywhere(base), "quantize": quantize}
    return settings | ({"engine": engine} if engine == "vllm" else {})  # its kernels round otherwise


def _anywhere(name: str) -> str:
    """The same model, wherever it is named from."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def settings_path(out: Path) -> Path:
    """Where the settings of a predictions file lie."""
    return out.with_name(out.name + ".settings.json")


def _begin(out: Path, settings: Mapping[str, Any], overwrite: bool) -> dict[str, dict[str, Any]]:
    """Rows that are there already, by id, after checking that they belong to the same settings."""
    beside = settings_path(out)
    if out.is_dir():
        raise InputError(f"{out}: a folder; give --out the name of a file in it")
    if overwrite or not out.exists():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(beside, json.dumps(settings, indent=1, ensure_ascii=False))
            out.write_bytes(b"")
        except OSError as error:
            raise InputError(f"{out}: cannot be written ({error.strerror}); choose another place with --out") from None
        return {}
    if not beside.is_file():
        raise InputError(f"{out}: exists and was not begun by graft predict; choose another --out, or --overwrite")
    before = _read_settings(beside)
    differences = [f"{key}: {old!r} there, {new!r} now" for key, old, new in _differences(before, json_form(settings))]
    if differences:
        raise InputError(
            f"{out}: was begun with other settings ({'; '.join(differences)}); choose another --out, or --overwrite"
        )
    _cut_torn_line(out)
    rows = list(_rows(out))
    if not all(isinstance(row.get(key), str) for row in rows for key in ("id", "input")):
        raise InputError(f"{out}: has rows without id or input, so graft did not write it; choose another --out")
    return {row["id"]: row for row in rows}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: cannot be read as settings; remove it and its predictions, or use --overwrite")
    return settings


def json_form(value: Any) -> Any:
    """The value as it comes back from JSON (tuples are lists there)."""
    return json.loads(json.dumps(value))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def _cut_torn_line(path: Path) -> None:
    """Remove what a crash left of a last line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError:
            raise InputError(
                f"{path}:{number}: not JSON; the file was changed by something else, use --overwrite"
            ) from None


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, default=str).encode(errors="backslashreplace") + b"\n"


def sampling_shown(sampling: Sampling) -> str:
    """The effective sampling in words, for the log."""
    values = sampling.model_dump()
    if sampling.temperature == 0:
        values = {key: value for key, value in values.items() if key not in ("temperature", "top_p", "top_k", "seed")}
    kind = "beams" if sampling.num_beams > 1 else "sampled" if sampling.temperature > 0 else "greedy"
    return f"{kind}: " + ", ".join(f"{key} {value}" for key, value in values.items())
