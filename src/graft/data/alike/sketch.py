"""Small stand-ins for sets of shingles: MinHash bands to find similar texts by, and hashes to compare two of them.

Speaks of texts, shingles and similarity. Knows no conversations and no groups. A text of any length takes at most
2.4 KiB: 128 bytes of MinHash, 8 bytes per band, and 4 bytes for each of its KEPT smallest shingles.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.data.alike.text import Hashes, Offsets, shingle_sets

Index = npt.NDArray[np.int64]

PERMUTATIONS = 128
KEPT = 512
"""Shingle hashes kept of a text. With fewer shingles its similarity is exact; beyond, it is estimated from the KEPT
smallest hashes of both (Broder, 1997), with a standard error of at most 0.022."""
BUCKET = 64
"""Texts of one bucket that a text is compared with: bounds the work where thousands share a boilerplate."""
_SEED = 1
_MISSED = 0.01
"""The most pairs at the threshold itself that the bands may miss; of more similar ones they miss far fewer."""
_AT_ONCE = 1 << 22
"""Shingles compared at once: 32 MiB of keys and a few times as much while they are sorted."""


@dataclass(frozen=True, slots=True)
class Sketches:
    """Sketches of n texts."""

    bands: Hashes
    """[n, bands] two texts that agree in a column are candidates."""
    low: npt.NDArray[np.uint8]
    """[n, PERMUTATIONS] the lowest byte of each MinHash value: tells most candidates apart in no time."""
    values: npt.NDArray[np.uint32]
    """[V] the kept shingles of all texts, each text's sorted and distinct."""
    offsets: Offsets
    """[n + 1] text i has the values offsets[i] to offsets[i + 1]."""
    identity: Hashes
    """[n] a hash of the whole set of shingles."""

    def __len__(self) -> int:
        return len(self.identity)


def bands_for(threshold: float) -> int:
    """How many bands of the MinHash find a pair at the threshold with a probability of 0.99.

    With b bands of r values, a pair of similarity s agrees in one of them with probability 1 - (1 - s^r)^b. The
    largest such r gives the fewest false candidates (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, 3.4).
    """
    fits = [
        rows
        for rows in range(1, PERMUTATIONS + 1)
        if (1 - threshold**rows) ** (PERMUTATIONS // rows) <= _MISSED or rows == 1
    ]
    return PERMUTATIONS // fits[-1]


def sketch(texts: list[str], bands: int) -> Sketches:
    """Sketches of a batch of texts."""
    from rensa import RMinHash

    values, offsets = shingle_sets(texts)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(values, offsets.astype(np.uint64), PERMUTATIONS, _SEED)
    signature = np.array(rows.to_rows(), np.uint32).reshape(len(texts), PERMUTATIONS)
    kept = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets)) < KEPT
    return Sketches(
        _band_keys(signature, bands),
        (signature & 0xFF).astype(np.uint8),
        values[kept].astype(np.uint32),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(np.minimum(np.diff(offsets), KEPT))]),
        np.add.reduceat(_spread(values), offsets[:-1]) if len(texts) else np.zeros(0, np.uint64),
    )


class Collector:
    """Makes one piece of many batches of sketches, without ever holding both."""

    def __init__(self, bands: int) -> None:
        self._bands = bands
        self._keys, self._low, self._identity = array("Q"), array("B"), array("Q")
        self._values, self._sizes = array("I"), array("q")

    def add(self, batch: Sketches) -> None:
        """Put a batch behind those before it."""
        self._keys.frombytes(batch.bands.tobytes())
        self._low.frombytes(batch.low.tobytes())
        self._identity.frombytes(batch.identity.tobytes())
        self._values.frombytes(batch.values.tobytes())
        self._sizes.frombytes(np.diff(batch.offsets).tobytes())

    def sketches(self) -> Sketches:
        """All that was added; nothing can be added afterwards."""
        return Sketches(
            np.frombuffer(self._keys, np.uint64).reshape(-1, self._bands),
            np.frombuffer(self._low, np.uint8).reshape(-1, PERMUTATIONS),
            np.frombuffer(self._values, np.uint32),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(np.frombuffer(self._sizes, np.int64))]),
            np.frombuffer(self._identity, np.uint64),
        )


def collect(batches: Iterable[Sketches], bands: int) -> Sketches:
    """All batches as one."""
    collector = Collector(bands)
    for batch in batches:
        collector.add(batch)
    return collector.sketches()


