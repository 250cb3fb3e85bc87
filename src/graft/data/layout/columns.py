"""What columns are called elsewhere: names and aliases to the names that formats know.

Speaks of column names. Knows no values and no formats' contents. Only one alias of a kind is taken for the
column: where two could be it, the user says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graft.config.data import COLUMNS, Source
from graft.errors import InputError

SIDE_ALIASES: Mapping[str, tuple[str, ...]] = {
    "system": ("system_prompt", "system_message"),
    "tools": ("functions",),
}
"""Columns beside the turns, in any format."""

QUESTION = ("question", "query", "prompt", "instruction", "input", "problem")
ANSWER = ("answer", "response", "output", "completion", "target", "targets", "answers", "answer_key", "solution")
WEAK_ANSWER = ("text", "content")
"""Answers only where no better one is there."""

_CHINESE = {
    **dict.fromkeys(("问题", "提问", "问"), "question"),
    **dict.fromkeys(("回答", "答案", "答复", "答"), "answer"),
    **{"指令": "instruction", "输入": "input", "输出": "output", "系统": "system", "系统提示": "system"},
    **{"历史": "history", "对话": "conversations", "文本": "text", "正文": "text"},
}


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the columns that `columns` (ours: theirs) names under our names.

    A column that has such a name already, and is not the one meant, goes on as `other_NAME`.
    """
    theirs = set(columns.values())
    renamed = {ours: row[name] for ours, name in columns.items() if name in row}
    for name, value in row.items():
        if name not in theirs:
            renamed[_free(name, renamed, row) if name in columns else name] = value
    return renamed


def _free(name: str, *taken: Mapping[str, Any]) -> str:
    name = f"other_{name}"
    while any(name in names for names in taken):
        name += "_"
    return name


def side_columns(names: Sequence[str]) -> dict[str, str]:
    """Aliases of the columns beside the turns, ours: theirs, where ours is not there and one alias is."""
    found = {}
    for ours, aliases in SIDE_ALIASES.items():
        present = [name for name in aliases if name in names]
        if ours not in names and len(present) == 1:
            found[ours] = present[0]
    return found


def infer_columns(names: Sequence[str], file: str, source: Source | None = None) -> dict[str, str]:
    """Our names for the columns of a file that fits no format as it stands, ours: theirs.

    First other spellings (Question, 问题), then one column that can be the question and one that can be the answer.
    Nothing where it takes more than that. `source` is where the user named the file.

    Raises:
        InputError: two columns could be the same one; names both.
    """
    spelt: dict[str, str] = {}
    for name in names:
        plain = name.strip().lower()
        ours = _CHINESE.get(plain, plain)
        if ours not in COLUMNS and ours not in (*QUESTION, *ANSWER, *WEAK_ANSWER):
            continue
        if ours in spelt:
            raise InputError(_ambiguous(file, ours, [spelt[ours], name], source))
        spelt[ours] = name
    asks, answers = [name for name in QUESTION if name in spelt], [name for name in ANSWER if name in spelt]
    answers = answers or [name for name in WEAK_ANSWER if name in spelt]
    taken: dict[str, str] = {}
    if asks and answers:
        if len(answers) > 1:
            raise InputError(_ambiguous(file, "answer", [spelt[name] for name in answers], source))
        if set(asks) == {"instruction", "input"}:
            taken = {"instruction": "instruction", "input": "input", "output": answers[0]}
        elif len(asks) > 1:
            raise InputError(_ambiguous(file, "question", [spelt[name] for name in asks], source))
        else:
            taken = {"question": asks[0], "answer": answers[0]}
    found = {ours: spelt[plain] for ours, plain in taken.items()}
    others = {ours: name for ours, name in spelt.items() if ours not in taken.values() and ours not in found}
    return found | {ours: name for ours, name in others.items() if ours != name}


def _ambiguous(file: str, ours: str, theirs: Sequence[str], source: Source | None) -> str:
    how = (source or Source(path=file)).how_to_name({ours: theirs[0]})
    return f"{file}: its columns {' and '.join(theirs)} could each be the {ours}; say which: {how}"


def said(columns: Mapping[str, str]) -> str:
    """The columns for a message: question=Frage, answer=Antwort."""
    return ", ".join(f"{ours}={theirs}" for ours, theirs in columns.items())
