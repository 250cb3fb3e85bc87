"""`graft data`: registers its commands."""

from __future__ import annotations

import typer

from graft.cli.data.imports import import_data
from graft.cli.data.inspect import inspect
from graft.cli.data.split import split_data

app = typer.Typer(help="Read, check and divide data.", no_args_is_help=True)
app.command("import", epilog="Example: graft data import alpaca.json chats.parquet --out all.jsonl")(import_data)
app.command("split", epilog="Example: graft data split all.jsonl --out parts --val 0.05 --test 0.05")(split_data)
app.command("inspect")(inspect)
