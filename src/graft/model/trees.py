"""A causal language model that computes rows of token trees, and the proof that it does so exactly.

Shapes: N nodes, M predictors (parents of targets), d hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomForCausalLM

from graft.errors import ConfigError, InputError, said
from graft.model.attention import bloom
from graft.model.attention.row_mask import RowMask, carried_by_masks, watch_masks
from graft.model.attention.segments import SEGMENTS, RowMissing, TreeRow
from graft.model.fused.last_layer import LastLayer
from graft.model.fused.lora import fuse_lora, fuse_trained_linears
from graft.model.fused.mlp import Lent, fuse_mlps, there
from graft.model.fused.norm import fuse_norms
from graft.model.fused.rotary import fuse_rotary
from graft.model.long_texts import LongTexts, forget_longest
from graft.model.processes.context import Context, counts_tokens, tell_longest
from graft.model.processes.shard import computed_on
from graft.model.tuned.adapters import plain
from graft.tokens.tree import SHORTEST_RUN, build_rows, padded, targets
from graft.types import Example, Row

FOREIGN_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError)
"""What modelling code raises when it is called in a way that it does not expect."""


LAYERS_WITH_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
"""What transformers calls layers that mix a token with the ones before it other than by attention."""


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
        examples = _probe_examples(next(self.embedding.parameters()).shape[0])
        own = self.base.config._attn_implementation
        singles = [TreeRow.of(row, self.device) for row in build_rows(examples, 64, share=False)]
        reference = [self._logits_by_itself(single) for single in singles]
        self._refuse_if_not_causal(examples[0], reference[0])
        if self.context is not None:
            tell_longest(self.base, self.context)
        self.logit_shape = self._find_logit_shape(singles, reference)
        if self.why_not is not None:
            return
        self.on_trees = True
        (row,) = build_rows(examples, 64)
        for name in dict.fromkeys((backend, SEGMENTS)):
            self._install(name)
            # By argument; with a last layer that is read elsewhere than at the predictors; by the masks.
            for self.row_in_masks, self.last_layer.active in ((False, True), (False, False), (True, False)):
                self.why_not = self._compare(row, examples, reference)
                if self.why_not is None:
                    return
            if name == backend:
                self.backend_failed = self.why_not
        self.on_trees = self.row_in_masks = False
        if self.context is not None:
            raise ConfigError(
                f"context_ranks: {self._name} cannot compute a row in {self.context.size} processes: {self.why_not}; "
                "leave context_ranks out"
            )
        if not isinstance(self.base, BloomForCausalLM):
            self.base.set_attn_implementation(own)

    def _assume(self, backend: str) -> None:
        """What `_probe` finds for nearly every model, without computing anything."""
        if self.decoder is not self.base and self.base.get_output_embeddings() is not None:
            self.logit_shape = self._declared_logit_shape()
        if not isinstance(self.base, BloomForCausalLM):  # it has its own way to be told of a row
            self.why_not = self.why_not or self._why_different()
        if self.why_not is None:
            self.on_trees = True
            self._install(backend)

    def _install(self, backend: str) -> None:
        """From here on attention is computed by `backend`."""
        if isinstance(self.base, BloomForCausalLM):
            bloom.install(self.base, backend)
        else:
            self.base.set_attn_implementation(backend)

    def _logits_by_itself(self, single: TreeRow) -> Tensor:
        """The model's own logits of an example alone, from its token ids and nothing else.

        Raises:
            InputError: its forward needs more than ids, or gives no logits per token.
        """
        try:
            logits = self.logits(single)
        except FOREIGN_ERRORS as error:
            raise InputError(
                f"{self._name}: {type(self.base).__name__} does not compute from token ids alone ({said(error)}), so "
                "it is no model that graft can train; choose a model that continues text"
            ) from None
        if logits.dim() != 2 or len(logits) != len(single.predictors):
            raise InputError(
                f"{self._name}: {type(self.base).__name__} gives logits of shape {list(logits.shape)} for "
                f"{len(single.predictors)} tokens, not one row for each; choose a model that continues text"
            )
        return logits

    @property
    def _name(self) -> str:
        return self.base.name_or_path or "the model"

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
                f"{self._name}: {type(self.base).__name__} sees later tokens than it predicts, so it is no "
                "causal language model; choose a model that generates text"
            )

    def _find_logit_shape(self, singles: Sequence[TreeRow], reference: Sequence[Tensor]) -> LogitShape | None:
        """How the logits follow from the decoder's states, checked against the model's own; None if in no such form."""
        if self.decoder is self.base or self.base.get_output_embeddings() is None:
            return None
        shape = self._declared_logit_shape()
        for single, wanted in zip(singles, reference, strict=True):
            try:
                logits = shape_logits(self.head(self.states(single)).float(), shape)
            except FOREIGN_ERRORS:  # something stands between the decoder and the output layer
                return None
            if logits.shape != wanted.shape or not _difference(logits, wanted) <= self._tolerance(wanted.dtype):
                return None
        return shape

    def _declared_logit_shape(self) -> LogitShape:
        config = self.base.config.to_dict()
        divisor = config.get("logits_scaling") or 1.0  # Granite
        scale = (config.get("logit_scale") or 1.0) / divisor  # Cohere
        return LogitShape(scale, config.get("final_logit_softcapping"))  # Gemma 2

    def _tolerance(self, dtype: torch.dtype) -> float:
        """Rounding of a forward pass; LLM.int8 rounds activations too, and finds outliers in whatever it is given."""
        quantised = self.base.config.to_dict().get("quantization_config")
        return _tolerance(torch.bfloat16 if quantised else dtype)

    def _compare(self, row: Row, examples: Sequence[Example], reference: Sequence[Tensor]) -> str | None:
        """Why the logits on the tree are not those of the examples one by one; None if they are."""
        tree = self.place(row, split=False)
        try:
            with watch_masks() as sizes_of_masks:
                found = self.logits(tree)
        except RowMissing as error:
            return str(error)
        except FOREIGN_ERRORS as error:
            return f"its forward does not take a row ({said(error)})"
        if not tree.calls:
            return "its attention asks for no attention function (recurrent, or code of its own)"
        if not self.row_in_masks and sizes_of_masks != tree.windows:
            return (
                f"its masks use windows of {sorted(sizes_of_masks)} tokens "
                f"but its attention is told of {sorted(tree.windows)}"
            )
        by_path = _logits_by_example(row, tree, found, examples)
        worst = max(_difference(ours, wanted) for ours, wanted in zip(by_path, reference, strict=True))
        if not worst <= self._tolerance(found.dtype):
            return (
                self._why_different() or f"its logits on a tree differ from those one by one by {worst:.1e} (relative)"
            )
        return None if self.context is None else self._compare_split(row, found, self.context)

    def _compare_split(self, row: Row, whole: Tensor, context: Context) -> str | None:
        """Why the logits of the split tree are not those of the whole one; None if they are. The same everywhere."""
        counts = counts_tokens(self.base.config.to_dict())
        if counts is not None:
            return f"{counts} goes by a token's index, which a process that has some tokens does not know"
        tree = self.place(row)
        assert tree.share is not None
        mine = tree.share.place[row.parent[targets(row)]] >= 0
        try:
            found = self.logits(tree)
            worst = _difference(found, whole[torch.from_numpy(mine).to(whole.device)])
        except FOREIGN_ERRORS as error:
            worst, failed = math.inf, said(error)
        else:
            failed = f"its logits then differ by {worst:.1e} (relative)"
        if context.any(not worst <= self._tolerance(whole.dtype)):
            return failed
        return None

    def _why_different(self) -> str | None:
        """The commonest reasons why nodes of a row see more than their path."""
        kinds: Sequence[str] = getattr(self.base.config.get_text_config(), "layer_types", None) or ()
        states = [kind for kind in dict.fromkeys(kinds) if kind in LAYERS_WITH_STATE]
        if states:
            return f"its layers of the kind {', '.join(states)} carry a state from token to token"
        if "position_ids" not in inspect.signature(self.decoder.forward).parameters:
            return "its forward takes no position ids"
        return None


def fuse_modules(model: nn.Module, lent: Lent = there) -> None:
    """Give a model's modules the forwards of graft, each one operation where transformers takes several.

    `lent` surrounds what computes with a module's matrices, where they are not there yet (model/files/late.py).
    """
    fuse_lora(model)
    fuse_trained_linears(model)
    fuse_norms(model)
    fuse_mlps(model, lent)
    fuse_rotary(model)


def probe_row(lm: TreeLM) -> TreeRow:
    """A short made-up example alone, for which transformers' own numbers need no trees."""
    examples = _probe_examples(next(lm.embedding.parameters()).shape[0])
    (row,) = build_rows(examples[:1], 64)
    return TreeRow.of(row, lm.device)


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
