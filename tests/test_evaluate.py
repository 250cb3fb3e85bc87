"""Evaluation: base and tuned side by side equal the same numbers taken by hand; the report shows them."""

import json
import re

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tiny import make_conversations, make_model_folder, write_rows
from transformers import AutoModelForCausalLM

from graft.config.data import Source
from graft.config.train import Encode, Train
from graft.data.load import load_sources
from graft.errors import InputError
from graft.model.answers.generate import generate_batch
from graft.runs import RunFolder
from graft.tokens.encode import encode_all
from graft.tokens.load import load_renderer
from graft.types import Message
from graft.use.evaluate import Options, column_of, evaluate
from graft.use.metrics import Proportion
from graft.use.open import resolve
from graft.use.predict import Answer, Question, questions_of
from graft.use.report import write_report
from graft.use.result import save_evaluation, table_rows, topic_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose adapter is random: its answers differ from the base's; three targets are made to fit."""
    root = tmp_path_factory.mktemp("world")
    base = make_model_folder(root / "base")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    renderer = load_renderer(str(base))
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    folder = RunFolder(root / "run")
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(folder.final)
    renderer.save(folder.final)
    rows = make_conversations(12)
    for number, row in enumerate(rows):
        row["topic"] = "偶" if number % 2 == 0 else "odd"
    for number, disabled in ((1, False), (2, False), (4, True)):  # right when tuned, tuned, base
        rows[number]["messages"][-1]["content"] = _said(tuned, renderer, rows[number], disabled)
    folder.data.mkdir(parents=True)
    write_rows(folder.data / "test.jsonl", rows)
    train = [row | {"id": f"t{n}"} for n, row in enumerate(make_conversations(60)[20:])]
    settings = Train(model=str(base), data=write_rows(root / "train.jsonl", train))
    folder.config.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude={"resume"})))
    (folder.root / "environment.json").write_text(json.dumps({"python": "3", "counts": {"read": 60}, "made_of": {}}))
    lines = [{"kind": "train", "step": n, "loss": 3.0 - n / 10, "lr": 1e-4} for n in range(1, 9)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _said(tuned, renderer, row, disabled):
    question = questions_of(load_of(row))[0][0]
    prompt = renderer.prompt_ids(question.messages)
    if disabled:
        with tuned.disable_adapter():
            (answer,) = generate_batch(tuned, [prompt], renderer.stop_ids, _short())
    else:
        (answer,) = generate_batch(tuned, [prompt], renderer.stop_ids, _short())
    text = renderer.decode(answer.ids)
    assert text.strip()
    return text


def _short():
    from graft.config.train import Sampling

    return Sampling(max_new_tokens=5)


def load_of(row):
    from graft.types import Conversation, Message, Origin

    messages = tuple(Message(message["role"], message["content"]) for message in row["messages"])
    return [Conversation(row["id"], Origin("x", 1), messages)]


@pytest.fixture(scope="module")
def found(run):
    return evaluate(resolve(str(run.root)), Options(max_new_tokens=5))


def test_columns_are_base_and_tuned_over_the_same_questions(found):
    assert [column.name for column in found.columns] == ["base", "tuned"]
    base, tuned = found.columns
    assert tuned.right[1]
    assert tuned.right[2]
    assert base.right[4]
    assert base.exact_match.total == tuned.exact_match.total == found.questions == 12
    difference = found.difference
    assert (difference.only_second, difference.only_first) == (
        sum(t and not b for b, t in zip(base.right, tuned.right, strict=True)),
        sum(b and not t for b, t in zip(base.right, tuned.right, strict=True)),
    )
    assert difference.only_second >= 1
    assert difference.only_first >= 1


def test_teacher_forced_numbers_are_those_of_plain_transformers(run, found):
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(resolve(str(run.root)).base).eval()
    renderer = load_renderer(str(run.final))
    conversations = load_sources([Source(path=str(run.data / "test.jsonl"))]).conversations
    examples = encode_all(conversations, renderer, Encode()).examples
    models = {"base": model}
    for name in ("base", "tuned"):
        if name == "tuned":
            models["tuned"] = PeftModel.from_pretrained(model, run.final).eval()
        nll = hits = tokens = 0.0
        for example in examples:
            ids = torch.tensor(example.ids.tolist())
            with torch.no_grad():
                logits = models[name](input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            wanted = example.weights[1:] > 0
            for place in wanted.nonzero()[0]:
                nll -= float(logits[place, ids[place + 1]])
                hits += int(logits[place].argmax() == ids[place + 1])
                tokens += 1
        column = found.column(name)
        assert column.loss == pytest.approx(nll / tokens, rel=1e-5)
        assert column.token_accuracy == pytest.approx(hits / tokens)
        assert column.target_tokens == tokens
    assert found.columns[0].loss != pytest.approx(found.columns[1].loss, rel=1e-3)


def test_answers_do_not_depend_on_how_the_base_is_given(run, found):
    base = resolve(str(run.root)).base
    apart = evaluate(resolve(str(run.final)), Options(data=_test(run), base=base + "/.", max_new_tokens=5))
    for one, other in zip(found.columns, apart.columns, strict=True):
        assert [answer.text for answer in one.answers] == [answer.text for answer in other.answers]
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
    alone = evaluate(resolve(str(run.final)), Options(data=_test(run), base="none", max_new_tokens=5))
    assert [column.name for column in alone.columns] == ["model"]
    assert alone.columns[0].right == found.columns[1].right
    assert alone.difference is None


def _test(run):
    return (Source(path=str(run.data / "test.jsonl")),)


def test_topics_add_up(found):
    for column in found.columns:
        assert set(column.by) == {"odd", "偶"}
        assert sum(part.hits for part in column.by.values()) == column.exact_match.hits
        assert sum(part.total for part in column.by.values()) == 12
    assert [row[0] for row in topic_rows(found)] == list(found.columns[0].by)
    assert len(table_rows(found)[0]) == 3


def test_shots_come_from_the_training_part_and_add_columns(run, found):
    target = resolve(str(run.root))
    some = evaluate(target, Options(shots=2, max_new_tokens=5, limit=4))
    assert [column.name for column in some.columns] == ["base", "base 2-shot", "tuned", "tuned 2-shot"]
    assert some.column("tuned").right == found.column("tuned").right[:4]
    assert some.column("tuned 2-shot").loss is None
    plain = [answer.text for answer in some.column("tuned").answers]
    assert [answer.text for answer in some.column("tuned 2-shot").answers] != plain
    with pytest.raises(InputError, match=r"--shots 500: only \d+ training conversations"):
        evaluate(target, Options(shots=500))
    with pytest.raises(InputError, match="--shots-from"):
        evaluate(resolve(str(run.final)), Options(data=_test(run), shots=1))


def test_examples_are_never_the_question_itself(run):
    from graft.use.evaluate import _shots

    target = resolve(str(run.root))
    asked = load_sources(_test(run)).conversations
    with pytest.raises(InputError, match="only 0 training conversations"):
        _shots(target, Options(shots=1, shots_from=_test(run)), asked)
    turns = _shots(target, Options(shots=3, seed=1), asked)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 3
    assert turns == _shots(target, Options(shots=3, seed=1), asked)
    assert turns != _shots(target, Options(shots=3, seed=2), asked)
    assert not {turn.content for turn in turns} & {conversation.messages[0].content for conversation in asked}


def test_what_is_missing_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"not a run folder.*--data FILE"):
        evaluate(resolve(str(run.final)), Options())
    with pytest.raises(InputError, match=r"--by tpoic: no row of the data has that column; did you mean `topic`"):
        evaluate(resolve(str(run.root)), Options(by="tpoic"))
    bare = RunFolder(tmp_path / "bare")
    bare.root.mkdir()
    bare.config.write_text(run.config.read_text())
    (bare.root / "final").symlink_to(run.final.resolve())
    with pytest.raises(InputError, match=r"neither test.jsonl nor val.jsonl"):
        evaluate(resolve(str(bare.root)), Options())


def test_the_run_folder_gets_numbers_answers_and_a_page(run, found):
    written = save_evaluation(found, run.root)
    assert [path.name for path in written] == ["eval.json", "predictions-base.jsonl", "predictions-tuned.jsonl"]
    saved = json.loads((run.root / "eval.json").read_text(encoding="utf-8"))
    assert saved["columns"][1]["exact_match"]["hits"] == found.columns[1].exact_match.hits
    assert saved["difference"]["only_tuned_right"] == found.difference.only_second
    rows = [json.loads(line) for line in (run.root / "predictions-tuned.jsonl").read_text().splitlines()]
    assert [row["predict"] for row in rows] == [answer.text for answer in found.columns[1].answers]
    page = write_report(run, found).read_text(encoding="utf-8")
    assert f"{found.columns[1].exact_match.share * 100:.1f} %" in page
    assert "偶" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert len(re.findall(r'class="text (?:right|wrong)"', page)) == 24
    assert "config.yaml" in page
    assert "<dt>read</dt><dd>60</dd>" in page
    assert "http" not in re.sub(r"data:image[^\"]*", "", page)  # nothing is fetched
    assert (run.root / "loss.png").is_file()


def test_text_of_strangers_cannot_become_markup(run, found):
    from dataclasses import replace

    answer = found.columns[0].answers[0]
    hostile = replace(answer, text="<script>alert(1)</script>")
    column = replace(found.columns[0], answers=(hostile, *found.columns[0].answers[1:]))
    page = write_report(run, replace(found, columns=(column, found.columns[1]))).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_run_without_an_evaluation_has_a_page_too(run):
    page = write_report(run).read_text(encoding="utf-8")
    assert "not evaluated yet" in page
    assert "Before and after" not in page


def test_empty_proportions_are_dashes():
    from graft.use.result import percent

    assert percent(Proportion(0, 0)) == "-"
    assert percent(Proportion(94, 100)) == "94.0 % (88–97)"


def test_answers_to_questions_with_choices_are_scored_by_choice():
    def answer(text, **meta):
        question = Question("q", (Message("user", "?"),), (), "positive", None, meta)
        return Answer(question, text, None, "stop", 1)

    meta = {"choices": ["positive", "negative"], "label": "positive"}
    answers = [
        answer("Positive.", **meta),
        answer("It is negative", **meta),
        answer("A", **meta, form="letter"),
        answer("positive"),
    ]
    column = column_of("base", "m", 0, answers, (None, None, None), Options())
    assert column.chose_right == (True, False, True), "the last one offers no choices"
    assert (column.right_choice.hits, column.right_choice.total) == (2, 3)
    assert column.exact_match.hits == 1


def test_a_look_at_some_questions_leaves_the_runs_numbers_alone(run, tmp_path, monkeypatch, capsys):
    from graft.cli.main import main

    before = {path.name: path.read_bytes() for path in run.root.iterdir() if path.is_file()}
    words = ["graft", "eval", str(run.root), "--limit", "2", "--max-new-tokens", "3", "--out", str(tmp_path / "some")]
    for given in (words[:-2], words):
        monkeypatch.setattr("sys.argv", given)
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        assert "stay as they are" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.root.iterdir() if path.is_file()} == before
    assert json.loads((tmp_path / "some" / "eval.json").read_text())["questions"] == 2
