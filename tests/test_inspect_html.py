"""What inspect shows: every token once with its numbers, where turns begin, why turns are missing, a step's trees."""

import json
from collections import Counter
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from test_data_report import EVIL, Page, check_safe
from test_encode import CHATML, QWEN3, ROOMY, byte_tokenizer, renderer, talk
from typer.testing import CliRunner

from graft.cli.data.app import app
from graft.config.train import Encode, load_train
from graft.errors import GraftError
from graft.runs import RunFolder
from graft.tokens import forest, show
from graft.tokens.encode import encode, encode_all
from graft.types import Message
from graft.use.inspect_page import Head, conversation_view, step_view, write_page

CHAT = talk("s:Be kind.", "u:你好 🎉", "a:好的👍🏽\n", "u:and now?", "a:Bye.", name="zh")


class Tokens(Page):
    """The tokens of a page: (kind, what is said of them, text)."""

    def __init__(self, page):
        self.tokens, self._token = [], None
        super().__init__(page)

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        given = dict(attrs)
        if tag == "i" and "data-said" in given:
            self._token = [given["class"], given["data-said"], ""]

    def handle_endtag(self, tag):
        super().handle_endtag(tag)
        if tag == "i" and self._token:
            self.tokens.append(tuple(self._token))
            self._token = None

    def handle_data(self, data):
        super().handle_data(data)
        if self._token:
            self._token[2] += data


def page_of(tmp_path, conversations, r, settings=ROOMY, step=None):
    views = [conversation_view(c, encode(c, r, settings), r, settings) for c in conversations]
    path = tmp_path / "page.html"
    write_page(path, Head("Inspected", {"data": "made"}), views, step)
    return path.read_text(encoding="utf-8")


def numbers(said, name):
    """The numbers that follow `id` or `ids`, `position` or `positions`."""
    part = next(part for part in said.split(" · ") if part.split()[0] in (name, name + "s"))
    return [int(word) for word in part.split()[1:] if word.isdigit()]


def test_a_page_has_every_token_once_with_its_id_weight_and_position(tmp_path):
    r = renderer()
    page = page_of(tmp_path, [CHAT], r)
    check_safe(page)
    tokens = Tokens(page).tokens
    examples = encode(CHAT, r, ROOMY)
    assert len(examples) == 2
    assert [number for _, said, _ in tokens for number in numbers(said, "id")] == np.concatenate(
        [example.ids for example in examples]
    ).tolist()
    first = [token for token in tokens if "position" in token[1]]
    assert numbers(first[0][1], "position") == [0]
    assert "".join(text for _, _, text in tokens) == "".join(
        show.visible(piece.text) for example in examples for piece in show.pieces(example, r)
    )
    kinds = Counter(kind for kind, _, _ in tokens)
    assert kinds["stop"] == 2
    assert all("weight 1" in said for kind, said, _ in tokens if kind in ("target", "stop"))
    assert all("weight 0" in said for kind, said, _ in tokens if kind == "context")
    assert "👍" in [text for _, _, text in tokens], "four tokens of one character stand together"


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    r = renderer()
    hostile = talk(f"s:{EVIL}", f"u:{EVIL}", f"a:</i></p>{EVIL}", name=EVIL)
    rejected = talk(f"u:{EVIL}", name=EVIL + "2")
    both = encode_all([hostile, CHAT], r, ROOMY).examples
    view = step_view(forest.step_trees(both, 9000), EVIL, EVIL, r)
    seen = check_safe(page_of(tmp_path, [hostile, rejected], r, step=view))
    assert "</i></p><script>alert('x')</script>" in seen.text
    assert "⟨U+202E⟩gnp.exe⟨U+202C⟩" in seen.text
    assert "rejected: messages: no assistant turn" in seen.text


