"""Remembered configs say of a model what transformers' own say of it, and need no transformers the second time."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from cbd_hub import CBDModel, assemble_chain
from cbd_hub.configs import StoredConfig, read_config, stored_config, whole_config
from cbd_hub.errors import ArchitectureError, WeightsError
from cbd_hub.families import family_of
from cbd_hub.shapes import config_for, other_differences, parameter_count, shape_of


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is remembered from elsewhere."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))


def changed(folder, **fields):
    """The folder with fields of its config.json changed; ``...`` takes one out."""
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in {**stored, **fields}.items() if value is not ...}))
    return folder


def said(config):
    """What a config says, but for where it lies and what wrote it."""
    return {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "transformers_version")}


def same_to_tables(stored, own):
    """Whether two configs are one to all that reads tables."""
    return (
        (shape_of(stored), parameter_count(stored), family_of(stored), family_of(stored).layer_types(stored), stored.dtype, stored.architectures)
        == (shape_of(own), parameter_count(own), family_of(own), family_of(own).layer_types(own), own.dtype, own.architectures)
    )


@pytest.mark.parametrize("name", tiny.EVERY)
def test_a_stored_config_is_transformers_own(tmp_path, name):
    folder = tiny.save(tiny.EVERY[name](), tmp_path / "model")
    own = read_config(folder)
    for _ in ("read", "remembered"):
        stored = stored_config(folder)
        assert same_to_tables(stored, own)
        assert said(whole_config(stored)) == said(own)
        assert (stored.num_hidden_layers, stored.hidden_size) == (own.num_hidden_layers, own.hidden_size)  # by any of its names


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
    assert (tmp_path / "config.json").read_text() == (tmp_path / "wanted/config.json").read_text()
    assert stored == stored_config(folder)  # it is as it was


@pytest.mark.parametrize(("name", "fields"), [
    ("gemma3_text", {"num_key_value_heads": ...}), ("gemma3_text", {"head_dim": ...}), ("gemma3_text", {"layer_types": ...}), ("gemma3_text", {"tie_word_embeddings": ...}),
    ("qwen3", {"rms_norm_eps": ...}), ("qwen3", {"layer_types": ...}), ("mistral", {"rms_norm_eps": ...}), ("qwen2", {"head_dim": 8}),
    ("llama", {"rope_parameters": ..., "rope_theta": 7.0}), ("llama", {"layer_types": ["full_attention"] * 4}), ("llama", {"dtype": None, "torch_dtype": "bfloat16"}),
    ("llama", {"max_length": 77, "do_sample": True}), ("llama", {"attn_implementation": "someone/kernel", "_attn_implementation": "flash_attention_2"}),
    ("gpt2", {"n_layer": ..., "num_hidden_layers": 4}), ("gpt2", {"num_hidden_layers": 4, "hidden_size": 32}), ("opt", {"max_position_embeddings": ...}),
    ("gemma3_text", {"final_logit_softcapping": {"__float__": "Infinity"}}),
])
def test_what_a_config_leaves_out_or_says_otherwise_is_what_transformers_makes_of_it(tmp_path, name, fields):
    folder = changed(tiny.save(tiny.EVERY[name](), tmp_path / "model"), **fields)
    own = read_config(folder)
    for _ in ("read", "remembered"):
        stored = stored_config(folder)
        assert same_to_tables(stored, own)
        assert said(whole_config(stored)) == said(own)
        shape = shape_of(own).model_copy(update={"layers": 2})
        config_for(shape, stored, [1, 3]).save_pretrained(tmp_path)
        config_for(shape, own, [1, 3]).save_pretrained(tmp_path / "wanted")
        assert json.loads((tmp_path / "config.json").read_text()) == json.loads((tmp_path / "wanted/config.json").read_text())
        assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 2


def test_differences_that_only_one_file_states_are_none(tmp_path):
    folder = tiny.save(tiny.mistral(), tmp_path / "model")
    first = stored_config(changed(folder, sliding_window=4096))
    assert other_differences(first, stored_config(changed(folder, sliding_window=..., a_stray_word=3))) == []
    assert other_differences(first, stored_config(changed(folder, sliding_window=None))) == ["sliding_window"]


def test_fields_of_any_name_shadow_nothing(tmp_path):
    folder = changed(tiny.save(tiny.llama(), tmp_path / "model"), save_pretrained=None, _fields={}, __deepcopy__=1)
    stored = StoredConfig({**json.loads((folder / "config.json").read_text()), "to_dict": 5, "__class__": "x"})
    for twin in (copy.copy(stored), copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert twin == stored
        twin.num_hidden_layers = 3
        assert (stored.num_hidden_layers, twin.num_hidden_layers) == (4, 3)
    assert stored.to_dict()["to_dict"] == 5


@pytest.mark.parametrize(("fields", "why"), [
    ({"num_hidden_layers": "four"}, "config.json"), ({"num_hidden_layers": 0}, "layers"), ({"quantization_config": {"quant_method": "gptq"}}, "before quantising"),
    ({"auto_map": {"AutoConfig": "mine.Mine"}}, "never run"), ({"model_type": 3}, "never run"), ({"head_dim": None, "num_attention_heads": 0}, "config.json"),
    ({"hidden_act": 5}, "config.json"), ({"rope_parameters": "foo"}, "config.json"), ({"max_position_embeddings": "many"}, "config.json"), ({"layer_types": ["nonsense"] * 4}, "config.json"),
    ({"rms_norm_eps": 0.0}, "only numbers above 0"), ({"rms_norm_eps": {"__float__": "NaN"}}, "only numbers above 0"), ({"per_layer_config": {"1": {"intermediate_size": 24}}}, "config.json"),
])
def test_a_config_that_cannot_be_used_is_one_clear_error(tmp_path, fields, why):
    folder = changed(tiny.save(tiny.llama(), tmp_path / "model"), **fields)
    for _ in ("once", "twice"):
        with pytest.raises((WeightsError, ArchitectureError), match=why):
            shape_of(stored_config(folder))


def test_what_transformers_refuses_is_one_clear_error(tmp_path):
    stored = stored_config(tiny.save(tiny.llama(), tmp_path / "model"))
    stored.num_hidden_layers = "four"
    with pytest.raises(WeightsError, match="transformers refuses the llama config that is wanted"):
        whole_config(stored)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gemma3, tiny.gpt2])
def test_a_made_model_is_the_loaded_one(tmp_path, make):
    anchors = [tiny.save(make(layers=layers), tmp_path / str(layers)) for layers in (4, 2)]
    chain = tmp_path / "chain"
    assemble_chain(anchors, chain, align=False)
    size = sum(parameter_count(read_config(folder)) for folder in anchors) // 2
    CBDModel.materialize(chain, size, output_dir=tmp_path / "made", tolerance=0.1)
    made, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "made"), CBDModel.from_chain(chain, size, tolerance=0.1)
    assert said(made.config) == said(loaded.config)
    assert made.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert tiny.same(made, loaded)


def test_plan_and_make_need_no_transformers_the_second_time(tmp_path):
    anchors = [tiny.save(tiny.llama(layers=layers), tmp_path / str(layers)) for layers in (4, 2)]
    assemble_chain(anchors, tmp_path / "chain", align=False)
    size = str(sum(parameter_count(read_config(folder)) for folder in anchors) // 2)
    code = (
        "import sys; from huggingface_hub import constants; constants.HF_HOME = 'hf'; from cbd_hub.cli import app\n"
        f"for words in (['plan', 'chain', '--size', '{size}', '--tolerance', '0.1'], ['make', 'chain', '--size', '{size}', '--tolerance', '0.1', '--out', sys.argv[1]]):\n"
        "    app(args=words, standalone_mode=False)\n"
        "print('transformers' in sys.modules)"
    )
    for out, imported in (("made", "True"), ("again", "False")):
        done = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.stdout.splitlines()[-1:] == [imported], done.stdout + done.stderr
    assert all((tmp_path / "made" / path.name).read_bytes() == path.read_bytes() for path in Path(tmp_path / "again").iterdir())


@pytest.mark.parametrize("text", ["[1]", "{", "", '{"cache_implementation": "nonsense"}'])
def test_a_broken_generation_config_is_one_clear_error(tmp_path, text):
    anchors = [tiny.save(tiny.llama(layers=layers), tmp_path / str(layers)) for layers in (4, 2)]
    for folder in anchors:
        (folder / "generation_config.json").write_text(text)
    assemble_chain(anchors, tmp_path / "chain", align=False)
    for make in (CBDModel.from_chain, lambda *where: CBDModel.materialize(*where, output_dir=tmp_path / "made")):
        with pytest.raises(WeightsError, match="is no generation config"):
            make(tmp_path / "chain", "max")
    assert not (tmp_path / "made").exists()
