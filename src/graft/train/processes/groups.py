"""Processes that compute each layer between them: what they cannot do, said before anything is read."""

from __future__ import annotations

from collections.abc import Iterator

from graft.config.train import Train
from graft.errors import ConfigError
from graft.model.files.load import text_config
from graft.model.processes.ranks import Ranks
from graft.model.processes.tensor import refuse_model
from graft.train.updates.optimizers import BY_NUMBER


def refuse_groups(settings: Train, ranks: Ranks) -> None:
    """Find what cannot be computed by layers that are cut over processes, by the settings and the model's config.

    Raises:
        ConfigError: names the setting, or what of the model, and the nearest thing that can.
        InputError: the model has no config that can be read.
    """
    team = settings.tensor_ranks
    if team == 1:
        return
    wrong = next((text for text in (*_not_so_many(team, ranks), *_not_by_groups(settings)) if text), None)
    if wrong:
        raise ConfigError(f"tensor_ranks={team}: {wrong}")
    refuse_model(text_config(settings.model, settings.trust_remote_code), settings.model, team)


def _not_so_many(team: int, ranks: Ranks) -> Iterator[str | bool]:
    yield (
        ranks.size == 1 and f"{team} processes compute each layer between them, but there is one; start with --gpus N"
    )
    yield (
        ranks.on_host % team != 0
        and f"{team} processes that compute each layer between them must be neighbours on a host, but there are "
        f"{ranks.on_host} on each; choose a divisor of {ranks.on_host}"
    )


def _not_by_groups(s: Train) -> Iterator[str | bool]:
    """Sentences about settings that need layers which are whole; anything false where they do not."""
    yield (
        s.context_ranks > 1
        and f"context_ranks={s.context_ranks} splits the rows of those that would share a layer; use one of the two"
    )
    yield (
        s.quantize != "none"
        and f"quantize={s.quantize} packs weights in blocks that are not cut by columns and rows; use quantize=none"
    )
    kind = str(s.peft.get("type", "LORA")).upper()
    yield (
        s.method == "peft"
        and kind != "LORA"
        and f"method=peft with type {kind}: of the adapters LoRA and DoRA are cut with their layers; use method=lora"
    )
    yield (
        s.optimizer not in BY_NUMBER
        and f"optimizer={s.optimizer} looks at whole weights; use one of {', '.join(BY_NUMBER)}"
    )
    yield (
        s.router_aux_loss is not None
        and "router_aux_loss would be counted once by each process of a group; leave it out"
    )
    yield (
        s.checkpointing in ("selective", "auto")
        and f"checkpointing={s.checkpointing} makes norms again outside of their layer, where no process has their "
        "weights as plain tensors; use full or none"
    )
    yield (
        s.optimizer_in_backward and "optimizer_in_backward has not been tried with layers that are cut; set it to false"
    )
    yield (
        s.master_weights != "fp32"
        and f"master_weights={s.master_weights} rounds a number by its place, which is known of whole rows; use fp32"
    )
    yield s.compile is True and "compile=true has not been tried with layers that are cut; use compile=false"
    yield (
        s.offload_weights
        and "offload_weights has not been tried with layers that are cut, which need it less; set it to false"
    )
