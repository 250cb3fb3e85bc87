"""Templates of strangers: nothing outside is reached, nothing grows without end, nothing undefined is empty."""

import pytest
import yaml

from graft.data.prompts.draw import Draw
from graft.data.prompts.filters import MOST_SIZE, TemplateFailure
from graft.data.prompts.library import read_templates
from graft.data.prompts.safe_yaml import read_yaml
from graft.data.prompts.sandbox import compiled
from graft.errors import InputError

ROW = {"text": "Hi", "number": 3, "items": [{"a": "x"}, {"a": "y"}], "answers": {"text": ["p", "q"]}}


def render(source: str, **variables) -> str:
    return compiled(source, trim=False).render(ROW | variables, Draw(0))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ text }}{% if number > 2 %}!{% endif %}", "Hi!"),
        ("{% for item in items %}{{ loop.index }}{{ item.a }} {% endfor %}", "1x 2y "),
        ("{% for a, b in zip(items, 'st') %}{{ a['a'] ~ b }}{% endfor %}", "xsyt"),
        ("{{ items | map(attribute='a') | join(', ') }}", "x, y"),
        ("{{ items | join('-', attribute='a') }}", "x-y"),
        ("{{ items | selectattr('a', 'equalto', 'y') | list | length }}", "1"),
        ("{{ answers.text[0] }}{{ text.split('i')[0].lower() }}", "ph"),
        ("{{ nothing | default('none') }}", "none"),
        ('{{ {"键": "<é>"} | tojson }}', '{"键": "<é>"}'),
        ("{% set l = [0] %}{{ l.pop() | replace(0, '') }}{% set _ = l.append(7) %}{{ l }}", "[7]"),
        ("{{ ['a', 'b', 'a'] | most_frequent }}{{ ['a', 'b'] | most_frequent | length }}", "['a']2"),
        ("{{ 2 * 3 + 1 }} {{ 2 ** 10 }} {{ [1] + [2] }} {{ 7 % 4 }}", "7 1024 [1, 2] 3"),
        ("{% set ns = namespace(n=0) %}{% for i in items %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_what_prompts_need(source, expected):
    assert render(source) == expected


def test_choice_is_drawn_by_the_row_and_nothing_else():
    source = "{{ range(1000) | choice }}"
    template = compiled(source)
    assert template.render({}, Draw(1)) == template.render({}, Draw(1))
    assert len({template.render({}, Draw(seed)) for seed in range(20)}) > 15


def test_changes_inside_stay_inside():
    rows = {"items": [1, 2]}
    compiled("{% set _ = items.append(3) %}{{ items.pop() }}").render(rows, Draw(0))
    assert rows == {"items": [1, 2]}


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ text.__init__.__globals__ }}",
        "{{ range.__globals__ }}",
        "{{ zip.__self__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ text | attr('__class__') }}",
        "{{ [text] | map('attr', '__class__') | list }}",
        "{{ text.format('x') }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{a.__class__}'.format_map({'a': text}) }}",
        "{{ text.encode() }}",
        "{{ items.clear() }}",
        "{{ answers.update({'a': 1}) }}",
        "{{ cycler.__init__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ joiner }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% call text() %}{% endcall %}",
        "{% set x %}y{% endset %}",
        "{% filter upper %}x{% endfilter %}",
        "{% block b %}{% endblock %}",
    ],
)
def test_nothing_outside_is_reached(source):
    with pytest.raises(TemplateFailure):
        render(source)


def test_names_that_only_look_into_a_value_give_nothing_of_it():
    assert render("{{ [text] | map(attribute='__class__') | list }}") == "[Undefined]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ [1] * 10 ** 10 }}",
        "{{ 10 ** 99999 }}",
        "{{ '%999999999d' % 3 }}",
        "{{ '%999999999d' is divisibleby 3 }}",
        "{{ '%999999999d' is odd }}",
        "{{ 'a' | center(999999999) }}",
        "{{ 'a' | indent(999999999) }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ 'a'.zfill(999999999) }}",
        "{{ '%999999999d' | format(3) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 1000000).join(range(99)) }}",
        "{{ [1] | batch(999999999, 'x') | list }}",
        "{{ lipsum(n=100000) }}",
        "{{ range(10 ** 9) | list }}",
        "{{ {'a': 1} | tojson(indent=999999999) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(50000) %}{{ text.lower() }}{{ text.upper() }}{{ text | trim }}{% endfor %}",
        "{% for a in range(9000) %}{{ 'a' * 1000 }}{% endfor %}",
        "{% set ns = namespace(a='xx') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{% set ns = namespace(a='xx') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}",
        "{% set ns = namespace(a={}) %}{% for i in range(99) %}{% set ns.a = {'p': ns.a, 'q': ns.a} %}{% endfor %}",
        "{% for k in [[1]] recursive %}{{ loop([k]) }}{% endfor %}",
    ],
)
def test_nothing_grows_without_end(source):
    with pytest.raises(TemplateFailure):
        render(source)


