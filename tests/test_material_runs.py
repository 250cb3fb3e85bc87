"""Real small models on real data: they learn, and what is saved loads elsewhere with the same logits."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from graft.cli.main import main
from graft.config.train import load_train
from graft.errors import Interrupted
from graft.runs import RunFolder
from graft.train import loop
from graft.train.loop import train
from graft.train.step import Stepper


def first_rows(source: Path, count: int, out: Path) -> Path:
    """The first rows of a jsonl file or a json list."""
    text = source.read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
    out.write_text("".join(json.dumps(row) + "\n" for row in islice(rows, count)), encoding="utf-8")
    return out


CASES = {
    "tinystories-656k": "stanford_alpaca/alpaca_5000.json",
    "zh-poem-750k": "domain-bloom/domain.train.json",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", CASES)
def test_a_real_small_model_learns_and_loads_elsewhere(material, tmp_path, monkeypatch, name, method):
    model = material / "models" / name
    data = first_rows(material / "data" / CASES[name], 120, tmp_path / "rows.jsonl")
    live = {}
    finish = loop.Fit.finish

    def look(fit):
        finish(fit)
        fit.lm.base.set_attn_implementation("sdpa")
        with torch.no_grad():
            live["logits"] = fit.lm.model.eval()(torch.arange(5, 60)[None]).logits

    monkeypatch.setattr(loop.Fit, "finish", look)
    rate = "lr=2e-3" if method == "lora" else "lr=5e-4"
    run = train(
        load_train(None, [f"model={model}", f"data={data}", f"out={tmp_path / 'run'}", f"method={method}", rate,
                          "split.val=0.2", "encode.max_length=1024", "epochs=1", "batch_size=8", "eval_every=100"])
    )  # fmt: skip
    validations = [row["loss"] for row in run.read_metrics() if row["kind"] == "val"]
    assert validations[-1] < validations[0] - 0.05
    loaded = AutoModelForCausalLM.from_pretrained(model if method == "lora" else run.final, dtype=torch.float32)
    if method == "lora":
        loaded = PeftModel.from_pretrained(loaded, run.final)
    with torch.no_grad():
        found = loaded.eval()(torch.arange(5, 60)[None]).logits
    assert (found - live["logits"]).abs().max() < 1e-4 * live["logits"].abs().max()
    assert AutoTokenizer.from_pretrained(run.final).chat_template


def make_bloom(folder: Path, material: Path) -> Path:
    """Bloom-shaped, 19.7 M parameters, random, with a real bilingual tokenizer without its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / "minimind-v3")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    config = BloomConfig(
        vocab_size=len(tokenizer), hidden_size=448, n_layer=7, n_head=8, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    make_model(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_domain_bloom_by_its_recipe_resumes_bit_for_bit_and_predicts(material, tmp_path, monkeypatch):
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "domain-bloom.yaml"
    data = material / "data" / "domain-bloom"
    base = make_bloom(tmp_path / "bloom", material)
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters()) == pytest.approx(
        2e7, rel=0.05
    )
    rows = first_rows(data / "domain.train.json", 60, tmp_path / "train.jsonl")
    words = [f"model={base}", f"data={rows}", f"test={data / 'domain.test.json'}", "max_steps=4", "split.val=0.1",
             "save_every=1", "eval_every=4"]  # fmt: skip
    unbroken = train(load_train(recipe, [*words, f"out={tmp_path / 'unbroken'}"]))
    update, count = Stepper.update, []

    def stop(stepper, *args):
        count.append(1)
        if len(count) == 3:
            raise Interrupted("as if the machine had gone")
        return update(stepper, *args)

    monkeypatch.setattr(Stepper, "update", stop)
    with pytest.raises(Interrupted):
        train(load_train(recipe, [*words, f"out={tmp_path / 'broken'}"]))
    monkeypatch.setattr(Stepper, "update", update)
    resumed = train(load_train(recipe, [*words, f"out={tmp_path / 'broken'}", "resume=true"]))

    def course(run: RunFolder):
        return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in run.read_metrics() if r["kind"] == "train"]

    assert len(course(unbroken)) == 4
    assert course(unbroken) == course(resumed)
    one, other = (load_file(run.final / "adapter_model.safetensors") for run in (unbroken, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)

    predictions, picture = tmp_path / "predictions.jsonl", tmp_path / "loss.png"
    for line in (
        ["predict", resumed.root, "--data", data / "domain.test.json", "--out", predictions, "--max-new-tokens", 4],
        ["plot", resumed.root, "--out", picture],
    ):
        monkeypatch.setattr("sys.argv", ["graft", *map(str, line)])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
    answers = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert len(answers) == 13
    assert all(row["target"] and row["input"] for row in answers)
    assert picture.stat().st_size > 10_000
