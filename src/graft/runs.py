"""The run folder: which files it has, and how they are written so that a crash at any byte loses nothing old.

runs/NAME/
    config.yaml         every effective setting
    environment.json    versions, device, git commit, data and template hashes
    metrics.jsonl       one object per logged step or validation
    rejects.jsonl       every row that was not trained on, with file, line, field and reason
    trace.jsonl         conversation ids and rows of every step (trace: true)
    data/               the validation and test parts that were held out, as chat-messages jsonl
    checkpoints/step-N/ complete or absent
    final/              a model or adapter folder that transformers and PEFT load as is
    report.html, loss.png
    .lock               held by the process that is at work there
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from graft.errors import InputError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def rejects(self) -> Path:
        return self.root / "rejects.jsonl"

    @property
    def trace(self) -> Path:
        return self.root / "trace.jsonl"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def held_out(self) -> Path | None:
        """What evaluation asks about: the test part, else the validation part; None where nothing was held out."""
        parts = (self.data / f"{part}.jsonl" for part in ("test", "val"))
        return next((path for path in parts if path.is_file()), None)

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def final(self) -> Path:
        return self.root / "final"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def exists(self) -> bool:
        """Whether this is a run folder: its settings are there."""
        return self.config.is_file()

    def begun(self) -> bool:
        """Whether a run has logged or saved something here."""
        return self.metrics.is_file() or any(self.checkpoints.glob("step-*"))

    def finished(self) -> bool:
        """Whether `final/` is there and every file of it has its size."""
        files = read_manifest(self.final) or {}
        there = [self.final / name for name in files]
        return bool(there) and all(
            path.is_file() and path.stat().st_size == size
            for path, (size, _) in zip(there, files.values(), strict=True)
        )

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged objects in order; a line torn by a crash is left out."""
        return list(read_jsonl(self.metrics)) if self.metrics.is_file() else []


WEIGHTS = ("*.safetensors", "*.bin")
_EDGE_BYTES = 1 << 20


def weights_fingerprint(folder: str) -> str:
    """Changes when the weights in a folder change: names, sizes and both ends of every weight file."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in WEIGHTS for p in Path(folder).glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE_BYTES))
            file.seek(max(0, size - _EDGE_BYTES))
            digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()[:16]


MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """Size and SHA-256 of every file that was written there, by name; None where that cannot be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: (int(wanted["bytes"]), str(wanted["sha256"])) for name, wanted in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_manifest(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """What `read_manifest` reads."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    write_atomic(folder / MANIFEST, json.dumps({"files": listed}, indent=1))


def newest_run(folder: Path, name: str | None = None) -> RunFolder | None:
    """The run under a folder to go on with: the latest one that is not finished, else the latest; None without any.

    With a name only those that `new_run_folder` would call so.
    """
    found = [RunFolder(path.parent) for path in folder.glob("*/config.yaml")]
    if name is not None:
        found = [run for run in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", run.root.name)]
    return max(found, key=lambda run: (not run.finished(), _last_written(run)), default=None)


def _last_written(run: RunFolder) -> int:
    return max(path.stat().st_mtime_ns for path in (run.config, run.metrics) if path.is_file())


@contextlib.contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Keep others out of a run folder; the system lets go of it when this process ends, however it ends.

    Raises:
        InputError: another process is in it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context((run.root / LOCK).open("a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise InputError(
                f"{run.root}: {who} is at work there; wait until it has ended, or choose another out=DIR"
            ) from None
        except OSError:  # a folder that cannot be written is refused elsewhere; a file system may know no locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


LOCK = ".lock"
BEFORE_A_RUN = {"data", "rejects.jsonl", LOCK}
"""What is written before a run begins, and left where it then does not."""


def new_run_folder(wanted: str | None, default_name: str) -> RunFolder:
    """The folder for a new run: `wanted` as it is, else runs/NAME, numbered when there is something already.

    What a start that failed has left in such a folder is cleared away.
    """
    if wanted is not None:
        return RunFolder(Path(wanted))
    name = run_name(default_name)
    number, folder = 1, Path("runs") / name
    while not _is_free(folder):
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    run = RunFolder(folder)
    shutil.rmtree(run.data, ignore_errors=True)
    run.rejects.unlink(missing_ok=True)
    return run


def _is_free(folder: Path) -> bool:
    """Whether a run can begin there: nothing is there, or what a start that failed has left, and nobody is at work."""
    if not folder.is_dir():
        return not folder.exists()
    if not {path.name for path in folder.iterdir()} <= BEFORE_A_RUN:
        return False
    try:
        with locked(RunFolder(folder)):
            return True
    except InputError:
        return False


def run_name(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"


def make_writable(folder: Path) -> None:
    """Create a folder and prove that files can be written there.

    Raises:
        InputError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}); choose another folder") from None


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write in binary, fsynced and renamed to `path` when the block ends, removed when it fails.

    Readers see the old content or the new, never a part; a crash at any byte leaves the old. A link stays a link: what
    it names is replaced. A device or pipe (`/dev/null`, `/dev/stdout`) is written into.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all (see `atomic_file`)."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder durable; does nothing where the system cannot open folders (Windows)."""
    with contextlib.suppress(PermissionError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one object as a line, in one write, so that a crash tears at most the last line.

    Raises:
        InputError: the disk is full or broken.
    """
    try:
        with path.open("ab") as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free some space, or mend the disk") from None


def drop_last_rows(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Cut off the lines after the last one that is wanted; a torn one at the end goes too.

    Looks from the end, so that it takes as long as what is dropped, however long the file is.
    """
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        tail = b""
        start = end
        while start > 0:
            size = min(_EDGE_BYTES, start)
            start -= size
            file.seek(start)
            tail = file.read(size) + tail
            lines = tail.splitlines(keepends=True)
            for line in reversed(lines[1:] if start else lines):  # the first one may begin before this piece
                if line.endswith(b"\n") and _wanted(line, wanted):
                    file.truncate(end)
                    return
                end -= len(line)
            tail = lines[0] if start else b""
        file.truncate(0)


def _wanted(line: bytes, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and wanted(row)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a jsonl file that graft wrote; what a crash or an editor tore is passed over."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and line.endswith(b"\n"):
                yield row
