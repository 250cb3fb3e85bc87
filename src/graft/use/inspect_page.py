"""`graft data inspect --html`: one page on which every token of some conversations, or of a step's trees, can be read.

Speaks views of examples and trees; the page is written as it is made, so that its size is no matter of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.config.train import Encode
from graft.errors import InputError
from graft.runs import atomic_file
from graft.tokens import forest, show
from graft.tokens.renderer import Renderer
from graft.types import Conversation, Example, FloatArray, IntArray, Reject
from graft.use.pages import environment
from graft.version import __version__

_OPEN = 300
"""Tokens up to which a branch of a tree is shown unfolded."""


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of text and what the bar at the foot of the page says of it."""

    kind: str
    said: str
    text: str


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one turn."""

    turn: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class ExampleView:
    """An example as the page shows it."""

    facts: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ConversationView:
    """A conversation as the page shows it."""

    id: str
    place: str
    rejected: str
    """Empty where it has examples."""
    examples: tuple[ExampleView, ...]
    left_out: tuple[show.LeftOut, ...]


@dataclass(frozen=True, slots=True)
class BranchView:
    """A branch of a step's trees as the page shows it."""

    level: int
    said: str
    ends: str
    share: float
    """Examples that pass through it, of all of the step."""
    opened: bool
    conversations: tuple[str, ...]
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class StepView:
    """A step as the page shows it."""

    title: str
    facts: str
    rows: tuple[tuple[str, tuple[BranchView, ...]], ...]


@dataclass(frozen=True, slots=True)
class Head:
    """What stands above the conversations."""

    title: str
    facts: Mapping[str, str]
    rejects: Sequence[tuple[int, Reject]] = ()
    """Kinds of reasons for which rows were rejected while reading, with count and first row."""


def write_page(path: Path, head: Head, conversations: Iterable[ConversationView], step: StepView | None = None) -> None:
    """Write the page; `conversations` are taken one by one.

    Raises:
        InputError: the file cannot be written.
    """
    template = environment().get_template("inspect.html.j2")
    try:
        with atomic_file(path) as file:
            for text in template.generate(head=head, conversations=conversations, step=step, version=__version__):
                file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place with --html") from None


def conversation_view(
    conversation: Conversation, result: Sequence[Example] | Reject, renderer: Renderer, settings: Encode
) -> ConversationView:
    """What the page shows of a conversation and what became of it."""
    if isinstance(result, Reject):
        return ConversationView(conversation.id, str(conversation.origin), f"{result.field}: {result.reason}", (), ())
    examples = tuple(_example(conversation, example, renderer) for example in result)
    missing = tuple(show.left_out(conversation, result, renderer, settings))
    return ConversationView(conversation.id, str(conversation.origin), "", examples, missing)


def _example(conversation: Conversation, example: Example, renderer: Renderer) -> ExampleView:
    found = show.pieces(example, renderer)
    starts = show.turn_starts(conversation, example, found, renderer)
    marks = [(0, "")] if not starts or starts[0].token else []
    marks += [(start.token, start.said) for start in starts]
    ends = [token for token, _ in marks[1:]] + [len(example.ids)]
    parts = []
    for (begin, said), end in zip(marks, ends, strict=True):
        inside = [piece for piece in found if begin <= piece.start < end]
        parts.append(Part(said, tuple(_tokens(inside, example.ids, example.weights, 0))))
    return ExampleView(show.facts(example), tuple(part for part in parts if part.tokens))


def _tokens(found: Sequence[show.Piece], ids: IntArray, weights: FloatArray, first: int) -> Iterator[Token]:
    """Pieces with ids, weight and position; ids[0] stands at position `first`."""
    for piece in found:
        inside = slice(piece.start - first, piece.stop - first)
        several = "s" if piece.stop - piece.start > 1 else ""
        place = f"{piece.start}" if not several else f"{piece.start} to {piece.stop - 1}"
        numbers = " ".join(str(number) for number in ids[inside].tolist())
        weight = " ".join(dict.fromkeys(f"{value:g}" for value in weights[inside].tolist()))
        said = f"id{several} {numbers} · weight {weight} · position{several} {place} · {piece.kind}"
        yield Token(piece.kind, said, show.visible(piece.text))


def step_view(step: forest.Step, title: str, facts: str, renderer: Renderer) -> StepView:
    """What the page shows of a step."""
    rows = []
    for number, trees in enumerate(step.trees, start=1):
        said = f"Row {number} of {len(step.trees)}: {len(trees.row):,} tokens"
        rows.append((said, tuple(_branch(trees, branch, step.examples, renderer) for branch in trees.branches)))
    return StepView(title, facts, tuple(rows))


def _branch(trees: forest.Trees, branch: forest.Branch, examples: int, renderer: Renderer) -> BranchView:
    inside = slice(branch.start, branch.stop)
    found = forest.branch_pieces(trees.row, branch, renderer)
    return BranchView(
        level=branch.level,
        said=forest.said_of(branch),
        ends=forest.ends_of(branch),
        share=branch.examples / examples,
        opened=branch.stop - branch.start <= _OPEN,
        conversations=branch.conversations,
        tokens=tuple(_tokens(found, trees.row.ids[inside], trees.row.weight[inside], branch.depth)),
    )
