"""GPT-NeoX (also Pythia): LayerNorm, partly rotary positions, q, k, v fused head by head, attention and FFN side by side or not."""

from cbd_hub.families.table import Family, TensorSpec, linear, norm


_BLOCK = "gpt_neox.layers.{layer}."

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "vocab": "vocab_size",
    },
    defaults={"kv_heads": "heads", "head_size": lambda config: config.hidden_size // config.num_attention_heads},
    tensors=(
        TensorSpec("gpt_neox.embed_in.weight", ("vocab", "hidden")),
        *norm(_BLOCK + "input_layernorm", bias=True),
        *linear(_BLOCK + "attention.query_key_value", ("heads", 3, "head_size"), "hidden", bias="attention_bias"),
        *linear(_BLOCK + "attention.dense", "hidden", ("heads", "head_size"), bias="attention_bias"),
        *norm(_BLOCK + "post_attention_layernorm", bias=True),
        *linear(_BLOCK + "mlp.dense_h_to_4h", "ffn", "hidden", bias=True),
        *linear(_BLOCK + "mlp.dense_4h_to_h", "hidden", "ffn", bias=True),
        *norm("gpt_neox.final_layer_norm", bias=True),
        TensorSpec("embed_out.weight", ("vocab", "hidden"), unless="tie_word_embeddings"),
    ),
    blocks="gpt_neox.layers",
    ffn_input="mlp.dense_4h_to_h",
    heads_input="attention.dense",
    norms=("input_layernorm", "post_attention_layernorm", "gpt_neox.final_layer_norm"),
    norm_eps="layer_norm_eps",
    centred=True,
    hidden_is_heads=True,
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    live={"embed_out.weight": "lm_head.weight"},
    residual=("attention.dense.weight", "attention.dense.bias", "mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"),
    base_prefix="gpt_neox.",
    buffers=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
)
