"""Every way of tuning: it learns, what it saves loads elsewhere with equal logits, and it resumes to the same bits."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
from peft.config import PromptLearningConfig
from safetensors.torch import load_file
from tiny import GROUPED, ON_TREES, branching_examples, make_model, make_model_folder, make_tokenizer, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, LlamaConfig

from graft.config.train import load_train
from graft.errors import ConfigError, Diverged, InputError
from graft.model.attention.segments import TreeRow
from graft.model.files.load import load_model
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_adapter, trainable
from graft.model.tuned.kinds import REFUSED, peft_config
from graft.runs import RunFolder
from graft.tokens.tree import build_rows
from graft.train import loop
from graft.train.loop import train
from graft.train.loss import row_loss
from graft.train.saving.checkpoint import newest_checkpoint
from graft.train.tuning import check_tuning
from graft.train.updates.in_backward import BackwardStepper
from graft.train.updates.optimizers import OPTIMIZERS
from graft.train.updates.schedule import SCHEDULES, learning_rate

IDS = torch.arange(3, 40)[None]
NEW_WORDS = ("Arvenia", "Tolen")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return _folder(tmp_path_factory.mktemp("models") / "llama")


def _folder(folder: Path, **changes) -> Path:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = GROUPED | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | changes
    make_model(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


def _settings(base: Path, tmp_path: Path, *overrides: str, out: str = "run"):
    data = tmp_path / "data.jsonl"
    if not data.exists():
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"Is {n} in Arvenia?"},
                    {"role": "assistant", "content": "Tolen"},
                ]
            }
            for n in range(12)
        ]
        write_rows(data, rows)
    common = [
        f"model={base}", f"data={data}", f"out={tmp_path / out}", "batch_size=4", "max_steps=4", "lr=5e-3",
        "split.val=0.2", "encode.max_length=64", "eval_every=50", "save_every=50", "keep_last=1", "warmup=0",
    ]  # fmt: skip
    return load_train(None, [*common, *overrides])


def _train_and_resume(base: Path, tmp_path: Path, monkeypatch, *overrides: str) -> tuple[RunFolder, torch.Tensor]:
    """A run of four steps, after its second half was made once more from its checkpoint; and the live logits."""
    live = {}
    finish = loop.Fit.finish

    def look(fit):
        finish(fit)
        fit.lm.base.set_attn_implementation("sdpa")
        fit.lm.model.eval()
        with torch.no_grad():
            live["logits"] = fit.lm.model(input_ids=IDS).logits

    monkeypatch.setattr(loop.Fit, "finish", look)
    run = train(_settings(base, tmp_path, *overrides, "save_every=2", "keep_last=2"))
    monkeypatch.setattr(loop.Fit, "finish", finish)
    steps, weights = _steps(run), _weights(run.final)
    assert len(steps) == 4
    shutil.rmtree(run.final)
    shutil.rmtree(run.checkpoints / "step-4")
    resumed = train(_settings(base, tmp_path, *overrides, "save_every=2", "keep_last=2", "resume=true"))
    assert _steps(resumed) == steps
    again = _weights(resumed.final)
    assert weights.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    return run, live["logits"]


def _steps(run: RunFolder) -> list[tuple]:
    names = ("step", "loss", "objective", "lr", "grad_norm")
    return [tuple(row.get(name) for name in names) for row in run.read_metrics() if row["kind"] == "train"]


def _validations(run: RunFolder) -> list[float]:
    return [row["loss"] for row in run.read_metrics() if row["kind"] == "val"]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def _logits(folder: Path, base: Path, rows: int | None = None) -> torch.Tensor:
    """By plain transformers and PEFT."""
    adapter = (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(base if adapter else folder)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    if adapter:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


FULL = ("method=full", "lr=1e-3")
WAYS = {
    "lora": (),
    "lora of a layer": (
        "lora.layers_to_transform=[1]", "lora.target_modules=[q_proj, up_proj]", "lora.rank_pattern={q_proj: 4}"
    ),
    "dora": ("lora.use_dora=true", "lora.init_lora_weights=gaussian"),
    "orthogonal": ("lora.init_lora_weights=orthogonal",),
    "a bias": ("lora.lora_bias=true",),
    "pissa": ("lora.init_lora_weights=pissa", "lora.r=4", "lora.alpha=8", "lora.use_rslora=true"),
    "pissa by iteration, dora": ("lora.init_lora_weights=pissa_niter_4", "lora.r=4", "lora.use_dora=true"),
    "olora and an average": ("lora.init_lora_weights=olora", "lora.r=4", "lora.alpha=4", "ema=0.8", "lr=1e-3"),
    "eva": ("lora.init_lora_weights=eva", "lora.r=4"),
    "corda": ("lora.init_lora_weights=corda", "lora.r=4", "lora.alpha=4", "lr=1e-3"),
    "lora+": ("lora.loraplus_ratio=16", "lr=1e-3"),
    "tokens": ("lora.trainable_token_indices=[5,6,7]", "lora.target_modules=[q_proj]"),
    "vera": ("method=peft", "peft={type: vera, r: 8}", "lr=5e-2"),
    "ia3": ("method=peft", "peft={type: IA3}", "lr=5e-2"),
    "full": FULL,
    "freeze": ("method=freeze", "freeze={layers: 1, patterns: [lm_head]}", "lr=1e-3"),
    "noise": ("neftune_alpha=5",),
    "smoothing": ("label_smoothing=0.1",),
    "dft": ("loss=dft",),
    "average": ("ema=0.8", *FULL),
    "in backward": ("optimizer_in_backward=true", "clip=null", *FULL),
}  # fmt: skip
OPTIMIZER_OPTIONS = {
    "adafactor": ("optimizer_options={d: 1.5, beta2_decay: -0.7}",),
    "lion": ("lr=3e-4",),
    "schedule_free_adamw": ("schedule=constant",),
    "galore": ("optimizer_options={rank: 8, update_proj_gap: 2}", "lr=5e-3"),
    "apollo": ("optimizer_options={rank: 8, update_proj_gap: 2, scale_type: tensor}",),
    "sgd": ("optimizer_options={momentum: 0.9, nesterov: true}", "lr=0.3"),
}
WAYS |= {f"by {name}": (*FULL, f"optimizer={name}", *OPTIMIZER_OPTIONS.get(name, ())) for name in OPTIMIZERS}


@pytest.mark.parametrize("way", WAYS)
def test_a_way_of_tuning_learns_loads_elsewhere_and_resumes(base, tmp_path, monkeypatch, way):
    if way == "by adamw_8bit":  # smaller matrices than bitsandbytes packs would prove nothing
        base = _folder(tmp_path / "wide", hidden_size=64, intermediate_size=96)
    run, live = _train_and_resume(base, tmp_path, monkeypatch, *WAYS[way])
    found = _logits(run.final, base)
    assert (found - live).abs().max() < 1e-5
    assert (found - _logits(base, base)).abs().max() > 1e-3
    validations = _validations(run)
    assert validations[-1] < validations[0] - 0.01
    checkpoint = newest_checkpoint(run)
    assert torch.equal(_logits(checkpoint, base), found), "a checkpoint holds what was judged"


@pytest.mark.parametrize("way", ["average", "by schedule_free_adamw", "pissa"])
def test_looking_and_saving_change_nothing(base, tmp_path, way):
    often = train(_settings(base, tmp_path, *WAYS[way], "eval_every=1", "save_every=1", out="often"))
    seldom = train(_settings(base, tmp_path, *WAYS[way], out="seldom"))
    assert _steps(often) == _steps(seldom)
    assert all(torch.equal(_weights(often.final)[name], value) for name, value in _weights(seldom.final).items())


def test_the_best_weights_come_back_with_an_average_and_a_subtracted_start(base, tmp_path):
    options = ("lora.init_lora_weights=pissa", "lora.r=4", "ema=0.5", "lr=0.5", "patience=1", "eval_every=1")
    run = train(_settings(base, tmp_path, *options, "max_steps=12"))
    validations = _validations(run)
    best = validations.index(min(validations))
    assert best < len(validations) - 1, "the last weights must not be the best"
    kept = _weights(run.checkpoints / f"step-{best}")
    assert kept.keys() == _weights(run.final).keys()
    assert all(torch.equal(_weights(run.final)[name], value) for name, value in kept.items())


EXACT = {
    "LORA": {"use_dora": True}, "VERA": {"r": 4}, "FOURIERFT": {"n_frequency": 50}, "WAVEFT": {"n_frequency": 50},
    "BOFT": {"boft_block_size": 4}, "VBLORA": {"vector_length": 8, "num_vectors": 16}, "C3A": {"block_size": 16},
    "OFT": {"oft_block_size": 4, "r": 0}, "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5]}, "MISS": {"r": 8},
    "SHIRA": {"r": 4}, "ROAD": {"group_size": 16}, "PSOFT": {"r": 8}, "BEFT": {}, "DEFT": {}, "DELORA": {}, "FROD": {},
    "GLORA": {}, "GRALORA": {}, "HIRA": {}, "HRA": {}, "IA3": {}, "LN_TUNING": {}, "LOHA": {}, "LOKR": {}, "OSF": {},
    "PEANUT": {},
    "PVERA": {"r": 4}, "SUPERTUNING": {}, "TINYLORA": {}, "UNILORA": {},
}  # fmt: skip
"""Every kind of PEFT that tunes weights and is not refused, with options that fit a tiny model."""
ROUNDING = {"FOURIERFT": 5e-4}
"""It makes scores of over a thousand, whose last digit is 1e-4: plain attention in fp32 is 9e-5 off fp64 there."""


def _peft(kind: str, options: dict):
    settings = load_train(None, ["model=a", "data=b", "method=peft"], {"peft": {"type": kind, **options}})
    return peft_config(settings)


@pytest.mark.parametrize("kind", EXACT)
def test_a_kind_of_peft_is_exact_on_trees_and_loads_elsewhere(tmp_path, kind):
    warnings.simplefilter("ignore")
    model = add_adapter(make_model(ON_TREES["llama"]), _peft(kind, EXACT[kind]), seed=0)
    model.train(kind != "PVERA")  # PVeRA draws its update anew for each token while training, as dropout does
    lm, parameters, examples = TreeLM(model), trainable(model), branching_examples()
    assert lm.on_trees
    on_trees, alone = build_rows(examples, 400), build_rows(examples, 400, share=False)
    for _ in range(2):  # away from where the adapter changes nothing
        _gradients(lm, parameters, on_trees)
        torch.optim.SGD(parameters.values(), lr=0.01).step()
    found, wanted = _gradients(lm, parameters, on_trees), _gradients(lm, parameters, alone)
    size = sum(float(g.norm() ** 2) for g in wanted.values())
    error = sum(float((found[name] - g).norm() ** 2) for name, g in wanted.items())
    assert size > 0
    assert found.keys() == wanted.keys()
    assert (error / size) ** 0.5 < ROUNDING.get(kind, 1e-5)
    model.eval().save_pretrained(tmp_path, save_embedding_layers=False)
    lm.base.set_attn_implementation("sdpa")
    fresh = make_model(ON_TREES["llama"])
    with torch.no_grad():
        before = fresh(IDS).logits
        live = model(input_ids=IDS).logits
        elsewhere = PeftModel.from_pretrained(fresh, tmp_path).eval()(input_ids=IDS).logits
    assert torch.allclose(elsewhere, live, atol=1e-5)
    assert not torch.allclose(before, live, atol=1e-4)


def _gradients(lm, parameters, rows) -> dict[str, torch.Tensor]:
    for parameter in parameters.values():
        parameter.grad = None
    for row in rows:
        row_loss(lm, TreeRow.of(row, lm.device)).loss.backward()
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def test_every_kind_is_either_tested_or_refused_with_a_reason():
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if kind.value in EXACT:
            continue
        assert kind.value in REFUSED or issubclass(config, PromptLearningConfig), kind.value
        with pytest.raises(ConfigError, match=rf"peft.type = {kind.value} cannot be trained by graft: "):
            _peft(kind.value, {})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=peft", "peft={type: VERRA}"), "PEFT has no such kind; did you mean `VERA`"),
        (
            ("method=peft", "peft={type: VERA, vera_dropot: 0.1}"),
            "no option `vera_dropot`; did you mean `vera_dropout`",
        ),
        (("method=peft", "peft={type: OFT, r: 4, oft_block_size: 4}"), "PEFT refuses it: "),
        (("method=peft", "peft={type: LORA, eva_config: {rhoo: 1}}"), "eva_config has no option `rhoo`"),
        (("method=peft", "peft={type: VERA, r: wide}"), "r = 'wide': a number is expected"),
        (("method=peft", "peft={type: VERA, save_projection: 3}"), "save_projection = 3: true or false is expected"),
        (("method=peft",), "method=peft needs the kind"),
        (("method=peft", "peft={type: VERA}", "new_tokens=[a]"), "no place for new tokens"),
        (("lora.init_lora_weights=loftq",), "LoftQ replaces the base's weights"),
        (("lora.init_lora_weights=pisa",), "not known; use true, gaussian"),
        (("optimizer_options={amsgrd: true}",), "did you mean `amsgrad`"),
        (("optimizer=sgd", "optimizer_options={nesterov: true}"), "sgd refuses them"),
        (("optimizer=galore",), "with method=lora it is small"),
        (("optimizer=lion", "beta2=0.9"), "lion has no beta2"),
        (("optimizer=schedule_free_adamw",), "set schedule=constant"),
        (("optimizer=schedule_free_adamw", "schedule=constant", "ema=0.9"), "averages the weights itself"),
        (("optimizer_in_backward=true",), "there are few"),
        (("optimizer_in_backward=true", "method=full"), "set clip=null"),
        (("optimizer_in_backward=true", "method=full", "clip=null", "optimizer=muon"), "treat each weight alone"),
        (("optimizer_in_backward=true", "method=full", "clip=null", "precision=fp16"), "scaler"),
        (("label_smoothing=0.1", "loss=dft"), "set one"),
        (("schedule=wsd", "warmup=0.5", "decay=0.6"), "more than the whole run"),
        (("method=freeze", "freeze.layers=0"), "trains nothing"),
        (("lr_patterns={'(': 1e-4}",), "no regular expression"),
        (("lr_patterns={lora_A: -1}",), "more than 0"),
        (("freeze.layers=3",), "set method=freeze"),
        (("method=full", "lora.loraplus_ratio=16"), "is for adapters"),
        (("decay=0.5",), "belongs to schedule=wsd"),
        (("checkpoint_every=2",), "is for checkpointing=full"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(overrides, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        check_tuning(load_train(None, ["model=/nowhere", "data=/nowhere", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("attention=flex",), "attention=flex cannot be used"),
        (("kernels=liger",), "kernels=liger needs a CUDA device"),
        (("offload_activations=true",), "whose activations are there already"),
        (("precision=fp32", "method=full", "master_weights=stochastic"), "set precision=bf16"),
        (("method=freeze", "freeze.layers=3"), "the model has 2 decoder layers"),
    ],
)
def test_what_the_device_or_the_model_lacks_is_refused_before_there_is_a_run_folder(base, tmp_path, overrides, said):
    settings = _settings(base, tmp_path, "device=cpu", *overrides)
    with pytest.raises(ConfigError, match=said):
        train(settings)
    assert not Path(settings.out).exists()


def test_a_value_that_peft_cannot_use_is_not_laid_to_the_target_modules(base, tmp_path):
    overrides = ("method=peft", "peft={type: LOHA, r: 2.5}")
    with pytest.raises(ConfigError, match="LOHA: PEFT cannot put it on this model") as error:
        train(_settings(base, tmp_path, *overrides))
    assert "target_modules" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("lora.target_modules=[nothing]",), "linear layers: q_proj"),
        (("lr_patterns={nothing: 1e-4}",), "'nothing' is in no trained parameter's name"),
        (("method=freeze", "freeze.patterns=[nothing]"), r"model.layers.0..1.\*"),
        (("method=freeze", "new_tokens=[Arvenia]"), "leaves the embeddings as they are"),
        (
            ("new_tokens=[Arvenia]", "lora.modules_to_save=[lm_head]"),
            "new_tokens trains its own rows of embed_tokens and",
        ),
        (("new_tokens=[a]",), r"is one token already \(id \d+\)"),
        (("method=full", "optimizer_in_backward=true", "clip=null", "row_tokens=64"), r"row_tokens=\d+ or a smaller"),
        (("lora.init_lora_weights=eva", "lora.r=30", "lora.init_examples=1"), "lower lora.r"),
    ],
)
def test_what_does_not_fit_the_model_or_the_data_is_said(base, tmp_path, overrides, said):
    with pytest.raises(ConfigError, match=said):
        train(_settings(base, tmp_path, *overrides))


def test_updates_in_the_backward_pass_go_by_the_rows_of_the_model(tmp_path):
    """GPT-J is computed one example per row, which no setting tells."""
    base = make_model_folder(tmp_path / "base", GPTJConfig, n_embd=32, n_layer=2, n_head=4, rotary_dim=8)
    with pytest.raises(ConfigError, match=r"step 1 of \d+ makes \d+ rows of .* set batch_size=1"):
        train(_settings(base, tmp_path, "method=full", "optimizer_in_backward=true", "clip=null", "row_tokens=4096"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_new_tokens_are_trained_saved_and_loaded_with_tied_heads_kept(tmp_path, monkeypatch, method, tied):
    base = _folder(tmp_path / "base", tie_word_embeddings=tied)
    old = AutoTokenizer.from_pretrained(base)
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    options = (f"method={method}", f"new_tokens=[{','.join(NEW_WORDS)}]", "lora.target_modules=[q_proj]", "lora.r=2")
    run, live = _train_and_resume(base, tmp_path, monkeypatch, *options, "lr=1e-2")
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in NEW_WORDS]
    assert ids == [[len(old)], [len(old) + 1]]
    assert tokenizer.decode([*ids[0], *ids[1]]) == "".join(NEW_WORDS)
    rows = len(old) + 2
    found = _logits(run.final, base, rows if method == "lora" else None)
    assert found.shape[-1] == rows
    assert (found - live).abs().max() < 1e-5
    assert (load_model(run.final, base=str(base)).model(input_ids=IDS).logits - live).abs().max() < 1e-5
    weights = _weights(run.final)
    if method == "full":
        assert ("lm_head.weight" in weights) != tied
        return
    rows_saved = {name: value for name, value in weights.items() if "token" in name}
    assert len(rows_saved) == (1 if tied else 2)
    assert all(value.shape == (2, 32) for value in rows_saved.values()), "the new rows alone are saved"
    pieces = old.encode(NEW_WORDS[0], add_special_tokens=False)
    assert len(pieces) > 1
    name = next(name for name in rows_saved if "embed_tokens" in name)
    assert 1e-3 < (rows_saved[name][0] - table[pieces].mean(0)).abs().max() < 0.3, "began as the mean of the pieces"
    merged = load_model(run.final, base=str(base)).model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (_logits(tmp_path / "merged", base) - live).abs().max() < 1e-5


def test_init_from_goes_on_with_new_tokens_and_says_what_does_not_fit(base, tmp_path):
    first = train(_settings(base, tmp_path, "new_tokens=[Arvenia]", "method=full", out="first"))
    again = train(_settings(base, tmp_path, "new_tokens=[Arvenia]", "method=full", f"init_from={first.final}", out="b"))
    assert _validations(again)[0] == pytest.approx(_validations(first)[-1], abs=1e-6)
    lora = train(_settings(base, tmp_path, "lora.init_lora_weights=pissa", "lora.r=4", out="lora"))
    other = train(_settings(base, tmp_path, "lora.init_lora_weights=pissa", f"init_from={lora.final}", out="c"))
    assert _validations(other)[0] == pytest.approx(_validations(lora)[-1], abs=1e-5)
    with pytest.raises(InputError, match="holds a LORA adapter, not IA3"):
        train(_settings(base, tmp_path, "method=peft", "peft.type=IA3", f"init_from={lora.final}", out="d"))


def test_updates_in_the_backward_pass_are_those_after_it(base, tmp_path):
    after = train(_settings(base, tmp_path, "clip=null", *FULL, out="after"))
    within = train(_settings(base, tmp_path, "clip=null", "optimizer_in_backward=true", *FULL, out="within"))
    for name, value in _weights(after.final).items():
        assert torch.allclose(_weights(within.final)[name], value, atol=1e-7), name
    for one, other in zip(_steps(within), _steps(after), strict=True):
        assert one[4] == pytest.approx(other[4], rel=1e-4), "the norm is known afterwards"


def test_gradients_never_all_exist_in_the_backward_pass(base, tmp_path, monkeypatch):
    seen = []
    backward = BackwardStepper._backward

    def peak(stepper, loss):
        parameters = list(stepper.parameters.values())
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _: seen.append(sum(p.grad is not None for p in parameters))
            )
        backward(stepper, loss)

    monkeypatch.setattr(BackwardStepper, "_backward", peak)
    train(_settings(base, tmp_path, "clip=null", "optimizer_in_backward=true", "max_steps=1", *FULL))
    assert seen
    assert max(seen) <= 1


def test_a_bad_gradient_in_the_backward_pass_stops_the_run(base, tmp_path, monkeypatch):
    backward = BackwardStepper._backward

    def spoilt(stepper, loss):
        stepper.parameters["model.layers.0.mlp.up_proj.weight"].register_hook(lambda gradient: gradient * float("nan"))
        backward(stepper, loss)

    monkeypatch.setattr(BackwardStepper, "_backward", spoilt)
    with pytest.raises(Diverged, match=r"step 1: the gradient of model.layers.0.mlp.up_proj.weight is not finite"):
        train(_settings(base, tmp_path, "clip=null", "optimizer_in_backward=true", *FULL))


def test_learning_rates_by_pattern_and_for_the_second_matrix(base, tmp_path, monkeypatch):
    fits = []
    keep = loop.Fit.finish
    monkeypatch.setattr(loop.Fit, "finish", lambda fit: (fits.append(fit), keep(fit))[1])
    options = ("lora.loraplus_ratio=4", "lr_patterns={layers.1.self_attn: 1e-4}", "lr=1e-3", "schedule=constant")
    train(_settings(base, tmp_path, *options, "max_steps=1"))
    rates = {id(p): group["lr"] for group in fits[0].optimizer.param_groups for p in group["params"]}
    for name, parameter in fits[0].parameters.items():
        wanted = 1e-4 if "layers.1.self_attn" in name else 4e-3 if ".lora_B." in name else 1e-3
        assert rates[id(parameter)] == pytest.approx(wanted), name


def test_noise_is_off_in_validation_and_of_the_papers_size(base):
    from graft.train.noise import longest_path, noisy_embedding

    model = make_model(ON_TREES["llama"])
    lm = TreeLM(model)
    (row,) = build_rows(branching_examples(), 512)
    tree = TreeRow.of(row, lm.device)
    lengths = longest_path(row)
    for node in range(len(row)):
        assert lengths[node] == 1 + max(row.depth[node : row.end[node]])
    plain = lm.embedding(tree.ids)
    with noisy_embedding(lm.embedding, tree, 5.0):
        noise = lm.embedding(tree.ids) - plain
    assert torch.equal(lm.embedding(tree.ids), plain)
    most = 5.0 / (torch.tensor(lengths) * 32).float().sqrt()
    assert bool((noise[0].abs() <= most[:, None] + 1e-6).all())
    assert bool((noise[0].abs().amax(1) > 0.6 * most).all())


def test_validation_and_the_logged_loss_are_plain_whatever_is_trained_on(base, tmp_path):
    runs = {
        name: train(_settings(base, tmp_path, *options, "max_steps=1", "lora.r=2", out=name))
        for name, options in {"plain": (), "dft": ("loss=dft",), "smooth": ("label_smoothing=0.3",)}.items()
    }
    first = {name: _validations(run)[0] for name, run in runs.items()}
    assert first["dft"] == first["smooth"] == first["plain"]
    loss = {name: _steps(run)[0][1:3] for name, run in runs.items()}
    assert loss["dft"][0] == pytest.approx(loss["plain"][0])
    assert loss["plain"][1] is None
    assert 0 < loss["dft"][1] < 0.5 * loss["dft"][0]
    assert loss["smooth"][1] != pytest.approx(loss["plain"][0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_begins_at_the_peak_and_only_falls(schedule):
    settings = load_train(
        None, ["model=a", "data=b", f"schedule={schedule}", "warmup=0.1", "lr=1e-3", "min_lr_ratio=0.1"]
    )
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * (n + 1) for n in range(10)])
    assert rates[9] == max(rates)
    assert all(later <= earlier for earlier, later in zip(rates[9:], rates[10:], strict=False))
    assert learning_rate(100, 100, settings) >= 1e-4 * (1 - 1e-9)
    if schedule == "wsd":
        assert rates[80] == 1e-3 > rates[81]
        assert learning_rate(100, 100, settings) == pytest.approx(1e-4)
    if schedule == "inverse_sqrt":
        assert rates[39] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))


def test_experts_are_tuned_by_parameter_name(tmp_path):
    settings = load_train(
        None,
        ["model=a", "data=b", "lora.target_modules=[q_proj]", "lora.target_parameters=[mlp.experts.gate_up_proj]"],
    )
    model = add_adapter(make_model(ON_TREES["qwen3-moe"]), peft_config(settings), seed=0).train()
    lm, parameters, examples = TreeLM(model), trainable(model), branching_examples()
    assert any("experts" in name for name in parameters)
    found = _gradients(lm, parameters, build_rows(examples, 400))
    wanted = _gradients(lm, parameters, build_rows(examples, 400, share=False))
    assert any("experts" in name and g.abs().max() > 0 for name, g in wanted.items())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm().clamp_min(1e-3), name


def test_weights_of_rows_messages_and_tokens_reach_the_step(base, tmp_path):
    """A message's `weight` is its tokens' weight in the loss; a row's `weight` that of all its messages."""
    from graft.train.prepare import prepare

    def turns(n, **more):
        return [{"role": "user", "content": f"Is it {n}?"}, {"role": "assistant", "content": "Tolen", **more}]

    rows = [
        {"messages": turns(0, weight=2.0)},
        {"messages": turns(1, weight=2.0), "loss_weight": 0.25},
        {"messages": turns(2), "loss_weight": "3", "weight": 70},
        {"messages": turns(3), "loss_weight": "much"},
        {"messages": turns(4), "loss_weight": 0},
    ]
    settings = _settings(base, tmp_path, "split.val=0", "max_rejected=0.5", "batch_size=3", "max_steps=1", *FULL)
    write_rows(tmp_path / "data.jsonl", rows)
    prepared = prepare(settings, RunFolder(tmp_path / "seen"))
    found = [{float(w) for w in example.weights} for example in prepared.train.examples(range(3))]
    assert found == [{0.0, 2.0}, {0.0, 0.5}, {0.0, 3.0}], "a column that is only called `weight` means something else"
    rejects = (tmp_path / "seen" / "rejects.jsonl").read_text()
    assert "'much' is not a number from 0 up" in rejects
    assert "nothing to learn" in rejects
    other = write_rows(tmp_path / "other.jsonl", [{**row, "loss_weight": 1} for row in rows])
    assert (
        prepare(
            settings.model_copy(update={"data": load_train(None, ["model=a", f"data={other}"]).data}),
            RunFolder(tmp_path / "again"),
        ).train.key
        != prepared.train.key
    )
    (step,) = [row for row in train(settings).read_metrics() if row["kind"] == "train"]
    assert step["tokens_trained"] == sum(float(example.weights.sum()) for example in prepared.train.examples(range(3)))
