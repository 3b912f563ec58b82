"""Configs as plain data say of a model what transformers' own say of it."""

import copy
import json
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cbd_hub import CBDModel, assemble_chain
from cbd_hub.configs import StoredConfig, read_config, states, stored_config, whole_config
from cbd_hub.errors import ArchitectureError, WeightsError
from cbd_hub.families import family_of
from cbd_hub.shapes import config_for, other_differences, parameter_count, shape_of


def changed(folder, **fields):
    """The folder with fields of its config.json changed; None takes one out."""
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**stored, **fields}.items() if value is not ...}))
    return folder


def said(config):
    """What a config says, but for where it lies and what wrote it."""
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "transformers_version")}


@pytest.mark.parametrize("name", tiny.EVERY)
def test_a_stored_config_is_transformers_own(tmp_path, name):
    folder = tiny.save(tiny.EVERY[name](), tmp_path / "model")
    stored, own = stored_config(folder), read_config(folder)
    assert states(json.loads((folder / "config.json").read_text()), family_of(own))  # what transformers 5 writes is read without it
    assert (shape_of(stored), parameter_count(stored)) == (shape_of(own), parameter_count(own))
    assert (family_of(stored), family_of(stored).layer_types(stored)) == (family_of(own), family_of(own).layer_types(own))
    assert said(whole_config(stored)) == said(own)
    assert (stored.dtype, stored.architectures) == (own.dtype, own.architectures)


@pytest.mark.parametrize("name", tiny.EVERY)
def test_a_config_of_another_shape_is_what_transformers_would_make_of_it(tmp_path, name):
    folder = tiny.save(tiny.EVERY[name](), tmp_path / "model")
    stored, own = stored_config(folder), read_config(folder)
    shape = shape_of(own).model_copy(update={"layers": 2, "ffn": 24})
    made, wanted = config_for(shape, stored, [1, 3]), config_for(shape, own, [1, 3])
    assert said(whole_config(made)) == said(wanted)
    made.save_pretrained(tmp_path, torch.bfloat16)
    wanted.dtype = torch.bfloat16
    wanted.save_pretrained(tmp_path / "wanted")
    assert said(AutoConfig.from_pretrained(tmp_path)) == said(AutoConfig.from_pretrained(tmp_path / "wanted"))
    assert stored.to_dict() == stored_config(folder).to_dict()  # it is as it was


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3", "mistral"])
@pytest.mark.parametrize("field", ["num_key_value_heads", "head_dim", "tie_word_embeddings", "layer_types", "rms_norm_eps"])
def test_what_a_config_leaves_out_is_what_transformers_says(tmp_path, name, field):
    folder = changed(tiny.save(tiny.EVERY[name](), tmp_path / "model"), **{field: ...})
    stored, own = stored_config(folder), read_config(folder)
    assert (shape_of(stored), parameter_count(stored)) == (shape_of(own), parameter_count(own))
    assert family_of(stored).layer_types(stored) == family_of(own).layer_types(own)
    assert said(whole_config(stored)) == said(own)


def test_differences_that_only_one_file_states_are_none(tmp_path):
    folder = tiny.save(tiny.llama(), tmp_path / "model")
    first = stored_config(folder)
    second = stored_config(changed(folder, rope_parameters=..., rope_theta=10000.0, a_stray_word=3))
    assert other_differences(first, second) == []
    third = stored_config(changed(folder, rope_theta=500000.0))
    assert other_differences(first, third) == ["rope_parameters"]


@pytest.mark.parametrize("fields", [
    {"to_dict": 5, "save_pretrained": None, "_fields": {}, "__class__": "x", "__deepcopy__": 1, "architectures": ["LlamaForCausalLM"]}, {"dtype": 7}, {"dtype": "nn"},
])
def test_fields_of_any_name_shadow_nothing(tmp_path, fields):
    stored = stored_config(changed(tiny.save(tiny.llama(), tmp_path / "model"), **fields))
    assert copy.deepcopy(stored).to_dict() == stored.to_dict()
    assert shape_of(stored).layers == 4
    assert stored.dtype in (None, torch.float32)


@pytest.mark.parametrize(("fields", "why"), [
    ({"num_hidden_layers": "four"}, "config.json"), ({"num_hidden_layers": True}, "config.json|layers"), ({"quantization_config": {"quant_method": "gptq"}}, "before quantising"),
    ({"auto_map": {"AutoConfig": "mine.Mine"}}, "never run"), ({"model_type": 3}, "never run"),
])
def test_a_config_that_cannot_be_used_is_one_clear_error(tmp_path, fields, why):
    folder = changed(tiny.save(tiny.llama(), tmp_path / "model"), **fields)
    with pytest.raises((WeightsError, ArchitectureError), match=why):
        stored_config(folder)


def test_what_transformers_refuses_is_one_clear_error():
    with pytest.raises(WeightsError, match="transformers refuses a config.json of llama"):
        whole_config(StoredConfig({"model_type": "llama", "num_hidden_layers": "four"}))


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma3, tiny.gpt2])
def test_a_made_model_is_the_loaded_one(tmp_path, make):
    anchors = [tiny.save(make(layers=layers), tmp_path / str(layers)) for layers in (4, 2)]
    chain = tmp_path / "chain"
    assemble_chain(anchors, chain, align=False)
    size = sum(parameter_count(read_config(folder)) for folder in anchors) // 2
    CBDModel.materialize(chain, size, output_dir=tmp_path / "made", tolerance=0.1)
    made, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made"), CBDModel.from_chain(chain, size, tolerance=0.1)
    assert said(made.config) == said(loaded.config)
    assert tiny.same(made, loaded)


def test_plan_and_make_need_no_transformers(tmp_path):
    anchors = [tiny.save(tiny.llama(layers=layers), tmp_path / str(layers)) for layers in (4, 2)]
    assemble_chain(anchors, tmp_path / "chain", align=False)
    size = str(sum(parameter_count(read_config(folder)) for folder in anchors) // 2)
    code = (
        "import sys; from cbd_hub.cli import app\n"
        f"for words in (['plan', 'chain', '--size', '{size}', '--tolerance', '0.1'], ['make', 'chain', '--size', '{size}', '--tolerance', '0.1', '--out', 'made']):\n"
        "    app(args=words, standalone_mode=False)\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stdout + done.stderr
    assert (tmp_path / "made/model.safetensors").is_file()


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_broken_generation_config_is_one_clear_error(tmp_path, text):
    anchors = [tiny.save(tiny.llama(layers=layers), tmp_path / str(layers)) for layers in (4, 2)]
    for folder in anchors:
        (folder / "generation_config.json").write_text(text)
    assemble_chain(anchors, tmp_path / "chain", align=False)
    for make in (CBDModel.from_chain, lambda *where: CBDModel.materialize(*where, output_dir=tmp_path / "made")):
        with pytest.raises(WeightsError, match="is no generation config"):
            make(tmp_path / "chain", "max")
    assert not (tmp_path / "made").exists()
