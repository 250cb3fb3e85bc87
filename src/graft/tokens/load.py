"""From a model folder to a Renderer: its tokenizer, its chat template or one of ours, and what ends a turn.

Speaks paths, templates and token ids. Knows no conversations and no model. transformers is imported when a tokenizer
is loaded, because the import takes seconds.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from graft.console import note, warn
from graft.errors import ConfigError, InputError, first_line
from graft.tokens import chat_template, probe
from graft.tokens.renderer import Renderer
from graft.tokens.trust import explained
from graft.visible import escape_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json", "*.tiktoken", "tokenization_*.py", "sentencepiece*.model", "vocab.bpe",
)  # fmt: skip

NO_END = (
    "the tokenizer has neither an EOS token nor `<|im_end|>`, so no answer could end: conversations will be rejected, "
    "only raw text can be trained on; set eos_token in tokenizer_config.json"
)
IN_PIECES = "`<|im_start|>`, which `chatml` writes, is no token of this vocabulary"
WEIGHTY = (NO_END, IN_PIECES)
"""Beginnings of notes that tell of something to be mended."""


def say_notes(renderer: Renderer) -> None:
    """Tell the user what was decided about the template."""
    for text in renderer.notes:
        say = warn if text.startswith(WEIGHTY) else note
        say(escape_hidden(text))


def load_renderer(
    model_path: str,
    template: str | None = None,
    date: str | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[str] = (),
) -> Renderer:
    """Tokenizer and chat template of a model folder, a folder with only a tokenizer, or a Hugging Face id.

    Args:
        model_path: a folder never opens a socket.
        template: None takes the model's own, or graft's `chatml` where it has none; else one of graft's names, or the
            path of a Jinja file.
        date: the day (YYYY-MM-DD) told to templates that write one; None is today.
        trust_remote_code: run tokenizer code that comes with the model.
        new_tokens: words that become one token each.

    Raises:
        InputError: there is no such folder, or no tokenizer in it.
        ConfigError: the template is not known, the date is not a date, or a new token is none.
    """
    day = _parse_date(date)
    tokenizer = _load_tokenizer(model_path, trust_remote_code)
    added = _add_tokens(tokenizer, new_tokens)
    # An id that the tokenizer does not have can end nothing.
    generation_stops = [stop for stop in _generation_stops(model_path) if 0 <= stop < len(tokenizer)]
    notes = _give_eos(tokenizer, generation_stops)
    name, text, tool_text = _choose_template(tokenizer, template, model_path, notes)
    shown = f"of {model_path}" if name == "model" else name
    for one in (text, tool_text or ""):
        chat_template.check_syntax(shown, one)
    tokenizer.chat_template = text if tool_text is None else {"default": text, "tool_use": tool_text}
    plain = Renderer(
        tokenizer,
        text,
        name,
        day,
        (),
        tool_text,
        chat_template.switches_of(text + (tool_text or "")),
        new_tokens=added,
    )
    return finish(plain, generation_stops, notes)


def _add_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """Teach the tokenizer whole words; returns their ids, each with the ids that its text had before."""
    from tokenizers import AddedToken

    before = {word: tuple(tokenizer.encode(word, add_special_tokens=False)) for word in words}
    for word, pieces in before.items():
        if not word.strip() or len(pieces) == 1:
            reason = "is empty" if not word.strip() else f"is one token already (id {pieces[0]})"
            raise ConfigError(f"new_tokens: {word!r} {reason}; leave it out")
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in before])
    vocabulary = tokenizer.get_vocab()
    return {vocabulary[word]: pieces for word, pieces in before.items()}


def finish(plain: Renderer, generation_stops: Sequence[int], notes: Sequence[str]) -> Renderer:
    """Complete a renderer by what rendering with it shows: the form of content it wants, and its stop ids."""
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
        begins = opening if len(opening) <= 60 else f"{opening[:60]}…"
        said.append(f"the template writes a default system text where a conversation has none: {begins!r}")
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


def find_folder(model_path: str) -> Path | None:
    """The folder with a tokenizer that a path names; None where it is a name on the hub.

    Raises:
        InputError: there is no such folder, or no tokenizer in it.
    """
    folder = Path(model_path).expanduser()
    local = folder.is_dir()
    if not local and (
        folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_path) or model_path.startswith(".")
    ):
        what = "a file, not a model's folder" if folder.is_file() else "no such folder"
        raise InputError(f"{model_path}: {what}; give a model folder, a tokenizer folder or a Hugging Face id")
    if local and (folder / "config.yaml").is_file() and (folder / "final").is_dir():
        raise InputError(f"{model_path}: a run folder, not a model; give {folder / 'final'}")
    if local and not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise InputError(
            f"{model_path}: no tokenizer in this folder (looked for tokenizer.json, tokenizer.model, vocab.json ...); "
            "copy the files of the model's tokenizer there"
        )
    return folder if local else None


def _load_tokenizer(model_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    folder = find_folder(model_path)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder or model_path), local_files_only=folder is not None, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # anything from a torn file to an unknown class
        why = explained(error, model_path) or f"its tokenizer cannot be loaded ({first_line(error)})"
        raise InputError(f"{model_path}: {why}") from None
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
        notes.append(
            "the model has no chat template; graft's `chatml` is used (--template, in training encode.template, names "
            "another)"
        )
    name = wanted or "chatml"
    if name not in chat_template.OURS:
        return name, chat_template.read_template_file(name), None
    has_im_end = "<|im_end|>" in tokenizer.get_added_vocab()
    if tokenizer.eos_token_id is None and not (name == "chatml" and has_im_end):
        if wanted is not None:
            raise InputError(
                f"{model_path}: its tokenizer has no EOS token, and template `{name}` needs one to end an answer; "
                "set eos_token in tokenizer_config.json"
            )
        notes.append(NO_END)
    pieces = len(tokenizer.encode("<|im_start|>", add_special_tokens=False))
    if name == "chatml" and pieces > 1:
        notes.append(
            f"{IN_PIECES}, so each turn begins with {pieces} pieces in its place; train it as one with "
            "new_tokens=['<|im_start|>','<|im_end|>'], or take a template without it: alpaca, vicuna, llama2"
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return name, chat_template.our_template(name, adds_bos, has_im_end), None


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
