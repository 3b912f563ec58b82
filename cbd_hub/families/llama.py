"""Llama (also SmolLM2) and Mistral: RMSNorm, rotary positions, grouped-query attention, gated FFN."""

from dataclasses import replace

from cbd_hub.families.table import Family, TensorSpec, linear, norm


Q = ("heads", "head_size")
KV = ("kv_heads", "head_size")
BLOCK = "model.layers.{layer}."


def tensors(*norms: TensorSpec, qkv_bias: bool | str = False, out_bias: bool | str = False, mlp_bias: bool | str = False) -> tuple[TensorSpec, ...]:
    """What Llama and its kin store: ``norms`` are those of a block."""
    return (
        TensorSpec("model.embed_tokens.weight", ("vocab", "hidden")),
        *linear(BLOCK + "self_attn.q_proj", Q, "hidden", bias=qkv_bias),
        *linear(BLOCK + "self_attn.k_proj", KV, "hidden", bias=qkv_bias),
        *linear(BLOCK + "self_attn.v_proj", KV, "hidden", bias=qkv_bias),
        *linear(BLOCK + "self_attn.o_proj", "hidden", Q, bias=out_bias),
        *linear(BLOCK + "mlp.gate_proj", "ffn", "hidden", bias=mlp_bias),
        *linear(BLOCK + "mlp.up_proj", "ffn", "hidden", bias=mlp_bias),
        *linear(BLOCK + "mlp.down_proj", "hidden", "ffn", bias=mlp_bias),
        *norms,
        *norm("model.norm"),
        TensorSpec("lm_head.weight", ("vocab", "hidden"), unless="tie_word_embeddings"),
    )


PRE_NORMS = (*norm(BLOCK + "input_layernorm"), *norm(BLOCK + "post_attention_layernorm"))
QK_NORMS = (*norm(BLOCK + "self_attn.q_norm", "head_size"), *norm(BLOCK + "self_attn.k_norm", "head_size"))
HEAD_NORMS = {"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"}

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "ffn": "intermediate_size",
        "vocab": "vocab_size",
    },
    defaults={"kv_heads": "heads", "head_size": lambda config: config.hidden_size // config.num_attention_heads},
    tensors=tensors(*PRE_NORMS, qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    blocks="model.layers",
    ffn_input="mlp.down_proj",
    heads_input="self_attn.o_proj",
    norms=("input_layernorm", "post_attention_layernorm", "model.norm"),
    norm_eps="rms_norm_eps",
    hidden_multiple="heads",
    embedding="model.embed_tokens.weight",
    residual=("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias"),
    buffers=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
)

MISTRAL = replace(LLAMA, name="mistral", model_types=("mistral",), tensors=tensors(*PRE_NORMS), hidden_multiple=None)
