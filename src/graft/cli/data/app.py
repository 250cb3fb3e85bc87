"""`graft data`: registers its commands."""

from __future__ import annotations

import typer

from graft.cli.data.clean import clean_data
from graft.cli.data.imports import import_data
from graft.cli.data.inspect import inspect
from graft.cli.data.prompts import prompts
from graft.cli.data.report import report_data
from graft.cli.data.split import split_data
from graft.cli.data.synth import synth

app = typer.Typer(help="Read, clean, divide, look at and make data.", no_args_is_help=True)
app.command("import", epilog="Example: graft data import alpaca.json chats.parquet --out all.jsonl")(import_data)
app.command("clean", epilog="Example: graft data clean chats.json --out clean.jsonl language.keep=en,zh")(clean_data)
app.command("split", epilog="Example: graft data split all.jsonl --out parts --val 0.05 --test 0.05")(split_data)
app.command("report", epilog="Example: graft data report all.jsonl --model MODEL --out report.html")(report_data)
app.command("inspect")(inspect)
app.command("prompts", epilog="Example: graft data prompts reviews.csv --task sentiment --shots 2 --out train.jsonl")(
    prompts
)
app.command("synth", epilog="Example: graft data synth recipe.yaml --out family-qa --dry-run")(synth)
