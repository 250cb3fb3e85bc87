"""Every command of the README runs, as it stands there, in an empty folder with a model and data of those names."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from tiny import make_conversations, make_model_folder, write_rows

from graft.cli.main import main

ROOT = Path(__file__).resolve().parents[1]


def commands(readme: Path) -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("graft ")]


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_commands_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model_folder(tmp_path / "my-model")
    write_rows(tmp_path / "my-data.jsonl", make_conversations(60))
    found = commands(ROOT / name)
    assert [command.split()[1] for command in found] == [
        "train",
        "eval",
        "chat",
        "data",
        "data",
        "data",
        "train",
        "predict",
        "plot",
        "plan",
        "data",
    ]
    for command in found:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr()
        assert not left.value.code, f"{command}\n{said.err}"
        assert "Traceback" not in said.err
    assert (tmp_path / "predictions.jsonl").is_file()
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_two_readmes_have_the_same_commands_and_their_links_lead_somewhere():
    texts = [ROOT / "README.md", ROOT / "README_zh.md"]
    assert commands(texts[0]) == commands(texts[1])
    for text in texts:
        for link in re.findall(r"\]\(([^)#]+)\)", text.read_text(encoding="utf-8")):
            assert (ROOT / link).exists(), f"{text.name}: {link}"
