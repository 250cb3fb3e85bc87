"""Every template of the library asks about its sample and answers it; promptsource's files do as they are."""

import json
from pathlib import Path

import pytest
from promptsource_rows import ROWS

from graft.data.prompts.draw import Draw
from graft.data.prompts.filters import TemplateFailure
from graft.data.prompts.library import LANGUAGES, Collection, find, for_task, library, read_templates, render_sample
from graft.data.prompts.promptsource import SourceTemplate, answers_with, positions_of
from graft.data.prompts.tasks import TASKS
from graft.data.prompts.template import FORMS, PromptTemplate, keys_of
from graft.errors import ConfigError, InputError

OURS = [(collection, template) for collection in library() for template in collection.templates]


def test_every_task_has_at_least_six_templates_in_every_language():
    assert {(item.task, item.lang) for item in library()} == {(task, lang) for task in TASKS for lang in LANGUAGES}
    assert min(len(item.templates) for item in library()) >= 6
    assert len(OURS) == len({template.name for _, template in OURS}) >= 6 * len(TASKS) * len(LANGUAGES)
    files = {path.name for path in Path(library()[0].file).parent.iterdir()}
    assert files == {f"{task}.yaml" for task in TASKS}


@pytest.mark.parametrize(("collection", "template"), OURS, ids=[template.name for _, template in OURS])
def test_a_template_asks_about_its_sample_and_answers_it(collection: Collection, template: PromptTemplate):
    rendered = render_sample(template, collection)
    task = TASKS[collection.task]
    sample = collection.sample or {}
    assert "{{" not in rendered.prompt + (rendered.target or "")
    assert "\n\n\n" not in rendered.prompt
    for role in task.roles:  # what is asked about stands in the prompt
        shown = str(sample.get(role.name, ""))
        if role.needed and role.name != task.answer:
            assert shown in rendered.prompt or json.dumps(shown, ensure_ascii=False) in rendered.prompt
    assert rendered.target
    if template.form == "json":
        assert json.loads(rendered.target)
    if task.chooses:
        assert rendered.label == sample["label"]
        assert rendered.choices == collection.labels
        if template.form in ("letter", "number"):
            assert (
                rendered.target
                == keys_of(template.form, len(collection.labels))[collection.labels.index(sample["label"])]
            )
        else:
            assert str(sample["label"]) in rendered.target
        listed = all(choice in rendered.prompt for choice in collection.labels)
        assert listed or (template.hidden and template.form in ("word", "json"))
        assert not (listed and template.hidden)
    elif template.form == "text":
        assert rendered.target == sample[task.answer]


def test_the_answer_is_never_in_the_prompt():
    """Classification lists all choices; every other task must not give its answer away."""
    checked = 0
    for collection, template in OURS:
        task = TASKS[collection.task]
        if not task.chooses and collection.task not in ("extraction", "closed-qa"):
            assert collection.sample[task.answer] not in render_sample(template, collection).prompt
            checked += 1
        if task.chooses:
            other = dict(collection.sample) | {
                "label": next(x for x in collection.labels if x != collection.sample["label"])
            }
            draw = Draw(0)
            right, wrong = (template.render(row, collection.labels, draw) for row in (collection.sample, other))
            assert right.prompt == wrong.prompt
            assert right.target != wrong.target
            checked += 1
    assert checked > 100


def test_the_forms_of_a_task_differ():
    for item in library():
        forms = {template.form for template in item.templates}
        assert forms <= set(FORMS)
        if TASKS[item.task].chooses:
            assert {"word", "letter", "json"} <= forms
            hidden = [template for template in item.templates if template.hidden]
            assert 1 <= len(hidden) <= len(item.templates) / 3
        else:
            assert "json" in forms
        prompts = [render_sample(template, item).prompt for template in item.templates]
        assert len(set(prompts)) == len(prompts)


def test_letters_end_at_z():
    lettered = next(t for t in for_task("topic", "en").templates if t.form == "letter")
    many = [f"label {number}" for number in range(27)]
    assert lettered.why_not(many) == "27 choices are more than the 26 letters"
    assert lettered.why_not(many[:26]) is None
    assert keys_of("letter", 3) == ["A", "B", "C"]
    assert keys_of("number", 11)[-1] == "11"


def test_names_are_found_and_mistyped_ones_proposed():
    everything = [template for _, template in OURS]
    assert find(everything, "en/nli/suppose").name == find(everything, "suppose").name
    with pytest.raises(ConfigError, match="did you mean `suppose`"):
        find(everything, "supose")
    with pytest.raises(ConfigError, match=r"json: \d+ templates have that name"):
        find(everything, "json")
    with pytest.raises(ConfigError, match="no such task; did you mean `summarisation`"):
        for_task("summarization", "en")
    with pytest.raises(ConfigError, match="the library has en and zh"):
        for_task("nli", "fr")


# promptsource ---------------------------------------------------------------------------------------------------


