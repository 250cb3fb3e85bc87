"""What is not believed of a model's folder: names that lead out of it, code of its own. Speaks paths and JSON only."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from graft.errors import InputError, first_line


def leads_out(name: str) -> bool:
    """Whether a relative name, of a file in some folder, is absolute or climbs out of it, on any system."""
    ways = (PurePosixPath(name), PureWindowsPath(name))
    return any(way.is_absolute() or way.drive or way.root or ".." in way.parts for way in ways)


def refuse_escapes(folder: Path) -> None:
    """Look at what a model or adapter folder's JSON files name, before a library follows it.

    Raises:
        InputError: an index of weights names a file outside, or an adapter names a module of Python to import.
    """
    for index in sorted(folder.glob("*.index.json")):
        files = _json(index).get("weight_map")
        for weight, file in files.items() if isinstance(files, dict) else ():
            if not isinstance(file, str) or leads_out(file):
                raise InputError(
                    f"{index}: says that {weight} is in {file!r}, outside of the folder; the folder was tampered with, "
                    "or put together by hand: copy the file there and correct the name"
                )
    adapter = folder / "adapter_config.json"
    # `auto_mapping` names modules too, but only PEFT's Auto classes follow it, and every adapter that PEFT saves
    # without a task type has one.
    if adapter.is_file() and _json(adapter).get("megatron_config"):
        raise InputError(
            f"{adapter}: megatron_config names Python modules to import, which graft does not do for an adapter; "
            "remove it"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({first_line(error)}); download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}; download it again")
    return value


def explained(error: BaseException, folder: str) -> str | None:
    """What to do where transformers refuses a model because it brings code; None for other errors."""
    if "trust_remote_code" not in str(error):
        return None
    files = sorted(path.name for path in Path(folder).glob("*.py"))
    named = f" ({', '.join(files[:4])}{' ...' if len(files) > 4 else ''})" if files else ""
    return (
        f"brings Python code of its own{named}, which is run only when asked for: read it, and if you trust it set "
        "trust_remote_code=true (--trust-remote-code)"
    )
