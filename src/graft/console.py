"""What the user sees while graft works: notes, warnings, tables, progress. All on stderr; stdout is for results.

Nothing here knows what is being said. Colour and bars are left out where stderr is no terminal, or with NO_COLOR.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from graft.visible import escape_hidden

T = TypeVar("T")


class Advance(Protocol):
    """Type of what `progress` yields."""

    def __call__(self, steps: int, said: str) -> None: ...


err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)

_warned: set[str] = set()


def note(text: str) -> None:
    """One line about what is being done or was decided."""
    err.print(f"[dim]·[/dim] {escape(escape_hidden(text))}")


def warn(text: str) -> None:
    """Something the user should know but need not stop for."""
    err.print(f"[yellow]! {escape(escape_hidden(text))}[/yellow]")


def warn_once(text: str) -> None:
    """`warn`, but the same text is said only once in a process."""
    if text not in _warned:
        _warned.add(text)
        warn(text)


def hush() -> None:
    """Say nothing more but why the command fails: another process speaks for all."""
    err.quiet = True


def fail(text: str) -> None:
    """Why the command ends without having done its work."""
    err.quiet = False
    err.print(f"[bold red]error:[/bold red] {escape(escape_hidden(text))}")


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], to_stdout: bool = False, text: Sequence[str] = ()
) -> None:
    """A table; the first column and those named in `text` are left-aligned, the others right-aligned."""
    view = Table(
        title=escape(title), title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    for index, column in enumerate(columns):
        view.add_column(escape(column), justify="left" if index == 0 or column in text else "right", overflow="fold")
    for row in rows:
        view.add_row(*(escape(escape_hidden(cell)) for cell in row))
    (out if to_stdout else err).print(view)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar; silent where stderr is no terminal."""
    if not err.is_terminal:
        yield from items
        return
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with progress(label, total) as advance:
        for item in items:
            yield item
            advance(1, "")


@contextmanager
def progress(label: str, total: int | None, done: int = 0) -> Iterator[Advance]:
    """A bar with count, share, elapsed and remaining time; the yielded function takes (steps, what to say)."""
    bar = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
        console=err,
        disable=not err.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task(label, total=total, completed=done, said="")

        def advance(steps: int, said: str) -> None:
            bar.update(task, advance=steps, said=said)

        yield advance
