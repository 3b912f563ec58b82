"""Small tokenizers of every kind that a bridge must align, trained or written on the spot."""

import json

import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cbd_hub.losses.alignment import byte_alphabet


HARD = [
    "The cat sat on the mat.", " a  b   c ", "tabs\tand\r\nCRLF\r\n\r\n", "cafe\u0301 nai\u0308ve A\u030angstro\u0308m", "café naïve Ångström", "👩‍👩‍👧 👍🏽 🇩🇪 emoji",
    "def f(x):\n    return x ** 2  # 平方", "שלום עולם مرحبا بالعالم", "zero\u200bwidth\u200d\ufeff\u200e", "\u2581literal\u2581 mark \u2581", "日本語のテキスト 한국어 각",
    "<eos>special<bos> <|tool|>  here", "", " ", "\n", "\u0301", "a", "\U0001f600\U0001f600", "<0xE2><0x96>", "e\u0301e\u0301\u0301 x\u0327\u0301", "\x00\x01 control", "ﬁ ligature ½",
]
CORPUS = [*tiny.texts(60), *HARD, "The cat and the dog sat on the mat; the café was naïve. 日本語 שלום 👍"] * 2


def _wrapped(inner, **more):
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **{"bos_token": "<bos>", "eos_token": "<eos>", **more})
    made.add_tokens([AddedToken("<|tool|>", special=False, normalized=False)])
    made.chat_template = "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
    return made


def byte_level(size=400, *, normalizer=None, prefix=False, trim=True, corpus=CORPUS):
    """Byte-level BPE, as of GPT-2, and with NFC as of Qwen."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normalizer is not None:
        inner.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    inner.train_from_iterator(corpus, trainer)
    return _wrapped(inner, pad_token="<pad>")


def sentencepiece(size=500, *, prepend=True, bos=True):
    """SentencePiece-like BPE with byte fallback, as of llama (a space in front) and gemma (none)."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<bos>", "<eos>", *bytes_], limit_alphabet=45, show_progress=False)
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.train_from_iterator(tiny.texts(60), trainer)
    read = json.loads(inner.to_str())
    read["added_tokens"] = [token for token in read["added_tokens"] if not token["content"].startswith("<0x")]  # they are of the model, not matched in texts
    inner = Tokenizer.from_str(json.dumps(read))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", inner.token_to_id("<bos>"))])
    return _wrapped(inner, unk_token="<unk>")


def with_spare(tokenizer, count=1):
    """The tokenizer with added tokens at its end for which no row of its model is meant, as gemma 3's image token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<spare_{place}>" for place in range(count)]})
    return tokenizer


def bytewise():
    """A token a byte."""
    return tiny.tokenizer()


MAKERS = {
    "bytes": bytewise, "gpt2": byte_level, "gpt2_larger": lambda: byte_level(700), "prefix": lambda: byte_level(450, prefix=True),
    "qwen": lambda: byte_level(600, normalizer=normalizers.NFC(), trim=False), "llama": sentencepiece, "gemma": lambda: sentencepiece(600, prepend=False),
}


def as_byte_level(data):
    """Bytes as byte-level BPE writes them."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    return "".join(characters[byte] for byte in data)
