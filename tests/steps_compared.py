"""Two optimizer steps by graft and by transformers' own forward, one example at a time, compared number by number."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from architectures import tiny_model
from tiny import branching_examples
from torch import Tensor, nn

from graft.config.train import Lora
from graft.errors import GraftError
from graft.model.device import pick_precision
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_lora, trainable
from graft.tokens.tree import build_rows, total_weight
from graft.train.step import Stepper
from graft.types import Example

ROW_TOKENS, STEPS, RATE, SMALL = 96, 2, 0.01, 1e-3


@dataclass(frozen=True)
class Compared:
    """How an architecture is trained, and how far its numbers are from one example at a time."""

    way: str
    """"on trees", "one per row" or "refused"."""
    why: str = ""
    """Why it is not on trees."""
    loss: float = 0.0
    """Largest relative difference of a step's loss."""
    gradient: float = 0.0
    """Largest L2 difference of a parameter's gradient, relative to it or to a thousandth of the whole gradient."""


def compare(architecture: str, adapters: bool = True) -> Compared:
    """Train every weight, and then adapters, for two steps each. A refusal is a result; every other error escapes."""
    model = tiny_model(architecture).train()
    plain = copy.deepcopy(model)
    try:
        lm = TreeLM(model)
    except GraftError as error:
        return Compared("refused", str(error).removeprefix("the model: "))
    pairs = [(lm, plain)]
    if adapters:
        tuned = add_lora(copy.deepcopy(plain), Lora(r=4), seed=0)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:  # zero at first, where A would have no gradient to compare
                nn.init.normal_(parameter, std=0.1)
        peer = copy.deepcopy(tuned)
        pairs.append((TreeLM(tuned), peer))
    differences = [_differences(ours, theirs) for ours, theirs in pairs]
    loss, gradient = (max(values) for values in zip(*differences, strict=True))
    return Compared("on trees" if lm.on_trees else "one per row", lm.why_not or "", loss, gradient)


def _differences(lm: TreeLM, plain: nn.Module) -> tuple[float, float]:
    """Largest difference of loss and of a gradient over two steps of both models."""
    ours, theirs = trainable(lm.model), trainable(plain)
    assert ours.keys() == theirs.keys()
    stepper = Stepper(
        lm, ours, torch.optim.SGD(ours.values(), RATE), pick_precision("fp32", lm.device), clip=None, seed=0
    )
    other = torch.optim.SGD(theirs.values(), RATE)
    worst_loss = worst_gradient = 0.0
    for step in range(STEPS):
        examples = branching_examples(seed=step)
        weight = total_weight(examples)
        rows = build_rows(examples, ROW_TOKENS, share=lm.on_trees)
        assert (len(rows) < len(examples)) == lm.on_trees
        sums = [stepper.accumulate(row, (step, number), weight) for number, row in enumerate(rows)]
        loss = sum(float(row.loss) for row in sums) / weight
        wanted = _accumulate_one_by_one(plain, examples)
        worst_loss = max(worst_loss, abs(loss - wanted) / max(1.0, abs(wanted)))
        worst_gradient = max(worst_gradient, _gradient_difference(ours, theirs))
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs.values() if p.grad is not None])
        for parameter in [*ours.values(), *theirs.values()]:  # a step of a size that changes things, whatever the scale
            if parameter.grad is not None:
                parameter.grad /= float(norm)
        stepper.update(sums, weight, step + 1)
        other.step()
        other.zero_grad()
        for name, parameter in ours.items():  # some architectures amplify a rounding of weights a thousand times
            assert torch.allclose(parameter, theirs[name], rtol=1e-4, atol=1e-5)
            parameter.data.copy_(theirs[name])
    return worst_loss, worst_gradient


def _accumulate_one_by_one(model: nn.Module, examples: list[Example]) -> float:
    """The step by definition: each example alone, full logits, the model's own attention."""
    weight = total_weight(examples)
    loss = 0.0
    for example in examples:
        ids = torch.tensor(example.ids).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll = nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")
        share = (nll * torch.tensor(example.weights[1:])).sum() / weight
        share.backward()
        loss += float(share.detach())
    return loss


def _gradient_difference(ours: dict[str, nn.Parameter], theirs: dict[str, nn.Parameter]) -> float:
    def gradient(parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    total = torch.nn.utils.get_total_norm([gradient(p) for p in theirs.values()])
    assert total > 0
    differences = [
        # What is far smaller than the rest is zero but for rounding: the keys' bias, for example.
        float((gradient(ours[name]) - gradient(p)).norm() / max(gradient(p).norm(), SMALL * total))
        for name, p in theirs.items()
    ]
    return max(differences)
