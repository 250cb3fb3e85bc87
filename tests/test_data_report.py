"""The report of a set: its numbers equal those counted the obvious way, and its page is safe whatever the data says."""

import json
import os
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_encode import ROOMY, byte_tokenizer, renderer, talk
from typer.testing import CliRunner

from graft.cli.data.app import app
from graft.config.data import Source
from graft.config.train import Encode
from graft.data.describing.describe import Describer, common_terms, opening
from graft.data.describing.histogram import spread
from graft.data.describing.sample import Reservoir
from graft.data.describing.strange import MEASURES, Watch
from graft.data.load import load_sources
from graft.errors import ConfigError, GraftError, InputError
from graft.tokens.encode import encode_all
from graft.tokens.plan import Plan
from graft.tokens.statistics import nodes_of, token_statistics
from graft.tokens.tree import SHORTEST_RUN, build_rows
from graft.types import Conversation, Message, Origin
from graft.use.data_report import Asked, as_json, as_page, data_report
from graft.visible import escape_hidden

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> {{ 7*7 }} \u202egnp.exe\u202c \x1b[31m"


def row(prompt, answer, **columns):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **columns}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(*paths, **more):
    return Asked(tuple(Source(path=str(path)) for path in paths), **more)


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = Counter(), [], ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        self._hidden = tag == "style"
        self.text += " " if tag in ("td", "th") else ""

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.text += data


def check_safe(page: str) -> Page:
    """Nothing runs, nothing is fetched, nothing is hidden."""
    found = Page(page)
    assert not found.tags.keys() & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "b1"}
    for name, value in found.attributes:
        assert not name.startswith("on"), name
        assert name != "src"
        assert name != "href" or value.startswith("#")
    assert "default-src 'none'" in page
    assert "url(" not in page
    assert "@import" not in page
    assert escape_hidden(page) == page
    return found


# numbers


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_a_spread_counts_every_value_once(values):
    found = spread(values)
    edges = found.edges
    counted = [sum(low <= value < high for value in values) for low, high in zip(edges, edges[1:], strict=False)]
    assert list(found.counts) == counted
    assert sum(counted) == found.count == len(values)
    assert (found.least, found.most, found.total) == (min(values), max(values), sum(values))
    assert {found.median, found.p90, found.p99} <= set(values)
    assert sum(value <= found.p90 for value in values) >= 0.9 * len(values)


def test_no_values_have_a_spread_too():
    assert spread([]).count == 0
    assert spread([0]).counts == (1,)


def test_hidden_characters_are_written_out_and_others_stay():
    assert escape_hidden("a\x1b[0m\x07\r") == "a␛[0m␇␍"
    assert escape_hidden("\u202ex\u2066\ufeff\ud800") == "⟨U+202E⟩x⟨U+2066⟩⟨U+FEFF⟩⟨U+D800⟩"
    assert escape_hidden("\U000e0041") == "⟨U+E0041⟩"
    plain = "tab\tline\n 👨‍👩‍👧 ❤️ می‌خواهم שלום مرحبا 你好 क्‍ष"
    assert escape_hidden(plain) == plain


def test_a_reservoir_is_even_and_repeatable():
    hits = Counter()
    for seed in range(400):
        reservoir = Reservoir(5, seed)
        for item in range(50):
            reservoir.add(item)
        drawn = [item for _, item in reservoir.items()]
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 5
        hits.update(drawn)
    assert len(hits) == 50
    assert max(hits.values()) < 40 + 5 * 6.4, "about 40 each; 5 standard deviations are allowed"
    assert min(hits.values()) > 40 - 5 * 6.4
    everything = Reservoir(0, 1)
    for item in range(9):
        everything.add(item)
    assert [item for _, item in everything.items()] == list(range(9))


# text


def test_the_description_counts_what_is_there():
    describer = Describer()
    rows = [
        talk("s:Be kind.", "u:What is this?", "a:A test.", "u:Sure?", "a:Yes.", name="a"),
        talk("u:What is that?", Message("assistant", "A test.", reasoning="hm"), name="b"),
        talk("u:如何学习数学？", "a:多做题。", name="c"),
        talk("u:WHAT  is that", Message("assistant", "a test", reasoning="HM"), name="d"),
        talk(text="raw words", name="e"),
    ]
    for conversation in rows:
        describer.add(conversation)
    found = describer.description()
    assert found.rows == 5
    assert found.turns == {0: 1, 1: 3, 2: 1}
    assert found.roles["assistant"].messages == 5
    assert found.roles["assistant"].characters == len("A test.Yes.hmA test.多做题。HMa test")
    assert found.roles["system"].messages == 1
    assert found.has == {"reasoning": 2, "a system turn": 1, "several answers": 1, "raw text": 1}
    assert found.characters == sum(found.roles[role].characters for role in found.roles) + len("raw words")
    assert (found.duplicates, found.duplicate_groups) == (1, 1), "d is b in other dress"
    assert found.largest_duplicates[0].id == "d"
    assert found.openings[0] == ("what", 3, "is")
    assert ("如何", 1, "学习") in found.openings


