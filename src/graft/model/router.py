"""The balance of a mixture of experts, as one example at a time would see it. Knows models and rows, no steps.

transformers adds `coefficient * aux` to the loss of a forward pass, with

    aux = E * sum over experts e of f_e * p_e                       (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6)

f_e the share of tokens that chose e among their top k, p_e the mean probability of e, both over all tokens and layers.
Here the tokens are those of a whole optimizer step, each as often as there are examples that pass through its node.
aux is no sum over rows, but f is a count, without a gradient: when it is known, what is left is a sum.

Shapes: N nodes, E experts, Y layers with a router.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.errors import ConfigError
from graft.model.attention.segments import TreeRow
from graft.model.processes.ranks import Ranks
from graft.model.proof import probe_row
from graft.model.trees import TreeLM

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What configs call the loss's coefficient."""


@dataclass(frozen=True, slots=True)
class Routed:
    """What the routers did with some tokens, each counted as often as examples pass through it."""

    chosen: Tensor
    """[Y, E] float64: how many tokens chose each expert."""
    probability: Tensor
    """[E]: sum of the routers' probabilities over tokens and layers. Differentiable where gradients are wanted."""
    tokens: float
    """Sum of the tokens over layers: the denominator of both means."""

    def plus(self, other: Routed) -> Routed:
        """Of both rows together."""
        return Routed(self.chosen + other.chosen, self.probability + other.probability, self.tokens + other.tokens)

    def times(self, factor: float) -> Routed:
        """As if there were so many times the tokens."""
        return Routed(self.chosen * factor, self.probability * factor, self.tokens * factor)

    def everywhere(self, ranks: Ranks) -> Routed:
        """Of the rows of all processes; its probability has no gradient."""
        if ranks.size == 1:
            return self
        lone = self.chosen.new_tensor([self.tokens])
        mine = torch.cat([self.chosen.flatten(), self.probability.detach().double(), lone])
        *counts, tokens = ranks.sum(mine.cpu()).split([self.chosen.numel(), self.probability.numel(), 1])
        chosen, probability = (count.to(mine.device) for count in counts)
        return Routed(chosen.view_as(self.chosen), probability.to(self.probability.dtype), float(tokens))

    @property
    def heaviest(self) -> float:
        """How many times more tokens than on the average the most loaded expert of a layer got."""
        return float((self.chosen.max(dim=1).values / self.chosen.mean(dim=1)).max())


def share_of_aux(row: Routed, step: Routed) -> Tensor:
    """A row's part of the step's aux: the parts of all rows of a step add up to it."""
    chosen = (step.chosen.sum(dim=0) / step.tokens).to(row.probability)
    return len(chosen) * (chosen * row.probability).sum() / step.tokens


class RouterWatch:
    """Reads a model's routers during its forward passes."""

    def __init__(self, lm: TreeLM, coefficient: float | None) -> None:
        """Find the routers and check the loss against the model's own; `coefficient` None is that of its config.

        Raises:
            ConfigError: the model has no such loss.
        """
        self.lm = lm
        lm.last_layer.active = False  # its router must see every token as it is, not only those that predict
        config = lm.base.config.get_text_config().to_dict()
        name = lm.base.name_or_path or type(lm.base).__name__
        self.top_k: int = config.get("num_experts_per_tok") or 0
        if coefficient is None:
            coefficient = next((config[key] for key in COEFFICIENTS if config.get(key)), None)
        if "output_router_logits" not in config or not self.top_k or not self._agrees():
            raise ConfigError(
                f"router_aux_loss: {name} has no load-balancing loss in transformers (it has no experts, or balances "
                "them by a bias); leave the setting out"
            )
        if coefficient is None:  # asked last: a number is of no use to a model without the loss
            raise ConfigError(f"router_aux_loss auto: {name} has no coefficient of its own; give a number")
        self.coefficient = coefficient

    @contextmanager
    def reading(self, tree: TreeRow) -> Iterator[list[Routed]]:
        """Holds, after a forward pass over the row within it, what its routers did."""
        found: list[Routed] = []
        config = self.lm.base.config.get_text_config()

        def read(_module: nn.Module, _args: object, output: dict[str, tuple[Tensor, ...]]) -> None:
            logits = output.get("router_logits")
            if logits:
                found.append(routed(logits, self.top_k, tree.multiplicity))

        before = config.output_router_logits
        config.output_router_logits = True
        hook = self.lm.decoder.register_forward_hook(read)
        try:
            yield found
        finally:
            hook.remove()
            config.output_router_logits = before

    def _agrees(self) -> bool:
        """Whether our loss is the model's own, for an example alone."""
        tree = probe_row(self.lm)
        training = self.lm.model.training
        self.lm.model.eval()
        try:
            with torch.no_grad(), self.reading(tree) as found:
                own = self.lm.enter(lambda: self.lm.output(tree).get("aux_loss"))
        finally:
            self.lm.model.train(training)
        return own is not None and bool(found) and bool(torch.isclose(share_of_aux(*found, *found), own, rtol=1e-3))


def routed(logits: Sequence[Tensor], top_k: int, multiplicity: Tensor) -> Routed:
    """Counts and probabilities from each layer's router logits [N, E] and how often each node counts, [N]."""
    chosen, probability = [], torch.zeros(())
    for layer in logits:
        shares = layer.flatten(0, -2).softmax(dim=-1)
        # One index beyond the nodes, or a layer that computed fewer of them, would count the wrong tokens.
        if len(shares) != len(multiplicity):
            raise AssertionError(f"a router saw {len(shares)} of {len(multiplicity)} nodes")
        picked = shares.topk(top_k, dim=-1).indices
        counts = torch.zeros(shares.shape[-1], dtype=torch.float64, device=shares.device)
        counts.index_add_(0, picked.flatten(), multiplicity.double().repeat_interleave(top_k))
        chosen.append(counts)
        probability = probability.to(shares.device) + multiplicity @ shares.float()
    return Routed(torch.stack(chosen), probability, float(multiplicity.sum()) * len(logits))
