"""What a run keeps: complete or absent, equal to memory to the bit, never less than it had, whatever the disk does."""

import errno
import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model_folder
from tiny_runs import alone, assert_same_run, settings_for

from graft.cli.train import _run_to_resume
from graft.errors import InputError, Interrupted
from graft.model.files import save as model_save
from graft.model.files import tensor_file
from graft.model.files.tensor_file import FORMATS, Spec, find_difference, in_file_order, write_mapping, write_tensors
from graft.runs import RunFolder, newest_run, write_manifest
from graft.train import fit as fit_module
from graft.train import loop
from graft.train.loop import Fit, train
from graft.train.open_run import open_run
from graft.train.prepare import prepare
from graft.train.saving import rehearse, save, space
from graft.train.saving.background import Background
from graft.train.saving.checkpoint import (
    checkpoints,
    clear_up,
    find_damage,
    has_optimizer,
    load_state,
    newest_checkpoint,
    prune,
    step_of,
)
from graft.train.step import Stepper
from graft.types import Example


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def fit_for(base, tmp_path, *overrides, out: str = "run") -> Fit:
    """A run in memory that has made one update."""
    settings, run = open_run(settings_for(base, tmp_path, *overrides, out=out))
    fit = Fit(settings, run, prepare(settings, run), alone(settings, run))
    assert fit._update(0, threading.Event()) is not None
    fit.state = replace(fit.state, step=1)
    return fit


# Tensor files


def test_a_tensor_file_is_what_the_safetensors_package_reads(tmp_path):
    made = {f"{name}": torch.arange(7).to(dtype) for dtype, name in FORMATS.items() if "F8" not in name}
    made |= {"fp8": torch.ones(3).to(torch.float8_e4m3fn), "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    made |= {"turned": torch.arange(6.0).reshape(2, 3).T, "bf16 wide": torch.randn(5, 3, dtype=torch.bfloat16)}
    write_mapping(tmp_path / "file", made)
    read = load_file(tmp_path / "file")
    assert read.keys() == made.keys()
    for name, value in made.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name].float(), value.float()), name
    assert find_difference([tmp_path / "file"], made) is None


def test_tensors_may_come_one_by_one_and_must_be_as_announced(tmp_path):
    specs = in_file_order([Spec("a", torch.int8, (3,)), Spec("b", torch.float32, (2, 2))])
    assert [spec.name for spec in specs] == ["b", "a"]
    write_tensors(tmp_path / "file", specs, iter([torch.eye(2), torch.ones(3, dtype=torch.int8)]))
    assert torch.equal(load_file(tmp_path / "file")["b"], torch.eye(2))
    with pytest.raises(ValueError, match="instead of"):
        write_tensors(tmp_path / "file", specs, iter([torch.eye(3), torch.ones(3, dtype=torch.int8)]))
    with pytest.raises(ValueError, match="shorter"):
        write_tensors(tmp_path / "file", specs, iter([torch.eye(2)]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda made: made.pop("a"), "1 of 2 tensors are missing, for example a"),
        (lambda made: made.update(c=torch.ones(1)), "holds c, which nothing was to be saved as"),
        (lambda made: made.update(a=torch.ones(1)), r"a is \[1\] torch.float32 in file, \[4\] torch.float32 in memory"),
        (lambda made: made.update(a=made["a"].double()), "a is .* torch.float64"),
        (lambda made: made["a"].__setitem__(2, 7.000001), "a has other numbers in file than in memory"),
    ],
)
def test_any_difference_between_file_and_memory_is_found(tmp_path, change, said, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 5)  # a tensor is read back in several pieces
    live = {"a": torch.tensor([1.0, float("nan"), 7.0, -0.0]), "b": torch.ones(2)}
    made = {name: value.clone() for name, value in live.items()}
    write_mapping(tmp_path / "file", made)
    assert find_difference([tmp_path / "file"], live) is None, "NaN is equal to itself in bits"
    change(made)
    write_mapping(tmp_path / "file", made)
    assert re.search(said, find_difference([tmp_path / "file"], live) or "")


