"""Metrics against numbers from the papers and from hand."""

import math

import pytest

from graft.use.metrics import PairedDifference, Proportion, exact_match, normalise, proportion


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3 (score without continuity correction).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(hits, total, low, high):
    interval = Proportion(hits, total).interval
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_wilson_is_symmetric_and_exact_at_the_ends():
    for hits in range(21):
        left, right = Proportion(hits, 20).interval, Proportion(20 - hits, 20).interval
        assert left.low == pytest.approx(1 - right.high, abs=1e-12)
        assert 0 <= left.low <= hits / 20 <= left.high <= 1
    assert Proportion(0, 20).interval.low == 0
    assert Proportion(20, 20).interval.high == 1
    assert math.isnan(Proportion(0, 0).share)


@pytest.mark.parametrize(
    ("cells", "difference", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:2635-2650, table II, method 10; cells are a, b, c, d there.
    [((36, 12, 2, 0), 0.2, 0.0569, 0.3404), ((20, 12, 2, 16), 0.2, 0.0562, 0.3292)],
)
def test_paired_intervals_are_the_published_ones(cells, difference, low, high):
    both, only_second, only_first, neither = cells
    found = PairedDifference(both, only_first, only_second, neither)
    assert found.difference == pytest.approx(difference)
    assert (round(found.interval.low, 4), round(found.interval.high, 4)) == (low, high)


def test_pairs_are_counted_and_swapping_the_models_mirrors_the_interval():
    first = [True, True, False, False, False, True]
    second = [True, False, True, True, False, True]
    found = PairedDifference.of(first, second)
    assert (found.both, found.only_first, found.only_second, found.neither) == (2, 1, 2, 1)
    assert found.difference == pytest.approx(1 / 6)
    swapped = PairedDifference.of(second, first)
    assert swapped.interval.low == pytest.approx(-found.interval.high)
    with pytest.raises(ValueError, match="shorter"):
        PairedDifference.of([True], [])


def test_intervals_stay_in_range_for_every_small_table():
    for total in (1, 3):
        for a in range(total + 1):
            for b in range(total + 1 - a):
                for c in range(total + 1 - a - b):
                    found = PairedDifference(a, b, c, total - a - b - c)
                    assert -1 <= found.interval.low <= found.difference <= found.interval.high <= 1


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("Tolen", "Tolen", True),
        (" Tolen\n", "Tolen", True),
        ("１２", "12", True),  # full-width digits
        ("成都。", "成都", False),
        ("tolen", "Tolen", False),
        ("To len", "Tolen", False),
        ("", "Tolen", False),
        ("", "", False),
        ("  ", "", False),
    ],
)
def test_exact_match(answer, target, right):
    assert exact_match(answer, target) is right


def test_case_can_be_ignored_and_shares_are_counted():
    assert exact_match("TOLEN", "tolen", ignore_case=True)
    assert normalise(" Straße ", ignore_case=True) == "strasse"
    assert proportion([True, False, True]) == Proportion(2, 3)
