"""Settings: typed, overridable, and no typo passes silently."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.config.train import Train, load_train
from graft.errors import ConfigError


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_those_of_the_field():
    settings = load_train(None, ["model=m", "data=d.jsonl"])
    assert (settings.lora.r, settings.lora.alpha, settings.lora.dropout) == (16, 32, 0)
    assert settings.lora.target_modules == "all-linear"
    assert (settings.peak_lr, settings.schedule, settings.warmup) == (2e-4, "cosine", 0.05)
    assert (settings.batch_size, settings.encode.max_length, settings.epochs) == (16, 2048, 3)
    assert (settings.clip, settings.seed) == (1.0, 0)
    assert load_train(None, ["model=m", "data=d", "method=full"]).peak_lr == 2e-5


def test_flags_and_overrides_win_over_the_recipe(tmp_path):
    path = recipe(tmp_path, "model: a\ndata: d.jsonl\nlr: 1e-3\nseed: 1\nlora: {r: 8}\n")
    settings = load_train(path, ["lora.alpha=64", "seed=4"], {"lr": 3e-3, "model": None})
    assert (settings.lr, settings.seed, settings.lora.r, settings.lora.alpha, settings.model) == (3e-3, 4, 8, 64, "a")


def test_data_in_every_form():
    for text in ("data=a.jsonl", "data=[a.jsonl]", "data={path: a.jsonl}"):
        assert load_train(None, ["model=m", text]).data[0].path == "a.jsonl"
    two = load_train(None, ["model=m", "data=[a.jsonl, {path: b.csv, weight: 0.5, format: alpaca}]"]).data
    assert (two[1].weight, two[1].format) == (0.5, "alpaca")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lora: {rank: 8}", "unknown setting `lora.rank`; did you mean `lora.r`?"),
        ("batchsize: 3", "unknown setting `batchsize`; did you mean `batch_size`?"),
        ("max_length: 512", "unknown setting `max_length`; did you mean `encode.max_length`?"),
        ("epochs: many", "`epochs` = 'many'"),
        ("optimizer: adamw8bit", "galore, apollo, sgd; did you mean `adamw_8bit`?"),
        ("checkpointing: selectiv", "did you mean `selective`?"),
        ("lora: 7", "`lora` = 7"),
        ("split: {val: 0.7, test: 0.6}", "val 0.7 + test 0.6 leave nothing to train on"),
        ("lr: yes", "not yes or no"),
        ("seed: 99999999999999999999999", "less than"),
        ("epochs: .inf", "finite"),
        ("model: twice", "`model` stands in line 1 already"),
        ("encode: {date: 2026-13-41}", "a value cannot be read"),
        ("lora: &a {r: *a}", "YAML alias"),
        ("row_tokens: 64", "row_tokens 64 is less than encode.max_length 2048"),
    ],
)
def test_a_mistake_names_its_line_and_the_remedy(tmp_path, line, said):
    path = recipe(tmp_path, f"model: m\n# comment\ndata: d.jsonl\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        load_train(path)
    assert said in str(caught.value)
    if "row_tokens" not in line and "2026-13" not in line:
        assert f"{path}:4" in str(caught.value)


def test_a_date_needs_no_quotes(tmp_path):
    settings = load_train(recipe(tmp_path, "model: m\ndata: d\nencode: {date: 2026-01-31}\n"))
    assert settings.encode.date == "2026-01-31"


@pytest.mark.parametrize("text", ["a: [1", "[" * 5000, "- 1\n- 2", "just words"])
def test_a_broken_recipe_is_one_line(tmp_path, text):
    with pytest.raises(ConfigError, match="recipe"):
        load_train(recipe(tmp_path, text))


def test_a_missing_recipe_and_a_bad_override():
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read"):
        load_train(Path("nowhere.yaml"))
    with pytest.raises(ConfigError, match="key=value"):
        load_train(None, ["novalue"])
    with pytest.raises(ConfigError, match="`model` is needed"):
        load_train(None, ["data=x"])


def test_the_schema_is_json_and_says_what_settings_mean():
    schema = json.dumps(Train.model_json_schema())
    assert "Conversations per optimizer step" in schema


def test_settings_need_no_torch_and_help_is_fast():
    code = "import graft.cli.main, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "graft", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2, "not the target (0.4 s on an idle machine), but a heavy import at start-up would show"


def test_a_recipe_with_bytes_that_no_text_has_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: \0")
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_train(path)
    assert "\n" not in str(caught.value)


def test_names_of_other_tools_are_answered_with_ours():
    from graft.config.base import NAMES_ELSEWHERE, setting_names

    assert set(NAMES_ELSEWHERE.values()) <= set(setting_names(Train))
    assert not set(NAMES_ELSEWHERE) & set(setting_names(Train))
    for theirs, ours in NAMES_ELSEWHERE.items():
        with pytest.raises(ConfigError, match=f"unknown setting `{theirs}`; here it is called `{ours}`"):
            load_train(None, ["model=m", "data=d", f"{theirs}=1"])


@pytest.mark.parametrize(
    ("override", "flags", "said"),
    [("model=b", {"model": "a"}, "--model and model=b: both set `model`"),
     ("batch_size=4", {"batch_size": 8}, "--batch-size and batch_size=4: both"),
     ("data=[x]", {"data": ["y"]}, "--data and data=[x]: both")],
)  # fmt: skip
def test_a_flag_and_an_override_of_the_same_setting_are_refused(override, flags, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_train(None, [override], flags)
    others = [f"{key}=z" for key in ("model", "data") if not override.startswith(key)]
    assert load_train(None, [override, *others], dict.fromkeys(flags)), "a flag that is not given is none"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs=abc", "`epochs` = 'abc': a number is needed"),
        ("batch_size=1.5", "`batch_size` = 1.5: a whole number is needed"),
        ("batch_size=0", "`batch_size` = 0: it must be at least 1"),
        ("split.val=2", "`split.val` = 2: it must be less than 1.0"),
        ("new_tokens=3", "`new_tokens` = 3: a list is needed"),
        ("lora=3", "`lora` = 3: a mapping of settings is needed"),
        ("resume=5", "`resume` = 5: true or false is needed, or text is needed"),
        ("shard_ranks=x", "`shard_ranks` = 'x': a whole number is needed, or it is one of all, host"),
        ("quantize=off", "`quantize` = false: it is one of none, nf4, int8, fp8"),
        ("lerning_rate=1", "unknown setting `lerning_rate`; here it is called `lr`"),
        ("method=lorra", "`method` = 'lorra': it is one of lora, full, freeze, peft; did you mean `lora`?"),
    ],
)
def test_a_wrong_value_is_said_once_in_words_of_settings(override, said):
    with pytest.raises(ConfigError) as caught:
        load_train(None, ["model=x", "data=y", override])
    assert str(caught.value) == f"the command line: {said}"


def test_a_mistake_is_told_of_where_it_was_made(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: a\ndata: b\nbatch_size: 8\nlora: {r: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_train(recipe, ["batch_size=2.5", "lora.alpha=y"])
    assert sorted(str(caught.value).splitlines()) == [
        f"{recipe}:4: `lora.r` = 'x': a whole number is needed",
        "the command line: `batch_size` = 2.5: a whole number is needed",
        "the command line: `lora.alpha` = 'y': a number is needed",
    ]
