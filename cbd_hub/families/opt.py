"""OPT with norms before attention and FFN and without projections of the embedding: LayerNorm, learned positions."""

from cbd_hub.families.table import Family, TensorSpec, linear, norm


_HEADS = ("heads", "head_size")
_BLOCK = "model.decoder.layers.{layer}."

OPT = Family(
    name="opt",
    model_types=("opt",),
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "ffn_dim",
        "vocab": "vocab_size",
    },
    defaults={
        "kv_heads": "heads",
        "head_size": lambda config: config.hidden_size // config.num_attention_heads,
        "positions": lambda config: config.max_position_embeddings + 2,  # the first two rows are never read without padding
    },
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True, "word_embed_proj_dim": "hidden"},
    tensors=(
        TensorSpec("model.decoder.embed_tokens.weight", ("vocab", "hidden")),
        TensorSpec("model.decoder.embed_positions.weight", ("positions", "hidden")),
        *norm(_BLOCK + "self_attn_layer_norm", bias=True),
        *(spec for name in "qkv" for spec in linear(f"{_BLOCK}self_attn.{name}_proj", _HEADS, "hidden", bias="enable_bias")),
        *linear(_BLOCK + "self_attn.out_proj", "hidden", _HEADS, bias="enable_bias"),
        *norm(_BLOCK + "final_layer_norm", bias=True),
        *linear(_BLOCK + "fc1", "ffn", "hidden", bias="enable_bias"),
        *linear(_BLOCK + "fc2", "hidden", "ffn", bias="enable_bias"),
        *norm("model.decoder.final_layer_norm", bias=True),
        TensorSpec("lm_head.weight", ("vocab", "hidden"), unless="tie_word_embeddings"),
    ),
    blocks="model.decoder.layers",
    ffn_input="fc2",
    heads_input="self_attn.out_proj",
    norms=("self_attn_layer_norm", "final_layer_norm", "model.decoder.final_layer_norm"),
    norm_eps=None,
    centred=True,
    hidden_is_heads=True,
    embedding="model.decoder.embed_tokens.weight",
    residual=("self_attn.out_proj.weight", "self_attn.out_proj.bias", "fc2.weight", "fc2.bias"),
    parts_rows=False,
)