def test_the_terminal_shows_hidden_characters_and_sends_none():
    r = renderer()
    hostile = talk("u:a\x1b[31m\u202eb\x07\u2028", "a:ok\x9b", name="id\x1b]0;x\x07")
    page = StringIO()
    console = Console(file=page, width=200, force_terminal=False)
    result = encode(hostile, r, ROOMY)
    console.print(show.draw(hostile, result, r, ROOMY), forest.draw_step(forest.step_trees(result, 900), r))
    text = page.getvalue()
    assert not set(text) & set("\x1b\x07\x9b\u202e\u2028")
    assert "␛[31m⟨U+202E⟩b␇⟨U+2028⟩" in text
    assert "ok⟨U+009B⟩" in text
    assert "id␛]0;x␇" in text


@pytest.mark.parametrize("template", [CHATML, QWEN3], ids=["prefix-stable", "strips reasoning"])
def test_turns_begin_where_the_template_begins_them(template):
    r = renderer(template)
    answer = Message("assistant", "First.", reasoning="hm")
    chat = talk("s:Be kind.", "u:one", answer, "u:two", "a:Second.", "u:three", "a:Third.")
    example = encode(chat, r, ROOMY)[-1]
    found = show.pieces(example, r)
    starts = show.turn_starts(chat, example, found, r)
    assert [start.said for start in starts] == [f"{i} {m.role}" for i, m in enumerate(chat.messages)]
    ids = example.ids.tolist()
    ends = [start.token for start in starts[1:]] + [len(ids)]
    for start, end, message in zip(starts, ends, chat.messages, strict=True):
        text = r.decode(ids[start.token : end])
        assert text.startswith(f"<|im_start|>{message.role}\n"), text
        assert message.content in text
        assert text.count("<|im_start|>") == 1


def test_turns_that_were_dropped_are_not_marked():
    r = renderer()
    chat = talk("u:" + "old words " * 20, "a:" + "old answer " * 9, "u:new", "a:Fresh.")
    settings = Encode(max_length=80, overlong="drop_oldest_turns")
    example = encode(chat, r, settings)[-1]
    assert "old" not in r.decode(example.ids.tolist())
    starts = show.turn_starts(chat, example, show.pieces(example, r), r)
    assert "2 user" in [start.said for start in starts]
    assert "1 assistant" not in [start.said for start in starts]


def test_a_turn_without_an_example_says_why():
    r = renderer()
    off = Message("assistant", "Off.", weight=0)
    chat = talk("u:one", "a:First.", "u:two", off, "u:three", "a:" + "x" * 300, "u:four", "a:Last.")
    settings = Encode(max_length=200)

    def why(settings):
        return {item.turn: item.reason for item in show.left_out(chat, encode(chat, r, settings), r, settings)}

    short = why(settings)
    assert short.keys() == {3, 5, 7}
    assert short[3] == "its weight is 0: context only"
    length = len(r.ids([r.render(chat.messages[:6], generation_prompt=False).removesuffix("\n")])[0])
    assert short[5] == f"too long: {length} tokens > encode.max_length 200"
    assert short[7].startswith("too long")
    assert why(Encode(max_length=4000)) == {3: "its weight is 0: context only"}
    last = why(Encode(max_length=4000, train_on="last_turn"))
    assert last[1] == "not the last answer (train_on: last_turn): context only"
    assert 7 not in last
    assert "train_on: everything" in why(Encode(max_length=4000, train_on="everything"))[1]


# trees


def forest_of_examples(r):
    system = "s:You are a careful helper."
    rows = [talk(system, f"u:q{n % 3}", f"a:answer {n % 5}", "u:more", f"a:{n}", name=f"c{n}") for n in range(12)]
    rows += [talk("u:alone", "a:yes", name="d"), talk("u:alone", "a:yes", name="e")]
    return list(encode_all(rows, r, ROOMY).examples)