def test_labels_are_columns_with_few_values():
    describer = Describer()
    for number in range(300):
        meta = {
            "label": "spam" if number % 3 else "ham",
            "stars": number % 5,
            "url": f"u{number}",
            "deep": {"a": 1},
            "long": "x" * 200,
            "same": "x",
        }
        answer = "positive" if number % 4 else "negative"
        conversation = talk(f"u:{number}", f"a:{answer}", name=str(number))
        describer.add(Conversation(conversation.id, conversation.origin, conversation.messages, meta=meta))
    found = describer.description()
    labels = {column.name: dict(column.values) for column in found.labels}
    assert labels["label"] == {"spam": 200, "ham": 100}
    assert labels["stars"] == {str(n): 60 for n in range(5)}
    assert labels["(the answer)"] == {"positive": 225, "negative": 75}
    assert {column.name for column in found.columns} == {"url", "deep", "long", "same"}
    assert next(column for column in found.labels if column.name == "label").balance == 0.5


def test_openings_and_terms():
    assert opening("  Please, SUMMARISE this") == ("please", "summarise")
    assert opening("123 !!") == ("", "")
    assert opening("怎样教孩子阅读") == ("怎样", "教孩")
    texts = [f"the weather of place{n} today" for n in "abcdefgh"] + ["the planet saturn"] * 3 + ["the end"] * 9
    terms = dict(common_terms(texts))
    assert terms["saturn"] == 3
    assert "the" not in terms


def plain_set(count=300):
    words = ["red", "green", "blue", "small", "large", "house", "tree", "river", "stone", "bird", "cloud", "road"]
    for n in range(count):
        text = " ".join(words[(n * 7 + k * k) % len(words)] for k in range(60 + n % 20))
        yield talk(f"u:Tell me {n}", f"a:{text}", name=f"plain{n}")


def test_planted_strange_rows_are_found_with_the_right_reason():
    noise = np.random.default_rng(0).integers(33, 127, 500).astype(np.uint8).tobytes().decode()
    planted = {
        "long": talk("u:Tell me", "a:" + "one more different word " * 2000, name="long"),
        "short": talk("u:Tell me", "a:x", name="short"),
        "odd": talk("u:Tell me", "a:" + "words \x00\x01\ue000 and ▓▒░ boxes " * 12, name="odd"),
        "repeats": talk("u:Tell me", "a:" + "ha" * 210, name="repeats"),
        "noise": talk("u:Tell me", "a:" + noise, name="noise"),
        "turns": talk(*["u:red green", "a:" + "blue house tree " * 3] * 12, name="turns"),
    }
    watch = Watch()
    rows = [*plain_set(), *planted.values()]
    for number, conversation in enumerate(rows):
        watch.add_text(number, conversation)
    found = {item.shown.id: item for item in watch.strangest(10)}
    assert planted.keys() <= found.keys()
    for name in planted:
        assert any(reason.startswith(MEASURES[name].said.split("{")[0][:8]) for reason in found[name].reasons), name
        assert found[name].score > 3.5
    scores = [item.score for item in watch.strangest(10)]
    assert scores == sorted(scores, reverse=True)
    assert len(watch.strangest(3)) == 3


def test_rows_that_are_all_alike_are_not_strange():
    watch = Watch()
    for number in range(50):
        watch.add_text(number, talk("u:same", "a:same"))
    assert watch.strangest(10) == []


# tokens


