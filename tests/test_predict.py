"""Prediction files: every question once, the same after a break, never of mixed settings."""

import json

import pytest
from tiny import make_conversations, make_model_folder, write_rows
from transformers import AutoModelForCausalLM

from graft.config.data import Source
from graft.config.train import Sampling
from graft.data.load import load_sources
from graft.errors import InputError
from graft.model.answers import flight
from graft.model.answers.generate import generate_batch
from graft.model.trees import TreeLM
from graft.tokens.load import load_renderer
from graft.types import Conversation, Message, Origin
from graft.use.engine import LoadedEngine
from graft.use.predict import (
    answer_all,
    answer_settings,
    counts_in_words,
    predict_file,
    questions_of,
    settings_path,
    split_answer,
)

HERE = Origin("test", 1)
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    return TreeLM(AutoModelForCausalLM.from_pretrained(folder).eval()), load_renderer(str(folder))


@pytest.fixture
def questions(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", make_conversations(20))
    return questions_of(load_sources([Source(path=path)]).conversations)[0]


def _rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _predict(questions, out, opened, sampling=SAMPLING, **changes):
    settings = answer_settings("m", "w", opened[1], sampling)
    return predict_file(questions, out, settings, lambda: (LoadedEngine(opened[0]), opened[1]), sampling, **changes)


def test_rows_hold_question_answer_and_target_in_the_order_of_the_data(questions, opened, tmp_path):
    lm, renderer = opened
    model = lm.model
    counts = _predict(questions, tmp_path / "out.jsonl", opened)
    rows = _rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [question.id for question in questions]
    assert sum(counts.values()) == len(rows) == 20
    assert rows[1]["input"] == "What is 1 + 1?"
    assert rows[1]["target"] == "2"
    assert "messages" not in rows[1]
    assert rows[0]["input"] == "and 2 more?"
    assert rows[0]["target"] == "3."
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant", "user"]
    prompts = [renderer.prompt_ids(question.messages) for question in questions]
    wanted = [generate_batch(model, [prompt], renderer.stop_ids, SAMPLING)[0] for prompt in prompts]
    assert [row["predict"] for row in rows] == [renderer.decode(answer.ids) for answer in wanted]
    assert [row["finish"] for row in rows] == ["stop" if answer.stopped else "length" for answer in wanted]
    assert len({row["predict"] for row in rows}) > 5


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(max_new_tokens=6, temperature=1.0, seed=2)])
@pytest.mark.parametrize("torn", [0, 7])
def test_a_broken_run_goes_on_where_it_was(questions, opened, tmp_path, monkeypatch, sampling, torn):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    _predict(questions, whole, opened, sampling)
    monkeypatch.setattr(flight, "MOST_ROWS", 3)
    original, joined = flight._Flight._read, []

    def crash_when_the_fourth_prompts_join(self, new):
        joined.append(len(new))
        if len(joined) == 4:
            raise KeyboardInterrupt
        return original(self, new)

    monkeypatch.setattr(flight._Flight, "_read", crash_when_the_fourth_prompts_join)
    with pytest.raises(KeyboardInterrupt):
        _predict(questions, broken, opened, sampling)
    done = len(_rows(broken))
    assert 0 < done <= sum(joined[:3]) < 20  # what had ended is on disk
    if torn:
        broken.write_bytes(broken.read_bytes()[:-torn])
    _predict(questions, broken, opened, sampling)
    assert broken.read_bytes() == whole.read_bytes()
    assert sum(joined[4:]) == 20 - done + (1 if torn else 0)  # only what was missing was computed again


def test_a_finished_file_needs_no_model(questions, opened, tmp_path):
    out = tmp_path / "out.jsonl"
    _predict(questions, out, opened)
    before = out.read_bytes()

    def no_model():
        raise AssertionError("the model was loaded")

    predict_file(questions, out, answer_settings("m", "w", opened[1], SAMPLING), no_model, SAMPLING)
    assert out.read_bytes() == before


def test_other_settings_are_never_mixed_in(questions, opened, tmp_path):
    out = tmp_path / "out.jsonl"
    _predict(questions[:3], out, opened)
    other = Sampling(max_new_tokens=7)
    with pytest.raises(InputError, match=r"sampling.max_new_tokens: 6 there, 7 now"):
        _predict(questions, out, opened, other)
    with pytest.raises(InputError, match=r"weights: 'w' there, 'v' now"):
        predict_file(questions, out, answer_settings("m", "v", opened[1], SAMPLING), lambda: opened, SAMPLING)
    _predict(questions, out, opened, other, overwrite=True)
    assert json.loads(settings_path(out).read_text())["sampling"]["max_new_tokens"] == 7
    strange = tmp_path / "strange.jsonl"
    strange.write_text("{}\n")
    with pytest.raises(InputError, match="not begun by graft predict"):
        _predict(questions, strange, opened)
    changed = [questions[0].__class__(**{**_fields(questions[0]), "target": "other"})]
    with pytest.raises(InputError, match="answers another question"):
        _predict(changed, out, opened, other)


