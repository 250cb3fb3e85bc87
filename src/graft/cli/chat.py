"""`graft chat`: the terminal around a ChatSession."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.options import (
    BasePath,
    Device,
    MaxNewTokens,
    ModelPath,
    Precision,
    RepetitionPenalty,
    Seed,
    Temperature,
    Thinking,
    TopK,
    TopP,
    TrustRemoteCode,
)
from graft.errors import InputError

if TYPE_CHECKING:
    from graft.use.chat import ChatSession

# A model's control characters must not move the cursor or recolour the terminal; tab and newline may stay.
_UNSAFE = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def chat(
    model: ModelPath,
    *,
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    base: BasePath = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = 0,
    thinking: Thinking = None,
    template: Annotated[str | None, typer.Option(help="Chat template; else the model's own.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model in the terminal; without a terminal, one question per line of stdin.

    Examples:

    graft chat runs/my-run

    graft chat runs/my-run --system "Answer in one sentence." --temperature 0.7

    echo "What is the capital?" | graft chat runs/my-run
    """
    from graft.config.train import load_sampling
    from graft.console import err, note
    from graft.use.open import resolve

    target = resolve(model, base)
    sampling = load_sampling(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
    )
    with err.status("loading the model"):
        from graft.model.files.load import load_model
        from graft.tokens.load import load_renderer, say_notes
        from graft.use.chat import ChatSession
        from graft.use.predict import sampling_shown

        renderer = load_renderer(target.tokenizer, template, None, trust_remote_code)
        loaded = load_model(target.folder, device, precision, trust_remote_code, target.base, target.quantize)
    asked = thinking if thinking is not None else target.thinking()
    session = ChatSession(loaded.model, renderer, sampling, system, asked)
    note(f"{target.folder} on {loaded.device}, {sampling_shown(sampling)}")
    say_notes(renderer)
    if sys.stdin.isatty():
        err.print("[dim]/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat[/dim]")
    _talk(session)


def _talk(session: ChatSession) -> None:
    from graft.console import err, fail
    from graft.errors import GraftError

    for line in _lines():
        if not line.strip():
            continue
        try:
            if line.lstrip().startswith("/"):
                reply = session.command(line)
                if reply.text:
                    err.print(reply.text, style="dim", markup=False)
                if reply.exit:
                    return
                if not reply.answer:
                    continue
                pieces = session.answer()
            else:
                pieces = session.ask(line)
            _show(session, pieces)
        except GraftError as error:
            fail(str(error))


def _show(session: ChatSession, pieces: Generator[str]) -> None:
    """Write an answer as it comes; Ctrl-C ends the answer, not the program."""
    from graft.console import err

    # Closing at once lets the session note what was said: the interrupt may come while a piece is being written.
    with suppress(KeyboardInterrupt), closing(pieces):
        for piece in pieces:
            sys.stdout.write(piece if not sys.stdout.isatty() else piece.translate(_UNSAFE))
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if session.speed is not None and err.is_terminal:
        err.print(f"[dim]{session.speed}[/dim]")


def _lines() -> Iterator[str]:
    """Questions: typed with line editing and history at a terminal, else the lines of stdin."""
    if sys.stdin is None:  # closed by the caller
        return
    if not sys.stdin.isatty():
        try:
            yield from (line.rstrip("\n") for line in sys.stdin)
        except UnicodeDecodeError as error:
            raise InputError(f"stdin: not UTF-8 text (byte {error.start}); convert it first") from None
        return
    with suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    prompt = "\001\033[1;36m\002>\001\033[0m\002 "  # \001 and \002 tell readline what takes no room
    while True:
        try:
            yield input(prompt)
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n(/exit or Ctrl-D ends the chat)\n")
