"""Tiny models, a byte tokenizer and text, made on the spot: everything a test needs, from a seed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import get_last_checkpoint

from cbd_hub.interpolation.plan import Kept


VOCAB = 260
WORDS = ["the", "a", "small", "large", "model", "learns", "from", "its", "teacher", "and", "gives", "every", "size", "between", "two", "anchors", "of", "one", "chain", "quickly"]


def tokenizer(gap=0):
    """A byte-level tokenizer of 256 bytes and four special tokens, with a chat template; ``gap`` ids between the two kinds are of no token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3, **{char: index + 4 + gap for index, char in enumerate(alphabet)}}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return made


def texts(count=60, seed=0):
    """Sentences with some structure, all different."""
    draw = random.Random(seed)
    return [f"{index} " + " ".join(draw.choice(WORDS) for _ in range(draw.randint(8, 30))) + "." for index in range(count)]


def llama(layers=4, hidden=32, heads=4, kv_heads=2, ffn=48, tied=True, seed=0, **more):
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **{"max_position_embeddings": 256, "head_dim": hidden // heads, **more},
    )
    return _made(config, seed)


def gpt2(layers=4, hidden=32, heads=4, ffn=48, seed=0, **more):
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=hidden, n_inner=ffn, n_layer=layers, n_head=heads, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, **{"n_positions": 256, **more},
    )
    return _made(config, seed)


def plain(make, layers=4, hidden=32, heads=4, kv_heads=2, ffn=48, tied=True, seed=0, **more):
    config = make(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=256, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=more.pop("head_dim", hidden // heads),
        **more,
    )
    return _made(config, seed)


def mistral(**more):
    return plain(MistralConfig, **{"sliding_window": 6, **more})


def qwen2(**more):
    return plain(Qwen2Config, **more)


def qwen3(**more):
    return plain(Qwen3Config, **more)


def mixed(layers=4):
    """Types of a stack of sliding layers, every third one full."""
    return ["full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(layers)]


def gemma3(layers=4, **more):
    return plain(Gemma3TextConfig, layers=layers, **{"sliding_window": 5, "layer_types": mixed(layers), "query_pre_attn_scalar": 11, **more})


def olmo2(**more):
    return plain(Olmo2Config, **more)


def gpt_neox(layers=4, hidden=32, heads=4, ffn=48, tied=False, seed=0, **more):
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=256,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )
    return _made(config, seed)


def opt(layers=4, hidden=32, heads=4, ffn=48, tied=True, seed=0, **more):
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=hidden, ffn_dim=ffn, num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=256,
        tie_word_embeddings=tied, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )
    return _made(config, seed)


def _made(config, seed):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # nothing may be zero or one by chance of initialisation: a test must see every tensor
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


FAMILIES = {"llama": llama, "gpt2": gpt2}  # one of each kind: RMSNorm and grouped queries, LayerNorm and fused heads
EVERY = {
    **FAMILIES, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "gemma3_text": gemma3, "gpt_neox": gpt_neox, "opt": opt, "olmo2": olmo2,
}


def save(model, folder: Path) -> Path:
    """A model folder with the tokenizer."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def same(model, other):
    """Whether all parameters of ``other`` stand in ``model``, bit for bit."""
    return all(torch.equal(model.get_parameter(name), tensor) for name, tensor in other.named_parameters())


class Killed(Exception):
    """Instead of a signal: the run ends at once."""


def killed_in_training(monkeypatch, number):
    """Let the trainer's step of that number, counted over all runs from here on, be the one in which a run is killed; gives the count."""
    step, count = Trainer.training_step, [0]

    def training_step(self, *args, **kwargs):
        count[0] += 1
        if count[0] == number:
            raise Killed
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return count


def stopped_and_resumed(make, folder, stop):
    """The trainer after its run, which was killed at the end of step ``stop`` and made anew from its last checkpoint; never killed with 0."""
    trainer = make()
    if stop:
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == stop:
                    raise Killed

        trainer.add_callback(Stop())
        try:
            trainer.train()
        except Killed:
            trainer = make()
        else:
            raise AssertionError(f"the run ended before step {stop}")
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if stop else None)
    return trainer


def random_kept(small, large, seed):
    """A random map between two shapes."""
    draw = np.random.default_rng(seed)
    group = large.heads // large.kv_heads
    heads = [np.concatenate([g * group + draw.permutation(group) for g in draw.permutation(large.kv_heads)]) for _ in range(large.layers)]
    return Kept(
        np.sort(draw.choice(large.layers, small.layers, replace=False)), np.stack([draw.permutation(large.ffn) for _ in range(large.layers)]),
        np.stack(heads), draw.permutation(large.hidden),
    )


class Widest(TorchDispatchMode):
    """While it is entered, the most rows of a vocabulary's width that one tensor had, in ``rows``."""

    def __init__(self, width=VOCAB):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dim() and made.shape[-1] == self.width:
            self.rows = max(self.rows, made.numel() // self.width)
        return made
