"""Layers that several processes compute between them: the same run as one process."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_ranks import numbers, run_as, run_on, settings_for
from tiny import GROUPED, ON_TREES, branching_examples, make_model, make_model_folder
from together import together
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Ernie4_5Config,
    Exaone4Config,
    GemmaConfig,
    HeliumConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    OlmoConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from graft.errors import ConfigError
from graft.model.processes.ranks import Ranks, ranks_from_environment
from graft.model.processes.shard import everywhere, mesh_of, shard
from graft.model.processes.tensor import Split, refuse_model
from graft.model.processes.tensor_parts import PartOfDropout
from graft.model.trees import TreeLM, fuse_modules
from graft.runs import RunFolder
from graft.train.loop import train
from graft.train.loss import row_loss
from graft.train.processes.groups import refuse_groups

MODELS = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": 7}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make_model_folder(root / name, kind, **changes) for name, (kind, changes) in MODELS.items()}


def assert_same_course(one: RunFolder, other: RunFolder, within: float = 1e-6) -> None:
    """Loss, gradient norm and accuracy of every step; weights at the end as far as AdamW leaves rounding small."""
    np.testing.assert_allclose(numbers(other), numbers(one), rtol=within)
    (file,) = one.final.glob("*model.safetensors")
    wanted, found = load_file(file), load_file(other.final / file.name)
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e3 * within, atol=1e2 * within, msg=name)
    assert sorted(path.name for path in one.final.iterdir()) == sorted(path.name for path in other.final.iterdir())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "qwen2-tied"])
def test_layers_computed_by_two_are_those_of_one(folders, tmp_path, model, method, size):
    common = [f"method={method}", "max_steps=6"]
    if model in ("mixtral", "qwen3-moe") and method == "lora":
        common.append("lora.target_modules=[q_proj,v_proj,o_proj]")
    alone = train(settings_for(folders[model], tmp_path, "alone", *common))
    cut = run_on(size, settings_for(folders[model], tmp_path, "cut", *common, "tensor_ranks=2"))
    assert_same_course(alone, cut)


DRAWN = ["lora.dropout=0.2", "neftune_alpha=5"]
OTHERS = [
    "checkpointing=full", "lora.r=1 lora.target_modules=[q_proj,o_proj]", "trees=false", "loss=dft",
    "label_smoothing=0.1", "attention=dense", "optimizer=lion",
    "optimizer=sgd", "optimizer=schedule_free_adamw schedule=constant", "ema=0.9", "ema=0.9 method=full",
    "method=freeze freeze.layers=1", "method=full checkpointing=full", "method=full new_tokens=[<a>,<b>]",
    "new_tokens=[<a>,<b>]", "lora.use_dora=true", "lora.lora_bias=true", "lora.init_lora_weights=pissa",
    "lora.modules_to_save=[lm_head,embed_tokens]", "lora.modules_to_save=[k_proj,o_proj,input_layernorm]",
    "lora.modules_to_save=[mlp]", "lora.trainable_token_indices=[5,6,7]",
    "lora.target_modules=[lm_head,embed_tokens,v_proj]", "lora.target_modules=[q_proj,down_proj] lora.loraplus_ratio=4",
    "method=peft peft={type:LORA,r:4,target_modules:all-linear,use_dora:true,lora_dropout:0.1}",
]  # fmt: skip


@pytest.mark.parametrize("changes", [*DRAWN, *OTHERS])
def test_whatever_is_set_two_of_two_are_one(folders, tmp_path, changes):
    common = [text.replace(":", ": ") if text.startswith("peft=") else text for text in changes.split(" ")]
    common.append("max_steps=6")
    alone = train(settings_for(folders["qwen2-tied"], tmp_path, "alone", *common))
    cut = run_on(2, settings_for(folders["qwen2-tied"], tmp_path, "cut", *common, "tensor_ranks=2"))
    assert_same_course(alone, cut, within=1e-5 if "drop" in changes else 1e-6)


@pytest.mark.parametrize(
    ("changes", "within"),
    [
        ("shard_ranks=1", 1e-6),
        ("shard_ranks=host method=full", 1e-6),
        ("checkpointing=full method=full ema=0.9", 1e-6),
        ("new_tokens=[<a>,<b>]", 1e-6),
        ("lora.use_dora=true", 1e-6),
        ("precision=bf16", 1e-2),
        ("precision=bf16 method=full", 1e-2),
        ("precision=fp16", 1e-2),
    ],
)
def test_whatever_is_set_two_by_two_are_one(folders, tmp_path, changes, within):
    common = [*changes.split(" "), "max_steps=6"]
    alone = train(settings_for(folders["llama"], tmp_path, "alone", *[text for text in common if "shard" not in text]))
    cut = run_on(4, settings_for(folders["llama"], tmp_path, "cut", *common, "tensor_ranks=2"))
    if within < 1e-4:
        assert_same_course(alone, cut, within)
    np.testing.assert_allclose(numbers(cut)[:, 1], numbers(alone)[:, 1], rtol=within)


def test_four_of_four_are_one(tmp_path):
    folder = make_model_folder(tmp_path / "model", num_key_value_heads=4)
    alone = train(settings_for(folder, tmp_path, "alone"))
    assert_same_course(alone, run_on(4, settings_for(folder, tmp_path, "cut", "tensor_ranks=4")))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_goes_on_with_layers_cut_otherwise(folders, tmp_path, method):
    model = folders["llama-tied"]
    common = [f"method={method}", "epochs=2.5", "save_every=1", "keep_last=99"]
    alone = train(settings_for(model, tmp_path, "alone", *common))
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in alone.checkpoints.iterdir())
    begun = RunFolder(tmp_path / "begun")
    shutil.copytree(alone.root, begun.root)
    for size, tensor, last in ((2, 2, steps[1]), (4, 2, steps[3]), (2, 1, steps[5]), (1, 1, steps[6])):
        shutil.rmtree(begun.final)
        for step in steps:
            if step > last:
                shutil.rmtree(begun.checkpoints / f"step-{step}", ignore_errors=True)
        settings = settings_for(model, tmp_path, "begun", *common, "resume=true", f"tensor_ranks={tensor}")
        if size == 1:
            train(settings)
        else:
            run_on(size, settings)
        assert_same_course(alone, begun)


def test_the_final_folder_is_what_other_programs_load(folders, tmp_path):
    ids = torch.arange(3, 40)[None]
    for method in ("lora", "full"):
        alone = train(settings_for(folders["qwen3"], tmp_path, f"alone-{method}", f"method={method}"))
        cut = run_on(2, settings_for(folders["qwen3"], tmp_path, f"cut-{method}", f"method={method}", "tensor_ranks=2"))
        logits = [loaded(run, folders["qwen3"], method)(ids).logits for run in (alone, cut)]
        before = AutoModelForCausalLM.from_pretrained(folders["qwen3"]).eval()(ids).logits
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
        assert (logits[0] - before).abs().max() > 0.01


def loaded(run: RunFolder, base: Path, method: str) -> torch.nn.Module:
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(run.final).eval()
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.final).eval()


ARCHITECTURES = ON_TREES | {
    "starcoder2": Starcoder2Config(
        **GROUPED, use_bias=True, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0
    ),
    "olmo": OlmoConfig(**GROUPED),
    "smollm3": SmolLM3Config(**GROUPED),
    "nemotron": NemotronConfig(head_dim=8, **GROUPED),
    "phi": PhiConfig(**GROUPED),
    "arcee": ArceeConfig(**GROUPED),
    "ministral": MinistralConfig(head_dim=8, sliding_window=7, **GROUPED),
    "exaone4": Exaone4Config(sliding_window=7, **GROUPED),
    "cohere2": Cohere2Config(sliding_window=7, **GROUPED),
    "helium": HeliumConfig(head_dim=8, **GROUPED),
    "ernie4_5": Ernie4_5Config(head_dim=8, **GROUPED),
    "seed_oss": SeedOssConfig(head_dim=8, **GROUPED),
    "apertus": ApertusConfig(**GROUPED),
}
REFUSED = {"phi3", "gpt2", "bloom", "bloom-6-heads", "gpt-oss-sinks"}


def test_gradients_of_every_architecture_with_a_plan():
    names = [name for name in ARCHITECTURES if name not in REFUSED]
    found = together(2, gradients_of, names)
    assert isinstance(found[0], dict), found[0]
    assert found[0].keys() == set(names)
    assert {name: worst for name, worst in found[0].items() if not worst[0] < 1e-5} == {}
    assert all(cut for _, cut in found[0].values()), found[0]


def gradients_of(rank: int, names: list[str]) -> dict[str, tuple[float, bool]]:
    """By architecture: the largest relative error of a weight's gradient, and whether attention and MLPs are cut."""
    ranks = ranks_from_environment()
    device = torch.device("cpu")
    ranks.join(device)
    found = {}
    for name in names:
        refuse_model(ARCHITECTURES[name], name, 2)
        whole, cut = (make_model(ARCHITECTURES[name]) for _ in range(2))
        lm = TreeLM(whole)
        (row,) = lm.rows(branching_examples(), 128)
        row_loss(lm, lm.place(row)).loss.backward()
        wanted = {name: p.grad for name, p in whole.named_parameters()}
        fuse_modules(cut)
        mesh = mesh_of(ranks, device, 1, 2)
        split = Split(cut, mesh, device)
        other = TreeLM(cut, fuse=False, enter=split.around(shard(cut, mesh, prepare=split.cut)))
        other.dealt, other.recompute = split.dealt, split.recompute
        assert (other.on_trees, other.why_not) == (lm.on_trees, lm.why_not)
        row_loss(other, other.place(row)).loss.backward()
        worst = 0.0
        for key, parameter in cut.named_parameters():
            gradient = everywhere(parameter.grad)
            worst = max(worst, float((gradient - wanted[key]).norm() / wanted[key].norm().clamp(min=1e-6)))
        of_layers = [
            p for key, p in cut.named_parameters() if ".layers." in key and ".gate." not in key and p.dim() > 1
        ]
        found[name] = worst, all(p.to_local().numel() * 2 == p.numel() for p in of_layers)
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("phi3", "colwise_gather_output"),
        ("gpt2", "no plan"),
        ("bloom", "no plan"),
    ],
)
def test_what_a_model_cannot_is_said_by_its_config(name, said):
    with pytest.raises(ConfigError, match=said):
        refuse_model(ARCHITECTURES[name], name, 2)


