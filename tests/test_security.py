"""What comes from strangers (data, models, templates) cannot run code, leave its folder, or end the machine.

And what is the user's own business is in no file and no message.
"""

import contextlib
import datetime
import gzip
import json
import os
import pickle
import sys
import threading
import time
import zipfile

import pytest
import torch
import zstandard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import CHATML, make_conversations, make_model_folder, make_tokenizer, write_rows

from graft import console
from graft.config.clean import Cut
from graft.config.train import load_train
from graft.data.clean.cut import cut_long
from graft.data.reading import json_files, json_list, rows
from graft.data.reading.read import read_rows
from graft.errors import ConfigError, InputError
from graft.model.files.load import load_base, load_model, vocabulary_size
from graft.private import hide_secrets, hide_user, secret_in
from graft.tokens import watchdog
from graft.tokens.load import load_renderer
from graft.tokens.renderer import Renderer, TemplateRefused
from graft.tokens.watchdog import TemplateStopped, watched
from graft.types import Conversation, Message, Origin
from graft.use.open import resolve

TALK = [Message("user", "hi"), Message("assistant", "ho")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(base, tmp_path):
    """A copy to tamper with."""
    import shutil

    return shutil.copytree(base, tmp_path / "model")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


# pickles


def test_a_bin_file_gives_tensors_and_runs_nothing(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    loaded = load_base(str(model), torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())

    marker = tmp_path / "ran"
    for evil in (dict(tensors, evil=Bomb(marker)), Bomb(marker)):
        torch.save(evil, model / "pytorch_model.bin")
        with pytest.raises(InputError, match="cannot be loaded"):
            load_base(str(model), torch.float32)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(InputError):
        load_base(str(model), torch.float32)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))  # the bomb works
    assert marker.exists()


def test_an_adapters_bin_file_runs_nothing(base, tmp_path):
    adapter, marker = tmp_path / "adapter", tmp_path / "ran"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"base_model.model.x": Bomb(marker)}, adapter / "adapter_model.bin")
    with pytest.raises((InputError, pickle.UnpicklingError)):
        load_model(adapter, "cpu", base=str(base))
    assert not marker.exists()


# code


def _with_own_code(model, marker) -> None:
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
    classes = "class OwnConfig(LlamaConfig):\n    pass\n\nclass Own(LlamaForCausalLM):\n    pass\n"
    (model / "own.py").write_text(code + classes)


def test_a_models_own_code_is_not_run_unasked(model, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    _with_own_code(model, marker)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(InputError, match=r"Python code of its own \(own.py\).*trust_remote_code=true"):
        load_base(str(model), torch.float32)
    with pytest.raises(InputError, match=r"Python code of its own \(own.py\)"):
        vocabulary_size(str(model))
    load_renderer(str(model))  # its tokenizer has none
    assert not marker.exists()
    vocabulary_size(str(model), trust_remote_code=True)  # the code would have run
    assert marker.exists()


def test_a_tokenizers_own_code_is_not_run_unasked(model, tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass OwnTokenizer:\n    pass\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(InputError, match=r"Python code of its own \(own.py\)"):
        load_renderer(str(model))
    assert not marker.exists()


def test_an_adapter_that_names_modules_to_import_is_refused(base, tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "megatron_core": "evil"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"megatron_config": {"a": 1}}))
    with pytest.raises(InputError, match="megatron_config names Python modules"):
        load_model(tmp_path, "cpu", base=str(base))


