"""Gemma 3 (text): norms that multiply by (1 + w), before and after attention and FFN; a scaled embedding; layers of two types."""

from dataclasses import replace

from cbd_hub.families.llama import BLOCK, HEAD_NORMS, LLAMA, QK_NORMS, tensors
from cbd_hub.families.table import norm


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_NORMS = ("input_layernorm", "pre_feedforward_layernorm", *_POST_NORMS)

GEMMA3 = replace(
    LLAMA,
    name="gemma3_text",
    model_types=("gemma3_text",),
    requires={"use_bidirectional_attention": False},
    tensors=tensors(
        *QK_NORMS, *(spec for name in _NORMS for spec in norm(BLOCK + name)), qkv_bias="attention_bias", out_bias="attention_bias",
    ),
    norms=(*_NORMS, "model.norm"),
    norm_offset=1.0,
    post_norms=_POST_NORMS,
    head_norms=HEAD_NORMS,
    scaled_embedding=True,
)
