"""The view of examples: every token once, whole characters, the right colours, and the JSON of the design."""

import json
from io import StringIO

from rich.console import Console
from test_encode import ROOMY, byte_tokenizer, renderer, talk
from typer import Typer
from typer.testing import CliRunner

from graft.cli.data.inspect import inspect
from graft.config.train import Encode
from graft.tokens import show
from graft.tokens.encode import encode

CHAT = talk("u:你好 🎉", "a:好的👍🏽\n", name="zh")


def test_pieces_are_whole_characters_and_cover_every_token():
    r = renderer()
    (example,) = encode(CHAT, r, ROOMY)
    found = show.pieces(example, r)
    assert [piece.start for piece in found] == [0, *(piece.stop for piece in found[:-1])]
    assert found[-1].stop == len(example.ids)
    assert "".join(piece.text for piece in found) == r.decode(example.ids.tolist())
    assert not any("\ufffd" in piece.text for piece in found)
    assert any(piece.stop - piece.start == 4 and piece.text == "👍" for piece in found), "four bytes, one character"
    kinds = [(piece.kind, piece.text) for piece in found]
    assert kinds[-1] == ("stop", "<|im_end|>")
    assert "".join(text for kind, text in kinds if kind == "target") == "好的👍🏽\n"


def test_every_kind_has_its_style():
    r = renderer()
    (example,) = encode(CHAT, r, Encode(train_on="everything"))
    assert {piece.kind for piece in show.pieces(example, r)} == {"context", "target", "stop"}
    assert set(show.STYLES) >= {"context", "target", "stop", "weighted"}


def test_the_drawing_says_how_many_and_why():
    r = renderer()
    page = StringIO()
    console = Console(file=page, width=200, force_terminal=True, color_system="standard")
    (example,) = result = encode(CHAT, r, ROOMY)
    console.print(show.legend(), show.draw(CHAT, result, r), show.draw(CHAT, encode(talk("u:x"), r, ROOMY), r))
    text = page.getvalue()
    assert f"{len(example.ids)} tokens, {example.prompt_len} prompt" in text
    assert "the chat template's own text" in text
    assert "made.jsonl:7" in text
    assert "rejected: messages: no assistant turn" in text
    assert "\x1b[1;4;35m<|im_end|>" in text, "the stop is bold, underlined, magenta"
    assert "\x1b[32m" in text


def test_blanks_can_be_seen():
    assert show.visible("a  ") == "a··"
    assert show.visible("a\n\tb") == "a↵\n⇥b"
    assert show.visible(" ") == "·"
    assert show.visible(" a") == " a"


def test_the_command_prints_one_object_per_conversation(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = renderer().template
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"id": "a", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]},
        {"id": "b", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "y" * 99}]},
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    app = Typer()
    app.command()(inspect)
    given = ["--model", str(tmp_path / "model"), "--data", str(data)]
    ran = CliRunner().invoke(app, [*given, "--json", "-", "max_length=80"])
    assert ran.exit_code == 0, ran.output
    good, bad = (json.loads(line) for line in ran.stdout.splitlines())
    r = renderer()
    (example,) = encode(talk("u:Hi", "a:Yes."), r, ROOMY)
    assert good["id"] == "a"
    assert good["rejected"] is None
    assert good["examples"][0]["ids"] == example.ids.tolist()
    assert good["examples"][0]["weights"] == example.weights.tolist()
    assert good["examples"][0]["prompt_len"] == example.prompt_len
    assert good["examples"][0]["text"] == r.decode(example.ids.tolist())
    assert bad["examples"] == []
    assert "> encode.max_length 80" in bad["rejected"]
    ran = CliRunner().invoke(app, [*given, "--json", str(tmp_path / "out.jsonl"), "--limit", "1"])
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["a"]
    ran = CliRunner().invoke(app, [*given, "train_on=last_turn"])
    assert ran.exit_code == 0, ran.output