def mixed():
    system = "s:" + "You are a careful helper. " * 4
    rows = []
    for n in range(40):
        turns = [system] if n % 2 else []
        for turn in range(1 + n % 4):
            turns += [f"u:question {n} {turn} " + "?" * (n * 3 % 50), "a:" + f"answer {n} " * (1 + (n * 7 + turn) % 12)]
        rows.append(talk(*turns, name=f"m{n}"))
    rows.append(talk(text="a raw text " * 30, name="raw"))
    rows.append(talk("u:only a question", name="refused"))
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        Encode(max_length=150),
        Encode(max_length=150, overlong="drop_oldest_turns"),
        Encode(max_length=4000),
        Encode(max_length=200, train_on="last_turn"),
        Encode(max_length=300, train_on="everything"),
    ],
)
def test_token_statistics_equal_encoding_and_packing_the_obvious_way(settings):
    r, rows = renderer(), mixed()
    found = token_statistics(
        rows, r, settings, batch_size=5, row_tokens=400 if settings.max_length < 400 else 4000, seed=3
    )
    free = encode_all(rows, r, settings.model_copy(update={"max_length": 10**6}))
    assert found.conversations == len(rows)
    assert found.rejected == len(free.rejects) == 1
    assert found.examples == len(free.examples)
    assert found.tokens == sum(len(example.ids) for example in free.examples)
    assert found.targets == sum(int((example.weights > 0).sum()) for example in free.examples)
    # the steps hold what encoding at the real limit gives
    bound = encode_all(rows, r, settings)
    by_name = {}
    for example in bound.examples:
        by_name.setdefault(example.conversation, []).append(example)
    names = [row.id for row in rows if row.id in by_name]
    plan = Plan((1.0,) * len(names), 5, 1.0, 3)
    tokens = nodes = 0
    for number in range(plan.total_steps):
        examples = [example for index in plan.step(number) for example in by_name[names[index]]]
        tokens += sum(len(example.ids) for example in examples)
        nodes += sum(
            len(row) for row in build_rows(examples, 400 if settings.max_length < 400 else 4000, True, SHORTEST_RUN)
        )
    assert found.sharing.steps == plan.total_steps > 1
    assert found.sharing.conversations == len(names)
    assert (found.sharing.step.tokens, found.sharing.step.nodes) == (tokens, nodes)
    assert found.sharing.whole.nodes == sum(len(row) for row in build_rows(bound.examples, 10**6))
    alone = sum(len(row) for examples in by_name.values() for row in build_rows(examples, 10**6))
    assert found.sharing.alone.nodes == alone
    assert found.sharing.whole.nodes < nodes <= tokens, "something is shared"
    assert found.nodes >= alone


def test_the_limits_tell_what_encoding_at_each_drops(monkeypatch):
    from graft.tokens import statistics

    monkeypatch.setattr(statistics, "LIMITS", (60, 120, 180, 240))
    r, rows = renderer(), mixed()
    found = token_statistics(rows, r, ROOMY, 4, 4000, 0)
    free = encode_all(rows, r, Encode(max_length=10**6))
    assert [limit.max_length for limit in found.limits] == [60, 120, 180, 240]
    lost = []
    for limit in found.limits:
        there = encode_all(rows, r, Encode(max_length=limit.max_length))
        kept = {(example.conversation, example.turn) for example in there.examples}
        dropped = [example for example in free.examples if (example.conversation, example.turn) not in kept]
        assert limit.examples == len(dropped)
        assert limit.conversations == len({example.conversation for example in dropped})
        assert limit.whole == len(there.rejects) - len(free.rejects)
        assert limit.targets == sum(int((example.weights > 0).sum()) for example in dropped)
        lost.append(limit.targets)
    assert lost[0] > lost[-1], "the limits differ"
    assert lost == sorted(lost, reverse=True)


def test_nodes_are_counted_as_trees_have_them():
    r = renderer()
    examples = encode_all(mixed(), r, ROOMY).examples
    assert (
        nodes_of(examples) == sum(len(row) for row in build_rows(examples, 10**6)) < sum(len(e.ids) for e in examples)
    )
    assert nodes_of([]) == 0


# the page


def test_a_page_of_hostile_data_is_safe_and_complete(tmp_path):
    folder = tmp_path / "a<script>b"
    folder.mkdir()
    rows = [
        row(f"{EVIL} {n % 7}", EVIL, id=f"{EVIL}{n}", **{EVIL: EVIL if n % 2 else "x", "other": n % 3})
        for n in range(30)
    ]
    rows += [row(f"<b1>{n}</b1>", EVIL + str(n)) for n in range(30)]
    rows.append({"messages": [{"role": EVIL, "content": "x"}]})
    path = write(folder / f"{'evil'}.jsonl", rows)
    (folder / "evil.report.json").write_text(
        json.dumps(
            {EVIL: [{"name": EVIL, EVIL: EVIL}], "steps": [{"step": EVIL, "reasons": {EVIL: EVIL}, "left": EVIL}, 3]}
        )
    )
    found = data_report(asked(path), "model <script>", renderer())
    assert (found.read, found.kept, found.rejected) == (61, 60, 1)
    page = as_page(found)
    seen = check_safe(page)
    assert "<script>alert('x')</script>" in seen.text, "shown as text"
    assert "⟨U+202E⟩gnp.exe" in seen.text
    assert "␛[31m" in seen.text
    assert "{{ 7*7 }}" in seen.text
    assert "other" in seen.text
    assert list(found.cleaned) == [str(folder / "evil.report.json")]
    json.dumps(as_json(found))