def test_the_modules_of_an_auto_mapping_are_not_imported(base, tmp_path, monkeypatch):
    """PEFT writes one into every adapter that has no task type; only its own Auto classes follow it."""
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass X:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tuned = get_peft_model(load_base(str(base), torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["auto_mapping"]
    file.write_text(json.dumps(config | {"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}))
    load_model(tmp_path / "adapter", "cpu", base=str(base))
    assert not marker.exists()


# paths


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/outside.safetensors", "a/../../b", "C:\\x", "..\\x", 3]
)
def test_an_index_of_weights_stays_in_its_folder(model, name):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (model / "model.safetensors").rename(model.parent / "outside.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"index.json: says that lm_head.weight is in .* outside of the folder"):
        load_base(str(model), torch.float32)


def test_an_index_that_stays_inside_is_followed(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(tensors) <= set(load_base(str(model), torch.float32).state_dict())


def _catalogue(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps({"set": {"file_name": name, "formatting": "openai"}}))
    return f"{folder / 'dataset_info.json'}#set"


def test_a_catalogues_files_lie_beside_it(tmp_path):
    write_rows(tmp_path / "secret.jsonl", make_conversations(3))
    folder = tmp_path / "set"
    address = _catalogue(folder, "link.jsonl")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "linked").symlink_to(tmp_path)
    for name in (
        "link.jsonl",
        "../secret.jsonl",
        str(tmp_path / "secret.jsonl"),
        "linked/secret.jsonl",
        "a/../../secret",
    ):
        _catalogue(folder, name)
        with pytest.raises(InputError, match=r"dataset_info.json#set: file_name .* outside of the catalogue's folder"):
            list(read_rows(address))
    (folder / "inner").mkdir()
    write_rows(folder / "inner" / "own.jsonl", make_conversations(3))
    (folder / "to_own.jsonl").symlink_to(folder / "inner" / "own.jsonl")
    for name in ("inner/own.jsonl", "to_own.jsonl"):
        _catalogue(folder, name)
        assert len(list(read_rows(address))) == 3


def test_a_catalogue_in_the_hubs_cache_may_link_to_its_blobs_and_no_further(tmp_path):
    blobs, snapshot = tmp_path / "datasets--a--b" / "blobs", tmp_path / "datasets--a--b" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    address = _catalogue(snapshot, "own.jsonl")
    write_rows(blobs / "123", make_conversations(3))
    (snapshot / "own.jsonl").symlink_to(blobs / "123")
    assert len(list(read_rows(address))) == 3
    write_rows(tmp_path / "secret.jsonl", make_conversations(3))
    (snapshot / "own.jsonl").unlink()
    (snapshot / "own.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(InputError, match="outside of the catalogue's folder"):
        list(read_rows(address))


def test_the_base_that_a_strangers_adapter_names_is_shown(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/where"}))
    assert resolve(str(tmp_path)).base == "some/where"
    assert "names some/where as the model" in capsys.readouterr().err


# sizes


def _zeros(path, size):
    """A packed line of blanks."""
    if path.suffix == ".gz":
        with gzip.open(path, "wb") as file:
            for _ in range(size >> 16):
                file.write(b" " * (1 << 16))
    else:
        path.write_bytes(zstandard.ZstdCompressor().compress(b" " * size))
    return path


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.csv.zst", "a.txt.gz"])
def test_a_packed_file_does_not_unpack_without_end(tmp_path, monkeypatch, name):
    path = _zeros(tmp_path / name, 1 << 22)
    assert path.stat().st_size * rows.MOST_RATIO < 1 << 22
    monkeypatch.setattr(rows, "MOST_UNPACKED", 1 << 20)
    with pytest.raises(InputError, match=f"{name}: its .* bytes unpack to more than"):
        list(read_rows(path))


def test_text_that_packs_well_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_UNPACKED", 1 << 10)
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for row in make_conversations(300):
            file.write(json.dumps(row) + "\n")
    assert len(list(read_rows(path))) == 300


def test_an_xlsx_file_does_not_unpack_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_UNPACKED", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/worksheets/sheet1.xml", b" " * (1 << 22))
    with pytest.raises(InputError, match="unpack to more than"):
        list(read_rows(tmp_path / "a.xlsx"))


def test_a_row_has_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MOST_ROW", 1000)
    monkeypatch.setattr(json_list, "MOST_ROW", 1000)
    monkeypatch.setattr(json_list, "CHUNK", 500)
    monkeypatch.setattr(json_files, "MOST_WHOLE", 1000)
    short, long = {"text": "a" * 900}, {"text": "a" * 3000}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (short, long, short)))
    with pytest.raises(InputError, match=r"a.jsonl:2: a row of more than"):
        list(read_rows(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text(json.dumps([short, long, short]))
    with pytest.raises(InputError, match=r"a.json.*an element of more than"):
        list(read_rows(tmp_path / "a.json"))
    (tmp_path / "a.txt").write_text("a" * 3000)
    with pytest.raises(InputError, match=r"a.txt: more than"):
        list(read_rows(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (short, short)))
    (tmp_path / "b.json").write_text(json.dumps([short, short]))
    assert [len(list(read_rows(tmp_path / name))) for name in ("b.jsonl", "b.json")] == [2, 2]


# templates


def _renderer(template, name="model"):
    return Renderer(make_tokenizer(), template, name, datetime.date(2026, 1, 31), ())


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = b %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}"
DOUBLES = "{% set n = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
SWALLOWS = "{% set n = namespace(x=[1]) %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"


@pytest.mark.parametrize("template", [LOOPS, CALLS])
def test_a_template_without_end_is_ended(monkeypatch, template):
    monkeypatch.setattr(watchdog, "MOST_SECONDS", 0.3)
    began = time.process_time()
    with pytest.raises(TemplateStopped, match=r"the model's chat template: it computed for more than 0.3 s"):
        _renderer(template).render(TALK)
    assert time.process_time() - began < 10
    assert _renderer(CHATML).render(TALK)  # nothing is left of it


def test_a_stop_that_is_lost_is_made_again(monkeypatch):
    """As it is where it is raised within a destructor: Python says so, and goes on."""
    monkeypatch.setattr(watchdog, "MOST_SECONDS", 0.3)
    own, lost = watchdog._raise_in, []

    def lossy(ident, error):
        if error is not None and len(lost) < 2:
            lost.append(error)
        else:
            own(ident, error)

    monkeypatch.setattr(watchdog, "_raise_in", lossy)
    with pytest.raises(TemplateStopped, match="it computed for more than 0.3 s"):
        _renderer(LOOPS).render(TALK)
    assert len(lost) == 2
    assert _renderer(CHATML).render(TALK)


def test_cleaning_ends_too_and_drops_no_rows_for_it():
    def count(messages, tools):
        raise TemplateStopped("chat template mine: it computed for more than 10 s")

    with pytest.raises(TemplateStopped):
        cut_long(Conversation("a", Origin("f", 1), tuple(TALK)), Cut(model="m"), {}, count)


@pytest.mark.parametrize("template", [DOUBLES, SWALLOWS])
def test_a_template_that_fills_the_memory_is_ended(monkeypatch, template):
    monkeypatch.setattr(watchdog, "MOST_BYTES", 1 << 27)
    with pytest.raises(TemplateStopped, match=r"chat template mine.jinja: it took more than 128 MiB of memory"):
        _renderer(template, "mine.jinja").render(TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].role * n }}", "{{ n * [1] }}", "{{ n ** n }}", "{{ messages[0].role.ljust(n) }}",
        "{{ messages[0].role | center(n) }}", "{{ messages[0] | tojson(indent=n) }}", "{{ ('%' ~ n ~ 'd') % 1 }}",
        "{{ (s * 9999999) | replace(s, s * 9999999) }}",
    ],
)  # fmt: skip
def test_one_operation_makes_no_more_than_it_may(template):
    with pytest.raises(TemplateRefused):
        _renderer("{% set n = 9999999999 %}{% set s = 'a' %}" + template).render(TALK)


@pytest.mark.parametrize(
    "template",
    ["{{ 'a' * 9999999999 }}", "{{ 'a' * 999 * 999 * 999 }}", "{{ 'a' | center(999999999) }}", "{{ 9 ** 999999 }}"],
)
def test_what_jinja_computes_while_it_compiles_is_bounded_too(base, tmp_path, template):
    file = tmp_path / "mine.jinja"
    file.write_text("\n\n" + template)
    with pytest.raises(InputError, match=r"chat template .*mine.jinja: line 3: an operation on constants"):
        load_renderer(str(base), str(file))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].__class__.__mro__ }}", "{{ messages.append.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ ''.format.__self__.__class__ }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    ],
)  # fmt: skip
def test_templates_reach_neither_files_nor_python(template):
    with contextlib.suppress(TemplateRefused):
        assert _renderer(template).render(TALK) == ""


