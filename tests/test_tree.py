"""Trees and plans: the packed forest says exactly what the examples said."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import branching_examples, make_example

from graft.tokens.plan import Plan
from graft.tokens.tree import build_rows, segments, sharing, targets, total_weight, visible
from graft.types import Example, Row


def paths_of(row: Row) -> dict[tuple[int, ...], float]:
    """Every root-to-node path of a row with the node's weight, found by walking parents."""
    found = {}
    for node in range(len(row)):
        path, at = [], node
        while at >= 0:
            path.append(int(row.ids[at]))
            at = int(row.parent[at])
        found[tuple(reversed(path))] = found.get(tuple(reversed(path)), 0.0) + float(row.weight[node])
    return found


def prefixes_of(examples: list[Example]) -> dict[tuple[int, ...], float]:
    """The same by definition: every prefix of every example with the sum of its last token's weights."""
    found: dict[tuple[int, ...], float] = {}
    for example in examples:
        for length in range(1, len(example.ids) + 1):
            key = tuple(example.ids[:length].tolist())
            found[key] = found.get(key, 0.0) + float(example.weights[length - 1])
    return found


def test_the_example_of_the_docstring():
    examples = [make_example("a", [1, 2, 3, 4], 1), make_example("b", [9], 1), make_example("c", [1, 2, 7, 8], 1)]
    (row,) = build_rows(examples, 100)
    assert row.ids.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert row.depth.tolist() == [0, 1, 2, 3, 2, 3, 0]
    assert row.parent.tolist() == [-1, 0, 1, 2, 1, 4, -1]
    assert row.end.tolist() == [6, 6, 4, 4, 6, 6, 7]
    assert row.weight.tolist() == [0, 2, 1, 1, 1, 1, 0]
    assert row.conversations == ("a", "c", "b")
    assert targets(row).tolist() == [1, 2, 3, 4, 5]


lists_of_ids = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=12)


