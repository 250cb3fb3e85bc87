"""The model that a run trains: from its base, a checkpoint or other weights; and whether the data fits its context."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from graft.config.train import Train
from graft.console import note, warn
from graft.errors import ConfigError, InputError
from graft.model.device import Precision
from graft.model.files.late import Late, reads_weights, saved_reads_weights
from graft.model.files.load import load_adapter, load_base, to_device
from graft.model.fused.lora_quantized import fuse_quantized_lora
from graft.model.memory.remember import Mode, note_recipes, remember
from graft.model.processes.context import Context
from graft.model.processes.ranks import ALONE, Ranks
from graft.model.processes.shard import Enter, give_back, mesh_of, shard
from graft.model.processes.tensor import Split
from graft.model.trees import TreeLM, at_once, fuse_modules
from graft.model.tuned.adapters import add_adapter, freeze_but
from graft.model.tuned.kinds import kind_of, mutates_base, peft_config
from graft.model.tuned.start import adapter_tensors
from graft.model.tuned.unreached import stacked_experts
from graft.model.tuned.vocabulary import begin_as_pieces, grow, token_rows
from graft.runs import RunFolder
from graft.tokens.renderer import Renderer
from graft.train.computing import pick_computing, tree_model
from graft.train.costs.checkpointing import remember_what_fits
from graft.train.formats import refuse_offload, refuse_with_compiled
from graft.train.prepare import Prepared


@dataclass(frozen=True, slots=True)
class Ready:
    """A model on its device, about to be trained."""

    lm: TreeLM
    final_dtype: torch.dtype
    """Number format of the final folder where the model's own weights are trained: that of the model it began with."""
    start: Mapping[str, Tensor] | None
    """What the adapter began as, where its beginning was subtracted from the base: it is saved as the difference."""


def load_for_training(
    settings: Train,
    precision: Precision,
    device: torch.device,
    checkpoint: Path | None,
    prepared: Prepared,
    ranks: Ranks = ALONE,
) -> Ready:
    """The model on its device, with what is trained from a checkpoint, `init_from`, or afresh.

    Raises:
        ConfigError: what is to be trained does not fit the model.
        InputError: a folder cannot serve.
    """
    computing = pick_computing(settings, device)
    refuse_offload(settings, device)
    if computing.compiled:
        refuse_with_compiled(settings)
    model: PreTrainedModel | PeftModel
    late = Late(device)
    looked_at = bool(prepared.renderer.new_tokens) or settings.checkpointing in ("selective", "auto")
    of_base = _Base(settings, late if ranks.size > 1 and not looked_at else None)
    # Of a model that is spread over processes each moves only its own part to its device.
    loaded_to = device if ranks.size == 1 or settings.quantize != "none" else torch.device("cpu")
    if settings.trains_own_weights:
        model, final_dtype, began = *_own_weights(settings, precision, loaded_to, checkpoint, prepared, of_base), None
    else:
        model, final_dtype, began = _adapted(settings, precision, loaded_to, checkpoint, prepared, of_base)
    loaded_to = torch.device("cpu") if late.waiting else loaded_to
    to_device(model, loaded_to)
    fuse_quantized_lora(model)
    every, offload = settings.checkpoint_every, settings.offload_activations
    if settings.checkpointing == "full":
        remember(model, "full", every)  # before the layers are compiled, which reads it
    fuse = not computing.compiled
    enter: Enter[Any] = at_once
    context = None
    if settings.context_ranks > 1:
        plainly = settings.checkpointing == "none" and not offload  # nobody else decides what is kept
        context = Context.connect(ranks, settings.context_ranks, asks_again=plainly)
    split: Split | None = None
    if ranks.size > 1:
        if fuse:
            fuse_modules(model, late.lent)  # while their weights are whole: some are compared with what they replace
        if settings.checkpointing in ("selective", "auto"):
            note_recipes(model)
        enter, split = _spread(model, settings, precision, device, ranks, late)
    lm = tree_model(model, settings, computing, fuse and ranks.size == 1, enter, context)
    if split is not None:
        lm.layer_ranks, lm.dealt, lm.recompute = split.size, split.dealt, split.recompute
    if settings.checkpointing == "auto":
        remember_what_fits(lm, precision, settings.row_budget, every, offload, ranks)
        give_back(model)
    elif settings.checkpointing == "selective" or offload:
        mode: Mode = "selective" if settings.checkpointing == "selective" else "none"
        remember(model, mode, every, offload, written=ranks.size > 1)
    return Ready(lm, final_dtype, began)


