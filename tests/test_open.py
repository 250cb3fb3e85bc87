"""Which folder a name stands for, and what is said when it stands for none."""

import json
import subprocess
import sys

import pytest

from graft.errors import InputError
from graft.use.open import resolve


def _folder(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (path / name.replace("__", ".")).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def _run(tmp_path, *steps, final=False, best=None):
    run = _folder(tmp_path / "run", config__yaml="model: m\ndata: d.jsonl\n")
    for step, complete in steps:
        folder = _folder(run / "checkpoints" / f"step-{step}", config__json={}, state__json={"best_step": best})
        if complete:
            _folder(folder, manifest__json={})
    if final:
        _folder(run / "final", config__json={})
    return run


def test_a_model_folder_is_itself(tmp_path):
    target = resolve(str(_folder(tmp_path / "m", config__json={})))
    assert (target.folder, target.base, target.kind, target.run) == (str(tmp_path / "m"), None, "model", None)
    assert target.tokenizer == target.folder


def test_a_run_is_its_final_folder_else_its_best_else_its_newest_complete_checkpoint(tmp_path):
    whole = _run(tmp_path / "a", (1, True), final=True)
    assert resolve(str(whole)).folder == str(whole / "final")
    assert resolve(str(whole)).run.root == whole
    torn = _run(tmp_path / "b", (2, True), (10, True), (11, False))
    assert resolve(str(torn)).folder.endswith("step-10")
    best = _run(tmp_path / "c", (2, True), (10, True), (11, False), best=2)
    assert resolve(str(best)).folder.endswith("step-2")
    gone = _run(tmp_path / "d", (10, True), best=2)
    assert resolve(str(gone)).folder.endswith("step-10")
    with pytest.raises(InputError, match=r"no complete checkpoint yet; graft train --resume"):
        resolve(str(_run(tmp_path / "e", (1, False))))


def test_an_adapters_base_is_looked_for_from_here_and_from_the_adapter(tmp_path, monkeypatch):
    _folder(tmp_path / "base", config__json={})
    adapter = _folder(tmp_path / "adapter", adapter_config__json={"base_model_name_or_path": "../base"})
    assert resolve(str(adapter)).base == str(adapter / "../base")
    monkeypatch.chdir(tmp_path)
    _folder(adapter, adapter_config__json={"base_model_name_or_path": "base"})
    assert resolve("adapter").base == "base"
    assert resolve("adapter").kind == "adapter"
    assert resolve("adapter", base="elsewhere").base == "elsewhere"
    assert resolve("adapter").tokenizer == "base"  # a bare adapter: the tokenizer is the base's
    _folder(adapter, tokenizer__json={})
    assert resolve("adapter").tokenizer == "adapter"
    _folder(adapter, adapter_config__json={"base_model_name_or_path": "org/name"})
    assert resolve("adapter").base == "org/name"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("/gone/base", "its base model /gone/base is not there.*--base PATH"),
        ("./gone", r"its base model ./gone is not there.*--base PATH"),
        (None, "names no base model; give it with --base"),
    ],
)
def test_an_adapter_without_its_base_says_what_to_do(tmp_path, named, said):
    adapter = _folder(tmp_path / "adapter", adapter_config__json={"base_model_name_or_path": named})
    with pytest.raises(InputError, match=said):
        resolve(str(adapter))


def test_other_things_are_named_for_what_they_are(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        resolve(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no such folder"):
        resolve("runs/typo")
    with pytest.raises(InputError, match="a file, not a folder"):
        resolve(str(_folder(tmp_path / "m", config__json={}) / "config.json"))
    (tmp_path / "stuff" / "sub").mkdir(parents=True)
    _folder(tmp_path / "stuff", a__txt="", b__txt="")
    with pytest.raises(InputError, match=r"no model there .* it holds a.txt, b.txt, sub/"):
        resolve(str(tmp_path / "stuff"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="the folder is empty"):
        resolve(str(tmp_path / "empty"))
    assert resolve("Qwen/Qwen2.5-0.5B").kind == "hub"
    bad = _folder(tmp_path / "bad", adapter_config__json="{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        resolve(str(bad))


def test_the_fingerprint_follows_the_weights(tmp_path):
    folder = _folder(tmp_path / "m", config__json={})
    (folder / "model.safetensors").write_bytes(b"a" * 100)
    first = resolve(str(folder)).fingerprint()
    assert first == resolve(str(folder)).fingerprint()
    (folder / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    assert resolve(str(folder)).fingerprint() != first


def test_resolving_imports_no_torch():
    code = "import sys, graft.use.open; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_runs_adapter_sits_on_the_base_that_it_was_trained_on_however_it_is_named(tmp_path):
    run = _run(tmp_path, (2, True))
    adapter = {"base_model_name_or_path": "m"}
    for folder in ("final", "checkpoints/step-2"):
        _folder(run / folder, adapter_config__json=adapter)
    (run / "config.yaml").write_text("model: m\ndata: d.jsonl\nquantize: nf4\n")
    for named in (run, run / "final", run / "checkpoints" / "step-2"):
        assert resolve(str(named)).quantize == "nf4", named
    elsewhere = _folder(run / "copied", adapter_config__json=adapter)
    assert resolve(str(elsewhere)).quantize == "none"
