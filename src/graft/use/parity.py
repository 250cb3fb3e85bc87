"""A tiny model trained for a few steps, twice: does a device learn what the CPU learns?

The model is made here, of seeded random weights; what trains it is what trains any model (TreeLM, Stepper, AdamW).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graft.model.attention.segments import DENSE, SEGMENTS
from graft.model.device import Precision, pick_precision
from graft.model.files.load import to_device
from graft.model.probe_device import FORMATS, Tried, attempt, within
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import trainable
from graft.tokens.tree import total_weight
from graft.train.step import Stepper
from graft.types import Example

STEPS = 20
WORST = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Largest relative difference of a step's loss."""
WORST_ATTENTION = 1e-3
"""The same between two attention backends on one device, over two steps, at most."""
ROW_TOKENS = 256
VOCABULARY = 128
RATE = 2e-3


def tiny_model() -> PreTrainedModel:
    """Two Llama layers, 128 wide, 4 heads of 32 over 2 of keys: always the same quarter of a million weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model: PreTrainedModel = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # wider than usual, so that attention matters for the loss
    model.train()
    return model


def tiny_examples(step: int) -> list[Example]:
    """Eight examples of a step: two prompts with four answers each, of which half repeat a token (to be learnt)."""
    rng = np.random.default_rng(step)
    examples = []
    for number in range(8):
        if number % 4 == 0:
            prompt = rng.integers(3, VOCABULARY, 24)
        answer = np.full(20, 7 + number) if number % 2 else rng.integers(3, VOCABULARY, 17)
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        weights = np.ones(len(ids), np.float32)
        weights[: len(prompt)] = 0
        examples.append(Example(f"{step}-{number}", 0, ids, weights, len(prompt)))
    return examples


def losses(
    device: torch.device,
    precision: Precision,
    steps: int = STEPS,
    trees: bool = True,
    branches: bool = True,
    backend: str = SEGMENTS,
) -> list[float]:
    """The mean loss of each step, [steps].

    Without `trees` it is computed by the model's own attention and the modules' own forwards, one example per row;
    without `branches` by the backend, one example per row.

    Raises:
        RuntimeError: the model or the attention backend cannot do it.
        GraftError: the model does not stay on the device, or the numbers stop making sense.
    """
    model = tiny_model()
    to_device(model, device)
    # Other backends are not tried first: a failure is wanted as it is, not what takes their place.
    lm = TreeLM(model, backend, trees=trees, fuse=trees, probe=backend == SEGMENTS)
    if trees and not lm.on_trees:
        raise RuntimeError(lm.why_not)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, fused=True)
    stepper = Stepper(lm, parameters, optimizer, precision, clip=1.0, seed=0)
    found = []
    for step in range(steps):
        examples = tiny_examples(step)
        together = [examples] if trees and branches else [[example] for example in examples]
        rows = [row for some in together for row in lm.rows(some, ROW_TOKENS)]
        weight = total_weight(examples)
        sums = [stepper.accumulate(row, (step, number), weight) for number, row in enumerate(rows)]
        found.append(stepper.update(sums, weight, step + 1).loss / weight)
    return found


def _compare(found: Sequence[float], wanted: Sequence[float], worst: float) -> Tried:
    errors = [abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True)]
    return within(errors, worst, "the loss")


def reference() -> list[float]:
    """The CPU's losses in fp32, one example per row."""
    cpu = torch.device("cpu")
    return losses(cpu, pick_precision("fp32", cpu), trees=False)


def try_training(device: torch.device, precision: str, wanted: Sequence[float]) -> Tried:
    """Losses of STEPS steps on a device, on trees, against `wanted`, those of `reference`."""
    return attempt(
        lambda: _compare(losses(device, pick_precision(precision, device)), wanted, WORST[FORMATS[precision]])
    )


def try_backend(device: torch.device, precision: str, backend: str, branches: bool) -> Tried:
    """Two steps by an attention backend against those by segments (segments: by the mask written out) on one device.

    Rows have `branches`, or are sequences.
    """

    def work() -> Tried:
        formats = pick_precision(precision, device)
        other = DENSE if backend == SEGMENTS else SEGMENTS
        found, wanted = (losses(device, formats, 2, branches=branches, backend=name) for name in (backend, other))
        return _compare(found, wanted, min(WORST_ATTENTION, WORST[FORMATS[precision]]))

    return attempt(work)