# Checkpoints are compared with memory


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("what", ["weights", "optimizer"])
def test_a_file_that_is_not_what_memory_holds_never_becomes_a_checkpoint(base, tmp_path, monkeypatch, method, what):
    fit = fit_for(base, tmp_path, f"method={method}")
    fit.save()
    good = newest_checkpoint(fit.run)
    fit.state = replace(fit.state, step=2)
    if what == "weights" and method == "full":
        own = model_save._save_full

        def spoilt(model, folder, dtype, weights):
            own(model, folder, dtype, {n: v * 0 if "up_proj" in n else v for n, v in weights.items()})

        monkeypatch.setattr(model_save, "_save_full", spoilt)
    else:
        module = model_save if what == "weights" else save
        monkeypatch.setattr(module, "write_mapping", lambda path, tensors: write_mapping(path, {}))
    with pytest.raises(InputError, match=r"step-2: cannot be saved \(what was written differs.*step-1 is complete"):
        fit.save()
    assert newest_checkpoint(fit.run) == good
    assert [path.name for path in fit.run.checkpoints.iterdir()] == ["step-1"]


def test_tied_and_bf16_models_and_stacked_experts_are_compared_too(tmp_path):
    from transformers import Qwen3MoeConfig

    tied = make_model_folder(tmp_path / "tied", tie_word_embeddings=True)
    moe = make_model_folder(
        tmp_path / "moe", Qwen3MoeConfig, head_dim=8, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2
    )
    for name, folder in (("tied", tied), ("moe", moe)):
        fit = fit_for(folder, tmp_path, "method=full", out=f"run-{name}")
        fit.save()
        fit.keeper.final(torch.bfloat16)
        files = load_file(next(fit.run.final.glob("model*.safetensors")))
        assert all(value.dtype == torch.bfloat16 for value in files.values())
        assert ("lm_head.weight" in files) == (name != "tied")
        assert json.loads((fit.run.final / "config.json").read_text())["dtype"] == "bfloat16"


# The rehearsal


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_a_rehearsed_run_is_the_run_without(base, tmp_path, monkeypatch, method):
    seen = []
    own = rehearse._reload
    monkeypatch.setattr(rehearse, "_reload", lambda *args: seen.append(args[0].name) or own(*args))
    with_it = train(settings_for(base, tmp_path, f"method={method}", out="with"))
    monkeypatch.setattr(Fit, "rehearse_saving", lambda fit: None)
    without = train(settings_for(base, tmp_path, f"method={method}", out="without"))
    assert seen == [".rehearsal.tmp"]
    assert_same_run(with_it, without)
    assert [path.name for path in with_it.root.glob(".*")] == [".lock"]


@pytest.mark.parametrize("how", ["empty", "zeros", "other names"])
def test_an_adapter_that_would_be_saved_without_effect_ends_the_run_before_its_first_step(
    base, tmp_path, monkeypatch, how
):
    own = model_save._adapter

    def spoilt(model, weights, start):
        config, tensors = own(model, weights, start)
        if how == "empty":
            return config, {}
        if how == "zeros":
            return config, {name: value * ("lora_B" not in name) for name, value in tensors.items()}
        return config, {name.replace("lora_B", "lora_C"): value for name, value in tensors.items()}

    monkeypatch.setattr(model_save, "_adapter", spoilt)
    monkeypatch.setattr(Stepper, "accumulate", lambda *_: pytest.fail("a step was computed"))
    said = {"empty": "no tensor is saved", "zeros": "from the live ones, where", "other names": "have no place"}
    with pytest.raises(InputError, match=said[how]):
        train(settings_for(base, tmp_path))


def test_a_trained_tensor_that_is_not_saved_is_named(base, tmp_path, monkeypatch):
    own = model_save.get_peft_model_state_dict
    monkeypatch.setattr(
        model_save,
        "get_peft_model_state_dict",
        lambda *args, **kwargs: {n: v for n, v in own(*args, **kwargs).items() if "q_proj" not in n},
    )
    with pytest.raises(InputError, match="4 of 28 trained tensors would not be saved, for example .*q_proj"):
        train(settings_for(base, tmp_path))


def test_the_second_model_is_gone_when_the_rehearsal_is_over(base, tmp_path, monkeypatch):
    seen = []
    own = rehearse._reload

    def watched(*args):
        loaded = own(*args)
        seen.append(weakref.ref(next(loaded.model.parameters())))
        return loaded

    monkeypatch.setattr(rehearse, "_reload", watched)
    fit = fit_for(base, tmp_path)
    fit.state = replace(fit.state, step=0)
    gc.disable()  # what a collection at some later time would do must be done by then
    try:
        fit.rehearse_saving()
    finally:
        gc.enable()
    assert len(seen) == 1
    assert seen[0]() is None


