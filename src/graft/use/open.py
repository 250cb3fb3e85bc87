"""From what the user names to the folder that holds a model. Speaks paths only: no torch, no weights are read.

A run folder, a model folder, an adapter folder and a Hugging Face id are all good names for a model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graft.config.train import Encode, Train, load_train
from graft.console import note
from graft.errors import InputError
from graft.runs import RunFolder, weights_fingerprint
from graft.tokens.load import TOKENIZER_FILES

Kind = Literal["model", "adapter", "hub"]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+|[\w-][\w.-]*")


@dataclass(frozen=True, slots=True)
class Target:
    """A model that was named, and where its parts lie."""

    named: str
    """As the user wrote it."""
    folder: str
    """The model or adapter folder, or a Hugging Face id."""
    base: str | None
    """The base model that an adapter sits on."""
    kind: Kind
    run: RunFolder | None
    """The run, where a run folder was named."""

    @property
    def tokenizer(self) -> str:
        """Where tokenizer and chat template lie: beside the weights, else (a bare adapter) with the base."""
        if self.kind == "adapter" and self.base is not None and not _any_file(Path(self.folder), TOKENIZER_FILES):
            return self.base
        return self.folder

    def run_settings(self) -> Train | None:
        """The settings of the run, where a run folder was named.

        Raises:
            ConfigError: its config.yaml is not one of this version's.
        """
        return load_train(self.run.config) if self.run is not None else None

    @property
    def quantize(self) -> str:
        """The format in which the base's weights were frozen when the run trained its adapter."""
        run = self.run or _run_around(Path(self.folder))
        return load_train(run.config).quantize if run is not None else "none"

    def encode_settings(self) -> Encode:
        """How the model's conversations become ids: as in its run; else from its own template, without a limit."""
        settings = self.run_settings()
        if settings is None:
            return Encode(max_length=1 << 20)
        return settings.encode.model_copy(update={"template": None})  # the folder holds the template itself

    def thinking(self) -> bool | None:
        """How the run's data set the template's thinking switch; None where it is not known or there is none."""
        if self.run is None or not self.run.environment.is_file():
            return None
        found = _read_json(self.run.environment).get("thinking")
        return found if isinstance(found, bool) else None

    def fingerprint(self) -> str:
        """Changes when the weights change: names, sizes and both ends of every weight file (bases apart)."""
        return weights_fingerprint(self.folder)


def resolve(path: str, base: str | None = None) -> Target:
    """Find the model that a path names; `base` replaces the base model that an adapter names.

    A run folder stands for its `final/`; while it goes on, for its best complete checkpoint, else the newest.

    Raises:
        InputError: there is nothing there, it holds no model, or an adapter's base is missing.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        if _HUB_ID.fullmatch(path) and path.count("/") == 1 and not path.startswith(("runs/", "./")):
            return Target(path, path, None, "hub", None)
        raise InputError(f"{path}: no such folder; name a run folder, a model folder or an adapter folder")
    if not folder.is_dir():
        raise InputError(f"{path}: a file, not a folder; name the folder that it lies in")
    run = RunFolder(folder)
    if run.exists():
        found = _folder_of_run(run)
        return _classify(path, found, base, run)
    return _classify(path, folder, base, None)


def _run_around(folder: Path) -> RunFolder | None:
    """The run whose `final/` or checkpoint a folder is."""
    for root in folder.resolve().parents[:2]:
        run = RunFolder(root)
        if run.exists() and folder.resolve() in (run.final, run.checkpoints / folder.name):
            return run
    return None


def _folder_of_run(run: RunFolder) -> Path:
    if run.final.is_dir():
        return run.final
    complete = {_step(path): path for path in run.checkpoints.glob("step-*") if (path / "manifest.json").is_file()}
    if not complete:
        raise InputError(
            f"{run.root}: the run has no final/ and no complete checkpoint yet; graft train --resume {run.root}"
        )
    newest = complete[max(complete)]
    best = _read_json(newest / "state.json").get("best_step") if (newest / "state.json").is_file() else None
    return complete.get(best, newest) if isinstance(best, int) else newest


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def _classify(named: str, folder: Path, base: str | None, run: RunFolder | None) -> Target:
    if (folder / "adapter_config.json").is_file():
        return Target(named, str(folder), base or _named_base(folder, said=run is None), "adapter", run)
    if (folder / "config.json").is_file():
        return Target(named, str(folder), None, "model", run)
    inside = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    listing = ", ".join(inside[:6]) + (f" and {len(inside) - 6} more" if len(inside) > 6 else "")
    raise InputError(
        f"{folder}: no model there (neither config.json nor adapter_config.json nor a run's config.yaml); "
        + (f"it holds {listing}" if inside else "the folder is empty")
    )


def _named_base(folder: Path, said: bool) -> str:
    """The base that an adapter names; a stranger's may name any folder or id, so it is said."""
    base = _base_of(folder)
    if said:
        note(f"{folder}: an adapter, which names {base} as the model that it sits on")
    return base


def _base_of(folder: Path) -> str:
    """The base that an adapter names, seen from here or from the adapter's folder."""
    named = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{folder}: adapter_config.json names no base model; give it with --base PATH")
    for candidate in (Path(named), folder / named):
        if candidate.is_dir():
            return str(candidate)
    if _HUB_ID.fullmatch(named) and named.count("/") <= 1:
        return named
    raise InputError(f"{folder}: its base model {named} is not there (any more); say where it is with --base PATH")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _any_file(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
