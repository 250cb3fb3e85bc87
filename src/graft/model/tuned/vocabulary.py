"""New rows of the embedding and of the output head, for tokens that the base does not know. Ids only, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def grow(model: PreTrainedModel, rows: int) -> None:
    """Make room for ids up to `rows` - 1; tied heads stay tied. Spare rows that many bases have are used first."""
    if rows > _table(model).shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


@torch.no_grad()
def begin_as_pieces(model: PreTrainedModel, pieces: Mapping[int, Sequence[int]]) -> None:
    """Let each new token begin as the mean of the tokens that its text was before, where it is read and predicted."""
    head = model.get_output_embeddings()
    tables: list[Tensor] = [_table(model)]
    if isinstance(head, nn.Linear) and head.weight is not tables[0]:
        tables.append(head.weight)
        if head.bias is not None:
            tables.append(head.bias)
    for table in tables:
        for token, before in pieces.items():
            table[token] = table[list(before)].float().mean(dim=0)


def token_rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """Which rows of which modules are trained for these tokens: the embedding's, and an untied head's."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules: list[nn.Module] = [embedding]
    if isinstance(head, nn.Linear) and head.weight is not _table(model):
        modules.append(head)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(module)].rsplit(".", 1)[-1]: list(ids) for module in modules}


def _table(model: PreTrainedModel) -> nn.Parameter:
    return model.get_input_embeddings().get_parameter("weight")
