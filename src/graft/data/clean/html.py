"""Rendered HTML, as browser extensions save chats (ShareGPT), to the markdown that the model had written.

Speaks of messages and tags. The hard part is to leave the rest alone: `a < b`, `List<String>`, a question about a tag,
and answers that are HTML because HTML was asked for.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from graft.config.clean import Html
from graft.data.clean.step import Drop, Notes, Result, edit_texts, texts
from graft.types import Conversation

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag
    from markdownify import MarkdownConverter

_BLOCKS = "p|div|pre|ul|ol|table|blockquote|h[1-6]|hr|section|article|span|strong|em|b|i|code|a|br|li"
_WHOLE = re.compile(
    rf"\s*<(?:{_BLOCKS})(?:\s[^<>]*)?/?>.*<(?:/(?:{_BLOCKS})|br|hr)\s*/?>\s*", re.DOTALL | re.IGNORECASE
)
"""A message that is HTML from its first character to its last."""
_PAGE = re.compile(
    r"""<[a-z]+\s[^<>]*class\s*=\s*["'][^"'<>]*(?:"""
    r"markdown[\s-]|prose\b|hljs\b|whitespace-pre|break-words|bg-black\s+rounded|text-base\b|dark:"
    r""")|<button\b[^<>]*>|<svg\b[^<>]*\sstroke=""",
    re.IGNORECASE,
)
"""Marks that only the rendering of a chat page leaves: its style classes, its buttons."""
_NOT_PROSE = re.compile(
    r"<!doctype|</?(?:html|head|body|form|input|label|script|style|link|meta|nav|header|footer|main|iframe|select|option)\b"
    r"|<\w++[^<>]*\s(?:style|onclick|href=[\"']#|id)\s*=",
    re.IGNORECASE,
)
"""What a page has that somebody wrote, and prose that was rendered from markdown has not."""
_INDENTED = re.compile(r">[ \t]*\n[ \t]+<(?!/?span|/?code)")
"""Markup laid out by a person: a tag on a line of its own, indented."""
_ABOUT_HTML = re.compile(
    r"html|css|\bxml\b|\btags?\b|mark-?up|web\s?page|web\s?site|\bwebsite|javascript|react|网页|网站|網頁|標籤|标签|ウェブ",
    re.IGNORECASE,
)


def convert_html(conversation: Conversation, settings: Html, notes: Notes) -> Result:
    """The conversation with its rendered messages as markdown; only messages that are HTML from end to end.

    With `when: export` that is a message with marks of a chat page. Messages without marks are converted where every
    answer is HTML, no question is about HTML, and the message holds what a page renders and nobody lays out by hand.
    """
    if not any("<" in text for _, _, text in texts(conversation)):
        return conversation
    rendered = settings.when == "tags" or _is_rendering(conversation)

    def edit(role: str, text: str) -> str:
        if role in ("system", "tool") or not _WHOLE.fullmatch(text):
            return text
        if settings.when == "export" and not _PAGE.search(text) and not (rendered and not _written_by_hand(text)):
            return text
        notes["messages converted"] += 1
        return to_markdown(text)

    try:
        return edit_texts(conversation, edit)
    except RecursionError:
        return Drop("messages", "HTML that is nested too deeply to be converted")


def _is_rendering(conversation: Conversation) -> bool:
    """Whether all answers are HTML though nobody asked for it."""
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    asked = [message.content for message in conversation.messages if message.role == "user"]
    return (
        bool(answers)
        and all(_WHOLE.fullmatch(text) for text in answers)
        and not any(_ABOUT_HTML.search(_plain(text)) for text in asked)
    )


def _plain(text: str) -> str:
    """A user's words without the markup around them: class names say nothing about what was asked."""
    return re.sub(r"<[^<>]*>", " ", text)


def _written_by_hand(text: str) -> bool:
    return bool(_NOT_PROSE.search(text) or _INDENTED.search(text))


def to_markdown(html: str) -> str:
    """Markdown of a piece of HTML: code blocks keep language and every blank, tables and formulas stay, buttons go."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    for tag in soup.find_all(_DEBRIS):
        tag.decompose()
    _restore_formulas(soup)
    text: str = _converter().convert_soup(soup)
    return text.strip("\n ")


_DEBRIS = ("button", "svg", "script", "style", "noscript", "template", "input", "textarea")


def _restore_formulas(soup: BeautifulSoup) -> None:
    """KaTeX renders a formula twice, as MathML and as boxes; its TeX source stands in an annotation."""
    for tag in soup.select(".katex-display, .katex"):
        source = tag.find("annotation")
        if tag.parent is None or source is None:
            continue
        tex = source.get_text().strip()
        display = "katex-display" in (tag.get("class") or [])
        tag.replace_with(f"\n$$\n{tex}\n$$\n" if display else f"${tex}$")


def _language(pre: Tag) -> str:
    """The language of a code block: from a class, else from the words above it that the page shows."""
    for tag in [pre, *pre.find_all(True)]:
        for name in tag.get("class") or []:
            if found := re.fullmatch(r"(?:language|lang|highlight-source)-([\w+#.-]+)", name):
                return "" if found[1] in ("plaintext", "text", "none") else found[1]
    return ""


@cache
def _converter() -> MarkdownConverter:
    """One converter for all messages; its class needs the library, so it is made on first use."""
    from markdownify import ATX, MarkdownConverter

    class Converter(MarkdownConverter):
        """markdownify with code blocks that keep their text as it is, and no escapes: the text is to be learnt."""

        def convert_pre(self, el: Any, text: str, parent_tags: set[str]) -> str:
            """A fenced block of the code alone: what a chat page writes above it (a language) is the fence's."""
            code = el.find("code")
            words = (code or el).get_text()
            above = "" if code is None else el.get_text()[: -len(words) or None].strip()
            language = _language(el) or (above.lower() if re.fullmatch(r"[\w+#.-]{1,20}", above) else "")
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`{3,}", words)), default=2))
            body = words.strip("\n")
            return f"\n\n{fence}{language}\n{body}\n{fence}\n\n" if body.strip() else "\n\n"

        def convert_br(self, el: Any, text: str, parent_tags: set[str]) -> str:
            """A line break; markdown's two blanks before it would be learnt, too."""
            return " " if "_inline" in parent_tags else "\n"

        def convert_td(self, el: Any, text: str, parent_tags: set[str]) -> str:
            """A cell; a bar in it would begin the next one."""
            return str(super().convert_td(el, text.replace("|", "\\|"), parent_tags))  # type: ignore[misc]

        def process_text(self, el: Any, parent_tags: set[str] | None = None) -> str:
            """Text under `white-space: pre-wrap` (what users typed) keeps its lines and indents."""
            for parent in el.parents:
                if "whitespace-pre-wrap" in (parent.get("class") or []):
                    return str(el)
                if parent.name in ("p", "li", "td", "pre", "code"):
                    break
            return str(super().process_text(el, parent_tags))  # type: ignore[misc]

    return Converter(
        heading_style=ATX, bullets="-", escape_asterisks=False, escape_underscores=False, table_infer_header=True
    )
