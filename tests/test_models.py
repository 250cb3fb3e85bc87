"""The table of architectures in docs/models.md: complete, and still what a sample of them measures."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, tiny_model
from steps_compared import compare
from test_exact import assert_equal_numbers, in_rows
from tiny import branching_examples

from graft.errors import InputError
from graft.model.attention.segments import DENSE
from graft.model.trees import TreeLM

DOC = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
ROWS = {
    cells[0]: cells
    for line in DOC.splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] in ARCHITECTURES
}
MEASURED_WITH = (re.search(r"architectures of transformers ([\d.]+)", DOC) or [""])[1]
SAMPLE = [
    # by argument, with windows, experts, latent attention, learned positions
    "arcee", "afmoe", "aria_text", "bert", "biogpt", "cwm", "dbrx", "deepseek_v3", "diffllama", "exaone4", "glm4",
    "helium", "longcat_flash", "nemotron", "olmo2", "opt", "persimmon", "phimoe", "smollm3", "starcoder2",
    # by the mask
    "cohere_compass_text", "qwen2_moe",
    # one per row, each for a reason of its own
    "bart", "codegen", "doge", "falcon", "lfm2", "mamba", "mpt",
    # refused
    "cpmant", "xlnet",
]  # fmt: skip


def test_the_table_has_every_architecture():
    if transformers.__version__ != MEASURED_WITH:
        pytest.skip(f"the table is of transformers {MEASURED_WITH}; make it anew with scripts/make_models_table.py")
    assert list(ROWS) == list(ARCHITECTURES)
    assert all(cells[2] in ("on trees", "one per row", "refused") for cells in ROWS.values())
    assert all(cells[5] for cells in ROWS.values() if cells[2] != "on trees"), "a reason is missing"


def test_the_table_keeps_the_numbers_contract():
    trained = [cells for cells in ROWS.values() if cells[2] != "refused"]
    assert len(trained) > 150
    assert all(float(cells[3]) <= 1e-6 for cells in trained)
    above = [cells[0] for cells in trained if float(cells[4]) > 1e-5]
    assert len(above) <= 8, above  # those amplify rounding: see the page
    assert all(float(cells[4]) <= 1e-4 for cells in trained)


@pytest.mark.parametrize("architecture", [name for name in SAMPLE if name in ARCHITECTURES])
def test_an_architecture_is_trained_as_the_table_says(architecture):
    found = compare(architecture, adapters=False)
    assert found.way == ROWS[architecture][2], found.why
    assert found.loss <= 1e-6
    assert found.gradient <= 1e-5


@pytest.mark.parametrize("architecture", ["cohere2", "llama4_text"])
def test_the_forms_of_masks_equal_the_dense_mask(architecture):
    """Whatever reaches attention: windows and chunks shorter than the paths, runs that begin within them."""
    examples = branching_examples(seed=5)
    dense = in_rows(TreeLM(tiny_model(architecture), DENSE), examples, 512)
    assert_equal_numbers(in_rows(TreeLM(tiny_model(architecture)), examples, 512), dense[:2])


def test_a_model_that_needs_more_than_ids_is_named():
    model = tiny_model("llama")
    forward = model.model.forward

    def wants_pictures(**arguments):
        if "pixel_values" not in arguments:
            raise ValueError("You must give pixel_values")
        return forward(**arguments)

    model.model.forward = wants_pictures
    with pytest.raises(InputError, match=r"does not compute from token ids alone \(You must give pixel_values\)"):
        TreeLM(model)


def test_a_changed_output_of_an_adapted_layer_is_no_view():
    """Some models add to a linear layer's output in place; the fused product must allow it."""
    from peft import LoraConfig, get_peft_model

    from graft.model.fused.lora import FusedLinear, fuse_lora

    tuned = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert fuse_lora(tuned)
    layer = next(module for module in tuned.modules() if isinstance(module, FusedLinear))
    out = layer(torch.randn(1, 3, 32, requires_grad=True))
    out += 1
    out.sum().backward()
