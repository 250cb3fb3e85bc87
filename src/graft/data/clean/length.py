"""Turns without a word, and conversations that are too short or too long in characters."""

from __future__ import annotations

from graft.config.clean import Empty, Length
from graft.data.clean.step import Drop, Notes, Result, chars, remove_turns, texts
from graft.types import Conversation


def drop_empty(conversation: Conversation, settings: Empty, notes: Notes) -> Result:
    """The conversation without blank questions and answers and what goes with them; reasoning alone is no answer."""
    if conversation.text is not None:
        return conversation if conversation.text.strip() else Drop("text", "empty text")
    empty = [
        index
        for index, message in enumerate(conversation.messages)
        if message.role in ("user", "assistant") and not message.content.strip() and not message.tool_calls
    ]
    if not empty:
        return conversation
    notes["empty turns"] += len(empty)
    place, role = f"messages[{empty[0]}]", conversation.messages[empty[0]].role
    left = remove_turns(conversation, empty, settings.drop)
    return left or Drop(place, f"empty {'answer' if role == 'assistant' else 'question'}")


def check_length(conversation: Conversation, settings: Length, notes: Notes) -> Result:
    """Drop what is shorter or longer than the limits, in characters without the blanks around them."""
    place = "messages" if conversation.text is None else "text"
    total = chars(conversation)
    if total < settings.min_chars:
        return Drop(place, f"too short: {total} characters, min_chars is {settings.min_chars}")
    if total > settings.max_chars:
        return Drop(place, f"too long: {total} characters, max_chars is {settings.max_chars}")
    answers = [text for field, role, text in texts(conversation) if role in ("assistant", "text") and "." not in field]
    said = sum(len(text.strip()) for text in answers)
    calls = any(message.tool_calls for message in conversation.messages)
    if said < settings.min_answer_chars and not calls:
        return Drop(place, f"too short: answers of {said} characters, min_answer_chars is {settings.min_answer_chars}")
    if settings.max_turn_chars is not None:
        for field, _, text in texts(conversation):
            if len(text) > settings.max_turn_chars:
                return Drop(field, f"too long: {len(text)} characters, max_turn_chars is {settings.max_turn_chars}")
    return conversation
