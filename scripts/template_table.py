"""Write the table of chat template families in docs/templates.md: each one's way, stop and switches.

Reads the real templates beside the checkout (../shared/material) and renders small conversations with each, paired with
a real tokenizer by the rule in tests/template_pairs.py. Run from the repository's root:

    python scripts/template_table.py
"""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

from template_pairs import pairs, renderer_of, template_names  # noqa: E402
from transformers.utils import logging  # noqa: E402

from graft.tokens.renderer import Renderer, TemplateRefused  # noqa: E402
from graft.tokens.response import REASONING_DROPPED, find_turn  # noqa: E402
from graft.types import Message  # noqa: E402

DOC = ROOT / "docs" / "templates.md"
START, END = "<!-- table: scripts/template_table.py -->", "<!-- end of table -->"
DAY = datetime.date(2026, 1, 31)
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "The word."}}},
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"word": "moon"}}}
CASES: dict[str, tuple[tuple[Message, ...], tuple[dict[str, object], ...]]] = {
    "answer": ((Message("user", "Hi"), Message("assistant", "Hello.")), ()),
    "system": ((Message("system", "Be terse."), Message("user", "Hi"), Message("assistant", "Hello.")), ()),
    "reasoning": ((Message("user", "Hi"), Message("assistant", "Hello.", reasoning="A greeting.")), ()),
    "tool call": ((Message("user", "Hi"), Message("assistant", "", tool_calls=(CALL,))), (TOOL,)),
    "tool answer": (
        (
            Message("user", "Hi"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "It is full.", name="look_up", tool_call_id="abcdefghi"),
            Message("assistant", "Full."),
        ),
        (TOOL,),
    ),
}


def way_of(renderer: Renderer, case: str) -> str:
    """a, b or c for one conversation; `a*` says that the reasoning has no place and is left out."""
    messages, tools = CASES[case]
    try:
        turn = find_turn(renderer, messages, len(messages) - 1, tools)
    except TemplateRefused as error:
        return f"c: {str(error)[:44]}"
    mark = "*" if REASONING_DROPPED in turn.notes else ""
    return {"template": "a", "composed": "b"}[turn.way] + mark


def table() -> str:
    """The table in Markdown, and how many templates go each way."""
    lines = ["| template | tokenizer | " + " | ".join(CASES) + " | stop | switches |", "|---" * (len(CASES) + 4) + "|"]
    counts: Counter[str] = Counter()
    for name in template_names():
        renderer = renderer_of(name, DAY)
        ways = [way_of(renderer, case) for case in CASES]
        # One that serves no plain talk may still serve system or tool talk; its first way that works is its way.
        counts[next((way[0] for way in ways if way[0] != "c"), "c")] += 1
        stops = " ".join(f"`{renderer.tokenizer.convert_ids_to_tokens(stop)}`" for stop in renderer.stop_ids)
        cells = [name, pairs()[name], *ways, stops, " ".join(renderer.switches)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    said = ", ".join(f"{counts[way]} way {way}" for way in "abc")
    return f"{sum(counts.values())} templates: {said}.\n\n" + "\n".join(lines)


def main() -> None:
    """Put the table between its two marks."""
    logging.set_verbosity_error()
    text = DOC.read_text(encoding="utf-8")
    new = re.sub(f"{START}.*{END}", lambda _: f"{START}\n{table()}\n{END}", text, flags=re.DOTALL)
    DOC.write_text(new, encoding="utf-8")
    print(f"{DOC}: {new.split(START)[1].strip().splitlines()[0]}")


if __name__ == "__main__":
    main()
