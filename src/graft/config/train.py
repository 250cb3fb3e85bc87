"""Every setting of training and generation. Knows no torch and no files' content."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

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
    exclude_modules: str | tuple[str, ...] = ()
    """Modules left out of the targets: names, or a regular expression."""
    init_lora_weights: bool | str = True
    """How the update begins: true (at zero), `gaussian`, `orthogonal`, `pissa`, `pissa_niter_N`, `olora`, `eva` or
    `corda`."""
    init_examples: int = Field(default=64, ge=1)
    """Examples of the run from which `eva` and `corda` learn how to begin (PEFT is handed them)."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Another rank for modules by name or regular expression."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Another alpha for modules by name or regular expression."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Only these decoder layers, counted from 0."""
    lora_bias: bool = False
    """A trained bias on the update's second matrix."""
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    """Token ids whose embeddings are trained too, each row on its own; a tied head follows."""
    target_parameters: tuple[str, ...] = ()
    """Parameters by name, for weights that are no linear layer: `mlp.experts.gate_up_proj` of a mixture of experts."""
    loraplus_ratio: float | None = Field(default=None, gt=0)
    """LoRA+: the second matrix learns so many times faster than the first (arXiv:2402.12354; 16 there)."""

    @field_validator("init_lora_weights")
    @classmethod
    def _known_start(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and not re.fullmatch(INIT_NAMES, value):
            reason = NO_INIT.get(value, "not known; use true, " + INIT_NAMES.replace("|", ", ").replace(r"\d+", "N"))
            raise ValueError(reason)
        return value


INIT_NAMES = r"gaussian|orthogonal|pissa|pissa_niter_\d+|olora|eva|corda"
NO_INIT = {
    "loftq": "LoftQ replaces the base's weights by rounded ones that no adapter folder can hold; use pissa",
    "lora_ga": "LoRA-GA needs a backward pass over data before the adapter exists, which graft does not make; use eva",
}


class Freeze(Settings):
    """Which weights of the model `method: freeze` trains; all others stay as they are."""

    layers: int = Field(default=2, ge=0)
    """So many of the last decoder layers."""
    patterns: tuple[str, ...] = ()
    """And every parameter in whose name one of these regular expressions is found."""


Optimizer = Literal[
    "adamw", "adamw_8bit", "adafactor", "muon", "lion", "schedule_free_adamw", "galore", "apollo", "sgd"
]
Schedule = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt", "polynomial"]


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

    method: Literal["lora", "full", "freeze", "peft"] = "lora"
    """LoRA, every weight, some of the weights, or another of PEFT's kinds."""
    lora: Lora = Lora()
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Format of the frozen weights under LoRA: `nf4` and `int8` by bitsandbytes, `fp8` by torchao.
    A base that is stored quantised keeps its own format."""
    peft: dict[str, Any] = Field(default_factory=dict)
    """For `method: peft`: `type` (VERA, IA3, OFT, LOHA, ...) and that kind's own options by PEFT's names."""
    freeze: Freeze = Freeze()
    new_tokens: tuple[str, ...] = ()
    """Words that become one token each; their embeddings begin as the mean of the pieces they were and are trained."""
    init_from: str | None = None
    """Start from the weights of this adapter or model folder (weights only: optimizer and position start afresh)."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ..."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`auto` is bf16 where the device computes it natively, else fp16 with a scaler on CUDA, else fp32."""
    master_weights: Literal["fp32", "stochastic"] = "fp32"
    """Format of the weights that full fine-tuning trains: fp32, or bf16 with updates rounded by chance, which loses
    none in the mean and takes 12 bytes per weight instead of 16."""
    checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    """What is computed again in the backward pass instead of being kept: nothing; norms, activations and gated products
    (same gradients to the bit, a few per cent more time); every decoder layer; `auto` takes the first that fits."""
    checkpoint_every: int = Field(default=1, ge=1)
    """With `checkpointing: full`, only every so many layers, counted from the first: more memory, less time."""
    offload_activations: bool = False
    """Move what is kept for the backward pass from the GPU to the host's memory. CUDA only."""
    router_aux_loss: Literal["auto"] | Annotated[float, Field(gt=0)] | None = None
    """Mixture of experts: add the load-balancing loss times this; `auto` takes the model's own coefficient."""
    gradient_checkpointing: bool = False
    """The older name: `true` is `checkpointing: full`."""
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
    row_tokens: Annotated[int, Field(ge=8)] | Literal["auto"] | None = None
    """Tokens computed in one forward pass, the memory knob; None is max(encode.max_length, 4096), `auto` what fits into
    the memory that is free when the run starts. It does not change the result."""
    shard_ranks: Annotated[int, Field(ge=1)] | Literal["all", "host"] = "all"
    """With several processes: how many hold one copy of the weights between them (FSDP2). `all` needs least memory, 1
    gives each its own copy, `host` one copy per host, so that only gradients travel between hosts. The result is the
    same."""
    context_ranks: int = Field(default=1, ge=1)
    """With several processes: how many compute one row together, each some of its nodes, where a row's activations are
    too large for one device. It divides the number of processes. The result is the same."""
    tensor_ranks: int = Field(default=1, ge=1)
    """With several processes: so many neighbours compute each layer between them, by its columns, rows and heads
    (tensor parallelism), for models whose layers do not fit one device. The result is the same."""
    offload_weights: bool = False
    """With several processes on accelerators: keep weights and optimizer states in the host's memory between uses."""
    epochs: float = Field(default=3.0, gt=0, le=1_000_000)
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many optimizer steps; the schedule is laid over them."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; None is 2e-4 for adapters and 2e-5 where the model's own weights are trained."""
    lr_patterns: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Another peak learning rate for parameters by name: {regular expression: rate}; the first one found counts."""
    schedule: Schedule = "cosine"
    """How the rate falls after the warm-up; `wsd` stays at the peak until the last `decay` of the steps."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps over which `wsd` falls."""
    power: float = Field(default=2.0, gt=0)
    """Exponent of `polynomial`; 1 is linear."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """The schedule ends at this share of `lr`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled; on weight matrices only, never on biases, norms or embeddings."""
    optimizer: Optimizer = "adamw"
    """`docs/training.md` says what each one is for; some need `pip install 'graft-llm[tuning]'`."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the optimizer, by its own names."""
    optimizer_in_backward: bool = False
    """Apply each weight's gradient and free it as soon as it is whole, so that all of them never exist at once."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null switches clipping off."""
    loss: Literal["nll", "dft"] = "nll"
    """`dft` weighs each target by its own probability (Dynamic Fine-Tuning, arXiv:2508.05629)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread evenly over the vocabulary."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Uniform noise on the embeddings while training, at most alpha / sqrt(tokens * width) (arXiv:2310.05914)."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a moving average of what is trained; validation, checkpoints and `final/` take the average."""

    eval_every: int | None = Field(default=None, ge=1)
    """Validate every so many steps (always at step 0 and at the end too); None is ten times per run."""
    save_every: int | None = Field(default=None, ge=1)
    """Checkpoint every so many steps; None is at every validation."""
    save_async: Literal["auto"] | bool = "auto"
    """Write checkpoints while the run goes on, from a copy in the host's memory; `auto` does so where a checkpoint is
    larger than 1 GiB and the run computes on an accelerator."""
    keep_last: int = Field(default=2, ge=1)
    """Checkpoints kept besides the best one."""
    keep_optimizer: int | None = Field(default=None, ge=1)
    """Only so many of the newest checkpoints keep the optimizer's state, without which a run cannot go on exactly; null
    keeps all. With `patience` the best one keeps it too."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many validations without a better loss; `final/` then holds the best weights."""
    log_every: int = Field(default=1, ge=1)
    trace: bool = False
    """Write trace.jsonl: the conversation ids and rows of every optimizer step."""
    resume: bool | str = False
    """Continue the run in `out` exactly as if it had never stopped: from its newest complete checkpoint (true), or from
    the checkpoint folder that is named. `auto` continues what is there, and begins the run where nothing is."""

    @property
    def peak_lr(self) -> float:
        """The learning rate after the default for the method is filled in."""
        if self.lr is not None:
            return self.lr
        return 2e-5 if self.trains_own_weights else 2e-4

    @property
    def trains_own_weights(self) -> bool:
        """Whether the model's own weights are trained, not an adapter beside them."""
        return self.method in ("full", "freeze")

    @property
    def row_budget(self) -> int:
        """Most nodes of one row, in tokens; an example always fits into one row. `auto` is not yet chosen here."""
        if self.row_tokens is None or self.row_tokens == "auto":
            return max(self.encode.max_length, 4096)
        return self.row_tokens

    @model_validator(mode="before")
    @classmethod
    def _older_name_of_checkpointing(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("gradient_checkpointing") is True:
            if values.get("checkpointing") == "none":
                raise ValueError(
                    "gradient_checkpointing: true and checkpointing: none contradict each other; leave the first out"
                )
            return {"checkpointing": "full", **values}
        return values

    @model_validator(mode="after")
    def _frozen_weights_are_not_trained(self) -> Self:
        if self.trains_own_weights and self.quantize != "none":
            raise ValueError(
                f"quantize: {self.quantize} freezes the weights, method: {self.method} trains them; use method=lora or "
                "quantize=none"
            )
        if self.master_weights != "fp32" and not (self.trains_own_weights and self.optimizer == "adamw"):
            raise ValueError(
                f"master_weights: {self.master_weights} is for method: full or freeze with optimizer: adamw; adapters "
                "are small and stay in fp32, and other optimisers do not round by chance"
            )
        return self

    @model_validator(mode="after")
    def _rows_hold_the_longest_example(self) -> Self:
        if isinstance(self.row_tokens, int) and self.row_tokens < self.encode.max_length:
            raise ValueError(
                f"row_tokens {self.row_tokens} is less than encode.max_length {self.encode.max_length}: "
                "an example is never cut, so raise row_tokens or lower encode.max_length"
            )
        return self

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        wrong = next((text for text in _contradictions(self) if text), None)
        if wrong:
            raise ValueError(wrong)
        return self


def _contradictions(s: Train) -> Iterator[str | bool]:
    """Sentences about settings that exclude each other; anything false where they do not."""
    yield s.method == "peft" and "type" not in s.peft and "method=peft needs the kind: peft: {type: VERA}, for example"
    yield s.method != "peft" and bool(s.peft) and f"peft is given but method is {s.method}; set method=peft"
    yield (
        s.method == "freeze"
        and not (s.freeze.layers or s.freeze.patterns)
        and "method=freeze trains nothing with freeze.layers 0 and no freeze.patterns; give one of them"
    )
    yield from _without_effect(s)
    yield (
        s.attention == "varlen"
        and s.context_ranks > 1
        and f"attention=varlen computes whole sequences, but context_ranks {s.context_ranks} splits them over "
        "processes; use attention=auto"
    )
    yield (
        s.label_smoothing > 0
        and s.loss == "dft"
        and f"label_smoothing {s.label_smoothing} cannot be joined with loss=dft, which weighs the plain nll; set one"
    )
    yield (
        s.optimizer == "schedule_free_adamw"
        and s.schedule != "constant"
        and f"optimizer=schedule_free_adamw replaces the schedule, but schedule is {s.schedule}; set schedule=constant"
    )
    yield (
        s.optimizer == "schedule_free_adamw"
        and s.ema is not None
        and f"optimizer=schedule_free_adamw averages the weights itself, so ema {s.ema} has no place; set ema=null"
    )
    yield (
        s.optimizer in ("galore", "apollo")
        and not s.trains_own_weights
        and f"optimizer={s.optimizer} makes the state of whole weights small; with method={s.method} it is small "
        "already: set optimizer=adamw or method=full"
    )
    yield (
        s.schedule == "wsd"
        and s.warmup + s.decay > 1
        and f"schedule=wsd: warmup {s.warmup} and decay {s.decay} together are more than the whole run; lower one"
    )
    yield (
        s.row_tokens == "auto"
        and s.checkpointing == "auto"
        and "row_tokens=auto and checkpointing=auto each wait for what the other takes of the memory; set one of them"
    )
    if s.optimizer_in_backward:
        yield from _contradictions_in_backward(s)
    for setting, its, default in (("beta1", s.beta1, 0.9), ("beta2", s.beta2, 0.999), ("eps", s.eps, 1e-8)):
        yield (
            s.optimizer in ("adafactor", "lion", "sgd")
            and its != default
            and f"optimizer={s.optimizer} has no {setting} ({its} given); its own options go into optimizer_options"
        )


def _without_effect(s: Train) -> Iterator[str | bool]:
    """Settings that another one leaves without effect: whoever gave them believes something else."""
    yield (
        s.freeze != Freeze()
        and s.method != "freeze"
        and f"freeze.layers or freeze.patterns is given but method is {s.method}; set method=freeze, or leave it out"
    )
    yield (
        s.lora.loraplus_ratio is not None
        and s.trains_own_weights
        and f"lora.loraplus_ratio {s.lora.loraplus_ratio} is for adapters, but method is {s.method}; leave it out"
    )
    yield (
        s.decay != Train.model_fields["decay"].default
        and s.schedule != "wsd"
        and f"decay {s.decay} belongs to schedule=wsd, but schedule is {s.schedule}; set schedule=wsd, or leave it out"
    )
    yield (
        s.checkpoint_every > 1
        and s.checkpointing not in ("full", "auto")
        and f"checkpoint_every {s.checkpoint_every} is for checkpointing=full, but checkpointing is {s.checkpointing}"
    )


def _contradictions_in_backward(s: Train) -> Iterator[str | bool]:
    allowed = ("adamw", "adamw_8bit", "adafactor", "lion", "sgd")
    yield (
        s.row_tokens == "auto"
        and "optimizer_in_backward needs each step in one row, which row_tokens=auto does not promise; give a number"
    )
    yield (
        not s.trains_own_weights
        and f"optimizer_in_backward saves the gradients of whole weights; with method={s.method} there are few: "
        "set it to false"
    )
    yield (
        s.clip is not None
        and f"optimizer_in_backward cannot clip: the norm of all gradients (clip {s.clip}) is known only after the "
        "backward pass, when they are applied already; set clip=null"
    )
    yield (
        s.optimizer not in allowed
        and f"optimizer_in_backward takes {', '.join(allowed)}, which treat each weight alone; not {s.optimizer}"
    )
    yield (
        s.precision == "fp16"
        and "optimizer_in_backward cannot be joined with precision=fp16: its scaler must see every gradient before "
        "one is applied; use bf16 or fp32"
    )


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
