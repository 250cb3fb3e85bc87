"""Numbers about answers: exact match, shares with intervals, the difference of two models on the same questions.

Speaks strings and counts. Everything here is about *generated* answers; loss and token accuracy, where the right
answer's earlier tokens are given, are other numbers with other names and come from `train.validate`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution: two-sided 95 % intervals."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Proportion:
    """`hits` of `total`."""

    hits: int
    total: int

    @property
    def share(self) -> float:
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> Interval:
        """Wilson's score interval (E. B. Wilson 1927, JASA 22:209-212).

        (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p +- z s it stays within 0 and 1 and is
        right near the ends: 0 of 20 gives 0 to 16 %, not 0 to 0.
        """
        n = self.total
        if n == 0:
            return Interval(math.nan, math.nan)
        p, z2 = self.share, Z95 * Z95
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        # Exact at the ends, where rounding would leave 1e-17.
        return Interval(0.0 if self.hits == 0 else middle - half, 1.0 if self.hits == n else middle + half)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Two models on the same questions: how often each was right where the other was wrong."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
        """Count the four cases; the two sequences are about the same questions in the same order."""
        pairs = list(zip(first, second, strict=True))
        return cls(
            both=pairs.count((True, True)),
            only_first=pairs.count((True, False)),
            only_second=pairs.count((False, True)),
            neither=pairs.count((False, False)),
        )

    @property
    def total(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Share of the second minus share of the first."""
        return (self.only_second - self.only_first) / self.total if self.total else math.nan

    @property
    def interval(self) -> Interval:
        """Newcombe's square-and-add interval for paired proportions.

        R. G. Newcombe 1998, "Improved confidence intervals for the difference between binomial proportions based on
        paired data", Statistics in Medicine 17:2635-2650, method 10: Wilson limits of the two shares, combined with
        the correlation phi of the pairs (continuity-corrected where it is positive).
        """
        n = self.total
        if n == 0:
            return Interval(math.nan, math.nan)
        second, first = Proportion(self.both + self.only_second, n), Proportion(self.both + self.only_first, n)
        below_2, above_2 = second.share - second.interval.low, second.interval.high - second.share
        below_1, above_1 = first.share - first.interval.low, first.interval.high - first.share
        phi = self._phi()
        low = math.sqrt(max(0.0, below_2**2 - 2 * phi * below_2 * above_1 + above_1**2))
        high = math.sqrt(max(0.0, above_2**2 - 2 * phi * above_2 * below_1 + below_1**2))
        return Interval(max(-1.0, self.difference - low), min(1.0, self.difference + high))

    def _phi(self) -> float:
        a, b, c, d = self.both, self.only_second, self.only_first, self.neither
        margins = (a + b) * (c + d) * (a + c) * (b + d)
        if margins == 0:
            return 0.0
        product = a * d - b * c
        if product > 0:
            return max(0.0, product - self.total / 2) / math.sqrt(margins)
        return product / math.sqrt(margins)


def normalise(text: str, ignore_case: bool = False) -> str:
    """What exact match compares: Unicode NFKC (full-width forms become plain ones), outer blanks removed.

    Case counts unless `ignore_case`; punctuation and inner blanks always count.
    """
    text = unicodedata.normalize("NFKC", text).strip()
    return text.casefold() if ignore_case else text


def exact_match(answer: str, target: str, ignore_case: bool = False) -> bool:
    """Whether the answer is the target after `normalise`. An empty answer is always wrong."""
    said = normalise(answer, ignore_case)
    return bool(said) and said == normalise(target, ignore_case)


def proportion(hits: Sequence[bool]) -> Proportion:
    """How many are true."""
    return Proportion(sum(hits), len(hits))
