"""The command `graft`: registers the commands and turns errors into messages and exit codes."""

from __future__ import annotations

import inspect
import sys
from typing import Annotated, Any

import typer

from graft.cli.chat import chat
from graft.cli.data.app import app as data
from graft.cli.demo import demo
from graft.cli.doctor import doctor
from graft.cli.evaluate import evaluate
from graft.cli.plan import plan
from graft.cli.plot import plot
from graft.cli.predict import predict
from graft.cli.schema import schema
from graft.cli.train import train
from graft.errors import Elsewhere, GraftError
from graft.version import __version__

# The base of what typer raises for words it cannot parse; it exports only the leaves of that tree.
WORDS_THAT_DO_NOT_FIT: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    name="graft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="From an open base model and a heap of conversations to a measured domain expert.\n\n"
    "Start with [bold]graft demo[/bold], then [bold]graft train --model DIR --data FILE[/bold].",
)
app.command()(demo)
app.command()(plan)
app.command()(train)
app.add_typer(data, name="data")
app.command("eval")(evaluate)
app.command()(predict)
app.command()(chat)
app.command()(plot)
app.command()(schema)
app.command()(doctor)


def _paragraphs(text: str) -> str:
    """A docstring without the line breaks inside its paragraphs, which a narrow terminal would break again."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(text).split("\n\n"))


for _command in (*app.registered_commands, *data.registered_commands):
    if _command.callback is not None and _command.help is None:
        _command.help = _paragraphs(_command.callback.__doc__ or "")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graft {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Register the options of `graft` itself."""


def main() -> None:
    """Entry point: 0 done, 2 bad input or settings, 3 data refused, 4 diverged, 5 interrupted with a checkpoint."""
    import logging
    import os
    import signal
    import traceback
    import warnings

    from graft.console import fail
    from graft.private import hide_user

    # What the libraries below say about their own insides is not for the user of graft; errors still are.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # OpenMP's idle threads spin for milliseconds, which on shared cores takes the time from the thread that they wait
    # for: the same small run took 138 s with the default and 8 s with this, beside one other process on two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Large CPU tensors in pages of 2 MiB instead of 4 KiB: a training step streams through hundreds of megabytes.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)(\..*)?")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"peft\..*")  # of options that graft sets for it
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # PEFT imports them, and each speaks of itself
        logging.getLogger(library).setLevel(logging.ERROR)
    # As an ordinary way out, so that what was begun is cleared away; training has a handler of its own.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except Elsewhere as error:
        sys.exit(error.exit_code)
    except GraftError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except WORDS_THAT_DO_NOT_FIT as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted; nothing was changed that is not saved")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        sys.exit(0)
    except Exception:  # a defect of graft: its traceback is for a report, and may quote what should not be in one
        sys.stderr.write(hide_user(traceback.format_exc()))
        fail("this is a defect of graft; please report it with the lines above and with what `graft doctor` prints")
        sys.exit(1)
