"""LLaMA-Factory's dataset_info.json as a source: what an entry says is how its data are read."""

import json
from pathlib import Path

import pytest

from graft.config.data import Source
from graft.data.load import load_sources
from graft.data.reading import hub
from graft.data.reading.rows import Raw
from graft.errors import InputError
from graft.types import Conversation, Origin

PEOPLE = {"role_tag": "who", "content_tag": "says", "user_tag": "A", "assistant_tag": "B", "system_tag": "S"}


def catalogue(folder: Path, **entries: dict) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries))
    return path


def rows(folder: Path, name: str, *values: dict) -> str:
    (folder / name).write_text(json.dumps(values))
    return name


def load(address: object) -> list[Conversation]:
    loaded = load_sources([Source(path=str(address))])
    assert not loaded.rejects, loaded.rejects[0]
    return loaded.conversations


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def test_alpaca_reads_the_columns_that_are_named_and_no_others(tmp_path):
    row = {
        "q": "ask",
        "input": "not this",
        "a": "answer",
        "sys": "Be brief.",
        "past": [["x", "y"]],
        "system": "nor this",
    }
    columns = {"prompt": "q", "response": "a", "system": "sys", "history": "past"}
    path = catalogue(tmp_path, mine={"file_name": rows(tmp_path, "a.json", row), "columns": columns})
    expected = [("system", "Be brief."), ("user", "x"), ("assistant", "y"), ("user", "ask"), ("assistant", "answer")]
    for address in (f"{path}#mine", f"{tmp_path}#mine"):
        (conversation,) = load(address)
        assert said(conversation) == expected
        assert conversation.meta == {"other_input": "not this", "other_system": "nor this"}


def test_without_columns_they_are_those_of_alpaca(tmp_path):
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "not named, not read"}
    path = catalogue(tmp_path, mine={"file_name": rows(tmp_path, "a.json", row)})
    assert said(load(f"{path}#mine")[0]) == [("user", "Add.\n1, 2"), ("assistant", "3")]


def test_a_prompt_alone_is_text_to_be_learnt_by_heart(tmp_path):
    path = catalogue(
        tmp_path, c4={"file_name": rows(tmp_path, "a.json", {"body": "Once."}), "columns": {"prompt": "body"}}
    )
    assert load(f"{path}#c4")[0].text == "Once."


def test_tags_say_what_keys_and_roles_are_called(tmp_path):
    turns = [{"who": "S", "says": "Hush."}, {"who": "A", "says": "hi"}, {"who": "B", "says": "ho"}]
    name = rows(tmp_path, "a.json", {"talk": turns, "sys": "loses to the turn"})
    entry = {
        "file_name": name,
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "system": "sys"},
        "tags": PEOPLE,
    }
    path = catalogue(tmp_path, mine=entry, turned=entry | {"tags": PEOPLE | {"user_tag": "B", "assistant_tag": "A"}})
    assert said(load(f"{path}#mine")[0]) == [("system", "Hush."), ("user", "hi"), ("assistant", "ho")]
    assert said(load(f"{path}#turned")[0]) == [("system", "Hush."), ("assistant", "hi"), ("user", "ho")]


def test_a_key_that_the_tags_promise_is_named_by_its_own_name(tmp_path):
    good, bad = [{"who": "A", "says": "hi"}, {"who": "B", "says": "ho"}], [{"who": "A"}, {"who": "B", "says": "ho"}]
    name = rows(tmp_path, "a.json", {"conversations": good}, {"conversations": bad})
    path = catalogue(tmp_path, mine={"file_name": name, "formatting": "sharegpt", "tags": PEOPLE})
    loaded = load_sources([Source(path=f"{path}#mine")])
    assert (len(loaded.conversations), loaded.read) == (1, 2)
    (reject,) = loaded.rejects
    assert (reject.file, reject.line) == (str(tmp_path / "a.json"), 2)
    assert (reject.field, reject.reason) == ("conversations[0].says", "is missing")


def test_openai_and_tool_calls(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "It is done."},
    ]
    path = catalogue(
        tmp_path, mine={"file_name": rows(tmp_path, "a.json", {"messages": turns}), "formatting": "openai"}
    )
    (conversation,) = load(f"{path}#mine")
    assert [role for role, _ in said(conversation)] == ["user", "assistant", "tool", "assistant"]
    assert conversation.messages[1].tool_calls[0]["function"]["name"] == "f"


@pytest.mark.parametrize("formatting", ["alpaca", "sharegpt"])
def test_ranking_takes_the_chosen_answer(tmp_path, formatting):
    if formatting == "alpaca":
        row = {"ask": "1+2?", "good": "3", "bad": "4"}
        columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    else:
        row = {"c": [{"who": "A", "says": "1+2?"}], "good": {"who": "B", "says": "3"}, "bad": {"who": "B", "says": "4"}}
        columns = {"messages": "c", "chosen": "good", "rejected": "bad"}
    entry = {"file_name": rows(tmp_path, "a.json", row), "formatting": formatting, "ranking": True, "columns": columns}
    path = catalogue(tmp_path, mine=entry | ({"tags": PEOPLE} if formatting == "sharegpt" else {}))
    assert said(load(f"{path}#mine")[0]) == [("user", "1+2?"), ("assistant", "3")]


