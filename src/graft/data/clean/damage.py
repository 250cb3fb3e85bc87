"""Encoding damage: undone where that is certain, and measured where the text is lost.

Speaks of texts. Repaired are UTF-8 that was read as another encoding (`Ã©`), control characters, terminal colours,
line ends of other systems and letters with accents apart. Lost is what became U+FFFD or 锟斤拷: no rule brings it back.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

from graft.config.clean import Damage
from graft.data.clean.step import Drop, Notes, Result, edit_texts, texts
from graft.types import Conversation

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

_LOST = re.compile("\ufffd|锟斤拷|锟斤|斤拷锟")
"""GBK's reading of U+FFFD's bytes, twice over, is 锟斤拷."""
_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ufeff\ufffe\uffff]")
_LINE_END = re.compile("\r+\n?|\u2028|\u2029")
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""What any of the three above begins with: most texts have none, and one look is enough to know."""
_APART = re.compile("[^\u0300-\u036f\u3099\u309a][\u0300-\u036f\u3099\u309a]+")
"""A letter and its combining accents (Latin, Greek, Cyrillic; kana's sound marks)."""
_BROKEN = "Ã©, â€™ or å¥½"


def repair_damage(conversation: Conversation, settings: Damage, notes: Notes) -> Result:
    """The conversation with all certain repairs made; dropped where too large a share of a turn is lost."""
    repaired = edit_texts(conversation, lambda _role, text: repair_text(text, notes), calls=True)
    for field, _, text in texts(repaired):
        lost = sum(len(found[0]) for found in _LOST.finditer(text))
        if lost:
            notes["lost characters"] += lost
        if lost > settings.lost * len(text):
            share = f"{lost} of {len(text)} characters ({lost / len(text):.1%})"
            return Drop(field, f"{share} were lost to a wrong encoding; {settings.lost:.1%} may be")
    return repaired


def repair_text(text: str, notes: Notes | None = None) -> str:
    """The text with its certain damage undone; `notes` counts the kinds."""
    found = Notes() if notes is None else notes
    if not text.isascii():
        text = _noted(text, _fix_encoding(text), f"read in a wrong encoding ({_BROKEN})", found)
        text = _noted(text, _APART.sub(_composed, text), "accents apart from their letters", found)
    if not _ODD.search(text):
        return text
    text = _noted(text, _TERMINAL.sub("", text), "terminal sequences", found)
    text = _noted(text, _LINE_END.sub(_line_end, text), "line ends of other systems", found)
    return _noted(text, _CONTROL.sub("", text), "control characters", found)


def _noted(before: str, after: str, kind: str, notes: Notes) -> str:
    if after != before:
        notes[kind] += 1
    return after


def _line_end(found: re.Match[str]) -> str:
    """`\\r\\n`, also with more `\\r`, is one line end; `\\r` without `\\n` is one each, as on old Macs."""
    return "\n" if found[0][-1] == "\n" else "\n" * len(found[0])


def _composed(found: re.Match[str]) -> str:
    return unicodedata.normalize("NFC", found[0])


def _fix_encoding(text: str) -> str:
    """ftfy's repair of mojibake alone: of all that it can do the only part that never touches sound text."""
    import ftfy

    return ftfy.fix_encoding(text, _ftfy_settings())


@cache
def _ftfy_settings() -> TextFixerConfig:
    """Only whole texts: where sound accents stand beside `Ã©`, somebody may be writing about it. No guesses at bytes
    that are missing either.
    """
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False, restore_byte_a0=False, replace_lossy_sequences=False, decode_inconsistent_utf8=False
    )
