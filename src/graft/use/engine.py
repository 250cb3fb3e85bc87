"""What answers prompts: graft's own generation with a loaded model, or vLLM. Speaks ids and settings; no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from graft.config.engine import EngineName
from graft.config.train import Sampling
from graft.console import note
from graft.errors import InputError

if TYPE_CHECKING:
    from graft.model.answers.room import Generated, Model
    from graft.model.trees import TreeLM
    from graft.use.open import Target


class Engine(Protocol):
    """Answers prompts."""

    def new_tokens_allowed(self, prompt_len: int, wanted: int) -> int:
        """How many of `wanted` new tokens fit behind a prompt; 0 or less: the prompt alone fills the context."""

    def answers(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
    ) -> Iterator[list[tuple[int, Generated]]]:
        """(index of the prompt, answer), each once, some at a time."""


class LoadedEngine:
    """A loaded model. One that is exact on token trees computes once what prompts have in common."""

    def __init__(self, model: Model | TreeLM) -> None:
        from graft.model.trees import TreeLM

        self._model = model
        self._plain = model.model if isinstance(model, TreeLM) else model
        if isinstance(model, TreeLM) and model.why_not is not None:
            note(f"answers come from padded batches that share nothing: {model.why_not}")

    def new_tokens_allowed(self, prompt_len: int, wanted: int) -> int:
        from graft.model.answers.room import new_tokens_allowed

        return new_tokens_allowed(self._plain, prompt_len, wanted)

    def answers(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
    ) -> Iterator[list[tuple[int, Generated]]]:
        from graft.model.answers.generate import generate_in_batches

        return generate_in_batches(self._model, prompts, stop_ids, sampling)


def open_engine(name: EngineName, target: Target, device: str, precision: str, trust_remote_code: bool) -> Engine:
    """Load a model into the wanted engine.

    Raises:
        InputError: the model cannot be loaded, or the engine is not there or cannot be used with these settings.
    """
    if name == "vllm":
        from graft.use.vllm import VllmEngine

        return VllmEngine.open(target, device, precision, trust_remote_code)
    from graft.model.files.load import load_model
    from graft.model.trees import TreeLM

    loaded = load_model(target.folder, device, precision, trust_remote_code, target.base, target.quantize)
    return LoadedEngine(TreeLM(loaded.model))


def check_engine(name: EngineName, sampling: Sampling) -> None:
    """What can be known before weights are loaded.

    Raises:
        InputError: vLLM is wanted and not installed, or for beams.
    """
    if name != "vllm":
        return
    from graft.use.vllm import require_vllm

    require_vllm()
    if sampling.num_beams > 1:
        raise InputError(
            f"num_beams {sampling.num_beams}: beams are not asked of vLLM; use num_beams 1 or --engine transformers"
        )