def test_a_list_that_grows_while_it_is_walked_is_ended_by_work_not_by_time(monkeypatch):
    monkeypatch.setattr("graft.data.prompts.sandbox.MOST_SECONDS", 1e9)  # no machine's speed decides
    with pytest.raises(TemplateFailure, match="elements to go through"):
        render("{% set x = [1] %}{% for i in x %}{{ x.append(1) }}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 1e999 }}", "inf"),  # Jinja writes the number into Python as a name
        ("{{ text | truncate(-5) }}", "expected length"),  # an assertion of Jinja's
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "nested too deeply"),
        ("{{ " + "1" * 5000 + " }}", "4300"),
    ],
)
def test_errors_of_all_kinds_are_failures_of_the_template(source, said):
    with pytest.raises(TemplateFailure, match=said):
        render(source)


def test_a_long_document_is_no_bomb():
    document = "word " * 100_000
    assert render("{{ text | trim }}", text=document) == document.strip()
    with pytest.raises(TemplateFailure, match=f"more than {MOST_SIZE:,}"):
        render("{{ text }}{{ text }}", text="x" * (MOST_SIZE - 1))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ missing }}", "'missing' is undefined"),
        ("{{ answers.missing }}", "has no attribute 'missing'"),
        ("{{ items[9] }}", "has no element 9"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for x in number %}{% endfor %}", "not iterable"),
        ("{{ text", "line 1: unexpected end of template"),
        ("a\n{{ text | nope }}", "line 2: No filter named 'nope'"),
        ("{{ [] | choice }}", "`choice` of nothing"),
        ("x" * 200_000, "has 200,000 characters"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    ],
)
def test_failures_say_why(source, reason):
    with pytest.raises(TemplateFailure) as failure:
        render(source)
    assert reason in str(failure.value)


# YAML -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [ls]",
        "a: !!python/name:os.system",
        "!!python/object/new:object []",
        "a: !Other {b: 1}",
        "a: !Template [1, 2]",
        "a: &x [1]\nb: [*x, *x]",
        "a: [1",
        "a: 2020-13-45",
        "[" * 200_000,
        "- " * 3000,
    ],
)
def test_only_plain_values_come_out_of_yaml(tmp_path, text):
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"t\.yaml"):
        read_yaml(path)


def test_the_two_tags_are_mappings(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text("a: !Template\n  b: !TemplateMetadata {c: 1}\n")
    assert read_yaml(path) == {"a": {"b": {"c": 1}}}
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(path.read_text())  # the plain safe loader knows neither: the tags were really there


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"templates": None}, "no template file"),
        ({"tusk": "x"}, "unknown key `tusk`; did you mean `task`"),
        ({"lang": None}, "`lang` is needed"),
        ({"templates": ["x"]}, "template 1: expected name, form, prompt and target"),
        ({"templates": [{"name": "a", "prompt": "x"}]}, "template 1: `target` is needed"),
        ({"templates": [{"name": "a", "prompt": "{{ x", "target": "y"}]}, r"template 1 \(a\): prompt: line 1"),
        ({"templates": [{"name": "a", "form": "wird", "prompt": "x", "target": "y"}]}, "did you mean `word`"),
        ({"templates": [{"name": "a", "promt": "x"}]}, "did you mean `prompt`"),
        ({"templates": [{"name": "a", "prompt": p, "target": "y"} for p in "xz"]}, "stands above already"),
        ({"labels": 5}, "`labels` is a list"),
        ({"sample": 7}, "`sample` is a row"),
        ({"templates": [{"name": "a", "prompt": "x", "target": "y", "hidden": [1]}]}, "`hidden` is text"),
    ],
)
def test_mistakes_in_a_template_file_are_named(tmp_path, change, said):
    path = tmp_path / "own.yaml"
    good = {"task": "t", "lang": "en", "templates": [{"name": "a", "prompt": "{{ x }}", "target": "y"}]}
    path.write_text(yaml.safe_dump(good))
    assert read_templates(path)[0].templates[0].name == "en/t/a"
    path.write_text(yaml.safe_dump(good | change))
    with pytest.raises(InputError, match=said):
        read_templates(path)


def test_metadata_of_promptsource_that_is_no_list_says_nothing(tmp_path):
    path = tmp_path / "source.yaml"
    item = {"name": "n", "jinja": "{{ text }} ||| y", "metadata": {"languages": {"a": 1}, "metrics": 3}}
    path.write_text(yaml.safe_dump({"dataset": "d", "templates": {"1": item}}))
    (template,) = read_templates(path)[0].templates
    assert (template.name, template.lang, template.metrics) == ("d/n", "en", ())
