"""The proof, made when a model is loaded, that it computes trees as it computes their examples one by one.

Made-up examples that branch are computed both ways and their logits compared. What does not hold is said in a sentence,
with which the model runs one example per row (model/trees.py decides); what is no causal language model is refused.

Shapes: L tokens of an example, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graft.errors import InputError, said
from graft.model.attention.row_mask import watch_masks
from graft.model.attention.segments import RowMissing, TreeRow
from graft.model.logit_shape import LogitShape, declared_logit_shape, shape_logits
from graft.model.processes.context import Context, counts_tokens
from graft.tokens.tree import build_rows, targets
from graft.types import Example, Row

if TYPE_CHECKING:
    from graft.model.trees import TreeLM

FOREIGN_ERRORS = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError)
"""What modelling code raises when it is called in a way that it does not expect."""
LAYERS_WITH_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
"""What transformers calls layers that mix a token with the ones before it other than by attention."""


def name_of(lm: TreeLM) -> str:
    """The model's name in messages."""
    return lm.base.name_or_path or "the model"


def logits_by_itself(lm: TreeLM, single: TreeRow) -> Tensor:
    """The model's own logits of an example alone, from its token ids and nothing else.

    Raises:
        InputError: its forward needs more than ids, or gives no logits per token.
    """
    try:
        logits = lm.logits(single)
    except FOREIGN_ERRORS as error:
        raise InputError(
            f"{name_of(lm)}: {type(lm.base).__name__} does not compute from token ids alone ({said(error)}), so "
            "it is no model that graft can train; choose a model that continues text"
        ) from None
    if logits.dim() != 2 or len(logits) != len(single.predictors):
        raise InputError(
            f"{name_of(lm)}: {type(lm.base).__name__} gives logits of shape {list(logits.shape)} for "
            f"{len(single.predictors)} tokens, not one row for each; choose a model that continues text"
        )
    return logits


def refuse_if_not_causal(lm: TreeLM, example: Example, reference: Tensor) -> None:
    """No logits that predict a token may depend on it: an encoder would be trained to copy.

    Raises:
        InputError: they do.
    """
    ids = example.ids.copy()
    ids[-1] = (ids[-1] + 1) % next(lm.embedding.parameters()).shape[0]
    (row,) = build_rows([replace(example, ids=ids)], 64)
    other = lm.logits(TreeRow.of(row, lm.device))
    if not _difference(other, reference) <= _allowed(lm, reference.dtype):
        raise InputError(
            f"{name_of(lm)}: {type(lm.base).__name__} sees later tokens than it predicts, so it is no "
            "causal language model; choose a model that generates text"
        )


def find_logit_shape(lm: TreeLM, singles: Sequence[TreeRow], reference: Sequence[Tensor]) -> LogitShape | None:
    """How the logits follow from the decoder's states, checked against the model's own; None if in no such form."""
    if lm.decoder is lm.base or lm.base.get_output_embeddings() is None:
        return None
    shape = declared_logit_shape(lm.base.config)
    for single, wanted in zip(singles, reference, strict=True):
        try:
            logits = shape_logits(lm.head(lm.states(single)).float(), shape)
        except FOREIGN_ERRORS:  # something stands between the decoder and the output layer
            return None
        if logits.shape != wanted.shape or not _difference(logits, wanted) <= _allowed(lm, wanted.dtype):
            return None
    return shape


def _allowed(lm: TreeLM, dtype: torch.dtype) -> float:
    """Rounding of a forward pass; LLM.int8 rounds activations too, and finds outliers in whatever it is given."""
    quantised = lm.base.config.to_dict().get("quantization_config")
    return _tolerance(torch.bfloat16 if quantised else dtype)


def why_not_exact(lm: TreeLM, row: Row, examples: Sequence[Example], reference: Sequence[Tensor]) -> str | None:
    """Why the logits on the tree are not those of the examples one by one; None if they are."""
    tree = lm.place(row, split=False)
    try:
        with watch_masks() as sizes_of_masks:
            found = lm.logits(tree)
    except RowMissing as error:
        return str(error)
    except FOREIGN_ERRORS as error:
        return f"its forward does not take a row ({said(error)})"
    if not tree.calls:
        return "its attention asks for no attention function (recurrent, or code of its own)"
    if not lm.row_in_masks and sizes_of_masks != tree.windows:
        return (
            f"its masks use windows of {sorted(sizes_of_masks)} tokens "
            f"but its attention is told of {sorted(tree.windows)}"
        )
    by_path = _logits_by_example(row, tree, found, examples)
    worst = max(_difference(ours, wanted) for ours, wanted in zip(by_path, reference, strict=True))
    if not worst <= _allowed(lm, found.dtype):
        return why_no_tree(lm) or f"its logits on a tree differ from those one by one by {worst:.1e} (relative)"
    return None if lm.context is None else _why_not_split(lm, row, found, lm.context)


def _why_not_split(lm: TreeLM, row: Row, whole: Tensor, context: Context) -> str | None:
    """Why the logits of the split tree are not those of the whole one; None if they are. The same everywhere."""
    counts = counts_tokens(lm.base.config.to_dict())
    if counts is not None:
        return f"{counts} goes by a token's index, which a process that has some tokens does not know"
    tree = lm.place(row)
    assert tree.share is not None
    mine = tree.share.place[row.parent[targets(row)]] >= 0
    try:
        found = lm.logits(tree)
        worst = _difference(found, whole[torch.from_numpy(mine).to(whole.device)])
    except FOREIGN_ERRORS as error:
        worst, failed = math.inf, said(error)
    else:
        failed = f"its logits then differ by {worst:.1e} (relative)"
    if context.any(not worst <= _allowed(lm, whole.dtype)):
        return failed
    return None


def why_no_tree(lm: TreeLM) -> str | None:
    """The commonest reasons why nodes of a row see more than their path."""
    kinds: Sequence[str] = getattr(lm.base.config.get_text_config(), "layer_types", None) or ()
    states = [kind for kind in dict.fromkeys(kinds) if kind in LAYERS_WITH_STATE]
    if states:
        return f"its layers of the kind {', '.join(states)} carry a state from token to token"
    if "position_ids" not in inspect.signature(lm.decoder.forward).parameters:
        return "its forward takes no position ids"
    return None


def probe_row(lm: TreeLM) -> TreeRow:
    """A short made-up example alone, for which transformers' own numbers need no trees."""
    examples = branching_examples(next(lm.embedding.parameters()).shape[0])
    (row,) = build_rows(examples[:1], 64)
    return TreeRow.of(row, lm.device)


def branching_examples(vocabulary: int) -> list[Example]:
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
