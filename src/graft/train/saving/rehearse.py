"""A save and a reload before the first step, so that a run whose results could not be loaded ends before it began.

An adapter begins as no change at all, and a file without it would answer like it. So what is trained is moved by noise
for the rehearsal, and put back to the bit afterwards.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from graft.config.train import Train
from graft.console import note
from graft.errors import InputError
from graft.model.device import Precision, free_bytes
from graft.model.files.load import load_adapter, load_base, to_device
from graft.model.files.save import find_fault, forgotten, save_model, saved_weights
from graft.model.processes.ranks import ALONE, Ranks
from graft.model.processes.shard import local
from graft.model.trees import TreeLM
from graft.train.saving.save import Writer
from graft.types import Example, Row

PIECE = 32
"""Tokens of an example that are computed."""
NOISE = 0.1
"""Of a tensor's own spread; a tensor of zeros gets a tenth of this."""
NOISE_PIECE = 2**20
"""Numbers that get their noise at a time."""
PART_OF_EFFECT = {torch.float32: 0.02, torch.bfloat16: 0.3, torch.float16: 0.3}
"""The reloaded model may be this far from the live one, as a share of what the noise changed. Rounding alone is below
a thousandth in fp32, and some per cent where products are in 16 bits."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""The same, as a share of the largest logit, where the noise changed nothing that the rehearsal's tokens meet."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a rehearsal takes beside the model that is about to be trained."""

    model: int
    """Of a second one."""
    copies: int
    """Of what is trained, to put it back."""

    @property
    def total(self) -> int:
        return self.model + self.copies

    def fits(self, free: int) -> bool:
        """Whether so much is free that it can take place: twice, since the run itself has no activations yet."""
        return 2 * self.total <= free


def rehearse_save(
    writer: Writer,
    lm: TreeLM,
    trained: Mapping[str, nn.Parameter],
    settings: Train,
    precision: Precision,
    row: Row,
    ranks: Ranks = ALONE,
) -> None:
    """Save the model with noise on what is trained, load it by transformers and PEFT, and compare the row's logits.

    Changes nothing of the run. Where memory has no room for a second model, that is said and only the names of what is
    saved are looked at.

    Raises:
        InputError: a trained tensor is not saved, or what was loaded answers otherwise than the live model.
    """
    _refuse_forgotten(lm, trained)
    of_trained = sum(p.nbytes for p in trained.values())
    need = Need(sum(p.nbytes for p in lm.model.parameters()) + of_trained, of_trained)
    free = free_bytes(lm.device)
    if ranks.from_first("room for a rehearsal", lambda: str(need.fits(free))) == "False":
        note(
            f"no rehearsal of a reload: a second model takes {need.total / 2**30:.1f} GiB, of {free / 2**30:.1f} GiB "
            f"free on {lm.device}. Each save is still compared with memory bit by bit"
        )
        return
    aside = writer.run.root / ".rehearsal.tmp"
    try:
        with _undone(lm, trained), torch.no_grad():
            torch.manual_seed(settings.seed)
            plain = _logits(lm, row, precision)
            _add_noise(trained)
            live = _logits(lm, row, precision)
            weights = saved_weights(lm.model)

            def try_it() -> str:
                _save(writer, lm, aside, weights)
                loaded = _logits(_reload(aside, lm, settings, precision), row, precision)
                quantised = lm.base.config.to_dict().get("quantization_config")  # may round activations too
                _compare(plain, live, loaded, torch.bfloat16 if quantised else precision.compute)
                return ""

            ranks.from_first("a rehearsal of saving", try_it)
    except OSError as error:
        raise InputError(
            f"{aside}: a rehearsal of saving failed ({error.strerror or error}); free some space, or choose out=DIR"
        ) from None
    finally:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        _forget_second_model(lm.device)


