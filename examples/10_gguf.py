"""A size of a chain as a GGUF file for llama.cpp, with the log-probabilities that llama.cpp gives compared with those of transformers.

    python examples/10_gguf.py --chain org/NAME --size 117M --type q8_0 --out ./model.gguf
    python examples/10_gguf.py --smoke

Needs `pip install '.[gguf]'`. The converter is llama.cpp's own: of a clone (--llama-cpp DIR), else of the sources that llama-cpp-python's package on
PyPI brings along (77 MB, fetched once). Exits with 1 where a log-probability is further off than its bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import smoke
import torch
import xllamacpp
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub import CBDModel


SOURCES = "llama-cpp-python==0.3.36"
BOUNDS = {"f32": (0.005, 1e-5), "f16": (0.1, 1e-3), "q8_0": (3.0, 0.02)}  # of the largest difference of log-probabilities, and of the mean KL, nats
TEXT = "The history of the city begins in the ninth century, when a small market grew at the crossing of two old roads."


def llama_cpp() -> Path:
    """The converter of llama.cpp and what it imports, unpacked once into the cache."""
    target = Path(constants.HF_HOME) / "cbd_hub" / SOURCES.replace("==", "-")
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", temporary, SOURCES]
            subprocess.run(command, check=True)
            with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
                wanted = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")
                members = [member for member in archive.getmembers() if member.name.partition("/vendor/llama.cpp/")[2].startswith(wanted)]
                archive.extractall(temporary, members, filter="data")
            next(Path(temporary).glob("*/vendor/llama.cpp")).rename(target)
    return target


def by_llama_cpp(path: Path, text: str, vocabulary: int) -> tuple[list[int], dict[int, torch.Tensor]]:
    """The text's tokens, and by position log-probabilities of the next token, (V,), at every fourth position."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(path), 512, 1, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums in half precision
    server = xllamacpp.Server(params)
    request = urllib.request.Request(f"{server.listening_address}/tokenize", json.dumps({"content": text, "add_special": True}).encode(), {"Content-Type": "application/json"})
    ids: list[int] = json.load(urllib.request.urlopen(request))["tokens"]
    found = {}
    for position in range(0, len(ids), 4):
        # The token that it takes is a printable one: half a character would be kept back, with its probabilities, which are those before the bias.
        answer: Any = server.handle_completions({"prompt": ids[: position + 1], "n_predict": 1, "n_probs": vocabulary, "logit_bias": [[ids[1], 1000]]})
        row = torch.full((vocabulary,), -torch.inf)
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        found[position] = row
    return ids, found


def compare(folder: str, path: Path) -> tuple[float, float]:
    """The largest difference of log-probabilities, which is that of logits up to what all tokens have in common, and the mean KL, over positions."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    ids, theirs = by_llama_cpp(path, TEXT, model.config.vocab_size)
    if tokenizer(TEXT)["input_ids"] != ids:
        raise SystemExit(f"llama.cpp reads the text as other tokens: {ids[:10]}, {tokenizer(TEXT)['input_ids'][:10]}")
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0, list(theirs)].log_softmax(-1)
    rows = torch.stack(list(theirs.values())).log_softmax(-1)  # its own sum is rounded in the fourth place
    return float((ours - rows).abs().max()), float((ours.exp() * (ours - rows)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", default="./chain", help="Hub id or folder of a chain")
    parser.add_argument("--size", default="117M", help="parameters wanted")
    parser.add_argument("--type", default="q8_0", choices=BOUNDS, help="how the weights are stored")
    parser.add_argument("--out", type=Path, default=Path("model.gguf"), help="the file to make")
    parser.add_argument("--llama-cpp", type=Path, help="a clone of llama.cpp")
    parser.add_argument("--smoke", action="store_true", help="a tiny chain")
    options = parser.parse_args()
    if options.smoke:
        options.chain, options.size, options.type, options.out = smoke.chain(), smoke.SIZE, "f32", smoke.folder() / "model.gguf"
    with tempfile.TemporaryDirectory() as temporary:
        folder = f"{temporary}/model"
        CBDModel.materialize(options.chain, size=options.size, output_dir=folder)  # an ordinary checkpoint: `cbd make`
        converter = (options.llama_cpp or llama_cpp()) / "convert_hf_to_gguf.py"
        subprocess.run([sys.executable, converter, folder, "--outtype", options.type, "--outfile", options.out], check=True)
        difference, divergence = compare(folder, options.out)
    bounds = BOUNDS[options.type]
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB, {options.type}")
    print(f"largest difference of log-probabilities to transformers: {difference:.2g} (bound {bounds[0]}), mean KL {divergence:.2g} (bound {bounds[1]})")
    raise SystemExit(int(not (difference <= bounds[0] and divergence <= bounds[1])))


if __name__ == "__main__":
    main()
