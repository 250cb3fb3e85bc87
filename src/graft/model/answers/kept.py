"""Keys and values of the answers under way, and the attention that reads them. Knows tensors; no models, no text.

All prompts of a group begin with the same stem. Its keys and values are kept once, and all queries of a step attend to
them in one matrix product; what a prompt has beyond the stem, and its answer, lies in a row of its own:

    stem   [K, S, D]       depth 0 .. S-1
    own    [R, K, C, D]    column c is depth S + c; a row's first free column is where its next token goes

A forward pass reads a `PromptRow` (new prompts as one row of a token tree) or a `NextRow` (one new token of each
answer); either is handed to the model as `row`, like the rows of training. Columns are written in place: appending to
a tensor, as a plain cache does, copies everything that is kept once per token.

Shapes: B answers under way, H query heads, K key heads, G = H / K, S tokens of the stem, C columns, D head size (values
may have another than keys), N nodes of a prompt row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from graft.model.attention.attend import Shape
from graft.model.attention.segments import BACKENDS, SEGMENTS, RowMissing, TreeRow

KEPT = "graft_kept"
"""The name under which a model's attention is set to read a PromptRow or a NextRow."""
_STEP = 64
"""Columns are added so many at a time, in tokens."""


@dataclass(slots=True)
class _Layer:
    """What one layer keeps: keys and values."""

    stem: tuple[Tensor, Tensor] | None = None
    """[K, S, D] each."""
    own: tuple[Tensor, Tensor] | None = None
    """[R, K, C, D] each."""

    def reserve(self, rows: int, columns: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Room for so many rows and columns; what is there stays. `like` is [1, K, *, D] each."""
        wanted = -(-columns // _STEP) * _STEP
        if self.own is not None:
            have_rows, have_columns = self.own[0].shape[0], self.own[0].shape[2]
            if rows <= have_rows and columns <= have_columns <= 2 * wanted:
                return self.own
            rows = max(rows, have_rows)
        made = []
        for place, tensor in enumerate(like):
            # Zeros: a column that is masked must still be finite, since 0 * nan is nan.
            new = tensor.new_zeros(rows, tensor.shape[1], wanted, tensor.shape[3])
            if self.own is not None:
                old = self.own[place][:, :, :wanted]
                new[: old.shape[0], :, : old.shape[2]] = old
            made.append(new)
        self.own = (made[0], made[1])
        return self.own


@dataclass(slots=True)
class Kept:
    """What all layers keep."""

    stem: int
    """Tokens of the stem, S."""
    stem_known: bool = False
    """Whether the stem has been computed."""
    layers: list[_Layer] = field(default_factory=list)

    def layer(self, index: int) -> _Layer:
        """One layer, in the order in which a forward pass reaches them."""
        while len(self.layers) <= index:
            self.layers.append(_Layer())
        return self.layers[index]

    def move(self, to: Tensor, source: Tensor) -> None:
        """Copy rows to where others have ended; both [n] indices."""
        for layer in self.layers:
            for tensor in layer.own or ():
                tensor[to] = tensor[source]


@dataclass(slots=True)
class PromptRow:
    """New prompts as a row of a token tree that begins with the stem; their keys and values are kept."""

    kept: Kept
    tree: TreeRow
    skip: int
    """Nodes of the stem whose keys and values are known: only the nodes behind them are fed. 0 or S."""
    nodes: Tensor
    """[M] for each prompt and each of its tokens beyond the stem, the node of the tree."""
    rows: Tensor
    """[M] the row in which it is kept."""
    columns: Tensor
    """[M] the column."""
    size: tuple[int, int]
    """Rows and columns that there must be room for."""
    calls: int = 0
    """Layers reached so far."""

    @property
    def ids(self) -> Tensor:
        """[1, N - skip]."""
        return self.tree.ids[:, self.skip :]

    @property
    def positions(self) -> Tensor:
        """[1, N - skip]."""
        return self.tree.depth[:, self.skip :]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """[1, H, N - skip, D] from query, key, value of the nodes that are fed."""
        layer = self.kept.layer(self.calls)
        self.calls += 1
        if self.skip:
            assert layer.stem is not None
            key, value = (torch.cat([old[None], new], 2) for old, new in zip(layer.stem, (key, value), strict=True))
            # The stem's queries are not known any more and not needed: theirs are the results that are cut off.
            query = torch.cat([query.new_zeros(*query.shape[:2], self.skip, query.shape[3]), query], dim=2)
        elif self.kept.stem:
            layer.stem = (key[0, :, : self.kept.stem].clone(), value[0, :, : self.kept.stem].clone())
        for kept, new in zip(layer.reserve(*self.size, (key, value)), (key, value), strict=True):
            kept[self.rows, :, self.columns] = new[0].transpose(0, 1)[self.nodes]
        return BACKENDS[SEGMENTS](query, key, value, self.tree, shape)[:, :, self.skip :]


@dataclass(slots=True)
class NextRow:
    """One new token of each answer under way; all of them are one row of the forward pass."""

    kept: Kept
    ids: Tensor
    """[1, B]."""
    positions: Tensor
    """[1, B] depth of each new token."""
    columns: int
    """Columns in use once the new tokens are kept: the largest of positions - S, plus 1."""
    calls: int = 0
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """[B, 1, 1, S + C] keys that are not seen, by window: made in the first layer, used in all."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        """[1, H, B, D] from query, key, value of the new tokens."""
        layer = self.kept.layer(self.calls)
        self.calls += 1
        answers, heads = query.shape[2], key.shape[1]
        row = torch.arange(answers, device=query.device)
        column = self.positions[0] - self.kept.stem
        own = []
        for kept, new in zip(layer.reserve(answers, self.columns, (key, value)), (key, value), strict=True):
            kept[row, :, column] = new[0].transpose(0, 1)
            own.append(kept[:answers, :, : self.columns])
        own_keys, own_values = own
        # [B, K, G, D]: the query heads of a group are rows of one product with their key head.
        asked = query[0].transpose(0, 1).unflatten(1, (heads, -1))
        scores = asked @ own_keys.transpose(-1, -2)
        if layer.stem is not None:
            scores = torch.cat([_shared(asked, layer.stem[0].transpose(-1, -2)), scores], dim=-1)
        shares = self._shares(scores, shape, query.shape[3])
        stem = self.kept.stem
        found = shares[..., stem:] @ own_values
        if layer.stem is not None:
            found += _shared(shares[..., :stem], layer.stem[1])
        return found.flatten(1, 2).transpose(0, 1)[None]

    def _shares(self, scores: Tensor, shape: Shape, width: int) -> Tensor:
        """[B, K, G, S + C] softmax of the products of queries and keys, with all that a layer adds to it."""
        heads, groups = scores.shape[1:3]
        scores = scores * (width**-0.5 if shape.scaling is None else shape.scaling)
        if shape.softcap is not None:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        if shape.slopes is not None:
            depth = torch.arange(scores.shape[-1], device=scores.device)
            slopes = shape.slopes.to(scores.device).view(heads, groups, 1)
            scores = scores + (slopes * depth).to(scores.dtype)
        if shape.window not in self.masks:
            self.masks[shape.window] = self._unseen(scores.shape[-1], shape.window)
        scores = scores.masked_fill(self.masks[shape.window], -torch.inf)
        if shape.sinks is None:
            return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
        sinks = shape.sinks.to(scores.dtype).view(1, heads, groups, 1).expand(scores.shape[0], -1, -1, 1)
        shares = torch.cat([scores, sinks], dim=-1).softmax(dim=-1, dtype=torch.float32)
        return shares[..., :-1].to(scores.dtype)

    def _unseen(self, keys: int, window: int | None) -> Tensor:
        distance = self.positions[0][:, None] - torch.arange(keys, device=self.positions.device)
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        return unseen[:, None, None]


def _shared(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows [B, K, G, a] times one matrix per key head [K, a, b] -> [B, K, G, b], as one product per head."""
    answers, heads, groups, _ = rows.shape
    product = rows.transpose(0, 1).reshape(heads, answers * groups, -1) @ matrix
    return product.view(heads, answers, groups, -1).transpose(0, 1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    row: PromptRow | NextRow | None = None,
    **_others: Any,  # transformers hands on whatever the model was called with
) -> tuple[Tensor, None]:
    if row is None:
        raise RowMissing(f"{type(module).__name__} does not hand the row on to its attention")
    shape = Shape(scaling, sliding_window, softcap, s_aux)
    return row.attend(query, key, value, shape).transpose(1, 2).contiguous(), None


def _no_mask(*_args: Any, **_others: Any) -> None:
    return None


AttentionInterface.register(KEPT, _attention)
AttentionMaskInterface.register(KEPT, _no_mask)
