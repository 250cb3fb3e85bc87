"""A chat template is a program of a stranger: it may neither run without end nor fill the memory.

transformers renders templates in Jinja's sandbox, which keeps them from files and from Python's insides, and bounds
`range`, but not loops in loops, text that doubles, or `'a' * 10**10`. Here, one thread per process looks ten times a
second whether the same rendering still goes on, for how long and with how much memory, and ends it; what one operation
could make at once is bounded before it is computed.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Callable
from functools import wraps
from types import TracebackType
from typing import Any, cast

import jinja2
import psutil
from jinja2 import nodes

from graft.errors import InputError

MOST_SECONDS = 10.0
"""Processor time of this process, and time on the clock, that one rendering may take; real ones take milliseconds."""
MOST_BYTES = 1 << 30
"""Memory by which the process may grow during one rendering."""
MOST_SIZE = 1 << 24
"""Characters or elements that one operation may make."""
_TICK = 0.1
_IDLE = 50
"""Ticks without a rendering after which the thread ends; the next rendering starts another."""
PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
"""Methods of text that make much out of a number."""
_WIDTH = re.compile(r"\d{6,}|%[-+ #0]*\*")
"""A width of a million in a format, or one that is given as a number."""
_GROWING = ("center", "indent", "batch", "slice", "tojson", "wordwrap", "format", "replace")
"""Filters whose result may be far longer than what they are given."""
_MOST_NUMBER = 100_000
"""Width, indent or count that a filter may be given."""


class TemplateStopped(InputError):
    """A chat template was ended because it took too long or too much memory."""


class _Stop(BaseException):
    """Raised into the rendering thread; no `except Exception` of a library takes it for its own."""


_lock = threading.Lock()
_running: dict[int, watched] = {}
"""By thread."""
_thread: threading.Thread | None = None


class watched:  # noqa: N801 - it reads as a function, and a generator's context would cost three times as much
    """`with watched(name):` around a rendering. The watching thread reads the clocks: they cost as much as the rest.

    Raises:
        TemplateStopped: it took more than MOST_SECONDS or MOST_BYTES.
    """

    __slots__ = ("began", "ident", "name", "used", "why")
    began: float
    """On the clock when the watching thread first saw it, and how much processor time had been used then."""
    used: float

    def __init__(self, name: str) -> None:
        self.name = name
        self.ident = threading.get_ident()
        self.why = ""
        """Why it was told to end."""

    def __enter__(self) -> None:
        if _thread is None:
            _start()
        _running[self.ident] = self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with _lock:
                del _running[self.ident]
            if self.why:  # what is still on its way is called back
                _raise_in(self.ident, None)
        except _Stop:
            _running.pop(self.ident, None)
        if self.why:
            whose = "the model's chat template" if self.name == "model" else f"chat template {self.name}"
            raise TemplateStopped(
                f"{whose}: {self.why} on one conversation; it never ends, or was made to harm: mend it, or name "
                "another template"
            ) from None


def _start() -> None:
    global _thread  # noqa: PLW0603
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_watch, name="graft-template-watchdog", daemon=True)
            _thread.start()


def _watch() -> None:
    global _thread  # noqa: PLW0603
    process = psutil.Process()
    before = process.memory_info().rss
    seen: list[watched] = []
    idle = 0
    while True:
        time.sleep(_TICK)
        resident = process.memory_info().rss
        with _lock:
            now = list(_running.values())
            idle = 0 if now else idle + 1
            if idle > _IDLE:
                _thread = None
                return
            long = [rendering for rendering in now if any(rendering is other for other in seen)]
            if not long:
                before = resident
            for rendering in now:
                if rendering not in long:
                    rendering.began, rendering.used = time.monotonic(), time.process_time()
                elif why := rendering.why or _too_much(rendering, resident - before):
                    rendering.why = why
                    # At each look again: what is raised within a destructor, or a hook of the collector, is lost.
                    _raise_in(rendering.ident, _Stop)
        seen = now


def _too_much(rendering: watched, grown: int) -> str:
    computed = time.process_time() - rendering.used  # on the clock alone a process that was halted would be to blame
    if computed > MOST_SECONDS and time.monotonic() - rendering.began > MOST_SECONDS:
        return f"it computed for more than {MOST_SECONDS:g} s"
    if grown > MOST_BYTES:
        return f"it took more than {MOST_BYTES >> 20:,} MiB of memory"
    return ""


def _raise_in(ident: int, error: type[BaseException] | None) -> None:
    """Raise in another thread at its next step of Python; None calls back what has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), error and ctypes.py_object(error))


