"""OLMo 2: norms after attention and FFN, and norms over all query heads and all key heads."""

from dataclasses import replace

from cbd_hub.families.llama import BLOCK, HEAD_NORMS, KV, LLAMA, Q, tensors
from cbd_hub.families.table import norm


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    tensors=tensors(
        *norm(BLOCK + "self_attn.q_norm", Q), *norm(BLOCK + "self_attn.k_norm", KV),
        *norm(BLOCK + "post_attention_layernorm"), *norm(BLOCK + "post_feedforward_layernorm"),
        qkv_bias="attention_bias", out_bias="attention_bias",
    ),
    norms=(*_POST_NORMS, "model.norm"),
    post_norms=_POST_NORMS,
    head_norms=HEAD_NORMS,
    hidden_multiple=None,
)
