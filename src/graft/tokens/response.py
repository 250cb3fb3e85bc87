"""Finds the text that the model must generate for one assistant turn, through its stop.

Speaks messages and text. Knows no ids but the stop's, no weights and no settings.

The prompt is what generation will be given. The response is what the template writes after it, up to its stop:

(a) "template": with the template's own thinking switches set for this turn, its text extends the prompt;
(b) "composed": the template drops or rewrites what generation would produce, so the message's parts are joined;
(c) `TemplateRefused` with a reason.

Where the answer ends is learnt by rendering the same turn with marker words in place of its strings, never by searching
the real text for a stop: an answer may hold anything, a stop's text included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.tokens import chat_template, probe
from graft.tokens.chat_template import BLOCKS
from graft.tokens.probe import Scene, Shape
from graft.tokens.renderer import Renderer, TemplateRefused
from graft.tokens.talk import Talk
from graft.types import Message

REASONING_DROPPED = "turns whose reasoning is not trained on: the template has no place for it"
CALL_DROPPED = "turns whose tool call the template does not write"
STOP_APPENDED = "turns whose end the template leaves open: the stop token is appended"
FORGED_STOP = "answers that hold the text of a stop token: it is spelled as plain text in the target"


@dataclass(frozen=True, slots=True)
class Turn:
    """One example as text."""

    prompt: str
    response: str
    """Through the stop token; nothing after it."""
    stop_id: int
    way: str
    forged: tuple[str, ...] = ()
    """Texts of stop tokens that stand in the answer itself, to be spelled as plain text before the final one."""
    notes: tuple[str, ...] = ()


def find_turn(
    renderer: Renderer, messages: Sequence[Message], index: int, tools: Sequence[Mapping[str, Any]] = ()
) -> Turn:
    """Prompt and response of the assistant turn `messages[index]`.

    Raises:
        TemplateRefused: the template cannot serve this turn; the message says why.
    """
    return turn_of(talk_of(renderer, messages, [index], tools), index)


def talk_of(
    renderer: Renderer, messages: Sequence[Message], turns: Sequence[int], tools: Sequence[Mapping[str, Any]] = ()
) -> Talk:
    """A conversation of which these assistant turns will be asked for, in any order; at least one."""
    last: dict[bool, int] = {}
    for index in sorted(turns):
        last[bool(renderer.switches) and is_reasoned(messages[index])] = index
    return Talk(renderer, messages, tools, last)


def turn_of(talk: Talk, index: int) -> Turn:
    """Prompt and response of one of the turns that the talk was made for.

    Raises:
        TemplateRefused: the template cannot serve this turn; the message says why.
    """
    if index == 0:
        raise TemplateRefused("an assistant turn with nothing before it has no prompt")
    renderer, target = talk.renderer, talk.messages[index]
    thinking = is_reasoned(target)
    scene = Scene(talk, index, thinking)
    prompt, full = scene.prompt(), scene.full()
    shape = probe.shape_of(scene, prompt)
    if not full.endswith(shape.suffix):
        shape = probe.render_shape(scene, target, prompt)
    _check_something_is_written(shape, target)
    notes = [CALL_DROPPED] if target.tool_calls and not shape.keeps_call else []
    if not shape.extends or not full.startswith(prompt) or not full[len(prompt) :].endswith(shape.suffix):
        return _composed(scene, prompt, notes)
    if thinking and not shape.keeps_reasoning:
        if _block_at_end(prompt) is not None or _block_of(renderer) is not None:
            return _composed(scene, prompt, notes)
        notes.append(REASONING_DROPPED)
    body = full[len(prompt) : len(full) - len(shape.suffix)]
    return _ended(scene, body, shape.suffix, prompt=prompt, way="template", notes=notes)


def is_reasoned(message: Message) -> bool:
    """Whether a turn has reasoning, for which the template's switches are turned on."""
    return bool(split_reasoning(message)[0].strip())


