"""Several processes: the same run as one, whatever their number, and no process left hanging."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_conversations, make_example, make_model_folder, write_rows
from together import together
from transformers import AutoModelForCausalLM

from graft.config.train import Train, load_train
from graft.errors import ConfigError, InputError
from graft.model.processes.ranks import Ranks, ranks_from_environment
from graft.runs import RunFolder
from graft.tokens.deal import Prices, deal
from graft.tokens.tree import build_rows
from graft.train.loop import train
from graft.train.processes import launch
from graft.train.processes.together import refuse_with_ranks
from graft.train.step import Stepper


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama-tied", tie_word_embeddings=True)


def settings_for(base: Path, folder: Path, out: str, *overrides: str) -> Train:
    data = folder / "data.jsonl"
    if not data.exists():
        write_rows(data, make_conversations())
    common = [
        f"model={base}", f"data={data}", f"out={folder / out}", "batch_size=8", "epochs=1.5", "lr=5e-3", "device=cpu",
        "split.val=0.2", "encode.max_length=128", "eval_every=3", "trace=true", "row_tokens=128",
    ]  # fmt: skip
    return load_train(None, [*common, *overrides])


def run_as(rank: int, settings: Train) -> str:
    return str(train(settings).root)


def run_on(size: int, settings: Train) -> RunFolder:
    assert together(size, run_as, settings) == [settings.out] * size
    return RunFolder(Path(str(settings.out)))


def numbers(run: RunFolder) -> np.ndarray:
    rows = run.read_metrics()
    assert {row["kind"] for row in rows} == {"train", "val"}
    return np.array([[row["step"], row["loss"], row.get("grad_norm", row.get("token_accuracy"))] for row in rows])


def assert_same_course(one: RunFolder, other: RunFolder) -> None:
    """Loss, gradient norm and accuracy of every step within 1e-6, and the same conversations in every step."""
    np.testing.assert_allclose(numbers(other), numbers(one), rtol=1e-6)
    (file,) = one.final.glob("*model.safetensors")
    wanted, found = load_file(file), load_file(other.final / file.name)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert sorted(path.name for path in one.final.iterdir()) == sorted(path.name for path in other.final.iterdir())


@pytest.mark.parametrize("how", ["lora", "full", "tied lora", "tied full"])
def test_two_processes_are_one(base, tied, tmp_path, how):
    model, method = (tied, how.split()[1]) if " " in how else (base, how)
    alone = train(settings_for(model, tmp_path, "alone", f"method={method}"))
    assert_same_course(alone, run_on(2, settings_for(model, tmp_path, "two", f"method={method}")))


@pytest.mark.parametrize(
    "setting",
    [
        "shard_ranks=1",
        "shard_ranks=2",
        "shard_ranks=host",
        "checkpointing=full",
        "checkpointing=selective",
        "trees=false",
        "ema=0.9",
        "optimizer=lion",
        "optimizer=sgd",
        "optimizer=schedule_free_adamw",
        "loss=dft",
    ],
)
def test_four_processes_are_one_whatever_is_set(base, tmp_path, setting):
    also = [setting]
    if "schedule_free" in setting:
        also.append("schedule=constant")
    alone = train(settings_for(base, tmp_path, "alone", *[text for text in also if "shard" not in text]))
    assert_same_course(alone, run_on(4, settings_for(base, tmp_path, "four", *also)))


def test_a_run_goes_on_with_another_number_of_processes(base, tmp_path):
    alone = train(settings_for(base, tmp_path, "alone", "epochs=3", "save_every=1", "keep_last=99"))
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in alone.checkpoints.iterdir())
    assert steps[-1] >= 9
    begun = RunFolder(tmp_path / "begun")
    shutil.copytree(alone.root, begun.root)
    for size, last in ((2, steps[2]), (4, steps[5]), (1, steps[7])):
        shutil.rmtree(begun.final)
        for step in steps:
            if step > last:
                shutil.rmtree(begun.checkpoints / f"step-{step}", ignore_errors=True)
        settings = settings_for(base, tmp_path, "begun", "epochs=3", "save_every=1", "keep_last=99", "resume=true")
        if size == 1:
            train(settings)
        else:
            run_on(size, settings)
        assert_same_course(alone, begun)
    used = [{row["rank"] for row in step["rows"]} for step in map_lines(begun.trace)]
    assert used[steps[3] - 1] == {0, 1}
    assert used[steps[6] - 1] == {0, 1, 2, 3}
    assert used[-1] == {0}


def map_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_final_folder_is_what_other_programs_load(base, tmp_path):
    run = run_on(2, settings_for(base, tmp_path, "two"))
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.final).eval()
    alone = train(settings_for(base, tmp_path, "alone"))
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), alone.final).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, wanted = tuned(ids).logits, other(ids).logits
        untuned = tuned.get_base_model().eval()
        with tuned.disable_adapter():
            before = untuned(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.01


def test_what_one_process_finds_wrong_is_said_once_and_ends_all(base, tmp_path):
    settings = settings_for(base, tmp_path, "run", "data=nowhere.jsonl")
    found = together(2, run_as, settings)
    assert sorted(text.split(":")[0] for text in found) == ["Elsewhere", "InputError"], found


def other_lr_in_the_second(rank: int, settings: Train) -> str:
    return run_as(rank, settings.model_copy(update={"lr": 5e-3 * (1 + rank)}))


def test_processes_that_were_told_different_things_end(base, tmp_path):
    found = together(2, other_lr_in_the_second, settings_for(base, tmp_path, "two"))
    assert sum("differ in lr: rank 0 on" in text for text in found) == 1, found
    assert "has 0.005, rank 1 on" in "".join(found)
    assert "has 0.01;" in "".join(found)
    assert not (tmp_path / "two" / "final").exists()


def test_a_full_disk_in_the_first_process_ends_all(base, tmp_path):
    settings = settings_for(base, tmp_path, "run")
    found = together(2, run_with_a_full_disk, settings)
    assert sum("cannot be saved" in text for text in found) == 1, found
    assert sum(text.startswith("Elsewhere") for text in found) == 1, found


def run_with_a_full_disk(rank: int, settings: Train) -> str:
    from graft.train.saving import save

    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    save.write_mapping = full  # the optimizer's file, which the rehearsal does not write
    return run_as(rank, settings)


def hang_after_two_steps(rank: int, settings: Train, how: str) -> str:
    from graft.train.processes import watchdog

    watchdog.TICK, watchdog.SILENT, watchdog.LATE, watchdog.FIRST = 0.3, 4.0, 4.0, 60.0
    accumulate = Stepper.accumulate

    def accumulate_or_not(self: Stepper, row: object, number: tuple[int, int], weight: float) -> object:
        if rank == 1 and number[0] == 2:
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            lost_in_thought()
        return accumulate(self, row, number, weight)

    Stepper.accumulate = accumulate_or_not
    return run_as(rank, settings)


def lost_in_thought() -> None:
    time.sleep(100)


@pytest.mark.parametrize("how", ["late", "stopped", "killed"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_process_that_hangs_is_named_and_the_run_ends(base, tmp_path, capfd, how, saved):
    settings = settings_for(base, tmp_path, "run", "save_every=1" if saved else "save_every=99")
    if not saved:
        settings = settings.model_copy(update={"split": settings.split.model_copy(update={"val": 0.0})})
    found = together(2, hang_after_two_steps, settings, how, seconds=30)
    said = capfd.readouterr().err
    if how == "killed":
        assert found[1] == "exit code -9"
        assert "lost the other processes" in said + found[0] or "rank 1" in said, (said, found)
        return
    assert found[0] == f"exit code {5 if saved else 1}", found
    assert "rank 1 on" in said, said
    assert "(pid " in said
    if how == "late":
        assert "lost_in_thought" in said, said
    assert ("--resume" in said) == saved
    assert said.count("The run is ended") == 1


@pytest.mark.parametrize("setting", ["optimizer_in_backward=true optimizer=adafactor"])
def test_what_several_processes_cannot_do_is_refused_before_anything_is_read(base, tmp_path, setting):
    settings = settings_for(base, tmp_path, "run", *setting.split(), "method=full", "clip=null")
    refuse_with_ranks(settings, Ranks())
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        refuse_with_ranks(settings, Ranks(size=2))


def test_the_deal_is_complete_and_even():
    rng = np.random.default_rng(0)
    plain = [make_example(str(n), rng.integers(3, 97, rng.integers(20, 200)), 5) for n in range(64)]
    stem = rng.integers(3, 97, 50)
    shared = [
        make_example(str(n), np.concatenate([stem, rng.integers(3, 97, rng.integers(5, 60))]), 55) for n in range(64)
    ]
    prices = Prices(node=1000, pair=1, target=100)
    for examples in (plain, shared):
        for processes in (1, 2, 3, 4, 8):
            dealt = deal(examples, processes, prices)
            assert sorted(e.conversation for its in dealt for e in its) == sorted(e.conversation for e in examples)
            nodes = [sum(len(row) for row in build_rows(its, 100_000)) for its in dealt]
            assert max(nodes) <= 1.08 * min(nodes), (processes, nodes)
    one, other = (deal(examples, 2, prices) for examples in (plain, plain[::-1]))
    assert [[e.conversation for e in its] for its in one] == [[e.conversation for e in its] for its in other]


def test_answers_to_one_prompt_stay_together():
    rng = np.random.default_rng(0)
    examples = []
    for prompt in range(8):
        stem = rng.integers(3, 97, 100)
        examples += [
            make_example(f"{prompt}-{n}", np.concatenate([stem, rng.integers(3, 97, 10)]), 100) for n in range(4)
        ]
    dealt = deal(examples, 4, Prices())
    assert all(len({e.conversation.split("-")[0] for e in its}) == 2 for its in dealt)


def test_more_processes_than_examples():
    examples = [make_example("a", np.arange(3, 30), 5), make_example("b", np.arange(40, 60), 5)]
    dealt = deal(examples, 4, Prices())
    assert sorted(len(its) for its in dealt) == [0, 0, 1, 1]


@pytest.mark.slow
def test_the_command_line_starts_them_and_passes_their_exit_code_on(base, tmp_path):
    write_rows(tmp_path / "data.jsonl", make_conversations())
    words = [
        sys.executable, "-m", "graft", "train", "--model", str(base), "--data", "data.jsonl", "--out", "run",
        "device=cpu", "max_steps=2", "encode.max_length=128", "--gpus", "2",
    ]  # fmt: skip
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("weights spread over 2") == 1
    assert "Traceback" not in done.stderr
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 2
    assert again.stderr.count("holds a run already") == 1
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("setting", "within"),
    [("precision=bf16", 1e-2), ("precision=fp16", 1e-2), ("quantize=nf4", 1e-5), ("quantize=int8", 1e-2)],
)
def test_other_formats_are_one_run_too(base, tmp_path, setting, within):
    alone = train(settings_for(base, tmp_path, "alone", setting))
    two = run_on(2, settings_for(base, tmp_path, "two", setting))
    np.testing.assert_allclose(numbers(two), numbers(alone), rtol=within)


@pytest.mark.parametrize(
    "kind",
    [
        "{type: LORA, r: 4, target_modules: all-linear, use_dora: true}",
        "{type: LORA, r: 4, target_modules: all-linear, init_lora_weights: pissa}",
        "{type: IA3}",
        "{type: VERA, r: 8, target_modules: [q_proj, o_proj]}",
        "{type: OFT, oft_block_size: 8, target_modules: all-linear}",
        "{type: LOHA, r: 4, target_modules: [q_proj, v_proj]}",
    ],
)
def test_other_adapters_are_one_run_too(base, tmp_path, kind):
    changes = ["method=peft", f"peft={kind}"]
    alone = train(settings_for(base, tmp_path, "alone", *changes))
    assert_same_course(alone, run_on(2, settings_for(base, tmp_path, "two", *changes)))


@pytest.mark.parametrize(
    ("codes", "saved", "wanted", "said"),
    [
        ({0: -9, 1: 143}, True, 5, "rank 0 by SIGKILL"),
        ({0: 143, 1: -9}, False, 1, "rank 1 by SIGKILL"),
        ({0: 5, 1: -9}, False, 1, "There is no checkpoint"),
        ({0: -9, 1: -9}, True, 5, "--resume"),
        ({0: 2, 1: -9}, True, 2, ""),
        ({0: 4, 1: 4}, True, 4, ""),
        ({0: 5, 1: 5}, True, 5, ""),
        ({0: 1, 1: -15}, False, 1, ""),
    ],
)
def test_the_launcher_tells_who_was_killed_from_whom_it_ended_itself(tmp_path, capfd, codes, saved, wanted, said):
    if saved:
        (tmp_path / "checkpoints" / "step-1").mkdir(parents=True)
    assert launch._exit_code(codes, str(tmp_path)) == wanted
    found = capfd.readouterr().err
    assert said in found
    assert bool(found) == bool(said)


def test_an_unwritable_cache_is_refused_where_several_processes_need_it(base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file" / "cache"))
    found = together(2, run_as, settings_for(base, tmp_path, "run"), seconds=60)
    assert sum("GRAFT_CACHE" in text for text in found) == 1, found
    assert sum(text.startswith("Elsewhere") for text in found) == 1, found


def test_a_process_that_fails_before_all_have_met_ends_the_others(base, tmp_path):
    started = time.monotonic()
    found = together(2, fail_alone, settings_for(base, tmp_path, "run"), seconds=60)
    assert time.monotonic() - started < 40
    assert sorted(text.split(":")[0] for text in found) == ["Elsewhere", "InputError"], found


def fail_alone(rank: int, settings: Train) -> str:
    from graft.train.processes import together as steps

    if rank == 1:

        def refuse(key: str) -> None:
            raise InputError("rank 1 cannot read it")

        steps.open_stored = refuse
    return run_as(rank, settings)


def test_a_world_without_a_rank_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but no RANK"):
        ranks_from_environment()