def test_bounded_operations_write_the_same():
    template = (
        "{{ 'ab' * 3 }}{{ 7 * 6 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ '%s|%05d' % ('a', 3) }}{{ 'aXb' | replace('X', '--') }}"
    )
    template += (
        "{{ {'a': 1} | tojson(indent=2) }}{{ 'a\nb' | indent(2) }}{{ ' x ' | trim }}{{ [1, 2, 3] | batch(2) | list }}"
    )
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    assert _renderer(template).render(TALK) == _cached_compile_jinja_template(template).render(messages=[])


def test_the_watch_is_over_with_the_rendering_and_each_thread_has_its_own(monkeypatch):
    monkeypatch.setattr(watchdog, "MOST_SECONDS", 0.3)
    ended: list[str] = []

    def endless() -> None:
        try:
            _renderer(LOOPS).render(TALK)
        except TemplateStopped as error:
            ended.append(str(error))

    thread = threading.Thread(target=endless)
    thread.start()
    fine = _renderer(CHATML)
    wanted = fine.render(TALK)
    while thread.is_alive():
        assert fine.render(TALK) == wanted
    assert len(ended) == 1
    until = time.process_time() + 0.6
    while time.process_time() < until:  # slow, but outside of any rendering
        pass
    with watched("model"):
        pass
    assert watchdog._running == {}


