"""The whole way in one process in which no connection can be opened and no pickle is read; started by test_offline.py.

Arguments: a model folder, a file of data, a folder to work in. Prints one line per command.
"""

import io
import os
import pickle
import socket
import sys
from pathlib import Path

import torch

OPENED: list[str] = []
"""What was tried, with its place: a library might swallow the error."""


def _refuse(what: str):
    def refused(*args, **named):
        frames, frame = [], sys._getframe(1)
        while frame is not None and len(frames) < 12:
            frames.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            frame = frame.f_back
        OPENED.append(f"{what}: {' < '.join(frames)}")
        raise OSError(f"{what} is not allowed here")

    return refused


class NoSocket(socket.socket):
    def __init__(self, family=-1, *args, **named):
        if family not in (getattr(socket, "AF_UNIX", None),):
            _refuse("socket")()
        super().__init__(family, *args, **named)


def close_everything() -> None:
    socket.socket = NoSocket
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        setattr(socket, name, _refuse(f"socket.{name}"))
    pickle.load, pickle.loads = _refuse("pickle.load"), _refuse("pickle.loads")
    torch.load = _refuse("torch.load")


def way(model: str, data: str, work: Path) -> list[list[str]]:
    run = str(work / "run")
    train = ["max_steps=3", "epochs=1", "batch_size=4", "device=cpu"]
    parts = str(work / "parts")
    return [
        ["data", "import", data, "--out", str(work / "all.jsonl")],
        ["data", "clean", str(work / "all.jsonl"), "--out", str(work / "clean.jsonl")],
        ["data", "split", str(work / "all.jsonl"), "--out", parts, "--val", "0.1", "--test", "0.1"],
        ["data", "report", f"{parts}/train.jsonl", "--model", model, "--out", str(work / "report.html")],
        ["data", "inspect", "--model", model, "--data", data, "--html", str(work / "tokens.html")],
        ["plan", "--model", model, "--data", f"{parts}/train.jsonl", *train],
        ["train", "--model", model, "--data", f"{parts}/train.jsonl", "--val", f"{parts}/val.jsonl", "--test",
         f"{parts}/test.jsonl", "--out", run, *train],
        ["eval", run, "--out", str(work / "eval")],
        ["predict", run, "--data", f"{parts}/test.jsonl", "--out", str(work / "said.jsonl"), "--max-new-tokens", "4"],
        ["chat", run, "--max-new-tokens", "4"],
        ["plot", run],
        ["train", "--model", model, "--data", f"{parts}/train.jsonl", "--method", "full", "--out", str(work / "full"),
         *train],
        ["chat", str(work / "full"), "--max-new-tokens", "4"],
    ]  # fmt: skip


def main() -> None:
    model, data, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)  # not because the library was told to
    from graft.cli.main import main as graft

    close_everything()
    for words in way(model, data, work):
        sys.argv = ["graft", *words]
        sys.stdin = io.StringIO("What is 3 + 1?\n")
        code: object = 0
        try:
            graft()
        except SystemExit as leave:
            code = leave.code or 0
        print("ran", code, words[0], flush=True)
    for opened in OPENED:
        print("opened", opened, flush=True)


if __name__ == "__main__":
    main()
