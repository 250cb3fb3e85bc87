"""A causal language model that computes rows of token trees, in the way that is proved when it is loaded.

Shapes: N nodes, M predictors (parents of targets), d hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomForCausalLM

from graft.errors import ConfigError
from graft.model.attention import bloom
from graft.model.attention.row_mask import RowMask, carried_by_masks
from graft.model.attention.segments import SEGMENTS, TreeRow
from graft.model.fused.last_layer import LastLayer
from graft.model.fused.lora import fuse_lora, fuse_trained_linears
from graft.model.fused.mlp import Lent, fuse_mlps, there
from graft.model.fused.norm import fuse_norms
from graft.model.fused.rotary import fuse_rotary
from graft.model.logit_shape import LogitShape, declared_logit_shape
from graft.model.long_texts import LongTexts, forget_longest
from graft.model.processes.context import Context, tell_longest
from graft.model.processes.shard import computed_on
from graft.model.proof import (
    branching_examples,
    find_logit_shape,
    logits_by_itself,
    name_of,
    refuse_if_not_causal,
    why_no_tree,
    why_not_exact,
)
from graft.model.tuned.adapters import plain
from graft.tokens.tree import SHORTEST_RUN, build_rows, padded
from graft.types import Example, Row


def at_once(compute: Callable[[], Any]) -> Any:
    """Compute without ado: the weights are whole and where they are needed."""
    return compute()


class TreeLM:
    """A model together with the way in which it can be trained: on trees, or one example per row."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        backend: str = SEGMENTS,
        trees: bool = True,
        row_step: int = 1,
        fuse: bool = True,
        probe: bool = True,
        enter: Callable[[Callable[[], Any]], Any] = at_once,
        context: Context | None = None,
    ) -> None:
        """Prepare and probe a model; it keeps `backend` as its attention implementation where trees are exact.

        Rows of trees are padded to multiples of `row_step` nodes, for backends and compilers that want few shapes.
        Without `fuse` its modules keep their own forward, for a compiler to fuse.
        `why_not` says, in a sentence, why the model runs one example per row; None means that it runs on trees.
        `backend_failed` says why `backend` was given up for segments; None means that it is in use.
        Without `probe` what the config says is believed: for a model without numbers, which is only counted.
        `enter` surrounds what computes with the weights, where those must be gathered first (model/processes/shard.py).
        With `context` each row is computed by several processes (model/processes/context.py), also without
        `trees`.

        Raises:
            InputError: this is no model that can be trained.
            ConfigError: there is a context, and the model does not compute split rows exactly.
        """
        self.model = model
        self.enter = enter
        self.context = context
        if fuse:
            fuse_modules(model)
        self.base = plain(model)
        self.decoder: nn.Module = self.base.base_model
        self.embedding: nn.Module = self.base.get_input_embeddings()
        self.last_layer = LastLayer(self.decoder)
        self.long_texts = LongTexts.of(self.base.config.to_dict())
        forget_longest(self.base)
        self.row_step = row_step
        self.layer_ranks = 1
        """Neighbouring processes that compute each layer between them (model/processes/tensor.py)."""
        self.dealt: Callable[[TreeRow], TreeRow] = lambda tree: tree
        """The row with the predictors whose loss this process computes: all, unless several share a row."""
        self.recompute: Callable[[], tuple[Any, Any]] = noop_context_fn
        """What surrounds a part within `enter` that is computed again in the backward pass, for `checkpoint`."""
        self.backend_failed: str | None = None
        self.on_trees = False
        self.row_in_masks = False
        self.merges = trees
        """Whether examples share the nodes of what they have in common; False also where rows are not trees."""
        self.why_not: str | None = "trees are switched off" if not trees and context is None else None
        self.logit_shape: LogitShape | None = None
        training = model.training
        model.eval()
        with torch.no_grad():
            if probe:
                enter(lambda: self._probe(backend))
            else:
                self._assume(backend)
        self.merges &= self.on_trees
        model.train(training)

    @property
    def head(self) -> nn.Module:
        """The output layer, [d] -> [V]."""
        head: nn.Module = self.base.get_output_embeddings()
        return head

    @property
    def device(self) -> torch.device:
        return computed_on(next(self.embedding.parameters()))

    def states(self, tree: TreeRow) -> Tensor:
        """[M, d] last hidden states of the predictors."""
        states: Tensor = self._run(self.decoder, tree).last_hidden_state[0]
        return states.index_select(0, tree.predictors)

    def logits(self, tree: TreeRow) -> Tensor:
        """[M, V] logits of the predictors by the model's own forward, whatever it does after its decoder."""
        logits: Tensor = self.output(tree).logits[0]
        return logits.index_select(0, tree.predictors)

    def output(self, tree: TreeRow) -> Any:
        """What the model itself returns for a row, as transformers names it."""
        return self._run(self.base, tree)

    def rows(self, examples: Sequence[Example], row_tokens: int) -> list[Row]:
        """The rows in which this model computes these examples.

        Where positions are encoded otherwise in long texts (model/long_texts.py), those that would change each other's
        are never in one row: the model decides by the largest position of a forward pass.
        """
        return [
            row
            for group, budget in self.long_texts.groups(examples, row_tokens)
            for row in build_rows(group, budget, share=self.merges, shortest_run=SHORTEST_RUN)
        ]

    @property
    def row_ranks(self) -> int:
        """Neighbouring processes that compute every row together."""
        return self.layer_ranks if self.context is None else self.context.size

    def place(self, row: Row, split: bool = True) -> TreeRow:
        """The row on the model's device, as it is computed there: this process's share of it where rows are split.

        Without `split` all of it; every process then computes the same.
        """
        context = self.context if split else None
        if self.on_trees:
            step = self.row_step if context is None else math.lcm(self.row_step, context.least)
            row = padded(row, -(-len(row) // step) * step)
        return TreeRow.of(row, self.device, None if context is None else context.share(row, self.device))

    def _run(self, module: nn.Module, tree: TreeRow) -> Any:
        if self.context is not None:
            self.context.longest = None if tree.share is None else tree.share.longest
        if not self.on_trees:
            return module(input_ids=tree.ids, use_cache=False)
        if isinstance(self.base, BloomForCausalLM):
            return module(input_ids=tree.ids, attention_mask=RowMask.of(tree), use_cache=False)
        if self.row_in_masks:
            # Ones for every node: without a mask, transformers would look for packed sequences in the position ids.
            with carried_by_masks(tree):
                return module(
                    input_ids=tree.ids,
                    attention_mask=torch.ones_like(tree.ids),
                    position_ids=tree.depth,
                    use_cache=False,
                )
        return module(input_ids=tree.ids, position_ids=tree.depth, row=tree, use_cache=False)

    def _probe(self, backend: str) -> None:
        examples = branching_examples(next(self.embedding.parameters()).shape[0])
        own = self.base.config._attn_implementation
        singles = [TreeRow.of(row, self.device) for row in build_rows(examples, 64, share=False)]
        reference = [logits_by_itself(self, single) for single in singles]
        refuse_if_not_causal(self, examples[0], reference[0])
        if self.context is not None:
            tell_longest(self.base, self.context)
        self.logit_shape = find_logit_shape(self, singles, reference)
        if self.why_not is not None:
            return
        self.on_trees = True
        (row,) = build_rows(examples, 64)
        for name in dict.fromkeys((backend, SEGMENTS)):
            self._install(name)
            # By argument; with a last layer that is read elsewhere than at the predictors; by the masks.
            for self.row_in_masks, self.last_layer.active in ((False, True), (False, False), (True, False)):
                self.why_not = why_not_exact(self, row, examples, reference)
                if self.why_not is None:
                    return
            if name == backend:
                self.backend_failed = self.why_not
        self.on_trees = self.row_in_masks = False
        if self.context is not None:
            raise ConfigError(
                f"context_ranks: {name_of(self)} cannot compute a row in {self.context.size} processes: "
                f"{self.why_not}; leave context_ranks out"
            )
        if not isinstance(self.base, BloomForCausalLM):
            self.base.set_attn_implementation(own)

    def _assume(self, backend: str) -> None:
        """What `_probe` finds for nearly every model, without computing anything."""
        if self.decoder is not self.base and self.base.get_output_embeddings() is not None:
            self.logit_shape = declared_logit_shape(self.base.config)
        if not isinstance(self.base, BloomForCausalLM):  # it has its own way to be told of a row
            self.why_not = self.why_not or why_no_tree(self)
        if self.why_not is None:
            self.on_trees = True
            self._install(backend)

    def _install(self, backend: str) -> None:
        """From here on attention is computed by `backend`."""
        if isinstance(self.base, BloomForCausalLM):
            bloom.install(self.base, backend)
        else:
            self.base.set_attn_implementation(backend)


def fuse_modules(model: nn.Module, lent: Lent = there) -> None:
    """Give a model's modules the forwards of graft, each one operation where transformers takes several.

    `lent` surrounds what computes with a module's matrices, where they are not there yet (model/files/late.py).
    """
    fuse_lora(model)
    fuse_trained_linears(model)
    fuse_norms(model)
    fuse_mlps(model, lent)
    fuse_rotary(model)
