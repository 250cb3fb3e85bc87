"""Text as an eye can trust it: characters that cannot be seen, or that reorder what can, are written out.

Speaks of text alone. Data comes from strangers: an escape sequence can drive a terminal, a bidi override can show a
sentence backwards ("Trojan Source", CVE-2021-42574), tag characters can carry words that nobody sees.
"""

from __future__ import annotations

import re

_PICTURES = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "\u2421"}
"""Unicode's own pictures of the control characters: ␀ ... ␛ ... ␟ ␡."""

_HIDDEN = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, but for tab and line feed
    "\xad\u034f\u115f\u1160\u17b4\u17b5\u180e\u3164\uffa0"  # letters and hyphens without a width
    "\u200b\u2060-\u2064\ufeff\ufff9-\ufffb"  # blanks without a width, invisible operators, annotations
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u206a-\u206f"  # bidi marks, embeddings, overrides, isolates
    "\u2028\u2029"  # separators that some programs take for line breaks
    "\ud800-\udfff\ufffe\uffff"  # halves of pairs, no characters
    "\U000e0000-\U000e007f"  # tags
    "]"
)
"""The joiners U+200C and U+200D and the variation selectors stay: emoji, Persian and the scripts of India need them."""


def escape_hidden(text: str) -> str:
    """Text with every hidden character as its picture (`␛`) or number (`⟨U+202E⟩`); tabs and line feeds stay."""
    return _HIDDEN.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return _PICTURES.get(code) or f"\u27e8U+{code:04X}\u27e9"


def shorten(text: str, most: int) -> str:
    """The beginning of a text of more than `most` characters, with how many were left out."""
    return text if len(text) <= most else f"{text[:most]} \u2026 [{len(text) - most:,} more characters]"
