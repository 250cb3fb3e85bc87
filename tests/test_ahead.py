"""The next step is made while the one at hand is computed: the same rows, and what goes wrong there is not lost."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny import ON_TREES, make_example, make_model

from graft.model.processes.ranks import ALONE, Ranks
from graft.model.trees import TreeLM
from graft.tokens.plan import Plan
from graft.tokens.tree import total_weight
from graft.train.processes.ahead import Ahead
from graft.train.processes.share import rows_of_rank

LAST = Ranks(rank=1, size=2)


class Examples:
    """Stands for encoded data; notes which threads read it."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.all = [make_example(str(n), rng.integers(3, 97, rng.integers(5, 40)), 2) for n in range(count)]
        self.read_by: list[str] = []

    def examples(self, conversations: Any) -> list[Any]:
        self.read_by.append(threading.current_thread().name)
        return [self.all[index] for index in conversations]


@pytest.fixture(scope="module")
def lm() -> TreeLM:
    return TreeLM(make_model(ON_TREES["llama"]))


def prepared_of(count: int = 24) -> Any:
    return SimpleNamespace(train=Examples(count), plan=Plan((1.0,) * count, batch_size=8, epochs=2, seed=0))


@pytest.mark.parametrize("ranks", [ALONE, LAST], ids=["alone", "two"])
def test_what_is_made_ahead_is_what_would_be_made_when_asked(lm, ranks):
    prepared = prepared_of()
    ahead = Ahead(prepared, lm, 64, ranks)
    order = [0, 1, 2, 4, 5]  # a step is left out, as after going back to a checkpoint
    for step in order:
        made = ahead.take(step)
        examples = [prepared.train.all[index] for index in prepared.plan.step(step)]
        assert [e.conversation for e in made.examples] == [e.conversation for e in examples]
        wanted = rows_of_rank(lm, examples, 64, ranks, ranks.rank)
        assert len(made.rows) == len(wanted) > 1
        for row, other in zip(made.rows, wanted, strict=True):
            assert np.array_equal(row.ids, other.ids)
            assert np.array_equal(row.weight, other.weight)
        assert made.weight == total_weight(examples)
        assert made.tokens == sum(len(e.ids) for e in examples)
    here = threading.current_thread().name
    ahead_of_time = [name for name in prepared.train.read_by if name != here]
    assert len(ahead_of_time) == (0 if ranks.size == 1 else 4), "steps 1, 2, 3 and 5; there is none behind the last"


def test_what_goes_wrong_ahead_is_raised_when_its_step_is_taken(lm):
    prepared = prepared_of()
    ahead = Ahead(prepared, lm, 64, LAST)
    assert ahead.take(0).rows
    del prepared.train.all[:]
    with pytest.raises(IndexError):
        [ahead.take(step) for step in (1, 2)]
