"""Positions that are encoded otherwise in long texts: from which length, and what may then be computed in one row.

Knows configurations, rotary modules and examples; no trees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graft.types import Example


@dataclass(frozen=True, slots=True)
class LongTexts:
    """How an architecture treats long texts."""

    turn: int | None
    """LongRoPE takes its other frequencies for texts of more tokens (Ding et al. 2024, arXiv:2402.13753)."""
    alone: int | None
    """Texts of more tokens must be computed alone, and no row of several may have more nodes."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LongTexts:
        """As a model's config and its parts say it; of several lengths it is the least."""
        return cls(min(_turning(config), default=None), min(_lone(config), default=None))

    @property
    def differ(self) -> bool:
        """Whether long texts are treated in any way of their own."""
        return self.turn is not None or self.alone is not None

    def groups(self, examples: Sequence[Example], row_tokens: int) -> Iterator[tuple[list[Example], int]]:
        """Examples that may be in one row with each other, and how many nodes their rows may have."""
        for longer in (False, True):
            group = [e for e in examples if longer == (self.turn is not None and len(e.ids) > self.turn)]
            lone = [e for e in group if self.alone is not None and len(e.ids) > self.alone]
            others = [e for e in group if self.alone is None or len(e.ids) <= self.alone]
            if others:
                yield others, row_tokens if self.alone is None else min(row_tokens, self.alone)
            for example in lone:
                yield [example], len(example.ids)


def _turning(config: Mapping[str, Any]) -> Iterator[int]:
    own = config.get("original_max_position_embeddings")
    if config.get("rope_type") == "longrope" and isinstance(own, int):
        yield own
    for part in _parts(config):
        yield from _turning(part)


def _lone(config: Mapping[str, Any]) -> Iterator[int]:
    if config.get("attn_temperature_tuning") and isinstance(config.get("floor_scale"), int | float):
        yield int(config["floor_scale"]) - 1  # Llama 4 scales queries anew every so many tokens, by their index
    context = config.get("max_position_embeddings")
    if _is_dynamic(config.get("rope_parameters")) and isinstance(context, int):
        yield context  # its frequencies follow from the longest text at hand
    for part in _parts(config):
        yield from _lone(part)


def _is_dynamic(rope: Any) -> bool:
    """Whether these parameters, or those of some kind of layer among them, are of dynamic NTK."""
    if not isinstance(rope, Mapping):
        return False
    return rope.get("rope_type") == "dynamic" or any(map(_is_dynamic, rope.values()))


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in config.values() if isinstance(value, Mapping)]


def forget_longest(model: nn.Module) -> None:
    """Let dynamic NTK choose its frequencies by the text at hand alone.

    transformers keeps those of the longest text so far, so that numbers would depend on what was computed before, and a
    resumed run would have others.
    """
    for module in model.modules():
        kinds = vars(module).get("rope_type", "")
        names = [f"{name}_" for name, kind in kinds.items() if kind == "dynamic"] if isinstance(kinds, dict) else [""]
        if names != [""] or kinds == "dynamic":
            module.register_forward_pre_hook(lambda module, _args, names=names: _forget(module, names))


def _forget(module: Any, prefixes: Sequence[str]) -> None:
    for prefix in prefixes:
        current, original = (getattr(module, f"{prefix}{name}") for name in ("inv_freq", "original_inv_freq"))
        module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
