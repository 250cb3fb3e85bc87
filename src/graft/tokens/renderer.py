"""The one place that turns messages into a prompt: training, evaluation, prediction, chat and the server all ask here.

Speaks messages, text and ids. Knows no model, no loss and no targets.

The text comes from transformers' `apply_chat_template(tokenize=False)` and is tokenised without adding special tokens:
what a template needs, it writes itself, so a second BOS cannot appear. transformers is imported when a tokenizer is
loaded, because the import takes seconds.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graft.errors import ConfigError, GraftError, InputError
from graft.tokens import chat_template
from graft.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = "1"
"""Version of the rules by which messages become ids; raise it with any change that moves an id."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json", "*.tiktoken", "tokenization_*.py", "sentencepiece*.model", "vocab.bpe",
)  # fmt: skip


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
        """
        source = self.tool_template if tools and self.tool_template is not None else self.template
        try:
            text = self.tokenizer.apply_chat_template(
                [message_dict(message, self.content_parts, self.string_arguments) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=chat_template.with_fixed_date(source, self.date),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **cast("dict[str, Any]", self.switch_values(thinking)),
            )
        except Exception as error:  # a template is a program of a stranger: it may raise anything
            raise TemplateRefused(_said(error)) from None
        assert isinstance(text, str)
        return text

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

    def ids(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of several texts, [len(texts)] lists; nothing is added to what the texts say unless asked for."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included and no blank tidied away."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer and chat template there, as transformers, PEFT and vLLM load them."""
        self.tokenizer.save_pretrained(str(folder))

    def fingerprint(self) -> str:
        """Hash of everything here that shapes ids; equal hashes give equal ids for equal conversations."""
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


def load_renderer(
    model_path: str, template: str | None = None, date: str | None = None, trust_remote_code: bool = False
) -> Renderer:
    """Tokenizer and chat template of a model folder, a folder with only a tokenizer, or a Hugging Face id.

    Args:
        model_path: a folder never opens a socket.
        template: None takes the model's own, or graft's `chatml` where it has none; else one of graft's names, or the
            path of a Jinja file.
        date: the day (YYYY-MM-DD) told to templates that write one; None is today.
        trust_remote_code: run tokenizer code that comes with the model.

    Raises:
        InputError: there is no such folder, or no tokenizer in it.
        ConfigError: the template is not known, or the date is not a date.
    """
    day = _parse_date(date)
    tokenizer = _load_tokenizer(model_path, trust_remote_code)
    generation_stops = _generation_stops(model_path)
    notes = _give_eos(tokenizer, generation_stops)
    name, text, tool_text = _choose_template(tokenizer, template, model_path, notes)
    tokenizer.chat_template = text if tool_text is None else {"default": text, "tool_use": tool_text}
    plain = Renderer(tokenizer, text, name, day, (), tool_text, chat_template.switches_of(text + (tool_text or "")))
    return finish(plain, generation_stops, notes)


def finish(plain: Renderer, generation_stops: Sequence[int], notes: Sequence[str]) -> Renderer:
    """Complete a renderer by what rendering with it shows: the form of content it wants, and its stop ids."""
    from graft.tokens import probe

    said = list(notes)
    shaped = replace(plain, content_parts=probe.wants_parts(plain))
    if shaped.content_parts:
        said.append("the template takes content as a list of parts; it is given that form")
    shaped = replace(shaped, string_arguments=probe.wants_string_arguments(shaped))
    if shaped.string_arguments:
        said.append("the template takes tool-call arguments as JSON text; it is given that form")
    eos = shaped.tokenizer.eos_token_id
    stops = list(dict.fromkeys([*generation_stops, *([eos] if isinstance(eos, int) else [])]))
    stops += [stop for stop in probe.stops_of_template(shaped, stops) if stop not in stops]
    if not stops:
        said.append("neither the tokenizer nor the template has a token that ends a turn")
    opening = probe.default_system(shaped)
    if opening:
        said.append(f"the template writes a default system text where a conversation has none: {opening[:60]!r}")
    if chat_template.uses_date(plain.template + (plain.tool_template or "")):
        said.append(f"the template writes the date; it is told {plain.date.isoformat()}")
    return replace(shaped, stop_ids=tuple(stops), notes=tuple(said), memory={})