@pytest.mark.parametrize(
    ("team", "changes", "said"),
    [
        (4, {}, "2 key heads, which 4"),
        (3, {}, "4 attention heads, which 3"),
        (4, {"num_key_value_heads": 4, "intermediate_size": 50}, "50 features in an MLP, which 4"),
    ],
)
def test_what_cannot_be_cut_evenly_is_said_with_both_numbers(team, changes, said):
    with pytest.raises(ConfigError, match=said):
        refuse_model(LlamaConfig(**(GROUPED | changes)), "it", team)


@pytest.mark.parametrize(
    "setting",
    [
        "context_ranks=2", "quantize=nf4", "optimizer=muon method=full", "router_aux_loss=0.1",
        "checkpointing=selective", "checkpointing=auto", "compile=true", "offload_weights=true",
        "method=peft peft={type:IA3}", "optimizer_in_backward=true method=full clip=null",
        "master_weights=stochastic method=full",
    ],
)  # fmt: skip
def test_settings_that_need_whole_layers_are_refused_before_anything_is_read(folders, tmp_path, setting):
    changes = [text.replace(":", ": ") if text.startswith("peft=") else text for text in setting.split(" ")]
    settings = settings_for(folders["llama"], tmp_path, "run", *changes, "tensor_ranks=2")
    with pytest.raises(ConfigError, match="tensor_ranks=2: " + setting.split("=")[0]):
        refuse_groups(settings, Ranks(size=2, on_host=2))
    refuse_groups(settings.model_copy(update={"tensor_ranks": 1}), Ranks(size=2, on_host=2))


