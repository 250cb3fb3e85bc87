"""A causal language model that computes rows of token trees, and the proof that it does so exactly.

Shapes: N nodes, M predictors (parents of targets), d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomForCausalLM

from graft.errors import InputError
from graft.model import bloom
from graft.model.adapters import plain
from graft.model.attention import SEGMENTS, RowMissing, TreeRow, watch_masks
from graft.model.last_layer import LastLayer
from graft.model.lora import fuse_lora
from graft.model.mlp import fuse_mlps
from graft.model.norm import fuse_norms
from graft.model.rotary import fuse_rotary
from graft.tokens.tree import SHORTEST_RUN, build_rows, padded
from graft.types import Example, Row


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What an architecture does to its output layer's product: cap * tanh(scale * product / cap)."""

    scale: float = 1.0
    softcap: float | None = None


def shape_logits(product: Tensor, shape: LogitShape) -> Tensor:
    """Logits from the output layer's product."""
    if shape.scale != 1.0:
        product = product * shape.scale
    if shape.softcap is not None:
        product = shape.softcap * torch.tanh(product / shape.softcap)
    return product


class TreeLM:
    """A model together with the way in which it can be trained: on trees, or one example per row."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        backend: str = SEGMENTS,
        trees: bool = True,
        row_step: int = 1,
        fuse: bool = True,
    ) -> None:
        """Prepare and probe a model; it keeps `backend` as its attention implementation where trees are exact.

        Rows of trees are padded to multiples of `row_step` nodes, for backends and compilers that want few shapes.
        Without `fuse` its modules keep their own forward, for a compiler to fuse.
        `why_not` says, in a sentence, why the model runs one example per row; None means that it runs on trees.
        `backend_failed` says why `backend` was given up for segments; None means that it is in use.
        """
        self.model = model
        if fuse:
            fuse_lora(model)
            fuse_norms(model)
            fuse_mlps(model)
            fuse_rotary(model)
        self.base = plain(model)
        self.decoder: nn.Module = self.base.base_model
        self.embedding: nn.Module = self.base.get_input_embeddings()
        self.last_layer = LastLayer(self.decoder)
        self.row_step = row_step
        self.backend_failed: str | None = None
        self.on_trees = False
        self.why_not: str | None = "trees are switched off" if not trees else None
        self.logit_shape: LogitShape | None = None
        training = model.training
        model.eval()
        with torch.no_grad():
            self._probe(backend)
        model.train(training)

    @property
    def head(self) -> nn.Module:
        """The output layer, [d] -> [V]."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    def device(self) -> torch.device:
        return next(self.embedding.parameters()).device

    def states(self, tree: TreeRow) -> Tensor:
        """[M, d] last hidden states of the predictors."""
        states: Tensor = self._run(self.decoder, tree).last_hidden_state[0]
        return states.index_select(0, tree.predictors)

    def logits(self, tree: TreeRow) -> Tensor:
        """[M, V] logits of the predictors by the model's own forward, whatever it does after its decoder."""
        logits: Tensor = self._run(self.base, tree).logits[0]
        return logits.index_select(0, tree.predictors)

    def rows(self, examples: Sequence[Example], row_tokens: int) -> list[Row]:
        """The rows in which this model computes these examples."""
        return build_rows(examples, row_tokens, share=self.on_trees, shortest_run=SHORTEST_RUN)

    def place(self, row: Row) -> TreeRow:
        """The row on the model's device, as it is computed there."""
        if self.on_trees:
            row = padded(row, -(-len(row) // self.row_step) * self.row_step)
        return TreeRow.of(row, self.device)

    def _run(self, module: nn.Module, tree: TreeRow) -> Any:
        if not self.on_trees:
            return module(input_ids=tree.ids, use_cache=False)
        if isinstance(self.base, BloomForCausalLM):
            return module(input_ids=tree.ids, attention_mask=bloom.RowMask.of(tree), use_cache=False)
        return module(input_ids=tree.ids, position_ids=tree.depth, row=tree, use_cache=False)

    def _probe(self, backend: str) -> None:
        examples = _probe_examples(next(self.embedding.parameters()).shape[0])
        own = self.base.config._attn_implementation
        singles = [TreeRow.of(row, self.device) for row in build_rows(examples, 64, share=False)]
        reference = [self.logits(single) for single in singles]
        self._refuse_if_not_causal(examples[0], reference[0])
        self.logit_shape = self._find_logit_shape(singles, reference)
        if self.why_not is not None:
            return
        self.on_trees = True
        (row,) = build_rows(examples, 64)
        for name in dict.fromkeys((backend, SEGMENTS)):
            if isinstance(self.base, BloomForCausalLM):
                bloom.install(self.base, name)
            else:
                self.base.set_attn_implementation(name)
            for active in (True, False):  # perhaps its last layer is read elsewhere than at the predictors
                self.last_layer.active = active
                self.why_not = self._compare(self.place(row), row, examples, reference)
                if self.why_not is None:
                    break
            if self.why_not is None:
                break
            if name == backend:
                self.backend_failed = self.why_not
        if self.why_not is not None:
            self.on_trees = False
            if not isinstance(self.base, BloomForCausalLM):
                self.base.set_attn_implementation(own)

    def _refuse_if_not_causal(self, example: Example, reference: Tensor) -> None:
        """No logits that predict a token may depend on it: an encoder would be trained to copy.

        Raises:
            InputError: they do.
        """
        ids = example.ids.copy()
        ids[-1] = (ids[-1] + 1) % next(self.embedding.parameters()).shape[0]
        (row,) = build_rows([replace(example, ids=ids)], 64)
        other = self.logits(TreeRow.of(row, self.device))
        if not _difference(other, reference) <= self._tolerance(reference.dtype):
            raise InputError(
                f"{self.base.name_or_path}: {type(self.base).__name__} sees later tokens than it predicts, so it is no "
                "causal language model; choose a model that generates text"
            )

    def _find_logit_shape(self, singles: Sequence[TreeRow], reference: Sequence[Tensor]) -> LogitShape | None:
        """How the logits follow from the decoder's states, checked against the model's own; None if in no such form."""
        if self.decoder is self.base or self.base.get_output_embeddings() is None:
            return None
        config = self.base.config.to_dict()
        divisor = config.get("logits_scaling") or 1.0  # Granite
        scale = (config.get("logit_scale") or 1.0) / divisor  # Cohere
        shape = LogitShape(scale, config.get("final_logit_softcapping"))  # Gemma 2
        for single, wanted in zip(singles, reference, strict=True):
            states = self.states(single)
            if _difference(shape_logits(self.head(states).float(), shape), wanted) > self._tolerance(wanted.dtype):
                return None
        return shape

    def _tolerance(self, dtype: torch.dtype) -> float:
        """Rounding of a forward pass; LLM.int8 rounds activations too, and finds outliers in whatever it is given."""
        quantised = self.base.config.to_dict().get("quantization_config")
        return _tolerance(torch.bfloat16 if quantised else dtype)

    def _compare(self, tree: TreeRow, row: Row, examples: Sequence[Example], reference: Sequence[Tensor]) -> str | None:
        """Why the logits on the tree are not those of the examples one by one; None if they are."""
        try:
            with watch_masks() as windows_of_masks:
                found = self.logits(tree)
        except RowMissing as error:
            return str(error)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            return f"its forward does not take a row ({type(error).__name__}: {str(error).splitlines()[0]})"
        if not tree.calls:
            return "its attention asks for no attention function (recurrent, or code of its own)"
        if windows_of_masks != tree.windows:
            return (
                f"its masks use windows of {sorted(windows_of_masks)} tokens "
                f"but its attention is told of {sorted(tree.windows)}"
            )
        by_path = _logits_by_example(row, tree, found, examples)
        worst = max(_difference(ours, wanted) for ours, wanted in zip(by_path, reference, strict=True))
        if not worst <= self._tolerance(found.dtype):
            return f"its logits on a tree differ from those one by one by {worst:.1e} (relative)"
        return None


def _probe_examples(vocabulary: int) -> list[Example]:
    """Three examples that branch twice, of seeded random ids, every token a target; in the order of a tree."""
    rng = np.random.default_rng(0)
    stem, limb, *leaves = (rng.integers(0, vocabulary, 5, dtype=np.int32) for _ in range(5))
    paths = [np.concatenate(path) for path in ((stem, limb, leaves[0]), (stem, limb, leaves[1]), (stem, leaves[2]))]
    examples = []
    for number, ids in enumerate(paths):
        weights = np.ones(len(ids), np.float32)
        weights[0] = 0
        examples.append(Example(str(number), 0, ids, weights, 1))
    return sorted(examples, key=lambda example: example.ids.astype(">i4").tobytes())


def _logits_by_example(row: Row, tree: TreeRow, logits: Tensor, examples: Sequence[Example]) -> list[Tensor]:
    """Per example, the logits [L - 1, V] along its path, looked up by walking the tree."""
    of_label = {int(node): index for index, node in enumerate(np.flatnonzero((row.weight != 0) & (row.parent >= 0)))}
    children: dict[tuple[int, int], int] = {
        (int(parent), int(token)): node for node, (parent, token) in enumerate(zip(row.parent, row.ids, strict=True))
    }
    found = []
    for example in examples:
        node, picks = children[-1, int(example.ids[0])], []
        for token in example.ids[1:]:
            node = children[node, int(token)]
            picks.append(of_label[node])
        found.append(logits[torch.tensor(picks, device=logits.device)])
    return found


def _difference(ours: Tensor, wanted: Tensor) -> float:
    """Relative L2 difference of logits, a constant per position left out."""
    wanted = wanted.float() - wanted.float().mean(-1, keepdim=True)
    ours = ours.float() - ours.float().mean(-1, keepdim=True)
    return float((ours - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding of a forward pass, with a margin of ten to a hundred; a wrong mask is far above it."""
    return 1e-4 if dtype == torch.float32 else 3e-2
