"""Several processes of one run, started by forking: torch and transformers are not imported again for each."""

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(size: int, work: Callable[..., Any], *args: Any, seconds: float = 240) -> list[Any]:
    """What `work(rank, *args)` gives in each of several processes, or the text of the error or exit that ended it.

    Those that have not ended in time are killed, and their text says so.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_be, args=(rank, size, port, answers, work, args), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    try:
        while len(found) < size:
            try:
                rank, answer = answers.get(timeout=0.2)
                found[rank] = answer
                continue
            except queue.Empty:
                pass
            for rank, process in enumerate(processes):  # one that left without an answer
                if rank not in found and process.exitcode is not None and answers.empty():
                    found[rank] = f"exit code {process.exitcode}"
            if time.monotonic() > deadline:
                break
    finally:
        for process in processes:
            process.join(0.1 if process.exitcode is None and len(found) < size else 10)
            process.kill()
    return [found.get(rank, f"did not end within {seconds} s") for rank in range(size)]


def _be(rank: int, size: int, port: int, answers: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        answer = work(rank, *args)
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}" if str(error) else traceback.format_exc()
    answers.put((rank, answer))
    answers.close()
    answers.join_thread()
    os._exit(0)
