"""Real chat templates, each with a real tokenizer that suits it.

The rule: the tokenizer that has a BOS and an EOS where the template reads them and, of those, most of the control
tokens that the template's text names. The control tokens that it lacks are added to it as special tokens.
"""

from __future__ import annotations

import datetime
import functools
import re
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graft.tokens import chat_template
from graft.tokens.load import finish
from graft.tokens.renderer import Renderer

MATERIAL = Path(__file__).resolve().parents[2] / "shared" / "material"

CONTROL = re.compile(
    r"<\|[^|<>\s'\"{}]{1,40}\|?>|<\w+\|>|<｜[^｜<>\s]+｜>|\[/?[A-Z][A-Z_]+\]|\[\|\w+\|\]|</?(?:start|end)_of_\w+>"
    r"|<(?:sep|eos|bos|seed:\w+|beginning_of_sentence|end_of_sentence|s|/s|image)>|<\]\w+\[>"
)


def template_names() -> list[str]:
    """Names of all templates: the collection's, then those that tokenizers carry."""
    loose = [path.stem for path in sorted((MATERIAL / "chat_templates").glob("*.jinja"))]
    own = [f"own:{path.parent.name}" for path in sorted((MATERIAL / "tokenizers").glob("*/chat_template.jinja"))]
    return loose + own


def template_text(name: str) -> str:
    if name.startswith("own:"):
        return (MATERIAL / "tokenizers" / name.removeprefix("own:") / "chat_template.jinja").read_text("utf-8")
    return (MATERIAL / "chat_templates" / f"{name}.jinja").read_text("utf-8")


def controls(text: str) -> set[str]:
    """Control tokens that the template's text names."""
    return set(CONTROL.findall("\n".join(chat_template.written_literals(text))))


@functools.cache
def _loaded() -> dict[str, PreTrainedTokenizerFast]:
    names = sorted(path.parent.name for path in (MATERIAL / "tokenizers").glob("*/tokenizer.json"))
    return {name: AutoTokenizer.from_pretrained(MATERIAL / "tokenizers" / name) for name in names}


@functools.cache
def pairs() -> dict[str, str]:
    """Template -> tokenizer. Tokenizers get the control tokens that their templates need; done once for all."""
    found: dict[str, str] = {}
    missing: dict[str, set[str]] = {}
    vocabularies = {name: set(tokenizer.get_added_vocab()) for name, tokenizer in _loaded().items()}
    for name in template_names():
        text = template_text(name)
        wanted = [token for token in ("bos_token", "eos_token") if token in text]

        def fit(base: str, text: str = text, wanted: list[str] = wanted) -> tuple:
            has = all(getattr(_loaded()[base], token) for token in wanted)
            return has, len(controls(text) & vocabularies[base]), base == "llama-3.1-instruct", base == "qwen2.5"

        found[name] = name.removeprefix("own:") if name.startswith("own:") else max(sorted(vocabularies), key=fit)
        missing.setdefault(found[name], set()).update(controls(text) - vocabularies[found[name]])
    for base, tokens in missing.items():
        _loaded()[base].add_tokens(sorted(tokens), special_tokens=True)
    return found


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    return _loaded()[pairs()[name]]


@functools.cache
def renderer_of(name: str, date: datetime.date) -> Renderer:
    """The template with its tokenizer, as `load_renderer` would put them together."""
    text = template_text(name)
    plain = Renderer(tokenizer_of(name), text, name, date, (), None, chat_template.switches_of(text))
    return finish(plain, [], [])
