"""`graft data synth`: questions and answers written by a model behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.data.shared import AsJson
from graft.words import counted

if TYPE_CHECKING:
    from graft.data.synth.estimate import Preview


def synth(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe (docs/synth.md).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings laid over it, e.g. count=500.")
    ] = None,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the journal and the results; name it again to go on.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first prompts and what it may cost; ask nothing.")
    ] = False,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with a journal that was begun with another recipe.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write new questions from seeds or documents, and answer them.

    Killed at any moment and started again, it loses no answer and asks nothing twice.
    """
    from graft.config.base import load
    from graft.config.synth import Synth
    from graft.data.synth.material import prepare
    from graft.data.synth.run import synthesise
    from graft.errors import ConfigError

    material = prepare(load(Synth, recipe, overrides or []))
    if dry_run:
        from graft.data.synth.estimate import preview

        _show_preview(preview(material), as_json)
        return
    if out is None:
        raise ConfigError("--out FOLDER is needed, for the journal and the results; --dry-run does without")
    from graft import console

    for decision in material.seeds.decisions:
        console.note(decision)
    outcome = synthesise(material, out, accept_changes)
    if as_json:
        typer.echo(json.dumps(outcome.summary, ensure_ascii=False))
    else:
        _report(outcome.summary)
    if outcome.stopped is not None:
        raise _explained(outcome.stopped, out)


def _explained(stopped: Exception, out: Path) -> Exception:
    """The reason with what is left to do, where it does not say so itself."""
    from graft.errors import Interrupted

    if isinstance(stopped, Interrupted):
        return Interrupted(
            f"{stopped}; all answers are in {out / 'journal.jsonl'}: the same command goes on from there"
        )
    return stopped


def _report(summary: dict[str, Any]) -> None:
    from graft import console

    for reason, count in summary["reasons"].items():
        console.note(f"{count} x {reason}")
    seeds, questions, answers = summary["seeds"], summary["questions"], summary["answers"]
    requests, tokens = summary["requests"], summary["tokens"]
    if summary["exhausted"]:
        console.warn("no new questions came any more; more seeds, another prompt or questions.patience may bring some")
    if tokens["answers_without_usage"]:
        console.warn(f"{tokens['answers_without_usage']} answers came without a token count; theirs are estimated")
    if tokens["answers_over_their_limit"]:
        console.warn(
            f"{tokens['answers_over_their_limit']} answers used more tokens than they were allowed: the endpoint does "
            "not hold to endpoint.limit_field, so a budget can be exceeded by that"
        )
    if requests["cut_in_flight"]:
        console.note(
            f"{requests['cut_in_flight']} requests were cut in flight by earlier ends; they are counted as paid"
        )
    if summary["critique"]:
        console.note("critique: " + ", ".join(f"{count} {how}" for how, count in summary["critique"].items()))
    cost = "" if summary["cost"] is None else f", {summary['cost']:.4f} {summary['currency']}"
    used = f"{tokens['prompt']:,} + {tokens['completion']:,} tokens in all{cost}"
    typer.echo(
        f"requests: {requests['asked_now']} answered now, {requests['from_journal']} found in the journal, "
        f"{requests['failed_attempts']} attempts failed; {used}"
    )
    typer.echo(f"seeds: {seeds['read']} read, {seeds['kept']} kept, {seeds['rejected']} rejected")
    typer.echo(
        f"questions: {questions['candidates']} generated, {questions['kept']} kept, {questions['rejected']} rejected"
    )
    left = f", {answers['not_reached']} not reached" if answers["not_reached"] else ""
    typer.echo(f"answers: {answers['asked']} asked, {answers['kept']} kept, {answers['rejected']} rejected{left}")
    for path, count in summary["written"].items():
        typer.echo(f"{path}: {counted(count, 'row')}")
    typer.echo(f"rejected rows are listed in {summary['rejects']}")


def _show_preview(shown: Preview, as_json: bool) -> None:
    from graft import console

    if as_json:
        typer.echo(json.dumps(shown.as_json(), ensure_ascii=False))
        return
    for stage, chat in shown.prompts.items():
        typer.echo(f"== the first request of {stage} ==")
        for role, content in chat:
            typer.echo(f"[{role}]\n{content}\n")
    rows = [
        (
            stage.stage,
            f"{stage.requests:,}",
            f"{stage.prompt_tokens:,}",
            f"{stage.answer_tokens:,}",
            "-" if stage.cost is None else f"{stage.cost:.4f}",
        )
        for stage in shown.stages
    ]
    columns = ("stage", "requests", "tokens in, about", "tokens out, at most", "cost, at most")
    console.table("If every question passes and nothing must be asked again", columns, rows, to_stdout=True)
