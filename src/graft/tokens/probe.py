"""Learns what a chat template does with a turn, by rendering turns with marker words in place of their strings.

Speaks messages and text. Knows no ids but those of stops, and nothing of what will be trained on.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graft.tokens.chat_template import BLOCKS
from graft.tokens.renderer import Renderer, TemplateRefused
from graft.tokens.talk import Talk
from graft.types import Message

ANSWER = "Qz7GraftAnswer7zQ"
THOUGHT = "Qz7GraftThought7zQ"
ARGUMENT = "Qz7GraftArgument7zQ"

MOST_REMEMBERED = 4096
"""Things remembered of one template: a stranger's data cannot fill the memory with shapes of its own."""

_CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"at": ARGUMENT}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look there.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "description": "Where."}},
            "required": ["at"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Scene:
    """An assistant turn and everything before it."""

    talk: Talk
    index: int
    """Which of the conversation's messages the turn is."""
    thinking: bool
    """How the template's switches are set: whether the turn has reasoning."""

    @property
    def renderer(self) -> Renderer:
        return self.talk.renderer

    @property
    def target(self) -> Message:
        return self.talk.messages[self.index]

    def prompt(self) -> str:
        """What generation is given."""
        return self.talk.prompt(self.index, self.thinking)

    def full(self) -> str:
        """The conversation with the turn as its last one."""
        return self.talk.full(self.index, self.thinking)

    def full_with(self, target: Message) -> str:
        """The conversation with `target` as its last turn."""
        return self.talk.ending_in(target, self.index, self.thinking)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the template does around a turn's own strings, learnt by rendering marker words."""

    extends: bool
    """Whether the text goes on from the generation prompt, whatever the answer begins with."""
    before: str
    """Everything before the answer."""
    suffix: str
    """Everything after the turn's last string."""
    keeps_reasoning: bool
    keeps_answer: bool
    keeps_call: bool


def shape_of(scene: Scene, prompt: str) -> Shape:
    """The shape of a turn; for plain answers it is remembered by the roles that lead to it."""
    target = scene.target
    if target.tool_calls:
        return render_shape(scene, target, prompt)
    roles = tuple([message.role for message in scene.talk.messages[: scene.index]])
    key = (roles, bool(scene.talk.tools), scene.thinking, target.reasoning is not None)
    memory = scene.renderer.memory
    if key not in memory:
        shape = render_shape(scene, target, prompt)
        if len(memory) > MOST_REMEMBERED:
            return shape
        memory[key] = shape
    known: Shape = memory[key]
    return known


def render_shape(scene: Scene, target: Message, prompt: str) -> Shape:
    """The shape of `target` in the place of the scene's turn."""
    text = scene.full_with(_marked(target))
    answer, argument = text.rfind(ANSWER), text.rfind(ARGUMENT)
    ends = [at + len(word) for at, word in ((answer, ANSWER), (argument, ARGUMENT)) if at >= 0]
    return Shape(
        extends=text.startswith(prompt),
        before=text[:answer] if answer >= 0 else "",
        suffix=text[max(ends) :] if ends else "",
        keeps_reasoning=THOUGHT in text,
        keeps_answer=answer >= 0,
        keeps_call=argument >= 0,
    )


def _marked(target: Message) -> Message:
    """The turn with marker words in place of its strings, and the same parts otherwise."""
    content = ANSWER if target.content.strip() or not target.tool_calls else target.content
    reasoning = THOUGHT if target.reasoning is not None and target.reasoning.strip() else target.reasoning
    for opening, closing in BLOCKS if reasoning is None else ():
        if target.content.lstrip().startswith(opening) and closing in target.content:
            content = f"{opening}\n{THOUGHT}\n{closing}\n\n{ANSWER}"
    calls = target.tool_calls
    if calls:
        calls = (*calls[:-1], _mark_call(calls[-1]))
    return replace(target, content=content, reasoning=reasoning, tool_calls=calls)


def _mark_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with a marker word for each string among its arguments, or for its name where there is none."""
    bare = call.get("function")
    function = dict(bare) if isinstance(bare, Mapping) else dict(call)
    marked = _mark_strings(function.get("arguments"))
    if marked == function.get("arguments"):
        function["name"] = ARGUMENT
    function["arguments"] = marked
    return {**call, "function": function} if isinstance(bare, Mapping) else function


def _mark_strings(value: Any) -> Any:
    if isinstance(value, str):
        return ARGUMENT
    if isinstance(value, Mapping):
        return {key: _mark_strings(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mark_strings(item) for item in value]
    return value


def wants_parts(renderer: Renderer) -> bool:
    """Whether the template drops content given as a string and writes it when given as a list of parts."""
    question = [Message("user", ANSWER)]
    for parts in (False, True):
        try:
            if ANSWER in replace(renderer, content_parts=parts).render(question):
                return parts
        except TemplateRefused:
            continue
    return False


def wants_string_arguments(renderer: Renderer) -> bool:
    """Whether the template raises on tool-call arguments given parsed and writes them given as JSON text."""
    turns = [Message("user", "Hi"), Message("assistant", "", tool_calls=(_CALL,))]
    for strings in (False, True):
        for tools in ((), (_TOOL,)):
            with contextlib.suppress(TemplateRefused):
                replace(renderer, string_arguments=strings).render(turns, tools, generation_prompt=False)
                return strings
    return False


def default_system(renderer: Renderer) -> str:
    """The text that the template writes before a first user turn by itself, or nothing."""
    try:
        text = renderer.render([Message("user", ANSWER)], generation_prompt=False)
    except TemplateRefused:
        return ""
    before = control_pattern(renderer).sub(" ", text.split(ANSWER)[0])
    words = re.findall(r"[^\W\d_]{2,}|[\u4e00-\u9fff]", before)
    return " ".join(before.split()) if len(words) >= 5 else ""


def stops_of_template(renderer: Renderer, known: Sequence[int]) -> list[int]:
    """Ids that the template writes at the end of an assistant turn: of a plain answer, and of a tool call."""
    found: list[int] = []
    for target in (Message("assistant", ANSWER), Message("assistant", "", tool_calls=(_CALL,))):
        for tools in ((), (_TOOL,)):
            try:
                talk = Talk(renderer, [Message("user", "Hi"), target], tools, {False: 1})
                shape = render_shape(Scene(talk, 1, False), target, "")
            except TemplateRefused:
                continue
            if target.tool_calls and not shape.keeps_call:
                continue
            stop = stop_in(renderer, shape.suffix, [*known, *found], not target.tool_calls)
            stop_id = stop[1] if stop is not None else None if target.tool_calls else stop_before_next(renderer)
            if stop_id is not None and stop_id not in found:
                found.append(stop_id)
    return found


def stop_in(renderer: Renderer, suffix: str, known: Sequence[int], plain: bool) -> tuple[int, int] | None:
    """End of the stop's text in `suffix` and its id, or None where no token of the tokenizer stands there.

    After a plain answer the stop is in the first run of adjoining control tokens: a known stop if there is one (Cohere
    closes its response and then the turn), else the run's last (Phi-3 writes `<|end|>`, then a line break, then EOS).
    After a tool call tags may come before: the first known stop anywhere, else the last token of all.
    """
    runs: list[list[re.Match[str]]] = []
    for match in control_pattern(renderer).finditer(suffix):
        if runs and runs[-1][-1].end() == match.start():
            runs[-1].append(match)
        else:
            runs.append([match])
    if not runs:
        return None
    tokens = runs[0] if plain else [match for run in runs for match in run]
    vocabulary = added_vocabulary(renderer)
    closers = list(itertools.takewhile(lambda match: not _OPENER.search(match[0]), tokens)) or tokens
    chosen = next((match for match in tokens if vocabulary[match[0]] in known), closers[-1])
    return chosen.end(), int(vocabulary[chosen[0]])


def known_stop_in(renderer: Renderer, suffix: str, plain: bool) -> tuple[int, int] | None:
    """`stop_in` with the renderer's own stops; remembered, because nearly all turns end alike."""
    key = ("stop", suffix, plain)
    if key not in renderer.memory:
        found = stop_in(renderer, suffix, renderer.stop_ids, plain)
        if len(renderer.memory) > MOST_REMEMBERED:
            return found
        renderer.memory[key] = found
    known: tuple[int, int] | None = renderer.memory[key]
    return known


_OPENER = re.compile(r"start|begin|bos|user|assistant(?!_end)|chatbot|system|header", re.IGNORECASE)
"""Names of tokens that open a turn; a template that always writes the next opening has them after the stop."""


def stop_before_next(renderer: Renderer) -> int | None:
    """The stop of templates that close an answer only when another turn follows."""
    if "next" not in renderer.memory:
        turns = [Message("user", "Hi"), Message("assistant", ANSWER), Message("user", ARGUMENT)]
        try:
            text = renderer.render(turns, generation_prompt=False)
        except TemplateRefused:
            text = ""
        between = text.rsplit(ANSWER, 1)[-1].split(ARGUMENT)[0] if ANSWER in text else ""
        pattern = control_pattern(renderer)
        first = pattern.match(between.lstrip())
        is_stop = first is not None and not _OPENER.search(first[0])
        renderer.memory["next"] = added_vocabulary(renderer)[first[0]] if first and is_stop else None
    known: int | None = renderer.memory["next"]
    return known


def added_vocabulary(renderer: Renderer) -> Mapping[str, int]:
    """Text -> id of the tokenizer's added tokens, which it gathers anew each time that it is asked."""
    if "added" not in renderer.memory:
        renderer.memory["added"] = renderer.tokenizer.get_added_vocab()
    known: Mapping[str, int] = renderer.memory["added"]
    return known


def control_pattern(renderer: Renderer) -> re.Pattern[str]:
    """Any added token of the tokenizer but those of blanks."""
    if "control" not in renderer.memory:
        words = [word for word in added_vocabulary(renderer) if word.strip()]
        pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
        renderer.memory["control"] = re.compile(pattern or r"(?!)")
    known: re.Pattern[str] = renderer.memory["control"]
    return known


def stop_texts(renderer: Renderer) -> tuple[str, ...]:
    """Texts of the stop tokens; an id of generation_config that the vocabulary lacks has none."""
    if "stops" not in renderer.memory:
        tokens = renderer.tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))
        renderer.memory["stops"] = tuple(token for token in tokens if token)
    known: tuple[str, ...] = renderer.memory["stops"]
    return known
