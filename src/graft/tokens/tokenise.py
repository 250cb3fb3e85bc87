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
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FEW = 8
"""Fewer texts than these are tokenised whole: the comparison would cost what sharing brings."""


CHARS = 1 << 15
"""Characters tokenised in one call, more or less: what the tokenizer makes of so many stays in a processor's cache."""


class Tokeniser:
    """A tokenizer for many texts that have much in common."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._tokens, self._cuts = _control_tokens(tokenizer)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, [len(texts)] lists, as the tokenizer gives them when nothing is added to what they say."""
        if self._tokens is None or len(texts) < FEW:
            return self._whole(texts)
        parts = [self._pieces(text) for text in texts]
        distinct = list(dict.fromkeys(itertools.chain.from_iterable(parts)))
        known = dict(zip(distinct, self._fast(distinct), strict=True))
        found = [_joined([known[piece] for piece in of_text]) for of_text in parts]
        return found if found[:1] == self._whole(texts[:1]) else self._whole(texts)

    def raw_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of raw texts, [len(texts)] lists, with the BOS or EOS that the tokenizer puts around a text."""
        return self._whole(texts, add_special_tokens=True)

    def _pieces(self, text: str) -> list[str]:
        """The text, cut in front of each control token that may be cut at."""
        assert self._tokens is not None
        edges = [match.start() for match in self._tokens.finditer(text) if match[0] in self._cuts]
        if not edges or edges[0] > 0:
            edges.insert(0, 0)
        edges.append(len(text))
        return [text[start:end] for start, end in itertools.pairwise(edges)]

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


def _joined(lists: list[list[int]]) -> list[int]:
    joined: list[int] = []
    for one in lists:
        joined += one
    return joined
