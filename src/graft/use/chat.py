"""A conversation with a model: its history, its commands, and text that streams in whole characters.

Speaks messages and text; prints nothing, so that everything here can be tested without a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from graft.config.base import did_you_mean
from graft.config.train import Sampling
from graft.data.write import as_row
from graft.errors import GraftError, InputError
from graft.model.answers.room import Model
from graft.model.answers.stream import PromptMemory, Stream
from graft.runs import append_jsonl
from graft.tokens.renderer import Renderer
from graft.types import Conversation, Message, Origin
from graft.use.predict import split_answer
from graft.words import counted

COMMANDS = {
    "/system": "TEXT sets the system text and starts afresh; without TEXT there is none",
    "/undo": "takes the last question and its answer back",
    "/retry": "answers the last question again, with another seed where sampling is on",
    "/reset": "forgets the conversation, keeps the system text",
    "/save": "FILE appends the conversation to a chat-messages jsonl file, good as training data",
    "/help": "shows this",
    "/exit": "ends the chat (so does Ctrl-D)",
}


class Detokenizer:
    """Ids to text, piece by piece, in whole characters: what `push` and `finish` give out, joined, is the full decode.

    A character may be spread over several tokens (byte-level and byte-fallback vocabularies), and some decoders look
    at a token's neighbours. So a piece is the difference between decoding a few settled tokens without and with the
    new ones, given out only when it does not end in a broken character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token of the window that is decoded
        self._given = 0  # tokens before this are given out

    def push(self, token: int) -> str:
        """The text that is whole now; often a word, sometimes nothing."""
        self._ids.append(token)
        before, after = self._texts()
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        """What was held back, without the broken character that an answer cut by its limit may end in."""
        before, after = self._texts()
        self._start = self._given = len(self._ids)
        return after[len(before) :].rstrip("\ufffd")

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._ids[self._start : self._given]), self._decode(self._ids[self._start :])


@dataclass(frozen=True, slots=True)
class Speed:
    """How the last answer went."""

    tokens: int
    seconds: float
    finish: str
    """`stop`, `length`, or `interrupted`."""

    def __str__(self) -> str:
        rate = f"{self.tokens / self.seconds:.0f} tokens/s" if self.seconds > 0 else "-"
        ended = {"length": ", cut at the limit of new tokens", "interrupted": ", stopped by you"}.get(self.finish, "")
        return f"{counted(self.tokens, 'token')}, {rate}{ended}"


@dataclass(frozen=True, slots=True)
class Reply:
    """What a command wants done: text to show, a question to answer, an end."""

    text: str = ""
    answer: bool = False
    """The last question is to be answered (again)."""
    exit: bool = False


@dataclass(slots=True)
class ChatSession:
    """One conversation. `messages` is what the model is shown, system text first."""

    model: Model
    renderer: Renderer
    sampling: Sampling
    system: str | None = None
    thinking: bool | None = None
    messages: list[Message] = field(default_factory=list)
    speed: Speed | None = None
    _memory: PromptMemory = field(default_factory=PromptMemory)
    _retries: int = 0

    def __post_init__(self) -> None:
        self._start()

    def ask(self, text: str) -> Generator[str]:
        """Pieces of the answer to a new question, as they come.

        The answer joins the history when it ends, or when the reader closes it early (what was said until then). Where
        nothing could be said the question is taken back.

        Raises:
            GraftError: the template refuses the conversation, or it no longer fits the model's context.
        """
        self._retries = 0
        self.messages.append(Message("user", text))
        return self.answer()

    def answer(self) -> Generator[str]:
        """Pieces of the answer to the last message of the history, which is the user's."""
        detokenizer = Detokenizer(self.renderer.decode)
        said: list[str] = []
        began, tokens, finish = time.perf_counter(), 0, "interrupted"
        try:
            prompt = self.renderer.prompt_ids(self.messages, (), self.thinking)
            sampling = self.sampling.model_copy(update={"seed": self.sampling.seed + self._retries})
            stream = Stream(self.model, prompt, self.renderer.stop_ids, sampling, self._memory)
            for token in stream:
                tokens += 1
                if piece := detokenizer.push(token):
                    said.append(piece)
                    yield piece
            finish = "stop" if stream.stopped else "length"
            if piece := detokenizer.finish():
                said.append(piece)
                yield piece
        except GraftError:
            self.messages.pop()
            raise
        finally:
            self.speed = Speed(tokens, time.perf_counter() - began, finish)
            self._keep("".join(said), finish)

    def _keep(self, said: str, finish: str) -> None:
        if not self.messages or self.messages[-1].role != "user":
            return
        if finish == "interrupted" and not said:
            self.messages.pop()
            return
        reasoning, content = split_answer(said)
        self.messages.append(Message("assistant", content, reasoning=reasoning))

    def command(self, line: str) -> Reply:
        """Carry out `/name argument`.

        Raises:
            InputError: there is no such command, or it cannot be carried out; the conversation is unchanged.
        """
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        actions: dict[str, Callable[[str], Reply]] = {
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: Reply("\n".join(f"{name:<8} {what}" for name, what in COMMANDS.items())),
            "/exit": lambda _: Reply(exit=True),
        }
        if name not in actions:
            hint = did_you_mean(name, list(COMMANDS)) or "; /help lists them all"
            raise InputError(f"{name}: no such command{hint}")
        return actions[name](argument)

    def _start(self) -> None:
        self.messages = [Message("system", self.system)] if self.system else []

    def _system(self, text: str) -> Reply:
        self.system = text or None
        self._start()
        return Reply("system text set; the conversation starts afresh" if text else "no system text; starting afresh")

    def _undo(self, _: str) -> Reply:
        place = self._last_question()
        question = self.messages[place].content
        del self.messages[place:]
        return Reply(f"taken back: {question}")

    def _retry(self, _: str) -> Reply:
        place = self._last_question()
        del self.messages[place + 1 :]
        self._retries += 1
        said = (
            ""
            if self.sampling.temperature > 0
            else "sampling is greedy, so the answer will be the same (--temperature)"
        )
        return Reply(said, answer=True)

    def _reset(self, _: str) -> Reply:
        self._start()
        return Reply("the conversation is forgotten")

    def _save(self, file: str) -> Reply:
        if not file:
            raise InputError("/save needs a file: /save chat.jsonl")
        if not any(message.role == "assistant" for message in self.messages):
            raise InputError("there is nothing to save yet")
        path = Path(file).expanduser()
        name = f"chat-{time.strftime('%Y%m%d-%H%M%S')}"
        # Reasoning in earlier turns is kept: it is what the model said.
        conversation = Conversation(name, Origin(str(path), 0), tuple(replace(message) for message in self.messages))
        try:
            append_jsonl(path, as_row(conversation))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from None
        return Reply(f"saved to {path}")

    def _last_question(self) -> int:
        places = [index for index, message in enumerate(self.messages) if message.role == "user"]
        if not places:
            raise InputError("there is no question yet")
        return places[-1]