@pytest.mark.parametrize(
    ("ranks", "said"),
    [(Ranks(), "there is one"), (Ranks(size=6, on_host=3), "3 on each"), (Ranks(size=4), "1 on each")],
)
def test_processes_that_are_no_groups_are_refused(folders, tmp_path, ranks, said):
    with pytest.raises(ConfigError, match=said):
        refuse_groups(settings_for(folders["llama"], tmp_path, "run", "tensor_ranks=2"), ranks)


def test_neighbours_compute_one_row(folders, tmp_path):
    run = run_on(4, settings_for(folders["llama"], tmp_path, "run", "tensor_ranks=2", "max_steps=2"))
    for step in map(json.loads, run.trace.read_text().splitlines()):
        assert {row["rank"] for row in step["rows"]} == {0, 2}
        assert {name for row in step["rows"] for name in row["conversations"]} == set(step["conversations"])


def test_a_part_of_dropout_is_that_of_the_whole():
    x = torch.rand(1, 5, 12) + 1
    torch.manual_seed(3)
    whole = torch.nn.Dropout(0.4)(x)
    for part in range(3):
        torch.manual_seed(3)
        found = PartOfDropout(0.4, part, 3)(x.chunk(3, -1)[part])
        torch.testing.assert_close(found, whole.chunk(3, -1)[part])
    assert (whole == 0).any()
    assert torch.equal(PartOfDropout(0.4, 0, 3).eval()(x), x)