def refuse_constants(name: str, tree: nodes.Template) -> None:
    """Look at what Jinja computes while it compiles a template, where nothing watches it: operations on constants.

    Raises:
        InputError: one of them could make too much; names the template and the line.
    """
    for node in tree.find_all((nodes.Mul, nodes.Pow, nodes.Mod, nodes.Filter)):
        if isinstance(node, nodes.Filter) and node.name not in _GROWING:
            continue
        size = 1
        for constant in node.find_all(nodes.Const):
            value = constant.value
            size *= max(1, len(value) if isinstance(value, str) else abs(value) if isinstance(value, int) else 1)
            wide = isinstance(value, str) and isinstance(node, nodes.Mod | nodes.Filter) and _WIDTH.search(value)
            if size > MOST_SIZE or wide or (isinstance(node, nodes.Pow) and size > _MOST_NUMBER):
                raise InputError(
                    f"chat template {name}: line {node.lineno}: an operation on constants that could make more than "
                    f"{MOST_SIZE:,} characters; no template needs it: mend it, or name another template"
                )


def bound_operations(template: jinja2.Template, source: str) -> None:
    """Let a compiled template refuse what would make too much at once; whatever else it writes stays the same."""
    environment = cast("Any", template.environment)
    if "*" in environment.intercepted_binops:
        return  # transformers keeps what it compiles, and gives it out again
    environment.intercepted_binops = frozenset({"*", "**", "%"})
    compute, safe, filters = environment.call_binop, environment.is_safe_attribute, environment.filters

    def call_binop(context: Any, operator: str, left: Any, right: Any) -> Any:
        _refuse_operation(operator, left, right)
        return compute(context, operator, left, right)

    def is_safe_attribute(value: Any, name: str, found: Any) -> bool:
        return not (isinstance(value, str) and name in PADDING) and safe(value, name, found)

    environment.call_binop, environment.is_safe_attribute = call_binop, is_safe_attribute
    for name in _GROWING:
        filters[name] = _bounded(name, filters[name])
    fresh = jinja2.Template.from_code(environment, environment.compile(source), template.globals)
    template.root_render_func, template.blocks = fresh.root_render_func, fresh.blocks


def _refuse_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "%":
        if isinstance(left, str) and _WIDTH.search(left):
            raise jinja2.TemplateError("a format of more than 100,000 characters")
        return
    for many, times in ((left, right), (right, left)):
        if isinstance(many, str | list | tuple) and isinstance(times, int) and len(many) * times > MOST_SIZE:
            raise jinja2.TemplateError(f"a repeated value of more than {MOST_SIZE:,} characters or elements")
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > 4096:
            raise jinja2.TemplateError("a number of more than 4096 bits")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses numbers and patterns that make much out of little; `wraps` hands on jinja's marks."""

    @wraps(function)
    def bounded(*args: Any, **named: Any) -> Any:
        for value in (*args, *named.values()):
            if isinstance(value, int) and value > _MOST_NUMBER:
                raise jinja2.TemplateError(f"`{name}` with {value}")
        texts = [value for value in args if isinstance(value, str)]
        if name == "replace" and len(texts) > 2 and texts[0].count(texts[1]) * len(texts[2]) > MOST_SIZE:
            raise jinja2.TemplateError(f"a replacement of more than {MOST_SIZE:,} characters")
        if name == "format" and texts and _WIDTH.search(texts[0]):
            raise jinja2.TemplateError("a format of more than 100,000 characters")
        return function(*args, **named)

    return bounded
