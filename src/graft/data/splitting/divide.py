"""Groups of rows into train, val and test: by place alone, or to the row within each stratum.

Speaks of rows as numbers, groups and shares. Knows no conversations and no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from graft.data.alike.sketch import Index

PARTS = ("train", "val", "test")
TRAIN, VAL, TEST = range(3)
Codes = npt.NDArray[np.uint8]


def divide(
    places: npt.NDArray[np.float64], groups: Index, strata: Sequence[int] | None, val: float, test: float
) -> Codes:
    """[n] the part of each row, as its index in PARTS; the rows of a group go together.

    `groups` [n] is the index of the first row of each row's group; where that row lies in [0, 1), `places` [n],
    decides for the group. `val` and `test` are shares, or from 1 on counts of rows. With shares and no `strata` [n],
    the lowest share of the places is test, the next val: no other row has a say. Otherwise each stratum gives its
    part of the rows wanted, lowest places first; a group larger than what is still wanted is passed over, and belongs
    to the commonest stratum of its rows.
    """
    if strata is None and val < 1 and test < 1:
        place = places[groups]
        return np.select([place < test, place < test + val], [TEST, VAL], TRAIN).astype(np.uint8)
    first, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    strata_of = np.zeros(len(groups), np.int64) if strata is None else np.asarray(strata, np.int64)
    stratum = _commonest(member, strata_of)
    order = np.lexsort((first, places[first]))
    parts = np.full(len(first), TRAIN, np.uint8)
    for part, wanted in ((TEST, test), (VAL, val)):
        left = _quotas(np.bincount(stratum, weights=sizes).astype(np.int64), wanted)
        for group in order.tolist():
            mine = stratum[group]
            if parts[group] == TRAIN and sizes[group] <= left[mine]:
                parts[group] = part
                left[mine] -= sizes[group]
    return parts[member]


def _commonest(member: Index, strata: Index) -> Index:
    """[groups] the stratum of most rows of each group; the lower one of two."""
    pairs, counts = np.unique(np.stack([member, strata]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -counts, pairs[0]))
    _, best = np.unique(pairs[0][order], return_index=True)
    return np.asarray(pairs[1][order][best], np.int64)


def _quotas(rows: Index, wanted: float) -> list[int]:
    """Rows of each stratum for a part: their exact shares, rounded so that the sum is right (largest remainders)."""
    total = int(rows.sum())
    share = wanted if wanted < 1 else wanted / total
    exact = rows * share
    quotas = np.floor(exact).astype(np.int64)
    missing = round(total * share) - int(quotas.sum())
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return [int(quota) for quota in quotas]
