"""Whether an answer chose right: a free-running model's text against the choices that its question offered.

Speaks of answers and of the columns that `make` writes. A pure function of both.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from graft.data.prompts.template import keys_of

_EDGES = " \t\r\n.,;:!?\"'`*_()[]{}<>。，；：！？“”‘’「」『』（）【】《》、"
_KEY = re.compile(r"^[\s(\[（【\"'“*]*([A-Za-z]|\d{1,3})(?![^\W_])[\s)\]）】.:：、,，\"'”*]*")
_LATIN = "[A-Za-z0-9_\u00c0-\u024f]"
_NEGATED = re.compile(r"(?:\bnot|\bno|\bnever|n't|\bisn t|不是?|并非|没有|非)\s*(?:a |an |the )?$")


def score(prediction: str, meta: Mapping[str, Any]) -> bool | None:
    """Whether the prediction names the right one of the choices.

    It may say the choice, its letter or number where the prompt gave the choices such keys, or a JSON object that
    holds it, with punctuation, case and width free, alone or inside a sentence that names no other choice. Naming
    none, several, or one behind a `not` is wrong.

    Args:
        prediction: what the model wrote.
        meta: columns of the conversation: `choices` in the order shown, `label` the right one, `form` (else "word").

    Returns:
        None where the columns hold no choices or no right one: such an answer is not scored by choices.
    """
    choices, label = meta.get("choices"), meta.get("label")
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2 or label not in choices:
        return None
    names = [str(choice) for choice in choices]
    return chosen(prediction, names, str(meta.get("form") or "word")) == str(label)


def chosen(prediction: str, choices: Sequence[str], form: str = "word") -> str | None:
    """The one choice that a text names, or None."""
    said = _inside_json(prediction) if form == "json" else prediction
    by_name = {plain(choice): choice for choice in choices}
    if plain(said) in by_name:
        return by_name[plain(said)]
    if form in ("letter", "number") and (found := _KEY.match(unicodedata.normalize("NFKC", said))):
        key, rest = found[1].upper(), unicodedata.normalize("NFKC", said)[found.end() :]
        by_key = dict(zip(keys_of(form, len(choices)), choices, strict=False))
        if not _is_article(key, rest, by_name):
            return _confirmed(by_key.get(key), rest, by_name)
    first = next((line for line in said.splitlines() if line.strip()), "")
    return by_name.get(plain(first)) or _mentioned(said, by_name)


def plain(text: str) -> str:
    """What is compared: NFKC, without case, outer punctuation and doubled blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().strip(_EDGES).split())


def _is_article(key: str, rest: str, by_name: Mapping[str, str]) -> bool:
    """Whether `A` begins a sentence, as in "A good film", and stands for no choice."""
    return key == "A" and rest[:1].islower() and plain(rest) not in by_name and _mentioned(rest, by_name) is None


def _confirmed(choice: str | None, rest: str, by_name: Mapping[str, str]) -> str | None:
    """The choice of a key, unless what follows names another one."""
    other = by_name.get(plain(rest)) or _mentioned(rest, by_name)
    return choice if other in (None, choice) else None


def _mentioned(said: str, by_name: Mapping[str, str]) -> str | None:
    """The only choice that occurs as whole words; a longer name hides a shorter one inside it."""
    text = " ".join(unicodedata.normalize("NFKC", said).casefold().split())
    found: set[str] = set()
    for name in sorted(by_name, key=len, reverse=True):
        pattern = _whole(name)
        for match in pattern.finditer(text):
            if _NEGATED.search(text[: match.start()]):
                return None
            found.add(by_name[name])
        text = pattern.sub("\x00", text)
    return found.pop() if len(found) == 1 else None


def _whole(name: str) -> re.Pattern[str]:
    """The name where it is no part of a longer Latin word; Chinese has no blanks between words."""
    before = rf"(?<!{_LATIN})" if name[:1].isascii() else ""
    after = rf"(?!{_LATIN})" if name[-1:].isascii() else ""
    return re.compile(f"{before}{re.escape(name)}{after}")


def _inside_json(prediction: str) -> str:
    """The one text value of a JSON object, in a code fence or not; the prediction itself where there is none."""
    start, end = prediction.find("{"), prediction.rfind("}")
    if 0 <= start < end:
        try:
            value = json.loads(prediction[start : end + 1])
        except (ValueError, RecursionError):
            return prediction
        texts = [item for item in value.values() if isinstance(item, str)] if isinstance(value, dict) else []
        if len(texts) == 1:
            return str(texts[0])
    return prediction