@given(lists_of_ids, st.integers(9, 40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_forest_holds_every_path_once_and_all_weight(lists, row_tokens, share):
    examples = [make_example(str(i), ids, 1, weight=1 + i) for i, ids in enumerate(lists)]
    rows = build_rows(examples, row_tokens, share)
    assert all(len(row) <= row_tokens for row in rows)
    found: dict[tuple[int, ...], float] = {}
    for row in rows:
        for path, weight in paths_of(row).items():
            found[path] = found.get(path, 0.0) + weight
    assert found == pytest.approx(prefixes_of(examples))
    assert sum(float(row.weight.sum()) for row in rows) == pytest.approx(total_weight(examples))
    if not share:
        assert len(rows) == len(examples)
    elif len(rows) == 1:
        assert len(rows[0]) == len(prefixes_of(examples)), "in one row, a prefix is computed once"


@given(lists_of_ids, st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_siblings_that_begin_alike_hold_every_path_and_all_weight_too(lists, shortest_run):
    examples = [make_example(str(i), ids, 1, weight=1 + i) for i, ids in enumerate(lists)]
    (row,), (tight,) = build_rows(examples, 200, shortest_run=shortest_run), build_rows(examples, 200)
    assert paths_of(row) == pytest.approx(prefixes_of(examples))
    assert len(row) >= len(tight)
    assert len(segments(row).sizes) <= len(segments(tight).sizes) or len(row) == len(tight)


def test_a_branch_that_would_cut_off_a_short_run_begins_further_up():
    stem = list(range(100, 120))
    lists = [[*stem, 1, 2, 3, 4], [*stem, 1, 2, 5, 6], [*stem, 7, 8], [50, 51, 9], [50, 51, 10]]
    examples = [make_example(str(i), ids, 1) for i, ids in enumerate(lists)]
    (row,), (tight,) = build_rows(examples, 200, shortest_run=16), build_rows(examples, 200)
    assert segments(row).sizes == (3, 3, 20, 4, 4, 2)
    assert segments(row).ancestors == ((), (), (), (2,), (2,), (2,))
    assert segments(tight).sizes == (2, 1, 1, 20, 2, 2, 2, 2)


@given(lists_of_ids)
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_examples_does_not_matter(lists):
    examples = [make_example(str(i), ids, 1) for i, ids in enumerate(lists)]
    forward, backward = build_rows(examples, 30), build_rows(examples[::-1], 30)
    assert [row.ids.tolist() for row in forward] == [row.ids.tolist() for row in backward]
    assert [row.conversations for row in forward] == [row.conversations for row in backward]


@given(lists_of_ids)
@settings(max_examples=200, deadline=None)
def test_visibility_is_the_path_and_depth_is_its_length(lists):
    for row in build_rows([make_example(str(i), ids, 1) for i, ids in enumerate(lists)], 60):
        seen = visible(row)
        for node in range(len(row)):
            path, at = [], node
            while at >= 0:
                path.append(at)
                at = int(row.parent[at])
            assert np.flatnonzero(seen[node]).tolist() == path[::-1]
            assert row.depth[node] == len(path) - 1


@given(lists_of_ids)
@settings(max_examples=200, deadline=None)
def test_segments_are_unbranched_and_their_ancestors_are_the_path(lists):
    for row in build_rows([make_example(str(i), ids, 1) for i, ids in enumerate(lists)], 60):
        cut = segments(row)
        starts = np.cumsum([0, *cut.sizes])
        assert starts[-1] == len(row)
        for index, size in enumerate(cut.sizes):
            nodes = [n for run in (*cut.ancestors[index], index) for n in range(starts[run], starts[run + 1])]
            assert nodes == np.flatnonzero(visible(row)[starts[index] + size - 1]).tolist()
            assert cut.offsets[index] == len(nodes) - size


def test_a_conversation_whose_turns_extend_each_other_is_one_path():
    turns = [make_example("c", range(1, 1 + length), length - 3, turn=t) for t, length in enumerate((8, 15, 30))]
    (row,) = build_rows(turns, 64)
    assert len(row) == 30
    assert segments(row).sizes == (30,)
    assert sharing(turns, [row]).ratio == pytest.approx((8 + 15 + 30) / 30)


def test_a_full_row_is_closed_and_its_prefix_computed_again():
    examples = [make_example(str(i), [5, 6, 7, 10 + i, 20 + i], 3) for i in range(4)]
    rows = build_rows(examples, 7)
    assert [row.ids.tolist() for row in rows] == [[5, 6, 7, 10, 20, 11, 21], [5, 6, 7, 12, 22, 13, 23]]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="12 tokens do not fit into a row of 8"):
        build_rows([make_example("long", range(12), 1)], 8)


def test_real_examples_share_what_they_should():
    examples = branching_examples()
    rows = build_rows(examples, 512)
    assert len(rows) == 1
    assert len(rows[0]) == len(prefixes_of(examples))
    assert sharing(examples, rows).ratio > 1.5, "the fixture must share something, or the other tests say nothing"


def test_an_epoch_holds_every_conversation_once():
    plan = Plan((1.0,) * 33, batch_size=16, epochs=2, seed=0)
    steps = [plan.step(number).tolist() for number in range(plan.total_steps)]
    assert [len(step) for step in steps] == [11] * 6
    assert sorted(sum(steps[:3], [])) == list(range(33))
    assert sorted(sum(steps[3:], [])) == list(range(33))
    assert steps[:3] != steps[3:], "another epoch, another order"
    assert steps == [plan.step(number).tolist() for number in range(plan.total_steps)]
    assert steps != [Plan((1.0,) * 33, 16, 2, seed=1).step(number).tolist() for number in range(6)]


def test_source_weights_repeat_and_thin_out():
    plan = Plan((0.5,) * 200 + (2.0,) * 10, batch_size=8, epochs=2, seed=3)
    epochs = [plan.epoch_order(epoch).tolist() for epoch in range(2)]
    assert sorted(i for order in epochs for i in order if i < 200) == list(range(200)), "each once in two epochs"
    assert all(sum(i >= 200 for i in order) == 20 for order in epochs)


def test_max_steps_and_parts_of_epochs():
    assert Plan((1.0,) * 100, 10, 0.5, 0).total_steps == 5
    assert Plan((1.0,) * 100, 10, 3, 0, max_steps=7).total_steps == 7
    assert Plan((1.0,), 16, 0.01, 0).total_steps == 1
    assert Plan((1.0,) * 100, 10, 3, 0).epoch_at(15) == 1.5


def test_a_distant_step_is_found_without_walking():
    plan = Plan((1.0,) * 1000, 10, 1_000_000, 0)
    assert len(plan.step(90_000_000)) == 10


@pytest.mark.parametrize(("count", "size"), [(33, 16), (7, 3), (5, 8), (1000, 7)])
def test_steps_in_any_order_are_the_epoch_cut_in_equal_parts(count, size):
    def plan():
        return Plan((1.0,) * (count - 1) + (2.5,), size, 3.0, 5)

    steps = plan().total_steps
    forward = [plan().step(number).tolist() for number in range(steps)]
    walked = plan()
    assert [walked.step(number).tolist() for number in reversed(range(steps))] == forward[::-1]
    per_epoch = steps // 3
    for epoch in range(3):
        parts = np.array_split(plan().epoch_order(epoch), per_epoch)
        assert forward[epoch * per_epoch : (epoch + 1) * per_epoch] == [part.tolist() for part in parts]
