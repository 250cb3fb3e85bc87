"""Chat templates as text: graft's own ones, which switches a template has, and how its date is held fixed.

Speaks Jinja source. Knows no tokenizer object, no ids and no conversation.
"""

from __future__ import annotations

import datetime
import functools
import re
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graft.config.base import did_you_mean
from graft.errors import ConfigError
from graft.tokens.watchdog import refuse_constants

FOLDER = Path(__file__).parent / "templates"

OURS = ("chatml", "alpaca", "vicuna", "llama2", "zh-dialogue")

SWITCHES = {"enable_thinking": True, "thinking": True, "open_thinking": True, "skip_thinking": False}
"""Variables by which real templates turn the reasoning of the next turn on: name -> its value when it is on."""

BLOCKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
"""How real templates open and close a block of reasoning."""

DIRECTIVES = (
    "%-d",
    "%-m",
    "%-H",
    "%-I",
    "%-M",
    "%-S",
    "%-j",
    "%-y",
    *(f"%{c}" for c in "aAbBcdefFGHIjklmMnpPrRsStTuUVwWxXyYzZD"),
)
"""What a date format may hold. The longer ones come first: "%-d" must not be read as "%-" and "d"."""


class _GenerationTag(jinja2.ext.Extension):
    """Lets `{% generation %}` parse; transformers has such a tag, and here only the names in its body count."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Parses templates as transformers does; nothing is rendered with it."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )


@functools.lru_cache(maxsize=512)
def free_variables(template: str) -> frozenset[str]:
    """Names that a template reads from its caller. One that does not parse has none."""
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_environment().parse(template)))
    except jinja2.TemplateError:
        return frozenset()


def switches_of(template: str) -> tuple[str, ...]:
    """The template's own thinking switches, those of `SWITCHES` that it reads."""
    return tuple(name for name in SWITCHES if name in free_variables(template))


@functools.lru_cache(maxsize=512)
def written_literals(template: str) -> tuple[str, ...]:
    """The pieces of text that a template writes out, in source order; those that it only searches for are left out."""
    try:
        tree = _environment().parse(template)
    except jinja2.TemplateError:
        return ()
    found: list[str] = []
    for node in tree.find_all((jinja2.nodes.Output, jinja2.nodes.Assign)):
        _collect_written(node, found)
    return tuple(found)


def _collect_written(node: jinja2.nodes.Node, found: list[str]) -> None:
    if isinstance(node, jinja2.nodes.TemplateData):
        found.append(node.data)
    elif isinstance(node, jinja2.nodes.Const) and isinstance(node.value, str):
        found.append(node.value)
    elif isinstance(node, jinja2.nodes.Output | jinja2.nodes.Add | jinja2.nodes.Concat):
        for child in node.iter_child_nodes():
            _collect_written(child, found)
    elif isinstance(node, jinja2.nodes.Assign | jinja2.nodes.Filter):
        if node.node is not None:
            _collect_written(node.node, found)
    elif isinstance(node, jinja2.nodes.CondExpr):
        for branch in (node.expr1, node.expr2):
            if branch is not None:
                _collect_written(branch, found)


@functools.lru_cache(maxsize=512)
def block_spacing(template: str, opening: str, closing: str) -> tuple[str, str, str] | None:
    """Blanks after the opening tag, before the closing tag and after it, as a template writes them around reasoning.

    None where it never writes reasoning between the two. A literal with both tags is an empty block: no evidence.
    """
    single = [text for text in written_literals(template) if (opening in text) != (closing in text)]
    opened = next((m[1] for text in single if (m := re.search(re.escape(opening) + r"(\s*)\Z", text))), None)
    closed = next((m for text in single if (m := re.match(rf"(\s*){re.escape(closing)}(\s*)", text))), None)
    return None if opened is None or closed is None else (opened, closed[1], closed[2])


def uses_date(template: str) -> bool:
    """Whether the template writes the day of its rendering."""
    return re.search(r"\bstrftime_now\b", template) is not None


@functools.lru_cache(maxsize=64)
def with_fixed_date(template: str, date: datetime.date) -> str:
    """The template with a `strftime_now` of its own that always tells one day (at midnight).

    transformers offers `strftime_now` as a global that reads the clock, and passes no functions through to templates,
    so a macro in front of the template takes its place. The line break after the macro is eaten by `trim_blocks`:
    the rest renders exactly as it did.
    """
    if not uses_date(template):
        return template
    moment = datetime.datetime.combine(date, datetime.time())
    said = "format"
    for directive in DIRECTIVES:
        text = moment.strftime(directive).replace("\\", "\\\\").replace("'", "\\'")
        said += f".replace('{directive}', '{text}')"
    said += ".replace('%%', '%')"
    return "{% macro strftime_now(format) %}{{ " + said + " }}{% endmacro %}\n" + template


def our_template(name: str, adds_bos: bool, has_im_end: bool) -> str:
    """The text of one of graft's templates, made for a tokenizer.

    Args:
        name: one of `OURS`.
        adds_bos: whether the tokenizer puts its BOS before plain text; then the template writes it too.
        has_im_end: whether `<|im_end|>` is one token there; else chatml ends an answer with the tokenizer's EOS, so
            that the stop is one token in every vocabulary.
    """
    start = "bos_token" if adds_bos else "''"
    stop = "'<|im_end|>'" if name == "chatml" and has_im_end else "eos_token"
    end = "{%- set end = '<|im_end|>' %}\n" if name == "chatml" else ""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return f"{{%- set start = {start} %}}\n{{%- set stop = {stop} %}}\n{end}{text}"


def check_syntax(name: str, template: str) -> None:
    """Refuse a template that is no Jinja: its rows are not to blame.

    Raises:
        ConfigError: names the template and the line.
        InputError: compiling it would compute without end.
    """
    try:
        refuse_constants(name, _environment().parse(template))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template {name}: line {error.lineno}: {error.message}; mend the template") from None


def read_template_file(wanted: str) -> str:
    """Text of a Jinja file that the user named.

    Raises:
        ConfigError: it is neither one of graft's names nor a readable file.
    """
    path = Path(wanted).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"template {wanted}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        names = ", ".join(OURS)
        hint = did_you_mean(wanted, OURS)
        raise ConfigError(
            f"template {wanted!r} is neither one of graft's ({names}) nor a file ({error.strerror}){hint}"
        ) from None
