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

from graft.private import hide_secrets
from graft.visible import escape_hidden

T = TypeVar("T")


class Advance(Protocol):
    """Type of what `progress` yields."""

    def __call__(self, steps: int, said: str) -> None: ...


err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)

_warned: set[str] = set()


def _shown(text: str) -> str:
    """The text without secrets, and with hidden characters written out."""
    return escape_hidden(hide_secrets(text))


def note(text: str) -> None:
    """One line about what is being done or was decided."""
    err.print(f"[dim]·[/dim] {escape(_shown(text))}")


def warn(text: str) -> None:
    """Something the user should know but need not stop for."""
    err.print(f"[yellow]! {escape(_shown(text))}[/yellow]")


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
    err.print(f"[bold red]error:[/bold red] {escape(_shown(text))}")


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
        view.add_row(*(escape(_shown(cell)) for cell in row))
    (out if to_stdout else err).print(view)


def mark(well: bool | None, text: str) -> None:
    """A result on stdout behind a sign: well, not well, or (None) worth knowing."""
    out.print(f"{_sign(well)} {escape(_shown(text))}")


def facts(title: str, rows: Iterable[Sequence[str]]) -> None:
    """Names and what they are, on stdout."""
    view = Table(
        title=escape(_shown(title)), title_justify="left", title_style="bold", box=None, pad_edge=False,
        show_header=False,
    )  # fmt: skip
    view.add_column(no_wrap=True, style="dim")
    view.add_column(overflow="fold")
    for row in rows:
        view.add_row(*(escape(_shown(cell)) for cell in row))
    out.print(view, "")


def checks(title: str, rows: Iterable[tuple[bool | None, str, str]], foot: str) -> None:
    """Things that were checked, on stdout: a sign (None: does not matter), what it is, and a remark."""
    view = Table(
        title=escape(_shown(title)), title_justify="left", title_style="bold", box=None, pad_edge=False,
        show_header=False, caption=escape(_shown(foot)), caption_justify="left", caption_style="dim",
    )  # fmt: skip
    view.add_column()
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold", style="dim")
    for well, what, said in rows:
        view.add_row(_sign(well), escape(_shown(what)), escape(_shown(said)))
    out.print(view, "")


def _sign(well: bool | None) -> str:
    if well is None:
        return "[yellow]–[/yellow]"
    return "[green]✓[/green]" if well else "[bold red]✗[/bold red]"


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