def test_the_check_of_pages_can_fail():
    good = "<meta content=\"default-src 'none'\"><p>x</p>"
    check_safe(good)
    for bad in ("<script>1</script>", "<img>", '<p onclick="1">', '<a href="http://x">', "\u202e", "\x1b"):
        with pytest.raises(AssertionError):
            check_safe(good + bad)


@pytest.mark.parametrize(
    "rows",
    [
        [row("Hi", "Yes.")],
        [row("👋🏽", "👨‍👩‍👧‍👦 🏳️‍🌈")] * 3,
        [row("שלום", "مرحبا بالعالم")],
        [row("x", "word " * 200_000)],
        [{"text": "only raw text"}],
        [row("a", "\ud800 half"), row("x", "y")],
        [row(" ", "b")],
    ],
    ids=["one row", "emoji", "right to left", "huge row", "raw text", "half a pair", "blank"],
)
def test_odd_sets_have_a_page(tmp_path, rows):
    found = data_report(asked(write(tmp_path / "a.jsonl", rows)), "m", renderer())
    assert found.kept + found.rejected == found.read == len(rows)
    page = as_page(found)
    seen = check_safe(page)
    assert f"{len(rows)} rows read" in " ".join(seen.text.split())
    assert len(page) < 200_000, "a huge row is cut"
    page.encode()


def test_a_set_of_which_nothing_is_kept_has_a_page_that_says_why(tmp_path):
    found = data_report(asked(write(tmp_path / "a.jsonl", [row("x", "")] * 4)), "m", renderer())
    assert (found.read, found.kept, found.rejected) == (4, 0, 4)
    assert found.tokens.examples == 0
    seen = check_safe(as_page(found))
    assert "nothing was kept" in seen.text
    assert "empty answer" in seen.text
    assert "drawn at random" not in seen.text


def test_an_empty_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(GraftError, match=r"empty\.jsonl"):
        data_report(asked(tmp_path / "empty.jsonl"))


def test_a_sample_is_said_and_used(tmp_path):
    path = write(tmp_path / "a.jsonl", [row(f"question {n}", f"answer number {n}") for n in range(120)])
    found = data_report(asked(path, sample=50, seed=4), "m", renderer())
    assert (found.sample, found.text.rows) == (50, 120)
    assert sum(language.rows for language in found.languages) == 50
    assert found.tokens.conversations == 50
    assert len(found.samples) == 10
    text = " ".join(check_safe(as_page(found)).text.split())
    assert "are those of 50 rows of 120, drawn at random (seed 4)" in text
    again = data_report(asked(path, sample=50, seed=4), "m", renderer())
    assert as_json(again) == as_json(found)
    other = data_report(asked(path, sample=50, seed=5), "m", renderer())
    assert other.samples != found.samples
    assert data_report(asked(path, sample=0)).sample == 120


def test_near_duplicates_and_languages_are_counted(tmp_path):
    rows = [
        row(f"Please describe the city number {n} in detail.", f"It has {n} streets and {n * 3} houses.")
        for n in range(9)
    ]
    long = "The quick brown fox jumps over the lazy dog while seven wizards watch from the old stone bridge at dawn. "
    rows += [row(long + "Why?", long * 2 + end) for end in ("Because.", "Because!!", "So.")]
    rows += [row("请介绍一下这座城市的历史。", "这座城市有两千年的历史，曾经是古代的都城。")]
    found = data_report(asked(write(tmp_path / "a.jsonl", rows)))
    assert found.near.largest[0].rows == 3
    assert found.near.duplicates >= 2
    assert found.text.duplicates == 1, "two differ in punctuation only"
    counts = {language.code: language.rows for language in found.languages}
    assert counts["zh"] == 1
    assert counts["en"] >= 10
    assert found.tokens is None
    check_safe(as_page(found))


# the command