# secrets


def test_secrets_are_hidden(monkeypatch):
    monkeypatch.setenv("AZURE_API_KEY", "azure-secret-1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret_22")
    monkeypatch.setenv("TINY_KEY", "EMPTY")
    monkeypatch.setenv("MONKEY", "a monkey is no key")
    text = (
        "azure-secret-1 at https://jane:pw@host/v1?a=b&api_key=zzz&c=d EMPTY, a monkey is no key, x@y.z, hf_secret_22"
    )
    assert hide_secrets(text) == "*** at https://***@host/v1?a=b&api_key=***&c=d EMPTY, a monkey is no key, x@y.z, ***"
    plain = "see https://host/a?page=3&sort=key user@host 'key=3' http://a/b@c"
    assert hide_secrets(plain) == plain
    assert list(secret_in({"a": [{"b": "x hf_secret_22"}], "c": "d"})) == [("a", "0", "b")]
    monkeypatch.setenv("HOME", "/home/jane")
    monkeypatch.setenv("LOGNAME", "jane")
    assert (
        hide_user("/home/jane/x /home/janet/x /data/jane/y 'plain jane'")
        == "~/x /home/janet/x /data/USER/y 'plain jane'"
    )


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("model=https://jane:pw123456@host/m", "model"),
        ("encode.template=env-secret-value", "encode.template"),
        ("data=[{path: 'https://host/a.jsonl?token=abcdef'}]", "data.0.path"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_quoting_it(monkeypatch, word, key):
    monkeypatch.setenv("SOME_API_KEY", "env-secret-value")
    with pytest.raises(ConfigError, match=f"`{key}` holds a password or a key") as refused:
        load_train(None, ["model=m", "data=d.jsonl", word])
    assert not any(secret in str(refused.value) for secret in ("pw123456", "env-secret-value", "abcdef"))


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(base, tmp_path, monkeypatch, capsys):
    from graft.cli.main import main

    secrets = {"OPENAI_API_KEY": "sk-0123456789abcdef", "HF_TOKEN": "hf_0123456789", "WANDB_API_KEY": "wandb0123456789"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    data = write_rows(tmp_path / "data.jsonl", make_conversations(60))
    out = tmp_path / "run"
    words = ["train", "--model", str(base), "--data", data, "--out", str(out), "max_steps=1", "device=cpu"]
    for command in (
        words,
        ["eval", str(out), "--max-new-tokens", "2"],
        ["train", "--model", "https://a:pw1234567@b/c"],
    ):
        monkeypatch.setattr(sys, "argv", ["graft", *command])
        with pytest.raises(SystemExit):
            main()
    said = "".join(capsys.readouterr())
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "report.html"} <= {path.name for path in files}
    for secret in (*secrets.values(), "pw1234567"):
        assert secret not in said
        for path in files:
            assert secret.encode() not in path.read_bytes(), path


def test_a_traceback_of_a_defect_quotes_no_secret(monkeypatch, capsys):
    from graft.cli import main as main_module

    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")

    def broken(**_named):
        raise LookupError(f"GET https://me:pw7654321@hub/x failed with {os.environ['HF_TOKEN']}")

    monkeypatch.setattr(main_module, "app", broken)
    with pytest.raises(SystemExit) as left:
        main_module.main()
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert "LookupError" in said
    assert "defect of graft" in said
    assert "hf_0123456789" not in said
    assert "pw7654321" not in said


def test_messages_hide_secrets(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    for say in (console.note, console.warn, console.fail):
        say("with hf_0123456789 and http://a:b@c")
    console.table("t", ["a"], [["hf_0123456789"]])
    console.facts("t", [["a", "hf_0123456789"]])
    console.checks("t", [(True, "hf_0123456789", "")], "")
    said = "".join(capsys.readouterr())
    assert said.count("***") >= 9
    assert "hf_0123456789" not in said
