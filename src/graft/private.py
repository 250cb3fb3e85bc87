"""Text without what is nobody else's business: passwords, keys of the environment, the user's name and home.

Speaks of text alone. Whatever graft says or writes about its surroundings goes through here.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN = "***"
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
"""`user:password` of `https://user:password@host`; the password alone may be a token."""
_IN_QUERY = re.compile(r"(?i)(?<=[?&])((?:[\w-]*[_-])?(?:key|token|secret|password|signature|sig)=)[^&\s'\"#]+")
_SECRET_NAME = re.compile(r"(?i)(^|_)(key|token|secret|credential)s?($|_)|api_?key|passw(or)?d")
_LEAST_SECRET = 8
"""Shorter values of such variables are dummies (`EMPTY`), and might well be words of another text."""


def hide_secrets(text: str) -> str:
    """The text without passwords and tokens in addresses, and without the values of the environment's secrets."""
    if "://" in text or "?" in text or "&" in text:
        text = _IN_QUERY.sub(lambda match: match[1] + HIDDEN, _IN_ADDRESS.sub(HIDDEN, text))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return text


def _secrets() -> list[str]:
    """Values of variables that are called keys, tokens, passwords; longer ones first, which may hold shorter ones."""
    found = {value.strip() for name, value in os.environ.items() if is_secret_name(name)}
    return sorted((value for value in found if len(value) >= _LEAST_SECRET), key=len, reverse=True)


def is_secret_name(name: str) -> bool:
    """Whether an environment variable of that name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def hide_user(text: str) -> str:
    """The text without secrets, with the home folder as `~` and the user's name as `USER` where it is in a path."""
    text = hide_secrets(text)
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(rf"(?<![\w/.-]){re.escape(home)}(?=[/\\\s'\":,;)]|$)", "~", text)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return text
    return re.sub(rf"(?<=[/\\_]){re.escape(user)}(?=[/\\\s'\":,;)]|$)", "USER", text)


def secret_in(values: Mapping[str, Any] | Sequence[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Key paths of texts, in nested mappings and lists, that hold a secret (a key of a mapping is none)."""
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    for key, value in pairs:
        inner = (*path, str(key))
        if isinstance(value, str):
            if hide_secrets(value) != value:
                yield inner
        elif isinstance(value, Mapping | list | tuple):
            yield from secret_in(value, inner)
