"""Every setting of every command as typed models, and how a recipe becomes one. Knows no torch and no files' content.

A recipe is YAML; `key=value` overrides (dotted for nested keys: `lora.r=8`) are laid over it. An unknown key is an
error that names the line and the nearest known key: a typo must never become a silent default.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from graft.errors import ConfigError, first_line

S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`lr: yes` is a slip, not a learning rate of 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("a number or text is expected, not yes or no")
        return value


Format = Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "question-answer", "text"]


class Source(Settings):
    """One file of data and how much of it an epoch holds."""

    path: str
    """A jsonl, json, csv or parquet file."""
    format: Format = "auto"
    """Layout of its rows; `auto` detects it and says why."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """How often each of its conversations appears in an epoch: 2 is twice, 0.5 is another half every epoch."""


def _as_sources(value: Any) -> Any:
    """Accept `a.jsonl`, `[a.jsonl, {path: b.csv, weight: 2}]` and a single mapping alike."""
    if isinstance(value, str | Mapping):
        value = [value]
    if isinstance(value, Sequence):
        return tuple({"path": item} if isinstance(item, str) else item for item in value)
    return value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class Split(Settings):
    """Shares of the data that are held out, by a hash of the normalised first prompt."""

    val: float = Field(default=0.05, ge=0, lt=1)
    """Share for validation; used where no `val` file is given."""
    test: float = Field(default=0.0, ge=0, lt=1)
    """Share for test; used where no `test` file is given."""

    @model_validator(mode="after")
    def _leave_something_to_train(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(f"val {self.val} + test {self.test} leave nothing to train on; make their sum less than 1")
        return self


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
    """Settings of a training run from a recipe, `key=value` overrides and the command's own flags, in that order.

    Raises:
        ConfigError: the recipe cannot be read, or a key or value does not fit; names the line where there is one.
    """
    values: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    if recipe is not None:
        values, lines = _read_yaml(recipe)
    for override in overrides:
        path, value = _parse_override(override)
        _set(values, path, value, override)
    for key, value in (flags or {}).items():
        if value is not None:
            _set(values, tuple(key.split(".")), value, f"--{key}")
    return _validate(Train, values, lines, str(recipe) if recipe else "the command line")


def load_sampling(values: Mapping[str, Any]) -> Sampling:
    """Settings of generation from the command's flags.

    Raises:
        ConfigError: a value does not fit.
    """
    return _validate(Sampling, values, {}, "the command line")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """A YAML mapping and the 1-based line of each of its keys, by key path."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_aliases(text, path)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader that reads 2e-4
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"recipe {path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    except (ValueError, RecursionError) as error:  # an impossible date, brackets without end
        raise ConfigError(f"recipe {path}: a value cannot be read ({first_line(error)}); put it in quotes") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path}: expected `key: value` lines, found a {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}
    _collect_lines(node, (), lines, str(path))
    return values, lines


def _refuse_aliases(text: str, path: Path) -> None:
    """A recipe needs no YAML aliases, and one that refers to itself, or to others tenfold, would never end."""
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            line = token.start_mark.line + 1
            raise ConfigError(f"recipe {path}:{line}: `*{token.value}` is a YAML alias; write the value out")


def _collect_lines(node: yaml.Node | None, path: tuple[str, ...], lines: dict[tuple[str, ...], int], file: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = (*path, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(f"recipe {file}:{line}: `{'.'.join(name)}` stands in line {lines[name]} already")
            lines[name] = line
            _collect_lines(value, name, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, str(index))] = value.start_mark.line + 1
            _collect_lines(value, (*path, str(index)), lines, file)


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads `2e-4` as a number: YAML 1.1 wants a dot there, people do not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(f"{text!r}: an override is written key=value, for example lora.r=8")
    try:
        return tuple(key.split(".")), yaml.load(value, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError:
        return tuple(key.split(".")), value


def _set(values: dict[str, Any], path: tuple[str, ...], value: Any, said: str) -> None:
    """Lay one value over the tree, making mappings on the way."""
    for key in path[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{said}: `{key}` is a {type(inner).__name__}, it has no key `{path[-1]}`")
        values = inner
    values[path[-1]] = value


def _validate(model: type[S], values: Mapping[str, Any], lines: Mapping[tuple[str, ...], int], place: str) -> S:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(model, item, lines, place) for item in error.errors())) from None


def _explain(model: type[Settings], item: Any, lines: Mapping[tuple[str, ...], int], place: str) -> str:
    path = tuple(str(part) for part in item["loc"])
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"{place}:{line}" if line else place
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(key, setting_names(model))
        return f"{where}: unknown setting `{key}`{hint or '; `graft schema` lists them all'}"
    if item["type"] == "missing":
        return f"{where}: `{key}` is needed, for example --{key.replace('_', '-')} PATH or `{key}: PATH` in the recipe"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: `{key}` = {item['input']!r}: {message}" if key else f"{where}: {message}"


def setting_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every setting, nested ones too: `lora`, `lora.r`, ..."""
    names: list[str] = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names += setting_names(info.annotation, f"{prefix}{name}.")
    return names


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the nearest known word (a nested name is found by its last part too), or nothing."""
    last = word.rsplit(".", 1)[-1]
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    if last in by_leaf:
        return f"; did you mean `{by_leaf[last]}`?"
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(last, list(by_leaf), n=1, cutoff=0.6)]
    return f"; did you mean `{near[0]}`?" if near else ""