def piece_of(example: Example) -> Example:
    """What a rehearsal computes of an example, around its first target: the logits of all of it may be gigabytes."""
    first = int(np.argmax(example.weights > 0))
    begin = max(0, min(first - PIECE // 2, len(example.ids) - PIECE))
    weights = example.weights[begin : begin + PIECE].copy()
    weights[0] = 0  # nothing predicts it
    return replace(
        example,
        ids=example.ids[begin : begin + PIECE],
        weights=weights,
        prompt_len=min(max(0, example.prompt_len - begin), PIECE),
    )


def _refuse_forgotten(lm: TreeLM, trained: Mapping[str, nn.Parameter]) -> None:
    left_out = forgotten(lm.model, trained)
    if left_out:
        raise InputError(
            f"{len(left_out)} of {len(trained)} trained tensors would not be saved, for example {left_out[0]}; leave "
            "them out of what is trained (lora.target_modules, lora.modules_to_save)"
        )


@contextmanager
def _undone(lm: TreeLM, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside the model is evaluated and may be changed; afterwards it, the mode and the generators are as before."""
    training = lm.model.training
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    lm.model.eval()
    try:
        with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                trained[name].copy_(value)
        lm.model.train(training)


def _forget_second_model(device: torch.device) -> None:
    """Its memory is the run's again, and the log's peak that of steps."""
    gc.collect()  # a model's hooks refer to the model: without this it would stay for some steps, or for good
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _save(writer: Writer, lm: TreeLM, aside: Path, weights: Mapping[str, Tensor]) -> None:
    save_model(lm.model, writer.renderer, aside, start=writer.start, weights=weights)
    fault = find_fault(aside, lm.model, start=writer.start, weights=weights)
    if fault is not None:
        raise InputError(f"{aside}: a rehearsal of saving failed: {fault}")


def _compare(plain: Tensor, live: Tensor, loaded: Tensor, compute: torch.dtype) -> None:
    effect, error = (float((live - other).abs().max()) for other in (plain, loaded))
    allowed = max(PART_OF_EFFECT[compute] * effect, ROUNDING[compute] * float(live.abs().max()))
    if effect > ROUNDING[compute] * float(live.abs().max()):
        allowed = min(allowed, 0.5 * effect)  # as if nothing had been loaded would be 1.0
    if not error <= allowed:
        raise InputError(
            f"a rehearsal of saving failed: loaded by transformers and PEFT the model's logits are {error:.2g} from "
            f"the live ones, where {allowed:.2g} is rounding and all that is trained changed them by {effect:.2g}. "
            "The run would end in a folder that does not serve; please report the model's name and the settings"
        )


def _add_noise(trained: Mapping[str, nn.Parameter]) -> None:
    for parameter in trained.values():
        mine = local(parameter)  # each process moves its own part
        if mine.numel():
            spread = float(mine.float().std(unbiased=False)) or 0.1
            lines = torch.atleast_1d(mine)
            for piece in lines.split(max(1, NOISE_PIECE * len(lines) // lines.numel())):  # not all of an embedding's
                piece.add_(torch.randn_like(piece), alpha=NOISE * spread)


def _reload(folder: Path, lm: TreeLM, settings: Train, precision: Precision) -> TreeLM:
    """The saved folder as others load it: no module of graft's own in it."""
    trust = settings.trust_remote_code
    if settings.trains_own_weights:
        model = load_base(str(folder), precision.trained, trust, lm.device)
    else:
        base = load_base(settings.model, precision.frozen, trust, lm.device, quantize=settings.quantize)
        model = load_adapter(base, folder, trainable=False)  # type: ignore[assignment]
    to_device(model, lm.device)
    model.eval()
    return TreeLM(model, trees=lm.on_trees, fuse=False)


def _logits(lm: TreeLM, row: Row, precision: Precision) -> Tensor:
    """[M, V]"""
    with precision.autocast(lm.device):
        logits: Tensor = lm.enter(lambda: lm.logits(lm.place(row, split=False)))
        return logits.float()
