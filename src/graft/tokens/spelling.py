"""Spells a turn's text as ids, and proves that the ids say what the text says.

Speaks text and ids. Knows no templates' inner life, no weights and no settings.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from graft.tokens.renderer import Renderer
from graft.tokens.response import Turn
from graft.tokens.tokenise import Spelled
from graft.types import IntArray

UNSPELLED = "answers with characters that the tokenizer lacks: they are lost, or become its unknown token"
INEXACT = "answers whose blanks or composed characters the tokenizer does not reproduce exactly"


class Unfit(Exception):
    """This turn yields no example; the text is the reason."""


def response_ids(renderer: Renderer, turn: Turn, prompt: Spelled, full: Spelled) -> tuple[IntArray, bool]:
    """Ids of the response, and whether they decode to its very text.

    Args:
        renderer: whose tokenizer spells.
        turn: the texts.
        prompt: the prompt's text.
        full: prompt + response as one text.

    Where the text as a whole begins with the prompt's ids, the rest is the response. Where a token would span the
    boundary, or a control token eats the answer's first blanks (Phi-3), the response is spelled by itself, as a
    continuation: generation starts from the prompt's ids and can never produce the merged token. Text of a stop token
    inside the answer is spelled as plain text, because a model that says the token has stopped.
    """
    whole: IntArray = full.ids[:0]
    if not turn.forged and full.ids[: len(prompt.ids)].tobytes() == prompt.ids.tobytes():
        whole = full.ids[len(prompt.ids) :]
        # Decoding joins the bytes of what is proven: without the prompt's, those of the response are left.
        if (prompt.proven and full.proven) or _says(renderer, prompt.ids, whole, turn.response):
            return whole, True
    stop_text = str(renderer.tokenizer.convert_ids_to_tokens(turn.stop_id))
    ids: list[int] = []
    for piece, is_stop in _pieces(turn.response.removesuffix(stop_text), turn.forged):
        ids += continuation_ids(renderer, piece, plain=is_stop)
    answer = np.array([*ids, turn.stop_id], np.int32)
    exact = _says(renderer, prompt.ids, answer, turn.response)
    return (answer, exact) if exact or not len(whole) else (whole, False)


def _says(renderer: Renderer, prompt: IntArray, answer: IntArray, text: str) -> bool:
    """Whether ids decode to a text, by themselves or behind the prompt's last ids: decoding may drop a first blank."""
    ids = answer.tolist()
    if renderer.says(ids, text):
        return True
    before = prompt[-4:].tolist()
    lead = renderer.decode(before)
    return renderer.decode(before + ids) == lead + text


def _pieces(body: str, forged: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Cut a text at the given words; True marks a word."""
    rest = body
    while rest:
        at, word = min(((rest.find(word), word) for word in forged if word in rest), default=(len(rest), ""))
        if at:
            yield rest[:at], False
        if word:
            yield word, True
        rest = rest[at + len(word) :]


def continuation_ids(renderer: Renderer, text: str, plain: bool = False) -> list[int]:
    """Ids of a text that continues another one, without the blank that SentencePiece puts before a text's start.

    Args:
        renderer: whose tokenizer spells.
        text: what to spell.
        plain: spell control tokens in it letter by letter.
    """
    tokenizer = renderer.tokenizer
    options = {"split_special_tokens": True} if plain else {}
    anchor: list[int] = tokenizer.encode("\n", add_special_tokens=False)
    anchored: list[int] = tokenizer.encode("\n" + text, add_special_tokens=False, **options)
    if anchor and anchored[: len(anchor)] == anchor:
        return anchored[len(anchor) :]
    alone: list[int] = tokenizer.encode(text, add_special_tokens=False, **options)
    return alone


def check(renderer: Renderer, turn: Turn, prompt: IntArray, answer: IntArray) -> None:
    """The invariants of an example.

    Raises:
        Unfit: one of them does not hold.
    """
    if not len(prompt):
        raise Unfit("the prompt is empty: nothing to predict the first token from")
    if answer[-1] != turn.stop_id or turn.stop_id not in renderer.stop_ids:
        raise Unfit(f"the last target is id {answer[-1]}, not a stop token {list(renderer.stop_ids)}")
    if turn.forged and np.isin(answer[:-1], renderer.stop_ids).any():
        raise Unfit("the answer holds the text of a stop token, and the tokenizer cannot spell it as plain text")
    if renderer.bos is not None:
        bos, bos_id = renderer.bos
        written, found = turn.prompt.count(bos), int(np.count_nonzero(prompt == bos_id))
        if found != written and not bos.isspace():
            raise Unfit(f"the prompt has {found} BOS tokens, the template writes {written}")


def inexact_reason(renderer: Renderer, turn: Turn, answer: IntArray) -> str:
    """The note for ids that do not decode to the very text but still say the same.

    Some tokenizers compose characters (NFC), or set or eat blanks around control tokens; some lack characters, and drop
    them or write their unknown token.

    Raises:
        Unfit: the ids say something else, or nothing.
    """
    ids = answer.tolist()
    spelled = renderer.decode(ids)
    wanted, given = _plain_text(turn.response), _plain_text(spelled)
    if wanted == given:
        return INEXACT
    stop = _plain_text(str(renderer.tokenizer.convert_ids_to_tokens(turn.stop_id)))
    unknown = renderer.tokenizer.unk_token_id
    if unknown is not None and set(ids[:-1]) - {unknown} and unknown in ids:
        return UNSPELLED
    if given.removesuffix(stop) and _is_subsequence(given, wanted):
        return UNSPELLED
    raise Unfit(f"the tokenizer does not give the answer back: {turn.response[:40]!r} became {spelled[:40]!r}")


def _is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(char in rest for char in part)


def _plain_text(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())
