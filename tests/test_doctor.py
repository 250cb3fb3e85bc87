"""graft doctor: what it finds is true, a broken device is found out, and nothing private is told."""

import getpass
import json
import socket
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from graft.cli.main import main
from graft.model.attention.segments import BACKENDS, DENSE, SEGMENTS, dense_attention, register
from graft.model.device import pick_precision
from graft.model.probe_device import Tried
from graft.use import doctor as doctor_module
from graft.use import parity
from graft.use.parity import losses, reference, try_backend, try_training

CPU = torch.device("cpu")


def run(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["graft", "doctor", *words])
    code = 0
    try:
        main()
    except SystemExit as leave:
        code = int(leave.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_tiny_model_learns_and_shares_and_is_always_the_same():
    wanted = reference()
    assert wanted[-1] < 0.7 * wanted[0]
    assert wanted == reference()
    examples = parity.tiny_examples(0)
    lm = parity.TreeLM(parity.tiny_model())
    assert sum(map(len, lm.rows(examples, parity.ROW_TOKENS))) < 0.7 * sum(len(e.ids) for e in examples)


def test_trees_are_compared_with_one_by_one_in_every_format():
    wanted = reference()
    for name in ("fp32", "bf16"):
        tried = try_training(CPU, name, wanted)
        assert tried.works, tried
        assert tried.error is not None
        assert tried.error > 0  # other sums, so other roundings: it was computed in another way
    assert not try_training(CPU, "fp32", [loss * 1.001 for loss in wanted]).works


def test_a_wrong_attention_and_a_wrong_update_are_found_out(monkeypatch):
    def blind(query, key, value, tree, shape):  # to branches: each node sees all before it
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=shape.scaling, enable_gqa=True)

    def shrunk(query, key, value, tree, shape):
        return dense_attention(query, key, value, tree, shape) * 0.99

    for name, wrong in (("graft_blind", blind), ("graft_shrunk", shrunk)):
        monkeypatch.setitem(BACKENDS, name, wrong)
        register(name, wrong)
        tried = try_backend(CPU, "fp32", name, branches=True)
        assert "the loss is off" in tried.why, tried
    for backend in (SEGMENTS, DENSE):
        assert try_backend(CPU, "fp32", backend, branches=True).works
        assert try_backend(CPU, "fp32", backend, branches=False).works

    class Lazy(torch.optim.AdamW):
        def step(self, closure=None):
            pass

    wanted = reference()
    monkeypatch.setattr(torch.optim, "AdamW", Lazy)
    assert losses(CPU, pick_precision("fp32", CPU), 3) != wanted[:3]
    assert not try_training(CPU, "fp32", wanted).works


def test_it_says_all_is_well_and_tells_nothing_private(monkeypatch, capsys):
    secrets = {"HF_TOKEN": "hf_thisisasecret", "HTTPS_PROXY": "http://jane:pw123456@proxy:3128"}
    private = {"HF_HOME": str(Path.home() / "hf"), "GRAFT_CACHE": f"/scratch/{getpass.getuser()}/cache"}
    for name, value in (secrets | private | {"HF_ENDPOINT": "https://bob:pw654321@mirror"}).items():
        monkeypatch.setenv(name, value)

    def closed(*_args, **_named):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", closed)
    code, out, _ = run(monkeypatch, capsys, "--device", "cpu", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["well"]
    (device,) = found["devices"]
    assert device["trains"]
    assert device["precision_auto"] == "fp32"
    by_name = {finding["what"]: finding for finding in device["findings"]}
    for what in ("product and gradient, bf16", "fused AdamW", "20 steps as one by one, fp32", "attention=segments"):
        assert by_name[what]["works"], by_name[what]
    assert not by_name["attention=varlen"]["works"]
    assert found["versions"]["torch"] == torch.__version__
    for text in (*secrets.values(), "pw654321", "jane", str(Path.home()) + "/", f"/{getpass.getuser()}/"):
        assert text not in out
    assert found["environment"]["HF_TOKEN"] == "***"
    assert found["environment"]["HF_HOME"].startswith("~")
    assert found["environment"]["HF_ENDPOINT"] == "https://***@mirror"


def test_a_device_that_cannot_train_is_exit_code_2(monkeypatch, capsys):
    for name in ("_try_quantised", "_try_setting"):
        monkeypatch.setattr(doctor_module, name, lambda *_: Tried(True))
    monkeypatch.setattr(doctor_module, "try_training", lambda *_: Tried(True, 1e-6))
    monkeypatch.setattr(doctor_module, "try_fused_adamw", lambda _: Tried(False, None, "no kernel for it"))
    code, out, _ = run(monkeypatch, capsys, "--device", "cpu")
    assert code == 2
    assert "cpu cannot train: fused AdamW: no kernel for it" in out
    assert "all is well" not in out
    monkeypatch.setattr(doctor_module, "try_fused_adamw", lambda _: Tried(True, 0.0))
    code, out, _ = run(monkeypatch, capsys, "--device", "cpu")
    assert (code, "all is well: cpu can train" in out) == (0, True)
    monkeypatch.setattr(doctor_module, "_try_setting", lambda setting, *_: Tried(setting != "flex", None, "no"))
    assert run(monkeypatch, capsys, "--device", "cpu")[0] == 0  # not needed


def test_a_device_that_is_not_there_is_exit_code_2(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "--device", "npu")
    assert code == 2
    assert "torch_npu" in out
    assert "Traceback" not in out + err
    code, out, _ = run(monkeypatch, capsys, "--device", "npu", "--json")
    assert code == 2
    assert json.loads(out)["devices"] == []


def test_help_loads_no_torch():
    import subprocess

    script = "import sys\nfrom graft.cli.main import app\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
