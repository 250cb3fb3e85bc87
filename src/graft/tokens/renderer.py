"""The one place that turns messages into a prompt: training, evaluation, prediction, chat and the server all ask here.

Speaks messages, text and ids. Knows no model, no loss and no targets.

The text comes from transformers' `apply_chat_template(tokenize=False)` and is tokenised without adding special tokens:
what a template needs, it writes itself, so a second BOS cannot appear. transformers is imported when a tokenizer is
loaded, because the import takes seconds.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.errors import GraftError, first_line
from graft.tokens import chat_template
from graft.tokens.beginnings import Beginnings
from graft.tokens.direct import DirectTemplate, Rows
from graft.tokens.proof import Bytes, bytes_of
from graft.tokens.tokenise import Spelled, Tokeniser
from graft.tokens.watchdog import TemplateStopped, watched
from graft.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = "1"
"""Version of the rules by which messages become ids; raise it with any change that moves an id."""


class TemplateRefused(GraftError):
    """The chat template cannot write these messages; the message is the template's own reason."""


@dataclass(frozen=True)
class Renderer:
    """A tokenizer and the chat template that speaks through it."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    """Jinja text; a model's templates for talk without and with tools may differ, then `tool_template` is the other."""
    template_name: str
    """`model` (the tokenizer's own), one of graft's names, or the path of a Jinja file."""
    date: datetime.date
    """The day that `strftime_now` tells."""
    stop_ids: tuple[int, ...]
    """Every id that ends a turn: what the template writes there, the tokenizer's EOS, generation_config's EOS ids."""
    tool_template: str | None = None
    switches: tuple[str, ...] = ()
    """The template's own thinking switches (`enable_thinking` ...), empty where it has none."""
    content_parts: bool = False
    """Content is given as [{"type": "text", "text": ...}], for templates that drop a plain string."""
    string_arguments: bool = False
    """Tool-call arguments are given as JSON text, for templates that raise on parsed ones."""
    notes: tuple[str, ...] = ()
    """What was decided while loading that the user should know."""
    new_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Ids of the words that the settings added to the tokenizer, each with the ids that its text had before."""
    memory: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What was learnt about the template by rendering with it; only `probe` reads and writes it."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        generation_prompt: bool = True,
    ) -> str:
        """The text that the template writes.

        Args:
            messages: the turns, oldest first.
            tools: JSON schemas of the tools on offer.
            thinking: sets the template's own switches; None leaves them to the template. No effect without switches.
            generation_prompt: whether to end with what opens the assistant's turn.

        Raises:
            TemplateRefused: the template raises on these messages.
            TemplateStopped: it takes too long, or too much memory.
        """
        return self.render_rows(self.rows(messages), tools, thinking, generation_prompt)

    def rows(self, messages: Sequence[Message]) -> Rows:
        """Messages as the template wants them."""
        return Rows([message_dict(message, self.content_parts, self.string_arguments) for message in messages])

    def render_rows(
        self, rows: Rows, tools: Sequence[Mapping[str, Any]], thinking: bool | None, generation_prompt: bool
    ) -> str:
        """`render` of messages that `rows` has made ready."""
        template = self._direct_tools if tools else self._direct
        try:
            with watched(self.template_name):
                return template.render(rows, tools, generation_prompt, self.switch_values(thinking))
        except TemplateStopped:  # not this row's fault alone: the run ends
            raise
        except Exception as error:  # a template is a program of a stranger: it may raise anything
            raise TemplateRefused(_said(error)) from None

    def beginnings(
        self, rows: Rows, tools: Sequence[Mapping[str, Any]], thinking: bool | None, generation_prompt: bool
    ) -> Beginnings | None:
        """What one rendering of the rows tells of the renderings of their beginnings; None where it tells nothing."""
        template = self._direct_tools if tools else self._direct
        with watched(self.template_name):
            return template.beginnings(rows, tools, generation_prompt, self.switch_values(thinking))

    @functools.cached_property
    def _direct(self) -> DirectTemplate:
        return DirectTemplate(self.tokenizer, chat_template.with_fixed_date(self.template, self.date))

    @functools.cached_property
    def _direct_tools(self) -> DirectTemplate:
        if self.tool_template is None:
            return self._direct
        return DirectTemplate(self.tokenizer, chat_template.with_fixed_date(self.tool_template, self.date))

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), thinking: bool | None = None
    ) -> list[int]:
        """Ids that generation is given: those of `apply_chat_template(messages, add_generation_prompt=True)`.

        Raises:
            TemplateRefused: the template raises on these messages.
        """
        return self.ids([self.render(messages, tools, thinking)])[0]

    def switch_values(self, thinking: bool | None) -> dict[str, bool]:
        """The keyword arguments of `apply_chat_template` that turn the next turn's reasoning on or off."""
        if thinking is None:
            return {}
        return {name: thinking is chat_template.SWITCHES[name] for name in self.switches}

    @functools.cached_property
    def _tokeniser(self) -> Tokeniser:
        return Tokeniser(self.tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, [len(texts)] lists; nothing is added to what the texts say."""
        return self._tokeniser.ids(texts)

    def spelled(self, texts: Sequence[str]) -> list[Spelled]:
        """The same as arrays, and whether they are proven to say the texts."""
        return self._tokeniser.spelled(texts)

    def raw_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of raw texts, [len(texts)] lists, with the BOS or EOS that the tokenizer puts around a text."""
        return self._tokeniser.raw_ids(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included and no blank tidied away."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @functools.cached_property
    def _bytes(self) -> Bytes | None:
        return bytes_of(self.tokenizer)

    def says(self, ids: Sequence[int], text: str) -> bool:
        """Whether the ids decode to exactly this text."""
        proven = self._bytes is not None and self._bytes.say(ids, text)
        return proven or self.decode(ids) == text

    @functools.cached_property
    def bos(self) -> tuple[str, int] | None:
        """Text and id of the BOS token, or None where the tokenizer has none."""
        text = self.tokenizer.bos_token
        return (str(text), int(self.tokenizer.bos_token_id)) if text else None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer and chat template there, as transformers, PEFT and vLLM load them."""
        self.tokenizer.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        """Hash of everything here that shapes ids; equal hashes give equal ids for equal conversations."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        dated = chat_template.uses_date(self.template + (self.tool_template or ""))
        for part in (
            RULES,
            _serialised(self.tokenizer),
            json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str),
            self.template,
            self.tool_template or "",
            json.dumps([self.switches, self.content_parts, self.string_arguments, self.stop_ids]),
            self.date.isoformat() if dated else "",
        ):
            digest.update(len(part).to_bytes(8, "big") + part.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def message_dict(message: Message, content_parts: bool = False, string_arguments: bool = False) -> dict[str, Any]:
    """A message as chat templates want it; fields that it does not have are left out."""
    content: Any = [{"type": "text", "text": message.content}] if content_parts else message.content
    row: dict[str, Any] = {"role": message.role, "content": content}
    if message.reasoning is not None:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        row["tool_calls"] = [_call_dict(call, string_arguments) for call in message.tool_calls]
    if message.name is not None:
        row["name"] = message.name
    if message.tool_call_id is not None:
        row["tool_call_id"] = message.tool_call_id
    return row


def _call_dict(call: Mapping[str, Any], string_arguments: bool) -> dict[str, Any]:
    function = call.get("function")
    if not string_arguments or not isinstance(function, Mapping):
        return dict(call)
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}}


def _serialised(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that shapes a tokenizer's ids, as text."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return str(tokenizer.backend_tokenizer.to_str())
    added = {str(key): str(value) for key, value in tokenizer.added_tokens_decoder.items()}
    return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), added], sort_keys=True)


def _said(error: Exception) -> str:
    """What a template said, with the kind of error where it is not the template's own."""
    kind = type(error).__name__
    return first_line(error) if kind == "TemplateError" else f"{kind}: {first_line(error)}"