def test_a_rehearsal_computes_a_piece_around_the_first_target():
    ids = np.arange(500, dtype=np.int32)
    weights = np.zeros(500, dtype=np.float32)
    weights[300:310] = 1
    piece = rehearse.piece_of(Example("a", 0, ids, weights, 300))
    assert len(piece.ids) == len(piece.weights) == rehearse.PIECE
    assert piece.ids[piece.weights > 0].tolist() == list(range(300, 310))
    assert piece.ids[piece.prompt_len] == 300
    assert piece.weights[0] == 0
    text = rehearse.piece_of(Example("a", 0, ids[:5], np.array([0, 1, 1, 1, 1], dtype=np.float32), 0, "text"))
    assert text.ids.tolist() == [0, 1, 2, 3, 4]


def test_a_model_that_does_not_fit_twice_is_not_reloaded_and_that_is_said(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearse, "free_bytes", lambda _device: 1000)
    monkeypatch.setattr(rehearse, "_reload", lambda *_: pytest.fail("it was loaded"))
    train(settings_for(base, tmp_path, "max_steps=1"))
    assert "no rehearsal of a reload: a second model takes" in capsys.readouterr().err


# Room


def test_a_disk_without_room_for_the_run_is_named_before_its_first_step(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Stepper, "accumulate", lambda *_: pytest.fail("a step was computed"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _path: usage._replace(free=2_000_000))
    with pytest.raises(InputError, match=r"will take \d+ MiB more, 2 MiB are free there.*keep_last=1"):
        train(settings_for(base, tmp_path))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_foreseen_is_what_is_kept(base, tmp_path, monkeypatch, method):
    foreseen = []
    own = space.refuse_if_run_does_not_fit
    monkeypatch.setattr(
        "graft.train.saving.keeper.refuse_if_run_does_not_fit",
        lambda run, needed: foreseen.append(needed) or own(run, needed),
    )
    run = train(settings_for(base, tmp_path, f"method={method}", "save_every=2", "keep_last=3", "epochs=4"))
    kept = len(checkpoints(run))
    tensors = sum(path.stat().st_size for path in run.root.rglob("*.safetensors"))
    folders = 6  # three, the best one, the one being written, final
    assert 3 <= kept <= 4
    per_folder = tensors / (kept + 1)
    assert foreseen[0] - folders * space.SMALL_FILES == pytest.approx(folders * per_folder, rel=0.25)


def test_a_save_that_does_not_fit_says_both_numbers_and_touches_nothing(base, tmp_path, monkeypatch):
    fit = fit_for(base, tmp_path)
    fit.save()
    fit.state = replace(fit.state, step=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda _path: usage._replace(free=100_000))
    with pytest.raises(InputError, match=r"cannot be saved \(it takes 1 MiB, 0 MiB are free; .*step-1 is complete"):
        fit.save()


# Which checkpoints stay


def test_the_newest_and_the_best_stay_whatever_the_losses_do(tmp_path):
    draw = random.Random(7)
    for case in range(60):
        run = RunFolder(tmp_path / str(case))
        keep_last, keep_optimizer = draw.randint(1, 4), draw.choice([None, 1, 2, 3])
        whole_best = draw.random() < 0.5
        best, losses = None, {}
        for step in range(1, 12):
            folder = run.checkpoints / f".step-{step}.tmp"
            folder.mkdir(parents=True)
            for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json"):
                (folder / name).write_text(f"{name} {step}")
            save.put_in_place(folder, run.checkpoints / f"step-{step}")
            losses[step] = draw.random()
            if best is None or losses[step] < losses[best]:
                best = step
            prune(run, keep_last, best, keep_optimizer, whole_best)
            kept = [step_of(path) for path in checkpoints(run)]
            assert set(kept) == {*range(max(1, step - keep_last + 1), step + 1), best}
            assert all(find_damage(path) is None for path in checkpoints(run))
            whole = {step_of(path) for path in checkpoints(run) if has_optimizer(path)}
            on_disk = {step_of(path) for path in checkpoints(run) if (path / "optimizer.safetensors").exists()}
            wanted = set(kept[: keep_optimizer or len(kept)]) | ({best} if whole_best else set())
            assert whole == on_disk == wanted


def test_without_its_optimizer_a_checkpoint_serves_as_weights_and_not_to_go_on(base, tmp_path, capsys):
    settings = settings_for(base, tmp_path, "save_every=1", "eval_every=50", "keep_last=4", "keep_optimizer=2")
    run = train(settings)
    found = checkpoints(run)
    assert [has_optimizer(path) for path in found] == [True, True, False, False]
    assert find_damage(found[-1]) is None
    with pytest.raises(InputError, match=r"step-5: has its weights only, since keep_optimizer"):
        train(settings.model_copy(update={"resume": str(found[-1])}))
    shutil.rmtree(run.final)
    for path in found[:2]:
        shutil.rmtree(path)
    assert newest_checkpoint(run) == found[2], "as weights it serves"
    assert newest_checkpoint(run, to_resume=True) is None
    assert "has its weights only (keep_optimizer)" in capsys.readouterr().err
    begun = train(settings_for(base, tmp_path, f"init_from={found[-1]}", "max_steps=1", out="other"))
    assert begun.final.is_dir()


def test_with_patience_the_best_one_keeps_what_the_final_folder_is_made_from(base, tmp_path):
    options = (
        "lr=0.2",
        "epochs=20",
        "eval_every=2",
        "patience=2",
        "optimizer=schedule_free_adamw",
        "schedule=constant",
    )
    run = train(settings_for(base, tmp_path, *options, "keep_last=1", "keep_optimizer=1"))
    one = load_file(run.final / "adapter_model.safetensors")
    run = train(settings_for(base, tmp_path, *options, out="other"))
    other = load_file(run.final / "adapter_model.safetensors")
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_what_a_crash_left_in_the_middle_of_a_replacement_is_put_right(tmp_path):
    run = RunFolder(tmp_path)
    for step in (1, 2):
        folder = run.checkpoints / f".step-{step}.tmp"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        save.put_in_place(folder, run.checkpoints / f"step-{step}")
    (run.checkpoints / "step-2").rename(run.checkpoints / ".step-2.old")  # and then the power went
    shutil.copytree(run.checkpoints / "step-1", run.checkpoints / ".step-1.old")
    (run.checkpoints / ".step-3.tmp").mkdir()
    (run.root / ".config.yaml.77.tmp").write_text("half")
    clear_up(run)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-1", "step-2"]
    assert [path.name for path in run.root.iterdir()] == ["checkpoints"]


# A save beside the run


@pytest.mark.parametrize("options", [(), ("method=full",), ("ema=0.9",), ("lora.init_lora_weights=pissa",)])
def test_a_save_beside_the_run_is_the_save_within_it(base, tmp_path, monkeypatch, options):
    common = ("save_every=1", "keep_last=50", "eval_every=4", *options)
    held = threading.Event()
    own = save.Writer.checkpoint
    apart = []

    def slowly(writer, snapshot):
        apart.append(threading.current_thread() is not threading.main_thread())
        held.wait(0.05)  # the next step is made meanwhile
        return own(writer, snapshot)

    within = train(settings_for(base, tmp_path, *common, "save_async=auto", out="within"))
    monkeypatch.setattr(save.Writer, "checkpoint", slowly)
    beside = train(settings_for(base, tmp_path, *common, "save_async=true", out="beside"))
    assert apart
    assert all(apart)
    assert_same_run(within, beside)
    assert len(checkpoints(beside)) == len(checkpoints(within)) == 8
    for one, other in zip(checkpoints(within), checkpoints(beside), strict=True):
        assert find_damage(other) is None
        for name in ("optimizer.safetensors", "state.json", "*model*.safetensors"):
            (mine,), (theirs,) = one.glob(name), other.glob(name)
            assert mine.read_bytes() == theirs.read_bytes()


def test_what_goes_wrong_beside_the_run_ends_it_at_its_next_step(base, tmp_path, monkeypatch):
    def full(path, tensors):
        raise OSError(errno.ENOSPC, "No space left on device")

    updates = []
    own = Stepper.update
    monkeypatch.setattr(Stepper, "update", lambda self, *args: (updates.append(1), own(self, *args))[1])
    settings = settings_for(base, tmp_path, "save_every=2", "eval_every=50", "save_async=true")
    monkeypatch.setattr(save, "write_mapping", full)
    monkeypatch.setattr(Background, "check", Background.wait)  # however long the thread takes
    with pytest.raises(InputError, match="step-2: cannot be saved"):
        train(settings)
    assert len(updates) == 2


def test_one_job_at_a_time_and_its_error_once():
    background, running, most = Background(apart=True), [], []

    def job():
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.01)
        running.pop()

    for _ in range(5):
        background.do(job)
    background.wait()
    assert most == [1] * 5

    def fail():
        raise InputError("full")

    background.do(fail)
    with pytest.raises(InputError):
        background.wait()
    background.wait()
    background.check()


