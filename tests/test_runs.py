"""Files are written whole or not at all, and nothing but a file is ever replaced."""

import os
import threading

import pytest

from graft.runs import write_atomic


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to(target)
    write_atomic(link, "first")
    write_atomic(link, "second")
    assert link.is_symlink()
    assert target.read_text() == "second"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_written_into_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_atomic(pipe, "all of it")
    reader.join(10)
    assert found == [b"all of it"]
    assert pipe.is_fifo()