def _fields(question):
    return {name: getattr(question, name) for name in question.__slots__}


def test_questions_are_what_comes_before_the_last_answer():
    ask, say, system = Message("user", "q"), Message("assistant", "a"), Message("system", "s")
    reasoned = Message("assistant", "a", reasoning="because")
    conversations = [
        Conversation("plain", HERE, (system, ask, say), meta={"topic": "t"}),
        Conversation("open", HERE, (ask, say, Message("user", "r"))),
        Conversation("reasoned", HERE, (ask, reasoned)),
        Conversation("text", HERE, text="raw"),
        Conversation("opening", HERE, (say,)),
    ]
    questions, silent = questions_of(conversations, thinking=None)
    assert silent == 2
    assert [(question.id, question.target, question.thinking) for question in questions] == [
        ("plain", "a", False),
        ("open", None, None),
        ("reasoned", "a", True),
    ]
    assert questions[0].messages == (system, ask)
    assert questions[1].input == "r"
    assert questions[0].meta == {"topic": "t"}


def test_prompts_are_those_of_training(opened, questions, tmp_path):
    from graft.config.train import Encode
    from graft.tokens.encode import encode_all

    conversations = load_sources([Source(path=str(tmp_path / "data.jsonl"))]).conversations
    encoded = encode_all(conversations, opened[1], Encode(train_on="last_turn"))
    for question, example in zip(questions, encoded.examples, strict=True):
        prompt = opened[1].prompt_ids(question.messages, question.tools, question.thinking)
        assert prompt == example.ids[: example.prompt_len].tolist()


def test_what_cannot_be_asked_gets_a_row_that_says_so(opened):
    long = Conversation("long", HERE, (Message("user", "word " * 400), Message("assistant", "x")))
    fine = Conversation("fine", HERE, (Message("user", "hello"), Message("assistant", "x")))
    answers = answer_all(LoadedEngine(opened[0]), opened[1], questions_of([long, fine])[0], SAMPLING)
    assert answers[0].finish == "too_long"
    assert answers[0].row["predict"] == ""
    assert answers[1].tokens > 0


def test_a_template_that_refuses_gives_a_row_too(opened, tmp_path):
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = load_renderer(opened[1].tokenizer.name_or_path, str(template))
    bad = Conversation("bad", HERE, (Message("user", "bad"),))
    fine = Conversation("fine", HERE, (Message("user", "fine"),))
    answers = answer_all(LoadedEngine(opened[0]), renderer, questions_of([bad, fine])[0], SAMPLING)
    assert [answer.finish == "refused" for answer in answers] == [True, False]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("just this", (None, "just this")),
        ("<think>\nhm\n</think>\n\n12", ("hm", "12")),
        ("hm</think>12", ("hm", "12")),
        ("<think>\n\n</think>\n\n12", (None, "12")),
    ],
)
def test_reasoning_is_split_off_generated_text(text, parts):
    assert split_answer(text) == parts


def test_counts_are_told_in_words():
    assert counts_in_words({"stop": 1, "length": 0, "too_long": 0, "refused": 0}) == "1 answer: 1 ended by itself"
    told = counts_in_words({"stop": 2, "length": 5, "too_long": 1, "refused": 0})
    assert told == (
        "8 answers: 2 ended by themselves, 5 cut at the longest length, 1 not asked, the prompt fills the context"
    )


def test_answers_over_another_base_do_not_go_on_in_the_same_file(questions, opened, tmp_path):
    def predict(**base):
        settings = answer_settings("m", "w", opened[1], SAMPLING, **base)
        engine = lambda: (LoadedEngine(opened[0]), opened[1])  # noqa: E731
        return predict_file(questions[:2], tmp_path / "out.jsonl", settings, engine, SAMPLING)

    predict(base="b", quantize="nf4")
    with pytest.raises(InputError, match="quantize: 'nf4' there, 'none' now"):
        predict(base="b", quantize="none")
    with pytest.raises(InputError, match="base: 'b' there, 'c' now"):
        predict(base="c", quantize="nf4")
