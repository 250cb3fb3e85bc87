"""Several processes give what one gives, in its order; errors surface as themselves and no process is left."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from graft.data.parallel import AHEAD, map_batches, usable_workers
from graft.errors import GraftError, InputError


def total(numbers: list[int]) -> tuple[int, int, int]:
    return sum(numbers), len(numbers), os.getpid()


def slow_at_first(numbers: list[int]) -> int:
    time.sleep(0.3 if 0 in numbers else 0)
    return numbers[0]


def refuse_seven(numbers: list[int]) -> int:
    if 7 in numbers:
        raise InputError("seven")
    return sum(numbers)


def die(numbers: list[int]) -> int:
    os._exit(3)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_results_of_one(workers):
    results = list(map_batches(total, range(1000), workers, batch=64))
    assert [(result[0], result[1]) for result in results] == [
        (sum(range(start, min(start + 64, 1000))), min(64, 1000 - start)) for start in range(0, 1000, 64)
    ]
    assert (os.getpid() in {result[2] for result in results}) == (workers == 1)
    assert multiprocessing.active_children() == []


def test_order_is_kept_when_the_first_is_the_slowest():
    assert list(map_batches(slow_at_first, range(40), 2, batch=4)) == list(range(0, 40, 4))


@pytest.mark.parametrize("items", [[], [1, 2, 3]])
def test_no_process_is_started_for_a_single_batch(items):
    assert [result[1:] for result in map_batches(total, items, 2)] == ([(len(items), os.getpid())] if items else [])


def test_items_are_read_only_a_little_ahead():
    taken = count()
    results = map_batches(refuse_seven, (1000 + next(taken) for _ in range(10**9)), 2, batch=10)
    next(results)
    results.close()
    assert 10 <= next(taken) <= 10 * (2 * AHEAD + 1)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_is_raised_as_itself_when_its_batch_comes(workers):
    results = map_batches(refuse_seven, range(20), workers, batch=2)
    assert [next(results) for _ in range(3)] == [1, 5, 9]
    with pytest.raises(InputError, match="^seven$"):
        next(results)
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_said_with_the_next_step():
    with pytest.raises(GraftError, match="--workers 1"):
        list(map_batches(die, range(1000), 2))


def masked(numbers: list[int]) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_ctrl_c_cannot_reach_a_worker_that_still_imports():
    assert set(map_batches(masked, range(1000), 2)) == {True}
    assert not masked([])


def test_usable_workers_is_a_number_of_processors():
    assert 1 <= usable_workers() <= (os.cpu_count() or 1)


LONG = """
import os, signal, sys, time
from graft.data.parallel import map_batches

def wait(items):
    print(os.getpid(), flush=True)
    time.sleep(0.05 if {patient} else 600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is begun with it ignored
    try:
        for _ in map_batches(wait, range(100_000), 2, batch=1):
            pass
    except KeyboardInterrupt:
        sys.exit(5)
"""


def _alive(pid: int) -> bool:
    try:
        with Path(f"/proc/{pid}/stat").open() as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="NOT TESTED: looks into /proc")
@pytest.mark.parametrize(("sent", "patient"), [(signal.SIGINT, True), (signal.SIGKILL, False)])
def test_ctrl_c_and_a_killed_parent_leave_no_process(tmp_path, sent, patient):
    script = tmp_path / "long.py"
    script.write_text(LONG.format(patient=patient))
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    workers: set[int] = set()
    assert parent.stdout
    for line in parent.stdout:
        workers.add(int(line))
        if len(workers) == 2:
            break
    if sent == signal.SIGINT:
        os.killpg(parent.pid, sent)  # as a terminal does: to every process
    else:
        parent.send_signal(sent)
    assert parent.wait(30) == (5 if sent == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, workers))
