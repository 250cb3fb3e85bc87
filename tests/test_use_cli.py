"""The commands around a model, as typed: results on stdout, notes on stderr, nothing heavy for --help."""

import json
import subprocess
import sys

import pytest
import typer
from tiny import make_conversations, make_model_folder, write_rows
from typer.testing import CliRunner

from graft.cli.chat import chat
from graft.cli.evaluate import evaluate
from graft.cli.plot import plot
from graft.cli.predict import predict

app = typer.Typer()
for _name, _command in {"eval": evaluate, "predict": predict, "chat": chat, "plot": plot}.items():
    app.command(_name)(_command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_model_folder(tmp_path_factory.mktemp("model")))


def _run(*words, typed=None):
    result = CliRunner().invoke(app, list(words), input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("name", ["eval", "predict", "chat", "plot"])
def test_help_has_an_example(name):
    said = _run(name, "--help").stdout
    assert f"graft {name} runs/" in said


def test_registering_the_commands_loads_nothing_heavy():
    check = "assert not {'torch', 'transformers', 'matplotlib', 'peft', 'pydantic'} & set(sys.modules)"
    for name in ("evaluate", "predict", "chat", "plot"):
        subprocess.run([sys.executable, "-c", f"import sys, graft.cli.{name}; {check}"], check=True)


def test_eval_prints_one_json_object(folder, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", make_conversations(6))
    said = _run("eval", folder, "--data", data, "--json", "--out", str(tmp_path / "out"))
    value = json.loads(said.stdout)
    assert value["questions"] == 6
    assert [column["name"] for column in value["columns"]] == ["model"]
    assert value == json.loads((tmp_path / "out" / "eval.json").read_text())


def test_eval_prints_a_table(folder, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", make_conversations(6))
    said = _run("eval", folder, "--data", data).stdout
    assert "exact match" in said
    assert "token accuracy (teacher-forced)" in said


def test_predict_answers_rows_with_and_without_answers(folder, tmp_path):
    rows = make_conversations(4)
    rows[1]["messages"] = rows[1]["messages"][:1]
    data = write_rows(tmp_path / "data.jsonl", rows)
    out = tmp_path / "predictions.jsonl"
    said = _run("predict", folder, "--data", data, "--out", str(out), "--max-new-tokens", "5", "--json")
    assert sum(json.loads(said.stdout)[key] for key in ("stop", "length")) == 4
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["target"] is None for row in found] == [False, True, False, False]


def test_chat_answers_the_lines_of_stdin(folder):
    said = _run("chat", folder, "--max-new-tokens", "4", typed="one\n/undo\ntwo\n")
    assert said.stdout.count("\n") >= 2


def test_plot_writes_into_the_run_folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0, "lr": 0.1}\n')
    _run("plot", str(tmp_path))
    assert (tmp_path / "loss.png").is_file()