def holders_for(settings: Train, ranks: Ranks) -> int:
    """How many processes, or groups that share layers, hold one copy of the weights between them."""
    tensor = settings.tensor_ranks
    groups = {"all": ranks.size // tensor, "host": ranks.on_host // tensor}
    return groups.get(str(settings.shard_ranks)) or int(settings.shard_ranks)


def _spread(
    model: PreTrainedModel | PeftModel,
    settings: Train,
    precision: Precision,
    device: torch.device,
    ranks: Ranks,
    late: Late,
) -> tuple[Enter[Any], Split | None]:
    """What must surround whatever computes with the spread model, and how its layers are cut where they are."""
    tensor = settings.tensor_ranks
    holders = holders_for(settings, ranks)
    mesh = mesh_of(ranks, device, holders, tensor)
    in_16_bits = settings.trains_own_weights and precision.compute != torch.float32
    groups = ranks.size // tensor
    copies = "" if holders == groups else f", {groups // holders} copies"
    rows = "" if settings.context_ranks == 1 else f", every row over {settings.context_ranks}"
    cut = f", layers computed by {tensor} each" if tensor > 1 else ""
    note(f"{ranks.size} processes, weights spread over {holders * tensor}{copies}{rows}{cut}")
    split = Split(model, mesh, device) if tensor > 1 else None

    def prepare(module: nn.Module) -> None:
        late.fill(module)
        if split is not None:
            split.cut(module)

    enter = shard(model, mesh, precision.compute if in_16_bits else None, settings.offload_weights, prepare)
    assert not late.waiting, "a weight has not got its numbers"
    return enter if split is None else split.around(enter), split


class _Base(NamedTuple):
    """How a base is loaded."""

    settings: Train
    late: Late | None
    """Where its numbers may come late: with several processes, and nothing that looks at them before."""

    def load(self, path: str, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> PreTrainedModel:
        """As `load_base`."""
        trust = self.settings.trust_remote_code
        model = None if self.late is None else self.late.load(path, dtype, trust, quantize)
        return load_base(path, dtype, trust, device, quantize) if model is None else model

    def at_once_if(self, reads: bool) -> _Base:
        """The same where nothing comes late if something `reads` the numbers of the base."""
        return self._replace(late=None) if reads else self


def _own_weights(
    settings: Train,
    precision: Precision,
    device: torch.device,
    checkpoint: Path | None,
    prepared: Prepared,
    of_base: _Base,
) -> tuple[PreTrainedModel, torch.dtype]:
    """A model of which all or some weights are trained, and the number format in which it was stored."""
    start = checkpoint or _begins_with(settings)
    model = of_base.load(str(start or settings.model), precision.trained, device)
    _add_tokens(model, prepared.renderer, fresh=start is None or not _has_tokens(start, prepared.renderer))
    if settings.method == "freeze":
        freeze_but(model, settings.freeze)
        _refuse_frozen_new_tokens(model, settings)
    else:
        model.requires_grad_(True)
    return model, stored_dtype(settings.model)


def _adapted(
    settings: Train,
    precision: Precision,
    device: torch.device,
    checkpoint: Path | None,
    prepared: Prepared,
    of_base: _Base,
) -> tuple[PeftModel, torch.dtype, Mapping[str, Tensor] | None]:
    """An adapter on its frozen base, the base's number format, and what a beginning out of the base's weights was."""
    start = checkpoint or _begins_with(settings)
    config = peft_config(settings)
    reads = reads_weights(config) or (start is not None and saved_reads_weights(start))
    base = of_base.at_once_if(reads).load(settings.model, precision.frozen, device, settings.quantize)
    dtype = base.dtype
    _add_tokens(base, prepared.renderer, fresh=True)
    config = with_new_tokens(config, base, list(prepared.renderer.new_tokens))
    began: Mapping[str, Tensor] | None = None
    if settings.init_from is None and mutates_base(config):
        # A checkpoint's adapter is for the base as others have it; ours has lost what the adapter began as.
        model = add_adapter(base, config, settings.seed, _samples(prepared, settings))
        began = adapter_tensors(model)
    elif start:
        model = load_adapter(base, start, trainable=True)
    else:
        model = add_adapter(base, config, settings.seed, _samples(prepared, settings))
    if settings.method == "lora" and settings.lora.target_modules == "all-linear":
        _say_unreached_experts(model)
    if start and start is not checkpoint:
        _say_other_shape(model, settings)
    return model, dtype, began


def _begins_with(settings: Train) -> Path | None:
    return weights_folder(settings.init_from) if settings.init_from else None


def _add_tokens(model: PreTrainedModel, renderer: Renderer, fresh: bool) -> None:
    """Room for the new tokens; those of a model that has been trained already keep what they learnt."""
    if renderer.new_tokens:
        grow(model, 1 + max(renderer.new_tokens))
        if fresh:
            begin_as_pieces(model, renderer.new_tokens)


def _has_tokens(folder: Path, renderer: Renderer) -> bool:
    """Whether a folder's weights were trained with the new tokens."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return all(
        tokenizer.convert_ids_to_tokens(i) == renderer.tokenizer.convert_ids_to_tokens(i) for i in renderer.new_tokens
    )


def with_new_tokens(config: PeftConfig, base: PreTrainedModel, ids: Sequence[int]) -> PeftConfig:
    """The adapter also trains the new tokens' own rows, beside what the settings name.

    Raises:
        ConfigError: the settings let it train all rows.
    """
    if ids and isinstance(config, LoraConfig):
        rows = token_rows(base, ids)
        whole = {name.rsplit(".", 1)[-1] for name in config.modules_to_save or ()}
        where = (base.get_input_embeddings(), base.get_output_embeddings())  # tokens go in, and come out
        ends = {name.rsplit(".", 1)[-1] for name, part in base.named_modules() if part in where}
        if whole & ends:
            raise ConfigError(
                f"new_tokens trains its own rows of {' and '.join(sorted(ends))}, lora.modules_to_save all of "
                f"{' and '.join(sorted(whole & ends))}; leave one of the two out"
            )
        named = config.trainable_token_indices or {}
        also = named if isinstance(named, dict) else {next(iter(rows)): named}
        config.trainable_token_indices = {
            name: sorted({*rows.get(name, ()), *also.get(name, ())}) for name in {**rows, **also}
        }
    return config


def _refuse_frozen_new_tokens(model: PreTrainedModel, settings: Train) -> None:
    if settings.new_tokens and not model.get_input_embeddings().get_parameter("weight").requires_grad:
        raise ConfigError(
            f"new_tokens: {len(settings.new_tokens)} tokens, but method=freeze leaves the embeddings as they are; "
            "add the embedding's name to freeze.patterns, or use method=lora, which trains the new rows alone"
        )


def _samples(prepared: Prepared, settings: Train) -> list[Tensor]:
    """Token ids of the first examples, for adapters that begin from data."""
    few = range(min(len(prepared.train), settings.lora.init_examples))
    examples = prepared.train.examples(few)[: settings.lora.init_examples]
    return [torch.from_numpy(example.ids.astype(np.int64)) for example in examples]


def _say_other_shape(model: PeftModel, settings: Train) -> None:
    """An adapter brings its own shape, which the recipe's cannot change.

    Raises:
        InputError: it is of another kind than the settings ask for.
    """
    brought: Any = model.peft_config["default"]
    wanted = str(settings.peft.get("type", "LORA")).upper()
    if kind_of(brought) != wanted:
        raise InputError(f"init_from {settings.init_from}: holds a {kind_of(brought)} adapter, not {wanted}")
    if settings.method != "lora":
        return
    its = {"r": brought.r, "alpha": brought.lora_alpha, "dropout": brought.lora_dropout}
    asked = {name: getattr(settings.lora, name) for name in its}
    if its != asked:
        shown = [", ".join(f"{name} {value:g}" for name, value in shape.items()) for shape in (its, asked)]
        warn(f"init_from {settings.init_from}: its adapter has {shown[0]}, which stays; the settings say {shown[1]}")


def _say_unreached_experts(model: PeftModel) -> None:
    """`all-linear` sounds like everything, and of a mixture of experts it may be the smallest part."""
    experts = stacked_experts(model)
    if experts:
        total = sum(p.numel() for p in model.parameters())
        warn(
            f"lora.target_modules all-linear does not reach the experts: {sum(experts.values()):,} of {total:,} "
            f"parameters ({', '.join(experts)}) are no linear layers and stay as they are; attention and whatever "
            "else is linear is trained"
        )


def weights_folder(named: str) -> Path:
    """The folder of weights that `init_from` names; a run stands for its `final/`."""
    run = RunFolder(Path(named))
    return run.final if run.exists() and run.final.is_dir() else run.root


def longest_example(prepared: Prepared) -> int:
    """Tokens of the longest example of training or validation."""
    lengths = [int(np.diff(store.start).max()) for store in (prepared.train, prepared.val) if len(store)]
    return max(lengths)


def check_context(lm: TreeLM, model: str, longest: int) -> None:
    """Say when examples are longer than the context that the model was made for.

    Raises:
        InputError: its positions are a table, so that there is none for the tokens beyond.
    """
    limit = lm.base.config.to_dict().get("max_position_embeddings") or lm.base.config.to_dict().get("n_positions")
    if not isinstance(limit, int) or longest <= limit:
        return
    tables = [m for m in lm.base.modules() if isinstance(m, nn.Embedding) and m is not lm.embedding]
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):  # OPT's table has two rows more
        raise InputError(
            f"{model}: has positions for {limit} tokens, the longest example has {longest}; "
            f"set encode.max_length={limit} or less"
        )
    warn(f"{model} was made for {limit} tokens; the longest example has {longest}. It may not do well beyond {limit}")


def stored_dtype(model: str) -> torch.dtype:
    """The format that a model's config says its weights are stored in; fp32 where it does not say."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return torch.float32
    config = json.loads(path.read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(named), torch.float32)