def test_what_kto_does_not_want_is_rejected(tmp_path):
    turn = {"instruction": "q", "output": "a"}
    name = rows(tmp_path, "a.json", turn | {"liked": True}, turn | {"liked": False})
    columns = {"prompt": "instruction", "response": "output", "kto_tag": "liked"}
    path = catalogue(tmp_path, mine={"file_name": name, "columns": columns})
    loaded = load_sources([Source(path=f"{path}#mine")])
    assert len(loaded.conversations) == 1
    assert [(reject.line, reject.field) for reject in loaded.rejects] == [(2, "liked")]


def test_num_samples_draws_the_same_rows_each_time_and_never_more_than_there_are(tmp_path):
    name = rows(tmp_path, "a.json", *({"instruction": f"q{n}", "output": "a"} for n in range(50)))
    path = catalogue(tmp_path, few={"file_name": name, "num_samples": 5}, many={"file_name": name, "num_samples": 500})
    few = [said(item)[0][1] for item in load(f"{path}#few")]
    assert len(few) == 5
    assert few == [said(item)[0][1] for item in load(f"{path}#few")]
    assert few != [f"q{n}" for n in range(5)], "drawn from all, not the first"
    assert len(load(f"{path}#many")) == 50


def test_a_folder_with_a_split(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "set").mkdir(exist_ok=True)
        rows(tmp_path / "set", f"{part}.json", {"instruction": part, "output": "a"})
    path = catalogue(tmp_path, mine={"file_name": "set", "split": "test"})
    assert [said(item)[0][1] for item in load(f"{path}#mine")] == ["test"]


def test_an_entry_of_the_hub_is_asked_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def read_hub(wanted: hub.HubSet):
        asked.append(wanted)
        yield Raw(Origin(wanted.address, 1), {"instruction": "q", "output": "a"})

    monkeypatch.setattr(hub, "read_hub", read_hub)
    entry = {"hf_hub_url": "owner/name", "ms_hub_url": "x/y", "subset": "en", "split": "validation", "folder": "v2"}
    path = catalogue(tmp_path, mine=entry | {"revision": "main"})
    assert said(load(f"{path}#mine")[0]) == [("user", "q"), ("assistant", "a")]
    assert asked == [hub.HubSet("hf:owner/name", "owner/name", "en", "main", "validation", "v2")]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"script_url": "load.py"}, "come from a script .script_url: load.py., and graft runs no code"),
        ({"ms_hub_url": "a/b"}, "is only at ms_hub_url: a/b; download it"),
        ({"file_name": "none.json"}, "its file .*none.json is not there"),
        ({"file_name": "a.json", "columns": {"images": "pic"}}, "names images .column `pic`., and only text"),
        ({"file_name": "a.json", "columns": {"promt": "x"}}, "columns has no `promt`; did you mean `prompt`"),
        ({"file_name": "a.json", "tags": {"role": "x"}}, "tags has no `role`"),
        ({"file_name": "a.json", "formatting": "vicuna"}, "formatting `vicuna` is none of alpaca, sharegpt, openai"),
        ({"file_name": "a.json", "num_samples": "5"}, "num_samples is text"),
        ({"file_name": ["a.json"]}, "file_name is a list, not text"),
        ({"file_name": "a.json", "columns": {"prompt": "nope", "response": "output"}}, "no such column"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_key(tmp_path, entry, message):
    rows(tmp_path, "a.json", {"instruction": "q", "output": "a"})
    path = catalogue(tmp_path, mine=entry)
    with pytest.raises(InputError, match=message):
        load(f"{path}#mine")


def test_names_are_looked_up(tmp_path):
    rows(tmp_path, "a.json", {"instruction": "q", "output": "a"})
    path = catalogue(tmp_path, identity={"file_name": "a.json"}, other={"file_name": "a.json"})
    with pytest.raises(InputError, match="has no data set `idenity`; did you mean `identity`"):
        load(f"{path}#idenity")
    with pytest.raises(InputError, match=r"is a catalogue of data sets; name one: .*dataset_info.json#identity"):
        load(path)
    with pytest.raises(InputError, match="has no data set `identiy`"):
        load(f"{tmp_path}#identiy")
    path.write_text('{"builder_name": "csv", "features": {}}')
    with pytest.raises(InputError, match="is no catalogue of data sets"):
        load(f"{path}#identity")
    assert len(load(tmp_path)) == 1, "as before: a folder of files"


def test_keys_that_mean_nothing_are_said(tmp_path):
    rows(tmp_path, "a.json", {"instruction": "q", "output": "a"})
    path = catalogue(tmp_path, mine={"file_name": "a.json", "num_sample": 5})
    notes = load_sources([Source(path=f"{path}#mine")]).decisions
    assert any("num_sample; did you mean `num_samples`" in note for note in notes)
