"""`graft predict`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.options import (
    BasePath,
    Device,
    EngineOption,
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

if TYPE_CHECKING:
    from graft.tokens.renderer import Renderer
    from graft.use.engine import Engine


def predict(
    model: ModelPath,
    *,
    data: Annotated[list[str], typer.Option(help="Conversations to answer; may be given several times.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The predictions file.")] = Path("predictions.jsonl"),
    base: BasePath = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    repetition_penalty: RepetitionPenalty = 1.0,
    num_beams: Annotated[int, typer.Option(help="Width of beam search; 1 is none.", min=1)] = 1,
    seed: Seed = 0,
    thinking: Thinking = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.", min=1)] = None,
    template: Annotated[str | None, typer.Option(help="Chat template; else the model's own.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin the file anew.")] = False,
    engine: EngineOption = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts to stdout as one JSON object.")] = False,
) -> None:
    """Answer a file of questions: one line of {id, input, predict, target, finish} each.

    The same command again goes on where it was broken off. finish is stop, length (cut at --max-new-tokens or at the
    model's context), too_long (the prompt alone fills the context) or refused (by the chat template).

    Example: graft predict runs/my-run --data test.jsonl --out predictions.jsonl
    """
    from graft.config.train import load_sampling
    from graft.console import note
    from graft.errors import InputError
    from graft.tokens.load import load_renderer
    from graft.use.engine import check_engine, open_engine
    from graft.use.open import resolve
    from graft.use.predict import answer_settings, counts_in_words, predict_file, read_questions, sampling_shown
    from graft.words import counted

    if os.path.realpath(out) in map(os.path.realpath, data):
        raise InputError(f"{out}: is the data itself; choose another --out")
    target = resolve(model, base)
    sampling = load_sampling(
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty,
            "num_beams": num_beams,
            "seed": seed,
        }
    )
    check_engine(engine, sampling)
    questions, rejected = read_questions(data, thinking, limit)
    renderer = load_renderer(target.tokenizer, template, None, trust_remote_code)
    note(f"{counted(len(questions), 'question')}, {sampling_shown(sampling)}")

    def opened() -> tuple[Engine, Renderer]:
        return open_engine(engine, target, device, precision, trust_remote_code), renderer

    settings = answer_settings(
        target.folder, target.fingerprint(), renderer, sampling, engine, target.base, target.quantize
    )
    counts = predict_file(questions, out, settings, opened, sampling, overwrite=overwrite)
    note(f"{out}: {counts_in_words(counts)}")
    if as_json:
        typer.echo(json.dumps({"out": str(out), "rejected": rejected, **counts}))
