"""Words of a chat page's buttons and counters that were saved with the text: "Copy code", "1 / 1".

Speaks of texts that are markdown or plain. Only places where a page puts such words are looked at: the head of a code
block, the first and the last line of a message. The same words inside of a sentence are somebody's.
"""

from __future__ import annotations

import re

from graft.config.clean import Debris
from graft.data.clean.step import Notes, Result, edit_texts
from graft.types import Conversation

_COPY = (
    "Copy code|复制代码|複製程式碼|コードをコピーする|Copier le code|Code kopieren|Copiar código|Copia codice|"
    "Code kopiëren|Копировать код|코드 복사|نسخ الكود"
)
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,})[ \t]*(?:(?P<info>[\w+#.-]+?)[ \t]*)??(?:\n[ \t]*)?"
    rf"(?:(?<=\s)(?P<name>[a-zA-Z][\w+#.-]{{0,20}}?)[ \t]*)?\n?(?:{_COPY})+[ \t]*\n?",
    re.MULTILINE,
)
"""A fence whose first line, maybe after the language, is the copy button's. Blanks have one place each to belong to:
where they had several, a fence before some thousand blanks took hours."""
_EMPTY_BLOCK = re.compile(r"^[ \t]*(`{3,})[\w+#.-]*\n\s*\1[ \t]*$\n?", re.MULTILINE)
_COUNTER = re.compile(r"\A\s*(\d{1,3}) / (\d{1,3})(?=\s*\n|\s*\Z|[^\W\d_a-z])")
"""Which answer of several is shown: `2 / 3` on a line of its own, or glued to a word that begins a sentence."""
_COUNTED = re.compile(r"\bCopy\d+ chars / \d+ words")
_SPEAKER = re.compile(
    r"\A\s*(?:ChatGPT said|You said|ChatGPT 说|你说|ChatGPT a dit|Vous avez dit)\s*[::]\s*\n+", re.IGNORECASE
)
_BUTTON = (
    rf"{_COPY}|Regenerate response|Continue generating|Stop generating|Was this response better or worse\?.*|"
    r"Is this conversation helpful so far\?|重新生成回答|ChatGPT can make mistakes\..*|Free Research Preview\..*"
)
_LAST_LINES = re.compile(rf"(?:\n[ \t]*(?:{_BUTTON}|Share|Copy|Regenerate|分享|复制|重新生成)[ \t]*)+\s*\Z")
"""The last lines; `Share` alone may well be the last of somebody's list, so one of _BUTTON must be among them."""
_TAIL = 600
"""Characters at the end among which those lines are looked for."""
_ONE_BUTTON = re.compile(rf"^[ \t]*(?:{_BUTTON})[ \t]*$", re.MULTILINE)


def remove_debris(conversation: Conversation, settings: Debris, notes: Notes) -> Result:
    """The conversation without the words of a page's buttons, in the turns of both sides."""

    def edit(role: str, text: str) -> str:
        if role not in ("user", "assistant"):
            return text
        cleaned = without_debris(text)
        if cleaned != text:
            notes["messages with debris"] += 1
        return cleaned

    return edit_texts(conversation, edit)


def without_debris(text: str) -> str:
    """The text without a page's words; itself, to the last blank, where it has none."""
    cleaned = text
    if "```" in text:
        cleaned = _FENCE.sub(_fence, cleaned)
        if cleaned != text:
            cleaned = _EMPTY_BLOCK.sub("", cleaned)
    if (found := _COUNTER.match(cleaned)) and 1 <= int(found[1]) <= int(found[2]):
        cleaned = cleaned[found.end() :].lstrip()
    cleaned = _SPEAKER.sub("", cleaned)
    if "Copy" in cleaned:
        cleaned = _COUNTED.sub("", cleaned)
    if (last := _LAST_LINES.search(cleaned, max(0, len(cleaned) - _TAIL))) and _ONE_BUTTON.search(last[0]):
        cleaned = cleaned[: last.start()]
    return cleaned if cleaned == text else cleaned.strip()


def _fence(found: re.Match[str]) -> str:
    return f"{found['indent']}{found['fence']}{found['info'] or found['name'] or ''}\n"
