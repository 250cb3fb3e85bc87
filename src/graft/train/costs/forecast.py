"""What a run will cost, before a weight is read: memory by part and time; and which settings fit into a given memory.

Memory is counted on a model without weights (train/costs/cost.py), over the run's own rows (train/costs/rows.py);
speeds are measured. Times are estimates; docs/plan.md says how far off they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from pydantic import ValidationError

from graft.config.train import Train
from graft.console import track
from graft.errors import ConfigError
from graft.model.attention.pick import pick_attention, row_step
from graft.model.device import Precision, free_bytes
from graft.model.memory.machine import Rates, measure_rates, resident
from graft.model.memory.remember import MODES
from graft.train.costs.cost import RowCost, UpdateCost, count_row, count_update
from graft.train.costs.hollow import Hollow, NotCountable, countable, hollow
from graft.train.costs.moments import moments
from graft.train.costs.rows import Rows, look_at_rows, seconds_for, seconds_of
from graft.train.formats import refuse_quantize
from graft.train.loss import Objective
from graft.train.prepare import Prepared

CUDA_CONTEXT = 600 * 2**20
"""Bytes of the CUDA context and cuBLAS beside tensors. Not yet measured."""
SMALLEST_BUDGET = 512
ROW_COST = {"cpu": 64, "cuda": 512}
"""What one more row costs in time, in nodes; a rule of thumb that only chooses between budgets which fit."""
KEEP_FREE = 0.1
"""Share of the free memory that `auto` leaves alone: other programs grow too."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The cost of a run, as it was predicted."""

    parts: Mapping[str, int]
    """Bytes at the worst moment of the steps, by what holds them."""
    moments: Mapping[str, int]
    """Bytes at the worst moment of each part of the run: loading, the rehearsal of a save, steps, saving."""
    seconds_per_step: float
    validations: int
    seconds_per_validation: float
    rows: Rows
    rates: Rates
    device: str
    checkpointing: str
    """With `auto`, the mode that is expected."""

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the run."""
        return max(self.moments.values())

    @property
    def beyond_process(self) -> int:
        """Bytes that are still to be allocated."""
        return self.peak - self.parts["process"]

    @property
    def seconds(self) -> float:
        """Of the whole run, loading and saving left out."""
        return self.rows.steps * self.seconds_per_step + self.validations * self.seconds_per_validation

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        rows = self.rows
        return {
            "device": self.device,
            "checkpointing": self.checkpointing,
            "peak_bytes": self.peak,
            "bytes": dict(self.parts),
            "moments_bytes": dict(self.moments),
            "steps": rows.steps,
            "steps_looked_at": rows.looked_at,
            "rows_per_step": rows.per_step,
            "tokens_per_step": rows.tokens,
            "sharing": rows.sharing,
            **{f"{name}_per_step": value for name, value in asdict(rows.size).items()},
            "heaviest_row_nodes": len(rows.heaviest[0]),
            "seconds_per_step": self.seconds_per_step,
            "validations": self.validations,
            "seconds_per_validation": self.seconds_per_validation,
            "seconds": self.seconds,
            "rates": asdict(self.rates),
        }


@dataclass(frozen=True, slots=True)
class Option:
    """Settings that could be changed, and what the run would cost then."""

    changes: Mapping[str, object]
    forecast: Forecast

    def fits(self, memory: int) -> bool:
        """Whether so many bytes hold the whole process."""
        return self.forecast.peak <= memory

    def __str__(self) -> str:
        return " ".join(f"{name}={str(value).lower()}" for name, value in self.changes.items())


class Forecaster:
    """Forecasts of one run under changed settings: its data is there, and the machine is measured once."""

    def __init__(
        self,
        settings: Train,
        prepared: Prepared,
        device: torch.device,
        precision: Precision,
        memory: int | None = None,
    ) -> None:
        """`memory` is what the whole process may have, in bytes; None takes what it has and what is free."""
        self.settings = settings
        self.prepared = prepared
        self.device = device
        self.precision = precision
        self._memory = memory
        self._free = free_bytes(device)
        self._rates: Rates | None = None
        self._base: int | None = None  # once: what differs between forecasts must be the settings' doing
        self._model: tuple[str, Hollow, UpdateCost] | None = None
        self._rows: dict[int, Rows] = {}
        self._costs: dict[tuple[str, int, int], RowCost] = {}

    def forecast(self, settings: Train | None = None) -> Forecast:
        """What the run costs.

        Raises:
            InputError: the model's config cannot serve.
            NotCountable: its step depends on numbers.
        """
        settings = self._decided(settings or self.settings)
        costs = [self._count(settings, index) for index in range(len(self.rows(settings).heaviest))]
        return self._put_together(settings, max(costs, key=lambda cost: sum(cost.peak.values())))

    def options(self, memory: int) -> list[Option]:
        """Row budgets with each mode of checkpointing, the fastest first; where not all of them fit into so many bytes,
        over a quantised base too.
        """
        plain = MODES[1:] if self.settings.gradient_checkpointing else MODES
        found = self._options([{"checkpointing": mode} for mode in plain])
        if self.settings.quantize == "none" and not all(option.fits(memory) for option in found):
            for kind in ("int8", "nf4"):
                if self.changed({"quantize": kind}) is not None:
                    with suppress(NotCountable):  # DoRA over nf4
                        found += self._options([{"quantize": kind, "checkpointing": m} for m in ("none", "full")])
        return sorted(found, key=lambda option: option.forecast.seconds)

    def _options(self, wanted: Sequence[Mapping[str, str]]) -> list[Option]:
        """Only the smallest and the largest budget are counted; between them memory grows with the row's nodes."""
        found: list[Option] = []
        budgets = self.budgets()
        for changes in track(wanted, "counting"):
            settings = self.settings.model_copy(update=changes)
            small, large = (self._largest(settings, budget) for budget in (budgets[0], budgets[-1]))
            for budget in budgets:
                of_budget = settings.model_copy(update={"row_tokens": budget})
                rows = self.rows(of_budget)
                if settings.optimizer_in_backward and rows.per_step > 1:
                    continue  # the run would refuse it
                cost = _between(small, large, len(rows.heaviest[0]))
                option = Option({"row_tokens": budget, **changes}, self._put_together(of_budget, cost))
                found.append(option)
        return found

    def changed(self, changes: Mapping[str, object]) -> Train | None:
        """The run's settings with a change; None where it does not go with the others, or not on this machine."""
        try:
            found = Train.model_validate({**self.settings.model_dump(), **changes})
            refuse_quantize(found, self.device)
        except (ValidationError, ConfigError):
            return None
        return found

    def budgets(self) -> list[int]:
        """Row budgets worth a look: from the longest example to a whole step in one row, doubling."""
        least = max(self.settings.encode.max_length, SMALLEST_BUDGET)
        all_in_one = self.rows(self.settings.model_copy(update={"row_tokens": 1 << 30})).heaviest[0]
        found = [least]
        while found[-1] < len(all_in_one):
            found.append(found[-1] * 2)
        return found

    def choose_budget(self, free: int) -> tuple[int, Forecast]:
        """The row budget of `row_tokens: auto`: of those that fit into the free memory, the one with the least to do.

        What there is to do is counted in nodes, and does not depend on how busy the machine is at the moment; of equals
        the smallest. Where nothing fits, the smallest.
        """
        room = free * (1 - KEEP_FREE)
        budgets = self.budgets()
        small, large = (self._largest(self.settings, budget) for budget in (budgets[0], budgets[-1]))
        best: tuple[float, int, Forecast] | None = None
        for budget in budgets:
            settings = self.settings.model_copy(update={"row_tokens": budget})
            rows = self.rows(settings)
            cost = _between(small, large, len(rows.heaviest[0]))
            found = self._put_together(settings, cost)
            work = rows.size.nodes + rows.per_step * ROW_COST.get(self.device.type, ROW_COST["cuda"])
            if best is None or (found.beyond_process <= room and work < best[0] * 0.99):
                best = work, budget, found
        assert best is not None
        return best[1], best[2]

    def rows(self, settings: Train) -> Rows:
        """The rows of the run under a row budget."""
        budget = settings.row_budget
        if settings.checkpointing == "auto":  # which changes no row
            settings = settings.model_copy(update={"checkpointing": MODES[0]})
        if budget not in self._rows:
            self._rows[budget] = look_at_rows(self.prepared, budget, self._hollow(settings).lm)
        return self._rows[budget]

    def _decided(self, settings: Train) -> Train:
        """With `checkpointing: auto` the first mode whose largest row fits; the run itself will measure a short one."""
        if settings.checkpointing != "auto":
            return settings
        for mode in MODES[:-1]:
            wanted = settings.model_copy(update={"checkpointing": mode})
            found = self._put_together(wanted, self._count(wanted, 0))
            if found.beyond_process <= self._left(found.parts["process"]) * (1 - KEEP_FREE):
                return wanted
        return settings.model_copy(update={"checkpointing": MODES[-1]})

    def _left(self, base: int) -> int:
        """Bytes beside the `base` that the process has already."""
        return self._free if self._memory is None else self._memory - base

    def _largest(self, settings: Train, budget: int) -> RowCost:
        """Cost of the row with the most nodes."""
        return self._count(settings.model_copy(update={"row_tokens": budget}), 0)

    def _count(self, settings: Train, index: int) -> RowCost:
        """Cost of one of the heaviest rows."""
        model, budget = self._hollow(settings), settings.row_budget
        assert self._model is not None
        key = (self._model[0], budget, index)
        if key not in self._costs:
            padded = pick_attention(settings.attention, self.device).padded
            model.lm.row_step = row_step(budget) if padded else 1
            objective = Objective(settings.label_smoothing, settings.loss == "dft")
            self._costs[key] = count_row(model, self.rows(settings).heaviest[index], objective)
        return self._costs[key]

    def _hollow(self, settings: Train) -> Hollow:
        """The run's model without its weights; the last one made is kept."""
        key = settings.model_dump_json(exclude={"row_tokens"})
        if self._model is None or self._model[0] != key:
            model = hollow(settings, self.precision, self.device, list(self.prepared.renderer.new_tokens))
            self._model = key, model, count_update(model, settings)
        return self._model[1]

    def _put_together(self, settings: Train, cost: RowCost) -> Forecast:
        model = self._hollow(settings)
        assert self._model is not None
        update = self._model[2]
        rows, rates = self.rows(settings), self._measured(model)
        forward, backward = (seconds_for(work, cost.size, rows.size, rates) for work in (cost.forward, cost.backward))
        val_tokens = int(self.prepared.val.start[-1])
        every = settings.eval_every or max(1, -(-rows.steps // 10))
        if self._base is None:
            self._base = resident() if self.device.type == "cpu" else CUDA_CONTEXT
        found = moments(settings, model, cost, update, self.device, self._base, self._left(self._base))
        return Forecast(
            parts=found.parts,
            moments=found.totals,
            seconds_per_step=forward + backward + seconds_of(update.work, rates),
            validations=1 + -(-rows.steps // every) if val_tokens else 0,
            seconds_per_validation=forward * val_tokens / rows.size.nodes,
            rows=rows,
            rates=rates,
            device=str(self.device),
            checkpointing=settings.checkpointing,
        )

    def _measured(self, model: Hollow) -> Rates:
        if self._rates is None:
            with countable(type(model.lm.base).__name__):
                config = model.lm.base.config.get_text_config()
                width, heads = int(config.hidden_size), int(config.num_attention_heads)
            self._rates = measure_rates(self.device, self.precision.compute, width, heads)
        return self._rates


def _between(small: RowCost, large: RowCost, nodes: float) -> RowCost:
    """The cost of a row with so many nodes, from two that were counted."""
    span = large.size.nodes - small.size.nodes
    share = (nodes - small.size.nodes) / span if span else 1.0
    names = {**small.peak, **large.peak}
    peak = {name: (1 - share) * small.peak.get(name, 0) + share * large.peak.get(name, 0) for name in names}
    return replace(large, peak=peak)
