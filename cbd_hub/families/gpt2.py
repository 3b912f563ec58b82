"""GPT-2: LayerNorm, learned positions, fused q, k, v and Conv1D weights stored (in, out)."""

from cbd_hub.families.table import Family, TensorSpec, linear, norm


_BLOCK = "transformer.h.{layer}."

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    fields={
        "layers": "n_layer",
        "hidden": "n_embd",
        "heads": "n_head",
        "ffn": "n_inner",
        "vocab": "vocab_size",
        "positions": "n_positions",
    },
    defaults={
        "kv_heads": "heads",
        "head_size": lambda config: config.n_embd // config.n_head,
        "ffn": lambda config: 4 * config.n_embd,
    },
    requires={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},  # a layer in another place computes what it did
    tensors=(
        TensorSpec("transformer.wte.weight", ("vocab", "hidden")),
        TensorSpec("transformer.wpe.weight", ("positions", "hidden")),
        *norm(_BLOCK + "ln_1", bias=True),
        *linear(_BLOCK + "attn.c_attn", (3, "heads", "head_size"), "hidden", bias=True, transposed=True),
        *linear(_BLOCK + "attn.c_proj", "hidden", ("heads", "head_size"), bias=True, transposed=True),
        *norm(_BLOCK + "ln_2", bias=True),
        *linear(_BLOCK + "mlp.c_fc", "ffn", "hidden", bias=True, transposed=True),
        *linear(_BLOCK + "mlp.c_proj", "hidden", "ffn", bias=True, transposed=True),
        *norm("transformer.ln_f", bias=True),
        TensorSpec("lm_head.weight", ("vocab", "hidden"), unless="tie_word_embeddings"),
    ),
    blocks="transformer.h",
    ffn_input="mlp.c_proj",
    heads_input="attn.c_proj",
    norms=("ln_1", "ln_2", "transformer.ln_f"),
    norm_eps="layer_norm_epsilon",
    centred=True,
    hidden_is_heads=True,
    embedding="transformer.wte.weight",
    residual=("attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    base_prefix="transformer.",
    buffers=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
)
