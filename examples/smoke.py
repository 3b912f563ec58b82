"""What ``--smoke`` runs on: a tiny Llama chain, a GPT-2 of another vocabulary and some text, made on the spot in a temporary folder."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cbd_hub import assemble_chain


SIZE = "170K"  # between the anchors of `chain`
WORDS = ["the", "a", "small", "large", "model", "learns", "from", "its", "teacher", "and", "gives", "every", "size", "between", "two", "anchors"]
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "block_size": 32, "bf16": False, "disable_tqdm": True}


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cbd-smoke-")  # removed when the program ends


def folder() -> Path:
    """A new empty folder."""
    return Path(tempfile.mkdtemp(dir=_root().name))


def texts(count: int = 120) -> list[str]:
    """Sentences, all different."""
    draw = random.Random(0)
    return [f"{index} " + " ".join(draw.choice(WORDS) for _ in range(draw.randint(8, 30))) + "." for index in range(count)]


def text() -> str:
    """A file of text."""
    path = folder() / "text.txt"
    path.write_text("\n\n".join(texts()))
    return str(path)


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per character, and bytes for what it does not know, as a Llama tokenizer without merges."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-\n"
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocab)}, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


@functools.cache
def model(layers: int = 6, ffn: int = 128, seed: int = 0) -> str:
    """A folder with a random Llama of this many layers."""
    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=64, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    ))
    path = folder()
    made.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@functools.cache
def stranger() -> str:
    """A folder with a random GPT-2 whose tokens are bytes."""
    torch.manual_seed(1)
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    path = folder()
    GPT2LMHeadModel(GPT2Config(
        vocab_size=len(alphabet), n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0
    )).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(path)
    return str(path)


@functools.cache
def chain() -> str:
    """A folder with a chain of two anchors, 243K and 145K, that were not trained."""
    path = folder() / "chain"
    assemble_chain([model(), model(layers=4, ffn=96, seed=1)], path, align=False)
    return str(path)
