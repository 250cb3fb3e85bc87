"""Many texts to ids at once: what the texts share is tokenised once.

Speaks text and ids. Knows no messages, no templates and no targets.

Rendered conversations repeat themselves: a prompt stands again in prompt + answer, and both again in the next turn's.
So texts are cut in front of control tokens, and each distinct piece is tokenised once. That gives the ids of the whole,
because the tokenizers library itself cuts a text at these tokens before it normalises or splits anything
(`extract_and_normalize` in its added_vocabulary.rs), so that no rule and no merge ever looks across them.
The conditions:

- The token is searched for in the text as it is (`normalized` is false).
- It does not look at its neighbours, and no token before it looks at it: it eats no blank on its left (`lstrip`), is no
  blank itself, and no token must be a word of its own (`single_word`).
- Tokens are found leftmost and longest first, as there.
- A piece begins with its token, so what follows is not the beginning of a text (SentencePiece puts a blank there).

Where a condition does not hold, texts are tokenised whole; and in each call one text is, to compare.

A distinct piece is spelled word by word where that is possible (`words`), which costs a fifth of the tokenizer's work,
and proves on the way that decoding the ids gives the text.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graft.tokens.proof import bytes_of
from graft.tokens.words import NotByWords, Words, words_of
from graft.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FEW = 8
"""Fewer texts than these are tokenised whole: the comparison would cost what sharing brings."""


CHARS = 1 << 15
"""Characters tokenised in one call, more or less: what the tokenizer makes of so many stays in a processor's cache."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """A text as ids."""

    ids: IntArray
    """[L]"""
    proven: bool
    """That the ids decode to the text, and those of a beginning to a beginning, is proven; False says nothing."""


class Tokeniser:
    """A tokenizer for many texts that have much in common."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens, self._cuts = _control_tokens(tokenizer)
        self._longest = max(map(len, tokenizer.get_added_vocab()), default=0)
        self._by_words = ByWords.of(tokenizer, self._cuts) if self._tokens is not None else None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, [len(texts)] lists, as the tokenizer gives them when nothing is added to what they say."""
        return [spelled.ids.tolist() for spelled in self.spelled(texts)]

    def spelled(self, texts: Sequence[str]) -> list[Spelled]:
        """The same as arrays, and whether they are proven to say the texts."""
        if self._tokens is None or len(texts) < FEW:
            return self._unproven(texts)
        parts = self._cut(texts)
        known, unproven = self._known(dict.fromkeys(itertools.chain.from_iterable(parts)))
        found = [
            Spelled(
                np.frombuffer(b"".join(map(known.__getitem__, part)), np.int32),
                not unproven or unproven.isdisjoint(part),
            )
            for part in parts
        ]
        first = self._whole(texts[:1])[0]
        return found if found[0].ids.tolist() == first else self._unproven(texts)

    def raw_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of raw texts, [len(texts)] lists, with the BOS or EOS that the tokenizer puts around a text."""
        return self._whole(texts, add_special_tokens=True)

    def _known(self, pieces: Iterable[str]) -> tuple[dict[str, bytes], set[str]]:
        """Ids of each piece as int32 bytes, and the pieces that the Rust tokenizer had to be asked for."""
        known: dict[str, bytes] = {}
        asked: list[str] = []
        for piece in pieces:
            spelled = self._by_words.spell(piece) if self._by_words is not None else None
            if spelled is None:
                asked.append(piece)
            else:
                known[piece] = spelled
        for piece, ids in zip(asked, self._fast(asked), strict=True):
            known[piece] = np.array(ids, np.int32).tobytes()
        return known, set(asked)

    def _unproven(self, texts: Sequence[str]) -> list[Spelled]:
        return [Spelled(np.array(ids, np.int32), False) for ids in self._whole(texts)]

    def _cut(self, texts: Sequence[str]) -> list[list[str]]:
        """Each text, cut in front of each control token that may be cut at.

        A text that goes on from the one before, as a turn does from its prompt, is cut as that one was, up to where a
        token that is found in it could reach beyond its end.
        """
        assert self._tokens is not None
        found: list[list[str]] = []
        last, edges, pieces = "", [0], [""]
        for text in texts:
            kept = 0
            if len(last) > self._longest and text.startswith(last):
                kept = bisect.bisect_right(edges, len(last) - self._longest) - 1
            start = edges[kept]
            after = [match.start() for match in self._tokens.finditer(text, start) if match[0] in self._cuts]
            after = after if after and after[0] == start else [start, *after]
            edges = [*edges[:kept], *after]
            after.append(len(text))
            pieces = [*pieces[:kept], *(text[here:there] for here, there in itertools.pairwise(after))]
            found.append(pieces)
            last = text
        return found

    def _whole(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        found: list[list[int]] = []
        for some in _batches(texts):
            found += self._tokenizer(some, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return found

    def _fast(self, pieces: list[str]) -> list[list[int]]:
        """Ids of the pieces from the Rust tokenizer, which is spared the characters' places."""
        backend: Any = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self._tokenizer.split_special_tokens
        found: list[list[int]] = []
        for some in _batches(pieces):
            found += [encoding.ids for encoding in backend.encode_batch_fast(some, add_special_tokens=False)]
        return found


class ByWords:
    """Spells pieces, each a control token and what follows it, where the tokenizer need not be asked."""

    def __init__(self, words: Words, heads: dict[str, bytes], others: re.Pattern[str]) -> None:
        """`heads`: ids of the control tokens that stand by themselves; `others`: finds those that do not."""
        self._words = words
        self._heads = heads
        self._head = re.compile("|".join(map(re.escape, sorted(heads, key=len, reverse=True))) or r"(?!)")
        self._others = others

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, cuts: frozenset[str]) -> ByWords | None:
        """For a tokenizer and the tokens that its texts are cut at; None where no text can be spelled."""
        words, proof = words_of(tokenizer), bytes_of(tokenizer)
        if words is None or proof is None:
            return None
        heads: dict[str, bytes] = {}
        others: set[str] = set()
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token.content in cuts and not token.rstrip and proof.say([token_id], token.content):
                heads[token.content] = np.array([token_id], np.int32).tobytes()
            else:
                others.add(token.content)
        if any(not words.leaves(content) for content in others):
            return None  # a token that is searched for in another spelling than its own
        return cls(words, heads, re.compile("|".join(map(re.escape, others)) or r"(?!)"))

    def spell(self, piece: str) -> bytes | None:
        """Ids of a piece as int32 bytes, proven to decode to it; None where the tokenizer must be asked."""
        if self._others.search(piece):
            return None
        head = self._head.match(piece)
        try:
            if head is None:
                return self._words.spell(piece)
            return self._heads[head[0]] + self._words.spell(piece[head.end() :])
        except NotByWords:
            return None


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in lists of about CHARS characters, and at least one text."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= CHARS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str] | None, frozenset[str]]:
    """What finds the control tokens in a text as it is, and those to cut at; None where a condition does not hold."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.split_special_tokens:
        return None, frozenset()
    added = list(tokenizer.added_tokens_decoder.values())
    by_chance = getattr(tokenizer.backend_tokenizer.model, "dropout", None)
    if by_chance or any(token.single_word for token in added):
        return None, frozenset()
    literal = sorted((token.content for token in added if not token.normalized), key=len, reverse=True)
    cuts = frozenset(
        token.content for token in added if not (token.normalized or token.lstrip or token.content[:1].isspace())
    )
    return (re.compile("|".join(map(re.escape, literal))), cuts) if cuts else (None, cuts)