def similar(left: Sketches, a: Index, right: Sketches, b: Index, threshold: float) -> npt.NDArray[np.float64]:
    """[pairs] the Jaccard similarity of text a[i] of `left` and b[i] of `right`; 0 where it is surely too small.

    Surely: their MinHash values agree four standard deviations less often than at the threshold.
    """
    found = np.zeros(len(a))
    chance = threshold + (1 - threshold) / 256  # two different values share their lowest byte once in 256
    least = PERMUTATIONS * chance - 4 * (PERMUTATIONS * chance * (1 - chance)) ** 0.5
    step = _AT_ONCE // PERMUTATIONS
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        agree = np.count_nonzero(left.low[a[part]] == right.low[b[part]], axis=1)
        near = start + np.flatnonzero(agree >= least)
        found[near] = jaccard(left, a[near], right, b[near])
    return found


def jaccard(left: Sketches, a: Index, right: Sketches, b: Index) -> npt.NDArray[np.float64]:
    """[pairs] the Jaccard similarity of text a[i] of `left` and b[i] of `right`; see KEPT for its precision."""
    weight = np.cumsum(left.offsets[a + 1] - left.offsets[a] + right.offsets[b + 1] - right.offsets[b])
    found = [np.zeros(0)]
    start = 0
    while start < len(a):
        done = weight[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(weight, done + _AT_ONCE, side="right")))
        found.append(_jaccard(left, a[start:stop], right, b[start:stop]))
        start = stop
    return np.concatenate(found)


def _jaccard(left: Sketches, a: Index, right: Sketches, b: Index) -> npt.NDArray[np.float64]:
    keys = np.concatenate([_keys(left, a), _keys(right, b)])  # pair << 32 | shingle: in both sets, if it is there twice
    keys.sort()
    twice = np.concatenate([keys[1:] == keys[:-1], np.zeros(1, np.bool_)])
    new = np.concatenate([np.ones(1, np.bool_), ~twice[:-1]])
    pair = (keys[new] >> np.uint64(32)).astype(np.int64)
    both = twice[new]
    union = np.bincount(pair, minlength=len(a))
    sizes = np.diff(left.offsets)[a], np.diff(right.offsets)[b]
    whole = (sizes[0] < KEPT) & (sizes[1] < KEPT)
    looked_at = np.where(whole, union, np.minimum(union, KEPT))
    rank = np.arange(len(pair)) - np.repeat(np.cumsum(union) - union, union)
    shared = np.bincount(pair[both & (rank < looked_at[pair])], minlength=len(a))
    return np.asarray(shared / looked_at, np.float64)


def _keys(sketches: Sketches, rows: Index) -> Hashes:
    """The values of the rows, behind each other, with the place in `rows` in their upper half."""
    sizes = sketches.offsets[rows + 1] - sketches.offsets[rows]
    place = np.arange(int(sizes.sum())) + np.repeat(sketches.offsets[rows] - (np.cumsum(sizes) - sizes), sizes)
    owner = np.repeat(np.arange(len(rows), dtype=np.uint64), sizes)
    keys: Hashes = owner << np.uint64(32) | sketches.values[place]
    return keys


def _band_keys(signature: npt.NDArray[np.uint32], bands: int) -> Hashes:
    """[n, bands] one hash of the MinHash values of each band."""
    rows = PERMUTATIONS // bands
    keys: Hashes = np.zeros((len(signature), bands), np.uint64)
    for row in range(rows):
        keys = _spread(keys + signature[:, row : rows * bands : rows].astype(np.uint64))
    return keys


def _spread(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers without pattern."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(29)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(32)


def pairs_in_buckets(keys: Hashes) -> Iterator[tuple[Index, Index]]:
    """Pairs of texts with equal keys [n], as arrays (earlier text, later text): first each with the next one of its
    bucket, then with the second next, and so on up to BUCKET.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    live = np.arange(len(keys))
    for step in range(1, BUCKET + 1):
        live = live[live + step < len(keys)]
        live = live[ordered[live] == ordered[live + step]]
        if not len(live):
            return
        yield order[live], order[live + step]


def candidates(left: Sketches, right: Sketches, orders: Index) -> tuple[Index, Index]:
    """Pairs (text of `left`, text of `right`) that agree in a band, each once; of a bucket of `right`, its first
    BUCKET texts. `orders` [n, bands] sorts each band of `right`, stably.
    """
    found = [np.zeros(0, np.int64)]
    for band in range(right.bands.shape[1]):
        keys = right.bands[orders[:, band], band]
        first = np.searchsorted(keys, left.bands[:, band], side="left")
        count = np.minimum(np.searchsorted(keys, left.bands[:, band], side="right") - first, BUCKET)
        place = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(int(count.sum()))
        mine = np.repeat(np.arange(len(left)), count)
        found.append(mine * len(right) + orders[place, band])
    both = np.unique(np.concatenate(found))
    return both // len(right), both % len(right)
