"""Runs: they learn, save what other programs load, and continue exactly where they were."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_conversations, make_model_folder, write_rows
from tiny_runs import assert_same_run, final_weights, losses, settings_for
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel, BloomConfig, GPT2Config

from graft.config.train import Train, load_train
from graft.errors import DataRefused, Diverged, InputError, Interrupted
from graft.runs import RunFolder
from graft.train import fit as fit_module
from graft.train import loop
from graft.train import validate as validate_module
from graft.train.loop import train
from graft.train.saving import checkpoint as checkpoint_module
from graft.train.saving import save as save_module
from graft.train.step import RowSums, Stepper
from graft.train.updates.schedule import learning_rate


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def logits_of(folder: Path, base: Path) -> torch.Tensor:
    """Logits by plain transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base if (folder / "adapter_config.json").exists() else folder)
    if (folder / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_and_its_folder_is_complete(base, tmp_path, method):
    run = train(settings_for(base, tmp_path, f"method={method}", "trace=true", "epochs=4"))
    rows = run.read_metrics()
    validations = [row for row in rows if row["kind"] == "val"]
    assert [row["step"] for row in validations] == [0, 3, 6, 9, 12, 15, 16]
    assert validations[-1]["loss"] < 0.9 * validations[0]["loss"]
    assert 0 < validations[-1]["token_accuracy"] <= 1
    assert validations[0]["tokens"] == validations[-1]["tokens"] > 0
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 17))
    shared = [row["sharing"] for row in steps]
    assert min(shared) >= 1
    assert sum(shared) / len(shared) > 1.05, "a second turn goes on where the first one ended"
    assert all(row["tokens_trained"] > 0 and row["tokens_per_s"] > 0 and row["memory_gib"] > 0 for row in steps)
    for name in ("config.yaml", "environment.json", "rejects.jsonl", "trace.jsonl", "data/val.jsonl"):
        assert (run.root / name).is_file(), name
    config = yaml.safe_load(run.config.read_text())
    assert config["encode"]["date"]
    assert config["lr"] == 5e-3
    trace = [json.loads(line) for line in run.trace.read_text().splitlines()]
    of_epoch = [name for line in trace[:4] for name in line["conversations"]]
    assert len(of_epoch) == len(set(of_epoch)), "each conversation once per epoch"
    assert len([*run.checkpoints.iterdir()]) <= 3, "two newest and the best"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_final_loads_elsewhere_with_the_live_models_logits(base, tmp_path, method, monkeypatch):
    live = {}
    finish = loop.Fit.finish

    def look(fit):
        finish(fit)
        fit.lm.base.set_attn_implementation("sdpa")
        fit.lm.model.eval()
        with torch.no_grad():
            live["logits"] = fit.lm.model(torch.arange(3, 40)[None]).logits

    monkeypatch.setattr(loop.Fit, "finish", look)
    run = train(settings_for(base, tmp_path, f"method={method}"))
    found = logits_of(run.final, base)
    assert (found - live["logits"]).abs().max() < 1e-5
    assert (found - logits_of(base, base)).abs().max() > 1e-3, "the tuned model must differ from the base"
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    assert tokenizer.chat_template
    generation = json.loads((run.final / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in [generation["eos_token_id"], *[generation["eos_token_id"]]]
    newest = max(run.checkpoints.iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert torch.equal(logits_of(newest, base), found), "a checkpoint is a model folder too"


def test_row_budget_and_trees_do_not_change_the_run(base, tmp_path):
    whole = train(settings_for(base, tmp_path, "lora.dropout=0", out="whole"))
    small = train(settings_for(base, tmp_path, "lora.dropout=0", "row_tokens=128", out="small"))
    alone = train(settings_for(base, tmp_path, "lora.dropout=0", "trees=false", out="alone"))
    for other in (small, alone):
        for (_, loss, lr, _), (_, wanted, wanted_lr, _) in zip(losses(other), losses(whole), strict=True):
            assert loss == pytest.approx(wanted, abs=2e-5)
            assert lr == wanted_lr
    assert alone.read_metrics()[1]["sharing"] == 1
    assert whole.read_metrics()[1]["sharing"] > 1.2


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("at_row", [1, 9])
def test_an_interrupted_run_continues_to_the_same_bits(base, tmp_path, monkeypatch, method, at_row):
    options = (f"method={method}", "row_tokens=128", "eval_every=2")
    handler = signal.getsignal(signal.SIGINT)
    unbroken = train(settings_for(base, tmp_path, *options, out="unbroken"))
    accumulate, count = Stepper.accumulate, []

    def interrupt(stepper, *args):
        count.append(1)
        if len(count) == at_row:
            os.kill(os.getpid(), signal.SIGINT)
        return accumulate(stepper, *args)

    monkeypatch.setattr(Stepper, "accumulate", interrupt)
    with pytest.raises(Interrupted, match="graft train --resume"):
        train(settings_for(base, tmp_path, *options, out="broken"))
    monkeypatch.setattr(Stepper, "accumulate", accumulate)
    assert signal.getsignal(signal.SIGINT) is handler, "the handlers are given back"
    resumed = train(settings_for(base, tmp_path, *options, "resume=true", out="broken"))
    assert_same_run(unbroken, resumed)


def test_a_killed_run_continues_to_the_same_bits(base, tmp_path):
    """SIGKILL at an arbitrary moment; the metrics that were written after the checkpoint are written again."""
    options = ("epochs=6", "save_every=2", "eval_every=50", "batch_size=4")
    unbroken = train(settings_for(base, tmp_path, *options, out="unbroken"))
    settings = settings_for(base, tmp_path, *options, out="killed")
    code = (
        "import json, sys; from graft.config.train import Train; from graft.train.loop import train\n"
        "train(Train.model_validate_json(sys.argv[1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, settings.model_dump_json()], stderr=subprocess.DEVNULL)
    run = RunFolder(tmp_path / "killed")
    deadline = time.time() + 120
    while len(run.read_metrics()) < 6 and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "the run must still be going when it is killed"
    process.kill()
    process.wait()
    resumed = train(settings.model_copy(update={"resume": True}))
    assert_same_run(unbroken, resumed)


def test_a_damaged_checkpoint_is_passed_over(base, tmp_path):
    run = train(settings_for(base, tmp_path, "save_every=1", "keep_last=3"))
    unbroken = final_weights(run)
    newest = checkpoint_module.newest_checkpoint(run)
    assert newest is not None
    file = newest / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    older = checkpoint_module.newest_checkpoint(run)
    assert older is not None
    assert checkpoint_module.step_of(older) == checkpoint_module.step_of(newest) - 1
    shutil.rmtree(run.final)
    again = train(settings_for(base, tmp_path, "save_every=1", "keep_last=3", "resume=true"))
    assert all(torch.equal(final_weights(again)[name], value) for name, value in unbroken.items())


def test_a_full_disk_loses_nothing(base, tmp_path, monkeypatch):
    write_mapping, calls = save_module.write_mapping, []

    def full(path, tensors):
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_mapping(path, tensors)

    monkeypatch.setattr(save_module, "write_mapping", full)
    with pytest.raises(
        InputError, match=r"step-6: cannot be saved \(No space left on device.*step-4 is complete"
    ) as caught:
        train(settings_for(base, tmp_path, "save_every=2", "eval_every=50"))
    assert "graft train --resume" in str(caught.value)
    run = RunFolder(tmp_path / "run")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-2", "step-4"]
    resumed = train(settings_for(base, tmp_path, "save_every=2", "eval_every=50", "resume=true"))
    monkeypatch.setattr(save_module, "write_mapping", write_mapping)
    assert_same_run(train(settings_for(base, tmp_path, "save_every=2", "eval_every=50", out="unbroken")), resumed)


def test_changed_settings_are_refused_before_the_data_is_read(base, tmp_path, monkeypatch):
    run = train(settings_for(base, tmp_path))
    monkeypatch.setattr("graft.train.processes.together.prepare", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(InputError, match=r"max_steps was None, is 99.*--init-from"):
        train(settings_for(base, tmp_path, "resume=true", "max_steps=99"))
    checkpoint = checkpoint_module.newest_checkpoint(run)
    with pytest.raises(InputError, match="seed was 0, is 5"):
        train(settings_for(base, tmp_path, f"resume={checkpoint}", "seed=5"))
    with pytest.raises(InputError, match=r"encode\.template was None, is alpaca; encode\.max_length was \d+, is 99\."):
        train(settings_for(base, tmp_path, f"resume={checkpoint}", "encode.template=alpaca", "encode.max_length=99"))


def test_a_resumed_run_must_be_the_same_run(base, tmp_path):
    train(settings_for(base, tmp_path))
    with pytest.raises(InputError, match="holds a run already"):
        train(settings_for(base, tmp_path))
    with pytest.raises(InputError, match="seed was 0, is 5"):
        train(settings_for(base, tmp_path, "resume=true", "seed=5"))
    with pytest.raises(InputError, match=r"has changed: lora\.r was 16, is 3; lora\.dropout was 0\.1, is 0\.5\. Undo"):
        train(settings_for(base, tmp_path, "resume=true", "lora.r=3", "lora.dropout=0.5"))
    write_rows(tmp_path / "data.jsonl", make_conversations(41))
    with pytest.raises(InputError, match="encoded data was"):
        train(settings_for(base, tmp_path, "resume=true"))
    with pytest.raises(InputError, match="no run to resume"):
        train(settings_for(base, tmp_path, "resume=true", out="nowhere"))


@pytest.mark.parametrize("at_row", [2, 8])
def test_a_stop_in_the_middle_of_a_validation_is_heard_and_the_validation_made_up_for(
    base, tmp_path, monkeypatch, at_row
):
    options = ("row_tokens=128", "eval_every=2", "patience=50")
    unbroken = train(settings_for(base, tmp_path, *options, out="unbroken"))
    row_loss, count = validate_module.row_loss, []

    def interrupt(*args):
        count.append(1)
        if len(count) == at_row:
            os.kill(os.getpid(), signal.SIGTERM)
        return row_loss(*args)

    monkeypatch.setattr(validate_module, "row_loss", interrupt)
    with pytest.raises(Interrupted):
        train(settings_for(base, tmp_path, *options, out="broken"))
    assert len(count) == at_row, "the rest of the validation was not computed"
    monkeypatch.setattr(validate_module, "row_loss", row_loss)
    resumed = train(settings_for(base, tmp_path, *options, "resume=true", out="broken"))
    assert_same_run(unbroken, resumed)
    assert resumed.read_metrics()[0]["kind"] == "val"
    assert [_without_speed(row) for row in resumed.read_metrics()] == [
        _without_speed(row) for row in unbroken.read_metrics()
    ]


def _without_speed(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("tokens_per_s", "memory_gib")}


def test_a_run_can_be_resumed_from_another_folder(base, tmp_path, monkeypatch):
    """Recipes name files from where they are run; the run folder must not depend on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(base)
    settings_for(base, tmp_path)  # writes the data
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"facts": {"file_name": "data.jsonl", "formatting": "openai"}})
    )
    names = ["model=model", "data=dataset_info.json#facts", "out=run"]
    train(settings_for(base, tmp_path, *names, "max_steps=4", "save_every=2"))
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = load_train(tmp_path / "run" / "config.yaml", [], {"resume": True, "out": str(tmp_path / "run")})
    assert train(again).final.is_dir()
    assert saved["data"][0]["path"] == str(tmp_path / "dataset_info.json#facts")


def test_a_model_folder_is_no_place_for_a_run(base, tmp_path):
    before = sorted(path.name for path in base.iterdir())
    with pytest.raises(InputError, match="holds a model; choose another out=DIR"):
        train(settings_for(base, tmp_path, f"out={base}"))
    assert sorted(path.name for path in base.iterdir()) == before


def test_an_adapter_of_another_rank_is_said(base, tmp_path, capsys):
    first = train(settings_for(base, tmp_path, "lora.r=4", "max_steps=1", out="first"))
    train(settings_for(base, tmp_path, f"init_from={first.final}", "max_steps=1", "lora.r=2", out="second"))
    assert "its adapter has r 4, alpha 32, dropout 0.1, which stays; the settings say r 2" in capsys.readouterr().err


def test_init_from_takes_the_weights_and_nothing_else(base, tmp_path):
    first = train(settings_for(base, tmp_path, out="first"))
    second = train(settings_for(base, tmp_path, f"init_from={first.final}", "lr=1e-9", out="second"))
    start = [row for row in second.read_metrics() if row["kind"] == "val"][0]
    end = [row for row in first.read_metrics() if row["kind"] == "val"][-1]
    assert start["loss"] == pytest.approx(end["loss"], abs=1e-6)
    assert losses(second)[0][0] == 1


def test_a_run_that_diverges_stops_and_keeps_what_was_good(base, tmp_path):
    with pytest.raises(Diverged, match="not finite for the 5th step in a row") as caught:
        train(
            settings_for(
                base, tmp_path, "method=full", "lr=1e30", "clip=null", "epochs=5", "save_every=1", "eval_every=100"
            )
        )
    assert "Lower lr" in str(caught.value)
    run = RunFolder(tmp_path / "run")
    kept = checkpoint_module.newest_checkpoint(run)
    if kept is not None:
        assert all(bool(torch.isfinite(value).all()) for value in load_file(kept / "model.safetensors").values())
    rows = [row for row in run.read_metrics() if row["kind"] == "train"]
    assert math.isfinite(rows[0]["loss"])
    assert not any(row["loss"] == 0.0 for row in rows)


def test_patience_stops_and_final_holds_the_best(base, tmp_path):
    run = train(settings_for(base, tmp_path, "lr=0.2", "epochs=20", "eval_every=2", "patience=2", "lora.dropout=0"))
    validations = [row for row in run.read_metrics() if row["kind"] == "val"]
    best = min(validations, key=lambda row: row["loss"])
    assert validations[-1]["step"] < 80
    assert validations.index(best) == len(validations) - 3
    kept = load_file(run.checkpoints / f"step-{best['step']}" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in final_weights(run).items())
    assert best["step"] > 0


def test_patience_gives_the_untrained_weights_back_where_training_only_hurts(base, tmp_path):
    run = train(
        settings_for(base, tmp_path, "method=full", "lr=9", "warmup=0", "epochs=20", "eval_every=1", "patience=2")
    )
    validations = [row for row in run.read_metrics() if row["kind"] == "val"]
    assert [row["step"] for row in validations] == [0, 1, 2]
    assert (logits_of(run.final, base) - logits_of(base, base)).abs().max() < 1e-5


def test_a_signal_in_the_middle_of_an_update_does_not_lose_or_repeat_it(base, tmp_path, monkeypatch):
    unbroken = train(settings_for(base, tmp_path, "log_every=3", out="unbroken"))
    update, count = Stepper.update, []

    def interrupt(stepper, *args):
        count.append(1)
        sums = update(stepper, *args)
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return sums

    monkeypatch.setattr(Stepper, "update", interrupt)
    with pytest.raises(Interrupted, match="after step 4"):
        train(settings_for(base, tmp_path, "log_every=3", out="broken"))
    monkeypatch.setattr(Stepper, "update", update)
    resumed = train(settings_for(base, tmp_path, "log_every=3", "resume=true", out="broken"))
    assert losses(unbroken) == losses(resumed)
    assert [row[0] for row in losses(resumed)] == [3, 6, 8]
    assert all(torch.equal(final_weights(unbroken)[name], value) for name, value in final_weights(resumed).items())


def test_bloom_with_the_settings_of_domain_bloom_resumes_bit_for_bit(tmp_path, monkeypatch):
    base = make_model_folder(tmp_path / "bloom", BloomConfig, n_layer=2, n_head=4)
    options = (
        "lora.r=8", "lora.alpha=16", "lora.dropout=0.1", "lr=1e-4", "batch_size=5", "save_every=2",
        "lora.target_modules=[query_key_value, dense, dense_h_to_4h, dense_4h_to_h]",
    )  # fmt: skip
    unbroken = train(settings_for(base, tmp_path, *options, out="unbroken"))
    update, count = Stepper.update, []

    def crash(stepper, *args):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return update(stepper, *args)

    monkeypatch.setattr(Stepper, "update", crash)
    with pytest.raises(KeyboardInterrupt):
        train(settings_for(base, tmp_path, *options, out="broken"))
    monkeypatch.setattr(Stepper, "update", update)
    assert_same_run(unbroken, train(settings_for(base, tmp_path, *options, "resume=true", out="broken")))


def test_a_source_with_weight_two_is_seen_twice(base, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", make_conversations(8))
    other = write_rows(tmp_path / "b.jsonl", [row | {"id": "b" + row["id"]} for row in make_conversations(8)])
    settings = settings_for(base, tmp_path, "split.val=0", "epochs=1", "trace=true")
    settings = Train.model_validate(settings.model_dump() | {"data": [{"path": data, "weight": 2}, other]})
    run = train(settings)
    names = [
        n
        for line in run.trace.read_text().splitlines()
        for row in json.loads(line)["rows"]
        for n in row["conversations"]
    ]
    assert sum(name.startswith("b") for name in names) == 8
    assert len({name for name in names if not name.startswith("b")}) == 8
    weights = sum(row["tokens_trained"] for row in run.read_metrics() if row["kind"] == "train")
    assert weights > 0


def test_too_many_rejects_refuse_the_run_before_any_weight_is_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "load_for_training", lambda *_: pytest.fail("weights were read"))
    rows = make_conversations(20)
    rows[3]["messages"] = rows[3]["messages"][:1]
    write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataRefused, match="1 of 20"):
        train(settings_for(base, tmp_path))
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], "assistant" in row["reason"]) for row in rejects] == [(4, True)]


def test_mistakes_are_named_before_any_weight_is_read(base, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_module, "load_for_training", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match="nowhere"):
        train(settings_for(base, tmp_path, "data=nowhere.jsonl"))
    with pytest.raises(DataRefused, match="too long|max_length"):
        train(settings_for(base, tmp_path, "encode.max_length=8"))
    small = make_model_folder(tmp_path / "small")
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 60}
    (small / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="only 60 embeddings"):
        train(settings_for(small, tmp_path))


def test_an_unwritable_run_folder_is_named(base, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write there"):
        train(settings_for(base, tmp_path, f"out={tmp_path / 'file' / 'run'}"))


def test_the_learning_rate_is_a_pure_function_of_the_step():
    settings = load_train(None, ["model=m", "data=d", "lr=1.0", "warmup=0.1", "min_lr_ratio=0.2"])
    rates = [learning_rate(step, 100, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    linear = load_train(None, ["model=m", "data=d", "lr=1.0", "warmup=0", "schedule=linear"])
    assert [learning_rate(step, 4, linear) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    constant = load_train(None, ["model=m", "data=d", "lr=1.0", "schedule=constant"])
    assert learning_rate(99, 100, constant) == 1.0


def test_a_table_of_positions_that_is_too_short_is_named(tmp_path):
    base = make_model_folder(tmp_path / "gpt2", GPT2Config, n_embd=32, n_layer=2, n_head=4, max_position_embeddings=24)
    with pytest.raises(InputError, match="has positions for 24 tokens, the longest example has"):
        train(settings_for(base, tmp_path))


def test_a_few_bad_steps_are_skipped_and_many_stop_the_run(base, tmp_path, monkeypatch):
    accumulate, count = Stepper.accumulate, []

    def spoil(until):
        def spoilt(stepper, *args):
            count.append(1)
            sums = accumulate(stepper, *args)
            return RowSums(sums.loss * math.nan, sums.nll) if len(count) <= until else sums

        return spoilt

    monkeypatch.setattr(Stepper, "accumulate", spoil(2))
    run = train(settings_for(base, tmp_path, out="two"))
    assert run.read_metrics()[-2]["skipped"] == 2
    count.clear()
    monkeypatch.setattr(Stepper, "accumulate", spoil(99))
    with pytest.raises(Diverged, match="not finite for the 5th step in a row"):
        train(settings_for(base, tmp_path, out="many"))
    count.clear()
    with pytest.raises(Diverged, match="all 2 steps were skipped"):
        train(settings_for(base, tmp_path, "max_steps=2", out="all"))


def test_a_refused_resume_leaves_the_run_as_it_was(base, tmp_path):
    run = train(settings_for(base, tmp_path))
    before = run.config.read_bytes()
    with pytest.raises(InputError, match="lr was"):
        train(settings_for(base, tmp_path, "resume=true", "lr=1"))
    assert run.config.read_bytes() == before
    train(load_train(run.config, ["resume=true"]))


def test_other_weights_under_the_same_name_are_not_the_same_run(tmp_path):
    base = make_model_folder(tmp_path / "base")
    train(settings_for(base, tmp_path))
    make_model_folder(tmp_path / "base", tie_word_embeddings=True)
    with pytest.raises(InputError, match="model's weights was"):
        train(settings_for(base, tmp_path, "resume=true"))


def test_an_encoder_is_refused(tmp_path):
    folder = make_model_folder(tmp_path / "llama")
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.architectures = ["BertLMHeadModel"]
    BertLMHeadModel(config).save_pretrained(folder)
    with pytest.raises(InputError, match="no causal language model"):
        train(settings_for(folder, tmp_path))


def test_each_set_counts_its_own_rejects(base, tmp_path):
    val = write_rows(tmp_path / "val.jsonl", [*make_conversations(2), {"messages": [{"role": "user", "content": "?"}]}])
    with pytest.raises(DataRefused, match="1 of 3 rows"):
        train(settings_for(base, tmp_path, f"val={val}"))
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"]) for row in rejects] == [("val.jsonl", 3)]