def test_all_of_promptsources_files_load_and_every_template_renders_on_a_row_of_its_set(material):
    root = material / "prompt_templates" / "promptsource"
    collections = read_templates(root)
    assert len(collections) == 66
    rendered = 0
    for collection in collections:
        assert collection.failures == ()
        rows = ROWS[str(Path(collection.file).parent.relative_to(root))]
        for template in collection.templates:
            for row in rows:
                try:
                    result = template.render(row, (), Draw(0, template.name))
                except TemplateFailure:
                    continue
                assert result.prompt
                assert result.target
                assert "|||" not in result.prompt + result.target
                assert result.label is None or result.label in result.choices
                rendered += 1
                break
            else:
                raise AssertionError(f"{template.name} renders on none of its rows")
    assert rendered == 575


SOURCE = """\
dataset: made
subset: up
templates:
  1: !Template
    answer_choices: no ||| yes
    id: 1
    jinja: '{{text}} Good? ||| {% if label != -1 %}{{ answer_choices[label] }}{% endif %}'
    metadata: !TemplateMetadata {choices_in_prompt: false, languages: [en], metrics: [Accuracy]}
    name: good
    reference: ''
  2: !Template {answer_choices: null, id: 2, jinja: '{% macro x() %}{% endmacro %}', name: bad, reference: ''}
  3: !Template {answer_choices: '{{ options | join("|||") }}', jinja: '{{text}}|||{{ options[label] }}', name: own}
"""


@pytest.fixture
def made_up(tmp_path) -> Collection:
    path = tmp_path / "templates.yaml"
    path.write_text(SOURCE)
    return read_templates(path)[0]


def test_a_file_is_read_by_promptsources_rules(made_up):
    good, own = made_up.templates
    assert isinstance(good, SourceTemplate)
    assert (good.name, good.lang, good.form, good.fixed_choices) == ("made/up/good", "en", "word", ("no", "yes"))
    assert made_up.failures == ("made/up/bad: line 1: the tag `macro` is not for prompts",)
    result = good.render({"text": "A ||| B", "label": 1}, (), Draw(0))
    assert (result.prompt, result.target, result.label) == ("A ||| B Good?", "yes", "yes")
    assert result.choices == ("no", "yes")
    assert own.variables == {"options", "text", "label"}
    assert own.fixed_choices == ()  # type: ignore[attr-defined]
    assert own.render({"text": "T", "options": ["p", "q"], "label": 0}, (), Draw(0)).choices == ("p", "q")


def test_rows_that_a_template_is_not_for_are_named(made_up):
    good = made_up.templates[0]
    for row, reason in (
        ({"text": "T", "label": -1}, "it gives no answer"),
        ({"text": "T", "label": 7}, "has no element 7"),
        ({"label": 1}, "'text' is undefined"),
    ):
        with pytest.raises(TemplateFailure, match=reason):
            good.render(row, (), Draw(0))


def test_a_file_without_one_good_template_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    path = tmp_path / "t.yaml"
    path.write_text("dataset: d\ntemplates:\n  1: !Template {jinja: '{{', name: a}\n")
    with pytest.raises(InputError, match="none of its 1 templates can be used; the first: d/a: line 1"):
        read_templates(path)
    with pytest.raises(InputError, match="folder without .yaml files"):
        read_templates(empty)


def test_labels_are_found_among_a_templates_answers_by_name_and_never_by_a_wrong_order():
    choices = ("card arrival", "Card linking", "top up")
    assert positions_of(("card_linking", "top_up?", "card_arrival"), choices) == (1, 2, 0)
    assert positions_of(("no", "yes"), ("Negative", "Positive")) == (0, 1)
    assert positions_of(("World", "Sports"), ("World politics", "Sports")) == (0, 1)
    assert positions_of(("Sports", "World"), ("World politics", "Sports")) == (
        "its answers are in another order than the labels (Sports), and World is not among them"
    )
    assert positions_of(("a", "b", "c"), ("x", "y")) == "it has 2 answers for 3 labels"
    assert positions_of(("a", "b"), ()) == (0, 1)  # answers that each row brings
    assert answers_with(("top_up",), choices)
    assert not answers_with(("top", "top_up"), choices)


def test_the_document_lists_every_template():
    text = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")
    table = [line.split("|") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 5]
    marks = {"letter": " (A)", "number": " (1)", "json": " {}"}
    shown = {}
    task = ""
    for cells in table[1:]:
        task = cells[1].split("**")[1] if "**" in cells[1] else task
        shown[task, cells[3].strip()] = [name.strip() for name in cells[4].split(", ")]
    assert shown == {
        (item.task, item.lang): [
            template.name.rsplit("/", 1)[-1] + marks.get(template.form, "") + ("*" if template.hidden else "")
            for template in item.templates
            if isinstance(template, PromptTemplate)
        ]
        for item in library()
    }
