"""The last decoder layer only where something is predicted. Knows modules and a row's predictors, not text.

What the last layer gives at a node that predicts nothing is never read: its keys and values are needed there, but not
its query, its attention's output or its MLP. Those are computed at the predictors alone and are zero elsewhere.

Shapes: N nodes, P nodes that predict something.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from graft.model.attention.segments import TreeRow
from graft.model.fused.mlp import LAYERS

LARGEST_SHARE = 0.9
"""Where more of the nodes predict something, picking them out costs more than it spares."""


class LastLayer:
    """The parts of the last decoder layer that treat every node by itself, made to do so at the predictors only."""

    def __init__(self, decoder: nn.Module) -> None:
        """Change the last layer of a decoder with the usual parts: `self_attn` with `q_proj` and `o_proj`, and `mlp`.

        The row reaches the attention with its call, before the other parts run; so it does when the layer is computed
        again in the backward pass.
        """
        self.active = True
        self._nodes: Tensor | None = None
        layers = next((child for child in decoder.children() if isinstance(child, nn.ModuleList)), None)
        parts = dict(layers[-1].named_children()) if layers else {}
        if not {"self_attn", "mlp"} <= parts.keys():
            return
        attention, mlp = parts["self_attn"], parts["mlp"]
        inside = dict(attention.named_children())
        if not {"q_proj", "o_proj"} <= inside.keys():
            return
        attention.register_forward_pre_hook(self._note_row, with_kwargs=True)
        narrowed = [inside["q_proj"], inside["o_proj"]]
        if set(LAYERS) <= {name for name, _ in mlp.named_children()}:  # a mixture's router must see every token
            narrowed.append(mlp)
        for module in narrowed:
            module.forward = self._narrowed(module.forward)
        mlp.register_forward_hook(self._forget_row, always_call=True)

    def _note_row(self, _attention: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        row = kwargs.get("row")
        few = isinstance(row, TreeRow) and len(row.asked) < LARGEST_SHARE * row.ids.shape[1]
        self._nodes = row.asked if self.active and row is not None and few else None

    def _forget_row(self, *_: Any) -> None:
        self._nodes = None

    def _narrowed(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def at_predictors(x: Tensor) -> Tensor:
            if self._nodes is None:
                return forward(x)
            found = forward(x.index_select(1, self._nodes))  # [1, P, features]
            return found.new_zeros(1, x.shape[1], found.shape[2]).index_copy(1, self._nodes, found)

        return at_predictors
