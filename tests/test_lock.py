"""A run folder belongs to one process at a time, and what a start that failed leaves belongs to nobody."""

import subprocess
import sys
from contextlib import ExitStack

import pytest
from tiny import make_conversations, make_model_folder, write_rows

from graft.config.train import load_train
from graft.errors import InputError
from graft.runs import RunFolder, locked, new_run_folder, newest_run
from graft.train.open_run import open_run

HOLD = (
    "import sys; from graft.runs import *; from pathlib import Path\n"
    "with locked(RunFolder(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = make_model_folder(tmp_path / "m")
    write_rows(tmp_path / "d.jsonl", make_conversations())
    return load_train(None, [f"model={base}", "data=d.jsonl"])


def test_another_process_is_kept_out_until_the_first_one_ends(tmp_path, settings):
    folder = tmp_path / "runs" / "m-d"
    folder.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with ExitStack() as held, pytest.raises(InputError, match=rf"process {other.pid} on .* is at work there"):
            open_run(settings.model_copy(update={"out": str(folder)}), held)
        with ExitStack() as held:  # a folder by name is then another one
            assert open_run(settings, held)[1].root.name == "m-d-2"
    finally:
        other.kill()
        other.wait()
    with ExitStack() as held:
        assert open_run(settings, held)[1].root.name == "m-d"


def test_the_same_process_lets_go(tmp_path):
    run = RunFolder(tmp_path)
    for _ in range(2):
        with locked(run), pytest.raises(InputError), locked(run):
            pass


def test_what_a_failed_start_left_is_used_again_and_cleared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    left = tmp_path / "runs" / "m-d"
    (left / "data").mkdir(parents=True)
    (left / "data" / "val.jsonl").write_text("old")
    (left / "rejects.jsonl").write_text("old")
    assert new_run_folder(None, "m-d").root.name == "m-d"
    assert list(left.iterdir()) == [] or {path.name for path in left.iterdir()} == {".lock"}
    (left / "notes.txt").write_text("mine")
    assert new_run_folder(None, "m-d").root.name == "m-d-2"


def test_auto_finds_no_run_whose_name_only_begins_the_same(tmp_path):
    for name in ("m-d-big", "m-d2", "m-d-v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{}")
    assert newest_run(tmp_path, "m-d") is None
    for name in ("m-d", "m-d-7"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("{}")
    assert newest_run(tmp_path, "m-d").root.name in ("m-d", "m-d-7")
    assert newest_run(tmp_path) is not None
