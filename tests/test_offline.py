"""A local model and local data need no network: the whole way runs where no connection can be opened.

Nothing on that way is read by pickle either. A process of its own, so that imports count too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from offline_child import way
from tiny import make_conversations, make_model_folder, write_rows

CHILD = Path(__file__).with_name("offline_child.py")
WITHOUT_NETWORK = ["unshare", "--map-root-user", "--net"]


def _can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_the_whole_way_opens_no_connection_and_reads_no_pickle(tmp_path):
    model = make_model_folder(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", make_conversations(60))
    # A kernel without any network beneath, where the system lets us: no patch can be passed by.
    before = WITHOUT_NETWORK if _can_unshare() else []
    environment = {key: value for key, value in os.environ.items() if not key.endswith("OFFLINE")}
    done = subprocess.run(
        [*before, sys.executable, str(CHILD), str(model), data, str(tmp_path / "work")],
        env=environment | {"HOME": str(tmp_path), "COLUMNS": "200"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    ran = [line for line in lines if line.startswith("ran ")]
    assert ran == [f"ran 0 {words[0]}" for words in way("", "", Path())], done.stderr[-3000:]
    assert [line for line in lines if line.startswith("opened ")] == []


def test_the_child_notices_connections_and_pickles():
    script = (
        "import offline_child, pickle, socket, torch\noffline_child.close_everything()\n"
        "for what in (lambda: socket.create_connection(('localhost', 9)), lambda: socket.socket(socket.AF_INET), "
        "lambda: pickle.loads(b''), lambda: torch.load('x')):\n"
        "    try: what()\n    except OSError: pass\n"
        "print(len(offline_child.OPENED))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=CHILD.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4"
