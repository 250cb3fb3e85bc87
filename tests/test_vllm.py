"""The vLLM engine against a module with the same interface: what it is asked, and in which order answers come back."""

import json
import sys
import types
from dataclasses import dataclass, field

import pytest
from tiny import make_conversations, make_model_folder, write_rows

from graft.cli.main import main
from graft.config.train import Sampling
from graft.errors import InputError
from graft.model.answers.room import Generated
from graft.use import vllm as engine
from graft.use.engine import check_engine, open_engine
from graft.use.open import resolve

LIMIT = 64


@dataclass
class SamplingParams:
    """The fields of vLLM's own that the engine sets; another name is an error."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int | None
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Calls:
    made: list[dict] = field(default_factory=list)
    generated: list[tuple] = field(default_factory=list)


@pytest.fixture
def vllm(monkeypatch) -> Calls:
    """A module `vllm` that answers with the prompt's own ids, then the first stop id where there is room."""
    calls = Calls()

    class LLM:
        def __init__(self, **settings):
            calls.made.append(settings)
            config = types.SimpleNamespace(max_model_len=LIMIT)
            self.llm_engine = types.SimpleNamespace(model_config=config)

        def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
            assert use_tqdm is False
            calls.generated.append((prompts, sampling_params, lora_request))
            outputs = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                said = [*prompt["prompt_token_ids"], params.stop_token_ids[0]][: params.max_tokens]
                outputs.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=said)]))
            return outputs

    module, lora, request = (types.ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    module.__spec__ = types.SimpleNamespace(name="vllm")
    module.LLM, module.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for name, made in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, made)
    return calls


def test_settings_stop_set_and_order_are_handed_on(vllm, tmp_path, monkeypatch):
    folder = make_model_folder(tmp_path / "model")
    opened = open_engine("vllm", resolve(str(folder)), "auto", "bf16", False)
    (made,) = vllm.made
    assert made["model"] == made["tokenizer"] == str(folder)
    assert made["dtype"] == "bfloat16"
    assert made["generation_config"] == "vllm"  # the folder's own is switched off
    assert "enable_lora" not in made
    monkeypatch.setattr(engine, "AT_ONCE", 2)
    sampling = Sampling(max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=5, repetition_penalty=1.2, seed=8)
    prompts = [[10, 11], [20, 21, 22, 23, 24], [30, 2, 31], list(range(3, 3 + LIMIT - 2))]
    batches = list(opened.answers(prompts, (2, 7), sampling))
    assert batches == [
        [(0, Generated((10, 11), True)), (1, Generated((20, 21, 22, 23), False))],
        [(2, Generated((30,), True)), (3, Generated((3, 4), False))],
    ]
    params = [params for _, part, _ in vllm.generated for params in part]
    assert [one.max_tokens for one in params] == [4, 4, 4, 2]  # the context has 64
    wanted = SamplingParams(4, 0.7, 0.9, 5, 1.2, 8, [2, 7], True, False)
    assert params[0] == wanted
    assert all(adapter is None for *_, adapter in vllm.generated)
    list(opened.answers(prompts[:1], (2,), Sampling(seed=8)))
    assert vllm.generated[-1][1][0].seed is None  # greedy


def test_an_adapter_goes_onto_its_base(vllm, tmp_path):
    folder = make_model_folder(tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 12, "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    opened = open_engine("vllm", resolve(str(adapter)), "cuda", "auto", True)
    (made,) = vllm.made
    assert (made["model"], made["enable_lora"], made["max_lora_rank"]) == (str(folder), True, 16)
    assert made["trust_remote_code"] is True
    list(opened.answers([[5]], (2,), Sampling()))
    assert vllm.generated[0][2] == LoRARequest("adapter", 1, str(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(InputError, match="plain LoRA adapters only"):
        open_engine("vllm", resolve(str(adapter)), "auto", "auto", False)


def test_what_it_cannot_do_is_said_before_a_model_is_loaded(vllm, tmp_path):
    with pytest.raises(InputError, match="num_beams 3: beams are not asked of vLLM"):
        check_engine("vllm", Sampling(num_beams=3))
    folder = make_model_folder(tmp_path / "model")
    with pytest.raises(InputError, match="device cpu: vLLM chooses its device itself"):
        open_engine("vllm", resolve(str(folder)), "cpu", "auto", False)
    assert not vllm.made


def test_without_vllm_the_install_command_is_named():
    if "vllm" in sys.modules:
        pytest.skip("vLLM is installed")
    with pytest.raises(InputError, match=r'pip install "graft-llm\[vllm\]"'):
        check_engine("vllm", Sampling())


def test_predict_with_vllm(vllm, tmp_path, monkeypatch):
    folder = make_model_folder(tmp_path / "model")
    data, out = write_rows(tmp_path / "data.jsonl", make_conversations(5)), tmp_path / "out.jsonl"
    words = ["graft", "predict", str(folder), "--data", data, "--out", str(out), "--engine", "vllm"]
    monkeypatch.setattr(sys, "argv", [*words, "--max-new-tokens", "3"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(5)]
    assert json.loads((tmp_path / "out.jsonl.settings.json").read_text())["engine"] == "vllm"
