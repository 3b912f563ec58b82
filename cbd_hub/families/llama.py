"""Llama (also SmolLM2): RMSNorm, rotary positions, grouped-query attention, gated FFN."""

from cbd_hub.families.table import Family, TensorSpec


_Q = ("heads", "head_size")
_KV = ("kv_heads", "head_size")
_BLOCK = "model.layers.{layer}."

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
    tensors=(
        TensorSpec("model.embed_tokens.weight", ("vocab", "hidden")),
        TensorSpec(_BLOCK + "input_layernorm.weight", ("hidden",)),
        TensorSpec(_BLOCK + "self_attn.q_proj.weight", (_Q, "hidden")),
        TensorSpec(_BLOCK + "self_attn.k_proj.weight", (_KV, "hidden")),
        TensorSpec(_BLOCK + "self_attn.v_proj.weight", (_KV, "hidden")),
        TensorSpec(_BLOCK + "self_attn.o_proj.weight", ("hidden", _Q)),
        TensorSpec(_BLOCK + "self_attn.q_proj.bias", (_Q,), when="attention_bias"),
        TensorSpec(_BLOCK + "self_attn.k_proj.bias", (_KV,), when="attention_bias"),
        TensorSpec(_BLOCK + "self_attn.v_proj.bias", (_KV,), when="attention_bias"),
        TensorSpec(_BLOCK + "self_attn.o_proj.bias", ("hidden",), when="attention_bias"),
        TensorSpec(_BLOCK + "post_attention_layernorm.weight", ("hidden",)),
        TensorSpec(_BLOCK + "mlp.gate_proj.weight", ("ffn", "hidden")),
        TensorSpec(_BLOCK + "mlp.up_proj.weight", ("ffn", "hidden")),
        TensorSpec(_BLOCK + "mlp.down_proj.weight", ("hidden", "ffn")),
        TensorSpec(_BLOCK + "mlp.gate_proj.bias", ("ffn",), when="mlp_bias"),
        TensorSpec(_BLOCK + "mlp.up_proj.bias", ("ffn",), when="mlp_bias"),
        TensorSpec(_BLOCK + "mlp.down_proj.bias", ("hidden",), when="mlp_bias"),
        TensorSpec("model.norm.weight", ("hidden",)),
        TensorSpec("lm_head.weight", ("vocab", "hidden"), unless="tie_word_embeddings"),
    ),
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
