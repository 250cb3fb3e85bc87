"""The deal of a step to processes: the one that is found cut by cut and pair by pair, of any number of examples."""

import heapq
import itertools

import numpy as np
import pytest
from tiny import make_example

from graft.tokens.deal import LITTLE, PIECES_PER_SHARE, Prices, deal
from graft.tokens.tree import common_length, lexicographic
from graft.types import Example

VOCABULARY = 1000


def deal_plainly(examples: list[Example], processes: int, prices: Prices, share: bool) -> list[list[Example]]:
    """The same by definition: one piece, one cut and one comparison at a time."""
    ordered = sorted(examples, key=lexicographic)
    lengths = [float(len(example.ids)) for example in ordered]
    shared = [0.0] * len(ordered)
    if share:
        shared[1:] = [float(common_length(a.ids, b.ids)) for a, b in itertools.pairwise(ordered)]
    stem = min(shared[1:], default=0.0)
    lengths, shared = [n - stem for n in lengths], [max(0.0, n - stem) for n in shared]

    def price(first: int, last: int) -> float:
        nodes = pairs = targets = 0.0
        for index in range(first, last):
            before = shared[index] if index > first else 0.0
            nodes += lengths[index] - before
            pairs += (lengths[index] ** 2 - before**2) / 2
            targets += int(np.count_nonzero(ordered[index].weights))
        return prices.node * nodes + prices.pair * pairs + prices.target * targets

    fair = price(0, len(ordered)) / processes
    pieces, waiting = [], [(0, len(ordered))]
    while waiting:
        first, last = waiting.pop()
        cost, inner = price(first, last), [prices.node * shared[at] for at in range(first + 1, last)]
        limit = fair if not inner or min(inner) > LITTLE * cost else fair / PIECES_PER_SHARE
        if not inner or cost <= limit:
            pieces.append((cost, first, last))
            continue
        away = [(abs(at - len(inner) / 2), at) for at, its in enumerate(inner) if its == min(inner)]
        at = first + 1 + min(away)[1]
        waiting += [(first, at), (at, last)]
    loads = [(0.0, process) for process in range(processes)]
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for cost, first, last in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        load, process = heapq.heappop(loads)
        dealt[process] += range(first, last)
        heapq.heappush(loads, (load + cost, process))
    return [[ordered[index] for index in sorted(indices)] for indices in dealt]


def example(number: int, *parts: np.ndarray) -> Example:
    return make_example(f"c{number}", np.concatenate(parts), 1)


def drawn(kind: str, seed: int) -> list[Example]:
    """Examples of one kind, in no order."""
    rng = np.random.default_rng(seed)

    def some(least: int, most: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, rng.integers(least, most))

    count = int(rng.integers(1, 70))
    stems = [some(20, 300) for _ in range(4)]
    if kind == "alone":
        found = [example(n, some(2, 200)) for n in range(count)]
    elif kind == "one stem":
        found = [example(n, stems[0], some(2, 40)) for n in range(count)]
    elif kind == "four stems":
        found = [example(n, stems[n % 4][: int(rng.integers(1, 20)) ** 2], some(2, 40)) for n in range(count)]
    elif kind == "each goes on":
        whole = some(3 * count + 3, 3 * count + 4)
        found = [example(n, whole[: 3 * n + 3]) for n in range(count)]
    else:  # the same ids again and again, and few words
        found = [example(n, rng.integers(3, 5, rng.integers(2, 9))) for n in range(count)]
    return [found[index] for index in rng.permutation(len(found))]


@pytest.mark.parametrize("kind", ["alone", "one stem", "four stems", "each goes on", "few words"])
def test_the_deal_is_the_one_by_definition(kind):
    prices = Prices(node=64, pair=2, target=16)  # whole numbers: the order of sums changes nothing
    cut = 0
    for seed in range(12):
        examples = drawn(kind, seed)
        for processes, share in itertools.product((1, 2, 5, 16), (True, False)):
            found = deal(examples, processes, prices, share)
            wanted = deal_plainly(examples, processes, prices, share)
            assert [[(e.conversation, e.turn) for e in its] for its in found] == [
                [(e.conversation, e.turn) for e in its] for its in wanted
            ]
            cut += sum(map(bool, found)) > 1
    assert cut > 20, "there was nothing to deal"


def test_no_examples_are_dealt_to_nobody():
    assert deal([], 3, Prices()) == [[], [], []]
