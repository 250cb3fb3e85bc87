"""`graft data inspect`: what will be trained on, token by token."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.options import TrustRemoteCode

if TYPE_CHECKING:
    from graft.config.train import Encode, Train
    from graft.data.load import Loaded
    from graft.tokens.renderer import Renderer


def inspect(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Encode settings, e.g. train_on=last_turn.")
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="Model folder, or a folder with only a tokenizer.")],
    data: Annotated[list[str], typer.Option(help="jsonl, json, csv or parquet file; may be given again.")],
    template: Annotated[str | None, typer.Option(help="One of graft's templates, or a Jinja file.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Conversations to show; 0 is all.", min=0, show_default="3, with --json all")
    ] = None,
    to: Annotated[str | None, typer.Option("--json", help="Write JSON lines to this file; - is stdout.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the tokens of each example: context, targets, the stop, and why.

    Example: graft data inspect --model Qwen/Qwen3-0.6B --data chats.jsonl train_on=last_turn
    """
    from graft.data.load import load_sources
    from graft.tokens.load import load_renderer

    settings = _settings(model, data, template, overrides or [])
    loaded = load_sources(settings.data)
    renderer = load_renderer(model, settings.encode.template, settings.encode.date, trust_remote_code)
    if to is None:
        _show(loaded, renderer, settings.encode, 3 if limit is None else limit)
    else:
        _write_json(loaded, renderer, settings.encode, to, limit or 0)


def _settings(model: str, data: list[str], template: str | None, overrides: list[str]) -> Train:
    """The settings of a run with these; `max_length=512` is short for `encode.max_length=512`."""
    from graft.config.train import Encode, load_train

    own = set(Encode.model_fields)
    full = [f"encode.{item}" if item.partition("=")[0] in own else item for item in overrides]
    return load_train(None, full, {"model": model, "data": data, "encode.template": template})


def _show(loaded: Loaded, renderer: Renderer, settings: Encode, limit: int) -> None:
    from graft import console
    from graft.tokens import show
    from graft.tokens.encode import encode_each

    for said in (*loaded.decisions, *renderer.notes):
        console.note(said)
    console.out.print(show.legend())
    chosen = loaded.conversations[:limit] if limit else loaded.conversations
    notes: Counter[str] = Counter()
    for conversation, result in zip(chosen, encode_each(chosen, renderer, settings, notes), strict=True):
        console.out.print(show.draw(conversation, result, renderer))
    for said, count in notes.items():
        console.warn(f"{count} {said}")
    if loaded.rejects:
        first = loaded.rejects[0]
        console.warn(
            f"{len(loaded.rejects)} of {loaded.read} rows rejected, the first at {first.file}:{first.line}: "
            f"{first.field}: {first.reason}"
        )


def _write_json(loaded: Loaded, renderer: Renderer, settings: Encode, to: str, limit: int) -> None:
    from graft.errors import InputError
    from graft.runs import write_atomic
    from graft.tokens import show
    from graft.tokens.encode import encode_each

    rows: list[dict[str, Any]] = []
    chosen = loaded.conversations[:limit] if limit else loaded.conversations
    results = encode_each(chosen, renderer, settings, Counter())
    for conversation, result in zip(chosen, results, strict=True):
        rows.append(show.to_json(conversation, result, renderer))
    for reject in () if limit else loaded.rejects:
        reason = f"{reject.field}: {reject.reason}"
        rows.append({"id": f"{reject.file}:{reject.line}", "examples": [], "rejected": reason})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if to == "-":
        sys.stdout.buffer.write(text.encode("utf-8", "replace"))
        sys.stdout.flush()
    else:
        try:
            write_atomic(Path(to), text)
        except OSError as error:
            raise InputError(f"{to}: cannot be written ({error.strerror}); choose another place with --json") from None
