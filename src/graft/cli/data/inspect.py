"""`graft data inspect`: what will be trained on, token by token."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.options import TrustRemoteCode
from graft.words import counted, one_or_many

if TYPE_CHECKING:
    from graft.config.train import Encode, Train
    from graft.data.tally import Tally
    from graft.tokens.forest import Step
    from graft.tokens.renderer import Renderer
    from graft.types import Conversation, Example, Reject

SHOWN = 3
ON_A_PAGE = 20
OF_A_STEP = ("batch_size", "seed", "row_tokens", "split")
"""Settings that decide what a step holds; `encode` decides all the rest that is shown here."""


def inspect(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Encode settings, e.g. train_on=last_turn; with --step also batch_size, seed, row_tokens, split.val.",
        ),
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="Model folder, or a folder with only a tokenizer.")],
    data: Annotated[list[str], typer.Option(help="A file of data; may be given again.")],
    template: Annotated[str | None, typer.Option(help="One of graft's templates, or a Jinja file.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Conversations to show; 0 is all.", min=0, show_default="3; --html 20; --json all"),
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Show the trees of this optimizer step instead; the first is 1.", min=1)
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page on which every token can be pointed at.")] = None,
    to: Annotated[str | None, typer.Option("--json", help="Write JSON lines to this file; - is stdout.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the tokens of each example: context, targets, the stop, and why.

    Example: graft data inspect --model Qwen/Qwen3-0.6B --data chats.jsonl train_on=last_turn
    """
    from graft.cli.data.shared import keep_sources
    from graft.errors import ConfigError
    from graft.tokens.load import load_renderer

    settings = _settings(model, data, template, overrides or [], step is not None)
    if step is not None and to is not None:
        raise ConfigError("--json lists examples, not trees; leave out --step, or take --html for the page of a step")
    if step is not None and limit is not None:
        raise ConfigError("--limit counts conversations, and --step shows all of a step; leave one of them out")
    keep_sources(data, [path for path in (html, Path(to) if to and to != "-" else None) if path])
    renderer = load_renderer(model, settings.encode.template, settings.encode.date, trust_remote_code)
    if step is not None:
        _show_step(settings, renderer, step, html)
    elif to is None and html is None:
        _show(_Chosen(settings, SHOWN if limit is None else limit), renderer)
    else:
        if to is not None:
            _write_json(_Chosen(settings, limit or 0), renderer, to)
        if html is not None:
            _write_html(_Chosen(settings, ON_A_PAGE if limit is None else limit), renderer, html)


def _settings(model: str, data: list[str], template: str | None, overrides: list[str], of_step: bool) -> Train:
    """The settings of a run with these; `max_length=512` is short for `encode.max_length=512`.

    Raises:
        ConfigError: a setting is unknown, or has no effect on what is shown.
    """
    from graft.config.train import Encode, load_train
    from graft.errors import ConfigError

    own = set(Encode.model_fields)
    keys = [item.partition("=")[0] for item in overrides]
    full = [f"encode.{item}" if key in own else item for key, item in zip(keys, overrides, strict=True)]
    settings = load_train(None, full, {"model": model, "data": data, "encode.template": template})
    for key in keys:
        first = key.split(".")[0]
        if first in own or first == "encode" or (of_step and first in OF_A_STEP):
            continue
        wants = "only matters with --step N" if first in OF_A_STEP else "has no effect on what inspect shows"
        raise ConfigError(
            f"`{key}` {wants}; encode settings do ({', '.join(sorted(own))}), and for --step also "
            f"{', '.join(OF_A_STEP)}; leave it out"
        )
    return settings


@dataclass
class _Chosen:
    """The first conversations of the data, read as they are wanted, and a count of what came before them."""

    settings: Train
    limit: int
    """0 is all."""
    tally: Tally = field(init=False)
    rejects: list[Reject] = field(default_factory=list)
    """Those met on the way; only collected where all rows are read."""

    def __post_init__(self) -> None:
        from graft.data.tally import Tally

        self.tally = Tally()

    @property
    def encode(self) -> Encode:
        return self.settings.encode

    def __iter__(self) -> Iterator[Conversation]:
        from graft.data.load import stream_sources
        from graft.types import Reject

        for item in stream_sources(self.settings.data, self.tally):
            if isinstance(item, Reject):
                if not self.limit:
                    self.rejects.append(item)
                continue
            yield item
            if self.tally.kept == self.limit:
                return

    def encoded(self, renderer: Renderer, notes: Counter[str]) -> Iterator[tuple[Conversation, list[Example] | Reject]]:
        """Each conversation with what became of it."""
        from graft.tokens.encode import encode_each

        waiting: list[Conversation] = []

        def passing() -> Iterator[Conversation]:
            for conversation in self:
                waiting.append(conversation)
                yield conversation

        for result in encode_each(passing(), renderer, self.encode, notes):
            yield waiting.pop(0), result


def _show(chosen: _Chosen, renderer: Renderer) -> None:
    from graft import console
    from graft.tokens import show
    from graft.tokens.load import say_notes

    say_notes(renderer)
    console.out.print(show.legend())
    notes: Counter[str] = Counter()
    for conversation, result in chosen.encoded(renderer, notes):
        console.out.print(show.draw(conversation, result, renderer, chosen.encode))
    _say_what_was_read(chosen, notes)


