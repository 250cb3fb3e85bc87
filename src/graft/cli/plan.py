"""`graft plan`."""

from __future__ import annotations

import json as json_module
import re
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.options import ModelToTrain, RecipeAndSettings, TrainingData, sort_words
from graft.errors import ConfigError
from graft.words import counted

if TYPE_CHECKING:
    from graft.train.costs.forecast import Forecast, Option

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def plan(
    words: RecipeAndSettings = None,
    model: ModelToTrain = None,
    data: TrainingData = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory to fit into, for example 16GiB; else what is free here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Predict a training run's memory and time before it loads a weight.

    Settings are those of graft train. The data is encoded, which a later graft train uses again; nothing else is kept.

    Examples:

    graft plan recipe.yaml

    graft plan --model DIR --data train.jsonl method=full --memory 16GiB
    """
    from graft.config.train import load_train

    recipe, overrides = sort_words(words or [])
    wanted = None if memory is None else size_in_bytes(memory)
    settings = load_train(recipe, overrides, {"model": model, "data": data or None})

    from graft.tokens.there import refuse_missing

    refuse_missing(settings)

    from graft.console import out
    from graft.train.costs.plan import plan as plan_run

    found, options, free = plan_run(settings, wanted)
    if json:
        listed = [{"settings": dict(o.changes), "fits": o.fits(free), **o.forecast.as_json()} for o in options]
        text = json_module.dumps({"memory_bytes": free, **found.as_json(), "options": listed}, indent=1)
        out.print(text, markup=False)
        return
    _show(found, options, free, settings.trains_own_weights)


def size_in_bytes(text: str) -> int:
    """`16GiB`, `16GB`, `16g` and `17179869184` as bytes; units are powers of 1024.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise ConfigError(f"--memory {text}: a size is expected, for example 16GiB or 800MiB")
    return int(float(match[1]) * UNITS[match[2]])


def _show(found: Forecast, options: list[Option], free: int, trains_own: bool) -> None:
    from graft.console import note, out, table
    from graft.train.costs.foresee import duration, shown_bytes

    parts = [[name, shown_bytes(size)] for name, size in found.parts.items() if size]
    table("memory of a step", ["part", "size"], [*parts, ["all", shown_bytes(found.moments["steps"])]], to_stdout=True)
    moments = [[name, shown_bytes(size)] for name, size in found.moments.items()]
    table("peak memory", ["moment", "size"], [*moments, ["the run", shown_bytes(found.peak)]], to_stdout=True)
    if found.peak == found.moments.get("rehearsing a save"):
        note("saving is rehearsed with a second model only where memory has room for it twice")
    rows = found.rows
    table(
        "work",
        ["", "of a step"],
        [
            ["conversations' tokens", f"{rows.tokens:,.0f}"],
            ["computed nodes", f"{rows.size.nodes:,.0f}"],
            ["sharing", f"{rows.sharing:.2f}"],
            ["rows", f"{rows.per_step:.1f}"],
            ["heaviest row's nodes", f"{len(rows.heaviest[0]):,}"],
            ["checkpointing", found.checkpointing],
            ["time (estimate)", duration(found.seconds_per_step)],
        ],
        to_stdout=True,
    )
    included = f", {counted(found.validations, 'validation')} included" if found.validations else ""
    note(f"{counted(rows.steps, 'step')} in about {duration(found.seconds)}{included}")
    lines = [
        [
            str(o),
            shown_bytes(o.forecast.peak),
            duration(o.forecast.seconds),
            "yes" if o.fits(free) else "no",
        ]
        for o in _worth_a_line(options, free)
    ]
    table(
        f"settings, fastest first, for {shown_bytes(free)} on {found.device}",
        ["settings", "peak", "time", "fits"],
        lines,
        to_stdout=True,
    )
    fitting = [option for option in options if option.fits(free)]
    if fitting:
        out.print(f"the fastest that fits: {fitting[0]}", markup=False)
    elif found.parts["process"] >= free:
        note(f"nothing fits: graft, torch and transformers alone take {shown_bytes(found.parts['process'])}")
    else:
        other = "method=lora, " if trains_own else ""
        note(f"none of these fits; a smaller encode.max_length, {other}or a smaller model is needed")


def _worth_a_line(options: list[Option], free: int) -> list[Option]:
    """All of the plain base; of each quantised one the fastest that fits, or what needs least, where that gains."""
    best: dict[object, Option] = {}
    for option in options:  # the fastest first
        kind = option.changes.get("quantize")
        known = best.setdefault(kind, option)
        if not known.fits(free) and option.forecast.peak < known.forecast.peak:
            best[kind] = option
    if None not in best:
        return options
    plain = best[None]

    def gains(option: Option) -> bool:
        if plain.fits(free):
            return option.fits(free) and option.forecast.seconds < plain.forecast.seconds
        return option.forecast.peak < plain.forecast.peak

    quantised = [option for kind, option in best.items() if kind is not None and gains(option)]
    return [option for option in options if "quantize" not in option.changes or option in quantised]
