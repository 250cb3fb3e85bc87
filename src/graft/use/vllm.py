"""vLLM as an engine for many answers: the same prompts' ids, stop set and settings, computed by its kernels.

Written against vLLM's offline interface: `LLM(...)`, `LLM.generate(prompts, sampling_params, lora_request=...)`,
`SamplingParams`, `LoRARequest`. Prompts go in as ids, so that its tokenizer and templates play no part; what a model
folder's generation_config.json says is switched off, and only graft's stop set ends an answer.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.config.train import Sampling
from graft.errors import InputError, first_line
from graft.use.open import Target

if TYPE_CHECKING:
    from graft.model.answers.room import Generated

AT_ONCE = 1024
"""Prompts handed over in one call: after each call the answers are on disk."""
_FORMATS = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `max_lora_rank`."""


def require_vllm() -> None:
    """Raises:
    InputError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            'engine vllm: vLLM is not installed; pip install "graft-llm[vllm]" (it needs a GPU that it supports), or '
            "use --engine transformers"
        )


class VllmEngine:
    """A model in vLLM, with its adapter if it has one."""

    def __init__(self, llm: Any, context: int, adapter: Any | None) -> None:
        """`llm` is vLLM's LLM, `adapter` a LoRARequest; `context` is the most tokens of prompt and answer."""
        self._llm, self._context, self._adapter = llm, context, adapter

    @classmethod
    def open(cls, target: Target, device: str, precision: str, trust_remote_code: bool) -> VllmEngine:
        """Load a model folder, or an adapter onto its base.

        Raises:
            InputError: vLLM is not installed, cannot load the model, or is to run on another device than it chooses.
        """
        require_vllm()
        if device not in ("auto", "cuda"):
            raise InputError(
                f"device {device}: vLLM chooses its device itself; set CUDA_VISIBLE_DEVICES, or --engine transformers"
            )
        from vllm import LLM  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        settings: dict[str, Any] = {
            "model": target.base or target.folder,
            "tokenizer": target.tokenizer,
            "dtype": _FORMATS[precision],
            "trust_remote_code": trust_remote_code,
            "generation_config": "vllm",  # not the folder's
            "enable_prefix_caching": True,
        }
        adapter = None
        if target.kind == "adapter":
            settings |= {"enable_lora": True, "max_lora_rank": _rank_allowed(Path(target.folder))}
            adapter = LoRARequest(lora_name="adapter", lora_int_id=1, lora_path=target.folder)
        try:
            llm = LLM(**settings)
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise InputError(
                f"{target.named}: vLLM cannot load it: {first_line(error)}; --engine transformers may"
            ) from None
        return cls(llm, int(llm.llm_engine.model_config.max_model_len), adapter)

    def new_tokens_allowed(self, prompt_len: int, wanted: int) -> int:
        """How many of `wanted` new tokens fit behind a prompt."""
        return min(wanted, self._context - prompt_len)

    def answers(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
    ) -> Iterator[list[tuple[int, Generated]]]:
        """(index of the prompt, answer); vLLM itself batches, and shares common prefixes."""
        from graft.model.answers.room import Generated

        stops = frozenset(stop_ids)
        for start in range(0, len(prompts), AT_ONCE):
            part = prompts[start : start + AT_ONCE]
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in part],
                [self._settings(len(prompt), stop_ids, sampling) for prompt in part],
                use_tqdm=False,
                lora_request=self._adapter,
            )
            done = []
            for place, output in enumerate(outputs):  # in the order of the prompts
                ids = list(output.outputs[0].token_ids)
                end = next((index for index, token in enumerate(ids) if token in stops), None)
                done.append((start + place, Generated(tuple(ids[:end]), end is not None)))
            yield done

    def _settings(self, prompt_len: int, stop_ids: Sequence[int], sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=self.new_tokens_allowed(prompt_len, sampling.max_new_tokens),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,  # 0 is all tokens there too
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed if sampling.temperature > 0 else None,
            stop_token_ids=list(stop_ids),
            ignore_eos=True,  # the stop set alone ends an answer
            detokenize=False,
        )


def _rank_allowed(folder: Path) -> int:
    """The least of vLLM's ranks that holds the adapter's.

    Raises:
        InputError: the adapter is no LoRA, or its rank is larger than any.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    kind, rank = config.get("peft_type"), config.get("r")
    if kind != "LORA" or not isinstance(rank, int) or config.get("use_dora") or config.get("modules_to_save"):
        raise InputError(
            f"{folder}: vLLM takes plain LoRA adapters only (no DoRA, no modules saved in full); --engine transformers "
            "takes them all"
        )
    ranks = [rank, *(config.get("rank_pattern") or {}).values()]
    found = next((allowed for allowed in _LORA_RANKS if allowed >= max(ranks)), None)
    if found is None:
        raise InputError(f"{folder}: rank {max(ranks)}; vLLM takes up to {_LORA_RANKS[-1]}; use --engine transformers")
    return found