@pytest.fixture
def model(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = renderer().template
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_writes_a_page_and_json(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same = "which of them is it that comes next after the one before this"
    write(tmp_path / "a.jsonl", [*(row(f"{same} {n}", f"a {n}") for n in range(30)), row("x", "")])
    ran = CliRunner().invoke(app, ["report", "a.jsonl", "--model", str(model), "--out", "p.html"])
    assert ran.exit_code == 0, ran.output
    check_safe((tmp_path / "p.html").read_text(encoding="utf-8"))
    assert "31 rows read, 30 kept, 1 rejected" in ran.stdout
    ran = CliRunner().invoke(app, ["report", "a.jsonl", "--json", "--model", str(model)])
    found = json.loads(ran.stdout)
    assert (found["read"], found["kept"], found["rejected"]) == (31, 30, 1)
    assert found["tokens"]["limits"][2]["max_length"] == 2048
    assert found["tokens"]["sharing"]["step"]["ratio"] > 1
    assert len(found["samples"]) == 10
    assert not (tmp_path / "report.html").exists()
    ran = CliRunner().invoke(app, ["report", "a.jsonl"])
    assert ran.exit_code == 0
    check_safe((tmp_path / "report.html").read_text(encoding="utf-8"))
    ran = CliRunner().invoke(app, ["report", "a.jsonl", "--out", "a.jsonl"])
    assert isinstance(ran.exception, GraftError)
    assert "would be overwritten" in str(ran.exception)


def test_what_cannot_serve_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match=r"is a folder; name a file in it, such as --out .*report\.html"):
        CliRunner().invoke(app, ["report", "none.jsonl", "--out", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--template is for tokens"):
        CliRunner().invoke(app, ["report", "none.jsonl", "--template", "chatml"], catch_exceptions=False)


def test_a_line_that_has_no_fields_is_rejected_without_naming_one(tmp_path, model):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(row("q", "a")).encode() + b"\n\xff\n")
    ran = CliRunner().invoke(app, ["report", str(path), "--out", str(tmp_path / "p.html")])
    assert "1 rejected: byte 0xff" in ran.stderr
    ran = CliRunner().invoke(app, ["inspect", "--model", str(model), "--data", str(path), "--json", "-"])
    assert json.loads(ran.stdout.splitlines()[-1])["rejected"].startswith("byte 0xff")


def test_what_cleaning_did_is_shown_where_its_report_lies_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row(f"question number {n} about rivers", f"Answer number {n} tells of one river.") for n in range(20)]
    write(tmp_path / "a.jsonl", [*rows, *rows[:3]])
    ran = CliRunner().invoke(app, ["clean", "a.jsonl", "--out", "b.jsonl", "--workers", "1"])
    assert ran.exit_code == 0, ran.output
    ran = CliRunner().invoke(app, ["report", "b.jsonl"])
    assert ran.exit_code == 0, ran.output
    text = " ".join(check_safe((tmp_path / "report.html").read_text(encoding="utf-8")).text.split())
    assert "How it was cleaned" in text
    cleaned = json.loads((tmp_path / "b.report.json").read_text())
    exact = next(step for step in cleaned["steps"] if step["step"] == "exact")
    assert exact["dropped"] == 3
    reason, count = next(iter(exact["reasons"].items()))
    assert f"exact 23 0 0 3 20 {count} × {reason}" in text


def test_the_report_does_not_depend_on_the_hash_seed(tmp_path):
    write(tmp_path / "a.jsonl", [row(f"question {n} about birds", f"reply {n % 3}", label=n % 2) for n in range(60)])
    code = "from graft.cli.main import main; main()"
    seen = set()
    for seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", code, "data", "report", "a.jsonl", "--json", "--sample", "40"],
            cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True,
        )  # fmt: skip
        seen.add(ran.stdout)
    assert len(seen) == 1
    assert json.loads(seen.pop())["kept"] == 60


def test_real_sets_have_reports(material):
    from graft.tokens.load import load_renderer

    data = material / "data"
    files = [
        *(data / "domain-bloom").glob("domain.*.json"),
        data / "conversations60" / "conversations.jsonl",
        data / "llama-lora-fine-tuning" / "test.json",
        data / "llamafactory_demos" / "glaive_toolcall_zh_demo.json",
        data / "llamafactory_demos" / "reason_tool_use_demo_50.jsonl",
    ]
    r = load_renderer(str(material / "tokenizers" / "qwen3"))
    found = data_report(asked(*files, sample=600), "qwen3", r)
    loaded = load_sources([Source(path=str(file)) for file in files])
    assert (found.read, found.kept) == (loaded.read, len(loaded.conversations))
    assert found.kept > 1500
    assert len(found.strangest) == len(found.samples) == 10
    assert found.tokens.conversations == found.sample == 600
    assert found.tokens.sharing.step.ratio > 1
    assert found.languages[0].code == "zh"
    check_safe(as_page(found))


def test_origins_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("a", "b")])
    (shown,) = data_report(asked(path)).samples
    assert shown.place == str(Origin(str(path), 1))
