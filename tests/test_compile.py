"""Compiled layers and liger's kernels: the same numbers as without them, and said where they cannot be used."""

import os
import shutil
import sys
import types

import pytest
import torch
from tiny import ON_TREES, branching_examples, make_conversations, make_model, make_model_folder, write_rows

from graft.config.train import Lora, load_train
from graft.errors import ConfigError
from graft.model.fused.compile import compile_layers, compiler_cache, keep_compiled, wants_compile
from graft.model.fused.liger import use_liger, wants_liger
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_lora
from graft.tokens.tree import total_weight
from graft.train.loop import train
from graft.train.loss import row_loss

CPU = torch.device("cpu")


def two_layers(family: str = "llama"):
    """The last layer is never compiled, so that one is."""
    return make_model(ON_TREES[family])


def with_lora(model):
    tuned = add_lora(model, Lora(r=4), seed=0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return tuned


def loss_and_gradients(lm: TreeLM, examples):
    lm.model.zero_grad()
    weight = total_weight(examples)
    loss = 0.0
    for row in lm.rows(examples, 128):
        share = row_loss(lm, lm.place(row)).nll / weight
        share.backward()
        loss += float(share.detach())
    return loss, {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}


def assert_compiled_equals(model, backend: str, bound: float) -> None:
    lm = TreeLM(model, row_step=128, fuse=False)
    wanted = loss_and_gradients(lm, branching_examples())
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compile_layers(lm.base, backend) == 1
    found = loss_and_gradients(lm, branching_examples())
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made > before, "nothing was compiled"
    loss_and_gradients(lm, branching_examples(seed=2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made, "another row of the length was compiled for"
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-7)) < bound, name


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch, tmp_path):
    """Nothing that another test compiled, and no files but in its own folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("checkpointed", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_layers_of_lora_as_the_compiler_reads_them(checkpointed, backend):
    """The graphs that the compiler is given, run as they are: what it captures is right, whatever it makes of it."""
    model = with_lora(two_layers())
    if checkpointed:
        model.get_base_model().enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_compiled_equals(model, backend, 1e-5)


@pytest.mark.slow
def test_a_layer_that_is_compiled_by_inductor():
    if shutil.which("g++") is None:
        pytest.skip("NOT TESTED: no C++ compiler")
    assert_compiled_equals(two_layers(), "inductor", 5e-5)


def test_a_run_with_compiled_layers_learns_the_same(tmp_path, monkeypatch, capsys):
    compiled = []

    def by_eager(model):
        compiled.append(compile_layers(model, "eager"))
        return compiled[-1]

    monkeypatch.setattr("graft.train.computing.compile_layers", by_eager)
    base = make_model_folder(tmp_path / "base")
    data = write_rows(tmp_path / "data.jsonl", make_conversations())
    losses = []
    for setting in ("auto", "true"):
        made = [f"model={base}", f"data={data}", "split.val=0", "max_steps=3", "warmup=0", "lr=1e-2", "batch_size=8"]
        run = train(load_train(None, [*made, f"compile={setting}", f"out={tmp_path / setting}"]))
        losses.append([row["loss"] for row in run.read_metrics() if row["kind"] == "train"])
    assert compiled == [1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert "1 layers compiled, rows padded to multiples of 512 tokens" in capsys.readouterr().err


def test_bloom_is_left_as_it_is():
    lm = TreeLM(two_layers("bloom"), fuse=False)
    assert compile_layers(lm.base, "eager") == 0


def test_what_is_compiled_is_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "kept"))
    for own in ("", "/tmp/torchinductor_someone"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", own)
        monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp")
        keep_compiled()
        assert compiler_cache() == tmp_path / "kept" / "compiled"
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(compiler_cache())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/users/own")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/users/own"


def test_compiling_is_asked_for_and_refused_with_the_reason(monkeypatch):
    assert not wants_compile("auto", CPU)
    assert not wants_compile(False, CPU)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler 'no-such-compiler'; use compile=auto"):
        wants_compile(True, CPU)
    with pytest.raises(ConfigError, match="does not serve mps"):
        wants_compile(True, torch.device("mps"))


def test_liger_is_for_cuda_and_not_beside_the_compiler():
    assert not wants_liger("auto", CPU, compiled=False)
    assert not wants_liger("none", torch.device("cuda"), compiled=False)
    assert not wants_liger("auto", torch.device("cuda"), compiled=True)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        wants_liger("liger", CPU, compiled=False)


def fake_liger(monkeypatch, wrong: float = 0.0):
    """The two functions of liger-kernel that are used, as their documentation describes them, in plain torch."""

    class Norm:
        @staticmethod
        def apply(x, weight, eps, offset, casting_mode, in_place):
            assert in_place is False
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            return normed * (weight + offset) * (1 + wrong)

    class Gate:
        @staticmethod
        def apply(a, b):
            return torch.nn.functional.silu(a) * b * (1 + wrong)

    for name, found in (("rms_norm", {"LigerRMSNormFunction": Norm}), ("swiglu", {"LigerSiLUMulFunction": Gate})):
        module = types.ModuleType(f"liger_kernel.ops.{name}")
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, f"liger_kernel.ops.{name}", module)
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.mark.parametrize(
    ("family", "norms", "gated"), [("llama", 5, 2), ("gemma", 5, 0), ("qwen3", 9, 2), ("gpt2", 0, 0)]
)
def test_liger_replaces_what_gives_the_same_numbers(monkeypatch, family, norms, gated):
    fake_liger(monkeypatch)
    wanted = loss_and_gradients(TreeLM(make_model(ON_TREES[family])), branching_examples())
    model = make_model(ON_TREES[family])
    assert use_liger(model) == {"norms": norms, "feed-forward layers": gated}
    assert type(model).forward is type(make_model(ON_TREES[family])).forward
    found = loss_and_gradients(TreeLM(model, fuse=False), branching_examples())
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    for name, gradient in wanted[1].items():
        assert float((found[1][name] - gradient).norm() / gradient.norm().clamp_min(1e-7)) < 1e-4, name


def test_liger_leaves_our_own_fused_operations(monkeypatch):
    fake_liger(monkeypatch)
    lm = TreeLM(make_model(ON_TREES["llama"]))
    assert use_liger(lm.model) == {"norms": 0, "feed-forward layers": 0}


def test_liger_is_not_used_where_its_numbers_differ(monkeypatch):
    fake_liger(monkeypatch, wrong=0.01)
    assert use_liger(make_model(ON_TREES["llama"])) == {"norms": 0, "feed-forward layers": 0}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "norms", "gated"), [("llama", 5, 2), ("gemma", 5, 0), ("qwen3", 9, 2)])
def test_liger_on_a_gpu(dtype, family, norms, gated):
    if not torch.cuda.is_available():
        pytest.skip("NOT TESTED: no CUDA device")
    pytest.importorskip("liger_kernel", reason="NOT TESTED: liger-kernel is not installed")
    model = make_model(ON_TREES[family]).to("cuda", dtype)
    assert use_liger(model) == {"norms": norms, "feed-forward layers": gated}
    assert TreeLM(model).why_not is None


@pytest.mark.gpu
def test_compiled_layers_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("NOT TESTED: no CUDA device")
    assert_compiled_equals(with_lora(two_layers()).to("cuda"), "inductor", 5e-5)
