"""Qwen2 (also Qwen2.5) and Qwen3: Llama's kin with biases on q, k, v or with norms on q and k."""

from dataclasses import replace

from cbd_hub.families.llama import HEAD_NORMS, LLAMA, PRE_NORMS, QK_NORMS, tensors


QWEN2 = replace(LLAMA, name="qwen2", model_types=("qwen2",), tensors=tensors(*PRE_NORMS, qkv_bias=True), hidden_multiple=None)

QWEN3 = replace(
    LLAMA, name="qwen3", model_types=("qwen3",), hidden_multiple=None, head_norms=HEAD_NORMS,
    tensors=tensors(*PRE_NORMS, *QK_NORMS, qkv_bias="attention_bias", out_bias="attention_bias"),
)
