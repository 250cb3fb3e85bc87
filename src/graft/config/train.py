"""Every setting of training and generation. Knows no torch and no files' content."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from graft.config.base import Settings, load
from graft.config.data import Sources, Split


class Lora(Settings):
    """LoRA by PEFT; the names are PEFT's where it has one."""

    r: int = Field(default=16, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=32, gt=0)
    """Scale: the update is multiplied by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output head), a list of module names, or a regular expression."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained and saved in full beside the adapter."""


def _as_text(value: Any) -> Any:
    """YAML reads an unquoted day as a date."""
    return value.isoformat() if isinstance(value, datetime.date) else value


class Encode(Settings):
    """How conversations become token ids. Everything here shapes the ids, so it is part of the store's key."""

    template: str | None = None
    """Chat template: None takes the model's own, or `chatml` where it has none; or one of graft's names (`chatml`,
    `alpaca`, `vicuna`, `llama2`, `zh-dialogue`), or the path of a Jinja file."""
    train_on: Literal["all_turns", "last_turn", "everything"] = "all_turns"
    """Which tokens are targets: every assistant turn, the last one, or every token including the user's."""
    max_length: int = Field(default=2048, ge=8)
    """Longest example in tokens."""
    overlong: Literal["drop", "drop_oldest_turns"] = "drop"
    """A longer one is dropped and counted, or loses its oldest whole turns. Answers are never cut."""
    date: Annotated[str | None, BeforeValidator(_as_text)] = None
    """The day (YYYY-MM-DD) that templates which write today's date are given; None is the day of the run's start."""


class Train(Settings):
    """All settings of `graft train`, in the order in which the run uses them."""

    model: str
    """A model folder or Hugging Face id."""
    data: Sources = Field(min_length=1)
    """Training data: a file, or a list of files or {path, format, weight}."""
    val: Sources = ()
    """Validation data; where empty, `split.val` of the training data is held out."""
    test: Sources = ()
    """Test data, only split off and written to the run folder for `graft eval`; else `split.test` is held out."""
    split: Split = Split()
    out: str | None = None
    """Run folder; None is runs/MODEL-DATA, numbered when that exists."""
    encode: Encode = Encode()
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    """The run refuses to start when a larger share of the rows is rejected."""

    method: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()
    init_from: str | None = None
    """Start from the weights of this adapter or model folder (weights only: optimizer and position start afresh)."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` is bf16 where the device computes it natively, else fp16 with a scaler on CUDA, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    attention: Literal["auto", "segments", "flex", "varlen", "dense"] = "auto"
    """Kernel of the trees' attention; the result is the same. `auto` is segments, on CUDA `varlen` for rows without
    branches and `flex` for others; `dense` writes the mask out, for checks."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the decoder layers (torch.compile): the first steps take minutes, later ones may be faster. `auto` does
    not, as long as no device is known where it pays."""
    kernels: Literal["auto", "liger", "none"] = "auto"
    """`liger` computes norms and feed-forward layers on CUDA by liger-kernel; `auto` does where it is installed."""
    trees: bool = True
    """Share common prefixes between the examples of a step. False trains one example per row (same loss, slower)."""
    trust_remote_code: bool = False

    batch_size: int = Field(default=16, ge=1)
    """Conversations per optimizer step, whatever the hardware."""
    row_tokens: int | None = Field(default=None, ge=8)
    """Tokens computed in one forward pass, the memory knob; None is max(encode.max_length, 4096). It does not change
    the result."""
    epochs: float = Field(default=3.0, gt=0, le=1_000_000)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps; the schedule is laid over them."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; None is 2e-4 for LoRA and 2e-5 for full fine-tuning."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The schedule ends at this share of `lr`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; on weight matrices only, never on biases, norms or embeddings."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null switches clipping off."""

    eval_every: int | None = Field(default=None, ge=1)
    """Validate every so many steps (always at step 0 and at the end too); None is ten times per run."""
    save_every: int | None = Field(default=None, ge=1)
    """Checkpoint every so many steps; None is at every validation."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept besides the best one."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better loss; `final/` then holds the best weights."""
    log_every: int = Field(default=1, ge=1)
    trace: bool = False
    """Write trace.jsonl: the conversation ids and rows of every optimizer step."""
    resume: bool = False
    """Continue the run in `out` from its newest complete checkpoint, exactly as if it had never stopped."""

    @property
    def peak_lr(self) -> float:
        """The learning rate after the default for the method is filled in."""
        if self.lr is not None:
            return self.lr
        return 2e-4 if self.method == "lora" else 2e-5

    @property
    def row_budget(self) -> int:
        """Most nodes of one row, in tokens; an example always fits into one row."""
        if self.row_tokens is None:
            return max(self.encode.max_length, 4096)
        return self.row_tokens

    @model_validator(mode="after")
    def _rows_hold_the_longest_example(self) -> Self:
        if self.row_tokens is not None and self.row_tokens < self.encode.max_length:
            raise ValueError(
                f"row_tokens {self.row_tokens} is less than encode.max_length {self.encode.max_length}: "
                "an example is never cut, so raise row_tokens or lower encode.max_length"
            )
        return self


class Sampling(Settings):
    """How text is generated: greedy unless a temperature or beams are given."""

    max_new_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 is all tokens."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    num_beams: int = Field(default=1, ge=1)
    seed: int = Field(default=0, ge=0)


def load_train(recipe: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Train:
    """Settings of a training run; see `load`."""
    return load(Train, recipe, overrides, flags)


def load_sampling(values: Mapping[str, Any]) -> Sampling:
    """Settings of generation from the command's flags; see `load`."""
    return load(Sampling, flags=values)