def _parse_date(date: str | None) -> datetime.date:
    if date is None:
        return datetime.date.today()
    try:
        return datetime.date.fromisoformat(date)
    except ValueError:
        raise ConfigError(
            f"encode.date = {date!r} is not a day; write it as YYYY-MM-DD, for example 2026-01-31"
        ) from None


def _load_tokenizer(model_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    folder = Path(model_path).expanduser()
    local = folder.is_dir()
    if not local and (
        folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path) or model_path.startswith(".")
    ):
        raise InputError(f"{model_path}: no such folder; give a model folder, a tokenizer folder or a Hugging Face id")
    if local and not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise InputError(
            f"{model_path}: no tokenizer in this folder (looked for tokenizer.json, tokenizer.model, vocab.json ...); "
            "copy the files of the model's tokenizer there"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder) if local else model_path, local_files_only=local, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # anything from a torn file to an unknown class
        raise InputError(f"{model_path}: its tokenizer cannot be loaded ({_said(error)})") from None
    return tokenizer


def _give_eos(tokenizer: PreTrainedTokenizerBase, generation_stops: Sequence[int]) -> list[str]:
    """Name the EOS token of a tokenizer that has none by what generation stops at; says so."""
    # Only a token that stands apart from text can end it: id 0 of a byte-level vocabulary is a byte like any other.
    known = [stop for stop in generation_stops if stop in tokenizer.added_tokens_decoder]
    if tokenizer.eos_token_id is not None or not known:
        return []
    tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(known[0]))
    return [f"the tokenizer names no EOS token; generation_config's {tokenizer.eos_token!r} is used"]


def _choose_template(
    tokenizer: PreTrainedTokenizerBase, wanted: str | None, model_path: str, notes: list[str]
) -> tuple[str, str, str | None]:
    """Name, text, and the text for talk with tools where that differs; what was decided is added to `notes`."""
    own = tokenizer.chat_template
    if wanted is None and own:
        if isinstance(own, str):
            return "model", own, None
        default = own.get("default") or own.get("tool_use")
        if default is None:
            names = ", ".join(sorted(own))
            raise InputError(f"{model_path}: has chat templates {names}, but no default; name a Jinja file as template")
        return "model", default, own.get("tool_use")
    if wanted is None:
        notes.append("the model has no chat template; graft's `chatml` is used (see --template)")
    name = wanted or "chatml"
    if name not in chat_template.OURS:
        return name, chat_template.read_template_file(name), None
    if tokenizer.eos_token_id is None:
        if wanted is not None:
            raise InputError(
                f"{model_path}: its tokenizer has no EOS token, and template `{name}` needs one to end an answer; "
                "set eos_token in tokenizer_config.json"
            )
        notes.append("the tokenizer has no EOS token either: only raw text can be trained on")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return name, chat_template.our_template(name, adds_bos, "<|im_end|>" in tokenizer.get_added_vocab()), None


def _generation_stops(model_path: str) -> list[int]:
    """EOS ids of generation_config.json, which often holds more than the tokenizer's one."""
    folder = Path(model_path).expanduser()
    if folder.is_dir():
        file: str | None = str(folder / "generation_config.json")
    else:
        from transformers.utils.hub import cached_file

        file = cached_file(
            model_path,
            "generation_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if file is None or not Path(file).is_file():
        return []
    try:
        eos = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file}: not a JSON object ({error}); mend it or remove it") from None
    return [item for item in (eos if isinstance(eos, list) else [eos]) if isinstance(item, int)]


def _serialised(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that shapes a tokenizer's ids, as text."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return str(tokenizer.backend_tokenizer.to_str())
    added = {str(key): str(value) for key, value in tokenizer.added_tokens_decoder.items()}
    return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), added], sort_keys=True)


def _said(error: Exception) -> str:
    """The first line of an error, with its kind where it says little by itself."""
    lines = str(error).strip().splitlines()
    first = lines[0].strip() if lines else ""
    kind = type(error).__name__
    return first if kind == "TemplateError" and first else f"{kind}: {first}" if first else kind
