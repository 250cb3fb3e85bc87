"""The pipeline over files: nothing lost, the same bytes for any number of workers, and the command that runs it."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from graft.cli.data.app import app
from graft.config.base import load as load_settings
from graft.config.clean import DEFAULT_STEPS, STEPS, Clean
from graft.config.data import Source
from graft.data.clean.duplicates import equality_key
from graft.data.clean.pipeline import CHECK, Report, check_settings, clean, clean_batch
from graft.data.clean.report import Dropped
from graft.data.clean.spool import Spool
from graft.data.load import load_sources, stream_sources
from graft.data.tally import Tally
from graft.errors import ConfigError, DataRefused, GraftError, InputError
from graft.types import ROLES, Conversation, Message, Origin

ROOT = Path(__file__).resolve().parents[1]


def share(*turns: str) -> dict:
    """A ShareGPT row; the letter before the colon says who speaks."""
    return {"conversations": [{"from": {"u": "human", "a": "gpt"}[turn[0]], "value": turn[2:]} for turn in turns]}


EXPORT = (
    '<div class="markdown prose"><p>Hello <b>{}</b></p><pre><code class="hljs language-c">x &lt; {};</code></pre></div>'
)
KINDS = [
    lambda n: share(f"u:What is {n}?", f"a:It is the number {n}."),
    lambda n: share("u:Hi", f"u:I am {n}", f"a:{EXPORT.format(n, n)}", "u:bye"),
    lambda n: share("a:Welcome", f"u:Say {n}", f"a:{n} cafÃ©"),
    lambda n: share(f"u:Feel {n}?", f"a:As an AI language model, I don't feel {n}."),
    lambda n: share(f"u:One {n}", f"a:two {n}", "u:three", "a:"),
    lambda n: share(f"u:Loop {n}", "a:" + "the cat sat on the mat " * 30),
    lambda n: share(f"u:Mail {n}", f"a:Write to me{n}@corp.com or me{n}@corp.com."),
    lambda n: share("u:Same", "a:The very same words."),
    lambda n: share(f"u:你好 {n}", f"a:{n} 很高兴认识你，我们开始吧。"),
    lambda n: share("u:no answer"),
]


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    path = tmp_path / "messy.jsonl"
    rng = random.Random(1)
    lines = [json.dumps(KINDS[n % len(KINDS)](rng.randrange(10**6)), ensure_ascii=False) for n in range(600)]
    lines[17] = "broken"
    lines[300] = '{"conversations": 3}'
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: object) -> str:
    """Stdout of a command; errors of graft propagate to the main entry, which prints them."""
    result = CliRunner().invoke(app, ["clean", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def clean_all(rows, folder, *overrides, **given):
    steps, report = load_settings(Clean, None, overrides), Report()
    items = list(clean(rows, steps, report, folder, **given))
    kept = [item for item in items if isinstance(item, Conversation)]
    gone = [item for item in items if isinstance(item, Dropped)]
    assert len(kept) == report.kept
    assert len(gone) == report.rejected
    assert report.kept + report.rejected == report.read + report.added
    for before, after in zip(report.steps, report.steps[1:], strict=False):
        assert before.left == after.entered
    return kept, gone, report


def stream(path: Path):
    return stream_sources([Source(path=str(path), format="auto", weight=1.0)], Tally(), check=False)


def test_every_row_is_kept_or_dropped_with_its_place(messy, tmp_path):
    kept, gone, report = clean_all(stream(messy), tmp_path)
    assert report.read == 600
    assert report.added == 0
    assert report.unread == 2
    lines = sorted([item.origin.line for item in kept] + [item.line for item in gone])
    assert lines == list(range(1, 601))
    by_step = {step.step: step for step in report.steps}
    assert list(by_step) == [*DEFAULT_STEPS[:-1], CHECK, "exact"]
    assert by_step["refusal"].dropped == 60
    assert by_step["repetition"].dropped == 60
    assert by_step["repair"].dropped == 60
    assert by_step["exact"].dropped == 58  # of 60 that say the same, one is broken and one stays
    assert by_step["html"].changed >= 59
    assert by_step["personal"].notes["email"] == 120
    assert all(len(step.changes) <= 3 and len(step.drops) <= 3 for step in report.steps)
    assert {item.step for item in gone} == {"read", "repair", "refusal", "repetition", "exact"}
    assert all(item.reason and item.file == str(messy) for item in gone)
    said = {message.content for item in kept for message in item.messages}
    assert not any("<p>" in text or "Ã" in text for text in said)
    assert any(text.startswith("Hi\n\nI am ") for text in said)


def test_examples_show_before_and_after_but_no_personal_data(messy, tmp_path):
    _, _, report = clean_all(stream(messy), tmp_path, "personal.action=mask", "examples=2")
    steps = {step.step: step.as_json() for step in report.steps}
    assert len(steps["html"]["changes"]) == 2
    change = steps["html"]["changes"][0]
    assert change["file"] == str(messy)
    assert change["line"] == 2
    assert change["field"] == "messages[2]"
    assert "<div" in change["before"]
    assert "Hello **" in change["after"]
    assert steps["repair"]["changes"][0]["before"] == "user user assistant user"
    assert steps["repair"]["changes"][0]["after"] == "user assistant"
    assert set(steps["personal"]["changes"][0]) == {"file", "line", "field", "after"}
    assert "corp.com" not in json.dumps(steps["personal"])
    assert steps["refusal"]["drops"][0]["text"].startswith("As an AI")


def test_the_same_bytes_for_one_and_four_workers(messy, tmp_path):
    made = []
    for workers in (1, 4):
        out = tmp_path / str(workers) / "out.jsonl"
        run(messy, "--out", out, "--workers", workers, "near.threshold=0.7", "personal.action=mask", "language.skip=ja")
        report = (out.parent / "out.report.json").read_text().replace(str(out.parent), "FOLDER")
        made.append((out.read_bytes(), (out.parent / "out.rejects.jsonl").read_bytes(), report))
    assert made[0] == made[1]
    assert len(made[0][0].splitlines()) > 100
    assert len(made[0][1].splitlines()) > 100


def test_what_was_cleaned_is_read_back_whole_and_stays_as_it_is(messy, tmp_path):
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    run(messy, "--out", once)
    loaded = load_sources([Source(path=str(once), format="auto", weight=1.0)])
    assert loaded.rejects == []
    assert len(loaded.conversations) == len(once.read_text().splitlines()) > 200
    result = json.loads(run(once, "--out", twice, "--json"))
    assert twice.read_bytes() == once.read_bytes()
    assert result["rejected"] == 0
    assert not any(step["changed"] for step in result["steps"])


def test_exact_and_near_name_the_first(tmp_path):
    words = "a long sentence about the weather in the north of the country on a cold day in spring"
    rows = [
        share("u:Tell me", f"a:{words} and more."),
        share("u:tell  me!", f"a:{words.upper()} and more"),
        share("u:Tell me", f"a:{words} and some more of it."),
        share("u:Other", "a:Something else is said here, of which nothing was said before."),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, gone, _ = clean_all(stream(path), tmp_path, "near.threshold=0.6")
    assert [item.origin.line for item in kept] == [1, 4]
    assert [(item.line, item.step) for item in gone] == [(2, "exact"), (3, "near")]
    assert gone[0].reason == f"equal to {path}:1"
    assert gone[1].reason.startswith(f"nearly equal to {path}:1")


def test_duplicates_only_without_any_other_step(messy, tmp_path):
    report = Report()
    items = list(clean(stream(messy), Clean.model_validate({"steps": ["exact"]}), report, tmp_path))
    assert [step.step for step in report.steps] == [CHECK, "exact"]
    assert sum(isinstance(item, Dropped) and item.step == "exact" for item in items) == 58
    assert len(items) == 600


def test_the_same_words_with_other_tools_are_not_equal():
    def key(*names: str) -> bytes:
        tools = tuple({"type": "function", "function": {"name": name}} for name in names)
        return equality_key(Conversation("i", Origin("f", 1), (Message("user", "Hi"),), tools=tools))

    assert key("a") == key("a")
    assert len({key(), key("a"), key("b"), key("a", "b")}) == 4


def count_words(messages, tools) -> int:
    return sum(len(message.content.split()) for message in messages)


def test_cut_parts_are_counted_as_added(tmp_path):
    path = tmp_path / "long.jsonl"
    turns = [turn for n in range(20) for turn in (f"u:question number {n}", f"a:answer number {n}")]
    path.write_text(json.dumps(share(*turns)) + "\n" + json.dumps(share("u:a", "a:b c")) + "\n")
    overrides = ("cut.max_tokens=30", "cut.model=any")
    kept, gone, report = clean_all(stream(path), tmp_path, *overrides, count=count_words)
    assert gone == []
    assert (report.read, report.added, report.kept) == (2, 3, 5)
    assert [item.id for item in kept] == ["long:1/1", "long:1/2", "long:1/3", "long:1/4", "long:2"]


def test_a_spool_gives_back_what_it_was_given(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
    items = [
        Conversation(
            "i",
            Origin("f\udce9.jsonl", 3),
            (Message("user", "\u2028 x"), Message("assistant", "", reasoning="r", tool_calls=(call,), weight=0.5)),
            tools=({"type": "function"},),
            source="f",
            meta={"label": 1, "deep": {"x": [1.5]}},
        ),
        Dropped("f", 4, "read", "", "broken"),
        Conversation("t", Origin("f", 5), text="raw"),
    ]
    spool = Spool(tmp_path)
    for item in items:
        spool.write(item)
    assert list(spool.read()) == items
    assert list(tmp_path.iterdir()) == []


_NASTY = st.text(
    st.one_of(
        st.characters(exclude_categories=("Cs",)),
        st.sampled_from([*"<>&;`|*_#@.:/+-0123456789 \n\t\r\x00\x1b", "Ã", "©", "\ufffd", "的", "」", "“"]),
    ),
    max_size=80,
)
_PIECES = st.sampled_from(
    [
        "<div class='markdown prose'>",
        "</div>",
        "<p>",
        "</p>",
        "<pre><code>",
        "</code></pre>",
        "```",
        "Copy code",
        "1 / 1",
    ]
    + [
        "As an AI, I can't ",
        "很抱歉，我无法",
        "a@b.com",
        "+49 30 901820",
        "4111 1111 1111 1111",
        "锟斤拷",
        "a b c d " * 30,
    ]
)
_TEXTS = st.lists(st.one_of(_NASTY, _PIECES), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(turns=st.lists(st.tuples(st.sampled_from(ROLES), _TEXTS), max_size=7), text=_TEXTS)
def test_no_text_breaks_a_step(turns, text):
    every = (
        "language.keep=en,zh",
        "html.when=tags",
        "personal.action=mask",
        "personal.regions=US",
        "cut.max_tokens=16",
    )
    steps = load_settings(Clean, None, (*every, "cut.model=any")).steps
    local = tuple(step for step in steps if step.step != "exact")
    messages = tuple(Message(role, content) for role, content in turns)
    items = [Conversation("a", Origin("f", 1), messages), Conversation("b", Origin("f", 2), text=text)]
    made, reports = clean_batch(items, local, True, True, 3, count_words)
    assert len(local) == len(STEPS) - 3  # all but rules, exact, near
    gone = [item for item, _ in made if isinstance(item, Dropped)]
    assert len(made) == 2 + sum(report.added for report in reports)
    assert len(gone) == sum(report.dropped for report in reports)
    json.dumps([report.as_json() for report in reports]).encode()


# Settings -------------------------------------------------------------------------------------------------------


def test_default_steps_stand_in_their_order():
    default = load_settings(Clean)
    assert tuple(step.step for step in default.steps) == DEFAULT_STEPS == tuple(s for s in STEPS if s in DEFAULT_STEPS)
    check_settings(default)


def test_a_setting_switches_its_step_on_where_it_belongs():
    steps = [step.step for step in load_settings(Clean, None, ["language.keep=en,no", "near.threshold=0.9"]).steps]
    assert steps == [name for name in STEPS if name in (*DEFAULT_STEPS, "language", "near")]
    language = next(
        step for step in load_settings(Clean, None, ["language.keep=[en, no]"]).steps if step.step == "language"
    )
    assert language.keep == ("en", "no")  # YAML's `no` is Norwegian


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps:\n  - htlm\n", r"r.yaml:2: .*no step `htlm`; did you mean `html`\?"),
        (
            "steps:\n  - html\n  - language:\n      keap: [en]\n",
            r"r.yaml:3: .*no setting `keap`; did you mean `keep`\?",
        ),
        (
            "steps:\n  - near:\n      threshold: 2\n",
            r"r.yaml:3: `steps.0.near.threshold` = 2: it must be less than 1",
        ),
        ("steps: html\n", "steps: a list is expected"),
        ("steps: []\n", "steps: a list is expected"),
        ("stepps: []\n", "did you mean `steps`"),
        ("steps:\n - language: {keep: [en], skip: [en]}\n", "en in both keep and skip"),
        ("steps:\n - rules: {rules: [{name: a, pattern: b, action: replace}]}\n", "`by` goes with action replace"),
        ("steps:\n - length: {min_chars: 9, max_chars: 3}\n", "min_chars 9 is more than max_chars 3"),
    ],
)
def test_wrong_recipes_name_the_line(tmp_path, text, message):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(Clean, recipe)


def test_an_override_needs_its_step_in_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps:\n  - html\n  - near\n")
    assert load_settings(Clean, recipe, ["near.threshold=0.5"]).steps[1].threshold == 0.5
    with pytest.raises(ConfigError, match="the recipe has no such step; add `- cut`"):
        load_settings(Clean, recipe, ["cut.model=x"])
    with pytest.raises(ConfigError, match=r"written near.key=value"):
        load_settings(Clean, recipe, ["near=0.5"])


def test_what_cannot_serve_is_refused_before_any_row():
    for overrides, message in (
        (["language.unknown=drop"], "nothing to keep or skip"),
        (["language.keep=english"], "no language `english`; did you mean `en`. Known are, by ISO 639: ace, af"),
        (["language.keep=zh-CN"], "no language `zh-CN`; did you mean `zh`"),
        (["language.keep=qq"], "no language `qq`. Known are, by ISO 639: ace, af"),
        (["cut.max_tokens=100"], "cut.model=FOLDER"),
        (["personal.regions=XX"], "no country `XX`"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_settings(load_settings(Clean, None, overrides))


# The command ----------------------------------------------------------------------------------------------------


def test_the_command_counts_and_explains(messy, tmp_path):
    out = tmp_path / "out.jsonl"
    result = json.loads(run(messy, "--out", out, "--json"))
    assert result["read"] == 600 == result["kept"] + result["rejected"]
    assert result["written"] == {str(out): len(out.read_text().splitlines())}
    assert json.loads((tmp_path / "out.report.json").read_text()) == result
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == result["rejected"]
    assert all(set(row) == {"file", "line", "step", "field", "reason"} for row in rejects)
    assert rejects == sorted(rejects, key=lambda row: row["line"])
    assert "600 rows read, " in run(messy, "--out", out)


def test_columns_that_the_user_names(tmp_path):
    (tmp_path / "faq.csv").write_text("We say,Customers ask\nFrom nine to five.,When are you open?\n")
    out = tmp_path / "out.jsonl"
    run(tmp_path / "faq.csv", "--columns", "question=Customers ask,answer=We say", "--out", out)
    turns = json.loads(out.read_text())["messages"]
    assert [turn["content"] for turn in turns] == ["When are you open?", "From nine to five."]


def test_only_and_skip(messy, tmp_path):
    out = tmp_path / "out.jsonl"
    result = json.loads(run(messy, "--out", out, "--only", "repair,html", "--json"))
    assert [step["step"] for step in result["steps"]] == ["html", "repair", CHECK]
    result = json.loads(run(messy, "--out", out, "--skip", "exact, refusal", "--json"))
    assert not {"exact", "refusal"} & {step["step"] for step in result["steps"]}
    result = json.loads(run(messy, "--out", out, "--only", "repair,near", "--json"))
    assert [step["step"] for step in result["steps"]] == ["repair", CHECK, "near"]
    with pytest.raises(ConfigError, match=r"--only: there is no step `repare`; did you mean `repair`\?"):
        run(messy, "--out", out, "--only", "repare")
    with pytest.raises(ConfigError, match="no step is left"):
        run(messy, "--out", out, "--only", "html", "--skip", "html")


def test_without_repair_the_check_drops_what_cannot_be_trained_on(messy, tmp_path):
    result = json.loads(run(messy, "--out", tmp_path / "o.jsonl", "--skip", "repair,empty", "--json"))
    check = next(step for step in result["steps"] if step["step"] == CHECK)
    assert check["dropped"] >= 120
    assert any(reason.startswith("roles out of order") for reason in check["reasons"])


def test_where_nothing_is_left_the_rejects_say_why(tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(share("u:How are you, my dear friend?", "a:I am quite well, thank you.")) + "\n")
    with pytest.raises(DataRefused, match="none of 1 rows is left: step language dropped 1"):
        run(path, "--out", out, "language.keep=zh")
    assert not out.exists()
    assert json.loads((tmp_path / "out.rejects.jsonl").read_text())["step"] == "language"


def test_too_many_unreadable_rows_are_refused(tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps(share("u:Hi", "a:Hello")) + "\nbroken\n")
    with pytest.raises(DataRefused, match="1 of 2 rows"):
        run(path, "--out", out)
    assert not out.exists()
    assert len((tmp_path / "out.rejects.jsonl").read_text().splitlines()) == 1
    run(path, "--out", out, "--max-rejected", 0.5)


def test_arguments_are_told_apart(messy, tmp_path):
    with pytest.raises(ConfigError, match="no file to clean"):
        run("language.keep=en", "--out", tmp_path / "o.jsonl")
    with pytest.raises(ConfigError, match="second recipe"):
        run(messy, "a.yaml", "b.yaml", "--out", tmp_path / "o.jsonl")
    with pytest.raises(InputError, match="would be overwritten"):
        run(messy, "--out", messy)
    with pytest.raises(InputError, match="conversations are written as"):
        run(messy, "--out", tmp_path / "o.txt")
    with pytest.raises(InputError, match="no such|not found|does not exist"):
        run(tmp_path / "absent.jsonl", "--out", tmp_path / "o.jsonl")


def test_an_endless_rule_ends_the_command_in_any_process(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(share("u:Hi", "a:" + "b cab" * 2000 + "!")) + "\n") * 600)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "steps:\n  - rules:\n      seconds: 0.2\n      rules:\n"
        "        - {name: slow, pattern: '(?:a|aa|a?)*c(\\w+\\s?)*$', action: drop}\n"
    )
    for workers in (1, 2):
        with pytest.raises(
            GraftError, match=r"rule slow: its pattern needed more than 0.2 s for one text of .*rows.jsonl:1"
        ):
            run(path, recipe, "--out", tmp_path / "o.jsonl", "--workers", workers)


def test_help_shows_an_example():
    assert "graft data clean " in run("--help")


# Real data ------------------------------------------------------------------------------------------------------


def test_the_vicuna_recipe_runs_on_real_conversations(material, tmp_path):
    folder = material / "data"
    export = tmp_path / "export.json"
    rows = json.loads((folder / "fastchat" / "dummy_conversation.json").read_text())[:50]
    for row in rows:  # as a browser extension would have saved them
        for message in row["conversations"][1::2]:
            message["value"] = f'<div class="markdown prose w-full"><p>{message["value"]}</p></div>'
    export.write_text(json.dumps(rows))
    files = [folder / "llama-lora-fine-tuning" / name for name in ("dummy_en.json", "dummy_cn.json", "test.json")]
    out = tmp_path / "clean.jsonl"
    result = json.loads(run(export, *files, ROOT / "recipes" / "data" / "vicuna-clean.yaml", "--out", out, "--json"))
    steps = {step["step"]: step for step in result["steps"]}
    assert result["read"] == 50 + 910 + 910 + 1 == result["kept"] + result["rejected"]
    assert steps["html"]["changed"] == 50
    assert steps["language"]["notes"]["language zh"] > 500
    assert steps["language"]["notes"]["language en"] > 500
    assert steps["refusal"]["dropped"] == 0
    assert result["kept"] > 300
    assert "<div" not in out.read_text()
    parts = tmp_path / "parts"
    split = CliRunner().invoke(app, ["split", str(out), "--out", str(parts), "--val", "0.1", "--test", "0.1", "--json"])
    assert split.exit_code == 0, split.output
    assert (parts / "train.jsonl").exists()


def test_long_real_conversations_are_cut_by_a_real_tokenizer(material, tmp_path):
    from graft.tokens.count import TokenCounter

    tokenizer, out = material / "tokenizers" / "qwen2.5", tmp_path / "out.jsonl"
    rows = json.loads((material / "data" / "fastchat" / "dummy_conversation.json").read_text())[:40]
    path = tmp_path / "long.json"
    turns = [turn for row in rows for turn in row["conversations"] if len(row["conversations"]) % 2 == 0]
    path.write_text(json.dumps([{"conversations": turns}]))
    result = json.loads(
        run(path, "--only", "cut", f"cut.model={tokenizer}", "cut.max_tokens=200", "--out", out, "--json")
    )
    assert (result["read"], result["rejected"]) == (1, 0)
    assert result["kept"] == 1 + result["added"] > 5
    count = TokenCounter(str(tokenizer))
    parts = load_sources([Source(path=str(out), format="auto", weight=1.0)]).conversations
    assert all(count(part.messages, part.tools) <= 200 for part in parts)
    assert sum(len(part.messages) for part in parts) == len(turns)
    with pytest.raises(InputError):
        run(path, "--only", "cut", "cut.model=/no/such/folder", "--out", out)


def test_the_documentation_has_every_step_and_setting_with_its_default():
    text = (ROOT / "docs" / "clean.md").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert set(rows) == {*STEPS, CHECK}
    for name, model in STEPS.items():
        assert ("* |" in rows[name]) == (name in DEFAULT_STEPS)
        for setting, info in model.model_fields.items():
            if setting != "step":
                default = info.default
                shown = (
                    "none" if default is None else f"[{', '.join(default)}]" if isinstance(default, tuple) else default
                )
                shown = f"{shown:g}" if isinstance(shown, float) else shown
                assert f"`{setting}: {shown}`" in rows[name]