def split_reasoning(message: Message) -> tuple[str, str]:
    """Reasoning and answer of a turn, also where the reasoning stands as a block at the head of the content."""
    if message.reasoning is not None:
        return message.reasoning, message.content
    stripped = message.content.lstrip()
    for opening, closing in BLOCKS if stripped.startswith(_OPENINGS) else ():
        if stripped.startswith(opening) and closing in stripped:
            reasoning, answer = stripped[len(opening) :].split(closing, 1)
            return reasoning, answer.lstrip("\n")
    return "", message.content


def _check_something_is_written(shape: Shape, target: Message) -> None:
    if target.tool_calls and not shape.keeps_call and not (shape.keeps_answer and target.content.strip()):
        raise TemplateRefused("the template does not write this tool call, and nothing else is left of the turn")
    if not target.tool_calls and not shape.keeps_answer:
        raise TemplateRefused("the template does not write the assistant's answer")


def _composed(scene: Scene, prompt: str, notes: list[str]) -> Turn:
    """The response from the message's parts: reasoning inside the prompt's block, then the answer, then the stop."""
    reasoning, content = split_reasoning(scene.target)
    reasoning = reasoning.strip("\n")
    bare = replace(scene.target, reasoning=None, content=content)
    full = scene.full_with(bare)
    shape = probe.render_shape(scene, bare, prompt)
    if not full.endswith(shape.suffix):
        raise _mismatch(prompt, full)
    block = _block_at_end(prompt)
    answer = _answer_of(scene, shape, full, prompt, block)
    known = _block_of(scene.renderer)
    lead = ""
    if block is not None and block.is_open:
        lead = _spaced(scene.renderer, block, reasoning)
    elif scene.thinking and block is None and known is not None:
        lead = _spaced(scene.renderer, _Block(len(prompt), True, *known, None), reasoning)
    elif scene.thinking:
        notes = [*notes, REASONING_DROPPED]
    return _ended(scene, lead + answer, shape.suffix, prompt=prompt, way="composed", notes=notes)


@dataclass(frozen=True, slots=True)
class _Block:
    """The block of reasoning at the end of a prompt, or one that the response must open itself."""

    start: int
    is_open: bool
    opening: str
    closing: str
    gap: str | None
    """Blanks between the opening tag and the prompt's end; None where the prompt does not open it."""


def _block_at_end(prompt: str) -> _Block | None:
    for opening, closing in BLOCKS:
        match = re.search(rf"{re.escape(opening)}(\s*)\Z", prompt)
        if match:
            return _Block(match.start(), True, opening, closing, match[1])
        match = re.search(rf"(?:{re.escape(opening)}\s*)?{re.escape(closing)}\s*\Z", prompt)
        if match:
            return _Block(match.start(), False, opening, closing, "")
    return None


def _block_of(renderer: Renderer) -> tuple[str, str] | None:
    """The block of reasoning that the template knows of, by the closing tag in its source."""
    source = renderer.template + (renderer.tool_template or "")
    return next((block for block in BLOCKS if block[1] in source), None)


def _spaced(renderer: Renderer, block: _Block, reasoning: str) -> str:
    """Reasoning and its closing tag, with the blanks that the template puts there when it writes a block itself.

    Where it never does, the blanks are those of DeepSeek-R1 and Qwen3 after an opening tag with a line break, and none
    after a bare tag.
    """
    source = renderer.template + (renderer.tool_template or "")
    written = chat_template.block_spacing(source, block.opening, block.closing)
    wide = block.gap is None or "\n" in block.gap
    if written is not None and block.gap and not written[1]:
        written = None  # a bare closing tag is no evidence where the prompt opens the block on a line of its own
    inner, before, after = written or (("\n", "\n", "\n\n") if wide else ("", "", ""))
    head = block.opening + inner if block.gap is None else ""
    return f"{head}{reasoning}{before}{block.closing}{after}"