def test_a_head_that_is_trained_beside_lora_is_updated_by_several_processes(folders, tmp_path):
    """Not cut: its weights were read whole after the probe, and the process ended in a segmentation fault."""
    changes = ["lora.modules_to_save=[lm_head]", "ema=0.9", "max_steps=6"]
    alone = train(settings_for(folders["llama"], tmp_path, "alone", *changes))
    assert_same_course(alone, run_on(2, settings_for(folders["llama"], tmp_path, "two", *changes)))


def test_what_a_layer_cannot_be_cut_by_is_named(folders):
    found = together(2, cut_each, folders["llama"])
    assert isinstance(found[0], list), found[0]
    ia3, uneven, alone, other = found[0]
    assert "self_attn.k_proj is a Linear, of which no process can compute a part" in ia3
    assert "mlp.gate_proj.weight is [47, 32], of which 2 processes cannot share the 47 evenly" in uneven
    assert "cuts model.layers.*.mlp by colwise alone" in alone
    assert "more that is trained than hidden states (argument extra)" in other


def cut_each(rank: int, folder: Path) -> list[str]:
    """What is said of an adapter that is not cut, of uneven features, of half a plan, and of a second trained input."""
    ranks = ranks_from_environment()
    device = torch.device("cpu")
    ranks.join(device)
    mesh = mesh_of(ranks, device, 1, 2)

    def said(model: torch.nn.Module, then=lambda layer: None) -> str:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        try:
            Split(model, mesh, device).cut(layer := base.model.layers[0])
            then(layer)
        except ConfigError as error:
            return str(error)
        return "nothing"

    def llama(**changes) -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(**(GROUPED | changes)))

    half = llama()
    half.config.base_model_tp_plan = {"layers.*.mlp.gate_proj": "colwise"}
    extra = torch.ones(1, requires_grad=True)
    return [
        said(get_peft_model(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))),
        said(llama(intermediate_size=47)),
        said(half),
        said(llama(), lambda layer: layer(torch.ones(1, 3, 32), extra=extra)),
    ]


def test_lora_on_experts_is_refused_by_name(folders, tmp_path):
    found = together(2, run_as, settings_for(folders["mixtral"], tmp_path, "run", "tensor_ranks=2"))
    assert any("layers.*.mlp.experts is a ParamWrapper: LoRA on experts" in text for text in found), found
    assert any(text.startswith("Elsewhere") for text in found), found