# Stopping


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (loop, "prepare_together", "start again"),
        (fit_module, "load_for_training", "start again"),
        (rehearse, "_reload", "start again"),
        (save, "find_fault", "checkpoint saved"),
        (save, "put_in_place", "checkpoint saved"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_anywhere_stops_with_code_5_and_the_run_goes_on(
    base, tmp_path, monkeypatch, module, name, said, number
):
    unbroken = train(settings_for(base, tmp_path, "save_every=2", out="unbroken"))
    own = getattr(module, name)

    def stopped(*args, **kwargs):
        monkeypatch.setattr(module, name, own)
        os.kill(os.getpid(), number)
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, stopped)
    with pytest.raises(Interrupted, match=said) as caught:
        train(settings_for(base, tmp_path, "save_every=2", "resume=auto"))
    assert caught.value.exit_code == 5
    run = RunFolder(tmp_path / "run")
    if said == "checkpoint saved":
        kept = newest_checkpoint(run)
        assert kept is not None
        assert step_of(kept) == 2
        assert not list(run.checkpoints.glob(".*"))
    again = train(settings_for(base, tmp_path, "save_every=2", "resume=auto"))
    assert_same_run(unbroken, again)


def test_a_second_signal_leaves_at_once_and_tears_nothing(base, tmp_path):
    settings = settings_for(base, tmp_path, "save_every=2", "eval_every=50")
    code = (
        "import os, signal, sys; from graft.config.train import Train\n"
        "from graft.train import loop; from graft.train.saving import save\n"
        "own, calls = save.put_in_place, []\n"
        "def twice(aside, final):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    own(aside, final)\n"
        "save.put_in_place = twice\n"
        "loop.train(Train.model_validate_json(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, settings.model_dump_json()], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.checkpoints.glob("step-*")] == ["step-2"]
    assert find_damage(run.checkpoints / "step-2") is None
    unbroken = train(settings_for(base, tmp_path, "save_every=2", "eval_every=50", out="unbroken"))
    assert_same_run(unbroken, train(settings.model_copy(update={"resume": True})))


# Going on


def test_resume_auto_begins_goes_on_and_says_when_all_is_done(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = settings_for(base, tmp_path, "resume=auto", "save_every=2").model_copy(update={"out": None})
    accumulate, count = Stepper.accumulate, []

    def interrupt(stepper, *args):
        count.append(1)
        if len(count) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return accumulate(stepper, *args)

    monkeypatch.setattr(Stepper, "accumulate", interrupt)
    with pytest.raises(Interrupted):
        train(settings)
    monkeypatch.setattr(Stepper, "accumulate", accumulate)
    assert "finds no run yet" in capsys.readouterr().err
    run = train(settings)
    assert [path.name for path in Path("runs").iterdir()] == [run.root.name]
    assert "resuming after step 4 of 8" in capsys.readouterr().err
    monkeypatch.setattr(fit_module, "load_for_training", lambda *_: pytest.fail("weights were read"))
    assert train(settings).root == run.root
    assert "is finished already" in capsys.readouterr().err
    ended = RunFolder(run.root.resolve())
    monkeypatch.undo()
    assert_same_run(train(settings_for(base, tmp_path, "save_every=2", out="unbroken")), ended)


def test_the_newest_run_that_is_not_finished_is_found(tmp_path):
    for number, (name, finished) in enumerate([("a", False), ("b", False), ("c", True)]):
        run = RunFolder(tmp_path / name)
        run.root.mkdir()
        run.config.write_text("model: x")
        os.utime(run.config, ns=(number, number))
        if finished:
            run.final.mkdir()
            (run.final / "file").write_text("12345")
            write_manifest(run.final, {"file": (5, "")})
    assert newest_run(tmp_path).root.name == "b"
    assert newest_run(tmp_path, "c").root.name == "c", "where all are finished, the latest"
    assert newest_run(tmp_path / "nowhere") is None
    (tmp_path / "c" / "final" / "file").write_text("123")
    assert newest_run(tmp_path).root.name == "c", "a torn final folder is not finished"
    with pytest.raises(InputError, match="no run there to resume"):
        _run_to_resume("auto", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="there is no such checkpoint"):
        _run_to_resume(str(tmp_path / "a" / "checkpoints" / "step-9"), None)


def test_a_run_goes_on_from_the_checkpoint_that_is_named(base, tmp_path):
    options = ("save_every=2", "keep_last=9", "trace=true")
    run = train(settings_for(base, tmp_path, *options))
    unbroken = train(settings_for(base, tmp_path, *options, out="unbroken"))
    root, there = _run_to_resume(str(run.checkpoints / "step-4"), None)
    assert root == run.root
    train(settings_for(base, tmp_path, *options).model_copy(update={"resume": there}))
    assert_same_run(unbroken, run)
    assert run.trace.read_text() == unbroken.trace.read_text()
    assert sorted(p.name for p in (run.checkpoints / "after-step-4").iterdir()) == ["step-6", "step-8"]
    assert find_damage(run.checkpoints / "step-8") is None


def test_another_environment_is_named_and_the_run_goes_on(base, tmp_path, capsys):
    run = train(settings_for(base, tmp_path, "save_every=2", "keep_last=9"))
    before = run.environment.read_text()
    assert '"torch": "' in before
    shutil.rmtree(run.final)
    changed = json.loads(before)
    changed["packages"]["torch"] = "1.0"
    changed["threads"] = 99
    run.environment.write_text(json.dumps(changed))
    train(settings_for(base, tmp_path, "save_every=2", "keep_last=9", "resume=true"))
    err = capsys.readouterr().err
    assert f"threads was 99, is {torch.get_num_threads()}" in err
    assert f"torch was 1.0, is {torch.__version__}" in err


# A disk that fails


class Faults:
    """Lets the n-th change of the disk below a folder fail, and with `stays` all later ones too."""

    armed: "Faults | None" = None
    hooked = False

    def __init__(self, folder: Path, number: int, code: int, stays: bool) -> None:
        self.folder, self.left, self.code, self.stays = str(folder), number, code, stays

    def event(self, what: str) -> None:
        self.left -= 1
        if self.left == 0 or (self.stays and self.left < 0):
            raise OSError(self.code, os.strerror(self.code), what)

    @property
    def reached(self) -> bool:
        return self.left <= 0

    def __enter__(self) -> "Faults":
        if not Faults.hooked:  # for good: Python has no way to take one off
            sys.addaudithook(Faults._audit)
            Faults.hooked = True
        Faults.armed = self
        return self

    def __exit__(self, *_: object) -> None:
        Faults.armed = None

    @staticmethod
    def _audit(name: str, args: tuple) -> None:
        faults = Faults.armed
        if faults is None:
            return
        written = name == "open" and isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
        removed = name in ("os.remove", "os.rmdir") and not faults.stays  # a full disk can be cleared
        if (written or removed or name in ("os.rename", "os.mkdir")) and str(args[0]).startswith(faults.folder):
            faults.event(str(args[0]))


def save_or_say(fit: Fit) -> str | None:
    """Save; what the user is told where that fails."""
    try:
        fit.save()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_error_at_any_write_of_a_save_leaves_a_checkpoint_that_loads(
    base, tmp_path, monkeypatch, method, code, stays
):
    fit = fit_for(base, tmp_path, f"method={method}", "keep_last=1")
    fit.save()
    fsync = os.fsync

    def fails(handle):
        if Faults.armed is not None:
            Faults.armed.event("fsync")
        fsync(handle)

    def half(path, tensors):
        write_mapping(path, tensors)
        if Faults.armed is not None:
            os.truncate(path, path.stat().st_size // 2)
            Faults.armed.event(str(path))
        write_mapping(path, tensors)

    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(save, "write_mapping", half)
    monkeypatch.setattr(model_save, "write_mapping", half)
    failed = 0
    for number in range(1, 200):
        before = newest_checkpoint(fit.run)
        assert before is not None
        fit.state = replace(fit.state, step=fit.state.step + 1)
        with Faults(fit.run.root, number, code, stays) as faults:
            said = save_or_say(fit)
        if said is not None:
            failed += 1
            assert os.strerror(code) in said
            assert f"step-{fit.state.step}: cannot be saved" in said
            assert "is complete: free some space and continue with graft train --resume" in said
        newest = newest_checkpoint(fit.run)
        assert newest is not None
        assert step_of(newest) in (step_of(before), fit.state.step)
        load_state(newest)
        if not faults.reached:
            break
    assert failed > 20, "a save is many writes"
    assert step_of(newest) == fit.state.step
    assert not list(fit.run.checkpoints.glob(".*"))


def test_a_file_that_may_not_grow_is_a_message(base, tmp_path):
    """The system's own error in the middle of a write, also in the tokenizer's, which is no Python."""
    fit = fit_for(base, tmp_path)
    fit.save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = 0
    for limit in (0, 1, 100, 500, 3_000, 10_000, 30_000, 60_000, 100_000):
        fit.state = replace(fit.state, step=fit.state.step + 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            said = save_or_say(fit)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if said is not None:
            failed += 1
            assert "cannot be saved (" in said
            assert "File too large" in said
        newest = newest_checkpoint(fit.run)
        assert newest is not None
        load_state(newest)
    assert failed >= 6


def test_a_small_disk_that_fills_up_is_a_message_and_the_run_goes_on(base, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(small)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("NOT TESTED: a small disk cannot be mounted here")
    options = (f"out={small / 'run'}", "save_every=1", "keep_last=50", "eval_every=50", "epochs=4")
    try:
        monkeypatch.setattr("graft.train.saving.keeper.refuse_if_run_does_not_fit", lambda *_: None)
        monkeypatch.setattr(save, "refuse_if_full", lambda *_: None)
        with pytest.raises(InputError, match=r"No space left on device.*--resume"):
            train(settings_for(base, tmp_path, *options))
        run = RunFolder(small / "run")
        newest = newest_checkpoint(run)
        assert newest is not None
        for path in checkpoints(run)[1:]:
            shutil.rmtree(path)
        options = (*options[:2], "keep_last=1", *options[3:])
        resumed = train(settings_for(base, tmp_path, *options, "resume=true"))
        assert_same_run(train(settings_for(base, tmp_path, *options[1:], out="unbroken")), resumed)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_log_that_cannot_be_written_is_a_message(base, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    own = loop.Fit.loop

    def full(fit, stop, advance):
        run.metrics.unlink(missing_ok=True)
        run.metrics.mkdir()
        own(fit, stop, advance)

    monkeypatch.setattr(loop.Fit, "loop", full)
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written \(Is a directory\)"):
        train(settings_for(base, tmp_path))


@pytest.mark.slow
def test_killed_runs_come_to_the_same_end():
    """The short form of bench/kills.py; its long form kills 200 times."""
    script = Path(__file__).resolve().parents[1] / "bench" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "6", "--seed", "3", "--out", "-"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert '"kills": 6' in done.stdout


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_best_checkpoint_that_cannot_serve_is_said_and_final_holds_the_last_weights(base, tmp_path, capfd, how):
    options = ("lr=0.2", "epochs=20", "eval_every=2", "patience=2", "lora.dropout=0")
    run = train(settings_for(base, tmp_path, *options))
    best = min((row for row in run.read_metrics() if row["kind"] == "val"), key=lambda row: row["loss"])["step"]
    newest = max(checkpoints(run), key=step_of)
    assert step_of(newest) > best > 0
    shutil.rmtree(run.final)
    file = run.checkpoints / f"step-{best}" / "adapter_model.safetensors"
    if how == "gone":
        shutil.rmtree(file.parent)
    else:
        content = bytearray(file.read_bytes())
        content[-4000:] = bytes(4000)
        file.write_bytes(content)
    capfd.readouterr()
    train(settings_for(base, tmp_path, *options, "resume=true"))
    said = capfd.readouterr().err
    assert f"step-{best}, which had the best validation loss: " in said
    assert "final/ holds the last weights instead of the best" in said
    kept, last = load_file(run.final / file.name), load_file(newest / file.name)
    assert all(torch.equal(kept[name], value) for name, value in last.items())
