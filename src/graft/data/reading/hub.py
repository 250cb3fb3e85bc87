"""Data sets of the Hugging Face hub, or local clones of them, through the `datasets` library, row by row.

Speaks of data set names, configurations, revisions, splits and rows. Knows no format.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.config.base import did_you_mean
from graft.data.reading.rows import Raw, make_row, reject_row
from graft.errors import InputError, first_line
from graft.types import Origin

PREFIX = "hf:"
_ADDRESS = re.compile(r"hf:(?P<name>[^:@#]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?")


@dataclass(frozen=True, slots=True)
class HubSet:
    """What `hf:owner/name:config@revision#split` names; the name may be a local folder."""

    address: str
    name: str
    config: str | None
    revision: str | None
    split: str | None
    """A split, or a part of one by row numbers: train, train[:1000], train[1000:2000]."""
    folder: str | None = None
    """Folder of the repository to which the data are limited."""


def parse_address(address: str) -> HubSet:
    """The parts of an `hf:` address.

    Raises:
        InputError: it is not written as one.
    """
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise InputError(f"{address}: is written hf:owner/name, with :config, @revision and #split as needed")
    return HubSet(address, found["name"], found["config"], found["revision"], found["split"])


def read_hub(wanted: HubSet) -> Iterator[Raw]:
    """The rows of one split, streamed: nothing is downloaded but what is read.

    Raises:
        InputError: `datasets` is not installed, the set cannot be reached, or a configuration or split must be named.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{wanted.address}: needs the datasets library; install it with: pip install 'graft-llm[hub]'"
        ) from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what comes of them is said below
    first, end = _slice(wanted)
    number = 0
    try:
        rows = datasets.load_dataset(
            wanted.name,
            wanted.config,
            data_dir=wanted.folder,
            split=_split(wanted, datasets),
            revision=wanted.revision,
            streaming=True,
        ).decode(False)  # pictures and sound stay bytes: they are refused, not looked at
        # `datasets` takes no `train[:1000]` where it streams.
        rows = rows.skip(first) if end is None else rows.skip(first).take(max(0, end - first))
        for number, value in enumerate(rows, first + 1):
            yield _row(wanted, number, value)
    except InputError:
        raise
    except Exception as error:  # the library, the hub's client and the file systems below raise kinds of their own
        after = f" after row {number}" if number else ""
        raise InputError(f"{wanted.address}: cannot be loaded{after} ({_reason(error)}){_advice(wanted)}") from None


def _row(wanted: HubSet, number: int, value: Any) -> Raw:
    origin = Origin(wanted.address, number)
    try:
        return make_row(origin, value)
    except (ValueError, OverflowError) as error:
        return reject_row(origin, "", f"a value cannot be read ({first_line(error)})")


_SLICE = re.compile(r"[^\[]*\[(\d*):(\d*)\]")


def _slice(wanted: HubSet) -> tuple[int, int | None]:
    """The first row and the end of `train[1000:2000]`; all rows where only a split is named.

    Raises:
        InputError: it is written otherwise; a share of a streamed set is not known before its end.
    """
    if "[" not in (wanted.split or ""):
        return 0, None
    found = _SLICE.fullmatch(wanted.split or "")
    if not found:
        raise InputError(f"{wanted.address}: a part of a split is named by row numbers, such as #train[:1000]")
    return int(found[1] or 0), int(found[2]) if found[2] else None


def _split(wanted: HubSet, datasets: Any) -> str:
    """The split that was named, or the only one."""
    found = datasets.get_dataset_split_names(
        wanted.name, wanted.config, revision=wanted.revision, data_dir=wanted.folder
    )
    names = [str(name) for name in found]
    bare = (wanted.split or "").partition("[")[0]  # `train[:1000]` is a part of train
    if wanted.split and bare in names:
        return bare
    if wanted.split:
        raise InputError(f"{wanted.address}: no split `{bare}`{did_you_mean(bare, names)}; it has {', '.join(names)}")
    if len(names) == 1:
        return names[0]
    raise InputError(
        f"{wanted.address}: has the splits {', '.join(names)}; name one, for example {wanted.address}#{names[0]}"
    )


def _reason(error: Exception) -> str:
    """What the library said, in a line; its list of configurations is part of it."""
    return re.sub(r"\s+", " ", str(error)).strip()[:400] or type(error).__name__


def _advice(wanted: HubSet) -> str:
    import os

    if Path(wanted.name).is_dir():
        return "; check the folder, or name a file in it"
    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        return "; HF_HUB_OFFLINE is set: name a local clone (hf:FOLDER) or file, or unset it"
    return "; check the name and the network, or name a local clone (hf:FOLDER) or file"
