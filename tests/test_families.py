"""The tables against the real classes: every stored tensor, its shape, its count."""

import json
import tracemalloc

import pytest
import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen3MoeConfig,
)

from cbd_hub.configs import read_config
from cbd_hub.errors import ArchitectureError
from cbd_hub.families import FAMILIES, family_named, family_of
from cbd_hub.shapes import config_for, count, other_differences, parameter_count, shape_of


VARIANTS = {
    "llama tied": lambda: tiny.llama(),
    "llama untied": lambda: tiny.llama(tied=False),
    "llama biases": lambda: tiny.llama(attention_bias=True, mlp_bias=True, kv_heads=1),
    "gpt2": lambda: tiny.gpt2(),
    "gpt2 untied": lambda: tiny.gpt2(tie_word_embeddings=False),
    "mistral": lambda: tiny.mistral(tied=False),
    "qwen2": lambda: tiny.qwen2(),
    "qwen2 sliding": lambda: tiny.qwen2(tied=False, use_sliding_window=True, sliding_window=6, max_window_layers=2),
    "qwen3": lambda: tiny.qwen3(head_dim=16),
    "qwen3 biases": lambda: tiny.qwen3(attention_bias=True, tied=False),
    "gemma3": lambda: tiny.gemma3(head_dim=16),
    "gemma3 untied": lambda: tiny.gemma3(tied=False, attention_bias=True),
    "gpt_neox": lambda: tiny.gpt_neox(),
    "gpt_neox tied": lambda: tiny.gpt_neox(tied=True, attention_bias=False, use_parallel_residual=False),
    "opt": lambda: tiny.opt(),
    "opt untied": lambda: tiny.opt(tied=False, enable_bias=False),
    "olmo2": lambda: tiny.olmo2(tied=False),
    "olmo2 biases": lambda: tiny.olmo2(attention_bias=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_table_holds_every_stored_tensor_and_no_other(variant, tmp_path):
    from safetensors import safe_open

    model = VARIANTS[variant]()
    model.save_pretrained(tmp_path)
    family = family_of(model.config)
    sizes = family.sizes(model.config)
    expected = {name: list(spec.shape(sizes)) for spec, _, name in family.stored(model.config)}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert {family.canonical(key): shape for key, shape in stored.items()} == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_the_models_unique_parameters(variant):
    model = VARIANTS[variant]()
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert parameter_count(model.config) == sum(unique.values())
    assert count(shape_of(model.config), model.config) == sum(unique.values())


def test_counts_of_published_shapes():
    """GPT-2's and SmolLM2's published sizes, and the paper's 138M target (Table 8)."""
    assert parameter_count(GPT2Config()) == 124_439_808
    assert parameter_count(GPT2Config(n_layer=14)) == 138_615_552
    smollm = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    assert parameter_count(smollm) == 134_515_008


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_config_of_another_shape_makes_a_model_of_that_shape(variant):
    config = VARIANTS[variant]().config
    shape = shape_of(config).model_copy(update={"layers": 2, "ffn": 20})
    made = config_for(shape, config)
    model = AutoModelForCausalLM.from_config(made)
    assert shape_of(model.config) == shape
    assert sum({id(p): p.numel() for p in model.parameters()}.values()) == count(shape, config)


def test_a_shape_that_an_architecture_cannot_have_is_refused():
    config = tiny.gpt2().config
    with pytest.raises(ArchitectureError, match="cannot have the shape"):
        config_for(shape_of(config).model_copy(update={"kv_heads": 1}), config)


def test_published_gpt2_keys_without_prefix_and_their_buffers_are_understood():
    family = family_named("gpt2")
    assert family.canonical("h.3.attn.c_attn.weight") == "transformer.h.3.attn.c_attn.weight"
    assert family.canonical("h.3.attn.bias") is None
    assert family.canonical("transformer.h.3.attn.c_attn.bias") == "transformer.h.3.attn.c_attn.bias"
    assert family.canonical("lm_head.weight") == "lm_head.weight"


def test_an_architecture_without_a_table_is_an_error_that_says_how_to_add_one():
    with pytest.raises(ArchitectureError, match=r'"bert" has no axis table.*CONTRIBUTING'):
        family_of(BertConfig())
    with pytest.raises(ArchitectureError, match="knows llama"):
        family_named("nope")


def test_a_mixture_of_experts_is_refused_as_one():
    for config in (MixtralConfig(), Qwen3MoeConfig(), OlmoeConfig()):
        with pytest.raises(ArchitectureError, match=rf'"{config.model_type}" is a mixture of \d+ experts.*choose a dense model'):
            family_of(config)


@pytest.mark.parametrize(("make", "more", "message"), [
    (OPTConfig, {"do_layer_norm_before": False}, "do_layer_norm_before=False where only True"), (OPTConfig, {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512 where only 768"),
    (OPTConfig, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    (GPT2Config, {"scale_attn_by_inverse_layer_idx": True}, "gpt2 model has scale_attn_by_inverse_layer_idx=True where only False"),
    (GPT2Config, {"add_cross_attention": True}, "add_cross_attention=True"),
    (Gemma3TextConfig, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
])
def test_variants_that_a_table_is_not_for_are_refused(make, more, message):
    """Such a model would be counted wrongly, or compute something else with a layer in another place."""
    with pytest.raises(ArchitectureError, match=message):
        parameter_count(make(**more))
    assert parameter_count(make(**dict.fromkeys(more, None))) if make is Gemma3TextConfig else parameter_count(make())


def test_every_family_names_what_writes_and_what_normalises():
    for family in FAMILIES:
        for module, axis in ((family.ffn_input, "ffn"), (family.heads_input, ("heads", "head_size"))):
            spec, dim = family.input_of(module)
            assert spec.dims[dim] == axis
            assert family.writes(spec)
        norms = [spec for spec in family.tensors if family.norm_of(spec) == "weight"]
        assert len(norms) == len(family.norms)
        assert all(spec.dims == ("hidden",) and not family.writes(spec) for spec in norms)


def test_counting_allocates_nothing():
    config = LlamaConfig(vocab_size=128_256, hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8)

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            raise AssertionError(operation)

    tracemalloc.start()
    with Nothing():
        assert parameter_count(config) > 400e9
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def published(folder, name, **fields):
    """A config as transformers reads a published config.json."""
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(fields))
    return read_config(folder / name)


GPT2_JSON = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}
OLD = {"n_special": 0, "predict_special_tokens": True}
GEMMA_JSON = {
    "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768,
    "num_key_value_heads": 1, "num_attention_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "vocab_size": 262144, "use_cache": True,
}
LLAMA_JSON = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000, "tie_word_embeddings": True,
}
PUBLISHED = {
    "gpt2": (
        {**GPT2_JSON, "n_embd": 768, "n_head": 12, "n_layer": 12}, {**GPT2_JSON, **OLD, "n_embd": 1024, "n_head": 16, "n_layer": 24},
        {**GPT2_JSON, **OLD, "n_embd": 1280, "n_head": 20, "n_layer": 36}, {**GPT2_JSON, **OLD, "output_past": True, "n_embd": 1600, "n_head": 25, "n_layer": 48},
    ),
    "gemma3": (
        {**GEMMA_JSON, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "_sliding_window_pattern": 6, "use_bidirectional_attention": False,
         "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3},
        {**GEMMA_JSON, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "cache_implementation": "hybrid", "sliding_window_pattern": 6},
    ),
    "llama": (
        {**LLAMA_JSON, "rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        {**LLAMA_JSON, "num_hidden_layers": 32, "prefix": "</s>", "gradient_checkpointing": False},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_do_not_differ_in_fields_that_nothing_reads(name, tmp_path):
    """The paper's own chain is of the published GPT-2s, whose older config.json files hold strays."""
    configs = [published(tmp_path, str(place), **fields) for place, fields in enumerate(PUBLISHED[name])]
    for small, large in zip(configs, configs[1:]):
        assert other_differences(large, small) == other_differences(small, large) == []


@pytest.mark.parametrize(("name", "more", "differs"), [
    ("llama", {"rope_theta": 500.0}, "rope_parameters"), ("mistral", {"sliding_window": 7}, "sliding_window"), ("qwen2", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen3", {"attention_bias": True}, "attention_bias"), ("gemma3_text", {"final_logit_softcapping": 3.0}, "final_logit_softcapping"),
    ("gemma3_text", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar"), ("gemma3_text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping"),
    ("gpt2", {"activation_function": "relu"}, "activation_function"), ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt_neox", {"rotary_pct": 0.5}, "rope_parameters"), ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual"),
    ("opt", {"enable_bias": False}, "enable_bias"), ("olmo2", {"rope_theta": 500.0}, "rope_parameters"), ("olmo2", {"tied": False}, "tie_word_embeddings"),
])
def test_what_a_model_computes_by_is_a_difference(name, more, differs):
    assert other_differences(tiny.EVERY[name]().config, tiny.EVERY[name](**more).config) == [differs]