@pytest.mark.parametrize("row_tokens", [10_000, 120])
def test_branches_cover_every_node_with_the_examples_that_pass_through_it(row_tokens):
    r = renderer()
    examples = forest_of_examples(r)
    step = forest.step_trees(examples, row_tokens)
    assert (len(step.trees) > 3) is (row_tokens == 120)
    assert step.sharing.nodes == sum(len(trees.row) for trees in step.trees)
    paths = Counter()
    for example in examples:
        for length in range(1, len(example.ids) + 1):
            paths[tuple(example.ids[:length].tolist())] += 1
    counted, ends = Counter(), Counter()
    for trees in step.trees:
        row, edges = trees.row, [branch.start for branch in trees.branches]
        assert [0, *(branch.stop for branch in trees.branches)] == [*edges, len(row)]
        for branch in trees.branches:
            ends.update(branch.ends)
            assert branch.targets == np.count_nonzero(row.weight[branch.start : branch.stop])
            assert row.depth[branch.start] == branch.depth
            assert (branch.depth == 0) <= (branch.level == 0)
            for node in range(branch.start, branch.stop):
                path, at = [], node
                while at >= 0:
                    path.append(int(row.ids[at]))
                    at = int(row.parent[at])
                counted[tuple(reversed(path))] += branch.examples
                assert len(branch.conversations) <= branch.examples
    assert counted == paths, "over all rows, each prefix is passed by the examples that have it"
    assert ends == Counter((example.conversation, example.turn) for example in examples)
    assert max(branch.examples for trees in step.trees for branch in trees.branches) >= 4


def test_levels_count_forks():
    r = renderer()
    one = "a question that is longer than the shortest run of nodes"
    rows = [talk("s:Same.", f"u:{q}", f"a:{a}", name=q + a) for q, a in ((one, "1"), (one, "2"), ("y", "3"))]
    (trees,) = forest.step_trees(encode_all(rows, r, ROOMY).examples, 9000).trees
    assert [(branch.level, branch.examples) for branch in trees.branches] == [(0, 3), (1, 2), (2, 1), (2, 1), (1, 1)]
    turns = talk("u:a", "a:b", "u:c", "a:d")
    (trees,) = forest.step_trees(encode(turns, r, ROOMY), 9000).trees
    assert [(branch.level, branch.examples) for branch in trees.branches] == [(0, 2), (0, 1)], "no fork, one path"
    assert [branch.ends for branch in trees.branches] == [(("c", 1),), (("c", 3),)]


def test_the_pieces_of_all_branches_are_the_text_of_the_row():
    r = renderer()
    step = forest.step_trees(forest_of_examples(r), 10_000)
    (trees,) = step.trees
    for branch in trees.branches:
        pieces = forest.branch_pieces(trees.row, branch, r)
        assert pieces[0].start == branch.depth
        assert pieces[-1].stop == branch.depth + branch.stop - branch.start
        assert "".join(piece.text for piece in pieces) == r.decode(trees.row.ids[branch.start : branch.stop].tolist())


def test_a_step_on_a_page_has_every_node_once(tmp_path):
    r = renderer()
    step = forest.step_trees(forest_of_examples(r), 10_000)
    page = page_of(tmp_path, [], r, step=step_view(step, "Step 1", "facts", r))
    check_safe(page)
    tokens = Tokens(page).tokens
    (trees,) = step.trees
    assert [number for _, said, _ in tokens for number in numbers(said, "id")] == trees.row.ids.tolist()
    assert "× 24 examples of 12 conversations" in page


# the command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    rows = [
        {"id": f"r{n}", "messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(40)
    ]
    rows.insert(
        3, {"id": "bad", "messages": [{"role": "user", "content": "\x1b[1m"}, {"role": "assistant", "content": ""}]}
    )
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, ["inspect", "--model", "model", "--data", "d.jsonl", *words])


