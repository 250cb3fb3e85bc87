"""Several processes of one run, started by forking: torch and transformers are not imported again for each."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(size: int, work: Callable[..., Any], *args: Any, seconds: float = 240) -> list[Any]:
    """What `work(rank, *args)` gives in each of several processes, or the text of the error that it ended with.

    Raises:
        TimeoutError: not all have ended in time; they are killed.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_be, args=(rank, size, port, answers, work, args), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=seconds) for _ in processes)
    except Exception as error:
        raise TimeoutError(f"{size} processes did not end within {seconds} s") from error
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(size)]


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