def _answer_of(scene: Scene, shape: Shape, full: str, prompt: str, block: _Block | None) -> str:
    """The answer (and tool calls) as the template writes them, from where the prompt leaves off.

    `full` is the turn without reasoning. Tags of a block of reasoning between the prompt's last word and the answer are
    left out; other control tokens there (Cohere opens its response with one) belong to the response.
    """
    end = len(full) - len(shape.suffix)
    if block is None and shape.extends and full.startswith(prompt) and end >= len(prompt):
        return full[len(prompt) : end]
    head = prompt[: block.start] if block else prompt.rstrip()
    start = len(head)
    if not full.startswith(head):
        start = _where_prompt_ends(scene.renderer, shape, full, prompt)
    lead = shape.before[start:end] if shape.keeps_answer else full[start:end]
    tags = re.match(rf"(?:{_ANY_TAG}|\s)*", lead)
    assert tags is not None
    extra = lead[tags.end() :] if shape.keeps_answer else ""
    if probe.control_pattern(scene.renderer).sub("", extra).strip() or (block is None and extra):
        raise _mismatch(prompt, full)
    if full[start:].startswith(lead):
        return full[min(start + tags.end(), end) : end]
    # An answer of blanks only is trimmed together with what leads to it.
    return full[min(start + len(lead.rstrip()), end) : end]


def _where_prompt_ends(renderer: Renderer, shape: Shape, full: str, prompt: str) -> int:
    """Where the turn's text leaves the prompt when the two differ earlier or the prompt closes with a trailer.

    A template may write the same closing words under every text (`<|endoftext|>`, `<|reward|>`), or move the system
    text to the last user turn, which is another one in the prompt than under an answer.
    """
    for at in range(1, len(prompt)):
        if full.startswith(prompt[:-at]) and shape.suffix.endswith(prompt[-at:]) and shape.before == prompt[:-at]:
            return len(prompt) - at
        if not shape.suffix.endswith(prompt[-at:]):
            break
    head = prompt.rstrip()
    opener = [match.start() for match in probe.control_pattern(renderer).finditer(head)]
    tail = head[opener[-1] :] if opener else head.rsplit("\n", 1)[-1]
    at = shape.before.rfind(tail) if tail else -1
    if at < 0 or not full.startswith(shape.before[: at + len(tail)]) or shape.before[at + len(tail) :].strip():
        raise _mismatch(prompt, full)
    return at + len(tail)


_OPENINGS = tuple(opening for opening, _ in BLOCKS)
_ANY_TAG = "|".join(re.escape(tag) for block in BLOCKS for tag in block)


def _mismatch(prompt: str, full: str) -> TemplateRefused:
    at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), min(len(prompt), len(full)))
    return TemplateRefused(
        "the template writes an assistant turn that its own generation prompt does not lead to: "
        f"the prompt goes on {prompt[at : at + 40]!r}, the turn {full[at : at + 40]!r}"
    )


def _ended(scene: Scene, body: str, suffix: str, *, prompt: str, way: str, notes: Sequence[str]) -> Turn:
    """A turn with its stop: the template's, else the tokenizer's EOS."""
    renderer, target = scene.renderer, scene.target
    said = list(notes)
    called = target.tool_calls and CALL_DROPPED not in said
    stop = probe.known_stop_in(renderer, suffix, not called)
    stop_id = None if stop is None else stop[1]
    if stop is not None:
        response = body + suffix[: stop[0]]
    else:
        stop_id = probe.stop_before_next(renderer)
        if stop_id is None:
            stop_id = renderer.tokenizer.eos_token_id
        if stop_id is None:
            raise TemplateRefused("the template writes no end of turn, and the tokenizer has no EOS token to put there")
        said.append(STOP_APPENDED)
        text = str(renderer.tokenizer.convert_ids_to_tokens(stop_id))
        response = body + (suffix.rstrip() if called else "") + text
    assert stop_id is not None
    forged = tuple(text for text in probe.stop_texts(renderer) if any(text in string for string in _strings_of(target)))
    if forged:
        said.append(FORGED_STOP)
    return Turn(prompt, response, stop_id, way, forged, tuple(said))


def _strings_of(target: Message) -> Iterator[str]:
    yield target.content
    if target.reasoning:
        yield target.reasoning
    for call in target.tool_calls:
        yield str(call)