def test_the_command_writes_pages(folder):
    ran = run("--html", "p.html", "--limit", "0")
    assert ran.exit_code == 0, ran.output
    page = (folder / "p.html").read_text(encoding="utf-8")
    seen = check_safe(page)
    assert "41 read, 40 kept, 1 rejected" in seen.text
    assert "empty answer" in seen.text
    assert "r39" in seen.text
    ran = run("--html", "q.html", "--limit", "2")
    seen = Page((folder / "q.html").read_text(encoding="utf-8"))
    assert "the rest of the data was not read" in seen.text
    assert "r1" in seen.text
    assert "r2" not in seen.text
    ran = run("--step", "2", "batch_size=8", "--html", "s.html")
    assert ran.exit_code == 0, ran.output
    assert "The trees of step 2" in check_safe((folder / "s.html").read_text(encoding="utf-8")).text


def test_the_step_is_the_one_that_training_takes(folder):
    from graft.train.prepare import prepare

    settings = load_train(None, ["batch_size=8", "seed=5"], {"model": "model", "data": "d.jsonl", "max_rejected": 0.1})
    run_folder = RunFolder(folder / "run")
    run_folder.root.mkdir()
    prepared = prepare(settings, run_folder)
    wanted = prepared.train.examples(prepared.plan.step(1))
    ran = run("--step", "2", "batch_size=8", "seed=5")
    assert ran.exit_code == 0, ran.output
    assert len(wanted) >= 7
    for example in wanted:
        assert f"ends {example.conversation} turn 1" in ran.stdout or f", {example.conversation} turn 1" in ran.stdout
    assert ran.stdout.count(" turn 1") == len(wanted)
    assert f"{len(prepared.train)} conversations" in " ".join(ran.stdout.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr=3"], "`lr` has no effect"),
        (["lora.r=3"], "`lora.r` has no effect"),
        (["batch_size=3"], "only matters with --step"),
        (["max_lenght=3"], "did you mean `encode.max_length`"),
        (["--step", "99"], "ends with step"),
        (["--step", "1", "--json", "-"], "leave out --step"),
        (["--step", "1", "--limit", "5"], "leave one of them out"),
        (["--step", "1", "split.val=0.999999"], "are held out (split.val 0.999999, split.test 0), so no step has any"),
        (["--html", "d.jsonl"], "would be overwritten"),
    ],
)
def test_what_has_no_effect_is_refused(folder, words, said):
    ran = run(*words)
    assert isinstance(ran.exception, GraftError)
    assert said in str(ran.exception)


def test_real_templates_have_pages(material, tmp_path):
    from graft.config.data import Source
    from graft.data.load import load_sources
    from graft.tokens.load import load_renderer

    data = material / "data"
    files = [data / "conversations60" / "conversations.jsonl", data / "llama-lora-fine-tuning" / "test.json"]
    chats = load_sources([Source(path=str(file)) for file in files]).conversations
    marked = 0
    for name in ("qwen3", "llama-3.1-instruct", "mistral-v3", "phi-3"):
        r = load_renderer(str(material / "tokenizers" / name), date="2026-01-31")
        page = page_of(tmp_path, chats, r, Encode())
        check_safe(page)
        examples = encode_all(chats, r, Encode()).examples
        shown = [number for _, said, _ in Tokens(page).tokens for number in numbers(said, "id")]
        assert shown == np.concatenate([example.ids for example in examples]).tolist()
        chat = chats[-1]
        example = encode(chat, r, Encode(max_length=9000))[-1]
        found = show.pieces(example, r)
        assert not any("\ufffd" in piece.text for piece in found), "characters of several tokens stay whole"
        starts = show.turn_starts(chat, example, found, r)
        assert [start.said for start in starts] == [f"{i} {m.role}" for i, m in enumerate(chat.messages)]
        ends = [start.token for start in starts[1:]] + [len(example.ids)]
        for start, end, message in zip(starts, ends, chat.messages, strict=True):
            text = "".join(piece.text for piece in found if start.token <= piece.start < end)
            assert message.content.strip()[:40] in text
            marked += 1
    assert marked == 4 * len(chats[-1].messages) > 16
