"""Jinja for prompt templates, which strangers may have written: sandboxed, strict, and bounded in time and size.

Speaks of sources, variables and text. Knows no rows and no tasks.

A template may print, branch, loop and set variables; tags that define or fetch other templates are refused when it is
compiled. Whatever could grow without end is counted while it renders: rounds of loops and calls, and the size of every
value that is made. An undefined variable is a failure, never an empty string.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, cast

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from graft.data.prompts.draw import Draw
from graft.data.prompts.filters import (
    METER,
    MOST_SECONDS,
    MOST_SIZE,
    OWN_FILTERS,
    Meter,
    TemplateFailure,
    bounded,
    join,
    replace,
    stepping,
)
from graft.errors import first_line

MOST_SOURCE = 100_000
"""Characters of a template."""
_JINJA_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int", "items", "last"),
    *("length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr"),
    *("sort", "string", "sum", "title", "trim", "truncate", "unique", "upper", "wordcount"),
)
"""Those that cannot make much out of little (`center`, `format` and `indent` can), nor reach into objects (`attr`)."""
_TESTS = (
    *("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ne", "lt", "le", "gt", "ge", "greaterthan", "lessthan", "in"),
    *("defined", "undefined", "none", "boolean", "true", "false", "integer", "float", "number", "string", "mapping"),
    *("sequence", "iterable", "lower", "upper"),
)
"""`odd`, `even` and `divisibleby` are left out: they use `%`, which on text is formatting."""
_TEXT_METHODS = frozenset(
    (
        *("capitalize", "casefold", "count", "endswith", "find", "index", "isalpha", "isdigit", "islower", "isupper"),
        *("join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition"),
        *("rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
    )
)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is counted as a step, and is given and gives nothing too large.

    `wraps` hands on the mark by which Jinja knows that a filter wants its context or environment first.
    """

    @wraps(function)
    def guarded(*args: Any, **named: Any) -> Any:
        METER.get().spend()
        for value in (*args, *named.values()):
            bounded(value)
        return bounded(function(*args, **named))

    return guarded


class _Environment(ImmutableSandboxedEnvironment):
    """Names with underscores, object internals and whatever is not listed above stay out of reach."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Lists may grow and shrink: variables are copied for each rendering, and real templates do it."""
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        if isinstance(obj, list) and attr in ("append", "pop"):
            return True
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Offer no `format`: a width in its pattern makes text of any size."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse what grows by multiplication before it is computed."""
        if operator == "%" and isinstance(left, str):
            raise TemplateFailure("`%` on text; print the parts one after the other")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > MOST_SIZE:
                    raise TemplateFailure(f"a repeated value of more than {MOST_SIZE:,} characters or elements")
        if operator in "**" and isinstance(left, int) and isinstance(right, int):  # also `*`
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 4096:
                raise TemplateFailure("a number of more than 4096 bits")
        return bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - jinja's own
        """Count the call; text that is joined or replaced is measured first."""
        METER.get().spend()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            return join(args[0] if args else (), owner)
        if isinstance(owner, str) and name == "replace":
            return replace(owner, *args)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(owner, list):
            bounded(owner)
        return bounded(result)


_STATEMENTS = (nodes.Template, nodes.Output, nodes.If, nodes.For, nodes.Assign)


class _Bounding(NodeTransformer):
    """Refuses all other statements, and sends loops, `~` and written-out containers through the filters that count."""

    def visit(self, node: nodes.Node, *args: Any, **named: Any) -> Any:
        if isinstance(node, nodes.Stmt | nodes.Template) and not isinstance(node, _STATEMENTS):
            raise TemplateFailure(f"line {node.lineno}: the tag `{type(node).__name__.lower()}` is not for prompts")
        return super().visit(node, *args, **named)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja calls it by this name
        self.generic_visit(node)
        node.iter = _filtered(cast(nodes.Expr, node.iter), "stepping_")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined_")

    def _container(self, node: nodes.Expr) -> nodes.Expr:
        if getattr(node, "ctx", "load") != "load":  # the names on the left of `set` and `for`
            return node
        self.generic_visit(node)
        return _filtered(node, "bounded_")

    visit_List = visit_Tuple = visit_Dict = _container  # noqa: N815


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@cache
def _environment(trim: bool) -> _Environment:
    """`trim`: the line of a block tag leaves no blank line behind. promptsource was written without it."""
    made = _Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=trim, lstrip_blocks=trim, optimized=False, finalize=bounded
    )
    known = made.filters
    made.filters = {name: _guarded(known[name]) for name in _JINJA_FILTERS}
    made.filters |= {name: _guarded(function) for name, function in OWN_FILTERS.items()}
    made.filters["stepping_"] = stepping
    made.tests = {name: made.tests[name] for name in _TESTS}
    made.globals = {name: made.globals[name] for name in ("range", "namespace")} | {"zip": zip}
    return made


@dataclass(frozen=True, slots=True)
class Compiled:
    """A template ready to be rendered."""

    source: str
    variables: frozenset[str]
    """Names that it takes from its caller."""
    _template: jinja2.Template

    def render(self, variables: Mapping[str, Any], draw: Draw) -> str:
        """The text, at most MOST_SIZE characters. `draw` decides what `choice` and `random` take.

        Raises:
            TemplateFailure: a variable is undefined, something is forbidden, too long or too slow, or an error occurs.
        """
        token = METER.set(Meter(draw, time.monotonic() + MOST_SECONDS))
        pieces, size = [], 0
        try:
            used = {name: _copied(variables[name]) for name in self.variables if name in variables}
            for piece in self._template.generate(used):
                size += len(piece)
                if size > MOST_SIZE:
                    raise TemplateFailure(f"a text of more than {MOST_SIZE:,} characters")
                pieces.append(piece)
        except TemplateFailure:
            raise
        except RecursionError:
            raise TemplateFailure("it calls itself without end") from None
        except Exception as error:  # any: a stranger's template may make any line of Jinja and its filters fail
            raise TemplateFailure(first_line(error) or type(error).__name__) from None
        finally:
            METER.reset(token)
        return "".join(pieces)


def _copied(value: Any) -> Any:
    """The value with lists and objects of its own, so that a template that changes them changes nothing outside."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def compiled(source: str, trim: bool = True) -> Compiled:
    """Compile a template.

    Raises:
        TemplateFailure: it is too long, is not valid Jinja, or uses a tag or filter that prompts do without.
    """
    if len(source) > MOST_SOURCE:
        raise TemplateFailure(f"it has {len(source):,} characters, at most {MOST_SOURCE:,} are read")
    environment = _environment(trim)
    try:
        tree = environment.parse(source)
        variables = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals)
        template = environment.from_string(_Bounding().visit(tree))
    except jinja2.TemplateSyntaxError as error:
        raise TemplateFailure(f"line {error.lineno}: {first_line(error)}") from None
    except (RecursionError, MemoryError, SyntaxError):  # what Jinja makes of it is Python, whose blocks nest 20 deep
        raise TemplateFailure("it is nested too deeply") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise TemplateFailure(first_line(error)) from None
    return Compiled(source, frozenset(variables), template)