def _say_what_was_read(chosen: _Chosen, notes: Counter[str]) -> None:
    from graft import console
    from graft.visible import escape_hidden

    tally = chosen.tally
    for decision in tally.decisions:
        console.note(escape_hidden(decision))
    for said, count in notes.items():
        console.warn(escape_hidden(f"{count} {said}"))
    for count, reject in tally.commonest(1):
        console.warn(
            escape_hidden(
                f"{tally.rejected} of {tally.read} rows rejected, {count} of them for the reason at "
                f"{reject.file}:{reject.line}: {_why(reject)}"
            )
        )
    if chosen.limit and tally.kept == chosen.limit:
        rows, were = counted(tally.read, "row"), one_or_many(tally.read, "was", "were")
        console.note(f"only the first {rows} {were} read; --limit 0 shows all")


def _why(reject: Reject) -> str:
    return f"{reject.field}: {reject.reason}" if reject.field else reject.reason


def _write_json(chosen: _Chosen, renderer: Renderer, to: str) -> None:
    from graft.errors import InputError
    from graft.runs import write_atomic
    from graft.tokens import show

    rows: list[dict[str, Any]] = []
    for conversation, result in chosen.encoded(renderer, Counter()):
        rows.append(show.to_json(conversation, result, renderer))
    for reject in chosen.rejects:
        rows.append({"id": f"{reject.file}:{reject.line}", "examples": [], "rejected": _why(reject)})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = text.encode("utf-8", "backslashreplace")  # half of a surrogate pair becomes the JSON escape that it was
    if to == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
    else:
        try:
            write_atomic(Path(to), content)
        except OSError as error:
            raise InputError(f"{to}: cannot be written ({error.strerror}); choose another place with --json") from None


def _write_html(chosen: _Chosen, renderer: Renderer, html: Path) -> None:
    from graft import console
    from graft.use.inspect_page import Head, conversation_view, write_page

    notes: Counter[str] = Counter()
    views = [
        conversation_view(conversation, result, renderer, chosen.encode)
        for conversation, result in chosen.encoded(renderer, notes)
    ]
    tally = chosen.tally
    facts = _facts(chosen.settings, renderer)
    facts["rows"] = f"{tally.read:,} read, {tally.kept:,} kept, {tally.rejected:,} rejected while reading" + (
        "; the rest of the data was not read" if chosen.limit and tally.kept == chosen.limit else ""
    )
    facts |= {"formats": "; ".join(tally.decisions)} if tally.decisions else {}
    facts |= {"notes": "; ".join(f"{count} {said}" for said, count in notes.items() if count)} if notes else {}
    write_page(html, Head("Inspected tokens", facts, tally.commonest(20)), views)
    _say_what_was_read(chosen, notes)
    console.note(f"written: {html}")


def _facts(settings: Train, renderer: Renderer) -> dict[str, str]:
    encode = settings.encode
    return {
        "data": ", ".join(source.path for source in settings.data),
        "tokenizer": settings.model,
        "chat template": renderer.template_name,
        "settings": f"train_on {encode.train_on}, max_length {encode.max_length}, overlong {encode.overlong}",
    } | ({"template": "; ".join(renderer.notes)} if renderer.notes else {})


def _show_step(settings: Train, renderer: Renderer, number: int, html: Path | None) -> None:
    from graft import console
    from graft.tokens.forest import draw_step
    from graft.tokens.show import legend

    step, facts = _step(settings, renderer, number)
    if html is None:
        console.out.print(legend())
        console.out.print(facts, markup=False)
        console.out.print(draw_step(step, renderer))
        return
    from graft.use.inspect_page import Head, step_view, write_page

    view = step_view(step, f"The trees of step {number}", facts, renderer)
    write_page(html, Head("A step's trees", _facts(settings, renderer)), [], view)
    console.note(facts)
    console.note(f"written: {html}")


def _step(settings: Train, renderer: Renderer, number: int) -> tuple[Step, str]:
    """The trees of a step as `graft train` with these settings would compute them, and what can be said of them.

    Raises:
        InputError: nothing is left to train on.
        ConfigError: one epoch has fewer steps.
    """
    from graft.data.load import load_sources
    from graft.data.splitting.split import split
    from graft.errors import ConfigError, InputError
    from graft.tokens.forest import step_trees
    from graft.tokens.plan import Plan
    from graft.tokens.store import encode_stored

    parts = split(load_sources(settings.data).conversations, settings.split.val, settings.split.test)
    if not parts.train and (parts.val or parts.test):
        raise InputError(
            f"all {len(parts.val) + len(parts.test)} conversations are held out (split.val {settings.split.val:g}, "
            f"split.test {settings.split.test:g}), so no step has any; lower them, for example split.val=0"
        )
    store = encode_stored(parts.train, renderer, settings.encode)
    if not len(store):
        raise InputError("no conversation has an example to train on; leave out --step to see why")
    plan = Plan((1.0,) * len(store), settings.batch_size, 1.0, settings.seed)
    if number > plan.total_steps:
        raise ConfigError(
            f"--step {number}: one epoch over {len(store)} conversations ends with step {plan.total_steps} "
            f"(batch_size {settings.batch_size}); choose 1 to {plan.total_steps}"
        )
    chosen: Sequence[int] = plan.step(number - 1).tolist()
    step = step_trees(store.examples(chosen), settings.row_budget)
    held_out = len(parts.val) + len(parts.test)
    facts = (
        f"step {number} of {plan.total_steps} in the first epoch: {len(chosen)} of {len(store)} conversations, "
        f"{counted(step.examples, 'example')}; {step.sharing.tokens:,} tokens are computed as {step.sharing.nodes:,}, "
        f"{step.sharing.ratio:.2f} times fewer; {counted(held_out, 'conversation')} held out "
        f"(split.val {settings.split.val:g}, split.test {settings.split.test:g})"
    )
    return step, facts
